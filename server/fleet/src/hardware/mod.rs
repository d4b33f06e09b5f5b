//! What the server keeps of a machine's hardware: the newest inventory, and what changed over time. Kept apart from the
//! machine: it is a hundred times as long and changes a few times in a machine's life.

mod diff;

pub use diff::changes;
pub(crate) use diff::{disk_name, module_name};

use crate::Millis;
use crate::event::Action;
use crate::machine::Machine;
use crate::step::save;
use kiln_protocol::{Inventory, binary_size};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Events kept of one machine.
pub const HARDWARE_EVENTS_KEPT: usize = 100;
/// Events that one inventory can make: what a cable salad changes beyond them is counted, not listed.
pub const EVENTS_AT_ONCE: usize = 32;

/// The hardware of one machine, and its story.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hardware {
    /// The kernel's boot id of the boot that sent it.
    pub boot_id: String,
    /// When it came.
    pub taken: Millis,
    /// What was found.
    pub inventory: Inventory,
    /// What changed, oldest first; at most [`HARDWARE_EVENTS_KEPT`].
    pub events: VecDeque<HardwareEvent>,
}

/// Something that changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardwareEvent {
    /// When the server heard of it.
    pub at: Millis,
    /// Something is gone, or fails: a person should look.
    pub warn: bool,
    /// `DIMM A2 gone (32 GiB DDR5)`.
    pub text: String,
}

impl HardwareEvent {
    /// Which event, and whether a person should look.
    pub fn new(at: Millis, warn: bool, text: impl Into<String>) -> Self {
        Self { at, warn, text: text.into() }
    }
}

impl Machine {
    /// The newest change is what a person reads; all of them are in its story.
    pub(crate) fn hardware_changed(&mut self, events: Vec<HardwareEvent>, out: &mut Vec<Action>) {
        if let Some(event) = events.iter().rev().find(|event| event.warn) {
            self.last_words = crate::boots::cut(&event.text);
        }
        out.extend(events.into_iter().map(|event| Action::Say { warn: event.warn, text: event.text }));
        save(out);
    }
}

impl Hardware {
    /// Takes an inventory in, tamed; gives what is to be kept now and what is new.
    pub fn take_in(
        before: Option<Self>,
        boot_id: &str,
        inventory: Inventory,
        now: Millis,
    ) -> (Self, Vec<HardwareEvent>) {
        let mut inventory = inventory.tame();
        for nic in &mut inventory.nics {
            // Only the server says so.
            if let Some(neighbour) = &mut nic.neighbour {
                neighbour.earlier = false;
            }
        }
        let mut events: Vec<HardwareEvent> = match &before {
            None => vec![HardwareEvent::new(now, false, format!("first inventory: {}", summary(&inventory)))],
            Some(before) => {
                if before.boot_id != boot_id {
                    remember_neighbours(&before.inventory, &mut inventory);
                }
                let changed = changes(&before.inventory, &inventory);
                changed.into_iter().map(|(warn, text)| HardwareEvent::new(now, warn, text)).collect()
            }
        };
        if events.len() > EVENTS_AT_ONCE {
            let more = events.split_off(EVENTS_AT_ONCE - 1);
            let warn = more.iter().any(|event| event.warn);
            events.push(HardwareEvent::new(now, warn, format!("and {} more changes", more.len())));
        }
        let mut all = before.map(|hardware| hardware.events).unwrap_or_default();
        all.extend(events.iter().cloned());
        while all.len() > HARDWARE_EVENTS_KEPT {
            all.pop_front();
        }
        (Self { boot_id: boot_id.to_owned(), taken: now, inventory, events: all }, events)
    }
}

/// A switch names itself every 30 s: at the start of a boot it has not yet. What was heard before is kept, and marked.
fn remember_neighbours(before: &Inventory, now: &mut Inventory) {
    for nic in now.nics.iter_mut().filter(|nic| nic.neighbour.is_none() && nic.carrier != Some(false)) {
        let old = before.nics.iter().find(|old| !old.mac.is_empty() && old.mac == nic.mac);
        nic.neighbour = old.and_then(|old| old.neighbour.clone());
        if let Some(neighbour) = &mut nic.neighbour {
            neighbour.earlier = true;
        }
    }
}

/// `2 CPUs, 512 GiB in 16 modules, 10 disks, 4 network cards`.
pub fn summary(inventory: &Inventory) -> String {
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    let modules = inventory.dimms.iter().filter(|dimm| dimm.bytes > 0).count();
    let memory = match inventory.module_bytes() {
        0 => format!("{} of memory", binary_size(inventory.memory_bytes)),
        bytes => format!("{} in {}", binary_size(bytes), count(modules, "module")),
    };
    format!(
        "{}, {memory}, {}, {}",
        count(inventory.cpus.len(), "CPU"),
        count(inventory.disks.len(), "disk"),
        count(inventory.nics.len(), "network card")
    )
}
