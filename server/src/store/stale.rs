//! Machines of which memory knows more than the database does, as a commit failed. Nothing of them is written until what
//! the database holds of them was put back: it would be built on what was never stored.

use super::{Call, Intent};
use kiln_protocol::MachineId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

/// Their ids. The writer alone changes it.
#[derive(Debug, Clone, Default)]
pub(super) struct Stale(Arc<Mutex<BTreeSet<String>>>);

impl Stale {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().expect("no code panics under this lock")
    }

    /// Which of these are to be written. Asked once for each call, in their order. A section is written whole or not at all:
    /// the machines of one that is not are here from then on.
    pub(super) fn judge(&self, calls: &[Call]) -> Vec<bool> {
        let mut sections: BTreeMap<u64, Vec<&[Intent]>> = BTreeMap::new();
        for call in calls.iter().filter(|call| call.section != 0) {
            sections.entry(call.section).or_default().push(&call.intents);
        }
        let mut taken: BTreeMap<u64, bool> = BTreeMap::new();
        let judged = calls.iter().map(|call| match sections.get(&call.section) {
            None => self.takes(&call.intents),
            Some(section) => *taken.entry(call.section).or_insert_with(|| self.takes_whole(section)),
        });
        judged.collect()
    }

    fn takes_whole(&self, section: &[&[Intent]]) -> bool {
        let taken = section.iter().all(|call| self.takes(call));
        if !taken {
            self.put(section);
        }
        taken
    }

    /// Whether what was handed in before of the machines of this call is not known to be lost.
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
    use tokio::sync::oneshot;

    #[test]
    fn a_section_of_which_one_call_is_refused_is_refused_whole() {
        let id = |n: u8| format!("00000000-0000-0000-0000-0000000000{n:02x}");
        let about = |n: u8| vec![Intent::About { id: id(n) }];
        let call = |section, intents| Call { intents, section, done: oneshot::channel().0 };
        let note = || vec![Intent::Note { key: "k".into(), value: "v".into() }];
        let stale = Stale::default();
        stale.put(&[about(1).as_slice()]);
        let calls = [
            call(0, about(2)),
            call(7, note()),
            call(0, note()),
            call(7, about(1)),
            call(7, about(3)),
            call(8, about(3)),
            call(9, about(4)),
        ];
        assert_eq!(stale.judge(&calls), [true, false, true, false, false, false, true]);
        let ids: Vec<MachineId> = [1, 3].iter().map(|n| id(*n).parse().unwrap()).collect();
        assert_eq!(stale.ids(), ids, "what was built on what was not written is not written either");
    }

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
