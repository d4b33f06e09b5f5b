//! What machines are made of: inventories come in, are compared with the one before, and are kept in the store; only
//! what changed goes through the fleet's lock.

use super::{Control, Pending, now_ms};
use crate::error::ControlError;
use crate::view::{HardwareEventView, HardwareView};
use kiln_fleet::{Event, Hardware, HardwareClass, Machine, StateKind};
use kiln_protocol::{InventoryReport, KeyId, MachineId, printable};
use tokio::sync::{Mutex, MutexGuard};

/// Longest record kept of a machine that nobody approved, bytes: whoever can connect can make one up.
const STRANGERS_LIMIT: usize = 64 << 10;
/// Locks for reading, comparing and writing back.
const LOCKS: usize = 64;

/// One machine's record is changed by one task at a time.
#[derive(Debug)]
pub(crate) struct HardwareLocks([Mutex<()>; LOCKS]);

impl Default for HardwareLocks {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Mutex::new(())))
    }
}

impl HardwareLocks {
    pub(super) async fn of(&self, id: &MachineId) -> MutexGuard<'_, ()> {
        let sum = id.as_str().bytes().fold(0_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        self.0[sum % LOCKS].lock().await
    }
}

impl Control {
    /// Takes an inventory in. Only the machine's own key may speak for it, and only after its first report.
    pub async fn inventory(&self, key: &KeyId, report: InventoryReport) -> Result<(), ControlError> {
        let id = report.machine;
        let is_stranger = {
            let inner = self.lock();
            let machine = inner.machines.get(&id).ok_or_else(|| ControlError::NoReportYet(id.clone()))?;
            if machine.key.as_ref() != Some(key) {
                return Err(ControlError::NotItsKey(machine.title().to_owned()));
            }
            // There is one record of a machine, and who says it may be the false one. The agent comes again.
            if machine.state.kind == StateKind::Quarantined {
                return Err(ControlError::Quarantined(machine.title().to_owned()));
            }
            machine.state.kind == StateKind::Discovered
        };
        let _lock = self.hardware.of(&id).await;
        let before = self.store.hardware(&id).await?;
        let boot_id = printable(&report.boot_id.chars().filter(|c| !c.is_control()).take(64).collect::<String>());
        let now = now_ms();
        let (hardware, events) = Hardware::take_in(before, &boot_id, report.inventory, now);
        let doc = serde_json::to_string(&hardware).map_err(crate::error::StoreError::from)?;
        if is_stranger && doc.len() > STRANGERS_LIMIT {
            return Err(ControlError::TooLongForAStranger { machine: id, got: doc.len(), limit: STRANGERS_LIMIT });
        }
        let class = HardwareClass::of(&hardware.inventory);
        self.store.save_hardware(&id, doc).wait().await?;
        let pending = {
            let mut inner = self.lock();
            let mut pending = Pending::default();
            self.compare_again(&mut inner, &id);
            // What cannot be read this time makes it no other machine.
            let class = class.filter(|class| inner.machines.get(&id).is_some_and(|m| m.class.as_ref() != Some(class)));
            if let Some(class) = class {
                self.step(&mut inner, &id, Event::Classed(class), now, &mut pending)?;
            }
            if !events.is_empty() && inner.machines.contains_key(&id) {
                self.step(&mut inner, &id, Event::Hardware(events), now, &mut pending)?;
            }
            pending
        };
        self.finish(pending).await
    }

    /// What is known of a machine's hardware.
    pub async fn hardware_of(&self, machine: &str) -> Result<HardwareView, ControlError> {
        let (id, name) = {
            let inner = self.lock();
            let id = inner.resolve(machine)?;
            let name = inner.machines.get(&id).map_or_else(|| id.to_string(), |m| Machine::title(m).to_owned());
            (id, name)
        };
        let Some(hardware) = self.store.hardware(&id).await? else { return Err(ControlError::NoInventory(name)) };
        let ms = |at: u64| i64::try_from(at).unwrap_or(i64::MAX);
        let event = |e: kiln_fleet::HardwareEvent| HardwareEventView { at_ms: ms(e.at), warn: e.warn, text: e.text };
        Ok(HardwareView {
            machine: id,
            name,
            taken_ms: ms(hardware.taken),
            boot_id: hardware.boot_id,
            summary: kiln_fleet::summary(&hardware.inventory),
            inventory: hardware.inventory,
            events: hardware.events.into_iter().map(event).collect(),
        })
    }
}
