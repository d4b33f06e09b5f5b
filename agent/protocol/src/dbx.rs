//! The site's list of revoked boot programs, and where a machine is with it.
//!
//! Firmware that has a boot program's digest in its variable dbx starts it no more, ever. So the list is offered only to a
//! machine that needs none of what it names, and the machine looks once more by itself.

use crate::{ReleaseId, Sha256Hex};
use serde::{Deserialize, Serialize};

/// Longest reason that is kept.
const REASON_LIMIT: usize = 300;

/// In a reply: the site has this list, and the machine may put it into its firmware. Only a hint: what is in the list is
/// said by `site.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DbxOffer {
    /// SHA-256 of the signed change.
    pub update: Sha256Hex,
}

/// In a report: what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DbxState {
    /// SHA-256 of the signed change.
    pub update: Sha256Hex,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: DbxOutcome,
}

/// What came of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "dbx", rename_all = "lowercase")]
pub enum DbxOutcome {
    /// Read back from the firmware: every entry is there.
    Installed,
    /// The machine needs what it names, or its firmware checks nothing.
    Held {
        /// Why, in a sentence.
        reason: String,
    },
    /// It was tried and failed; it is tried again later.
    Failed {
        /// Why, in a sentence.
        reason: String,
    },
}

impl DbxState {
    /// Cuts what an agent can make long.
    pub fn tame(&mut self) {
        match &mut self.outcome {
            DbxOutcome::Installed => {}
            DbxOutcome::Held { reason } | DbxOutcome::Failed { reason } => {
                *reason = reason.chars().filter(|c| !c.is_control()).take(REASON_LIMIT).collect();
            }
        }
    }

    /// Whether the machine has this list.
    pub fn has(&self, update: &Sha256Hex) -> bool {
        self.update == *update && self.outcome == DbxOutcome::Installed
    }
}

/// Why a list that revokes these releases must not go into a machine's firmware; none: it may. `good` is the newest
/// release that was proven good on the machine.
pub fn dbx_hold(
    revoked: &[ReleaseId],
    runs: Option<&ReleaseId>,
    assigned: Option<&ReleaseId>,
    good: Option<&ReleaseId>,
) -> Option<String> {
    let named = |release: &&ReleaseId| revoked.contains(release);
    if let Some(runs) = runs.filter(named) {
        return Some(format!("it runs {runs}, which the list revokes: assign it a newer release first"));
    }
    if let Some(assigned) = assigned.filter(named) {
        return Some(format!("it shall run {assigned}, which the list revokes: assign it a newer release first"));
    }
    good.filter(named).map(|good| {
        format!(
            "its last-known-good release is {good}, which the list revokes: it waits until a newer one is good here"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(text: &str) -> ReleaseId {
        text.parse().unwrap()
    }

    #[test]
    fn a_list_that_would_strand_the_machine_is_held() {
        let (one, two) = (release("minimal/1"), release("minimal/2"));
        let revoked = [one.clone()];
        let hold = |runs, assigned, good| dbx_hold(&revoked, runs, assigned, good);
        assert!(hold(Some(&one), Some(&two), None).unwrap().contains("it runs minimal/1"));
        assert!(hold(Some(&two), Some(&one), None).unwrap().contains("it shall run minimal/1"));
        assert!(hold(Some(&two), Some(&two), Some(&one)).unwrap().contains("last-known-good release is minimal/1"));
        assert_eq!(hold(Some(&two), Some(&two), Some(&two)), None);
        assert_eq!(hold(None, None, None), None);
    }

    #[test]
    fn golden_bytes() {
        let update: Sha256Hex = "ab".repeat(32).parse().unwrap();
        let installed = DbxState { update: update.clone(), outcome: DbxOutcome::Installed };
        let text = format!(r#"{{"update":"{update}","dbx":"installed"}}"#);
        assert_eq!(serde_json::to_string(&installed).unwrap(), text);
        assert_eq!(serde_json::from_str::<DbxState>(&text).unwrap(), installed);
        assert!(installed.has(&update) && !installed.has(&"cd".repeat(32).parse().unwrap()));
        let mut held = DbxState { update, outcome: DbxOutcome::Held { reason: format!("\n{}", "x".repeat(999)) } };
        held.tame();
        assert_eq!(held.outcome, DbxOutcome::Held { reason: "x".repeat(300) });
    }
}
