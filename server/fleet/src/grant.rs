//! What is wanted of a machine, and whether it may reimage itself now.

use crate::machine::{Assigned, Machine};
use crate::state::StateKind;
use crate::{FIRMWARE_PATIENCE_MS, Millis};
use kiln_protocol::{Grant, KeyId, MachineId};
use std::collections::BTreeMap;

/// The site's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// So many machines may be unavailable at once, whatever the cause, for one more to leave.
    pub max_unavailable: usize,
    /// Boots a trial has to become healthy.
    pub trial_attempts: u32,
    /// Silence of a machine's firmware after which its stage has failed, in milliseconds.
    pub firmware_patience: Millis,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_unavailable: 1, trial_attempts: 3, firmware_patience: FIRMWARE_PATIENCE_MS }
    }
}

/// What is wanted of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Desire {
    /// It waits, and the reason says for what.
    Wait(String),
    /// It runs this.
    Run(Assigned),
}

/// What is wanted of the machine that proved this key.
pub fn desire(machine: &Machine, key: &KeyId) -> Desire {
    if machine.pinned.as_ref().is_some_and(|pinned| pinned != key) {
        return Desire::Wait(machine.not_the_pinned_one(key));
    }
    match machine.state.kind {
        StateKind::Discovered | StateKind::Quarantined | StateKind::Retired => {
            return Desire::Wait(machine.state.reason.clone());
        }
        StateKind::Approved
        | StateKind::Booting
        | StateKind::Healthy
        | StateKind::Degraded
        | StateKind::Unreachable
        | StateKind::Draining
        | StateKind::Reimaging
        | StateKind::FellBack => {}
    }
    if machine.key.as_ref() != Some(key) {
        return Desire::Wait(machine.not_its_key(key));
    }
    if let Some(reason) = machine.unproven() {
        return Desire::Wait(reason);
    }
    if machine.is_held_for_acceptance() {
        return Desire::Wait(machine.acceptance_words().unwrap_or_default());
    }
    if let Some(reason) = machine.rests() {
        return Desire::Wait(reason);
    }
    match &machine.assigned {
        Some(a) => Desire::Run(Assigned { via: machine.leaves_by(), ..a.clone() }),
        None => Desire::Wait("no release is assigned: run `kiln assign`".into()),
    }
}

/// May this machine leave for what it is assigned? Counts every unavailable machine, whatever the cause.
///
/// The caller gives the machine [`crate::Event::Granted`] when the answer is go and it is new, before it asks for
/// another.
pub fn grant(id: &MachineId, machines: &BTreeMap<MachineId, Machine>, limits: Limits) -> Grant {
    match machines.get(id) {
        Some(machine) => grant_among(machine, machines.values(), limits),
        None => Grant::Hold { reason: "not known".into(), until_ms: None::<Millis> },
    }
}

/// The same for a caller that keeps account of who is missing: `missing` has every machine that counts and is not
/// available; others among them do not matter.
pub fn grant_among<'a>(machine: &Machine, missing: impl Iterator<Item = &'a Machine>, limits: Limits) -> Grant {
    let hold = |reason: String| Grant::Hold { reason, until_ms: None::<Millis> };
    let Some(assigned) = &machine.assigned else { return hold("nothing is assigned".into()) };
    if machine.runs_assigned() {
        return hold(format!("it runs {} as assigned", assigned.release));
    }
    if machine.granted == Some(assigned.sequence) {
        return Grant::Go;
    }
    if machine.running.is_none() {
        // Still in its initramfs: nothing runs on it that could be disturbed.
        return Grant::Go;
    }
    let ready = machine.prefetch.as_ref().is_some_and(|p| p.ready && p.sequence == assigned.sequence);
    if !ready {
        return hold(format!("it fetches {} first", assigned.release));
    }
    // One that does not do its work has its unit already, and so have others like it: if they held each other, a rack
    // that is unwell all over would never get back by itself. For it only those count that are away.
    let unwell = !machine.is_available();
    // And none counts for the way back to a release that was good here: it has failed already, its leaving makes nobody
    // unavailable who was not, and a rack must not stay down because one of its machines is dead.
    if unwell && machine.fell_back.is_some() && machine.good.contains(&assigned.release) {
        return Grant::Go;
    }
    let missing: Vec<&Machine> = missing
        .filter(|m| m.id != machine.id && m.counts() && !m.is_available())
        .filter(|m| !(unwell && m.is_up_unwell()))
        .collect();
    if missing.len() < limits.max_unavailable {
        return Grant::Go;
    }
    let names: Vec<String> = missing.iter().take(3).map(|m| format!("{} is {}", m.title(), m.state.kind)).collect();
    let more = if missing.len() > 3 { format!(" and {} more", missing.len() - 3) } else { String::new() };
    let excuse = match missing.iter().find(|m| m.state.kind == StateKind::Unreachable) {
        Some(m) => format!("; `kiln machine excuse {} --reason …` lets the others go on", m.title()),
        None => String::new(),
    };
    hold(format!(
        "{} of at most {} machines are unavailable: {}{more}{excuse}",
        missing.len(),
        limits.max_unavailable,
        names.join(", ")
    ))
}
