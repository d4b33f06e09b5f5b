//! Machines of which memory knows more than the database does, as a commit failed. Nothing of them is written until what
//! the database holds of them was put back: it would be built on what was never stored.

use super::Intent;
use kiln_protocol::MachineId;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

/// Their ids. The writer alone changes it.
#[derive(Debug, Clone, Default)]
pub(super) struct Stale(Arc<Mutex<BTreeSet<String>>>);

impl Stale {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().expect("no code panics under this lock")
    }

    /// Whether this call is to be written. Asked once for each call, in their order.
    pub(super) fn takes(&self, call: &[Intent]) -> bool {
        let mut ids = self.lock();
        if ids.is_empty() {
            return true;
        }
        for intent in call {
            if let Intent::PutBack { id } = intent {
                ids.remove(id);
            }
        }
        !call.iter().filter_map(machine).any(|id| ids.contains(id))
    }

    /// These were to be written, and were not.
    pub(super) fn put(&self, calls: &[&[Intent]]) {
        let unwritten = calls.iter().copied().flatten().filter_map(machine).map(str::to_owned);
        self.lock().extend(unwritten);
    }

    /// All of them.
    pub(super) fn ids(&self) -> Vec<MachineId> {
        self.lock().iter().filter_map(|id| id.parse().ok()).collect()
    }
}

/// Of which machine's memory it tells the database.
fn machine(intent: &Intent) -> Option<&str> {
    match intent {
        Intent::Machine { id, .. } | Intent::Forget { id } | Intent::About { id } => Some(id),
        Intent::Hardware { .. }
        | Intent::Expected { .. }
        | Intent::Seen(_)
        | Intent::Note { .. }
        | Intent::Erase { .. }
        | Intent::Audit(_)
        | Intent::PutBack { .. }
        | Intent::Settle => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_of_a_machine_between_a_failed_commit_and_its_being_put_back() {
        let id = |n: u8| format!("00000000-0000-0000-0000-0000000000{n:02x}");
        let about = |n: u8| [Intent::About { id: id(n) }, Intent::Settle];
        let stale = Stale::default();
        assert!(stale.takes(&about(1)));
        stale.put(&[about(1).as_slice(), [Intent::Settle].as_slice()]);
        assert_eq!(stale.ids(), [id(1).parse::<MachineId>().unwrap()]);
        assert!(!stale.takes(&about(1)) && !stale.takes(&[Intent::Forget { id: id(1) }]));
        assert!(stale.takes(&about(2)) && stale.takes(&[Intent::Settle]), "of others it is");
        assert!(stale.takes(&[Intent::PutBack { id: id(2) }]) && !stale.takes(&about(1)));
        assert!(stale.takes(&[Intent::PutBack { id: id(1) }]) && stale.takes(&about(1)));
        assert!(stale.ids().is_empty());
    }
}
