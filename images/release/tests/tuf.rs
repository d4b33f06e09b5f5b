//! The client against a repository in memory: what is accepted, and every attack with its own error.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Key, Repo, day, kind_of, now};
use kiln_release::TufError;
use kiln_release::tuf::{Client, ExpiryPolicy, Fetched, Limits, Request, Seen, TargetPath, Wanted};
use proptest::prelude::*;

const MANIFEST: &str = "minimal/1/manifest.json";

#[test]
fn a_good_repository_gives_the_targets_and_what_to_remember() {
    let repo = Repo::new();
    let outcome = repo.update(Seen::default()).unwrap();
    assert_eq!(outcome.targets["site.json"].bytes, b"{\"site\":1}");
    assert_eq!(outcome.targets[MANIFEST].bytes, b"{\"manifest\":1}");
    assert_eq!(outcome.targets[MANIFEST].role, "image-minimal");
    assert!(outcome.stale.is_empty());
    assert_eq!(outcome.seen.root, 1);
    assert_eq!(outcome.seen.timestamp.as_ref().unwrap().version, 1);
    assert_eq!(outcome.seen.roles["image-minimal"], 1);
    assert_eq!(outcome.offline_expires, day(100));
    assert_eq!(outcome.offline_expires_newest, day(365));
    // The same again after a reboot, with what was remembered.
    repo.update(outcome.seen).unwrap();
}

/// What docs/metadata.md promises, row by row.
#[test]
fn the_caps_are_the_documented_ones() {
    const MIB: u64 = 1 << 20;
    const KIB: u64 = 1 << 10;
    let Limits { root, root_chain, timestamp, snapshot, targets, delegation, target, roles } = Limits::default();
    assert_eq!([root, timestamp, snapshot, targets], [MIB; 4]);
    assert_eq!((root_chain, delegation, target, roles), (1024, 256 * KIB, 256 * KIB, 32));
    let path = |length: usize| TargetPath::new("a".repeat(length)).is_ok();
    assert_eq!((path(1024), path(1025)), (true, false));
    for row in [
        "| root, timestamp, snapshot | 1 MiB each |",
        "| new roots in one update | 1 024 |",
        "| top-level targets | 1 MiB |",
        "| a delegated role (an image's) | 256 KiB |",
        "| a target (manifest, `site.json`) | 256 KiB |",
        "| roles visited in search of one target | 32 |",
        "| a target's path | 1 024 bytes |",
    ] {
        let documented = include_str!("../../../docs/metadata.md").lines().any(|line| line.starts_with(row));
        assert!(documented, "docs/metadata.md has no row {row}");
    }
}

#[test]
fn each_file_is_asked_for_with_its_cap() {
    let repo = Repo::new();
    let mut client = repo.client(Seen::default()).unwrap();
    let mut asked = Vec::new();
    while let Request::Fetch { path, max_bytes, may_be_absent } = client.next() {
        asked.push((path.clone(), max_bytes, may_be_absent));
        client.feed(repo.fetch(&path)).unwrap();
    }
    let length = |path: &str| repo.files[path].len() as u64;
    let target = |path: &str| repo.files.keys().find(|name| name.ends_with(path)).unwrap().clone();
    let (site, manifest) = (target(".site.json"), target(".manifest.json"));
    let expected = [
        ("metadata/2.root.json", 1 << 20, true),
        ("metadata/timestamp.json", 1 << 20, false),
        ("metadata/1.snapshot.json", length("metadata/1.snapshot.json"), false),
        ("metadata/1.targets.json", length("metadata/1.targets.json"), false),
        (site.as_str(), 10, false),
        ("metadata/1.image-minimal.json", length("metadata/1.image-minimal.json"), false),
        (manifest.as_str(), 14, false),
    ];
    assert_eq!(asked, expected.map(|(path, cap, absent)| (path.to_owned(), cap, absent)));
    assert_eq!(client.feed(Fetched::Absent).unwrap_err().kind(), "client-not-asked");
}

#[test]
fn one_flipped_byte_in_any_file_is_refused_by_name() {
    let repo = Repo::new();
    // The trusted root is not fetched.
    for path in repo.files.keys().filter(|path| !path.ends_with("1.root.json")) {
        for at in 0..repo.files[path].len() {
            let mut altered = repo.clone();
            altered.files.get_mut(path).unwrap()[at] ^= 1;
            let error = altered.update(Seen::default()).map(|_| ()).map_err(|e| (e.kind(), e.to_string()));
            if path.ends_with("timestamp.json") {
                // Not covered by another file's hash: what breaks the JSON is malformed, the rest is not signed.
                match error {
                    Ok(()) => assert_eq!(at + 1, repo.files[path].len(), "only the line break says nothing"),
                    Err((kind, text)) => {
                        assert!(matches!(kind, "metadata-malformed" | "metadata-bad-signature"), "{kind} at {at}");
                        assert!(text.contains(path), "{text}");
                    }
                }
            } else {
                let (kind, text) = error.unwrap_err();
                assert_eq!(kind, "metadata-hash-mismatch", "{path} at {at}");
                assert!(text.contains(path), "{text}");
            }
        }
    }
}

#[test]
fn every_role_signed_by_a_foreign_key_is_refused() {
    for role in ["timestamp", "snapshot", "targets", "image-minimal"] {
        let mut repo = Repo::new();
        repo.signers.insert(role.to_owned(), vec![Key::new(99)]);
        repo.write();
        let error = repo.update(Seen::default()).unwrap_err();
        assert!(matches!(error, TufError::BadSignature { expected: 1, got: 0, .. }), "{role}: {error}");
        assert!(error.to_string().contains(role), "{error}");
    }
    let foreign = Repo::with_seed(50);
    let mut repo = Repo::new();
    repo.files = foreign.files;
    assert_eq!(kind_of(repo.update(Seen::default())), "metadata-bad-signature");
}

#[test]
fn no_signature_and_an_unsigned_trusted_root_are_refused() {
    let mut repo = Repo::new();
    repo.signers.insert("timestamp".into(), vec![]);
    repo.write();
    assert_eq!(kind_of(repo.update(Seen::default())), "metadata-bad-signature");
    repo.signers.insert("root".into(), vec![]);
    repo.reroot();
    assert_eq!(repo.client(Seen::default()).unwrap_err().kind(), "metadata-bad-signature");
}

#[test]
fn a_threshold_counts_distinct_keys() {
    let mut repo = Repo::new();
    let (one, two) = (Key::new(60), Key::new(61));
    repo.keys.insert("snapshot".into(), (vec![one, two], 2));
    repo.reroot();
    repo.signers.insert("snapshot".into(), vec![one, two]);
    repo.write();
    repo.update(Seen::default()).unwrap();

    repo.signers.insert("snapshot".into(), vec![one]);
    repo.write();
    assert!(matches!(repo.update(Seen::default()), Err(TufError::BadSignature { expected: 2, got: 1, .. })));
    // The same signature twice under one key id.
    repo.signers.insert("snapshot".into(), vec![one, one]);
    repo.write();
    assert_eq!(kind_of(repo.update(Seen::default())), "metadata-malformed");
}

#[test]
fn one_key_under_two_ids_counts_once() {
    let mut repo = Repo::new();
    repo.keys.insert("snapshot".into(), (vec![Key::new(60)], 2));
    repo.alias = Some(("snapshot".into(), "f".repeat(64)));
    repo.reroot();
    repo.signers.insert("snapshot".into(), vec![Key::new(60)]);
    repo.write();
    assert!(matches!(repo.update(Seen::default()), Err(TufError::BadSignature { expected: 2, got: 1, .. })));
}

#[test]
fn one_roles_file_served_as_anothers_is_refused() {
    let mut repo = Repo::new();
    // Even where one key signs both.
    let shared = Key::new(70);
    for role in ["timestamp", "snapshot", "targets"] {
        repo.keys.insert(role.into(), (vec![shared], 1));
        repo.signers.insert(role.into(), vec![shared]);
    }
    repo.reroot();
    repo.write();
    repo.update(Seen::default()).unwrap();
    let snapshot = repo.files["metadata/1.snapshot.json"].clone();
    repo.files.insert("metadata/timestamp.json".into(), snapshot);
    let error = repo.update(Seen::default()).unwrap_err();
    assert!(matches!(&error, TufError::WrongType { expected: "timestamp", got, .. } if got == "snapshot"), "{error}");
}

#[test]
fn an_older_set_after_a_newer_one_was_seen_is_refused() {
    let old = Repo::new();
    let mut new = old.clone();
    new.bump_all();
    let seen = new.update(Seen::default()).unwrap().seen;
    // Through its stored form, as over a cold boot.
    let seen: Seen = serde_json::from_str(&serde_json::to_string(&seen).unwrap()).unwrap();
    let error = old.update(seen.clone()).unwrap_err();
    assert!(matches!(error, TufError::Rollback { seen: 2, got: 1, .. }), "{error}");

    // A new timestamp over an old snapshot.
    let mut replay = old.clone();
    replay.versions.insert("timestamp".into(), 3);
    replay.write();
    let error = replay.update(seen.clone()).unwrap_err();
    assert!(matches!(&error, TufError::Rollback { role, .. } if role == "snapshot"), "{error}");

    // New timestamp and snapshot over an old targets role, and without one.
    for role in ["targets", "image-minimal"] {
        let mut replay = new.clone();
        replay.versions.insert("timestamp".into(), 3);
        replay.versions.insert("snapshot".into(), 3);
        replay.versions.insert(role.into(), 1);
        replay.write();
        let error = replay.update(seen.clone()).unwrap_err();
        assert!(matches!(&error, TufError::Rollback { role: got, .. } if got == role), "{error}");
        replay.unlisted.push(role.into());
        replay.write();
        assert_eq!(kind_of(replay.update(seen.clone())), "metadata-role-removed");
    }
}

#[test]
fn what_was_verified_before_a_failure_is_remembered() {
    let mut repo = Repo::new();
    repo.bump_all();
    let snapshot = repo.files.remove("metadata/2.snapshot.json").unwrap();
    let mut client = repo.client(Seen::default()).unwrap();
    let error = repo.drive(&mut client).unwrap_err();
    assert_eq!(error.kind(), "metadata-missing");
    assert_eq!(client.seen().timestamp.as_ref().unwrap().version, 2);
    assert_eq!(client.seen().snapshot, None);
    assert_eq!(kind_of(Repo::new().update(client.seen().clone())), "metadata-rollback");
    repo.files.insert("metadata/2.snapshot.json".into(), snapshot);
    repo.update(client.seen().clone()).unwrap();
}

#[test]
fn files_of_two_repository_states_do_not_mix() {
    let old = Repo::new();
    let mut new = old.clone();
    new.bump_all();
    // Files under the names of the new state, contents of the old one.
    for role in ["snapshot", "targets", "image-minimal"] {
        let (from, to) = (format!("metadata/1.{role}.json"), format!("metadata/2.{role}.json"));
        let mut mixed = new.clone();
        mixed.files.insert(to.clone(), old.files[&from].clone());
        assert_eq!(kind_of(mixed.update(Seen::default())), "metadata-hash-mismatch", "{role}");
        // A repository that lists no hashes is still protected by versions.
        let mut bare = old.clone();
        bare.hashes = false;
        bare.write();
        let older = bare.files[&from].clone();
        bare.bump_all();
        bare.files.insert(to, older);
        let error = bare.update(Seen::default()).unwrap_err();
        assert!(matches!(error, TufError::VersionMismatch { expected: 2, got: 1, .. }), "{role}: {error}");
    }
}

#[test]
fn expired_metadata_is_refused_or_reported() {
    for role in ["root", "timestamp", "snapshot", "targets", "image-minimal"] {
        let mut repo = Repo::new();
        repo.expires.insert(role.into(), now());
        repo.reroot();
        repo.write();
        let error = repo.update(Seen::default()).unwrap_err();
        assert!(matches!(&error, TufError::Expired { file, .. } if file.contains(role)), "{error}");
        repo.policy = ExpiryPolicy::ReportStale;
        let outcome = repo.update(Seen::default()).unwrap();
        let stale: Vec<_> = outcome.stale.iter().map(|expiry| expiry.role.as_str()).collect();
        assert_eq!(stale, [role]);
        assert_eq!(outcome.targets.len(), 2);
    }
    // Judged again at another time.
    let outcome = Repo::new().update(Seen::default()).unwrap();
    assert_eq!(outcome.stale_at(day(2)).len(), 1);
    assert_eq!(outcome.stale_at(day(100)).len(), 2);
    assert_eq!(outcome.stale_at(day(400)).len(), 5);
}

#[test]
fn too_long_is_refused_before_and_after_the_transfer() {
    // More than listed, or than the limit where nothing is listed.
    for name in ["timestamp.json", "1.targets.json", "manifest.json"] {
        let mut repo = Repo::new();
        let path = repo.files.keys().find(|path| path.ends_with(name)).unwrap().clone();
        repo.files.get_mut(&path).unwrap().resize(2 << 20, b' ');
        assert_eq!(kind_of(repo.update(Seen::default())), "metadata-too-long", "{name}");
    }
    // Less than listed.
    let mut repo = Repo::new();
    repo.files.get_mut("metadata/1.snapshot.json").unwrap().pop();
    assert_eq!(kind_of(repo.update(Seen::default())), "metadata-length-mismatch");
    // Listed beyond its limit: never asked for.
    let mut repo = Repo::new();
    repo.limits.delegation = 100;
    let error = repo.update(Seen::default()).unwrap_err();
    assert!(matches!(&error, TufError::TooLong { file, limit: 100, .. } if file.contains("image-minimal")), "{error}");
    let mut repo = Repo::new();
    repo.limits.target = 5;
    assert!(matches!(repo.update(Seen::default()), Err(TufError::TooLong { limit: 5, .. })));
    // The transfer was stopped.
    let mut client = Repo::new().client(Seen::default()).unwrap();
    assert_eq!(client.feed(Fetched::TooLong).unwrap_err().kind(), "metadata-too-long");
}

#[test]
fn what_no_role_lists_is_not_found() {
    let mut repo = Repo::new();
    repo.wanted = vec![TargetPath::manifest("minimal", 9).unwrap()];
    let error = repo.update(Seen::default()).unwrap_err();
    assert_eq!(error, TufError::TargetNotListed { path: "minimal/9/manifest.json".into() });
    // A delegated role may not speak of another image.
    let mut repo = Repo::new();
    repo.extra_target = Some(("image-minimal".into(), "other/1/manifest.json".into()));
    repo.write();
    repo.wanted = vec![TargetPath::manifest("other", 1).unwrap()];
    assert_eq!(kind_of(repo.update(Seen::default())), "target-not-listed");
    // Nor of site.json: the top-level role is asked first, and nothing delegates it.
    let mut repo = Repo::new();
    repo.extra_target = Some(("image-minimal".into(), "site.json".into()));
    repo.write();
    assert_eq!(repo.update(Seen::default()).unwrap().targets["site.json"].role, "targets");
}

#[test]
fn everything_listed_is_what_the_delegations_allow() {
    let mut repo = Repo::new();
    repo.extra_target = Some(("image-minimal".into(), "other/1/manifest.json".into()));
    repo.write();
    let (seen, limits, policy) = (Seen::default(), Limits::default(), ExpiryPolicy::Refuse);
    let mut client = Client::new(&repo.trusted_root, seen, now(), limits, policy, Wanted::All).unwrap();
    repo.drive(&mut client).unwrap();
    let names: Vec<_> = client.finish().unwrap().targets.into_keys().collect();
    assert_eq!(names, [MANIFEST, "site.json"]);
}

#[test]
fn a_missing_file_is_named() {
    let repo = Repo::new();
    for path in repo.files.keys().filter(|path| !path.ends_with("root.json")) {
        let mut repo = repo.clone();
        repo.files.remove(path);
        assert_eq!(repo.update(Seen::default()).unwrap_err(), TufError::Missing { file: path.clone() });
    }
}

#[test]
fn an_unfinished_update_has_no_outcome() {
    let error = Repo::new().client(Seen::default()).unwrap().finish().unwrap_err();
    assert_eq!(error, TufError::Unfinished { file: "metadata/2.root.json".into() });
}

#[test]
fn other_spec_versions_are_refused() {
    for (version, good) in [("1.0.33", true), ("1.1", true), ("2.0.0", false), ("1", false), ("one", false)] {
        let mut repo = Repo::new();
        repo.spec_version = version.into();
        repo.write();
        match repo.update(Seen::default()) {
            Ok(_) => assert!(good, "{version}"),
            Err(error) => assert!(!good && error.kind() == "metadata-unsupported-spec-version", "{error}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a server answers, the client ends in an error or in what was signed, within a bounded number of files.
    #[test]
    fn no_sequence_of_answers_gets_a_foreign_byte_in(
        answers in proptest::collection::vec((0u8..12, any::<u16>()), 1..40),
    ) {
        let mut repo = Repo::new();
        repo.root_version(2);
        let paths: Vec<String> = repo.files.keys().cloned().collect();
        let mut client = repo.client(Seen::default()).unwrap();
        let mut answers = answers.into_iter().cycle();
        for _ in 0..50 {
            let Request::Fetch { path, .. } = client.next() else { break };
            let (how, pick) = answers.next().unwrap();
            let answer = match (how, repo.fetch(&path)) {
                (0, _) => Fetched::Bytes(repo.files[&paths[usize::from(pick) % paths.len()]].clone()),
                (1, Fetched::Bytes(mut bytes)) => {
                    let at = usize::from(pick) % bytes.len();
                    bytes[at] ^= 0x20;
                    Fetched::Bytes(bytes)
                }
                (_, honest) => honest,
            };
            if client.feed(answer).is_err() {
                return Ok(());
            }
        }
        let outcome = client.finish().unwrap();
        prop_assert_eq!(&outcome.targets["site.json"].bytes[..], b"{\"site\":1}");
        prop_assert_eq!(&outcome.targets[MANIFEST].bytes[..], b"{\"manifest\":1}");
        prop_assert_eq!(outcome.root.version, 2);
    }
}
