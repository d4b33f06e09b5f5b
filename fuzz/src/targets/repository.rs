//! A whole update of the TUF client, of whose files one is what the fuzzer says, signed with the role's own key.

use jiff::Timestamp;
use kiln_release::tuf::{
    Client, ExpiryPolicy, Fetched, Limits, MetaFile, Outcome, Request, RoleKeys, Root, RootRoles, Seen, Snapshot,
    TargetFile, TargetPath, Targets, TimestampRole, TufError,
};
use kiln_release::{Signer, hex, sign_envelope};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::LazyLock;

const ROLES: [&str; 6] = ["root", "timestamp", "snapshot", "targets", "image-minimal", "trusted root"];
/// The bytes are the file itself, and not what is to be signed.
const RAW: usize = 0x80;
/// Far more than the limits let a client ask for: 1 024 roots, and 32 roles for each of two targets.
const REQUESTS: usize = 1200;

struct Repository {
    signers: BTreeMap<&'static str, Signer>,
    files: BTreeMap<&'static str, Vec<u8>>,
    documents: Vec<Vec<u8>>,
}

fn day(n: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + n * 86_400).expect("a time of this century")
}

/// Its metadata lists no hashes and lengths, so that a file can be another one. The role `image-minimal` delegates in
/// turn, and by hash prefixes.
static REPOSITORY: LazyLock<Repository> = LazyLock::new(|| {
    let names = ["root", "timestamp", "snapshot", "targets", "image-minimal"];
    let signers: BTreeMap<&str, Signer> =
        (20_u8..).zip(names).map(|(n, name)| (name, Signer::from_seed(&[n; 32]))).collect();
    let public = |name: &str| signers[name].public();
    let keys = |name: &str| RoleKeys::new(&[public(name)], 1);
    let root = |version| {
        let all: Vec<_> = names[..4].iter().map(|name| public(name)).collect();
        let (root, timestamp) = (keys("root"), keys("timestamp"));
        let roles = RootRoles { root, timestamp, snapshot: keys("snapshot"), targets: keys("targets") };
        Root::new(version, day(300), &all, roles)
    };
    let mut image = Targets::new(1, day(30));
    image.targets.insert("minimal/1/manifest.json".into(), TargetFile::of(b"{}"));
    image.delegate("inner", &[public("targets")], 1, vec!["minimal/*/*".into()], false);
    let mut top = Targets::new(1, day(30));
    top.targets.insert("site.json".into(), TargetFile::of(b"{}"));
    top.delegate("image-minimal", &[public("image-minimal")], 1, vec!["minimal/*/manifest.json".into()], true);
    if let Some(delegations) = &mut image.delegations {
        for role in &mut delegations.roles {
            (role.paths, role.path_hash_prefixes) = (None, Some(vec!["0".into(), "a1".into()]));
        }
    }
    let plain = MetaFile { version: 1, length: None, hashes: BTreeMap::new() };
    let mut snapshot = Snapshot::new(1, day(30));
    for name in ["targets.json", "image-minimal.json", "inner.json"] {
        snapshot.meta.insert(name.into(), plain.clone());
    }
    let mut timestamp = TimestampRole::new(1, day(3), 1, b"");
    timestamp.meta.insert("snapshot.json".into(), plain);
    let text = |value: Value| value.to_string().into_bytes();
    let json = |value: serde_json::Result<Value>| text(value.expect("a document is JSON"));
    let documents = vec![
        json(serde_json::to_value(root(2))),
        json(serde_json::to_value(&timestamp)),
        json(serde_json::to_value(&snapshot)),
        json(serde_json::to_value(&top)),
        json(serde_json::to_value(&image)),
        json(serde_json::to_value(root(1))),
    ];
    let sign = |name: &str, document: &[u8]| {
        let value: Value = serde_json::from_slice(document).expect("just written");
        sign_envelope(&value, &[&signers[name]]).expect("no float").into_bytes()
    };
    let mut files: BTreeMap<&str, Vec<u8>> =
        names.iter().zip(&documents).skip(1).map(|(name, document)| (*name, sign(name, document))).collect();
    files.insert("trusted root", sign("root", &documents[5]));
    Repository { signers, files, documents }
});

/// The role whose file a path names, whatever its version.
fn role_of(path: &str) -> Option<&str> {
    let name = path.strip_prefix("metadata/")?.strip_suffix(".json")?;
    Some(match name.split_once('.') {
        Some((version, role)) if version.bytes().all(|b| b.is_ascii_digit()) => role,
        Some(_) | None => name,
    })
}

fn fetch(path: &str, which: &str, file: &[u8]) -> Fetched {
    if path.starts_with("targets/") {
        return Fetched::Bytes(b"{}".to_vec());
    }
    match role_of(path) {
        // Only the second root is there, and only if it is the one that is replaced.
        Some("root") if which == "root" && path == "metadata/2.root.json" => Fetched::Bytes(file.to_vec()),
        Some("root") | None => Fetched::Absent,
        Some(role) if role == which => Fetched::Bytes(file.to_vec()),
        Some(role) => REPOSITORY.files.get(role).map_or(Fetched::Absent, |bytes| Fetched::Bytes(bytes.clone())),
    }
}

fn update(which: &str, file: &[u8], seen: Seen, kept: bool) -> Result<Outcome, TufError> {
    let limits = Limits { root: 8 << 10, timestamp: 8 << 10, snapshot: 8 << 10, targets: 8 << 10, ..Limits::default() };
    let wanted = vec![TargetPath::site(), TargetPath::manifest("minimal", 1)?];
    let trusted = if which == "trusted root" { file } else { &REPOSITORY.files["trusted root"] };
    let mut client = Client::new(trusted, seen, day(0), limits, ExpiryPolicy::Refuse, wanted)?;
    if kept {
        client = client.with_kept(BTreeMap::new());
    }
    let mut requests = 0;
    while let Request::Fetch { path, max_bytes, .. } = client.next() {
        requests += 1;
        assert!(requests < REQUESTS, "the update does not end");
        check_request(&path, max_bytes, &limits);
        client.feed(fetch(&path, which, file))?;
    }
    client.finish()
}

fn check_request(path: &str, max_bytes: u64, limits: &Limits) {
    let rest = path.strip_prefix("metadata/").filter(|rest| !rest.contains('/')).or(path.strip_prefix("targets/"));
    let plain = rest.is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")))
        && path.bytes().all(|b| b.is_ascii_graphic() && b != b'\\');
    assert!(plain, "a request that leaves its folder: {path:?}");
    let most = limits.root.max(limits.delegation).max(limits.target);
    assert!(max_bytes <= most, "{path}: {max_bytes} bytes are more than any limit");
}

fn verdict(result: &Result<Outcome, TufError>) -> Result<Vec<&String>, &'static str> {
    result.as_ref().map(|outcome| outcome.targets.keys().collect()).map_err(TufError::kind)
}

/// An update with one file replaced.
pub mod tuf_update {
    use super::*;

    pub fn run(data: &[u8]) {
        let Some((choice, text)) = super::super::choice(data) else { return };
        let which = ROLES[(choice & !RAW) % ROLES.len()];
        let signer = if which == "trusted root" { "root" } else { which };
        let signed = serde_json::from_slice::<Value>(text)
            .ok()
            .filter(|_| choice & RAW == 0)
            .and_then(|value| sign_envelope(&value, &[&REPOSITORY.signers[signer]]).ok());
        let file = signed.map_or_else(|| text.to_vec(), String::into_bytes);

        let first = update(which, &file, Seen::default(), false);
        assert_eq!(
            verdict(&update(which, &file, Seen::default(), true)),
            verdict(&first),
            "kept files, another verdict"
        );
        if let Ok(value) = kiln_release::canonical::parse_strict(&file) {
            let pretty = serde_json::to_vec_pretty(&value).expect("it is JSON");
            if pretty.len() < 8 << 10 {
                let again = update(which, &pretty, Seen::default(), false);
                assert_eq!(verdict(&again), verdict(&first), "white space, another verdict");
            }
        }
        let Ok(outcome) = first else { return };
        for (path, target) in &outcome.targets {
            assert_eq!((target.bytes.as_slice(), &target.sha256), (&b"{}"[..], &hex::sha256(b"{}")), "{path}");
        }
        // What was seen once does not go back: the same again is taken, and says the same.
        let again = update(which, &file, outcome.seen.clone(), false).expect("the same repository again");
        assert_eq!(again.seen, outcome.seen);
        let higher =
            |seen: &Seen| Seen { timestamp_snapshot: seen.timestamp_snapshot.saturating_add(1), ..seen.clone() };
        let seen = higher(&outcome.seen);
        if seen != outcome.seen {
            let refused = update(which, &file, seen, false).map_err(|e| e.kind()).err();
            assert_eq!(refused, Some("metadata-rollback"), "an older snapshot than was seen");
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let documents = REPOSITORY.documents.iter();
        let signed = (0_u8..).zip(documents).map(|(n, document)| [&[n], document.as_slice()].concat());
        let raw = ["timestamp", "targets"].iter().map(|name| {
            let n = ROLES.iter().position(|role| role == name).expect("a role");
            [&[u8::try_from(RAW + n).expect("small")], REPOSITORY.files[name].as_slice()].concat()
        });
        signed.chain(raw).collect()
    }
}
