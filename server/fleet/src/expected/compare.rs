//! A machine as it came up against the list, in sentences.
//!
//! What was not looked at, and what the list does not say, is not compared. A stranger's word about itself counts for
//! the stranger alone: it puts no difference on a machine that somebody approved.

use super::build::{Build, Group, Parts};
use super::list::port_key;
use super::{ExpectedList, ExpectedMachine, Position, fold, serial_key};
use crate::hardware::{disk_name, module_name};
use kiln_protocol::{Cpu, Dimm, Disk, Inventory, MachineFacts, Nic, binary_size, speed};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Most differences kept of a machine; the rest are counted in the last.
pub const DIFFERENCES: usize = 32;

/// What came of it; kept with the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Comparison {
    /// Title of the entry that it is; none: it is not on the list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// Where it shall be.
    #[serde(skip_serializing_if = "Position::is_empty")]
    pub expected: Position,
    /// Where it is, by the switch ports that its cards are at.
    #[serde(skip_serializing_if = "Position::is_empty")]
    pub found: Position,
    /// In what it differs, in sentences; at most [`DIFFERENCES`].
    pub differences: Vec<String>,
}

/// Another machine that says that it has the same serial number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimant {
    /// What it is called.
    pub title: String,
    /// Somebody approved it.
    pub approved: bool,
}

/// What is known of a machine that is compared.
#[derive(Debug, Clone, Copy)]
pub struct CameUp<'a> {
    /// What it says of itself.
    pub facts: &'a MachineFacts,
    /// Somebody approved it.
    pub approved: bool,
    /// What it is made of; none: it has not said yet.
    pub inventory: Option<&'a Inventory>,
    /// Others that say they have its serial number.
    pub claimants: &'a [Claimant],
}

/// Compares; none: the site expects nothing in particular.
pub fn compare(list: &ExpectedList, found: CameUp<'_>) -> Option<Comparison> {
    if list.is_empty() {
        return None;
    }
    let facts = found.facts;
    let entry = list.find(facts);
    let mut out = Vec::new();
    claims(&found, &mut out);
    let mut comparison = Comparison::default();
    match entry {
        None => out.push(format!("not on the list of expected machines{}", serial_words(&facts.serial))),
        Some(entry) => {
            comparison.entry = Some(entry.title().to_owned());
            comparison.expected = entry.position.clone();
            identity(list, entry, facts, &mut out);
            let build = list.sku(&entry.sku).map_or_else(|| entry.build.clone(), |sku| entry.build.over(&sku.build));
            model(&build, facts, &mut out);
            if let Some(inventory) = found.inventory {
                comparison.found = cabling(list, entry, inventory, &mut out);
                parts(&build, inventory, &mut out);
            }
        }
    }
    if out.len() > DIFFERENCES {
        let more = out.split_off(DIFFERENCES - 1).len();
        out.push(format!("and {more} more differences"));
    }
    comparison.differences = out.into_iter().map(|text| crate::boots::cut(&text)).collect();
    Some(comparison)
}

fn serial_words(serial: &str) -> String {
    if serial_key(serial).is_some() {
        format!(" (serial number {serial})")
    } else {
        " (it has no serial number)".into()
    }
}

fn claims(found: &CameUp<'_>, out: &mut Vec<String>) {
    let others: Vec<&Claimant> = found.claimants.iter().filter(|other| other.approved || !found.approved).collect();
    let Some(first) = others.first() else { return };
    let names: Vec<&str> = others.iter().take(3).map(|other| other.title.as_str()).collect();
    let more = if others.len() > 3 { format!(" and {} more", others.len() - 3) } else { String::new() };
    let serial = &found.facts.serial;
    out.push(if first.approved && !found.approved {
        format!("claims serial number {serial}, which is {}'s{more}", names.join(", "))
    } else {
        format!("serial number {serial} is also claimed by {}{more}", names.join(", "))
    });
}

fn identity(list: &ExpectedList, entry: &ExpectedMachine, facts: &MachineFacts, out: &mut Vec<String>) {
    if !entry.serial.is_empty() && fold(&entry.serial) != fold(&facts.serial) {
        let got = if facts.serial.is_empty() { "none" } else { &facts.serial };
        out.push(format!("serial number is {got}, expected {}", entry.serial));
    }
    if let Some(uuid) = entry.uuid.as_ref().filter(|uuid| **uuid != facts.id) {
        out.push(format!("UUID is {}, expected {uuid}", facts.id));
    }
    for mac in entry.macs.iter().filter(|mac| !facts.macs.contains(mac)) {
        out.push(format!("network card {mac} missing"));
    }
    if let Some((other, what)) = list.by_identity(facts).filter(|(other, _)| other.key() != entry.key()) {
        out.push(format!("has the {what} that the list gives to {}", other.title()));
    }
}

fn model(build: &Build, facts: &MachineFacts, out: &mut Vec<String>) {
    if !has_words(&facts.product, build.model.split_whitespace()) {
        let got = if facts.product.is_empty() { "not known" } else { &facts.product };
        out.push(format!("model is {got}, expected {}", build.model));
    }
}

fn has_words<'a>(text: &str, mut words: impl Iterator<Item = &'a str>) -> bool {
    let text = text.to_ascii_lowercase();
    words.all(|word| text.contains(&word.to_ascii_lowercase()))
}

/// Where it is, and that it should be elsewhere.
fn cabling(list: &ExpectedList, entry: &ExpectedMachine, inventory: &Inventory, out: &mut Vec<String>) -> Position {
    let heard: Vec<_> = inventory.nics.iter().filter_map(|nic| nic.neighbour.as_ref()).collect();
    let places: Vec<&Position> = heard.iter().filter_map(|neighbour| list.position_of(neighbour)).collect();
    let expected = &entry.position;
    let wrong = places.iter().find(|place| !place.fits(expected));
    if let Some(place) = wrong {
        let fits = places.iter().any(|place| place.fits(expected));
        out.push(match (fits, place.rack.eq_ignore_ascii_case(&expected.rack) || place.rack.is_empty()) {
            (true, _) => format!("one of its cables leads to {expected} as expected, another to {place}"),
            (false, true) if !place.unit.is_empty() && !expected.unit.is_empty() => {
                format!("racked in {}, expected {}", place.unit, expected.unit)
            }
            (false, true | false) => format!("racked in {place}, expected {expected}"),
        });
    }
    if !entry.switch.is_empty() && !heard.is_empty() && wrong.is_none() {
        let here = port_key(&entry.switch, &entry.port);
        let keys = |n: &&kiln_protocol::Neighbour| {
            [&n.system_name, &n.chassis]
                .into_iter()
                .flat_map(|s| [&n.port, &n.port_description].map(|p| port_key(s, p)))
                .any(|key| key == here)
        };
        if !heard.iter().any(keys) {
            let at: BTreeSet<String> = heard.iter().map(|neighbour| neighbour.place()).collect();
            let at: Vec<String> = at.into_iter().collect();
            out.push(format!("at {}, expected switch {} port {}", at.join(" and "), entry.switch, entry.port));
        }
    }
    wrong.or(places.first()).map(|place| (*place).clone()).unwrap_or_default()
}

fn parts(build: &Build, inventory: &Inventory, out: &mut Vec<String>) {
    if !inventory.is_unread("smbios") {
        if let Some(expected) = &build.cpus {
            cpus(expected, &inventory.cpus, out);
        }
        if let Some(expected) = &build.memory {
            memory(expected, inventory, out);
        }
    }
    if let Some(expected) = build.disks.as_ref().filter(|_| !inventory.is_unread("disks")) {
        disks(expected, &inventory.disks, out);
    }
    if let Some(expected) = build.nics.as_ref().filter(|_| !inventory.is_unread("nics")) {
        nics(expected, &inventory.nics, out);
    }
}

/// Groups with the most words first: what fits only there must not be taken by one that takes anything.
fn by_words(expected: &Parts) -> Vec<&Group> {
    let mut groups: Vec<&Group> = expected.groups.iter().collect();
    groups.sort_by_key(|group| std::cmp::Reverse(group.words.len()));
    groups
}

/// Takes up to so many that fit out of the pool; how many that were.
fn take<T>(pool: &mut Vec<T>, count: usize, fits: impl Fn(&T) -> bool) -> usize {
    let mut taken = 0;
    pool.retain(|part| {
        let takes = taken < count && fits(part);
        taken += usize::from(takes);
        !takes
    });
    taken
}

fn missing(what: &str, have: usize, group: &Group) -> String {
    let several = group.count as usize - have > 1;
    let what = if several { format!("{} {what}s", group.count as usize - have) } else { what.to_owned() };
    format!("{what} missing: {have} of {}", group.name())
}

fn cpus(expected: &Parts, found: &[Cpu], out: &mut Vec<String>) {
    // A board whose firmware lists no processor says nothing of them.
    if found.is_empty() {
        return;
    }
    let mut pool: Vec<&Cpu> = found.iter().collect();
    let mut short: Vec<(usize, &Group)> = Vec::new();
    for group in by_words(expected) {
        let fits = |cpu: &&Cpu| has_words(&cpu.model, group.words.iter().map(String::as_str));
        let have = take(&mut pool, group.count as usize, fits);
        short.push((have, group));
    }
    for (mut have, group) in short {
        while have < group.count as usize && !pool.is_empty() {
            let other = pool.remove(0);
            out.push(format!("{} is {}, expected {}", socket(other), other.model, group.text));
            have += 1;
        }
        if have < group.count as usize {
            out.push(missing("CPU", have, group));
        }
    }
    out.extend(pool.into_iter().map(|cpu| format!("{} ({}) is not expected", socket(cpu), cpu.model)));
}

fn socket(cpu: &Cpu) -> String {
    if cpu.socket.to_ascii_lowercase().starts_with("cpu") { cpu.socket.clone() } else { format!("CPU {}", cpu.socket) }
}

fn memory(expected: &Parts, inventory: &Inventory, out: &mut Vec<String>) {
    let all = expected.groups.iter().fold(0_u64, |sum, g| sum.saturating_add(g.size.saturating_mul(g.count.into())));
    let all = expected.total.unwrap_or(all);
    if inventory.module_bytes() == 0 {
        // Without modules in SMBIOS there is only what the kernel has: less by what firmware and kernel keep.
        let has = inventory.memory_bytes;
        if has > 0 && (has > all || has < all - all / 8) {
            out.push(format!("memory is {}, expected {}", binary_size(has), binary_size(all)));
        }
        return;
    }
    if expected.total.is_some() {
        let has = inventory.module_bytes();
        if has != all {
            out.push(format!("memory is {}, expected {}", binary_size(has), binary_size(all)));
        }
        return;
    }
    modules(expected, &inventory.dimms, out);
}

fn modules(expected: &Parts, found: &[Dimm], out: &mut Vec<String>) {
    let named = |slot: &str| expected.groups.iter().any(|g| g.slots.iter().any(|s| s.eq_ignore_ascii_case(slot)));
    // Modules of groups that name their slots are looked for there, the others anywhere else.
    let mut pool: Vec<&Dimm> = found.iter().filter(|dimm| dimm.bytes > 0 && !named(&dimm.slot)).collect();
    let mut short: Vec<(usize, &Group)> = Vec::new();
    for group in &expected.groups {
        if group.slots.is_empty() {
            short.push((take(&mut pool, group.count as usize, |dimm| dimm.bytes == group.size), group));
            continue;
        }
        let at = |slot: &str| found.iter().find(|dimm| dimm.slot.eq_ignore_ascii_case(slot));
        let fits = |slot: &&String| at(slot).is_some_and(|dimm| dimm.bytes == group.size);
        let have = group.slots.iter().filter(fits).count();
        let mut gone = Vec::new();
        for slot in group.slots.iter().filter(|slot| !fits(slot)) {
            match at(slot) {
                Some(dimm) if dimm.bytes > 0 => out.push(other_module(dimm, group)),
                Some(_) | None => gone.push(slot.as_str()),
            }
        }
        if !gone.is_empty() {
            out.push(format!("{} missing: {have} of {}", slots(&gone), group.name()));
        }
    }
    for (have, group) in &mut short {
        while *have < group.count as usize && !pool.is_empty() {
            let other = pool.remove(0);
            out.push(other_module(other, group));
            *have += 1;
        }
    }
    let empty: Vec<&str> =
        found.iter().filter(|dimm| dimm.bytes == 0 && !named(&dimm.slot)).map(|dimm| dimm.slot.as_str()).collect();
    let lacking: usize = short.iter().map(|(have, group)| group.count as usize - have).sum();
    for (have, group) in short.iter().filter(|(have, group)| *have < group.count as usize) {
        // As many slots are empty as modules lack: it is those.
        if empty.len() == lacking && short.len() == 1 {
            out.push(format!("{} missing: {have} of {}", slots(&empty), group.name()));
        } else {
            out.push(missing("DIMM", *have, group));
        }
    }
    for dimm in pool {
        out.push(format!("{} ({}) is not expected", module_name(&dimm.slot), binary_size(dimm.bytes)));
    }
}

/// `DIMM A2`, `DIMMs A2, B2`.
fn slots(names: &[&str]) -> String {
    match names {
        [one] => module_name(one),
        several => format!("DIMMs {}", several.join(", ")),
    }
}

fn other_module(dimm: &Dimm, group: &Group) -> String {
    format!("{} has {}, expected {}", module_name(&dimm.slot), binary_size(dimm.bytes), group.text)
}

fn disks(expected: &Parts, found: &[Disk], out: &mut Vec<String>) {
    // Card readers and a BMC's virtual drives without a medium have no size.
    let mut pool: Vec<&Disk> = found.iter().filter(|disk| disk.bytes > 0).collect();
    for group in by_words(expected) {
        let fits = |disk: &&Disk| {
            // A label rounds: `1.92 TB` is 1 920 383 410 176 bytes.
            disk.bytes.abs_diff(group.size) <= group.size / 20
                && has_words(&format!("{} {}", disk.transport, disk.model), group.words.iter().map(String::as_str))
        };
        let have = take(&mut pool, group.count as usize, fits);
        if have < group.count as usize {
            out.push(missing("disk", have, group));
        }
    }
    out.extend(pool.into_iter().map(|disk| format!("{} is not expected", disk_name(disk))));
}

fn nics(expected: &Parts, found: &[Nic], out: &mut Vec<String>) {
    let mut pool: Vec<&Nic> = found.iter().collect();
    let words = |group: &Group, nic: &Nic| has_words(&nic.driver, group.words.iter().map(String::as_str));
    let up = |nic: &Nic| nic.carrier == Some(true);
    let mut short: Vec<(usize, &Group)> = Vec::new();
    // First the cards that are as fast as they shall be, then faster ones and those that do not say.
    for exact in [true, false] {
        for (number, group) in by_words(expected).into_iter().enumerate() {
            let fast = |nic: &Nic| match u64::from(nic.mbps) {
                said if exact => said == group.size && up(nic) && said > 0,
                0 => up(nic) || group.size == 0,
                said => said >= group.size && (up(nic) || group.size == 0),
            };
            let have = short.get(number).map_or(0, |(have, _)| *have);
            let took = take(&mut pool, group.count as usize - have, |nic| fast(nic) && words(group, nic));
            if exact {
                short.push((took, group));
            } else if let Some((have, _)) = short.get_mut(number) {
                *have += took;
            }
        }
    }
    for (have, group) in &mut short {
        while *have < group.count as usize {
            let Some(at) = pool.iter().position(|nic| words(group, nic)) else { break };
            let nic = pool.remove(at);
            let expected = speed(u32::try_from(group.size).unwrap_or(u32::MAX));
            out.push(if up(nic) {
                format!("{}'s link is {}, expected {expected}", nic.name, speed(nic.mbps))
            } else {
                format!("{} ({}) has no link, expected {expected}", nic.name, nic.mac)
            });
            *have += 1;
        }
        if *have < group.count as usize {
            out.push(missing("network card", *have, group));
        }
    }
    for nic in pool {
        out.push(format!("network card {} ({}) is not expected", nic.name, nic.mac));
    }
}
