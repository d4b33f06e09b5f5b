//! What is looked up of the fleet, and kept with each step.

use super::Inner;
use crate::error::ControlError;
use kiln_fleet::{Limits, Machine, Millis, StateKind, grant_among};
use kiln_protocol::{Grant, MachineId};

impl Inner {
    pub(super) fn index(&mut self, machine: &Machine) {
        self.comparing.note(machine);
        self.names.note(&machine.id, machine.name.as_ref());
        self.keys.note(&machine.id, machine.key.as_ref());
        self.missing.note(machine);
        self.classes.note(machine);
        let Some(facts) = &machine.facts else { return };
        let machines = &self.machines;
        // A machine that a person knows keeps its address against one that only claims it.
        let known = |id: &MachineId| machines.get(id).is_some_and(|m| m.state.kind != StateKind::Discovered);
        self.macs.names(&machine.id, &facts.macs, known);
    }

    /// Tells the machines of a class what that has shown, where it is another than before. Whether it was.
    pub(super) fn tell_classes(&mut self) -> bool {
        let changed = self.classes.take_changed();
        if changed.is_empty() {
            return false;
        }
        for machine in self.machines.values_mut() {
            if let Some(class) = machine.class.as_ref().filter(|class| changed.contains(*class)) {
                machine.proofs = self.classes.proofs(class);
            }
        }
        true
    }

    /// May this machine leave for what it is assigned? Only those that are missing are looked at.
    pub(super) fn grant(&self, id: &MachineId, limits: Limits) -> Grant {
        let missing = self.missing.ids().filter_map(|id| self.machines.get(id));
        match self.machines.get(id) {
            Some(machine) => grant_among(machine, missing, limits),
            None => Grant::Hold { reason: "not known".into(), until_ms: None },
        }
    }

    pub(crate) fn note_seen(&mut self, id: &MachineId, now: Millis) {
        self.seen.insert(id.clone(), now);
    }

    pub(crate) fn resolve(&self, name: &str) -> Result<MachineId, ControlError> {
        // An id is never another machine's name, nor its beginning.
        if let Ok(id) = name.parse::<MachineId>() {
            let known = self.machines.contains_key(&id);
            return if known { Ok(id) } else { Err(ControlError::NoSuchMachine(name.to_owned())) };
        }
        if let Some(id) = self.names.find(name) {
            return Ok(id.clone());
        }
        // A name that was freed, and is nobody's now.
        let mut former = self.machines.values().filter(|m| m.former_name.as_deref() == Some(name));
        if let (Some(m), None) = (former.next(), former.next()) {
            return Ok(m.id.clone());
        }
        let lower = name.to_ascii_lowercase();
        let mut fits = self.machines.keys().filter(|id| lower.len() >= 4 && id.as_str().starts_with(&lower));
        match (fits.next(), fits.next()) {
            (Some(id), None) => Ok(id.clone()),
            (Some(_), Some(_)) => Err(ControlError::Ambiguous(name.to_owned())),
            (None, _) => Err(ControlError::NoSuchMachine(name.to_owned())),
        }
    }
}
