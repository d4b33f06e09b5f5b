//! The partition table (UEFI 2.10 §5.3): read from whichever copy is whole, and written so that one always is.
//!
//! Own code: the crate at hand writes both copies without a barrier between them, and the barrier is what makes a
//! change of one partition's GUID a commit.

use super::block::{Block, SECTOR};
use std::io;
use std::ops::Range;

const ENTRY: usize = 128;
const ENTRIES: usize = 128;
/// Sectors of the entries.
const TABLE: u64 = (ENTRY * ENTRIES / SECTOR) as u64;
const HEADER: usize = 92;
const SECTOR_U64: u64 = SECTOR as u64;

/// A GUID as bytes on the disk.
pub type Guid = [u8; 16];

/// Text order to disk order: the first three fields are little-endian.
pub const fn guid(text: [u8; 16]) -> Guid {
    let t = text;
    [t[3], t[2], t[1], t[0], t[5], t[4], t[7], t[6], t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15]]
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    pub kind: Guid,
    pub id: Guid,
    /// First sector, and the one behind the last.
    pub sectors: Range<u64>,
    pub name: String,
}

impl Partition {
    /// In bytes.
    pub fn bytes(&self) -> Range<u64> {
        self.sectors.start * SECTOR_U64..self.sectors.end * SECTOR_U64
    }
}

/// A table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpt {
    pub disk_id: Guid,
    pub partitions: Vec<Partition>,
}

/// First sector that partitions may use.
pub const FIRST_USABLE: u64 = 2 + TABLE;

/// The sector behind the last that partitions may use.
pub fn end_usable(disk_sectors: u64) -> u64 {
    disk_sectors.saturating_sub(TABLE + 1)
}

/// Where a copy lies.
#[derive(Clone, Copy)]
struct Place {
    header: u64,
    other: u64,
    entries: u64,
}

fn places(sectors: u64) -> [Place; 2] {
    let last = sectors - 1;
    [Place { header: 1, other: last, entries: 2 }, Place { header: last, other: 1, entries: last - TABLE }]
}

impl Gpt {
    /// The table of a disk; none if neither copy is whole.
    pub fn read(disk: &dyn Block) -> io::Result<Option<Self>> {
        let sectors = disk.size() / SECTOR_U64;
        if sectors < 2 * (TABLE + 2) {
            return Ok(None);
        }
        let [primary, backup] = places(sectors);
        // A primary that cannot be read is a failing sector; the backup is for that.
        match read_copy(disk, primary, sectors) {
            Ok(Some(table)) => Ok(Some(table)),
            Ok(None) | Err(_) => read_copy(disk, backup, sectors),
        }
    }

    /// Writes both copies, each durable before the other is touched, and a broken one first.
    pub fn write(&self, disk: &mut dyn Block) -> io::Result<()> {
        let sectors = disk.size() / SECTOR_U64;
        let [primary, backup] = places(sectors);
        let primary_whole = matches!(read_copy(disk, primary, sectors), Ok(Some(_)));
        for place in if primary_whole { [backup, primary] } else { [primary, backup] } {
            let entries = self.entries()?;
            disk.write_at(place.entries * SECTOR_U64, &entries)?;
            disk.write_at(place.header * SECTOR_U64, &self.header(place, sectors, &entries))?;
            disk.flush()?;
        }
        Ok(())
    }

    /// Makes a disk of this table alone: the protective MBR (UEFI 2.10 §5.2.3) as well. The MBR comes first and says in
    /// its boot code, which UEFI does not run, whose disk this becomes: after a power cut that is known.
    pub fn create(&self, disk: &mut dyn Block) -> io::Result<()> {
        let mbr = protective_mbr(disk.size(), &self.disk_id);
        disk.write_at(0, &mbr)?;
        disk.flush()?;
        self.write(disk)
    }

    /// Whether [`Self::create`] was begun on this disk, for a table with this id.
    pub fn was_begun(disk: &dyn Block, disk_id: &Guid) -> io::Result<bool> {
        let mut mbr = [0; SECTOR];
        disk.read_at(0, &mut mbr)?;
        Ok(mbr == protective_mbr(disk.size(), disk_id))
    }

    fn entries(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; ENTRY * ENTRIES];
        if self.partitions.len() > ENTRIES {
            return Err(io::Error::other("more partitions than the table holds"));
        }
        for (entry, partition) in bytes.chunks_mut(ENTRY).zip(&self.partitions) {
            entry[..16].copy_from_slice(&partition.kind);
            entry[16..32].copy_from_slice(&partition.id);
            entry[32..40].copy_from_slice(&partition.sectors.start.to_le_bytes());
            entry[40..48].copy_from_slice(&(partition.sectors.end - 1).to_le_bytes());
            for (unit, place) in partition.name.encode_utf16().take(36).zip(entry[56..].chunks_mut(2)) {
                place.copy_from_slice(&unit.to_le_bytes());
            }
        }
        Ok(bytes)
    }

    fn header(&self, place: Place, sectors: u64, entries: &[u8]) -> [u8; SECTOR] {
        let mut header = [0; SECTOR];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"EFI PART");
        put(8, &0x0001_0000_u32.to_le_bytes());
        put(12, &92_u32.to_le_bytes());
        put(24, &place.header.to_le_bytes());
        put(32, &place.other.to_le_bytes());
        put(40, &FIRST_USABLE.to_le_bytes());
        put(48, &(end_usable(sectors) - 1).to_le_bytes());
        put(56, &self.disk_id);
        put(72, &place.entries.to_le_bytes());
        put(80, &128_u32.to_le_bytes());
        put(84, &128_u32.to_le_bytes());
        put(88, &crc32(entries).to_le_bytes());
        let sum = crc32(&header[..HEADER]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header
    }
}

fn protective_mbr(size: u64, disk_id: &Guid) -> [u8; SECTOR] {
    let mut mbr = [0; SECTOR];
    mbr[..8].copy_from_slice(b"KILNDISK");
    mbr[8..24].copy_from_slice(disk_id);
    let rest = u32::try_from(size / SECTOR_U64 - 1).unwrap_or(u32::MAX);
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    mbr[458..462].copy_from_slice(&rest.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn read_copy(disk: &dyn Block, place: Place, sectors: u64) -> io::Result<Option<Gpt>> {
    let mut header = [0; SECTOR];
    disk.read_at(place.header * SECTOR_U64, &mut header)?;
    let sum = u32_at(&header, 16);
    header[16..20].fill(0);
    let size = usize::try_from(u32_at(&header, 12)).unwrap_or(usize::MAX);
    let ours = header.starts_with(b"EFI PART")
        && (HEADER..=SECTOR).contains(&size)
        && crc32(&header[..size]) == sum
        && u64_at(&header, 24) == place.header
        && u32_at(&header, 84) == 128;
    let (count, start) = (usize::try_from(u32_at(&header, 80)).unwrap_or(usize::MAX), u64_at(&header, 72));
    if !ours || count > ENTRIES || start >= sectors {
        return Ok(None);
    }
    let mut entries = vec![0; (count * ENTRY).next_multiple_of(SECTOR)];
    if entries.len() as u64 > (sectors - start) * SECTOR_U64 {
        return Ok(None);
    }
    disk.read_at(start * SECTOR_U64, &mut entries)?;
    if crc32(&entries[..count * ENTRY]) != u32_at(&header, 88) {
        return Ok(None);
    }
    let mut partitions = Vec::new();
    for entry in entries[..count * ENTRY].chunks(ENTRY).filter(|entry| entry[..16] != [0; 16]) {
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        if first > last || last >= sectors {
            return Ok(None);
        }
        let units: Vec<u16> = entry[56..].chunks(2).map(|u| u16::from_le_bytes([u[0], u[1]])).collect();
        let name = String::from_utf16_lossy(units.split(|u| *u == 0).next().unwrap_or_default());
        let field = |at: usize| -> Guid { entry[at..at + 16].try_into().expect("sixteen bytes") };
        partitions.push(Partition { kind: field(0), id: field(16), sectors: first..last + 1, name });
    }
    let disk_id = header[56..72].try_into().expect("sixteen bytes");
    Ok(Some(Gpt { disk_id, partitions }))
}

/// CRC-32 of ISO 3309, as UEFI has it. Tables are 16 KiB: no need for speed.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 };
    !bytes.iter().fold(u32::MAX, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
