//! Hardware classes: a model with a firmware version. Its machines' reports show on which releases one of the class came up, from
//! firmware and by kexec; a kexec that nobody asked for by name wants both (docs/state-machines.md).
//!
//! It is known of machines in service and goes with them: nothing of a class is stored but in its machines. It is their own
//! word, and decides of nothing but the way.

use crate::event::Action;
use crate::machine::Machine;
use crate::state::StateKind;
use crate::step::{save, wake};
use kiln_protocol::{Inventory, MachineId, ReleaseId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

/// Releases of which one machine remembers how it came up on them; the one that it was on longest ago goes first.
pub const CAME_UP_KEPT: usize = 8;

/// Machines that a kexec can be expected to treat alike.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HardwareClass {
    /// Its maker and product name (SMBIOS type 1).
    pub model: String,
    /// Its firmware's maker and version (SMBIOS type 0).
    pub firmware: String,
}

impl HardwareClass {
    /// Of an inventory that was tamed; none where the machine does not say product or version: unknown is not alike.
    pub fn of(inventory: &Inventory) -> Option<Self> {
        let (system, firmware) = (&inventory.system, &inventory.firmware);
        if system.product.is_empty() || firmware.version.is_empty() {
            return None;
        }
        let both = |maker: &str, what: &str| format!("{maker} {what}").trim().to_owned();
        let model = both(&system.manufacturer, &system.product);
        Some(Self { model, firmware: both(&firmware.vendor, &firmware.version) })
    }
}

impl fmt::Display for HardwareClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, firmware {}", self.model, self.firmware)
    }
}

/// By which ways a release came up and was healthy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ways {
    /// Firmware started it.
    pub cold: bool,
    /// A kexec started it.
    pub kexec: bool,
}

/// How one machine came up on one release, with the firmware that it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvenBy {
    /// Which.
    pub release: ReleaseId,
    /// How.
    pub ways: Ways,
}

/// What the machines of one class have shown.
pub type Proofs = BTreeMap<ReleaseId, Ways>;

impl Machine {
    /// An inventory says of which class it is. What it showed with another firmware says nothing of this one.
    pub(crate) fn classed(&mut self, class: HardwareClass, out: &mut Vec<Action>) {
        if self.class.as_ref() == Some(&class) {
            return;
        }
        self.class = Some(class);
        self.came_up.clear();
        save(out);
        // Where its own answer may be another by it; whoever has a key of his own making sends inventories too.
        if self.assigned.as_ref().is_some_and(|assigned| assigned.auto) {
            wake(out);
        }
    }

    /// The release is healthy, in the boot that goes on.
    pub(crate) fn note_way(&mut self, release: &ReleaseId) {
        if self.class.is_none() {
            return;
        }
        let cold = self.came_through_firmware();
        let known = self.came_up.iter().position(|came| came.release == *release);
        let mut ways = known.map_or_else(Ways::default, |at| self.came_up.remove(at).ways);
        ways.cold |= cold;
        ways.kexec |= !cold;
        self.came_up.push(ProvenBy { release: release.clone(), ways });
        if self.came_up.len() > CAME_UP_KEPT {
            self.came_up.remove(0);
        }
    }
}

/// All classes, kept with each step of a machine. As many as machines in service at most, each with so many releases as these
/// remember.
#[derive(Debug, Default)]
pub struct Classes {
    of: BTreeMap<MachineId, (HardwareClass, Vec<ProvenBy>)>,
    known: BTreeMap<HardwareClass, Known>,
    changed: BTreeSet<HardwareClass>,
}

#[derive(Debug, Default)]
struct Known {
    machines: usize,
    /// Machines that came up so: from firmware, by kexec.
    counts: BTreeMap<ReleaseId, (usize, usize)>,
    proofs: Arc<Proofs>,
}

impl Classes {
    /// The machine as it is now. Only one in service speaks for its class: whoever is not approved can say anything, and of two
    /// that claim one name the false one may have.
    pub fn note(&mut self, machine: &Machine) {
        let kind = machine.state.kind;
        let class = machine.class.as_ref().filter(|_| kind.in_fleet() && kind != StateKind::Quarantined);
        let same = match (self.of.get(&machine.id), class) {
            (Some((before, came_up)), Some(now)) => before == now && *came_up == machine.came_up,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if same {
            return;
        }
        let before = self.take_out(&machine.id);
        if let Some(class) = class {
            let known = self.known.entry(class.clone()).or_default();
            known.machines += 1;
            for came in &machine.came_up {
                let (cold, kexec) = known.counts.entry(came.release.clone()).or_default();
                *cold += usize::from(came.ways.cold);
                *kexec += usize::from(came.ways.kexec);
            }
            self.of.insert(machine.id.clone(), (class.clone(), machine.came_up.clone()));
            self.settle(class);
        }
        if let Some(before) = before {
            self.settle(&before);
        }
    }

    /// It is not there any more.
    pub fn forget(&mut self, id: &MachineId) {
        if let Some(before) = self.take_out(id) {
            self.settle(&before);
        }
    }

    /// What was shown by the machines of this class.
    pub fn proofs(&self, class: &HardwareClass) -> Arc<Proofs> {
        self.known.get(class).map_or_else(Arc::default, |known| Arc::clone(&known.proofs))
    }

    /// Classes of which more, or less, is shown than at the last question.
    pub fn take_changed(&mut self) -> BTreeSet<HardwareClass> {
        std::mem::take(&mut self.changed)
    }

    /// Each with its machines in service, and what these have shown.
    pub fn all(&self) -> impl Iterator<Item = (&HardwareClass, usize, &Proofs)> {
        self.known.iter().map(|(class, known)| (class, known.machines, &*known.proofs))
    }

    /// Takes what a machine has shown out of its class, and names that.
    fn take_out(&mut self, id: &MachineId) -> Option<HardwareClass> {
        let (class, came_up) = self.of.remove(id)?;
        if let Some(known) = self.known.get_mut(&class) {
            known.machines = known.machines.saturating_sub(1);
            for came in came_up {
                if let Some((cold, kexec)) = known.counts.get_mut(&came.release) {
                    *cold = cold.saturating_sub(usize::from(came.ways.cold));
                    *kexec = kexec.saturating_sub(usize::from(came.ways.kexec));
                }
            }
            known.counts.retain(|_, (cold, kexec)| *cold + *kexec > 0);
        }
        Some(class)
    }

    fn settle(&mut self, class: &HardwareClass) {
        let Some(known) = self.known.get_mut(class) else { return };
        let ways = |(cold, kexec): &(usize, usize)| Ways { cold: *cold > 0, kexec: *kexec > 0 };
        let proofs: Proofs = known.counts.iter().map(|(release, counts)| (release.clone(), ways(counts))).collect();
        if *known.proofs != proofs {
            known.proofs = Arc::new(proofs);
            self.changed.insert(class.clone());
        }
        if known.machines == 0 {
            self.known.remove(class);
        }
    }
}
