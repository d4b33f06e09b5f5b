//! What is said of changed hardware, and what is kept.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

fn server() -> Inventory {
    let dimm = |slot: &str, gib: u64| Dimm {
        slot: slot.into(),
        bytes: gib << 30,
        kind: if gib > 0 { "DDR5".into() } else { String::new() },
        mts: 4800,
        serial: format!("D-{slot}"),
        ..Dimm::default()
    };
    let disk = |name: &str, serial: &str, bytes: u64| Disk {
        name: name.into(),
        model: "PM9A3".into(),
        serial: serial.into(),
        bytes,
        firmware: "GDC5602Q".into(),
        health: Some(DiskHealth { passed: true, detail: String::new() }),
        ..Disk::default()
    };
    let nic = |name: &str, mac: &str, port: Option<&str>| Nic {
        name: name.into(),
        mac: mac.into(),
        carrier: Some(true),
        mbps: 25_000,
        firmware: "9.20".into(),
        neighbour: port.map(|port| Neighbour { system_name: "s1".into(), port: port.into(), ..Neighbour::default() }),
        ..Nic::default()
    };
    Inventory {
        system: System { serial: "ABC1234".into(), ..System::default() },
        firmware: FirmwareVersion { version: "1.13.2".into(), ..FirmwareVersion::default() },
        cpus: vec![Cpu { socket: "1".into(), model: "EPYC 9754".into(), cores: 128, threads: 256 }],
        dimms: vec![dimm("A1", 32), dimm("A2", 32), dimm("DIMM B1", 0)],
        pci: vec![PciDevice { id: "10de:2330".into(), class: "030200".into(), ..PciDevice::default() }; 8],
        disks: vec![disk("nvme0n1", "S1", 960_197_124_096), disk("nvme1n1", "S2", 960_197_124_096)],
        nics: vec![nic("eth0", "0c:00:00:00:00:01", Some("Ethernet1/3")), nic("eth1", "0c:00:00:00:00:02", None)],
        bmc: Bmc { present: true, address: "10.0.0.9".into(), ..Bmc::default() },
        tpm: Some(Tpm { version: "2.0".into() }),
        memory_bytes: 64 << 30,
        ..Inventory::default()
    }
}

/// What is said when one becomes the other.
#[track_caller]
fn says(change: impl FnOnce(&mut Inventory), expected: &[&str]) {
    let (before, mut now) = (server(), server());
    change(&mut now);
    let said: Vec<String> = changes(&before, &now)
        .into_iter()
        .map(|(warn, text)| format!("{}{text}", if warn { "! " } else { "" }))
        .collect();
    assert_eq!(said, expected);
}

#[test]
fn every_change_has_its_sentence() {
    says(|_| {}, &[]);
    says(
        |i| (i.dimms[1].bytes, i.dimms[1].kind, i.dimms[1].serial) = (0, String::new(), String::new()),
        &["! DIMM A2 gone (32 GiB DDR5)"],
    );
    says(|i| i.dimms[2].bytes = 64 << 30, &["DIMM B1 is new (64 GiB)"]);
    says(|i| i.dimms[0].bytes = 16 << 30, &["! DIMM A1 is now 16 GiB DDR5, was 32 GiB DDR5"]);
    says(|i| i.dimms[0].serial = "X".into(), &["DIMM A1 was exchanged: serial number X, was D-A1"]);
    says(|i| i.dimms[0].mts = 3600, &["! DIMM A1 runs at 3600 MT/s, ran at 4800"]);
    says(|i| drop(i.cpus.pop()), &["! CPU 1 gone (EPYC 9754)"]);
    says(|i| i.cpus[0].cores = 120, &["! CPU 1 has now 120 cores, had 128"]);
    says(|i| drop(i.disks.remove(0)), &["! disk nvme0n1 (PM9A3, 960 GB, serial number S1) gone"]);
    says(|i| i.disks[0].name = "nvme7n1".into(), &[]);
    says(
        |i| i.disks[0].firmware = "GDC5902Q".into(),
        &["firmware of disk nvme0n1 (PM9A3, 960 GB, serial number S1) is now GDC5902Q, was GDC5602Q"],
    );
    says(|i| i.nics[0].firmware = "9.40".into(), &["eth0's firmware is now 9.40, was 9.20"]);
    says(|i| i.nics[0].firmware = String::new(), &[]);
    says(
        |i| i.disks[1].health = Some(DiskHealth { passed: false, detail: "it is read-only".into() }),
        &["! disk nvme1n1 (PM9A3, 960 GB, serial number S2): SMART failing: it is read-only"],
    );
    says(
        |i| i.disks[1].serial = "S3".into(),
        &[
            "! disk nvme1n1 (PM9A3, 960 GB, serial number S2) gone",
            "disk nvme1n1 (PM9A3, 960 GB, serial number S3) is new",
        ],
    );
    says(|i| i.nics[0].carrier = Some(false), &["! eth0 (0c:00:00:00:00:01) has lost its link"]);
    says(|i| i.nics[1].mbps = 10_000, &["! eth1's link is now 10 Gb/s, was 25 Gb/s"]);
    says(
        |i| i.nics[0].neighbour.as_mut().unwrap().port = "Ethernet1/4".into(),
        &["! eth0 is now at switch s1 port Ethernet1/4, was at switch s1 port Ethernet1/3"],
    );
    says(|i| i.nics[0].neighbour = None, &["eth0 hears switch s1 port Ethernet1/3 no more"]);
    says(|i| drop(i.nics.pop()), &["! network card eth1 (0c:00:00:00:00:02) gone"]);
    says(|i| drop(i.pci.pop()), &["! PCI device 10de:2330 (class 030200): 7 of them now, 8 before"]);
    says(|i| i.tpm = None, &["! TPM 2.0 gone"]);
    says(|i| i.firmware.version = "1.14.1".into(), &["firmware is now 1.14.1, was 1.13.2"]);
    says(|i| i.bmc.address = "10.0.0.10".into(), &["the BMC's address is now 10.0.0.10, was 10.0.0.9"]);
    says(|i| i.bmc.present = false, &["! the BMC is gone"]);
}

#[test]
fn what_could_not_be_looked_at_is_not_gone() {
    let unread = |section: &str| Unread { section: section.into(), reason: "no".into() };
    says(
        |i| *i = Inventory { unread: Unread::SECTIONS.map(unread).into(), tpm: i.tpm.clone(), ..Inventory::default() },
        &[],
    );
    says(|i| (i.disks, i.unread) = (vec![], vec![unread("disks")]), &[]);
}

#[test]
fn a_boot_before_its_switch_spoke_keeps_what_was_heard_and_says_so() {
    let (first, events) = Hardware::take_in(None, "a", server(), 1);
    assert_eq!(events[0].text, "first inventory: 1 CPU, 64 GiB in 2 modules, 2 disks, 2 network cards");
    let mut silent = server();
    silent.nics[0].neighbour = None;
    let (again, events) = Hardware::take_in(Some(first.clone()), "b", silent.clone(), 2);
    assert!(events.is_empty(), "{events:?}");
    assert!(again.inventory.nics[0].neighbour.as_ref().unwrap().earlier);
    let (heard, events) = Hardware::take_in(Some(again.clone()), "b", server(), 3);
    assert!(events.is_empty() && !heard.inventory.nics[0].neighbour.as_ref().unwrap().earlier);
    let (_, events) = Hardware::take_in(Some(heard), "b", silent.clone(), 4);
    assert_eq!(events[0].text, "eth0 hears switch s1 port Ethernet1/3 no more", "in one boot it is news");
    silent.nics[0].carrier = Some(false);
    let (unplugged, _) = Hardware::take_in(Some(again), "c", silent, 5);
    assert_eq!(unplugged.inventory.nics[0].neighbour, None, "without a cable nobody is there");
}

#[test]
fn a_storm_of_changes_is_bounded_and_counted() {
    let mut many = server();
    many.disks = (0..200).map(|n| Disk { serial: format!("N{n}"), ..Disk::default() }).collect();
    let (mut hardware, _) = Hardware::take_in(None, "a", server(), 1);
    for round in 0..20 {
        let next = if round % 2 == 0 { many.clone() } else { server() };
        let (after, events) = Hardware::take_in(Some(hardware), "a", next, round);
        assert_eq!(events.len(), EVENTS_AT_ONCE);
        assert_eq!(events.last().unwrap().text, format!("and {} more changes", 202 - 31));
        hardware = after;
    }
    assert_eq!(hardware.events.len(), HARDWARE_EVENTS_KEPT);
    let stored = serde_json::to_string(&hardware).unwrap();
    assert_eq!(serde_json::from_str::<Hardware>(&stored).unwrap(), hardware);
    assert_eq!(serde_json::from_str::<Hardware>("{}").unwrap(), Hardware::default(), "an older row");
}

#[test]
fn a_loss_is_the_machines_last_word_and_its_state_stays() {
    let mut s = Story::good_on_1();
    let events = vec![
        HardwareEvent::new(5, true, "DIMM A2 gone (32 GiB DDR5)"),
        HardwareEvent::new(5, false, "disk sdb is new"),
    ];
    s.then(Event::Hardware(events)).is(StateKind::Healthy);
    assert_eq!(s.m.last_words, "DIMM A2 gone (32 GiB DDR5)");
    let said = |warn, text: &str| s.last.contains(&Action::Say { warn, text: text.into() });
    assert!(said(true, "DIMM A2 gone (32 GiB DDR5)") && said(false, "disk sdb is new"));
    assert!(s.last.contains(&Action::Save));
}

proptest! {
    /// Whatever two inventories are: nothing is said of what is equal, and there and back names the same parts.
    #[test]
    fn changes_are_found_both_ways(
        drop_dimm in prop::option::of(0_usize..2), drop_disk in prop::option::of(0_usize..2),
        drop_nic in prop::option::of(0_usize..2), drop_pci in 0_usize..8,
    ) {
        let (full, mut less) = (server(), server());
        if let Some(n) = drop_dimm { less.dimms[n] = Dimm { slot: less.dimms[n].slot.clone(), ..Dimm::default() }; }
        if let Some(n) = drop_disk { less.disks.remove(n); }
        if let Some(n) = drop_nic { less.nics.remove(n); }
        less.pci.truncate(8 - drop_pci);
        let expected = usize::from(drop_dimm.is_some()) + usize::from(drop_disk.is_some())
            + usize::from(drop_nic.is_some()) + usize::from(drop_pci > 0);
        let lost = changes(&full, &less);
        prop_assert_eq!(lost.len(), expected);
        prop_assert!(lost.iter().all(|(warn, _)| *warn));
        let found = changes(&less, &full);
        prop_assert_eq!(found.len(), expected);
        prop_assert!(found.iter().all(|(warn, _)| !*warn));
        prop_assert!(changes(&less, &less).is_empty());
    }
}
