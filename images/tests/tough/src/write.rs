//! A repository by tough's editor: two delegations, a root in two versions, a target with a field of its own.

use crate::Failure;
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::Ed25519KeyPair;
use std::collections::HashMap;
use std::num::NonZeroU64;
use std::path::Path;
use tough::async_trait;
use tough::editor::RepositoryEditor;
use tough::editor::signed::SignedRole;
use tough::key_source::KeySource;
use tough::schema::{Hashes, KeyHolder, PathPattern, PathSet, RoleKeys, RoleType, Root, Target};
use tough::sign::Sign;

const ONE: NonZeroU64 = NonZeroU64::MIN;
/// Delegated role, its pattern, its target.
const DELEGATED: [(&str, &str, &str); 2] =
    [("image-minimal", "minimal/*/manifest.json", "minimal/1/manifest.json"), ("odd role/ü", "odd/*", "odd/file")];

/// A key that is made of its name.
#[derive(Debug)]
struct Named(&'static str);

impl Named {
    fn pair(&self) -> Ed25519KeyPair {
        let seed = digest(&SHA256, self.0.as_bytes());
        Ed25519KeyPair::from_seed_unchecked(seed.as_ref()).expect("32 bytes are a seed")
    }
}

#[async_trait]
impl KeySource for Named {
    async fn as_sign(&self) -> Result<Box<dyn Sign>, Failure> {
        Ok(Box::new(self.pair()))
    }

    async fn write(&self, _value: &str, _key_id_hex: &str) -> Result<(), Failure> {
        Err("a key that is made of its name cannot be written".into())
    }
}

fn keys(names: &[&'static str]) -> Vec<Box<dyn KeySource>> {
    names.iter().map(|name| Box::new(Named(*name)) as Box<dyn KeySource>).collect()
}

pub async fn run(folder: &Path, expires: &str) -> Result<(), Failure> {
    let metadata = folder.join("metadata");
    for version in [1, 2] {
        let signers: &[&str] = if version == 1 { &["root"] } else { &["root", "root-2"] };
        let root = root(version, expires, signers)?;
        let holder = KeyHolder::Root(root.clone());
        let signed = SignedRole::new(root, &holder, &keys(signers), &SystemRandom::new()).await?;
        signed.write(&metadata, true).await?;
    }
    let mut editor = RepositoryEditor::new(metadata.join("2.root.json")).await?;
    editor.snapshot_version(ONE).snapshot_expires(expires.parse()?);
    editor.timestamp_version(ONE).timestamp_expires(expires.parse()?);
    editor.targets_version(ONE)?.targets_expires(expires.parse()?)?;
    editor.add_target("site.json", put(folder, "site.json", "site of äöü \\ \" \n".as_bytes())?)?;
    for (role, pattern, _) in DELEGATED {
        let paths = PathSet::Paths(vec![PathPattern::new(pattern)?]);
        editor.delegate_role(role, &keys(&[role]), paths, true, ONE, expires.parse()?, ONE).await?;
    }
    editor.sign_targets_editor(&keys(&["targets"])).await?;
    for (role, _, path) in DELEGATED {
        editor.change_delegated_targets(role)?.targets_version(ONE)?.targets_expires(expires.parse()?)?;
        editor.add_target(path, put(folder, path, path.as_bytes())?)?;
        editor.sign_targets_editor(&keys(&[role])).await?;
    }
    editor.sign(&keys(&["snapshot", "timestamp"])).await?.write(&metadata).await?;
    Ok(())
}

/// Every role with a key of its name; the root's threshold is all of its keys.
fn root(version: u64, expires: &str, signers: &[&'static str]) -> Result<Root, Failure> {
    let lists: [(RoleType, &[&'static str]); 4] = [
        (RoleType::Root, signers),
        (RoleType::Timestamp, &["timestamp"]),
        (RoleType::Snapshot, &["snapshot"]),
        (RoleType::Targets, &["targets"]),
    ];
    let (mut keys, mut roles) = (HashMap::new(), HashMap::new());
    for (role, names) in lists {
        let mut keyids = Vec::new();
        for name in names {
            let key = Named(*name).pair().tuf_key();
            let id = key.key_id()?;
            keys.insert(id.clone(), key);
            keyids.push(id);
        }
        let threshold = NonZeroU64::new(names.len() as u64).ok_or("a role has a key")?;
        roles.insert(role, RoleKeys { keyids, threshold, _extra: HashMap::new() });
    }
    Ok(Root {
        spec_version: "1.0.0".to_owned(),
        consistent_snapshot: true,
        version: NonZeroU64::new(version).ok_or("versions start at 1")?,
        expires: expires.parse()?,
        keys,
        roles,
        _extra: HashMap::new(),
    })
}

/// Puts a target's file where the specification has it: tough would put the hash before the whole path.
fn put(repository: &Path, path: &str, bytes: &[u8]) -> Result<Target, Failure> {
    let sha256 = digest(&SHA256, bytes).as_ref().to_vec();
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let folder = repository.join("targets").join(folder);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(format!("{}.{name}", hex::encode(&sha256))), bytes)?;
    let custom = HashMap::from([("note".to_owned(), serde_json::json!({ "text": "ä\"\\\n\t", "none": null }))]);
    Ok(Target {
        length: bytes.len() as u64,
        hashes: Hashes { sha256: sha256.into(), _extra: HashMap::new() },
        custom,
        _extra: HashMap::new(),
    })
}
