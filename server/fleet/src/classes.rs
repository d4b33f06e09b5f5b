//! Hardware classes: a model with a firmware version. Its machines' reports show on which releases one of the class came up, from
//! firmware and by kexec; a kexec that nobody asked for by name wants both (docs/state-machines.md).
//!
//! A kexec that comes to nothing takes that way back from its class, until one that begins later comes up. Which is later is told by
//! counting those that failed, so that no clock decides it.
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
    /// How many kexecs to it had come to nothing on its class when the newest one that came up here began.
    #[serde(default)]
    pub after: u32,
    /// Which of these came to nothing here, the newest, counted from 1; 0: none.
    #[serde(default)]
    pub failed: u32,
}

impl ProvenBy {
    fn nothing(release: &ReleaseId) -> Self {
        Self { release: release.clone(), ways: Ways::default(), after: 0, failed: 0 }
    }
}

/// What the machines of one class have shown of one release.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Proof {
    /// By which ways it came up. By kexec: by one that began after the last that came to nothing.
    pub ways: Ways,
    /// How many kexecs to it came to nothing, as far as machines in service remember.
    pub failed: u32,
}

impl Proof {
    /// A kexec came to nothing, and none has come up since.
    pub fn is_taken_back(&self) -> bool {
        self.failed > 0 && !self.ways.kexec
    }
}

/// What the machines of one class have shown.
pub type Proofs = BTreeMap<ReleaseId, Proof>;

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
        let after = self.last_boot().map_or(0, |boot| boot.after);
        let mut came = self.take_way(release);
        came.ways.cold |= cold;
        if !cold {
            came.ways.kexec = true;
            came.after = came.after.max(after);
        }
        self.keep_way(came);
    }

    /// Another boot begins, or nothing is heard any more: where that says that a kexec came to nothing, its class has shown that way
    /// no longer. Other machines go through firmware, and none of them waits.
    pub(crate) fn note_vain_kexec(&mut self, out: &mut Vec<Action>) {
        let (Some(class), Some(release)) = (&self.class, self.vain_kexec()) else { return };
        let text = format!(
            "a kexec to {release} came to nothing: `--via auto` takes machines of its class ({class}) there by cold boot until a \
             kexec that a person asks for (`--via kexec`) comes up on one"
        );
        let mut came = self.take_way(&release);
        let known = self.proofs.get(&release).map_or(0, |proof| proof.failed);
        came.failed = known.max(came.failed).saturating_add(1);
        self.keep_way(came);
        if let Some(boot) = self.boots.back_mut() {
            boot.vain = true;
        }
        out.push(Action::Say { warn: true, text });
        save(out);
    }

    fn take_way(&mut self, release: &ReleaseId) -> ProvenBy {
        let known = self.came_up.iter().position(|came| came.release == *release);
        known.map_or_else(|| ProvenBy::nothing(release), |at| self.came_up.remove(at))
    }

    fn keep_way(&mut self, came: ProvenBy) {
        self.came_up.push(came);
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
    accounts: BTreeMap<ReleaseId, Account>,
    proofs: Arc<Proofs>,
}

/// Machines that came up on one release, or did not.
#[derive(Debug, Default)]
struct Account {
    /// From firmware.
    cold: usize,
    /// By kexec, by how many had come to nothing when it began.
    kexec: BTreeMap<u32, usize>,
    /// On which one came to nothing, by which that was.
    failed: BTreeMap<u32, usize>,
}

impl Account {
    fn add(&mut self, came: &ProvenBy) {
        self.cold += usize::from(came.ways.cold);
        if came.ways.kexec {
            *self.kexec.entry(came.after).or_default() += 1;
        }
        if came.failed > 0 {
            *self.failed.entry(came.failed).or_default() += 1;
        }
    }

    fn take(&mut self, came: &ProvenBy) {
        self.cold = self.cold.saturating_sub(usize::from(came.ways.cold));
        if came.ways.kexec {
            one_less(&mut self.kexec, came.after);
        }
        if came.failed > 0 {
            one_less(&mut self.failed, came.failed);
        }
    }

    fn is_empty(&self) -> bool {
        self.cold == 0 && self.kexec.is_empty() && self.failed.is_empty()
    }

    fn proof(&self) -> Proof {
        let failed = self.failed.last_key_value().map_or(0, |(failed, _)| *failed);
        let kexec = self.kexec.last_key_value().is_some_and(|(after, _)| *after >= failed);
        Proof { ways: Ways { cold: self.cold > 0, kexec }, failed }
    }
}

fn one_less(counts: &mut BTreeMap<u32, usize>, at: u32) {
    if let Some(count) = counts.get_mut(&at) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(&at);
        }
    }
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
                known.accounts.entry(came.release.clone()).or_default().add(came);
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
                if let Some(account) = known.accounts.get_mut(&came.release) {
                    account.take(&came);
                }
            }
            known.accounts.retain(|_, account| !account.is_empty());
        }
        Some(class)
    }

    fn settle(&mut self, class: &HardwareClass) {
        let Some(known) = self.known.get_mut(class) else { return };
        let proofs: Proofs =
            known.accounts.iter().map(|(release, account)| (release.clone(), account.proof())).collect();
        if *known.proofs != proofs {
            known.proofs = Arc::new(proofs);
            self.changed.insert(class.clone());
        }
        if known.machines == 0 {
            self.known.remove(class);
        }
    }
}
