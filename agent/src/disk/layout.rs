//! What Kiln's disks look like, which disk is taken, and which is left alone.

use super::DiskError;
use super::block::{Block, SECTOR};
use super::gpt::{self, Gpt, Guid, Partition, guid};
use kiln_protocol::slot::{Label, SlotId};
use kiln_release::{DiskSettings, WipePolicy, hex};
use std::io;
use std::ops::Range;

/// C12A7328-F81F-11D2-BA4B-00A0C93EC93B (UEFI 2.10 §5.3.3).
const ESP: Guid =
    guid([0xc1, 0x2a, 0x73, 0x28, 0xf8, 0x1f, 0x11, 0xd2, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b]);
/// Kiln's own, so that nothing else mounts them: 6B696C6E-0001-4000-8000-6B696C6E0001, -0002- and -0003-.
const SLOT: Guid = guid(*b"kiln\x00\x01\x40\x00\x80\x00kiln\x00\x01");
const STATE: Guid = guid(*b"kiln\x00\x02\x40\x00\x80\x00kiln\x00\x01");
const DATA: Guid = guid(*b"kiln\x00\x03\x40\x00\x80\x00kiln\x00\x01");
const NAMES: [(&str, Guid); 5] =
    [("kiln-esp", ESP), ("kiln-a", SLOT), ("kiln-b", SLOT), ("kiln-state", STATE), ("kiln-data", DATA)];
/// Those that every disk has; the last is there where the image keeps data.
const ALWAYS: usize = 4;
/// Partitions begin at multiples of 1 MiB.
const ALIGN: u64 = (1 << 20) / SECTOR as u64;

/// A disk of Kiln's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub table: Gpt,
}

fn derived(what: &str, from: &[u8]) -> Guid {
    let sum = hex::sha256(&[what.as_bytes(), &[0], from].concat());
    let bytes = hex::decode(&sum).expect("a SHA-256 in hex");
    bytes[..16].try_into().expect("sixteen of 32 bytes")
}

impl Layout {
    /// For an empty disk of this size. The disk's id names the site: another site's disk is somebody else's.
    pub fn new(size: u64, settings: &DiskSettings, site: &str) -> Result<Self, DiskError> {
        let disk_id = derived("kiln-disk", site.as_bytes());
        let data = settings.data.as_ref().map(|data| data.size);
        let sizes = [settings.esp, settings.slot, settings.slot, settings.state].into_iter().chain(data);
        let mut start = gpt::FIRST_USABLE.next_multiple_of(ALIGN);
        let mut partitions = Vec::new();
        for (((name, kind), size), number) in NAMES.into_iter().zip(sizes).zip(0_u8..) {
            let end = (start + size.div_ceil(SECTOR as u64)).next_multiple_of(ALIGN);
            let id = derived("kiln-partition", &[&disk_id[..], &[number]].concat());
            partitions.push(Partition { kind, id, sectors: start..end, name: name.to_owned() });
            start = end;
        }
        if start > gpt::end_usable(size / SECTOR as u64) {
            return Err(DiskError::TooSmall { size, needed: (start + gpt::FIRST_USABLE) * SECTOR as u64 });
        }
        Ok(Self { table: Gpt { disk_id, partitions } })
    }

    /// Gives the EFI system partition an id of its own, a version 4 UUID (RFC 9562 §5.4): firmware finds the loader by it, and another
    /// machine's disk of the site may be in the same machine. Disks of earlier agents have the site's.
    pub fn name_esp(&mut self, random: &[u8; 32]) {
        let mut id: [u8; 16] = random[..16].try_into().expect("sixteen of 32 bytes");
        id[6] = (id[6] & 0x0f) | 0x40;
        id[8] = (id[8] & 0x3f) | 0x80;
        self.table.partitions[0].id = guid(id);
    }

    /// The table, if it is Kiln's and this site's.
    pub fn of(table: Gpt, site: &str) -> Option<Self> {
        let ours = table.disk_id == derived("kiln-disk", site.as_bytes())
            && (ALWAYS..=NAMES.len()).contains(&table.partitions.len())
            && table.partitions.iter().zip(NAMES).all(|(p, (name, kind))| p.name == name && p.kind == kind);
        ours.then_some(Self { table })
    }

    fn slot_index(slot: SlotId) -> usize {
        1 + slot.index()
    }

    fn empty_id(&self, slot: SlotId) -> Guid {
        let number = u8::try_from(Self::slot_index(slot)).expect("1 or 2");
        derived("kiln-partition", &[&self.table.disk_id[..], &[number]].concat())
    }

    /// In bytes.
    pub fn esp(&self) -> Range<u64> {
        self.table.partitions[0].bytes()
    }

    /// In bytes.
    pub fn slot(&self, slot: SlotId) -> Range<u64> {
        self.table.partitions[Self::slot_index(slot)].bytes()
    }

    /// In bytes.
    pub fn state(&self) -> Range<u64> {
        self.table.partitions[3].bytes()
    }

    /// In bytes; none: it was made for images that keep nothing.
    pub fn data(&self) -> Option<Range<u64>> {
        self.table.partitions.get(ALWAYS).map(Partition::bytes)
    }

    /// The ESP as firmware names it in a boot option: partition number, first sector, sectors, GUID.
    pub fn esp_address(&self) -> (u32, u64, u64, Guid) {
        let Partition { id, sectors, .. } = &self.table.partitions[0];
        (1, sectors.start, sectors.end - sectors.start, *id)
    }

    /// The release that lies in a slot.
    pub fn label(&self, slot: SlotId) -> Option<Label> {
        let id = self.table.partitions[Self::slot_index(slot)].id;
        // As text the GUID is the root hash's first half: its first fields are stored the other way round.
        (id != self.empty_id(slot)).then(|| Label(guid(id)))
    }

    /// Writes it, or takes it away: one commit.
    pub fn set_label(&mut self, disk: &mut dyn Block, slot: SlotId, label: Option<Label>) -> io::Result<()> {
        let id = label.map_or_else(|| self.empty_id(slot), |label| guid(label.0));
        self.table.partitions[Self::slot_index(slot)].id = id;
        self.table.write(disk)
    }
}

/// What is on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Kiln's, of this site.
    Ours(Layout),
    /// Nothing at all, wherever it was looked.
    Blank,
    /// Something else; what was recognised.
    Foreign(&'static str),
}

/// Looks at a disk. Blank is one that holds only zeros where any file system, volume manager or RAID keeps its marks
/// (the first and last 4 MiB), and at a thousand places between.
pub fn look(disk: &dyn Block, site: &str) -> io::Result<Found> {
    if let Some(table) = Gpt::read(disk)? {
        return Ok(Layout::of(table, site).map_or(Found::Foreign("another partition table"), Found::Ours));
    }
    // Kiln's own, cut short before it had a table: nobody's data.
    if disk.size() >= SECTOR as u64 && Gpt::was_begun(disk, &derived("kiln-disk", site.as_bytes()))? {
        return Ok(Found::Blank);
    }
    let mut block = vec![0; 64 * 1024];
    let size = disk.size();
    let ends = 4_u64 << 20;
    let step = block.len() as u64;
    let near = (0..ends.min(size)).step_by(block.len());
    let far = (size.saturating_sub(ends)..size).step_by(block.len());
    for at in near.chain(far) {
        let piece = usize::try_from(step.min(size - at)).expect("at most 64 KiB");
        disk.read_at(at, &mut block[..piece])?;
        if block[..piece].iter().any(|byte| *byte != 0) {
            return Ok(Found::Foreign("data without a partition table that Kiln knows"));
        }
    }
    for number in 0..1024 {
        let at = size / 1024 * number / 4096 * 4096;
        let piece = usize::try_from(4096.min(size - at)).expect("at most 4096");
        disk.read_at(at, &mut block[..piece])?;
        if block[..piece].iter().any(|byte| *byte != 0) {
            return Ok(Found::Foreign("data without a partition table"));
        }
    }
    Ok(Found::Blank)
}

/// A disk of the machine, looked at.
#[derive(Debug)]
pub struct Candidate {
    /// `vda`, `nvme0n1`.
    pub name: String,
    pub size: u64,
    pub found: Result<Found, DiskError>,
}

/// Which disk to use.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    /// This one, as it is.
    Use(String, Layout),
    /// This one, after it was partitioned.
    Format(String, Layout),
}

/// Chooses: a disk of Kiln's that holds what is to run, then one of Kiln's, then a blank one, then, only where the
/// signed settings say so, one with somebody else's data. Among equals the smallest that is large enough, then the
/// first by name. A disk that cannot be read is passed over if another will do. One that is late may be Kiln's, and in time at
/// the next boot: beside it none is partitioned; nor one with somebody else's data beside one that cannot be read, which may be
/// what this machine starts from.
pub fn choose(
    mut disks: Vec<Candidate>,
    settings: &DiskSettings,
    site: &str,
    wanted: Option<Label>,
) -> Result<Choice, DiskError> {
    disks.sort_by(|a, b| (a.size, &a.name).cmp(&(b.size, &b.name)));
    let holds = |layout: &Layout| wanted.is_some() && SlotId::BOTH.iter().any(|slot| layout.label(*slot) == wanted);
    let ours = disks.iter().filter_map(|disk| match &disk.found {
        Ok(Found::Ours(layout)) => Some((disk, layout)),
        Ok(Found::Blank | Found::Foreign(_)) | Err(_) => None,
    });
    let ours: Vec<(&Candidate, &Layout)> = ours.collect();
    if let Some((disk, layout)) = ours.iter().find(|(_, layout)| holds(layout)).or(ours.first()) {
        return Ok(Choice::Use(disk.name.clone(), (*layout).clone()));
    }
    let failed = |is: fn(&DiskError) -> bool| disks.iter().filter_map(|d| d.found.as_ref().err()).find(|e| is(e));
    let late = failed(|error| matches!(error, DiskError::Late { .. }));
    let unread = failed(|error| matches!(error, DiskError::Late { .. } | DiskError::Io { .. }));
    let mut refused = DiskError::NoDisk;
    for foreign in [false, true] {
        for disk in &disks {
            match &disk.found {
                Ok(Found::Blank) if !foreign => {}
                Ok(Found::Foreign(_)) if foreign && settings.wipe == WipePolicy::Foreign => {}
                Ok(Found::Foreign(what)) if foreign => {
                    refused = refused.or(DiskError::Foreign { disk: disk.name.clone(), what });
                    continue;
                }
                Ok(Found::Blank | Found::Foreign(_) | Found::Ours(_)) | Err(_) => continue,
            }
            match (Layout::new(disk.size, settings, site), if foreign { unread } else { late }) {
                (Ok(layout), None) => return Ok(Choice::Format(disk.name.clone(), layout)),
                (Ok(_), Some(error)) => {
                    let reason = format!("{error}; that one may be this machine's: take it out if it is dead");
                    return Err(DiskError::Io {
                        disk: disk.name.clone(),
                        what: "not partitioned in this boot",
                        reason,
                    });
                }
                (Err(error), Some(_) | None) => refused = refused.or(error),
            }
        }
    }
    let failed = disks.into_iter().find_map(|disk| disk.found.err());
    Err(refused.or(failed.unwrap_or(DiskError::NoDisk)))
}
