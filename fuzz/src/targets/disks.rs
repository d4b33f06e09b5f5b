//! Disks that anybody may have written: the partition table, and the file system of the boot loader.
//!
//! An input is records of changes to a disk that is whole: where (a place below), how far behind it (two bytes), how many
//! bytes, and the bytes.

use super::agent::block::{Block, SECTOR};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

const SECTOR_U64: u64 = SECTOR as u64;

/// A sparse disk in memory. What leaves it is a bug of whoever reads or writes.
#[derive(Clone)]
struct Memory {
    size: u64,
    sectors: BTreeMap<u64, [u8; SECTOR]>,
    writes: usize,
}

impl Memory {
    fn new(size: u64) -> Self {
        Self { size, sectors: BTreeMap::new(), writes: 0 }
    }

    /// The sectors of a range: each one's number, the first byte in it, and which bytes of the range those are.
    fn pieces(&self, at: u64, length: usize) -> Vec<(u64, usize, Range<usize>)> {
        let inside = at.checked_add(length as u64).is_some_and(|end| end <= self.size);
        assert!(inside, "{length} bytes at {at} of a disk of {}", self.size);
        let (mut pieces, mut done) = (Vec::new(), 0);
        while done < length {
            let place = at + done as u64;
            let skip = usize::try_from(place % SECTOR_U64).expect("less than a sector");
            let end = length.min(done + SECTOR - skip);
            pieces.push((place / SECTOR_U64, skip, done..end));
            done = end;
        }
        pieces
    }

    fn sector(&self, number: u64) -> [u8; SECTOR] {
        self.sectors.get(&number).copied().unwrap_or([0; SECTOR])
    }

    fn patch(&mut self, mut records: &[u8], places: &[u64]) {
        while let [place, high, low, length, rest @ ..] = records {
            let (bytes, later) = rest.split_at(rest.len().min(usize::from(*length)));
            let at = places[usize::from(*place) % places.len()] + u64::from(u16::from_be_bytes([*high, *low]));
            if at + bytes.len() as u64 <= self.size {
                self.write_at(at, bytes).expect("memory does not fail");
            }
            records = later;
        }
    }
}

impl Block for Memory {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        for (number, skip, range) in self.pieces(at, bytes.len()) {
            let length = range.len();
            match self.sectors.get(&number) {
                Some(sector) => bytes[range].copy_from_slice(&sector[skip..skip + length]),
                None => bytes[range].fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        for (number, skip, range) in self.pieces(at, bytes.len()) {
            let length = range.len();
            let sector = self.sectors.entry(number).or_insert([0; SECTOR]);
            sector[skip..skip + length].copy_from_slice(&bytes[range]);
            if *sector == [0; SECTOR] {
                self.sectors.remove(&number);
            }
        }
        self.writes += 1;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One change, as an input has it.
fn change(place: u8, behind: u16, bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).expect("short");
    [&[place], &behind.to_be_bytes()[..], &[length], bytes].concat()
}

/// The partition table. The first byte says of which copies the checksums are put right after the changes.
pub mod gpt {
    use super::super::agent::gpt::{Gpt, Partition};
    use super::{Block as _, Memory, SECTOR, SECTOR_U64, change};
    use std::ops::Range;
    use std::sync::LazyLock;

    const SECTORS: u64 = 2048;
    const LAST: u64 = SECTORS - 1;
    /// UEFI 2.10 §5.3: the protective MBR; the first header and its entries; the second's entries, and it.
    const PLACES: [u64; 5] = [0, SECTOR_U64, 2 * SECTOR_U64, (LAST - 32) * SECTOR_U64, LAST * SECTOR_U64];

    /// A table, and a disk that holds it.
    static WHOLE: LazyLock<(Gpt, Memory)> = LazyLock::new(|| {
        let partition = |number: u8, sectors: Range<u64>| {
            let name = format!("kiln-{number}");
            Partition { kind: [number; 16], id: [number + 100; 16], sectors, name }
        };
        let partitions = vec![partition(1, 40..240), partition(2, 240..640), partition(3, 1000..1001)];
        let table = Gpt { disk_id: *b"a disk's own id!", partitions };
        let mut disk = Memory::new(SECTORS * SECTOR_U64);
        table.create(&mut disk).expect("memory does not fail");
        (table, disk)
    });

    /// CRC-32 as UEFI has it, bit by bit.
    fn crc(bytes: &[u8]) -> u32 {
        let bits = bytes.iter().flat_map(|byte| (0..8).map(move |bit| u32::from(byte >> bit & 1)));
        !bits.fold(u32::MAX, |sum, bit| if (sum ^ bit) & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
    }

    /// Puts the checksums of the copy with this header right, as far as its numbers make sense.
    fn seal(disk: &mut Memory, header: u64) {
        let mut bytes = disk.sector(header);
        let u32_at = |bytes: &[u8; SECTOR], at: usize| {
            usize::try_from(u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))).expect("64 bits")
        };
        let start = u64::from_le_bytes(bytes[72..80].try_into().expect("eight bytes"));
        let (size, length) = (u32_at(&bytes, 12), u32_at(&bytes, 80).saturating_mul(128));
        if size > SECTOR || length > 1 << 14 || start > LAST || length as u64 > (SECTORS - start) * SECTOR_U64 {
            return;
        }
        let mut entries = vec![0; length];
        disk.read_at(start * SECTOR_U64, &mut entries).expect("memory does not fail");
        bytes[88..92].copy_from_slice(&crc(&entries).to_le_bytes());
        bytes[16..20].fill(0);
        let sum = crc(&bytes[..size]);
        bytes[16..20].copy_from_slice(&sum.to_le_bytes());
        disk.write_at(header * SECTOR_U64, &bytes).expect("memory does not fail");
    }

    fn read(disk: &Memory) -> Option<Gpt> {
        Gpt::read(disk).expect("memory does not fail")
    }

    pub fn run(data: &[u8]) {
        let Some((choice, records)) = super::super::choice(data) else { return };
        let (table, whole) = &*WHOLE;
        let mut disk = whole.clone();
        disk.patch(records, &PLACES);
        for (bit, header) in [(1, 1), (2, LAST)] {
            if choice & bit != 0 {
                seal(&mut disk, header);
            }
        }
        let untouched = |mut sectors: Range<u64>| sectors.all(|number| disk.sector(number) == whole.sector(number));
        let found = read(&disk);
        if untouched(1..34) {
            assert_eq!(found.as_ref(), Some(table), "whatever the second copy says");
        }
        if untouched(LAST - 32..SECTORS) {
            assert!(found.is_some(), "the second copy is whole");
        }
        let begun = Gpt::was_begun(&disk, &table.disk_id).expect("memory does not fail");
        assert_eq!(begun, untouched(0..1));
        let Some(found) = found else { return };
        for partition in &found.partitions {
            let Partition { sectors, name, .. } = partition;
            assert!(sectors.start < sectors.end && sectors.end <= SECTORS, "{partition:?}");
            assert!(name.encode_utf16().count() <= 36 && !name.contains('\0'), "{partition:?}");
            assert!(partition.bytes().end <= SECTORS * SECTOR_U64);
        }
        // What was read is written, and each of the two copies says it.
        found.write(&mut disk).expect("memory does not fail");
        assert_eq!(read(&disk).as_ref(), Some(&found));
        for header in [1, LAST] {
            let mut one = disk.clone();
            one.write_at(header * SECTOR_U64, &[0; SECTOR]).expect("memory does not fail");
            assert_eq!(read(&one).as_ref(), Some(&found), "without the header in sector {header}");
        }
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let one = |choice: u8, changes: &[Vec<u8>]| [&[choice], changes.concat().as_slice()].concat();
        vec![
            one(0, &[]),
            one(0, &[change(1, 0, b"X")]),
            one(0, &[change(2, 0, b"X"), change(3, 0, b"X")]),
            // A partition that ends behind the disk; one that ends before it begins; many entries; a name of surrogates.
            one(1, &[change(2, 40, &[0xff; 8])]),
            one(1, &[change(2, 40, &[1, 0, 0, 0, 0, 0, 0, 0])]),
            one(3, &[change(1, 80, &[0xff, 0xff, 0xff, 0xff]), change(4, 80, &[7, 0, 0, 0])]),
            one(1, &[change(2, 56, &[0, 0xd8, 0x3d, 0xd8, 0, 0xde]), change(1, 72, &[0xff, 7])]),
            one(2, &[change(1, 0, &[0; 92]), change(4, 24, &[1])]),
            one(0, &[change(0, 0, b"another disk")]),
        ]
    }
}

/// FAT32: what an install leaves on the EFI system partition, changed.
pub mod fat {
    use super::super::agent::block::Part;
    use super::super::agent::fat::{Fat, Node, format};
    use super::{Memory, SECTOR, SECTOR_U64, change};
    use std::collections::BTreeSet;
    use std::io::ErrorKind;
    use std::sync::LazyLock;

    /// The least that FAT32 fits in, so that its table is small.
    const SIZE: u64 = 36 << 20;
    const LIMIT: u32 = 1 << 20;
    const ENTRIES: &str = "loader/entries";
    const FOLDERS: [&str; 6] = ["", "loader", ENTRIES, "EFI", "EFI/BOOT", "EFI/kiln"];

    /// A disk, and the places of changes: the boot sector, the table, the directories with what lies behind them, and the table's
    /// second copy.
    static WHOLE: LazyLock<(Memory, [u64; 4])> = LazyLock::new(|| {
        let mut disk = Memory::new(SIZE);
        format(&mut disk, 1, "KILN ESP").expect("memory does not fail");
        let uki = format!("EFI/kiln/{}.efi", "ab".repeat(32));
        let files = [
            ("EFI/BOOT/BOOTX64.EFI", 2000),
            ("loader/loader.conf", 60),
            ("loader/entries/kiln-4.conf", 300),
            (uki.as_str(), 3000),
            ("loader/entries/kiln-5+2-1.conf", 300),
        ];
        for (path, length) in files {
            let bytes = vec![b'x'; length];
            open(&mut disk).expect("whole").write(path, length as u64, &mut &bytes[..]).expect("it has room");
        }
        let boot = disk.sector(0);
        let table = u64::from(u32::from_le_bytes(boot[36..40].try_into().expect("four bytes")));
        (disk, [0, 32, 32 + 2 * table, 32 + table].map(|sector| sector * SECTOR_U64))
    });

    fn open(disk: &mut Memory) -> std::io::Result<Fat<Part<'_, Memory>>> {
        Fat::open(Part::new(disk, &(0..SIZE)))
    }

    /// The only error that memory gives: the file system is none, or a file's chain is broken.
    fn spoilt<T>(result: std::io::Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
                None
            }
        }
    }

    fn names(nodes: &[Node]) -> Vec<String> {
        let mut names: Vec<String> = nodes.iter().map(|node| node.name.clone()).collect();
        names.sort();
        names
    }

    /// Everything that the agent may ask of it.
    fn look(fat: &Fat<Part<'_, Memory>>) -> Vec<Option<Vec<Node>>> {
        FOLDERS
            .map(|folder| {
                let nodes = spoilt(fat.list(folder)).flatten()?;
                for node in nodes.iter().take(64) {
                    let path = format!("{folder}/{}", node.name);
                    let Some(found) = spoilt(fat.find(&path)).flatten() else { continue };
                    if let Some(bytes) = spoilt(fat.read(&path, LIMIT)) {
                        assert!(found.directory || fat.is_whole(&found), "{path}");
                        let length = bytes.map(|bytes| bytes.len() as u64);
                        assert_eq!(length, (!found.directory).then_some(u64::from(found.size)), "{path}");
                    }
                }
                Some(nodes)
            })
            .to_vec()
    }

    /// Whether all that differs are bits of one cluster's value, in one copy of the table.
    fn one_value(disk: &Memory, whole: &Memory, [_, first, behind, _]: &[u64; 4]) -> bool {
        let numbers: BTreeSet<&u64> = disk.sectors.keys().chain(whole.sectors.keys()).collect();
        let changed = numbers.into_iter().flat_map(|number| {
            let (now, before) = (disk.sector(*number), whole.sector(*number));
            (0..SECTOR).filter(move |at| now[*at] != before[*at]).map(move |at| number * SECTOR_U64 + at as u64)
        });
        let mut bits = 0;
        for at in changed.take(2) {
            let place = usize::try_from(at % SECTOR_U64).expect("less than a sector");
            let (now, before) = (disk.sector(at / SECTOR_U64)[place], whole.sector(at / SECTOR_U64)[place]);
            // The first two values are no cluster's.
            bits += if (first + 8..*behind).contains(&at) { (now ^ before).count_ones() } else { 2 };
        }
        bits < 2
    }

    /// Every file's bytes.
    fn files(fat: &Fat<Part<'_, Memory>>) -> Vec<Option<Vec<u8>>> {
        let nodes = FOLDERS.iter().flat_map(|folder| {
            let nodes = spoilt(fat.list(folder)).flatten().unwrap_or_default();
            nodes.into_iter().map(move |node| format!("{folder}/{}", node.name))
        });
        nodes.map(|path| spoilt(fat.read(&path, LIMIT)).flatten()).collect()
    }

    pub fn run(data: &[u8]) {
        let (whole, places) = &*WHOLE;
        let mut disk = whole.clone();
        disk.patch(data, places);
        if one_value(&disk, whole, places) {
            let found = files(&open(&mut disk.clone()).expect("one bit of a table is in its other copy"));
            assert!(found == files(&open(&mut whole.clone()).expect("whole")), "one flipped bit costs a file");
        }
        let Some(before) = spoilt(open(&mut disk)).map(|fat| look(&fat)) else { return };
        let mut fat = open(&mut disk).expect("just now");
        assert!(look(&fat) == before, "opened twice, it is another");

        let new = "kiln-9+3.next";
        let (path, kept) = (format!("{ENTRIES}/{new}"), [7_u8; 700]);
        let there = spoilt(fat.list(ENTRIES)).flatten().unwrap_or_default();
        // Where nothing of that name is there, it is all that changes; what it would replace may share its clusters.
        let is_new = |name: &str| name.to_lowercase().starts_with("kiln-9");
        if there.iter().any(|node| is_new(&node.name)) {
            return;
        }
        let is_hidden = |(folder, name): (&str, &str)| {
            let nodes = spoilt(fat.list(folder)).flatten().unwrap_or_default();
            nodes.iter().any(|node| node.name.eq_ignore_ascii_case(name) && !node.directory)
        };
        let hides = [("", "loader"), ("loader", "entries")].into_iter().any(is_hidden);
        for length in [kept.len(), 100] {
            let bytes = &kept[..length];
            if fat.write(&path, length as u64, &mut &bytes[..]).is_err() {
                return;
            }
            assert_eq!(fat.read(&path, LIMIT).expect("just written").as_deref(), Some(bytes));
        }
        let kept = &kept[..100];
        let expected = names(&there);
        let listed = names(&fat.list(ENTRIES).expect("just now").expect("it is there"));
        assert_eq!(listed.iter().filter(|name| !is_new(name)).collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
        assert!(listed.len() == expected.len() + 1, "{listed:?}");
        fat.rename(ENTRIES, new, "kiln-9+3.conf").expect("as many entries, and the name is free");
        assert_eq!(fat.find(&path).expect("just now"), None);
        let renamed = format!("{ENTRIES}/kiln-9+3.conf");
        assert_eq!(fat.read(&renamed, LIMIT).expect("just renamed").as_deref(), Some(kept));
        fat.remove(&renamed).expect("it is there");
        assert_eq!(names(&fat.list(ENTRIES).expect("just now").expect("it is there")), expected);
        drop(fat);
        // What was lost was given back by the first opening, and nothing was lost since; or by the next one, where a file that hid
        // a folder kept the first from knowing what is lost, and gave way.
        if hides {
            open(&mut disk).expect("what was whole enough is still");
        }
        let writes = disk.writes;
        assert!(open(&mut disk).is_ok() && disk.writes == writes, "what was whole enough is still");
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        // A cluster of the table, and a place in a directory. The entries' directory is cluster 11; seven of its first
        // sixteen places are taken.
        let labels = [&b"A LABEL    \x08"[..], &[0; 20]].concat().repeat(7);
        let entry = |cluster: u16, value: u32| change(1, cluster * 4, &value.to_le_bytes());
        let place = |sector: u16, number: u16, bytes: &[u8]| change(2, sector * 512 + number * 32, bytes);
        vec![
            Vec::new(),
            // No file system; another size of cluster; a table that is too short; a root that is no cluster.
            change(0, 510, &[0, 0]),
            change(0, 13, &[8]),
            change(0, 36, &[1, 0, 0, 0]),
            change(0, 44, &[0xff, 0xff, 0xff, 0x0f]),
            // Chains: to themselves, to nowhere, to another's, lost.
            entry(2, 2),
            entry(5, 0x0fff_fff7),
            entry(4, 6),
            [entry(200, 201), entry(201, 0x0fff_ffff)].concat(),
            // One bit of a value, in either copy; the same in both.
            entry(4, 0x0fff_ffef),
            change(3, 16, &0x0fff_ffef_u32.to_le_bytes()),
            [entry(5, 0), change(3, 20, &[0; 4])].concat(),
            // A boot sector, and its copy as well.
            change(0, 0, &[0; 255]),
            [change(0, 510, &[0, 0]), change(0, 6 * 512 + 510, &[0, 0])].concat(),
            // Directories: a deleted entry behind a long name, bytes behind the end, an attribute, the end.
            place(0, 1, &[0xe5]),
            place(0, 1, b"LOADER     \x20"),
            (3..7).flat_map(|number| place(9, number, &[0xe5])).collect(),
            [entry(11, 30), entry(30, 0x0fff_ffff), place(9, 7, &labels), place(28, 0, b"JUNK    BIN\x20")].concat(),
        ]
    }
}
