//! Disks that rot: a flipped bit costs nothing, or what it says, and never makes the agent throw away what is whole.

use super::*;
use std::collections::BTreeMap;

const UKI: &str = "EFI/kiln";
/// Where the first copy of the table begins, in sectors behind the partition's first.
const TABLE: u64 = 32;

/// Every file of an EFI system partition; none for one that cannot be read.
type Files = BTreeMap<String, Option<Vec<u8>>>;

fn files<B: Block>(esp: &Fat<B>) -> Files {
    let mut all = Files::new();
    for folder in ["EFI/BOOT", "EFI/systemd", UKI, "loader", "loader/entries"] {
        for node in esp.list(folder).ok().flatten().unwrap_or_default().iter().filter(|node| !node.directory) {
            let path = format!("{folder}/{}", node.name);
            let bytes = esp.read(&path, 1 << 20).ok().flatten();
            all.insert(path, bytes);
        }
    }
    all
}

fn opened_esp(disk: &mut Recorded) -> Fat<Part<'_, Recorded>> {
    Fat::open(Part::new(disk, &(0..SIZE))).unwrap()
}

/// Sectors of one copy of the table, and its values.
fn table(disk: &Recorded) -> (u64, Vec<u32>) {
    let boot = disk.sectors[&0];
    let sectors = u64::from(u32::from_le_bytes(boot[36..40].try_into().unwrap()));
    let mut bytes = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
    disk.read_at(TABLE * SECTOR as u64, &mut bytes).unwrap();
    (sectors, bytes.chunks(4).map(|value| u32::from_le_bytes(value.try_into().unwrap())).collect())
}

fn flip(disk: &mut Recorded, at: u64, bit: usize) {
    let sector = disk.sectors.entry(at / SECTOR as u64).or_insert([0; SECTOR]);
    sector[usize::try_from(at % SECTOR as u64).unwrap()] ^= 1 << (bit % 8);
}

#[test]
fn a_flipped_bit_of_a_table_is_mended_by_the_other_copy() {
    let mut whole = ESP.with(Clone::clone);
    let expected = files(&opened_esp(&mut whole));
    assert!(expected.len() >= 6 && expected.values().all(Option::is_some), "{:?}", expected.keys());
    let (sectors, values) = table(&whole);
    let used: Vec<usize> = (2..values.len()).filter(|number| values[*number] != 0).collect();
    assert!(used.len() > 15, "{used:?}");
    for copy in 0..2 {
        for (byte, number) in used.iter().flat_map(|number| (0..4).map(move |byte| (byte, *number))) {
            let mut disk = whole.clone();
            let at = (TABLE + copy * sectors) * SECTOR as u64 + (number * 4 + byte) as u64;
            flip(&mut disk, at, number + byte);
            let found = files(&opened_esp(&mut disk));
            assert_eq!(found, expected, "byte {byte} of cluster {number} in copy {copy}");
            let value = |copy: u64| {
                let mut value = [0; 4];
                let at = (TABLE + copy * sectors) * SECTOR as u64 + (number * 4) as u64;
                disk.read_at(at, &mut value).unwrap();
                u32::from_le_bytes(value) & 0x0fff_ffff
            };
            assert_eq!(value(0), value(1), "both copies are the same again");
            disk.steps.clear();
            opened_esp(&mut disk);
            assert!(disk.steps.is_empty(), "nothing is left to mend");
        }
    }
}

#[test]
fn a_copy_of_the_table_that_cannot_be_read_costs_nothing() {
    let mut whole = ESP.with(Clone::clone);
    let expected = files(&opened_esp(&mut whole));
    let (sectors, _) = table(&whole);
    for copy in 0..2 {
        let first = TABLE + copy * sectors;
        let mut disk = Recorded { failing: Some(first..first + 1), ..whole.clone() };
        assert_eq!(files(&opened_esp(&mut disk)), expected, "copy {copy}");
    }
    let mut disk = Recorded { failing: Some(TABLE..TABLE + 2 * sectors), ..whole.clone() };
    let error = Fat::open(Part::new(&mut disk, &(0..SIZE))).map(drop).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "it is not taken for none");
}

/// In both copies the same: that file alone is lost, its place is nobody else's, and it can be written anew.
#[test]
fn a_chain_that_is_broken_in_both_copies_costs_its_file_alone() {
    let mut disk = ESP.with(Clone::clone);
    let expected = files(&opened_esp(&mut disk));
    let (path, uki) = expected.iter().find(|(path, _)| path.starts_with(UKI)).unwrap();
    let uki = uki.clone().unwrap();
    let (sectors, values) = table(&disk);
    // Nothing else there has five clusters.
    let first = (2..values.len()).find(|n| (0..4).all(|behind| values[n + behind] as usize == n + behind + 1)).unwrap();
    for copy in 0..2 {
        disk.write_at((TABLE + copy * sectors) * SECTOR as u64 + (first as u64 + 1) * 4, &[0; 4]).unwrap();
    }
    let others = |esp: &Fat<Part<'_, Recorded>>| {
        let mut found = files(esp);
        let this = found.remove(path).unwrap();
        assert!(found.iter().all(|(path, bytes)| expected[path] == *bytes) && found.len() == expected.len() - 1);
        this
    };
    let mut esp = opened_esp(&mut disk);
    assert_eq!(others(&esp), None, "it cannot be read");
    assert!(esp.list(UKI).unwrap().unwrap().iter().all(|node| !esp.is_whole(node)));
    esp.write("loader/other", 5000, &mut &[7_u8; 5000][..]).unwrap();
    assert_eq!(esp.read("loader/other", 5000).unwrap(), Some(vec![7; 5000]));
    esp.remove("loader/other").unwrap();
    assert_eq!(others(&esp), None);
    esp.write(path, uki.len() as u64, &mut uki.as_slice()).unwrap();
    assert_eq!(others(&esp).as_ref(), Some(&uki));
    drop(esp);
    assert_eq!(files(&opened_esp(&mut disk)), expected);
}

/// Two names of one file, as a renaming by others that is cut leaves them: the one goes, and the other stays whole.
#[test]
fn what_two_names_share_stays_as_long_as_one_of_them() {
    let mut disk = ESP.with(Clone::clone);
    let mut esp = opened_esp(&mut disk);
    esp.write("ONE", 700, &mut &[5_u8; 700][..]).unwrap();
    esp.write("TWO", 0, &mut &b""[..]).unwrap();
    drop(esp);
    let root = DATA.with(|data| *data);
    let sector = disk.sectors.get_mut(&root).unwrap();
    let entry = |sector: &[u8; SECTOR], name: &[u8]| (0..16).find(|n| sector[n * 32..].starts_with(name)).unwrap() * 32;
    let (one, two) = (entry(sector, b"ONE "), entry(sector, b"TWO "));
    sector.copy_within(one + 20..one + 32, two + 20);
    let mut esp = opened_esp(&mut disk);
    esp.remove("ONE").unwrap();
    esp.write("NEW", 700, &mut &[6_u8; 700][..]).unwrap();
    drop(esp);
    assert_eq!(opened_esp(&mut disk).read("TWO", 1000).unwrap(), Some(vec![5; 700]));
}

#[test]
fn a_boot_sector_that_is_gone_is_written_anew_from_its_copy() {
    let mut disk = ESP.with(Clone::clone);
    let expected = files(&opened_esp(&mut disk));
    let boot = disk.sectors.insert(0, [0xa5; SECTOR]).unwrap();
    assert_eq!(files(&opened_esp(&mut disk)), expected);
    assert_eq!(disk.sectors[&0], boot, "firmware reads the first alone");
}

/// What lies under no other name than one is lost, and where the directories cannot be followed nothing is written at all.
#[test]
fn a_flipped_bit_of_a_directory_costs_what_it_names() {
    let whole = installed().disk().clone();
    let Found::Ours(layout) = look(&whole, SITE).unwrap() else { panic!("it is ours") };
    let range = layout.esp();
    let sectors = range.start / SECTOR as u64..range.end / SECTOR as u64;
    let on = |disk: &Recorded| files(&Fat::open(Part::new(&mut disk.clone(), &range)).unwrap());
    let expected = on(&whole);
    let root = sectors.start + DATA.with(|data| *data);
    let is_directory = |(at, bytes): &(&u64, &[u8; SECTOR])| **at == root || bytes.starts_with(b".          \x10");
    let directories: Vec<(u64, [u8; SECTOR])> =
        whole.sectors.range(sectors.clone()).filter(is_directory).map(|(at, bytes)| (*at, *bytes)).collect();
    assert!(directories.len() == 7, "{}", directories.len());
    let (mut costs, mut waits) = (0, 0);
    for (sector, bytes) in directories {
        let taken = bytes.chunks(32).take_while(|entry| entry[0] != 0).count() * 32;
        for at in (0..taken).step_by(7) {
            let mut disk = whole.clone();
            flip(&mut disk, sector * SECTOR as u64 + at as u64, at / 7);
            let flipped = disk.sectors.clone();
            let mut store = Store::open(disk, layout.clone(), false, "test").unwrap();
            let slots = store.read().unwrap();
            assert_eq!(slots.labels, SlotId::BOTH.map(|slot| layout.label(slot)));
            if store.lacks_esp() {
                waits += 1;
                let now = &store.disk().sectors;
                assert!(now.range(sectors.clone()).eq(flipped.range(sectors.clone())), "byte {at} of sector {sector}");
                continue;
            }
            let found = on(store.disk());
            let lost: Vec<&String> =
                expected.iter().filter(|(path, bytes)| found.get(*path) != Some(*bytes)).map(|f| f.0).collect();
            let Some(first) = lost.first() else { continue };
            costs += 1;
            let top = first.split('/').next().unwrap();
            assert!(lost.iter().all(|path| path.starts_with(top)), "byte {at} of sector {sector} costs {lost:?}");
        }
    }
    assert!(costs > 10 && waits > 0, "{costs} {waits}");
}

/// Where the root's entries of directories lie, in bytes.
fn root_directories(esp: &Recorded) -> Vec<u64> {
    let root = DATA.with(|data| *data);
    let sector = esp.sectors[&root];
    let directories = (0..16_usize).filter(|number| sector[number * 32 + 11] == 0x10);
    let found: Vec<u64> = directories.map(|number| root * SECTOR as u64 + (number * 32) as u64).collect();
    assert_eq!(found.len(), 2, "EFI and loader");
    found
}

/// Firmware does not ask for it.
#[test]
fn a_flipped_bit_in_the_size_of_a_directory_costs_nothing() {
    let mut whole = ESP.with(Clone::clone);
    let expected = files(&opened_esp(&mut whole));
    for (entry, bit) in root_directories(&whole).into_iter().flat_map(|at| (0..32_usize).map(move |bit| (at, bit))) {
        let mut disk = whole.clone();
        flip(&mut disk, entry + 28 + (bit / 8) as u64, bit);
        disk.steps.clear();
        assert_eq!(files(&opened_esp(&mut disk)), expected, "bit {bit} of the entry at {entry}");
        assert!(disk.steps.is_empty(), "bit {bit} of the entry at {entry}");
    }
}

/// It is one for firmware too. What lay below it is given to nobody until something is put there, and then it is a directory again.
#[test]
fn a_directory_that_became_a_file_is_made_anew_by_what_is_put_there() {
    let mut whole = ESP.with(Clone::clone);
    let expected = files(&opened_esp(&mut whole));
    let new = ["EFI/kiln/new.efi", "loader/entries/new.conf"];
    for entry in root_directories(&whole) {
        let mut disk = whole.clone();
        flip(&mut disk, entry + 11, 4);
        disk.steps.clear();
        assert!(files(&opened_esp(&mut disk)).len() < expected.len());
        assert!(disk.steps.is_empty(), "the entry at {entry}");
        let mut mended = disk.clone();
        flip(&mut mended, entry + 11, 4);
        assert_eq!(files(&opened_esp(&mut mended)), expected);
        let mut esp = opened_esp(&mut disk);
        for path in new {
            esp.write(path, 700, &mut &[6_u8; 700][..]).unwrap();
        }
        drop(esp);
        for path in new {
            assert_eq!(opened_esp(&mut disk).read(path, 1000).unwrap(), Some(vec![6; 700]), "{path}");
        }
    }
}

/// Firmware started from a partition that the agent cannot read: it stays until a boot server has said what goes there.
#[test]
fn an_esp_that_cannot_be_read_is_made_anew_by_the_next_install_alone() {
    let mut disk = installed().disk().clone();
    let first = release(1);
    let Found::Ours(layout) = look(&disk, SITE).unwrap() else { panic!("it is ours") };
    let esp = layout.esp();
    for copy in [0, 6] {
        disk.write_at(esp.start + copy * SECTOR as u64, &[0xa5; SECTOR]).unwrap();
    }
    let before = disk.sectors.clone();
    let (mut store, mut slots) = opened(disk);
    assert!(store.lacks_esp() && store.disk().sectors == before, "nothing is written");
    assert_eq!(slots.disk.labels, [Some(Label::of(&first.content.root_hash)), None]);
    assert!(slots.disk.entries.is_empty() && slots.disk.ukis.is_empty() && store.has_loader().is_err());
    for event in [Event::Assign(first.content.clone(), 7, Go::Here(Via::Cold)), Event::Fetched, Event::Granted] {
        slots = step(&mut store, slots, event, &first);
    }
    assert!(!store.lacks_esp());
    store.install_loader(b"the boot loader").unwrap();
    let state = opened(store.disk().clone()).1.disk;
    assert_eq!((state.state(SlotId::A), state.ukis), (SlotState::Preferred, vec![first.content.uki]));
}
