//! A client that keeps the files it accepted, as the specification has it; for tools, not for Kiln's machines, which
//! keep [`Seen`]. The caller reads the files before an update and writes what [`Change`] says, during and after it.

use crate::envelope::{KeySet, Unverified, Verified};
use crate::hex;
use crate::tuf::load::{Limits, check_outline, snapshot_of};
use crate::tuf::model::{Root, Snapshot, TimestampRole};
use crate::tuf::path::quote;
use crate::tuf::seen::{Seen, SeenRole};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// What is to happen to one kept file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The TUF role whose file it is.
    pub role: String,
    /// What to keep; none: the kept one is to be deleted.
    pub bytes: Option<Vec<u8>>,
}

/// Name of a role's kept file: whatever the role is called, it stays in its folder.
pub fn kept_file_name(role: &str) -> String {
    format!("{}.json", quote(role, b""))
}

/// The reverse; `None` for a file that is no role's.
pub fn kept_role(file_name: &str) -> Option<String> {
    let mut rest = file_name.strip_suffix(".json")?.as_bytes();
    let mut role = Vec::new();
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'%', [high, low, tail @ ..]) => {
                role.extend(hex::decode(std::str::from_utf8(&[*high, *low]).ok()?)?);
                rest = tail;
            }
            (byte, tail) => {
                role.push(*byte);
                rest = tail;
            }
        }
    }
    String::from_utf8(role).ok().filter(|role| kept_file_name(role) == file_name)
}

/// The kept files by TUF role, and what is to change.
#[derive(Debug)]
pub(crate) struct Kept {
    files: BTreeMap<String, Vec<u8>>,
    changes: Vec<Change>,
    timestamp: Option<TimestampRole>,
}

impl Kept {
    pub(crate) fn new(files: BTreeMap<String, Vec<u8>>) -> Self {
        Self { files, changes: Vec::new(), timestamp: None }
    }

    pub(crate) fn file(&self, role: &str) -> Option<Vec<u8>> {
        self.files.get(role).cloned()
    }

    pub(crate) fn write(&mut self, role: &str, bytes: &[u8]) {
        if self.files.get(role).is_none_or(|kept| kept != bytes) {
            self.files.insert(role.to_owned(), bytes.to_vec());
            self.changes.push(Change { role: role.to_owned(), bytes: Some(bytes.to_vec()) });
        }
    }

    pub(crate) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// The kept timestamp, if it has this version.
    pub(crate) fn same_timestamp(&self, version: u64) -> Option<TimestampRole> {
        self.timestamp.clone().filter(|kept| kept.version == version)
    }

    /// At the end of the root chain: what the kept timestamp and snapshot say may not be taken back. Their expiry does
    /// not matter for that.
    ///
    /// 5.3.11: a file that lacks a threshold of the present keys' signatures was signed before a rotation, and then
    /// both are deleted, so that a version driven to the maximum by a stolen key does not hold for ever.
    pub(crate) fn recall(&mut self, root: &Root, limits: &Limits, seen: &mut Seen) {
        let held = |role: &str| self.files.contains_key(role);
        let timestamp =
            self.read::<TimestampRole>(TimestampRole::TYPE, &root.key_set(&root.roles.timestamp), limits.timestamp);
        let timestamp =
            timestamp.filter(|t| snapshot_of("", t).is_ok() && check_outline("", &t.spec_version, t.version).is_ok());
        let snapshot = self.read::<Snapshot>(Snapshot::TYPE, &root.key_set(&root.roles.snapshot), limits.snapshot);
        let snapshot = snapshot.filter(|s| check_outline("", &s.spec_version, s.version).is_ok());
        if held(TimestampRole::TYPE) != timestamp.is_some() || held(Snapshot::TYPE) != snapshot.is_some() {
            for role in [TimestampRole::TYPE, Snapshot::TYPE] {
                if self.files.remove(role).is_some() {
                    self.changes.push(Change { role: role.to_owned(), bytes: None });
                }
            }
            return;
        }
        if let Some(timestamp) = timestamp {
            seen.timestamp = Some(SeenRole::new(timestamp.version, &timestamp.signers));
            seen.timestamp_snapshot = snapshot_of("", &timestamp).map_or(0, |meta| meta.version);
            self.timestamp = Some(timestamp.into_inner());
        }
        if let Some(snapshot) = snapshot {
            seen.snapshot = Some(SeenRole::new(snapshot.version, &snapshot.signers));
            seen.roles = snapshot.role_versions();
        }
    }

    fn read<T: DeserializeOwned>(&self, role: &'static str, keys: &KeySet, limit: u64) -> Option<Verified<T>> {
        Unverified::parse(self.files.get(role)?, limit).ok()?.verify_type(keys, role).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_role_cannot_leave_its_folder() {
        assert_eq!(kept_file_name("../x"), "..%2Fx.json");
        assert_eq!(kept_role("..%2Fx.json").as_deref(), Some("../x"));
        for other in ["x", "%2f.json", "%.json", "%zz.json", "a b.json", "%FF.json"] {
            assert_eq!(kept_role(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn names_round_trip(role in any::<String>()) {
            let name = kept_file_name(&role);
            prop_assert!(!name.contains('/') && name.is_ascii());
            prop_assert_eq!(kept_role(&name), Some(role));
        }
    }
}
