//! The list, and what is found on it.

use super::{Entry, ExpectedMachine, Port, Position, Sku, fold, serial_key};
use crate::Millis;
use kiln_protocol::{MachineFacts, MachineId, Neighbour};
use std::collections::BTreeMap;

/// Most machines.
pub const MACHINES: usize = 200_000;
/// Most kinds of machine.
pub const SKUS: usize = 4_096;
/// Most switch ports.
pub const PORTS: usize = 400_000;

/// A switch port as it is compared.
pub fn port_key(switch: &str, port: &str) -> String {
    format!("{}\u{1f}{}", fold(switch), fold(port))
}

/// What a site expects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpectedList {
    pub(super) machines: BTreeMap<String, ExpectedMachine>,
    pub(super) skus: BTreeMap<String, Sku>,
    pub(super) ports: BTreeMap<String, Port>,
    /// Of machines with a UUID, their keys.
    by_uuid: BTreeMap<MachineId, String>,
    by_mac: BTreeMap<String, String>,
    /// Of machines with a switch port, their keys.
    by_port: BTreeMap<String, String>,
}

/// An expected machine whose day came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overdue {
    /// What it is called.
    pub title: String,
    /// Where it shall be.
    pub position: Position,
    /// `expected since …, never seen`.
    pub words: String,
}

impl ExpectedList {
    /// From what was stored.
    pub fn of(entries: impl IntoIterator<Item = Entry>) -> Self {
        let mut list = Self::default();
        for entry in entries {
            list.put(entry);
        }
        list
    }

    pub(super) fn put(&mut self, entry: Entry) {
        match entry {
            Entry::Machine(machine) => {
                let key = machine.key();
                self.take(&key);
                if let Some(uuid) = &machine.uuid {
                    self.by_uuid.insert(uuid.clone(), key.clone());
                }
                for mac in &machine.macs {
                    self.by_mac.insert(mac.clone(), key.clone());
                }
                if !machine.switch.is_empty() {
                    self.by_port.insert(port_key(&machine.switch, &machine.port), key.clone());
                }
                self.machines.insert(key, machine);
            }
            Entry::Sku(sku) => drop(self.skus.insert(fold(&sku.name), sku)),
            Entry::Port(port) => drop(self.ports.insert(port_key(&port.switch, &port.port), port)),
        }
    }

    /// Takes a machine off, by its key.
    pub fn take(&mut self, key: &str) -> Option<ExpectedMachine> {
        let machine = self.machines.remove(key)?;
        // Only what is still its own: another entry may have taken it over.
        if let Some(uuid) = machine.uuid.as_ref().filter(|uuid| self.by_uuid.get(*uuid).is_some_and(|k| k == key)) {
            self.by_uuid.remove(uuid);
        }
        for mac in &machine.macs {
            if self.by_mac.get(mac).is_some_and(|k| k == key) {
                self.by_mac.remove(mac);
            }
        }
        let port = port_key(&machine.switch, &machine.port);
        if self.by_port.get(&port).is_some_and(|k| k == key) {
            self.by_port.remove(&port);
        }
        Some(machine)
    }

    /// Another machine takes the place of the one with this key: its serial number, UUID and, where addresses were listed, its
    /// Ethernet addresses stand in the entry, which keeps position, switch port and kind. Gives the new entry; none where there is
    /// nothing under this key, or the other machine is on the list itself.
    pub fn hand_over(&mut self, key: &str, to: &MachineFacts) -> Option<Entry> {
        let old = self.machines.get(key).filter(|_| self.find(to).is_none())?;
        let serial = serial_key(&to.serial).map_or_else(String::new, |_| to.serial.trim().to_owned());
        let macs = if old.macs.is_empty() { Vec::new() } else { to.macs.clone() };
        let new = ExpectedMachine { serial, uuid: Some(to.id.clone()), macs, ..old.clone() };
        self.take(key);
        self.put(Entry::Machine(new.clone()));
        Some(Entry::Machine(new))
    }

    /// A machine that somebody approved was found to be this one. Gives the entry if that is new.
    pub fn mark_seen(&mut self, key: &str, now: Millis) -> Option<Entry> {
        let machine = self.machines.get_mut(key).filter(|machine| machine.seen.is_none())?;
        machine.seen = Some(now);
        Some(Entry::Machine(machine.clone()))
    }

    /// Nothing is expected.
    pub fn is_empty(&self) -> bool {
        self.machines.is_empty()
    }

    /// All machines, by their keys.
    pub fn machines(&self) -> impl ExactSizeIterator<Item = (&String, &ExpectedMachine)> {
        self.machines.iter()
    }

    /// All kinds of machine, by name.
    pub fn skus(&self) -> impl ExactSizeIterator<Item = &Sku> {
        self.skus.values()
    }

    /// How many switch ports have a place of their own.
    pub fn ports(&self) -> usize {
        self.ports.len()
    }

    /// A machine by its key.
    pub fn machine(&self, key: &str) -> Option<&ExpectedMachine> {
        self.machines.get(key)
    }

    /// A kind of machine.
    pub fn sku(&self, name: &str) -> Option<&Sku> {
        self.skus.get(&fold(name))
    }

    /// A machine by what a person types: serial number, UUID or Ethernet address.
    pub fn resolve(&self, name: &str) -> Option<&ExpectedMachine> {
        let uuid = name.trim().to_ascii_lowercase().parse().ok();
        let key = uuid.and_then(|uuid: MachineId| self.by_uuid.get(&uuid));
        let key = key.or_else(|| self.by_mac.get(&name.trim().to_ascii_lowercase()));
        self.machines.get(&fold(name)).or_else(|| self.machines.get(key?))
    }

    /// The entry that a machine is: by its serial number, else by its UUID, else by an Ethernet address.
    pub fn find(&self, facts: &MachineFacts) -> Option<&ExpectedMachine> {
        let serial = serial_key(&facts.serial).and_then(|key| self.machines.get(&key).filter(|m| !m.serial.is_empty()));
        serial.or_else(|| self.by_identity(facts).map(|(entry, _)| entry))
    }

    /// The entry that has its UUID, else one of its Ethernet addresses; and which of the two.
    pub(super) fn by_identity(&self, facts: &MachineFacts) -> Option<(&ExpectedMachine, &'static str)> {
        let by_uuid = self.by_uuid.get(&facts.id).map(|key| (key, "UUID"));
        let by_mac = || facts.macs.iter().find_map(|mac| self.by_mac.get(mac)).map(|key| (key, "Ethernet address"));
        let (key, by) = by_uuid.or_else(by_mac)?;
        Some((self.machines.get(key)?, by))
    }

    /// The place that a switch port belongs to. A switch may be listed by name or chassis id, a port by id or description.
    pub fn position_of(&self, neighbour: &Neighbour) -> Option<&Position> {
        let switches = [&neighbour.system_name, &neighbour.chassis];
        let ports = [&neighbour.port, &neighbour.port_description];
        let mut keys = switches.into_iter().flat_map(|switch| ports.map(|port| port_key(switch, port)));
        keys.find_map(|key| {
            let listed = self.ports.get(&key).map(|port| &port.position);
            listed.or_else(|| self.at_port(&key).map(|machine| &machine.position).filter(|place| !place.is_empty()))
        })
    }

    /// The machine that shall be at a switch port.
    pub(super) fn at_port(&self, key: &str) -> Option<&ExpectedMachine> {
        self.machines.get(self.by_port.get(key)?)
    }

    /// Machines that were not seen and whose day, or place on the list if that is later, came after `from`, until `to`.
    pub fn overdue(&self, from: Millis, to: Millis) -> impl Iterator<Item = Overdue> {
        let day = |m: &ExpectedMachine| m.due_at().max(m.listed);
        let came = move |m: &&ExpectedMachine| m.seen.is_none() && (from + 1..=to).contains(&day(m));
        self.machines.values().filter(came).map(move |m| Overdue {
            title: m.title().to_owned(),
            position: m.position.clone(),
            words: m.absence(to),
        })
    }
}
