//! Who holds which secret, for people. A site may have hundreds of secrets and thousands of machines: what does not depend on the
//! secret is worked out once for each machine, and of a secret's machines only some are named.

use super::{Kept, SecretFor};
use crate::view::{SecretHolderView, SecretView};
use kiln_fleet::{Barred, Machine};
use kiln_protocol::{MachineId, SecretName};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Machines of one secret that are named.
const NAMED: usize = 100;

struct Seen<'a> {
    machine: &'a Machine,
    /// What its release declares.
    wants: Rc<BTreeSet<SecretName>>,
    /// Why it would be given nothing.
    withheld: Option<String>,
}

pub(super) struct Survey<'a> {
    machines: Vec<Seen<'a>>,
    /// Places in `machines`.
    of_role: BTreeMap<&'a str, Vec<usize>>,
    of_id: BTreeMap<&'a MachineId, usize>,
    /// Machines' own secrets, which come before their role's.
    own: BTreeSet<(&'a MachineId, &'a SecretName)>,
}

impl<'a> Survey<'a> {
    /// `secrets`: all that there are. `declares` says what the release that a machine runs wants, and is asked once for each
    /// release.
    pub(super) fn of(
        machines: impl Iterator<Item = &'a Machine>,
        secrets: impl Iterator<Item = &'a (SecretFor, SecretName)>,
        barred: &Barred,
        declares: impl Fn(&Machine) -> Option<Vec<SecretName>>,
    ) -> Self {
        let mut releases = BTreeMap::new();
        let mut survey =
            Self { machines: Vec::new(), of_role: BTreeMap::new(), of_id: BTreeMap::new(), own: BTreeSet::new() };
        for machine in machines {
            let runs = machine.running.as_ref().map(|r| (r.image.as_str(), r.release, r.root_hash.as_str()));
            let declared = || Rc::new(declares(machine).unwrap_or_default().into_iter().collect::<BTreeSet<_>>());
            let wants = Rc::clone(releases.entry(runs).or_insert_with(declared));
            let withheld = match &machine.key {
                None => Some("it has proven no key yet".to_owned()),
                Some(key) => machine.secrets_withheld(key, barred),
            };
            let place = survey.machines.len();
            if let Some(role) = &machine.role {
                survey.of_role.entry(role.as_str()).or_default().push(place);
            }
            survey.of_id.insert(&machine.id, place);
            survey.machines.push(Seen { machine, wants, withheld });
        }
        for (of, name) in secrets {
            if let SecretFor::Machine(id) = of {
                survey.own.insert((id, name));
            }
        }
        survey
    }

    fn places(&self, of: &SecretFor) -> &[usize] {
        match of {
            SecretFor::Role(role) => self.of_role.get(role.as_str()).map_or(&[][..], Vec::as_slice),
            SecretFor::Machine(id) => self.of_id.get(id).map_or(&[][..], std::slice::from_ref),
        }
    }

    fn holder(&self, seen: &Seen<'_>, kept: &Kept) -> SecretHolderView {
        let held = seen.machine.secrets.get(&kept.name).copied();
        let of_its_own = match kept.of {
            SecretFor::Role(_) => self.own.contains(&(&seen.machine.id, &kept.name)),
            SecretFor::Machine(_) => false,
        };
        let why = match &seen.withheld {
            _ if held == Some(kept.version) => None,
            _ if of_its_own => Some("it has one of its own of this name".to_owned()),
            Some(reason) => Some(reason.clone()),
            None if seen.wants.contains(&kept.name) => Some("it gets it with its next proof".to_owned()),
            None => Some("the release that it runs does not declare it".to_owned()),
        };
        SecretHolderView { machine: seen.machine.title().to_owned(), version: held, why }
    }

    pub(super) fn view(&self, kept: &Kept) -> SecretView {
        let seen = self.places(&kept.of).iter().map(|place| &self.machines[*place]);
        let (holding, lacking): (Vec<_>, Vec<_>) =
            seen.partition(|seen| seen.machine.secrets.get(&kept.name) == Some(&kept.version));
        let (role, machine) = match &kept.of {
            SecretFor::Role(role) => (Some(role.clone()), None),
            SecretFor::Machine(id) => {
                let known = self.of_id.get(id).map(|place| self.machines[*place].machine.title().to_owned());
                (None, Some(known.unwrap_or_else(|| id.to_string())))
            }
        };
        // Those first that somebody has to do something about.
        let named = lacking.iter().chain(&holding).take(NAMED);
        SecretView {
            name: kept.name.clone(),
            role,
            machine,
            version: kept.version,
            set_ms: i64::try_from(kept.at).unwrap_or(i64::MAX),
            by: kept.by.clone(),
            holding: holding.len(),
            lacking: lacking.len(),
            machines: named.map(|seen| self.holder(seen, kept)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::HexBytes;
    use std::cell::Cell;

    fn id(n: u32) -> MachineId {
        format!("00000000-0000-0000-0000-{n:012x}").parse().unwrap()
    }

    #[test]
    fn of_many_machines_some_are_named_and_all_are_counted() {
        let name: SecretName = "db-password".parse().unwrap();
        let machines: Vec<Machine> = (1..=300)
            .map(|n| {
                let mut machine = Machine::discovered(id(n), 1);
                machine.role = (n <= 290).then(|| "lab".to_owned());
                if n <= 250 {
                    machine.secrets.insert(name.clone(), 7);
                }
                machine
            })
            .collect();
        let kept = |of: SecretFor| {
            let sealed = HexBytes(Vec::new());
            Kept { of, name: name.clone(), version: 7, at: 1, by: "ann".into(), sealed }
        };
        let role = SecretFor::Role("lab".into());
        let keys = [(role.clone(), name.clone()), (SecretFor::Machine(id(251)), name.clone())];
        let asked = Cell::new(0);
        let survey = Survey::of(machines.iter(), keys.iter(), &Barred::default(), |_| {
            asked.set(asked.get() + 1);
            None
        });
        assert_eq!(asked.get(), 1, "they all run the same");
        let view = survey.view(&kept(role));
        assert_eq!((view.holding, view.lacking, view.machines.len()), (250, 40, NAMED));
        assert!(view.machines[..40].iter().all(|m| m.why.is_some()), "those first that lack it");
        assert!(view.machines[40..].iter().all(|m| m.why.is_none() && m.version == Some(7)));
        assert!(view.machines[0].why.as_ref().unwrap().contains("one of its own"), "{:?}", view.machines[0]);
        let view = survey.view(&kept(SecretFor::Machine(id(251))));
        assert_eq!((view.holding, view.lacking, view.machine), (0, 1, Some(id(251).to_string())));
        assert!(view.machines[0].why.as_ref().unwrap().contains("proven no key"), "{:?}", view.machines[0]);
        let view = survey.view(&kept(SecretFor::Machine(id(999))));
        assert_eq!((view.holding, view.lacking, view.machines.len()), (0, 0, 0));
    }
}
