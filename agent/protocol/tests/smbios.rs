//! SMBIOS tables of real firmware, and others as large machines have them, against what Debian's dmidecode reads in them.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::disallowed_types)]

#[path = "../../../images/tests/oracle/mod.rs"]
mod oracle;

use kiln_protocol::{Smbios, parse_smbios};
use std::path::Path;
use std::process::Command;

/// What SeaBIOS left in a QEMU q35 machine with two sockets, 20 GiB and an IPMI controller.
const QEMU: &[u8] = include_bytes!("data/qemu-q35.dmi");

fn structure(table: &mut Vec<u8>, kind: u8, area: &[(usize, &[u8])], length: usize, strings: &[&str]) {
    let mut bytes = vec![0; length];
    (bytes[0], bytes[1]) = (kind, u8::try_from(length).unwrap());
    bytes[2..4].copy_from_slice(&u16::try_from(table.len()).unwrap().to_le_bytes());
    for (at, value) in area {
        bytes[*at..at + value.len()].copy_from_slice(value);
    }
    for text in strings {
        bytes.extend(text.as_bytes());
        bytes.push(0);
    }
    bytes.extend(if strings.is_empty() { &[0, 0][..] } else { &[0][..] });
    table.extend(bytes);
}

/// A server with more than 255 threads a socket, a module of 64 GiB, one of 512 KiB, an empty slot and Redfish.
fn server() -> Vec<u8> {
    let mut t = Vec::new();
    let text = |n: u8| vec![n];
    structure(&mut t, 0, &[(4, &text(1)), (5, &text(2)), (8, &text(3))], 0x1a, &["Dell Inc.", "1.13.2", "02/05/2024"]);
    structure(
        &mut t,
        1,
        &[(4, &text(1)), (5, &text(2)), (7, &text(3))],
        0x1b,
        &["Dell Inc.", "PowerEdge R660", "ABC1234"],
    );
    structure(&mut t, 3, &[(5, &[0x97]), (7, &text(1)), (8, &text(2))], 0x16, &["ABC1234", "Default string"]);
    let cpu: &[(usize, &[u8])] = &[
        (0x04, &[1]),
        (0x05, &[3]),
        (0x07, &[2]),
        (0x10, &[3]),
        (0x18, &[0x41]),
        (0x23, &[0xff, 0xff, 0xff]),
        (0x2a, &[0x00, 0x01, 0x80, 0x00, 0x00, 0x02]),
    ];
    structure(&mut t, 4, cpu, 0x30, &["CPU1", "AMD", "AMD EPYC 9754 128-Core Processor"]);
    structure(&mut t, 4, &[(0x04, &[1]), (0x05, &[3]), (0x18, &[0])], 0x30, &["CPU2"]);
    let big: &[(usize, &[u8])] = &[
        (0x0c, &[0xff, 0x7f]),
        (0x10, &[1]),
        (0x12, &[0x22]),
        (0x15, &[0xc0, 0x12]),
        (0x17, &[2, 3, 0, 4]),
        (0x1c, &0x1_0000_u32.to_le_bytes()),
        (0x20, &[0xc0, 0x12]),
    ];
    structure(&mut t, 17, big, 0x5c, &["A1", "Samsung", "80CE0123", "M321R8GA0BB0-CQKZJ  "]);
    structure(&mut t, 17, &[(0x0c, &[0, 0]), (0x10, &[1])], 0x28, &["A2"]);
    structure(&mut t, 17, &[(0x0c, &[0, 0x82]), (0x10, &[1]), (0x11, &[2]), (0x12, &[0x1a])], 0x28, &["A2", "BANK 3"]);
    let mut redfish = vec![0x40, 0, 1, 4, 91];
    redfish.extend([7; 16]);
    redfish.extend([1, 1, 169, 254, 0, 2]);
    redfish.extend([0; 12]);
    redfish.extend([255, 255, 255, 0]);
    redfish.extend([0; 12]);
    redfish.extend([1, 1, 169, 254, 0, 17]);
    redfish.extend([0; 12]);
    redfish.extend([255, 255, 255, 0]);
    redfish.extend([0; 12]);
    redfish.extend([0xbb, 1, 0, 0, 0, 0, 0]);
    structure(&mut t, 42, &[(4, &redfish)], 4 + redfish.len(), &[]);
    structure(&mut t, 127, &[], 4, &[]);
    t
}

/// dmidecode's words for one table; none where it is not installed.
fn dmidecode(table: &[u8]) -> Option<String> {
    if !Path::new("/usr/sbin/dmidecode").exists() {
        oracle::skipped("dmidecode is not installed; `make setup` installs it");
        return None;
    }
    // A dump as it makes them itself: the 64-bit entry point (DSP0134 §5.2.2), then the table.
    let mut entry = [0_u8; 32];
    entry[..5].copy_from_slice(b"_SM3_");
    entry[6..11].copy_from_slice(&[24, 3, 7, 0, 1]);
    entry[12..16].copy_from_slice(&u32::try_from(table.len()).unwrap().to_le_bytes());
    entry[16..24].copy_from_slice(&32_u64.to_le_bytes());
    entry[5] = entry[..24].iter().fold(0_u8, |sum, b| sum.wrapping_sub(*b));
    let path = std::env::temp_dir().join(format!("kiln-smbios-{}-{}", std::process::id(), table.len()));
    std::fs::write(&path, [&entry[..], table].concat()).unwrap();
    let out = Command::new("/usr/sbin/dmidecode").arg("--from-dump").arg(&path).output().unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(out.status.success(), "{out:?}");
    Some(String::from_utf8(out.stdout).unwrap())
}

/// The value of a field in each structure that has this heading.
fn values<'a>(said: &'a str, heading: &str, field: &str) -> Vec<&'a str> {
    let blocks = said.split("\n\n").filter(|b| b.lines().nth(1) == Some(heading));
    let value = |b: &'a str| b.lines().find_map(|l| l.trim().strip_prefix(field)?.strip_prefix(": "));
    blocks.filter_map(value).collect()
}

/// Everything that both read, from dmidecode's words.
fn agrees(got: &Smbios, said: &str) {
    let known = |v: &&str| !matches!(*v, "Not Specified" | "Default string" | "Unknown");
    let text =
        |heading, field| values(said, heading, field).into_iter().find(known).unwrap_or_default().trim().to_owned();
    assert_eq!(got.firmware.vendor, text("BIOS Information", "Vendor"));
    assert_eq!(got.firmware.version, text("BIOS Information", "Version"));
    assert_eq!(got.firmware.date, text("BIOS Information", "Release Date"));
    assert_eq!(got.system.product, text("System Information", "Product Name"));
    assert_eq!(got.system.serial, text("System Information", "Serial Number"));
    assert_eq!(got.system.asset_tag, text("Chassis Information", "Asset Tag"));
    let sizes: Vec<u64> = values(said, "Memory Device", "Size").into_iter().map(bytes).collect();
    assert_eq!(got.dimms.iter().map(|d| d.bytes).collect::<Vec<_>>(), sizes);
    let speeds: Vec<String> =
        got.dimms.iter().filter(|d| d.bytes > 0 && d.mts > 0).map(|d| format!("{} MT/s", d.mts)).collect();
    let said_speeds: Vec<&str> =
        values(said, "Memory Device", "Configured Memory Speed").into_iter().filter(|v| known(v)).collect();
    assert_eq!(speeds, said_speeds);
    let processors = values(said, "Processor Information", "Version");
    let processors: Vec<&str> = processors.into_iter().filter(known).collect();
    assert_eq!(got.cpus.iter().map(|c| c.model.as_str()).collect::<Vec<_>>(), processors);
    for (field, ours) in [
        ("Core Enabled", got.cpus.iter().map(|c| c.cores).collect::<Vec<_>>()),
        ("Thread Count", got.cpus.iter().map(|c| c.threads).collect()),
    ] {
        let theirs =
            values(said, "Processor Information", field).iter().map(|v| v.parse().unwrap()).collect::<Vec<u32>>();
        assert_eq!(ours, theirs, "{field}");
    }
}

fn bytes(size: &str) -> u64 {
    match size.split_once(' ') {
        Some((n, "kB")) => n.parse::<u64>().unwrap() << 10,
        Some((n, "MB")) => n.parse::<u64>().unwrap() << 20,
        Some((n, "GB")) => n.parse::<u64>().unwrap() << 30,
        _ => 0,
    }
}

#[test]
fn what_real_firmware_left_is_read() {
    let got = parse_smbios(QEMU);
    assert_eq!((got.system.product.as_str(), got.system.asset_tag.as_str()), ("Rack-1", "TAG-7"));
    assert_eq!(got.cpus.len(), 2);
    assert_eq!(got.dimms.iter().map(|d| d.bytes >> 30).collect::<Vec<_>>(), [16, 4]);
    assert_eq!((got.dimms[0].slot.as_str(), got.dimms[0].manufacturer.as_str()), ("DIMM_A 0", "Samsung"));
    assert!(got.bmc.present && got.bmc.address.is_empty() && got.bmc.note.contains("KCS"), "{:?}", got.bmc);
    if let Some(said) = dmidecode(QEMU) {
        agrees(&got, &said);
    }
}

#[test]
fn a_large_server_is_read() {
    let table = server();
    let got = parse_smbios(&table);
    assert_eq!(got.system.chassis, "rack mount");
    assert_eq!(got.cpus.len(), 1, "an empty socket holds nothing");
    assert_eq!((got.cpus[0].cores, got.cpus[0].threads), (128, 512));
    let [big, empty, small] = &got.dimms[..] else { panic!("{:?}", got.dimms) };
    assert_eq!((big.bytes >> 30, big.kind.as_str(), big.mts), (64, "DDR5", 4800));
    assert_eq!((big.serial.as_str(), big.part.as_str()), ("80CE0123", "M321R8GA0BB0-CQKZJ"));
    assert_eq!((empty.slot.as_str(), empty.bytes), ("A2", 0));
    assert_eq!((small.slot.as_str(), small.bytes), ("A2 BANK 3", 512 << 10));
    assert_eq!((got.bmc.address.as_str(), got.system.asset_tag.as_str()), ("169.254.0.17", ""));
    if let Some(said) = dmidecode(&table) {
        agrees(&got, &said);
        assert!(said.lines().any(|l| l.contains("Redfish Service Addr") && l.contains("169.254.0.17")), "{said}");
    }
}

#[test]
fn a_table_cut_anywhere_says_what_came_before_the_cut() {
    let whole = parse_smbios(QEMU);
    for length in 0..QEMU.len() {
        let got = parse_smbios(&QEMU[..length]);
        assert!(whole.dimms.starts_with(&got.dimms) && whole.cpus.starts_with(&got.cpus), "{length}");
    }
}
