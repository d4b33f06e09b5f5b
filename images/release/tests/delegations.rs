//! The search through delegations (5.6.7): order, termination, cycles, and whose keys count.
#![allow(clippy::unwrap_used)]

use jiff::{SignedDuration, Timestamp};
use kiln_release::tuf::{
    Client, ExpiryPolicy, Fetched, Limits, MetaFile, Outcome, Request, RoleKeys, Root, RootRoles, Seen, Snapshot,
    TargetFile, TargetPath, Targets,
};
use kiln_release::{Signer, TufError, hex, sign_envelope};
use std::collections::BTreeMap;

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn key(seed: u8) -> Signer {
    Signer::from_seed(&[seed; 32])
}

/// One delegated or top-level role: its key, whether it lists the wanted file, and (name, key, terminating) of those
/// it delegates everything to.
type Roles<'a> = Vec<(&'a str, u8, bool, Vec<(&'a str, u8, bool)>)>;

/// A root whose one key has signed everything, and what a timestamp would say of the snapshot, which is put to the files.
fn signed(snapshot: &Snapshot, files: &mut BTreeMap<String, Vec<u8>>) -> (String, MetaFile) {
    let one = RoleKeys::new(&[key(0).public()], 1);
    let keys = RootRoles { root: one.clone(), timestamp: one.clone(), snapshot: one.clone(), targets: one };
    let root = sign_envelope(&Root::new(1, snapshot.expires, &[key(0).public()], keys), &[&key(0)]).unwrap();
    let snapshot = sign_envelope(snapshot, &[&key(0)]).unwrap().into_bytes();
    let listed = MetaFile::of(1, &snapshot);
    files.insert("metadata/1.snapshot.json".into(), snapshot);
    (root, listed)
}

fn update(roles: &Roles<'_>, limits: Limits) -> Result<Outcome, TufError> {
    let expires = now() + SignedDuration::from_hours(24);
    let mut files = BTreeMap::new();
    let mut snapshot = Snapshot::new(1, expires);
    for (name, seed, lists, children) in roles {
        let mut targets = Targets::new(1, expires);
        if *lists {
            let bytes = name.as_bytes();
            targets.targets.insert("dir/file".into(), TargetFile::of(bytes));
            files.insert(format!("targets/dir/{}.file", hex::sha256(bytes)), bytes.to_vec());
        }
        for (child, child_key, terminating) in children {
            targets.delegate(child, &[key(*child_key).public()], 1, vec!["dir/*".into()], *terminating);
        }
        let text = sign_envelope(&targets, &[&key(*seed)]).unwrap();
        snapshot.list(name, 1, text.as_bytes());
        files.insert(format!("metadata/1.{name}.json"), text.into_bytes());
    }
    let (root, listed) = signed(&snapshot, &mut files);
    let wanted = vec![TargetPath::new("dir/file").unwrap()];
    let policy = ExpiryPolicy::Refuse;
    let mut client = Client::from_snapshot(root.as_bytes(), Seen::default(), now(), limits, policy, wanted, listed)?;
    while let Request::Fetch { path, .. } = client.next() {
        client.feed(files.get(&path).map_or(Fetched::Absent, |bytes| Fetched::Bytes(bytes.clone())))?;
    }
    client.finish()
}

/// Which role's file was taken.
fn found(roles: &Roles<'_>) -> Result<String, &'static str> {
    update(roles, Limits::default())
        .map(|outcome| outcome.targets["dir/file"].role.clone())
        .map_err(|error| error.kind())
}

#[test]
fn earlier_and_deeper_delegations_come_first() {
    let roles = vec![
        ("targets", 0, false, vec![("a", 1, false), ("b", 2, false)]),
        ("a", 1, false, vec![("c", 3, false)]),
        ("b", 2, true, vec![]),
        ("c", 3, true, vec![]),
    ];
    assert_eq!(found(&roles).as_deref(), Ok("c"));
}

#[test]
fn a_terminating_delegation_ends_the_search() {
    for terminating in [false, true] {
        let roles = vec![
            ("targets", 0, false, vec![("a", 1, terminating), ("b", 2, false)]),
            ("a", 1, false, vec![]),
            ("b", 2, true, vec![]),
        ];
        let expected = if terminating { Err("target-not-listed") } else { Ok("b".to_owned()) };
        assert_eq!(found(&roles), expected);
    }
}

#[test]
fn cycles_end() {
    let roles = vec![
        ("targets", 0, false, vec![("a", 1, false)]),
        ("a", 1, false, vec![("b", 2, false), ("a", 1, false)]),
        ("b", 2, false, vec![("a", 1, false)]),
    ];
    assert_eq!(found(&roles), Err("target-not-listed"));
}

#[test]
fn nobody_delegates_to_a_top_level_role() {
    for name in ["root", "timestamp", "snapshot", "targets"] {
        let roles = vec![("targets", 0, false, vec![("a", 1, false)]), ("a", 1, false, vec![(name, 1, false)])];
        assert_eq!(found(&roles), Err("metadata-malformed"), "{name}");
    }
}

#[test]
fn a_long_chain_of_roles_is_cut_off() {
    let names: Vec<String> = (0..6).map(|i| format!("r{i}")).collect();
    let mut roles: Roles<'_> = vec![("targets", 0, false, vec![("r0", 1, false)])];
    for pair in names.windows(2) {
        roles.push((&pair[0], 1, false, vec![(&pair[1], 1, false)]));
    }
    roles.push((&names[5], 1, true, vec![]));
    let limits = |roles| Limits { roles, ..Limits::default() };
    assert_eq!(update(&roles, limits(7)).unwrap().targets["dir/file"].role, "r5");
    assert!(matches!(update(&roles, limits(6)), Err(TufError::TooManyRoles { limit: 6, .. })));
}

#[test]
fn a_delegated_role_is_signed_by_the_delegators_keys() {
    let roles = vec![("targets", 0, false, vec![("a", 1, false)]), ("a", 9, true, vec![])];
    assert_eq!(found(&roles), Err("metadata-bad-signature"));
}

#[test]
fn a_role_that_snapshot_does_not_list_is_refused() {
    let roles = vec![("targets", 0, false, vec![("gone", 1, false)])];
    assert_eq!(found(&roles), Err("metadata-role-not-listed"));
}

#[test]
fn a_cached_role_is_judged_by_the_keys_of_each_delegator() {
    // For one file `shared` is reached through `a`, for the next through `b`, which names another key for it.
    let expires = now() + SignedDuration::from_hours(24);
    let mut files = BTreeMap::new();
    let mut snapshot = Snapshot::new(1, expires);
    let mut put = |name: &str, targets: &Targets, seed: u8| {
        let text = sign_envelope(targets, &[&key(seed)]).unwrap();
        snapshot.list(name, 1, text.as_bytes());
        files.insert(format!("metadata/1.{name}.json"), text.into_bytes());
    };
    let mut top = Targets::new(1, expires);
    top.delegate("a", &[key(1).public()], 1, vec!["a/*".into()], true);
    top.delegate("b", &[key(2).public()], 1, vec!["b/*".into()], true);
    put("targets", &top, 0);
    for (name, seed, shared_key) in [("a", 1, 3), ("b", 2, 4)] {
        let mut targets = Targets::new(1, expires);
        targets.delegate("shared", &[key(shared_key).public()], 1, vec!["*/*".into()], true);
        put(name, &targets, seed);
    }
    let mut shared = Targets::new(1, expires);
    for path in ["a/file", "b/file"] {
        shared.targets.insert(path.into(), TargetFile::of(b"x"));
    }
    put("shared", &shared, 3);
    for folder in ["a", "b"] {
        files.insert(format!("targets/{folder}/{}.file", hex::sha256(b"x")), b"x".to_vec());
    }
    let (root, listed) = signed(&snapshot, &mut files);
    for (wanted, kind) in [(vec!["a/file"], None), (vec!["a/file", "b/file"], Some("metadata-bad-signature"))] {
        let wanted: Vec<TargetPath> = wanted.into_iter().map(|path| TargetPath::new(path).unwrap()).collect();
        let (limits, policy) = (Limits::default(), ExpiryPolicy::Refuse);
        let mut client =
            Client::from_snapshot(root.as_bytes(), Seen::default(), now(), limits, policy, wanted, listed.clone())
                .unwrap();
        let mut result = Ok(());
        while let Request::Fetch { path, .. } = client.next() {
            result = client.feed(files.get(&path).map_or(Fetched::Absent, |bytes| Fetched::Bytes(bytes.clone())));
            if result.is_err() {
                break;
            }
        }
        assert_eq!(result.err().map(|error| error.kind()), kind);
    }
}
