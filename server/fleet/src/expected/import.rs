//! From rows to a new list: every cell checked, every mistake with its place and what to do, all or nothing.

use super::build::{Build, Kind, Parts, PartsError};
use super::csv::CsvError;
use super::date::DayError;
use super::list::{ExpectedList, MACHINES, PORTS, SKUS, port_key};
use super::rows::{Cells, Sheet};
use super::{At, Entry, ExpectedMachine, Port, Position, Sku, fold, serial_key};
use crate::Millis;
use kiln_protocol::{IdError, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Mistakes that are listed; the rest are counted.
pub const FLAWS: usize = 20;
/// Longest name in a cell, bytes.
const NAME: usize = 64;
/// Most Ethernet addresses of a machine.
const MACS: usize = 32;

/// A mistake in a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Problem {
    #[error("the file is empty: its first line names the columns, as serial,rack,unit,sku")]
    Empty,
    #[error(
        "the first line names no serial, uuid or mac (machines), no sku (kinds of machine), and not switch and port"
    )]
    NoColumns,
    #[error("{0}")]
    Csv(#[from] CsvError),
    #[error("{0}")]
    Syntax(String),
    #[error("column {got:?} is not known; known are {known}. Begin its name with # to leave it out")]
    Column { got: String, known: String },
    #[error("the column {0} is there twice")]
    ColumnTwice(&'static str),
    #[error("{got} fields, and {expected} columns are named: is a field with a comma in quotes?")]
    ManyFields { got: usize, expected: usize },
    #[error("{column}: {got:?}: one line of at most {limit} bytes, without control characters")]
    Text { column: &'static str, got: String, limit: usize },
    #[error("{column}: {source}")]
    Parts { column: &'static str, source: PartsError },
    #[error("uuid: {0}")]
    Uuid(IdError),
    #[error("mac: {0:?}: expected addresses as 52:54:00:00:00:01, several with blanks between, at most {MACS}")]
    Mac(String),
    #[error("expected: {0}")]
    Day(#[from] DayError),
    #[error("serial: {0:?} is what boards have that were given none: leave it empty and give uuid or mac")]
    NoSerial(String),
    #[error("unit: {0:?}: a number from 1 to 100, or a name of at most 16 characters")]
    Unit(String),
    #[error("no serial, uuid or mac: nothing says which machine this is")]
    NoKey,
    #[error("no name of the sku")]
    NoName,
    #[error("a switch and a port belong together: {0} is missing")]
    HalfPort(&'static str),
    #[error("no rack and no unit: nothing says where the port leads")]
    NoPosition,
    #[error("{what} {got} is in {first} too: take one of them out")]
    Twice { what: &'static str, got: String, first: String },
    #[error("{what} {got} is {other}'s on the list: `kiln expected remove {other}` if it is no more")]
    Taken { what: &'static str, got: String, other: String },
    #[error(
        "sku {got:?} is not known; known are: {known}. Import it first, from a file with a column sku and no serial"
    )]
    Sku { got: String, known: String },
    #[error("sku {0} is left out, and machines on the list are of it: with --replace every sku in use must be there")]
    SkuInUse(String),
    #[error("switch {switch} port {port} is {here}, and {there} by the list: correct one of them")]
    PortAgain { switch: String, port: String, here: Position, there: Position },
    #[error("more than {limit} {what} on the list")]
    TooMany { what: &'static str, limit: usize },
}

/// A mistake and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flaw {
    /// Where.
    pub at: At,
    /// What.
    pub problem: Problem,
}

/// Why a file is not imported: its first mistakes, and how many more there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flaws {
    /// At most [`FLAWS`], in the order of the file.
    pub listed: Vec<Flaw>,
    /// The rest.
    pub more: usize,
}

impl Flaws {
    /// A single one.
    pub fn one(at: At, problem: Problem) -> Self {
        Self { listed: vec![Flaw { at, problem }], more: 0 }
    }

    pub(super) fn push(&mut self, flaw: Flaw) {
        if self.listed.len() < FLAWS {
            self.listed.push(flaw);
        } else {
            self.more += 1;
        }
    }

    /// What was read, if there is none.
    pub(super) fn or<T>(self, read: T) -> Result<T, Self> {
        if self.listed.is_empty() { Ok(read) } else { Err(self) }
    }
}

impl std::error::Error for Flaws {}

impl fmt::Display for Flaws {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, flaw) in self.listed.iter().enumerate() {
            let end = if number == 0 { "" } else { "\n" };
            write!(f, "{end}{}: {}", flaw.at, flaw.problem)?;
        }
        if self.more > 0 {
            write!(f, "\nand {} more mistakes", self.more)?;
        }
        Ok(())
    }
}

/// What an import does to a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// The list after it.
    pub list: ExpectedList,
    /// Entries that are new or other than before: to be stored.
    pub put: Vec<Entry>,
    /// Keys of entries that are gone: to be deleted.
    pub gone: Vec<String>,
    /// How many are new.
    pub new: usize,
    /// How many were there and are other now.
    pub changed: usize,
    /// How many are as they were.
    pub same: usize,
}

/// Boxed: a mistake is rare, and long.
type Read<T> = Result<T, Box<Flaw>>;

fn flaw(at: At, problem: Problem) -> Box<Flaw> {
    Box::new(Flaw { at, problem })
}

fn text<'a>(row: &'a Cells<'_>, column: &'static str, limit: usize) -> Read<&'a str> {
    let Some((at, cell)) = row.cells.get(column) else { return Ok("") };
    let cell = cell.trim();
    if cell.len() > limit || cell.chars().any(char::is_control) {
        let got = cell.chars().filter(|c| !c.is_control()).take(40).collect();
        return Err(flaw(*at, Problem::Text { column, got, limit }));
    }
    Ok(cell)
}

fn place(row: &Cells<'_>, column: &'static str) -> At {
    row.cells.get(column).map_or(row.at, |(at, _)| *at)
}

fn build(row: &Cells<'_>) -> Read<Build> {
    let parts = |column: &'static str, kind| {
        let text = text(row, column, super::PARTS_TEXT)?;
        let read = (!text.is_empty()).then(|| Parts::parse(kind, text)).transpose();
        read.map_err(|source| flaw(place(row, column), Problem::Parts { column, source }))
    };
    Ok(Build {
        model: text(row, "model", NAME)?.to_owned(),
        cpus: parts("cpus", Kind::Cpus)?,
        memory: parts("memory", Kind::Memory)?,
        disks: parts("disks", Kind::Disks)?,
        nics: parts("nics", Kind::Nics)?,
    })
}

/// `14`, `U14` and `u14` are the same; a chassis may name its places otherwise.
fn position(row: &Cells<'_>) -> Read<Position> {
    let unit = text(row, "unit", NAME)?;
    let digits = unit.strip_prefix(['U', 'u']).unwrap_or(unit);
    let unit = match digits.parse::<u32>() {
        Ok(number @ 1..=100) => format!("U{number}"),
        Ok(_) => return Err(flaw(place(row, "unit"), Problem::Unit(unit.to_owned()))),
        Err(_) if unit.chars().count() > 16 => return Err(flaw(place(row, "unit"), Problem::Unit(unit.to_owned()))),
        Err(_) => unit.to_owned(),
    };
    Ok(Position { rack: text(row, "rack", NAME)?.to_owned(), unit })
}

/// `52:54:00:00:00:01`, `52-54-00-00-00-01`, `5254.0000.0001` or twelve digits.
fn mac(text: &str) -> Option<String> {
    let digits: String =
        text.chars().filter(|c| !matches!(c, ':' | '-' | '.')).collect::<String>().to_ascii_lowercase();
    let plain = digits.len() == 12 && digits.bytes().all(|b| b.is_ascii_hexdigit()) && text.len() <= 17;
    let pairs = || digits.as_bytes().chunks(2).map(|pair| String::from_utf8_lossy(pair).into_owned());
    plain.then(|| pairs().collect::<Vec<_>>().join(":"))
}

fn machine(row: &Cells<'_>, now: Millis) -> Read<ExpectedMachine> {
    let serial = text(row, "serial", NAME)?;
    if !serial.is_empty() && serial_key(serial).is_none() {
        return Err(flaw(place(row, "serial"), Problem::NoSerial(serial.to_owned())));
    }
    let uuid = text(row, "uuid", NAME)?;
    let uuid = (!uuid.is_empty()).then(|| uuid.to_ascii_lowercase().parse::<MachineId>()).transpose();
    let uuid = uuid.map_err(|e| flaw(place(row, "uuid"), Problem::Uuid(e)))?;
    let listed = text(row, "mac", MACS * 20)?;
    let macs = listed.split([' ', ',', ';']).filter(|mac| !mac.is_empty()).map(mac).collect::<Option<Vec<_>>>();
    let macs = macs.filter(|macs| macs.len() <= MACS);
    let macs = macs.ok_or_else(|| flaw(place(row, "mac"), Problem::Mac(listed.chars().take(60).collect())))?;
    if serial.is_empty() && uuid.is_none() && macs.is_empty() {
        return Err(flaw(row.at, Problem::NoKey));
    }
    let day = text(row, "expected", NAME)?;
    let due = (!day.is_empty()).then(|| day.parse()).transpose();
    let (switch, port) = (text(row, "switch", NAME)?, text(row, "port", NAME)?);
    if switch.is_empty() != port.is_empty() {
        let (missing, there) = if port.is_empty() { ("port", "switch") } else { ("switch", "port") };
        return Err(flaw(place(row, there), Problem::HalfPort(missing)));
    }
    Ok(ExpectedMachine {
        serial: serial.to_owned(),
        uuid,
        macs,
        position: position(row)?,
        switch: switch.to_owned(),
        port: port.to_owned(),
        sku: text(row, "sku", NAME)?.to_owned(),
        build: build(row)?,
        due: due.map_err(|e: DayError| flaw(place(row, "expected"), e.into()))?,
        listed: now,
        seen: None,
    })
}

fn entry(row: &Cells<'_>, now: Millis) -> Read<Entry> {
    match row.sheet {
        Sheet::Machine => machine(row, now).map(Entry::Machine),
        Sheet::Sku => {
            let name = text(row, "sku", NAME)?.to_owned();
            if name.is_empty() {
                return Err(flaw(row.at, Problem::NoName));
            }
            Ok(Entry::Sku(Sku { name, build: build(row)? }))
        }
        Sheet::Port => {
            let (switch, port) = (text(row, "switch", NAME)?.to_owned(), text(row, "port", NAME)?.to_owned());
            if switch.is_empty() || port.is_empty() {
                return Err(flaw(row.at, Problem::HalfPort(if port.is_empty() { "port" } else { "switch" })));
            }
            let position = position(row)?;
            if position.is_empty() {
                return Err(flaw(row.at, Problem::NoPosition));
            }
            Ok(Entry::Port(Port { switch, port, position }))
        }
    }
}

/// What only one entry may have, and where it was read.
#[derive(Default)]
struct Once(BTreeMap<(&'static str, String), At>);

impl Once {
    fn check(&mut self, what: &'static str, key: String, shown: &str, at: At, flaws: &mut Flaws) {
        if let Some(first) = self.0.get(&(what, key.clone())) {
            let problem = Problem::Twice { what, got: shown.to_owned(), first: format!("line {}", first.line) };
            flaws.push(Flaw { at, problem });
        } else {
            self.0.insert((what, key), at);
        }
    }
}

impl ExpectedList {
    /// The list with these rows. What is there already under the same serial number (UUID, address; name; port) is
    /// changed, the rest stays; with `replace` what the file's kinds do not have any more goes.
    pub fn import(&self, rows: &[Cells<'_>], replace: bool, now: Millis) -> Result<Change, Flaws> {
        let mut flaws = Flaws::default();
        let mut once = Once::default();
        let mut read: Vec<(&Cells<'_>, Entry)> = Vec::with_capacity(rows.len());
        for row in rows {
            match entry(row, now) {
                Ok(entry) => {
                    only_once(&mut once, row, &entry, &mut flaws);
                    read.push((row, entry));
                }
                Err(flaw) => flaws.push(*flaw),
            }
        }
        let mut change = Change::default();
        if replace {
            let kinds: Vec<Sheet> = [Sheet::Machine, Sheet::Sku, Sheet::Port]
                .into_iter()
                .filter(|sheet| rows.iter().any(|row| row.sheet == *sheet))
                .collect();
            let keys: BTreeSet<String> = read.iter().map(|(_, entry)| entry.key()).collect();
            let kept = |entry: &Entry| !kinds.contains(&sheet(entry)) || keys.contains(&entry.key());
            let (stays, goes): (Vec<Entry>, Vec<Entry>) = self.entries().partition(kept);
            change.list = Self::of(stays);
            change.gone = goes.iter().map(Entry::key).collect();
        } else {
            change.list = self.clone();
        }
        let here: BTreeSet<String> = read.iter().map(|(_, entry)| entry.key()).collect();
        for (row, entry) in &read {
            taken(&change.list, &here, row, entry, &mut flaws);
        }
        for (_, mut entry) in read.iter().cloned() {
            let before = change.list.entry(&entry.key());
            if let (Entry::Machine(new), Some(Entry::Machine(old))) = (&mut entry, &before) {
                (new.listed, new.seen) = (old.listed, old.seen);
            }
            match before {
                Some(old) if old == entry => change.same += 1,
                Some(_) => change.changed += 1,
                None => change.new += 1,
            }
            if change.list.entry(&entry.key()).as_ref() != Some(&entry) {
                change.put.push(entry.clone());
                change.list.put(entry);
            }
        }
        whole(&change.list, rows, &read, &mut flaws);
        flaws.or(change)
    }

    /// Everything on it.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        let machines = self.machines.values().cloned().map(Entry::Machine);
        let skus = self.skus.values().cloned().map(Entry::Sku);
        machines.chain(skus).chain(self.ports.values().cloned().map(Entry::Port))
    }

    fn entry(&self, key: &str) -> Option<Entry> {
        match key.split_once('/')? {
            ("machine", key) => self.machines.get(key).cloned().map(Entry::Machine),
            ("sku", key) => self.skus.get(key).cloned().map(Entry::Sku),
            ("port", key) => self.ports.get(key).cloned().map(Entry::Port),
            (_, _) => None,
        }
    }
}

fn sheet(entry: &Entry) -> Sheet {
    match entry {
        Entry::Machine(_) => Sheet::Machine,
        Entry::Sku(_) => Sheet::Sku,
        Entry::Port(_) => Sheet::Port,
    }
}

/// No two rows of a file are the same thing.
fn only_once(once: &mut Once, row: &Cells<'_>, entry: &Entry, flaws: &mut Flaws) {
    match entry {
        Entry::Machine(machine) => {
            if !machine.serial.is_empty() {
                once.check("serial", fold(&machine.serial), &machine.serial, place(row, "serial"), flaws);
            }
            if let Some(uuid) = &machine.uuid {
                once.check("uuid", uuid.to_string(), uuid.as_str(), place(row, "uuid"), flaws);
            }
            for mac in &machine.macs {
                once.check("mac", mac.clone(), mac, place(row, "mac"), flaws);
            }
            if !machine.switch.is_empty() {
                let (key, shown) = (port_key(&machine.switch, &machine.port), &machine.port);
                once.check("switch port", key, &format!("{} {shown}", machine.switch), place(row, "port"), flaws);
            }
        }
        Entry::Sku(sku) => once.check("sku", fold(&sku.name), &sku.name, place(row, "sku"), flaws),
        Entry::Port(port) => {
            let (key, shown) = (port_key(&port.switch, &port.port), format!("{} {}", port.switch, port.port));
            once.check("port", key, &shown, place(row, "port"), flaws);
        }
    }
}

/// Nothing of a row is another machine's on the list; those of the file are compared with each other elsewhere.
fn taken(list: &ExpectedList, here: &BTreeSet<String>, row: &Cells<'_>, entry: &Entry, flaws: &mut Flaws) {
    let Entry::Machine(machine) = entry else { return };
    let key = entry.key();
    let mut check = |what: &'static str, column, got: String, owner: Option<&ExpectedMachine>| {
        let owner = owner.map(|other| (format!("machine/{}", other.key()), other.title().to_owned()));
        if let Some((_, other)) = owner.filter(|(owner, _)| *owner != key && !here.contains(owner)) {
            flaws.push(Flaw { at: place(row, column), problem: Problem::Taken { what, got, other } });
        }
    };
    if let Some(uuid) = &machine.uuid {
        check("uuid", "uuid", uuid.to_string(), list.resolve(uuid.as_str()));
    }
    for mac in &machine.macs {
        check("mac", "mac", mac.clone(), list.resolve(mac));
    }
    if !machine.switch.is_empty() {
        let owner = list.at_port(&port_key(&machine.switch, &machine.port));
        check("switch port", "port", format!("{} {}", machine.switch, machine.port), owner);
    }
}

/// What holds of the list as a whole: names are known, ports lead to one place, there are not too many.
fn whole(list: &ExpectedList, rows: &[Cells<'_>], read: &[(&Cells<'_>, Entry)], flaws: &mut Flaws) {
    let first = rows.first().map_or(At { line: 1, column: 1 }, |row| row.at);
    for (what, got, limit) in [
        ("machines", list.machines.len(), MACHINES),
        ("kinds of machine", list.skus.len(), SKUS),
        ("switch ports", list.ports.len(), PORTS),
    ] {
        if got > limit {
            flaws.push(Flaw { at: first, problem: Problem::TooMany { what, limit } });
        }
    }
    let unknown = |machine: &ExpectedMachine| !machine.sku.is_empty() && list.sku(&machine.sku).is_none();
    for (row, entry) in read {
        let Entry::Machine(machine) = entry else { continue };
        if unknown(machine) {
            let known: Vec<&str> = list.skus.values().take(8).map(|sku| sku.name.as_str()).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            let problem = Problem::Sku { got: machine.sku.clone(), known };
            flaws.push(Flaw { at: place(row, "sku"), problem });
        }
    }
    if flaws.listed.is_empty()
        && let Some(machine) = list.machines.values().find(|machine| unknown(machine))
    {
        flaws.push(Flaw { at: first, problem: Problem::SkuInUse(machine.sku.clone()) });
    }
    // By their keys: which of a file's rows contradicts a port is found by looking ports up, not by comparing all.
    let here: BTreeMap<String, At> = read.iter().map(|(row, entry)| (entry.key(), row.at)).collect();
    for machine in list.machines.values().filter(|m| !m.switch.is_empty() && !m.position.is_empty()) {
        let key = port_key(&machine.switch, &machine.port);
        if let Some(port) = list.ports.get(&key).filter(|port| !port.position.fits(&machine.position)) {
            let at = [format!("machine/{}", machine.key()), format!("port/{key}")];
            let at = at.iter().find_map(|key| here.get(key)).copied().unwrap_or(first);
            let (switch, name) = (port.switch.clone(), port.port.clone());
            let (here, there) = (machine.position.clone(), port.position.clone());
            flaws.push(Flaw { at, problem: Problem::PortAgain { switch, port: name, here, there } });
        }
    }
}
