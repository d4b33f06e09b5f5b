//! SMBIOS structure tables, as far as an inventory needs them: DMTF DSP0134 3.7 §6.1 (structures, strings), §7.1 BIOS,
//! §7.2 system, §7.4 chassis, §7.5 processor, §7.18 memory device, §7.39 IPMI device, §7.43 management controller host
//! interface; DSP0270 1.3 §8.5 for the latter's Redfish record.
//!
//! The table is what firmware left in memory: structures that do not hold together end the reading, and what was read
//! before counts.

use crate::inventory::{Bmc, Cpu, Dimm, FirmwareVersion, System, clean};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Longest table read, bytes; the entry point of SMBIOS 3 could name 4 GiB, real ones have a few KiB.
pub const SMBIOS_LIMIT: usize = 1 << 20;
/// Most structures read.
const STRUCTURES: usize = 4096;
/// Longest text kept, bytes.
const TEXT: usize = 64;

/// What an SMBIOS table says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Smbios {
    /// The machine.
    pub system: System,
    /// Its firmware.
    pub firmware: FirmwareVersion,
    /// Sockets with a processor.
    pub cpus: Vec<Cpu>,
    /// Memory slots, the empty ones too; no two have the same name.
    pub dimms: Vec<Dimm>,
    /// The management controller.
    pub bmc: Bmc,
}

/// Reads a table as the kernel gives it in `/sys/firmware/dmi/tables/DMI`.
pub fn parse_smbios(table: &[u8]) -> Smbios {
    let mut found = Smbios::default();
    let mut rest = table.get(..SMBIOS_LIMIT).unwrap_or(table);
    for _ in 0..STRUCTURES {
        let Some((structure, after)) = Structure::split(rest) else { break };
        rest = after;
        match structure.kind {
            0 => {
                found.firmware = FirmwareVersion {
                    vendor: structure.text(0x04),
                    version: structure.text(0x05),
                    date: structure.text(0x08),
                };
            }
            1 => {
                found.system.manufacturer = structure.text(0x04);
                found.system.product = structure.text(0x05);
                found.system.serial = structure.text(0x07);
            }
            // A blade comes with its enclosure: the first chassis is its own.
            3 if found.system.chassis.is_empty() => {
                found.system.chassis = chassis(structure.byte(0x05) & 0x7f);
                found.system.chassis_serial = structure.text(0x07);
                found.system.asset_tag = structure.text(0x08);
            }
            4 => found.cpus.extend(processor(&structure)),
            17 => {
                let dimm = memory_device(&structure, &found.dimms);
                found.dimms.push(dimm);
            }
            38 => {
                found.bmc.present = true;
                if found.bmc.note.is_empty() {
                    found.bmc.note = format!("IPMI by {}", ipmi_interface(structure.byte(0x04)));
                }
            }
            42 => host_interface(&structure, &mut found.bmc),
            127 => break,
            _ => {}
        }
    }
    found
}

/// One structure: its formatted area, header included, and its strings.
struct Structure<'a> {
    kind: u8,
    area: &'a [u8],
    strings: &'a [u8],
}

impl<'a> Structure<'a> {
    /// The first structure of a table, and what follows it.
    fn split(table: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (kind, length) = (*table.first()?, usize::from(*table.get(1)?));
        if length < 4 {
            return None;
        }
        let (area, rest) = table.split_at_checked(length)?;
        // Strings end with an empty one; a structure without any has two zeros.
        let end = rest.windows(2).position(|pair| pair == [0, 0])?;
        let (strings, after) = rest.split_at(end);
        Some((Self { kind, area, strings }, after.get(2..)?))
    }

    /// 0 where the structure is of an older version and ends before.
    fn byte(&self, at: usize) -> u8 {
        self.area.get(at).copied().unwrap_or(0)
    }

    fn word(&self, at: usize) -> u16 {
        self.area.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
    }

    fn double_word(&self, at: usize) -> u32 {
        self.area.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    /// The string that the byte at `at` numbers, from 1; empty where there is none, or only a word for "none".
    fn text(&self, at: usize) -> String {
        let number = usize::from(self.byte(at));
        let Some(index) = number.checked_sub(1) else { return String::new() };
        let bytes = self.strings.split(|b| *b == 0).nth(index).unwrap_or_default();
        let text = clean(&String::from_utf8_lossy(bytes), TEXT);
        if is_placeholder(&text) { String::new() } else { text }
    }
}

/// What makers leave in a field that they did not fill: it names no machine and no part.
pub fn is_placeholder(text: &str) -> bool {
    const WORDS: [&str; 19] = [
        "to be filled by o.e.m.",
        "to be filled by o.e.m",
        "default string",
        "not specified",
        "not available",
        "not applicable",
        "not provided",
        "no asset tag",
        "no asset information",
        "system serial number",
        "chassis serial number",
        "system product name",
        "system manufacturer",
        "serial number",
        "none",
        "n/a",
        "unknown",
        "no dimm",
        "o.e.m.",
    ];
    let lower = text.to_ascii_lowercase();
    // All digits alike, as 00000000, or counted, as 0123456789.
    let mut bytes = lower.bytes();
    let first = bytes.next();
    let uniform =
        lower.len() > 1 && matches!(first, Some(b'0' | b'f' | b'x' | b'.' | b'-')) && bytes.all(|b| Some(b) == first);
    WORDS.contains(&lower.as_str())
        || uniform
        || matches!(lower.as_str(), "0" | "0123456789" | "123456789" | "1234567890")
}

/// §7.4.1.
fn chassis(kind: u8) -> String {
    let word = match kind {
        0x03 | 0x04 | 0x06 | 0x07 | 0x0f | 0x10 | 0x23 | 0x24 => "desktop",
        0x08..=0x0a | 0x0e | 0x1e..=0x20 => "portable",
        0x11 => "main server chassis",
        0x12 => "expansion chassis",
        0x17 => "rack mount",
        0x19 => "multi-system chassis",
        0x1c => "blade",
        0x1d => "blade enclosure",
        0x21 => "IoT gateway",
        0x22 => "embedded",
        _ => "other",
    };
    word.to_owned()
}

/// §7.5; none for an empty socket, or for what is no central processor.
fn processor(s: &Structure<'_>) -> Option<Cpu> {
    const CENTRAL: u8 = 3;
    const POPULATED: u8 = 1 << 6;
    if s.byte(0x05) != CENTRAL || s.byte(0x18) & POPULATED == 0 {
        return None;
    }
    // One byte says up to 254; 255 says that the word of version 3.0 has it. Enabled cores, where they are said.
    let count = |byte: usize, word: usize| match s.byte(byte) {
        0xff => u32::from(s.word(word)),
        few => u32::from(few),
    };
    let (all, enabled) = (count(0x23, 0x2a), count(0x24, 0x2c));
    let cores = if enabled == 0 { all } else { enabled };
    let model = [s.text(0x10), s.text(0x07)].into_iter().find(|t| !t.is_empty()).unwrap_or_default();
    Some(Cpu { socket: s.text(0x04), model, cores, threads: count(0x25, 0x2e) })
}

/// §7.18.
fn memory_device(s: &Structure<'_>, before: &[Dimm]) -> Dimm {
    const MIB: u64 = 1 << 20;
    let bytes = match s.word(0x0c) {
        0 | 0xffff => 0,
        0x7fff => u64::from(s.double_word(0x1c) & 0x7fff_ffff) * MIB,
        kib if kib & 0x8000 != 0 => u64::from(kib & 0x7fff) * 1024,
        mib => u64::from(mib) * MIB,
    };
    // Some boards give all slots of a channel one name, and tell them apart by bank; some not even that.
    let (locator, bank) = (s.text(0x10), s.text(0x11));
    let named = |name: &str| before.iter().any(|d| d.slot == name);
    let both = clean(&format!("{locator} {bank}"), TEXT);
    let mut slot = if locator.is_empty() || named(&locator) { both } else { locator };
    if slot.is_empty() || named(&slot) {
        let base = slot.clone();
        let mut number = before.len();
        while slot.is_empty() || named(&slot) {
            number += 1;
            slot = clean(&format!("#{number} {base}"), TEXT);
        }
    }
    if bytes == 0 {
        return Dimm { slot, ..Dimm::default() };
    }
    let configured = match s.word(0x20) {
        0 => s.word(0x15),
        speed => speed,
    };
    let mts = match configured {
        0xffff => s.double_word(0x58) & 0x7fff_ffff,
        speed => u32::from(speed),
    };
    let (manufacturer, part, serial) = (s.text(0x17), s.text(0x1a), s.text(0x18));
    Dimm { slot, bytes, kind: memory_type(s.byte(0x12)), mts, manufacturer, part, serial }
}

/// §7.18.2; the ones that are in use.
fn memory_type(kind: u8) -> String {
    let word = match kind {
        0x07 => "RAM",
        0x0f => "SDRAM",
        0x12 => "DDR",
        0x13 => "DDR2",
        0x14 => "DDR2 FB-DIMM",
        0x18 => "DDR3",
        0x1a => "DDR4",
        0x1b => "LPDDR",
        0x1c => "LPDDR2",
        0x1d => "LPDDR3",
        0x1e => "LPDDR4",
        0x1f => "non-volatile",
        0x20 => "HBM",
        0x21 => "HBM2",
        0x22 => "DDR5",
        0x23 => "LPDDR5",
        0x24 => "HBM3",
        _ => "",
    };
    word.to_owned()
}

/// §7.39.1.
fn ipmi_interface(kind: u8) -> &'static str {
    match kind {
        1 => "KCS",
        2 => "SMIC",
        3 => "BT",
        4 => "SSIF",
        _ => "an unnamed interface",
    }
}

/// §7.43, with the record of Redfish over IP (DSP0270 §8.5.3): where the host itself reaches the BMC.
fn host_interface(s: &Structure<'_>, bmc: &mut Bmc) {
    const REDFISH_OVER_IP: u8 = 4;
    bmc.present = true;
    let records = 6 + usize::from(s.byte(0x05));
    let mut at = records + 1;
    for _ in 0..s.byte(records) {
        let (kind, length) = (s.byte(at), usize::from(s.byte(at + 1)));
        let Some(data) = s.area.get(at + 2..at + 2 + length) else { return };
        at += 2 + length;
        // Service id 16, host address 2 + 16 + 16, then discovery type, address format, address.
        if kind != REDFISH_OVER_IP || data.len() < 68 {
            continue;
        }
        let address = match data[51] {
            1 => data[52..56].try_into().ok().map(|a: [u8; 4]| Ipv4Addr::from(a).to_string()),
            2 => data[52..68].try_into().ok().map(|a: [u8; 16]| Ipv6Addr::from(a).to_string()),
            _ => None,
        };
        if let Some(address) = address.filter(|a| a != "0.0.0.0" && a != "::") {
            bmc.address = address;
            "Redfish, by its interface to the host".clone_into(&mut bmc.note);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_give_a_bounded_answer(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let got = parse_smbios(&bytes);
            prop_assert!(got.dimms.len() <= STRUCTURES && got.cpus.len() <= STRUCTURES);
        }

        /// Structures that hold together, with anything in them.
        #[test]
        fn any_structures_give_texts_that_are_bounded_and_slots_that_differ(
            structures in proptest::collection::vec(
                (prop::sample::select(vec![0_u8, 1, 3, 4, 17, 38, 42, 200]),
                 proptest::collection::vec(any::<u8>(), 0..200),
                 proptest::collection::vec("[ -~\u{7f}\u{1b}]{1,90}", 0..4)),
                0..12),
        ) {
            let mut table = Vec::new();
            for (kind, area, strings) in &structures {
                table.extend([*kind, u8::try_from(area.len() + 4).unwrap(), 0, 0]);
                table.extend(area);
                for text in strings {
                    table.extend(text.as_bytes());
                    table.push(0);
                }
                table.extend(if strings.is_empty() { &[0, 0][..] } else { &[0][..] });
            }
            let got = parse_smbios(&table);
            let memory = structures.iter().filter(|(kind, ..)| *kind == 17).count();
            prop_assert_eq!(got.dimms.len(), memory, "all structures are read");
            for (n, dimm) in got.dimms.iter().enumerate() {
                prop_assert!(!dimm.slot.is_empty() && dimm.slot.len() <= TEXT);
                prop_assert!(!got.dimms[..n].iter().any(|d| d.slot == dimm.slot), "{:?}", got.dimms);
            }
            for text in [&got.system.serial, &got.system.product, &got.firmware.version, &got.bmc.note] {
                prop_assert!(text.len() <= TEXT && !text.chars().any(char::is_control), "{:?}", text);
            }
        }
    }
}
