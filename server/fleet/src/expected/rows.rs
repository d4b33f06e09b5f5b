//! What stands in a file: cells by the names of their columns, each with its place. CSV and TOML come to the same here,
//! and [`super::ExpectedList::import`] reads no more than this.

use super::At;
use super::csv::{Field, Reader};
use super::import::{Flaw, Flaws, Problem};
use super::list::{MACHINES, PORTS, SKUS};
use std::collections::BTreeMap;

/// What a file, or a table of it, lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sheet {
    /// Machines.
    Machine,
    /// Kinds of machine.
    Sku,
    /// Switch ports and their places.
    Port,
}

impl Sheet {
    /// Its columns, under the names by which they are read.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Machine => &[
                "serial", "uuid", "mac", "rack", "unit", "switch", "port", "sku", "model", "cpus", "memory", "disks",
                "nics", "expected",
            ],
            Self::Sku => &["sku", "model", "cpus", "memory", "disks", "nics"],
            Self::Port => &["switch", "port", "rack", "unit"],
        }
    }
}

/// Other words for a column that lists from elsewhere use.
const ALIASES: [(&str, &str); 20] = [
    ("serial_number", "serial"),
    ("service_tag", "serial"),
    ("id", "uuid"),
    ("macs", "mac"),
    ("mac_address", "mac"),
    ("position", "unit"),
    ("u", "unit"),
    ("rack_unit", "unit"),
    ("switch_port", "port"),
    ("name", "sku"),
    ("product", "model"),
    ("cpu", "cpus"),
    ("ram", "memory"),
    ("dimms", "memory"),
    ("disk", "disks"),
    ("nic", "nics"),
    ("network", "nics"),
    ("due", "expected"),
    ("date", "expected"),
    ("expected_on", "expected"),
];

/// Columns that make a file one of machines.
const KEY_WORDS: [&str; 3] = ["serial", "uuid", "mac"];

/// One row: its place, what it lists, and its cells that are not empty, trimmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cells<'a> {
    /// Where it begins.
    pub at: At,
    /// What it lists.
    pub sheet: Sheet,
    /// By column.
    pub cells: BTreeMap<&'static str, Field<'a>>,
}

impl Sheet {
    /// How many of them can be on the list, and what they are called.
    fn most(self) -> (usize, &'static str) {
        match self {
            Self::Machine => (MACHINES, "machines"),
            Self::Sku => (SKUS, "kinds of machine"),
            Self::Port => (PORTS, "switch ports"),
        }
    }

    /// The column that a heading means.
    pub fn column(self, heading: &str) -> Option<&'static str> {
        let name = heading.trim().to_ascii_lowercase().replace([' ', '-'], "_");
        let known = |name: &str| self.columns().iter().find(|column| **column == name).copied();
        let alias = || ALIASES.iter().find(|(alias, _)| *alias == name).and_then(|(_, column)| known(column));
        known(&name).or_else(alias)
    }
}

/// What a file with these columns lists.
fn sheet_of(headings: &[&str]) -> Option<Sheet> {
    let has = |sheet: Sheet, column: &str| headings.iter().any(|heading| sheet.column(heading) == Some(column));
    if KEY_WORDS.iter().any(|key| has(Sheet::Machine, key)) {
        Some(Sheet::Machine)
    } else if has(Sheet::Port, "switch") && has(Sheet::Port, "port") {
        Some(Sheet::Port)
    } else {
        has(Sheet::Sku, "sku").then_some(Sheet::Sku)
    }
}

/// Reads a CSV file. Its first line names the columns and with them what it lists; a column whose name begins with `#` is
/// left out.
pub fn read_csv(text: &str) -> Result<Vec<Cells<'_>>, Flaws> {
    let mut records = Reader::new(text);
    let broken = |(at, error)| Flaws::one(at, Problem::Csv(error));
    let Some(heading) = records.next().transpose().map_err(broken)? else {
        return Err(Flaws::one(At { line: 1, column: 1 }, Problem::Empty));
    };
    let left_out = |name: &str| name.trim().is_empty() || name.trim_start().starts_with('#');
    let names: Vec<&str> = heading.iter().map(|(_, name)| &**name).filter(|name| !left_out(name)).collect();
    let sheet = sheet_of(&names).ok_or_else(|| Flaws::one(At { line: 1, column: 1 }, Problem::NoColumns))?;
    let mut flaws = Flaws::default();
    let mut columns = Vec::new();
    for (at, name) in &heading {
        let column = sheet.column(name);
        if let Some(twice) = column.filter(|column| columns.contains(&Some(*column))) {
            flaws.push(Flaw { at: *at, problem: Problem::ColumnTwice(twice) });
        } else if column.is_none() && !left_out(name) {
            let problem = Problem::Column { got: name.chars().take(40).collect(), known: sheet.columns().join(", ") };
            flaws.push(Flaw { at: *at, problem });
        }
        columns.push(column);
    }
    let mut rows = Vec::new();
    for record in records {
        let fields = match record {
            Ok(fields) => fields,
            Err((at, error)) => {
                flaws.push(Flaw { at, problem: Problem::Csv(error) });
                break;
            }
        };
        let at = fields.first().map_or(At { line: 1, column: 1 }, |(at, _)| *at);
        // No two rows are the same thing: so many are too many, and a file of short lines takes no more memory.
        let (limit, what) = sheet.most();
        if rows.len() == limit {
            flaws.push(Flaw { at, problem: Problem::TooMany { what, limit } });
            break;
        }
        if let Some((at, _)) = fields.get(columns.len()).filter(|(_, text)| !text.trim().is_empty()) {
            let problem = Problem::ManyFields { got: fields.len(), expected: columns.len() };
            flaws.push(Flaw { at: *at, problem });
        }
        let filled = |(_, field): &(_, Field<'_>)| !field.1.trim().is_empty();
        let named = columns.iter().zip(fields).filter(filled);
        let cells = named.filter_map(|(column, field)| Some(((*column)?, field))).collect();
        rows.push(Cells { at, sheet, cells });
    }
    flaws.or(rows)
}
