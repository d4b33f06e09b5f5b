//! The documents of TUF, section 4 of the specification, to read and to build.

use crate::envelope::KeySet;
use crate::hex;
use crate::key::PublicKey;
use crate::tuf::load::check_hashes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// What Kiln writes as `spec_version`; any 1.x is read.
pub const SPEC_VERSION: &str = "1.0.31";

/// Key ids of a TUF role and how many must sign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleKeys {
    /// Key ids; each once.
    pub keyids: Vec<String>,
    /// At least 1.
    pub threshold: u32,
}

impl RoleKeys {
    /// From the keys themselves.
    pub fn new(keys: &[PublicKey], threshold: u32) -> Self {
        Self { keyids: keys.iter().map(PublicKey::id).collect(), threshold }
    }
}

/// The four top-level roles of a root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // named as the roles are
pub struct RootRoles {
    pub root: RoleKeys,
    pub timestamp: RoleKeys,
    pub snapshot: RoleKeys,
    pub targets: RoleKeys,
}

/// `root.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the specification's own names
pub struct Root {
    #[serde(rename = "_type")]
    pub type_: String,
    pub spec_version: String,
    pub version: u64,
    #[serde(deserialize_with = "date")]
    pub expires: Timestamp,
    pub consistent_snapshot: bool,
    pub keys: BTreeMap<String, Value>,
    pub roles: RootRoles,
}

impl Root {
    /// Value of `_type`.
    pub const TYPE: &'static str = "root";

    /// A root with consistent snapshots; every role with these keys and thresholds.
    pub fn new(version: u64, expires: Timestamp, keys: &[PublicKey], roles: RootRoles) -> Self {
        Self {
            type_: Self::TYPE.to_owned(),
            spec_version: SPEC_VERSION.to_owned(),
            version,
            expires: whole_seconds(expires),
            consistent_snapshot: true,
            keys: keys.iter().map(|key| (key.id(), key.to_object())).collect(),
            roles,
        }
    }

    /// The keys of one of its roles.
    pub fn key_set(&self, role: &RoleKeys) -> KeySet {
        KeySet::of_role(&self.keys, &role.keyids, role.threshold)
    }
}

/// What timestamp and snapshot say about another metadata file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the specification's own names
pub struct MetaFile {
    pub version: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hashes: BTreeMap<String, String>,
}

impl MetaFile {
    /// Of a file's bytes.
    pub fn of(version: u64, bytes: &[u8]) -> Self {
        Self { version, length: Some(bytes.len() as u64), hashes: hashes_of(bytes) }
    }
}

/// `timestamp.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the specification's own names
pub struct TimestampRole {
    #[serde(rename = "_type")]
    pub type_: String,
    pub spec_version: String,
    pub version: u64,
    #[serde(deserialize_with = "date")]
    pub expires: Timestamp,
    pub meta: BTreeMap<String, MetaFile>,
}

impl TimestampRole {
    /// Value of `_type`.
    pub const TYPE: &'static str = "timestamp";

    /// A timestamp over a snapshot's bytes.
    pub fn new(version: u64, expires: Timestamp, snapshot_version: u64, snapshot: &[u8]) -> Self {
        Self {
            type_: Self::TYPE.to_owned(),
            spec_version: SPEC_VERSION.to_owned(),
            version,
            expires: whole_seconds(expires),
            meta: BTreeMap::from([("snapshot.json".to_owned(), MetaFile::of(snapshot_version, snapshot))]),
        }
    }
}

/// `N.snapshot.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the specification's own names
pub struct Snapshot {
    #[serde(rename = "_type")]
    pub type_: String,
    pub spec_version: String,
    pub version: u64,
    #[serde(deserialize_with = "date")]
    pub expires: Timestamp,
    pub meta: BTreeMap<String, MetaFile>,
}

impl Snapshot {
    /// Value of `_type`.
    pub const TYPE: &'static str = "snapshot";

    /// An empty snapshot; see [`Self::list`].
    pub fn new(version: u64, expires: Timestamp) -> Self {
        Self {
            type_: Self::TYPE.to_owned(),
            spec_version: SPEC_VERSION.to_owned(),
            version,
            expires: whole_seconds(expires),
            meta: BTreeMap::new(),
        }
    }

    /// Versions of the targets roles it lists, by name.
    pub(crate) fn role_versions(&self) -> BTreeMap<String, u64> {
        self.meta
            .iter()
            .filter_map(|(name, meta)| Some((name.strip_suffix(".json")?.to_owned(), meta.version)))
            .collect()
    }

    /// Lists the file of a targets role by name and bytes.
    pub fn list(&mut self, role: &str, version: u64, bytes: &[u8]) {
        self.meta.insert(format!("{role}.json"), MetaFile::of(version, bytes));
    }
}

/// One target file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the specification's own names
pub struct TargetFile {
    pub length: u64,
    pub hashes: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub custom: Option<Value>,
}

impl TargetFile {
    /// Of a file's bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { length: bytes.len() as u64, hashes: hashes_of(bytes), custom: None }
    }

    /// Whether these are its bytes, by length and every hash of a known algorithm.
    pub fn is(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 == self.length && check_hashes("", "", &self.hashes, bytes).is_ok()
    }

    /// Its SHA-256, if listed.
    pub fn sha256(&self) -> Option<&str> {
        self.hashes.get("sha256").map(String::as_str)
    }
}

/// One delegation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the specification's own names
pub struct DelegatedRole {
    pub name: String,
    pub keyids: Vec<String>,
    pub threshold: u32,
    pub terminating: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paths: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_hash_prefixes: Option<Vec<String>>,
}

/// Delegations of a targets role, in order of trust.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the specification's own names
pub struct Delegations {
    pub keys: BTreeMap<String, Value>,
    pub roles: Vec<DelegatedRole>,
}

/// `N.targets.json` and every delegated role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the specification's own names
pub struct Targets {
    #[serde(rename = "_type")]
    pub type_: String,
    pub spec_version: String,
    pub version: u64,
    #[serde(deserialize_with = "date")]
    pub expires: Timestamp,
    pub targets: BTreeMap<String, TargetFile>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegations: Option<Delegations>,
}

impl Targets {
    /// Value of `_type`.
    pub const TYPE: &'static str = "targets";

    /// An empty role.
    pub fn new(version: u64, expires: Timestamp) -> Self {
        Self {
            type_: Self::TYPE.to_owned(),
            spec_version: SPEC_VERSION.to_owned(),
            version,
            expires: whole_seconds(expires),
            targets: BTreeMap::new(),
            delegations: None,
        }
    }

    /// Delegates `paths` to a role; a delegation of the same name is replaced in its place.
    pub fn delegate(&mut self, name: &str, keys: &[PublicKey], threshold: u32, paths: Vec<String>, terminating: bool) {
        let delegations =
            self.delegations.get_or_insert_with(|| Delegations { keys: BTreeMap::new(), roles: Vec::new() });
        let role = DelegatedRole {
            name: name.to_owned(),
            keyids: keys.iter().map(PublicKey::id).collect(),
            threshold,
            terminating,
            paths: Some(paths),
            path_hash_prefixes: None,
        };
        delegations.keys.extend(keys.iter().map(|key| (key.id(), key.to_object())));
        match delegations.roles.iter_mut().find(|known| known.name == name) {
            Some(known) => *known = role,
            None => delegations.roles.push(role),
        }
        let used: Vec<String> = delegations.roles.iter().flat_map(|role| role.keyids.clone()).collect();
        delegations.keys.retain(|id, _| used.contains(id));
    }
}

fn hashes_of(bytes: &[u8]) -> BTreeMap<String, String> {
    BTreeMap::from([("sha256".to_owned(), hex::sha256(bytes))])
}

/// TUF's dates have one form, `YYYY-MM-DDTHH:MM:SSZ` (section 4.2.1): another implementation refuses every other.
fn date<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
    let text = String::deserialize(deserializer)?;
    let plain = text.len() == 20
        && text.bytes().enumerate().all(|(at, byte)| match at {
            4 | 7 => byte == b'-',
            10 => byte == b'T',
            13 | 16 => byte == b':',
            19 => byte == b'Z',
            _ => byte.is_ascii_digit(),
        });
    let at = text.parse().ok().filter(|_| plain);
    at.ok_or_else(|| serde::de::Error::custom(format_args!("expires is {text:?}, expected YYYY-MM-DDTHH:MM:SSZ")))
}

/// TUF's dates have no fraction of a second.
fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).expect("the whole seconds of a time stamp are in range")
}
