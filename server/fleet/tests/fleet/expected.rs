//! A list against what comes up: every difference has its sentence, and every mistake in a file its place.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

const SKUS: &str = "sku,model,cpus,memory,disks,nics\n\
    db,EPYC box,2 x EPYC 9754,4 x 32 GiB,2 x 960 GB nvme,2 x 25 Gb/s\n\
    named,,,4 x 32 GiB in A1 A2 B1 B2,,\n";
const PORTS: &str = "switch;port;rack;unit\r\ns1;Ethernet1/14;A;14\r\ns1;Ethernet1/12;A;U12\r\ns2;1;B;3\r\n";
const MACHINES_CSV: &str = "serial,uuid,mac,rack,unit,switch,port,sku,expected\n\
    ABC1,,,A,U14,,,db,2026-11-20\n\
    ABC2,00000000-0000-0000-0000-000000000002,52:54:00:00:00:02,B,3,,,db,\n\
    ,00000000-0000-0000-0000-000000000003,,C,1,s9,3,,2026-12-24\n";

const NOW: Millis = 1_795_737_600_000; // 2026-11-27

fn imported(list: &ExpectedList, text: &str, replace: bool) -> Result<Change, String> {
    let rows = read_csv(text).map_err(|e| e.to_string())?;
    list.import(&rows, replace, NOW).map_err(|e| e.to_string())
}

fn list() -> ExpectedList {
    let mut list = ExpectedList::default();
    for text in [SKUS, PORTS, MACHINES_CSV] {
        list = imported(&list, text, false).unwrap().list;
    }
    list
}

fn facts(n: u8, serial: &str) -> MachineFacts {
    let macs = vec![format!("52:54:00:00:00:{n:02x}")];
    MachineFacts { macs, serial: serial.into(), product: "Maker EPYC Box".into(), ..report(n, "b", 1, 1).machine }
}

fn as_ordered() -> Inventory {
    let dimm = |slot: &str| Dimm { slot: slot.into(), bytes: 32 << 30, ..Dimm::default() };
    let cpu = |n: u8| Cpu { socket: n.to_string(), model: "AMD EPYC 9754 128-Core".into(), ..Cpu::default() };
    let disk = |name: &str| Disk {
        name: name.into(),
        bytes: 960_197_124_096,
        transport: "nvme".into(),
        model: "PM9A3".into(),
        serial: format!("S-{name}"),
        ..Disk::default()
    };
    let nic = |name: &str, port: Option<&str>| Nic {
        name: name.into(),
        mac: format!("0c:00:00:00:00:0{}", name.len()),
        carrier: Some(true),
        mbps: 25_000,
        neighbour: port.map(|port| Neighbour { system_name: "S1".into(), port: port.into(), ..Neighbour::default() }),
        ..Nic::default()
    };
    Inventory {
        cpus: vec![cpu(1), cpu(2)],
        dimms: vec![dimm("A1"), dimm("A2"), dimm("B1"), dimm("B2")],
        disks: vec![disk("nvme0n1"), disk("nvme1n1")],
        nics: vec![nic("eth0", Some("Ethernet1/14")), nic("e1", None)],
        ..Inventory::default()
    }
}

fn differences(
    list: &ExpectedList,
    facts: &MachineFacts,
    inventory: &Inventory,
    claimants: &[Claimant],
) -> Vec<String> {
    let found = CameUp { facts, approved: true, inventory: Some(inventory), claimants };
    compare(list, found).unwrap().differences
}

/// What is said when a machine that is as ordered becomes another.
#[track_caller]
fn says(change: impl FnOnce(&mut Inventory), expected: &[&str]) {
    let mut inventory = as_ordered();
    change(&mut inventory);
    assert_eq!(differences(&list(), &facts(1, "abc1 "), &inventory, &[]), expected);
}

#[test]
fn every_part_that_differs_is_named() {
    says(|_| {}, &[]);
    says(|i| i.dimms[1].bytes = 0, &["DIMM A2 missing: 3 of 4 × 32 GiB"]);
    says(|i| i.dimms.iter_mut().skip(2).for_each(|d| d.bytes = 0), &["DIMMs B1, B2 missing: 2 of 4 × 32 GiB"]);
    says(|i| drop(i.dimms.remove(1)), &["DIMM missing: 3 of 4 × 32 GiB"]);
    says(|i| i.dimms[1].bytes = 16 << 30, &["DIMM A2 has 16 GiB, expected 32 GiB"]);
    says(
        |i| i.dimms.push(Dimm { slot: "C1".into(), bytes: 32 << 30, ..Dimm::default() }),
        &["DIMM C1 (32 GiB) is not expected"],
    );
    says(|i| drop(i.cpus.pop()), &["CPU missing: 1 of 2 × EPYC 9754"]);
    says(|i| i.cpus[1].model = "AMD EPYC 9354".into(), &["CPU 2 is AMD EPYC 9354, expected EPYC 9754"]);
    says(|i| i.cpus.clear(), &[]);
    says(|i| i.disks.clear(), &["2 disks missing: 0 of 2 × 960 GB nvme"]);
    says(
        |i| i.disks[1].transport = "sata".into(),
        &[
            "disk missing: 1 of 2 × 960 GB nvme",
            "disk nvme1n1 (PM9A3, 960 GB, serial number S-nvme1n1) is not expected",
        ],
    );
    says(|i| i.disks.push(Disk { name: "sda".into(), transport: "usb".into(), ..Disk::default() }), &[]);
    says(|i| i.nics[1].mbps = 10_000, &["e1's link is 10 Gb/s, expected 25 Gb/s"]);
    says(|i| i.nics[1].mbps = 100_000, &[]);
    says(|i| i.nics[1].carrier = Some(false), &["e1 (0c:00:00:00:00:02) has no link, expected 25 Gb/s"]);
    says(|i| drop(i.nics.pop()), &["network card missing: 1 of 2 × 25 Gb/s"]);
    says(
        |i| {
            i.unread = Unread::SECTIONS.map(|s| Unread { section: s.into(), reason: String::new() }).into();
            (i.cpus, i.dimms, i.disks, i.nics) = (vec![], vec![], vec![], vec![]);
        },
        &[],
    );
    let at = |i: &mut Inventory, port: &str| i.nics[0].neighbour.as_mut().unwrap().port = port.into();
    says(|i| at(i, "ethernet1/12"), &["racked in U12, expected U14"]);
    says(|i| at(i, "Ethernet1/99"), &[]);
    says(
        |i| {
            i.nics[1].neighbour = i.nics[0].neighbour.clone();
            at(i, "Ethernet1/12");
        },
        &["one of its cables leads to rack A U14 as expected, another to rack A U12"],
    );
    says(
        |i| i.nics[0].neighbour = Some(Neighbour { chassis: "s2".into(), port: "1".into(), ..Neighbour::default() }),
        &["racked in rack B U3, expected rack A U14"],
    );
}

#[test]
fn slots_that_are_named_are_looked_at_by_name() {
    let list = imported(&list(), "serial,sku\nABC1,named\n", false).unwrap().list;
    let mut inventory = as_ordered();
    inventory.dimms[1].slot = "C1".into();
    inventory.dimms[2].bytes = 64 << 30;
    assert_eq!(
        differences(&list, &facts(1, "ABC1"), &inventory, &[]),
        ["DIMM B1 has 64 GiB, expected 32 GiB", "DIMM A2 missing: 2 of 4 × 32 GiB", "DIMM C1 (32 GiB) is not expected",]
    );
}

#[test]
fn a_machine_is_found_by_serial_then_uuid_then_address() {
    let list = list();
    let entry = |facts: &MachineFacts| list.find(facts).map(|m| m.title().to_owned());
    assert_eq!(entry(&facts(2, "ABC1")), Some("ABC1".into()), "the serial number goes first");
    assert_eq!(entry(&facts(2, "Default string")), Some("ABC2".into()));
    let by_mac = MachineFacts { id: id(9), ..facts(2, "") };
    assert_eq!(entry(&by_mac), Some("ABC2".into()));
    assert_eq!(entry(&facts(9, "ZZZ")), None);
    let said = differences(&list, &facts(2, "ABC1"), &as_ordered(), &[]);
    assert_eq!(said, ["has the UUID that the list gives to ABC2"]);
    let said =
        differences(&list, &MachineFacts { serial: "ABC9".into(), product: "x".into(), ..by_mac }, &as_ordered(), &[]);
    assert_eq!(
        said,
        [
            "serial number is ABC9, expected ABC2",
            "UUID is 00000000-0000-0000-0000-000000000009, expected 00000000-0000-0000-0000-000000000002",
            "model is x, expected EPYC box",
            "racked in rack A U14, expected rack B U3",
        ]
    );
    let third = differences(&list, &facts(3, ""), &as_ordered(), &[]);
    assert_eq!(third, ["racked in rack A U14, expected rack C U1"]);
    let said = differences(&list, &facts(9, "ZZZ"), &as_ordered(), &[]);
    assert_eq!(said, ["not on the list of expected machines (serial number ZZZ)"]);
    let none = CameUp { facts: &facts(9, "ZZZ"), approved: true, inventory: None, claimants: &[] };
    assert_eq!(compare(&ExpectedList::default(), none), None, "no list, no differences");
}

#[test]
fn a_strangers_word_puts_no_difference_on_an_approved_machine() {
    let list = list();
    let other = |approved| [Claimant { title: "rack-2".into(), approved }];
    let said = |approved, claimants: &[Claimant]| {
        let facts = facts(1, "ABC1");
        compare(&list, CameUp { facts: &facts, approved, inventory: None, claimants }).unwrap().differences
    };
    assert_eq!(said(true, &other(false)), Vec::<String>::new());
    assert_eq!(said(true, &other(true)), ["serial number ABC1 is also claimed by rack-2"]);
    assert_eq!(said(false, &other(false)), ["serial number ABC1 is also claimed by rack-2"]);
    assert_eq!(said(false, &other(true)), ["claims serial number ABC1, which is rack-2's"]);
}

#[test]
fn who_never_came_is_named_from_its_day_on() {
    let mut list = list();
    let words: Vec<String> = list.overdue(0, NOW).map(|due| format!("{} {}", due.title, due.words)).collect();
    assert_eq!(words, ["ABC1 expected since 2026-11-20, never seen", "ABC2 expected since 2026-11-27, never seen"]);
    assert_eq!(list.machine("00000000-0000-0000-0000-000000000003").unwrap().absence(NOW), "expected on 2026-12-24");
    assert_eq!(list.overdue(NOW, NOW + 40 * 86_400_000).count(), 1, "each is told once");
    assert!(list.mark_seen("ABC1", NOW).is_some() && list.mark_seen("ABC1", NOW).is_none());
    assert_eq!(list.overdue(0, NOW).count(), 1);
    let again = imported(&list, MACHINES_CSV, false).unwrap();
    assert_eq!((again.new, again.changed, again.same, again.put.len()), (0, 0, 3, 0), "the same file changes nothing");
    assert_eq!(again.list, list);
}

#[test]
fn mistakes_have_a_place_and_a_way_out() {
    let list = list();
    let fails = |text: &str, words: &[&str]| {
        let said = imported(&list, text, false).unwrap_err();
        assert!(words.iter().all(|words| said.contains(words)), "{said}");
    };
    fails("", &["line 1, column 1: the file is empty"]);
    fails("foo,bar\n1,2\n", &["names no serial"]);
    fails("serial,colour\nA,red\n", &["line 1, column 8: column \"colour\" is not known", "Begin its name with #"]);
    fails("serial,serial number\n", &["line 1, column 8: the column serial is there twice"]);
    fails("serial,rack\nA1,x\nA2,y\na1,z\n", &["line 4, column 1: serial a1 is in line 2 too"]);
    fails("serial,rack\nA1,x,y\n", &["line 2, column 6: 3 fields, and 2 columns are named"]);
    fails("serial,unit\nA1,0\n", &["line 2, column 4: unit: \"0\""]);
    fails("serial,sku\nA1,nope\n", &["line 2, column 4: sku \"nope\" is not known; known are: db, named"]);
    fails("serial,expected\nA1,soon\n", &["line 2, column 4: expected: \"soon\" is no day"]);
    fails("serial,memory\nA1,lots\n", &["line 2, column 4: memory: \"lots\" is no size"]);
    fails("serial,mac\nA1,zz\n", &["line 2, column 4: mac: \"zz\""]);
    fails("serial,uuid\nA1,zz\n", &["line 2, column 4: uuid:"]);
    fails("serial,uuid\nDefault string,\n", &["line 2, column 1: serial: \"Default string\" is what boards have"]);
    fails("serial,rack\n,x\n", &["line 2, column 1: no serial, uuid or mac"]);
    fails("serial,switch,port\nA1,s1,\n", &["a switch and a port belong together: port is missing"]);
    fails("serial,mac\nA1,52:54:00:00:00:02\n", &["mac 52:54:00:00:00:02 is ABC2's on the list"]);
    fails("serial,switch,port\nA1,s9,3\n", &["switch port s9 3 is 00000000-0000-0000-0000-000000000003's on the list"]);
    fails("serial,unit,switch,port\nA1,7,s1,Ethernet1/14\n", &["switch s1 port Ethernet1/14 is U7, and rack A U14 by"]);
    fails("serial,rack\n\"A1,x\n", &["line 2, column 1: a quoted field does not end"]);
    let many: String =
        std::iter::once("serial,unit\n".to_owned()).chain((1..90).map(|n| format!("A{n},0\n"))).collect();
    fails(&many, &["line 21, column", "and 69 more mistakes"]);
    let many: String = std::iter::once("sku\n".to_owned()).chain((0..5000).map(|n| format!("S{n}\n"))).collect();
    fails(&many, &["line 4098, column 1: more than 4096 kinds of machine on the list"]);
    let sku = imported(&list, "sku,model\nnamed,x\n", true).unwrap_err();
    assert!(sku.contains("sku db is left out"), "{sku}");
}

#[test]
fn replace_takes_off_what_the_file_does_not_have_and_no_other_kind() {
    let list = list();
    let change = imported(&list, "serial,sku\nABC1,db\nNEW,db\n", true).unwrap();
    assert_eq!((change.new, change.changed, change.same), (1, 1, 0));
    assert_eq!(change.gone, ["machine/00000000-0000-0000-0000-000000000003", "machine/ABC2"]);
    assert_eq!((change.list.machines().len(), change.list.skus().len(), change.list.ports()), (2, 2, 3));
    let swapped = "serial,mac\nABC1,52:54:00:00:00:02\nABC2,52:54:00:00:00:01\n";
    let swapped = imported(&list, swapped, false).unwrap().list;
    assert_eq!(swapped.resolve("52:54:00:00:00:02").unwrap().title(), "ABC1", "a file may swap what two have");
    assert_eq!(swapped.resolve("52:54:00:00:00:01").unwrap().title(), "ABC2");
}

#[test]
fn what_is_stored_is_the_list() {
    let list = list();
    let rows: Vec<String> = list.entries().map(|e| serde_json::to_string(&e).unwrap()).collect();
    let read: Vec<Entry> = rows.iter().map(|row| serde_json::from_str(row).unwrap()).collect();
    assert_eq!(ExpectedList::of(read), list);
}

#[test]
fn a_difference_is_told_when_it_comes_and_when_it_goes() {
    let mut s = Story::good_on_1();
    let with = |differences: &[&str]| {
        let differences = differences.iter().map(|d| (*d).to_owned()).collect();
        Some(Comparison { entry: Some("ABC1".into()), differences, ..Comparison::default() })
    };
    let told = |s: &Story| -> Vec<(bool, String)> {
        let said = |a: &Action| match a {
            Action::Say { warn, text } => Some((*warn, text.clone())),
            Action::Save | Action::Forget | Action::Sign | Action::Wake | Action::Stage(_) | Action::Record(_) => None,
        };
        s.last.iter().filter_map(said).collect()
    };
    s.then(Event::Compared(with(&["DIMM A2 missing"]))).is(StateKind::Healthy);
    assert_eq!(told(&s), [(false, "expected: is ABC1 of the list".into()), (true, "expected: DIMM A2 missing".into())]);
    assert!(s.last.contains(&Action::Save));
    s.then(Event::Compared(with(&["DIMM A2 missing"])));
    assert!(s.last.is_empty(), "no news, no write");
    s.then(Event::Compared(with(&[])));
    assert_eq!(told(&s), [(false, "expected: no more: DIMM A2 missing".into())]);
    assert_eq!(s.m.condition.events.len(), 3);
    s.then(Event::Compared(None));
    assert_eq!((told(&s).len(), s.m.comparison.as_ref()), (0, None));
}

proptest! {
    /// Whatever is taken out of a machine that is as ordered is missed, and nothing else; whatever the list is, nobody
    /// panics, and what is said is bounded.
    #[test]
    fn what_is_missing_is_counted(dimms in 0_usize..=4, disks in 0_usize..=2, nics in 0_usize..=2, cpus in 1_usize..=2) {
        let mut inventory = as_ordered();
        inventory.dimms.iter_mut().skip(dimms).for_each(|dimm| dimm.bytes = 0);
        inventory.memory_bytes = dimms as u64 * (32 << 30);
        inventory.disks.truncate(disks);
        inventory.nics.truncate(nics);
        inventory.cpus.truncate(cpus);
        let said = differences(&list(), &facts(1, "ABC1"), &inventory, &[]);
        let expected = usize::from(dimms < 4 && dimms > 0) + usize::from(disks < 2) + usize::from(nics < 2) + usize::from(cpus < 2);
        prop_assert_eq!(said.len(), expected, "{:?}", said);
        for (have, of, what) in [(disks, 2, "960 GB"), (nics, 2, "25 Gb/s"), (cpus, 2, "EPYC")] {
            let words = format!("missing: {have} of {of} × {what}");
            prop_assert_eq!(said.iter().any(|text| text.contains(&words)), have < of);
        }
    }

    #[test]
    fn any_inventory_and_any_order_end_in_few_sentences(
        sizes in prop::collection::vec(0_u64..4, 0..80), speeds in prop::collection::vec(0_u32..3, 0..80),
        count in 1_u32..60, other in 1_u32..60,
    ) {
        let text = format!(
            "serial,cpus,memory,disks,nics\nABC1,{count},{count} x 1 GiB + {other} x 2 GiB,{count} x 1 GB + {other} x 2 GB nvme,\
             {count} x 1 Gb/s + {other} x 2 Gb/s\n"
        );
        let list = imported(&ExpectedList::default(), &text, false).unwrap().list;
        let dimm = |(n, s): (usize, &u64)| Dimm { slot: n.to_string(), bytes: s << 30, ..Dimm::default() };
        let disk = |(n, s): (usize, &u64)| Disk { name: n.to_string(), bytes: s * 1_000_000_000, ..Disk::default() };
        let nic = |(n, s): (usize, &u32)| Nic { name: n.to_string(), mbps: s * 1000, carrier: Some(n % 3 > 0), ..Nic::default() };
        let inventory = Inventory {
            dimms: sizes.iter().enumerate().map(dimm).collect(),
            disks: sizes.iter().enumerate().map(disk).collect(),
            nics: speeds.iter().enumerate().map(nic).collect(),
            ..Inventory::default()
        };
        let said = differences(&list, &facts(1, "ABC1"), &inventory, &[]);
        prop_assert!(said.len() <= 32 && said.iter().all(|text| text.chars().count() <= 500));
        // Parts that fit are never also missed: the sums agree.
        let modules = sizes.iter().filter(|s| **s > 0).count();
        let exact = (sizes.iter().filter(|s| **s == 1).count(), sizes.iter().filter(|s| **s == 2).count());
        if exact == (count as usize, other as usize) && modules == exact.0 + exact.1 {
            prop_assert!(!said.iter().any(|text| text.contains("DIMM")), "{:?}", said);
        }
    }

    #[test]
    fn any_file_is_imported_or_refused(text in "(serial|sku|switch|port|uuid|mac|rack|[,;\"\n a-z0-9×]){0,60}") {
        if let Ok(rows) = read_csv(&text)
            && let Ok(change) = ExpectedList::default().import(&rows, false, NOW)
        {
            prop_assert_eq!(change.new, change.put.len());
        }
    }
}

#[test]
fn a_place_is_handed_over_whole_and_to_nobody_who_has_one() {
    let mut handed = list();
    let (old, new) = (facts(2, "ABC2"), facts(9, " NEW9 "));
    let key = handed.find(&old).unwrap().key();
    let was = handed.machine(&key).unwrap().clone();
    let Some(Entry::Machine(entry)) = handed.hand_over(&key, &new) else { panic!("nothing was handed over") };
    let expected = ExpectedMachine { serial: "NEW9".into(), uuid: Some(id(9)), macs: new.macs.clone(), ..was };
    assert_eq!((&entry, handed.find(&new)), (&expected, Some(&expected)));
    assert_eq!((handed.find(&old), handed.machines().len()), (None, list().machines().len()));
    // By each of the things that the list knows it by.
    for name in ["new9", id(9).as_str(), "52:54:00:00:00:09"] {
        assert_eq!(handed.resolve(name), Some(&expected), "{name}");
    }
    for name in ["ABC2", id(2).as_str(), "52:54:00:00:00:02"] {
        assert_eq!(handed.resolve(name), None, "{name}");
    }

    // One whose addresses nobody listed has none afterwards; one without a serial number is known by its UUID.
    let mut list = list();
    let Some(Entry::Machine(entry)) = list.hand_over("ABC1", &facts(9, "Default string")) else { panic!("not handed") };
    assert_eq!((entry.title(), &*entry.macs, &*entry.sku), (id(9).as_str(), &[][..], "db"));
    let before = list.clone();
    assert_eq!(list.hand_over("ABC1", &facts(8, "NEW8")), None, "that place is gone");
    assert_eq!(list.hand_over("ABC2", &facts(9, "ELSE")), None, "it has a place of its own");
    assert_eq!(list, before);
}
