//! What is looked up of machines at each step, kept so that a step costs what its own machine has, not what the fleet has.

use kiln_fleet::Machine;
use kiln_protocol::{KeyId, MachineId};
use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

/// Which machine has an Ethernet address, as packets and reports say; and the other way round.
#[derive(Debug, Default)]
pub(crate) struct Macs {
    owners: BTreeMap<String, MachineId>,
    of: BTreeMap<MachineId, BTreeSet<String>>,
    /// Addresses that were looked at.
    #[cfg(test)]
    touched: usize,
}

impl Macs {
    /// Whose it is.
    pub(crate) fn owner(&self, mac: &str) -> Option<&MachineId> {
        self.owners.get(mac)
    }

    /// Addresses that are somebody's.
    pub(crate) fn len(&self) -> usize {
        self.owners.len()
    }

    /// It is this machine's, whoever had it.
    pub(crate) fn put(&mut self, mac: &str, id: &MachineId) {
        if let Some(before) = self.owners.insert(mac.to_owned(), id.clone()) {
            self.leave(mac, &before);
        }
        self.of.entry(id.clone()).or_default().insert(mac.to_owned());
    }

    /// It is this machine's, if it is nobody's.
    pub(crate) fn claim(&mut self, mac: &str, id: &MachineId) {
        if self.owner(mac).is_none() {
            self.put(mac, id);
        }
    }

    /// A machine says which ones it has. What it no longer names is let go, what a packet claimed in its name included; one
    /// that another has it gets only if that one's word `counts` for nothing.
    pub(crate) fn names(&mut self, id: &MachineId, named: &[String], counts: impl Fn(&MachineId) -> bool) {
        let gone: Vec<String> =
            self.of.get(id).into_iter().flatten().filter(|mac| !named.contains(mac)).cloned().collect();
        #[cfg(test)]
        {
            self.touched += self.of.get(id).map_or(0, BTreeSet::len) + named.len();
        }
        for mac in gone {
            self.owners.remove(&mac);
            self.leave(&mac, id);
        }
        for mac in named {
            if self.owner(mac).is_none_or(|owner| owner != id && !counts(owner)) {
                self.put(mac, id);
            }
        }
    }

    /// It was forgotten.
    pub(crate) fn forget(&mut self, id: &MachineId) {
        for mac in self.of.remove(id).into_iter().flatten() {
            self.owners.remove(&mac);
        }
    }

    fn leave(&mut self, mac: &str, id: &MachineId) {
        if let Some(macs) = self.of.get_mut(id) {
            macs.remove(mac);
            if macs.is_empty() {
                self.of.remove(id);
            }
        }
    }
}

/// Machines by something of which each has one at most, and which two may have.
#[derive(Debug)]
pub(crate) struct Shared<T> {
    machines: BTreeMap<T, BTreeSet<MachineId>>,
    of: BTreeMap<MachineId, T>,
}

/// By name: the list in kiln.toml names machines, and so do people.
pub(crate) type Names = Shared<String>;

/// By identity key: one that was copied is two machines'.
pub(crate) type Keys = Shared<KeyId>;

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self { machines: BTreeMap::new(), of: BTreeMap::new() }
    }
}

impl<T: Ord + Clone> Shared<T> {
    /// The machine that has it; of several the first by id.
    pub(crate) fn find<Q: Ord + ?Sized>(&self, what: &Q) -> Option<&MachineId>
    where
        T: Borrow<Q>,
    {
        self.machines.get(what)?.first()
    }

    /// Other machines than this one that have it.
    pub(crate) fn others<'a, Q: Ord + ?Sized>(
        &'a self,
        what: &Q,
        but: &'a MachineId,
    ) -> impl Iterator<Item = &'a MachineId>
    where
        T: Borrow<Q>,
    {
        self.machines.get(what).into_iter().flatten().filter(move |id| *id != but)
    }

    /// Another machine than this one has it.
    pub(crate) fn is_taken<Q: Ord + ?Sized>(&self, what: &Q, but: &MachineId) -> bool
    where
        T: Borrow<Q>,
    {
        self.others(what, but).next().is_some()
    }

    /// A machine has this now, or none.
    pub(crate) fn note(&mut self, id: &MachineId, what: Option<&T>) {
        if self.of.get(id) == what {
            return;
        }
        self.forget(id);
        if let Some(what) = what {
            self.machines.entry(what.clone()).or_default().insert(id.clone());
            self.of.insert(id.clone(), what.clone());
        }
    }

    /// It was forgotten.
    pub(crate) fn forget(&mut self, id: &MachineId) {
        let Some(what) = self.of.remove(id) else { return };
        if let Some(ids) = self.machines.get_mut(&what) {
            ids.remove(id);
            if ids.is_empty() {
                self.machines.remove(&what);
            }
        }
    }
}

/// Machines that are missing: those whose absence counts against the limit of the unavailable.
#[derive(Debug, Default)]
pub(crate) struct Missing(BTreeSet<MachineId>);

impl Missing {
    /// As it stands after a step.
    pub(crate) fn note(&mut self, machine: &Machine) {
        if machine.counts() && !machine.is_available() {
            self.0.insert(machine.id.clone());
        } else {
            self.0.remove(&machine.id);
        }
    }

    /// It was forgotten.
    pub(crate) fn forget(&mut self, id: &MachineId) {
        self.0.remove(id);
    }

    /// All of them, by id.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &MachineId> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> MachineId {
        format!("00000000-0000-0000-0000-{n:012x}").parse().unwrap()
    }

    fn mac(n: usize) -> String {
        let [.., a, b, c] = n.to_be_bytes();
        format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
    }

    fn fleet(machines: usize) -> Macs {
        let mut macs = Macs::default();
        for n in 0..machines {
            macs.names(&id(n), &[mac(2 * n), mac(2 * n + 1)], |_| true);
        }
        macs.touched = 0;
        macs
    }

    /// What one machine's report looks at.
    fn cost(macs: &mut Macs) -> usize {
        macs.names(&id(7), &[mac(14), mac(15)], |_| true);
        std::mem::take(&mut macs.touched)
    }

    #[test]
    fn a_step_looks_at_its_own_machines_addresses_however_many_machines_there_are() {
        let (mut few, mut many) = (fleet(100), fleet(100_000));
        assert_eq!(many.len(), 200_000);
        assert_eq!((cost(&mut few), cost(&mut many)), (4, 4));
        // One that claimed addresses without end pays for it itself, once.
        (0..500).for_each(|n| many.claim(&mac(1_000_000 + n), &id(7)));
        assert_eq!((cost(&mut many), cost(&mut many)), (504, 4));
        assert_eq!(many.len(), 200_000, "what was only claimed in its name is let go");
    }

    #[test]
    fn an_address_has_one_owner_and_nobody_loses_it_to_a_word() {
        let mut macs = Macs::default();
        let (known, liar) = (id(1), id(2));
        macs.names(&known, &[mac(1), mac(2)], |_| false);
        macs.claim(&mac(1), &liar);
        macs.names(&liar, &[mac(1), mac(3)], |owner| *owner == known);
        assert_eq!((macs.owner(&mac(1)), macs.owner(&mac(3))), (Some(&known), Some(&liar)));
        // Whose word counts for nothing loses it.
        macs.names(&known, &[mac(1), mac(3)], |_| false);
        assert_eq!((macs.owner(&mac(3)), macs.owner(&mac(2))), (Some(&known), None));
        assert_eq!(macs.of.get(&liar), None, "both ways are one");
        macs.claim(&mac(9), &liar);
        macs.put(&mac(9), &known);
        macs.forget(&known);
        assert_eq!((macs.len(), macs.of.len()), (0, 0));
    }

    #[test]
    fn a_name_is_found_until_it_is_anothers_or_nobodys() {
        let mut names = Names::default();
        let (a, b) = (id(1), id(2));
        let rack = "rack-1".to_owned();
        names.note(&b, Some(&rack));
        assert!(names.is_taken(&rack, &a) && !names.is_taken(&rack, &b));
        names.note(&a, Some(&rack));
        assert_eq!(names.find(&rack), Some(&a));
        names.note(&a, None);
        assert_eq!(names.find(&rack), Some(&b));
        names.note(&b, Some(&"rack-2".to_owned()));
        assert_eq!((names.find(&rack), names.find("rack-2")), (None, Some(&b)));
        names.note(&a, Some(&"rack-2".to_owned()));
        assert_eq!(names.others("rack-2", &a).collect::<Vec<_>>(), [&b]);
        names.note(&a, None);
        names.forget(&b);
        assert!(names.machines.is_empty() && names.of.is_empty());
    }
}
