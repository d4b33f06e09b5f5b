//! What a client must remember from one update to the next, so that nothing it has seen can be taken back.
//!
//! The specification has clients keep whole files. Kiln's machines keep this instead: it fits an EFI variable.

use crate::tuf::model::{RoleKeys, Root};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One role's version, and whose signatures were counted for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenRole {
    /// Its version.
    pub version: u64,
    /// First 16 hex digits of the key ids that signed it, two at most.
    pub keys: Vec<String>,
}

const KEY_DIGITS: usize = 16;
/// Signers of a role that are remembered: a machine's memory has room for few. Of a role that needs more, these stand for the others.
const SIGNERS: usize = 2;

impl SeenRole {
    pub(crate) fn new(version: u64, signers: &[String]) -> Self {
        Self { version, keys: signers.iter().take(SIGNERS).map(|id| shorten(id).to_owned()).collect() }
    }

    /// Whether the file remembered here would still be accepted under these keys: too few of its signers are left
    /// once the role's keys were rotated.
    fn still_signed(&self, role: &RoleKeys) -> bool {
        let left = self.keys.iter().filter(|key| role.keyids.iter().any(|id| shorten(id) == key.as_str())).count();
        let needed = usize::try_from(role.threshold.max(1)).unwrap_or(usize::MAX);
        // A memory of an earlier agent has all of them.
        left >= if self.keys.len() == SIGNERS { needed.min(SIGNERS) } else { needed }
    }
}

fn shorten(keyid: &str) -> &str {
    keyid.get(..KEY_DIGITS).unwrap_or(keyid)
}

/// Highest versions seen. `Default` is "nothing yet".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Seen {
    /// Of root.
    pub root: u64,
    /// Of timestamp.
    pub timestamp: Option<SeenRole>,
    /// Snapshot's version as the newest timestamp said.
    pub timestamp_snapshot: u64,
    /// Of snapshot.
    pub snapshot: Option<SeenRole>,
    /// Of every targets role that snapshot listed, by name.
    pub roles: BTreeMap<String, u64>,
}

impl Seen {
    /// Without the roles a machine has no use for, to keep it small. Snapshot's own version still keeps them all from
    /// going back unless the offline snapshot key itself is stolen.
    #[must_use]
    pub fn narrowed(mut self, roles: &[&str]) -> Self {
        self.roles.retain(|name, _| roles.contains(&name.as_str()));
        self
    }

    /// 5.3.11: after a rotation of timestamp's or snapshot's keys both are forgotten, so that a version driven to the
    /// maximum by a stolen key does not lock the client out for ever.
    pub(crate) fn forget_rotated(&mut self, root: &Root) {
        let rotated = |seen: &Option<SeenRole>, role| seen.as_ref().is_some_and(|seen| !seen.still_signed(role));
        if rotated(&self.timestamp, &root.roles.timestamp) || rotated(&self.snapshot, &root.roles.snapshot) {
            *self = Self { root: self.root, ..Self::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(ids: &[&str], threshold: u32) -> RoleKeys {
        RoleKeys { keyids: ids.iter().map(|id| id.repeat(64)).collect(), threshold }
    }

    #[test]
    fn a_key_added_is_no_rotation_but_a_signer_removed_is() {
        let seen = SeenRole::new(3, &["a".repeat(64), "b".repeat(64)]);
        assert!(seen.still_signed(&role(&["a", "b"], 2)));
        assert!(seen.still_signed(&role(&["a", "b", "c"], 2)));
        assert!(seen.still_signed(&role(&["a", "c"], 1)));
        assert!(!seen.still_signed(&role(&["a", "c"], 2)));
        assert!(!seen.still_signed(&role(&["c"], 1)));
    }

    /// However many sign a role, and need to.
    #[test]
    fn of_many_signers_two_stand_for_all() {
        let ids = ["a", "b", "c", "d", "e"];
        let seen = SeenRole::new(3, &ids.map(|id| id.repeat(64)));
        assert_eq!(seen.keys.len(), 2);
        for threshold in 1..=5 {
            assert!(seen.still_signed(&role(&ids, threshold)), "{threshold}");
            assert!(!seen.still_signed(&role(&["c", "d", "e"], threshold)), "{threshold}: both were replaced");
            let one_left = seen.still_signed(&role(&["b", "c", "d", "e"], threshold));
            assert_eq!(one_left, threshold == 1, "{threshold}");
        }
        // All five, as they were remembered before.
        let earlier = SeenRole { keys: ids.map(|id| id.repeat(16)).into(), ..seen };
        assert!(earlier.still_signed(&role(&["c", "d", "e"], 3)) && !earlier.still_signed(&role(&["c", "d", "e"], 4)));
    }

    #[test]
    fn it_is_small_and_reads_what_it_writes() {
        let mut seen = Seen { root: 1, timestamp_snapshot: 4, ..Seen::default() };
        seen.timestamp = Some(SeenRole::new(1000, &["a".repeat(64)]));
        seen.snapshot = Some(SeenRole::new(4, &["b".repeat(64)]));
        seen.roles = BTreeMap::from([("targets".into(), 3), ("image-minimal".into(), 2), ("image-other".into(), 9)]);
        let text = serde_json::to_string(&seen.clone().narrowed(&["targets", "image-minimal"])).unwrap();
        assert!(text.len() < 300, "{} bytes", text.len());
        assert_eq!(serde_json::from_str::<Seen>(&serde_json::to_string(&seen).unwrap()).unwrap(), seen);
        assert_eq!(serde_json::from_str::<Seen>("{}").unwrap(), Seen::default());
    }
}
