//! The difference of two inventories, in sentences.
//!
//! Parts are recognised by what stays with them: a memory slot by its name, a disk by its serial number, a network card
//! by its address, a PCI device only by its kind: another card in another slot renumbers them. A section that one of the
//! two could not look at says nothing.

use kiln_protocol::{Cpu, Dimm, Disk, Inventory, Nic, PciDevice, binary_size, decimal_size, speed};
use std::collections::BTreeMap;

/// A sentence, and whether a person should look.
type Change = (bool, String);

/// What changed from one inventory to the next; warnings first.
pub fn changes(before: &Inventory, now: &Inventory) -> Vec<Change> {
    let mut out = Vec::new();
    let both = |section: &str| !before.is_unread(section) && !now.is_unread(section);
    if both("smbios") {
        smbios(before, now, &mut out);
    }
    if both("disks") {
        disks(&before.disks, &now.disks, &mut out);
    }
    if both("nics") {
        nics(&before.nics, &now.nics, &mut out);
    }
    if both("pci") {
        pci(&before.pci, &now.pci, &mut out);
    }
    let tpm = |i: &Inventory| i.tpm.as_ref().map(|tpm| format!("TPM {}", tpm.version).trim_end().to_owned());
    match (tpm(before), tpm(now)) {
        (Some(old), None) => out.push((true, format!("{old} gone"))),
        (None, Some(new)) => out.push((false, format!("{new} is new"))),
        (old, new) => reword("the TPM", old.as_deref().unwrap_or(""), new.as_deref().unwrap_or(""), &mut out),
    }
    reword("the BMC's address", &before.bmc.address, &now.bmc.address, &mut out);
    reword("the BMC's firmware", &before.bmc.firmware, &now.bmc.firmware, &mut out);
    out.sort_by_key(|(warn, _)| !warn);
    out
}

/// A text that both have, and that differs.
fn reword(what: &str, before: &str, now: &str, out: &mut Vec<Change>) {
    if before != now && !before.is_empty() && !now.is_empty() {
        out.push((false, format!("{what} is now {now}, was {before}")));
    }
}

fn smbios(before: &Inventory, now: &Inventory, out: &mut Vec<Change>) {
    reword("the system's serial number", &before.system.serial, &now.system.serial, out);
    reword("the asset tag", &before.system.asset_tag, &now.system.asset_tag, out);
    reword("firmware", &before.firmware.version, &now.firmware.version, out);
    if before.bmc.present != now.bmc.present {
        let words = if now.bmc.present { "a BMC is new" } else { "the BMC is gone" };
        out.push((!now.bmc.present, words.into()));
    }
    cpus(&before.cpus, &now.cpus, out);
    if before.dimms.is_empty() && now.dimms.is_empty() {
        // Firmware and kernel keep a little more or less at each boot.
        let (old, new) = (before.memory_bytes, now.memory_bytes);
        if old.abs_diff(new) > old.max(new) / 16 && old > 0 {
            out.push((new < old, format!("memory is now {}, was {}", binary_size(new), binary_size(old))));
        }
    }
    dimms(&before.dimms, &now.dimms, out);
}

fn cpus(before: &[Cpu], now: &[Cpu], out: &mut Vec<Change>) {
    let at = |list: &[Cpu], socket: &str| list.iter().find(|cpu| cpu.socket == socket).cloned();
    for old in before {
        match at(now, &old.socket) {
            None => out.push((true, format!("{} gone ({})", processor(old), old.model))),
            Some(new) => {
                reword(&processor(old), &old.model, &new.model, out);
                if old.cores != new.cores && old.cores > 0 && new.cores > 0 {
                    let fewer = new.cores < old.cores;
                    out.push((fewer, format!("{} has now {} cores, had {}", processor(old), new.cores, old.cores)));
                }
            }
        }
    }
    for new in now.iter().filter(|new| at(before, &new.socket).is_none()) {
        out.push((false, format!("{} is new ({})", processor(new), new.model)));
    }
}

/// `CPU 1`, whatever the board calls its sockets.
fn processor(cpu: &Cpu) -> String {
    if cpu.socket.to_ascii_lowercase().starts_with("cpu") { cpu.socket.clone() } else { format!("CPU {}", cpu.socket) }
}

fn dimms(before: &[Dimm], now: &[Dimm], out: &mut Vec<Change>) {
    let empty = Dimm::default();
    let at = |list: &'_ [Dimm], slot: &str| list.iter().find(|dimm| dimm.slot == slot).cloned();
    let mut slots: Vec<&str> = before.iter().chain(now).map(|dimm| dimm.slot.as_str()).collect();
    slots.sort_unstable();
    slots.dedup();
    for slot in slots {
        let (old, new) = (at(before, slot).unwrap_or(empty.clone()), at(now, slot).unwrap_or(empty.clone()));
        let name = module_name(slot);
        match (old.bytes, new.bytes) {
            (0, 0) => {}
            (_, 0) => out.push((true, format!("{name} gone ({})", module(&old)))),
            (0, _) => out.push((false, format!("{name} is new ({})", module(&new)))),
            (a, b) if a != b => out.push((b < a, format!("{name} is now {}, was {}", module(&new), module(&old)))),
            _ if old.serial != new.serial && !old.serial.is_empty() && !new.serial.is_empty() => {
                out.push((false, format!("{name} was exchanged: serial number {}, was {}", new.serial, old.serial)));
            }
            _ if old.mts > new.mts && new.mts > 0 => {
                out.push((true, format!("{name} runs at {} MT/s, ran at {}", new.mts, old.mts)));
            }
            _ => {}
        }
    }
}

/// `DIMM A2`; boards that say the word themselves are not repeated.
pub(crate) fn module_name(slot: &str) -> String {
    if slot.to_ascii_uppercase().contains("DIMM") { slot.to_owned() } else { format!("DIMM {slot}") }
}

fn module(dimm: &Dimm) -> String {
    format!("{} {}", binary_size(dimm.bytes), dimm.kind).trim_end().to_owned()
}

/// A disk's serial number, else where it is attached.
fn disk_key(disk: &Disk) -> (&str, &str, &str) {
    if disk.serial.is_empty() { ("", &disk.pci, &disk.name) } else { (&disk.serial, &disk.model, "") }
}

/// `disk sda (ST8000NM000A, 8 TB, serial number Z1)`.
pub(crate) fn disk_name(disk: &Disk) -> String {
    let mut about = vec![decimal_size(disk.bytes)];
    if !disk.model.is_empty() {
        about.insert(0, disk.model.clone());
    }
    if !disk.serial.is_empty() {
        about.push(format!("serial number {}", disk.serial));
    }
    format!("disk {} ({})", disk.name, about.join(", "))
}

fn disks(before: &[Disk], now: &[Disk], out: &mut Vec<Change>) {
    for old in before {
        let Some(new) = now.iter().find(|new| disk_key(new) == disk_key(old)) else {
            out.push((true, format!("{} gone", disk_name(old))));
            continue;
        };
        if old.bytes != new.bytes {
            let (old_size, new_size) = (decimal_size(old.bytes), decimal_size(new.bytes));
            out.push((new.bytes < old.bytes, format!("{}: had {old_size}, has now {new_size}", disk_name(new))));
        }
        reword(&format!("firmware of {}", disk_name(new)), &old.firmware, &new.firmware, out);
        match (old.health.as_ref().map(|h| h.passed), &new.health) {
            (None | Some(true), Some(health)) if !health.passed => {
                out.push((true, format!("{}: SMART failing: {}", disk_name(new), health.detail)));
            }
            (Some(false), Some(health)) if health.passed => {
                out.push((false, format!("{}: SMART says that it is well again", disk_name(new))));
            }
            _ => {}
        }
    }
    for new in now.iter().filter(|new| !before.iter().any(|old| disk_key(old) == disk_key(new))) {
        out.push((false, format!("{} is new", disk_name(new))));
        if let Some(health) = new.health.as_ref().filter(|health| !health.passed) {
            out.push((true, format!("{}: SMART failing: {}", disk_name(new), health.detail)));
        }
    }
}

fn nics(before: &[Nic], now: &[Nic], out: &mut Vec<Change>) {
    for old in before {
        let Some(new) = now.iter().find(|new| new.mac == old.mac) else {
            out.push((true, format!("network card {} ({}) gone", old.name, old.mac)));
            continue;
        };
        let name = &new.name;
        match (old.carrier, new.carrier) {
            (Some(true), Some(false)) => out.push((true, format!("{name} ({}) has lost its link", new.mac))),
            (Some(false), Some(true)) => out.push((false, format!("{name} ({}) has a link", new.mac))),
            _ => {}
        }
        if old.mbps != new.mbps && old.mbps > 0 && new.mbps > 0 {
            let slower = new.mbps < old.mbps;
            out.push((slower, format!("{name}'s link is now {}, was {}", speed(new.mbps), speed(old.mbps))));
        }
        reword(&format!("{name}'s firmware"), &old.firmware, &new.firmware, out);
        match (&old.neighbour, &new.neighbour) {
            (Some(a), Some(b)) if a.place() != b.place() => {
                out.push((true, format!("{name} is now at {}, was at {}", b.place(), a.place())));
            }
            (Some(a), None) if new.carrier != Some(false) => {
                out.push((false, format!("{name} hears {} no more", a.place())));
            }
            (None, Some(b)) => out.push((false, format!("{name} is at {}", b.place()))),
            _ => {}
        }
    }
    for new in now.iter().filter(|new| !before.iter().any(|old| old.mac == new.mac)) {
        out.push((false, format!("network card {} ({}) is new", new.name, new.mac)));
    }
}

fn pci(before: &[PciDevice], now: &[PciDevice], out: &mut Vec<Change>) {
    let mut kinds: BTreeMap<(&str, &str), (usize, usize)> = BTreeMap::new();
    for device in before {
        kinds.entry((&device.id, &device.class)).or_default().0 += 1;
    }
    for device in now {
        kinds.entry((&device.id, &device.class)).or_default().1 += 1;
    }
    for ((id, class), (old, new)) in kinds {
        let kind = format!("PCI device {id} (class {class})");
        match (old, new) {
            (1, 0) => out.push((true, format!("{kind} gone"))),
            (0, 1) => out.push((false, format!("{kind} is new"))),
            (old, new) if old != new => out.push((new < old, format!("{kind}: {new} of them now, {old} before"))),
            _ => {}
        }
    }
}
