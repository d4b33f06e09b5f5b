//! What a site expects to come up: machines with their places, what they shall be made of, and which switch port belongs
//! to which place. Compared here with what comes up; every difference is a sentence.
//!
//! The list lets nobody in: a serial number is what a machine says of itself. Only a person, or `[[machine]]` in
//! kiln.toml, approves.

mod build;
mod compare;
mod csv;
mod date;
mod import;
mod list;
mod rows;
mod told;

pub use build::{Build, PARTS_TEXT, Parts, PartsError};
pub use compare::{CameUp, Claimant, Comparison, DIFFERENCES, compare};
pub use csv::CsvError;
pub use date::Due;
pub use import::{Change, Flaw, Flaws, Problem};
pub use list::{ExpectedList, MACHINES, Overdue, port_key};
pub use rows::{Cells, Sheet, read_csv};

use crate::Millis;
use kiln_protocol::MachineId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A place in a file. Lines and columns count from 1, columns in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// Where a machine is mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Position {
    /// The rack.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub rack: String,
    /// The place in it: `U14`, or what a chassis calls it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub unit: String,
}

impl Position {
    /// Nothing is said.
    pub fn is_empty(&self) -> bool {
        self.rack.is_empty() && self.unit.is_empty()
    }

    /// Both may be the same place: what one does not say is not compared.
    pub fn fits(&self, other: &Self) -> bool {
        let fits = |a: &str, b: &str| a.is_empty() || b.is_empty() || a.eq_ignore_ascii_case(b);
        fits(&self.rack, &other.rack) && fits(&self.unit, &other.unit)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.rack.as_str(), self.unit.as_str()) {
            ("", "") => f.write_str("no place"),
            ("", unit) => f.write_str(unit),
            (rack, "") => write!(f, "rack {rack}"),
            (rack, unit) => write!(f, "rack {rack} {unit}"),
        }
    }
}

/// A machine that shall come up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExpectedMachine {
    /// SMBIOS serial number.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub serial: String,
    /// SMBIOS UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<MachineId>,
    /// Ethernet addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub macs: Vec<String>,
    /// Where it shall be.
    #[serde(flatten)]
    pub position: Position,
    /// The switch that it shall be at.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub switch: String,
    /// The port of it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub port: String,
    /// Name of what it shall be made of.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sku: String,
    /// What of it is said of this machine alone; goes before its SKU.
    #[serde(flatten)]
    pub build: Build,
    /// The day on which it shall be there; none: as soon as it is on the list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub due: Option<Due>,
    /// When it came onto the list.
    pub listed: Millis,
    /// When a machine that somebody approved was first found to be it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seen: Option<Millis>,
}

impl ExpectedMachine {
    /// What it is called on the list: serial number, else UUID, else Ethernet address.
    pub fn title(&self) -> &str {
        if !self.serial.is_empty() {
            return &self.serial;
        }
        self.uuid.as_ref().map(MachineId::as_str).or(self.macs.first().map(String::as_str)).unwrap_or_default()
    }

    /// The title, as it is compared.
    pub fn key(&self) -> String {
        fold(self.title())
    }

    /// From when on its absence is a difference.
    pub fn due_at(&self) -> Millis {
        self.due.map_or(self.listed, Due::at)
    }

    /// `expected since 2026-11-20, never seen`; `expected on 2026-12-24` before.
    pub fn absence(&self, now: Millis) -> String {
        let day = self.due.unwrap_or(Due::of(self.listed));
        if now < self.due_at() { format!("expected on {day}") } else { format!("expected since {day}, never seen") }
    }
}

/// What machines of a kind are made of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sku {
    /// Its name.
    pub name: String,
    /// Its parts.
    #[serde(flatten)]
    pub build: Build,
}

/// Which place a switch port belongs to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Port {
    /// The switch's name, or its chassis id.
    pub switch: String,
    /// The port's id, or its description.
    pub port: String,
    /// Whose cable ends there.
    #[serde(flatten)]
    pub position: Position,
}

/// One thing on the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Entry {
    /// A machine.
    Machine(ExpectedMachine),
    /// A kind of machine.
    Sku(Sku),
    /// A switch port.
    Port(Port),
}

impl Entry {
    /// What no two entries share.
    pub fn key(&self) -> String {
        match self {
            Self::Machine(machine) => format!("machine/{}", machine.key()),
            Self::Sku(sku) => format!("sku/{}", fold(&sku.name)),
            Self::Port(port) => format!("port/{}", port_key(&port.switch, &port.port)),
        }
    }
}

/// As names and numbers are compared: nobody tells `abc1` from `ABC1` on a label.
pub(crate) fn fold(text: &str) -> String {
    text.trim().to_ascii_uppercase()
}

/// Serial numbers that boards have whose maker gave them none.
const NO_SERIALS: [&str; 14] = [
    "",
    "0",
    "NONE",
    "N/A",
    "NA",
    "UNKNOWN",
    "DEFAULT STRING",
    "NOT SPECIFIED",
    "NOT APPLICABLE",
    "SYSTEM SERIAL NUMBER",
    "TO BE FILLED BY O.E.M.",
    "O.E.M.",
    "INVALID",
    "123456789",
];

/// The serial number that tells a machine from others, as it is compared; none where it has none.
pub fn serial_key(serial: &str) -> Option<String> {
    let folded = fold(serial);
    let same = folded.chars().all(|c| matches!(c, '0' | '.' | '-' | ' ' | 'X' | 'F'));
    (!NO_SERIALS.contains(&folded.as_str()) && !same).then_some(folded)
}
