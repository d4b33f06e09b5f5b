//! The whole of disk mode below the device: on a disk that records every write and barrier, so that power can be cut
//! anywhere; and on files, judged by the programs that others use (sgdisk, fsck.vfat, mtools).

mod cuts;
mod flips;
mod floor;
mod loader;
mod remains;
mod sectors;
mod tables;

use super::block::{Block, Part, SECTOR};
use super::device::Device;
use super::fat::{self, Fat};
use super::gpt::Gpt;
use super::layout::{Candidate, Choice, Found, Layout, choose, look};
use super::store::{LOADERS, Starts, Store};
use super::{DiskError, gpt};
use kiln_protocol::Via;
use kiln_protocol::slot::{Action, Content, EntryKind, Event, Go, Label, SlotId, SlotState, Slots};
use kiln_release::{DiskSettings, VerityParams, WipePolicy, hex, verity};
use proptest::prelude::*;
use std::io;
use std::process::Command;

const SITE: &str = "lab";
const MIB: u64 = 1 << 20;

fn settings() -> DiskSettings {
    DiskSettings { esp: 64 * MIB, slot: 16 * MIB, state: 36 * MIB, ..DiskSettings::default() }
}

const SIZE: u64 = 140 * MIB;

/// What happened to a disk, in order.
#[derive(Debug, Clone)]
enum Step {
    /// One sector.
    Sector(u64, Box<[u8; SECTOR]>),
    Flush,
}

/// A sparse disk in memory that keeps a record.
#[derive(Debug, Clone, Default)]
struct Recorded {
    sectors: std::collections::BTreeMap<u64, [u8; SECTOR]>,
    steps: Vec<Step>,
    /// Sectors that cannot be read, or written.
    failing: Option<std::ops::Range<u64>>,
    read_only: bool,
}

impl Recorded {
    /// The disk after a power cut behind `count` steps: everything before the last flush is there; of what came after
    /// it, what `picks` says, in any order.
    fn cut(before: &Self, steps: &[Step], picks: &mut dyn FnMut() -> bool) -> Self {
        let flushed = steps.iter().rposition(|step| matches!(step, Step::Flush)).map_or(0, |at| at + 1);
        let mut disk = Self { sectors: before.sectors.clone(), ..Self::default() };
        for (number, step) in steps.iter().enumerate() {
            if let Step::Sector(at, bytes) = step
                && (number < flushed || picks())
            {
                disk.sectors.insert(*at, **bytes);
            }
        }
        disk
    }

    fn check(&self, at: u64, length: usize) -> io::Result<()> {
        let sectors = at / SECTOR as u64..(at + length as u64).div_ceil(SECTOR as u64);
        let hit = self.failing.as_ref().is_some_and(|f| f.start < sectors.end && sectors.start < f.end);
        if hit { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

impl Block for Recorded {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.check(at, bytes.len())?;
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let skip = usize::try_from(at % SECTOR as u64).unwrap();
            let (piece, later) = rest.split_at_mut(rest.len().min(SECTOR - skip));
            match self.sectors.get(&(at / SECTOR as u64)) {
                Some(sector) => piece.copy_from_slice(&sector[skip..skip + piece.len()]),
                None => piece.fill(0),
            }
            at += piece.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(at, bytes.len())?;
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let whole = at.is_multiple_of(SECTOR as u64) && bytes.len().is_multiple_of(SECTOR);
        let mut padded = Vec::new();
        let (start, bytes) = if whole {
            (at, bytes)
        } else {
            // A smaller write is the read and the write of its sectors.
            let start = at / SECTOR as u64 * SECTOR as u64;
            let end = (at + bytes.len() as u64).next_multiple_of(SECTOR as u64);
            padded.resize(usize::try_from(end - start).unwrap(), 0);
            self.read_at(start, &mut padded)?;
            let skip = usize::try_from(at - start).unwrap();
            padded[skip..skip + bytes.len()].copy_from_slice(bytes);
            (start, padded.as_slice())
        };
        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
            let (number, sector) = (start / SECTOR as u64 + number as u64, sector.try_into().unwrap());
            self.sectors.insert(number, sector);
            self.steps.push(Step::Sector(number, Box::new(sector)));
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.steps.push(Step::Flush);
        Ok(())
    }
}

/// A release with its root artifact and its UKI.
struct Release {
    content: Content,
    verity: VerityParams,
    root: Vec<u8>,
    uki: Vec<u8>,
}

/// Three blocks of the one byte, and their tree.
fn artifact(byte: u8) -> (VerityParams, Vec<u8>) {
    let block = [byte; verity::BLOCK];
    let mut builder = verity::TreeBuilder::new(&[1; 32], [9; 16]).unwrap();
    (0..3).for_each(|_| builder.push_block(&block));
    let tree = builder.finish().unwrap();
    let params = VerityParams {
        root_hash: hex::encode(&tree.root_hash),
        salt: hex::encode(&[1; 32]),
        data_blocks: 3,
        hash_offset: 3 * verity::BLOCK as u64,
    };
    (params, [block.repeat(3), tree.hash_area].concat())
}

fn release(number: u64) -> Release {
    let (verity, root) = artifact(u8::try_from(number).unwrap());
    let uki = vec![u8::try_from(number).unwrap(); 3000];
    let content = Content {
        release: format!("minimal/{number}").parse().unwrap(),
        root_hash: verity.root_hash.parse().unwrap(),
        uki: hex::sha256(&uki).parse().unwrap(),
    };
    Release { content, verity, root, uki }
}

fn opened<B: Block>(disk: B) -> (Store<B>, Slots) {
    let (layout, format) = match look(&disk, SITE).unwrap() {
        Found::Ours(layout) => (layout, false),
        Found::Blank => (Layout::new(SIZE, &settings(), SITE).unwrap(), true),
        Found::Foreign(what) => panic!("{what}"),
    };
    let mut store = Store::open(disk, layout, format, "test").unwrap();
    let disk = store.read().unwrap();
    (store, Slots::new(disk, Vec::new()))
}

/// Performs actions as the agent does; gives back what the last one was.
fn perform<B: Block>(store: &mut Store<B>, actions: &[Action], release: &Release) {
    for action in actions {
        if let Action::Fetch(slot, _) = action {
            let range = store.layout.slot(*slot);
            Part::new(store.disk_mut(), &range).write_at(0, &release.root).unwrap();
            store.disk_mut().flush().unwrap();
            let mut bytes = vec![0; release.root.len().next_multiple_of(4096)];
            store.disk().read_at(range.start, &mut bytes).unwrap();
            let length = release.root.len() as u64;
            let mut read = |at: u64, out: &mut [u8]| {
                let at = usize::try_from(at - range.start).unwrap();
                out.copy_from_slice(&bytes[at..at + out.len()]);
                Ok(())
            };
            store.verify_slot(*slot, &release.verity, length, &mut read).unwrap();
        }
        let mut uki = release.uki.as_slice();
        store.perform(action, Some((release.uki.len() as u64, &mut uki))).unwrap();
    }
}

fn step<B: Block>(store: &mut Store<B>, slots: Slots, event: Event, release: &Release) -> Slots {
    let (slots, actions) = slots.event(event);
    perform(store, &actions, release);
    assert_eq!(store.read().unwrap(), slots.disk, "the disk is what the state machine says");
    slots
}

/// From a blank disk to release 1 good in A.
fn installed() -> Store<Recorded> {
    let (mut store, mut slots) = opened(Recorded::default());
    store.install_loader(b"the boot loader").unwrap();
    let first = release(1);
    for event in
        [Event::Assign(first.content.clone(), 4, Go::Here(Via::Cold)), Event::Fetched, Event::Granted, Event::Healthy]
    {
        slots = step(&mut store, slots, event, &first);
    }
    assert_eq!(slots.disk.state(SlotId::A), SlotState::Good);
    store
}

#[test]
fn a_record_outlives_everything_but_its_slot() {
    let mut store = installed();
    let (first, other) = (release(1).content.root_hash, release(9).content.root_hash);
    store.keep_record(&other, b"nobody's").unwrap();
    store.keep_record(&first, b"signed metadata").unwrap();
    assert_eq!(store.record(&first).unwrap().as_deref(), Some(&b"signed metadata"[..]));
    assert_eq!(store.record(&other).unwrap(), None, "what belongs to no slot is forgotten");
}

#[test]
fn a_disk_says_when_it_was_verified_whole_and_a_rotten_uki_is_found_and_replaced() {
    let mut store = installed();
    let first = release(1);
    let (this, other) = (first.content.root_hash.clone(), release(2).content.root_hash);
    assert_eq!(store.put_up(&this).unwrap(), 0, "a disk that was never told");
    store.keep_put_up(&this, 6).unwrap();
    store.keep_put_up(&other, 9).unwrap();
    store.keep_put_up(&this, 7).unwrap();
    store.keep_record(&first.content.root_hash, b"signed metadata").unwrap();
    let known = (store.put_up(&this).unwrap(), store.put_up(&other).unwrap());
    assert_eq!(known, (7, 9), "it outlives what is swept");
    for n in 10..20 {
        store.keep_put_up(&release(n).content.root_hash, n).unwrap();
    }
    assert_eq!(store.put_up(&this).unwrap(), 0, "a few are kept");
    assert_eq!(store.uki_hash(&first.content).unwrap(), first.content.uki.as_str());
    // A bit of it rots.
    let uki = first.uki.clone();
    let at = store.disk().sectors.iter().find(|(_, sector)| sector[..] == uki[..SECTOR]).map(|(at, _)| *at).unwrap();
    store.disk_mut().sectors.get_mut(&at).unwrap()[9] ^= 1;
    assert_ne!(store.uki_hash(&first.content).unwrap(), first.content.uki.as_str());
    store.perform(&Action::PutUki(first.content.clone()), Some((uki.len() as u64, &mut uki.as_slice()))).unwrap();
    assert_eq!(store.uki_hash(&first.content).unwrap(), first.content.uki.as_str());
    assert_eq!(store.read().unwrap().ukis.len(), 1, "under its own name");
}

#[test]
fn events_on_a_full_state_partition_stay_those_that_were_kept() {
    let mut store = installed();
    store.keep_spool(b"old events").unwrap();
    // Somebody, or something, filled it.
    let root_hash = release(1).content.root_hash;
    let mut size = 32 * MIB;
    while size >= 512 {
        let record = vec![7; usize::try_from(size).unwrap()];
        if store.keep_record(&root_hash, &record).is_err() {
            size /= 2;
        } else {
            break;
        }
    }
    let many = vec![b'x'; usize::try_from(33 * MIB).unwrap()];
    assert!(store.keep_spool(&many).is_err());
    assert_eq!(store.spool().unwrap().as_deref(), Some(&b"old events"[..]), "all of it or nothing");
    store.keep_record(&root_hash, b"small").unwrap();
    store.keep_spool(b"new events").unwrap();
    assert_eq!(store.spool().unwrap().as_deref(), Some(&b"new events"[..]));
}

#[test]
fn starts_are_counted_by_release_and_forgotten() {
    let mut store = installed();
    let (first, second) = (release(1).content.root_hash, release(2).content.root_hash);
    assert_eq!(store.starts(&first).unwrap(), Starts::default());
    let starts = Starts { count: 3, begun: 7 };
    store.keep_starts(&first, Some(starts)).unwrap();
    store.keep_record(&first, b"signed metadata").unwrap();
    assert_eq!((store.starts(&first).unwrap(), store.starts(&second).unwrap()), (starts, Starts::default()));
    store.keep_starts(&first, None).unwrap();
    assert_eq!(store.starts(&first).unwrap(), Starts::default());
}

/// The only good root is rotten: nothing of the loader's files changes until the same root is whole again.
#[test]
fn a_good_release_whose_root_is_gone_comes_back_under_its_own_entry() {
    let mut store = installed();
    let (first, slots) = (release(1), Slots::new(store.read().unwrap(), Vec::new()));
    let slots = step(&mut store, slots, Event::Spoilt(SlotId::A), &first);
    assert_eq!(slots.disk.labels, [None, None]);
    let known = slots.disk.listed(&first.content.root_hash).unwrap().name;
    assert_eq!(known.to_string(), "kiln-4.conf");
    let mut slots = Slots::new(slots.disk, Vec::new());
    let assign = Event::Assign(first.content.clone(), known.sequence, Go::Here(Via::Cold));
    for event in [assign, Event::Fetched, Event::Granted, Event::Healthy] {
        slots = step(&mut store, slots, event, &first);
    }
    let names: Vec<String> = slots.disk.entries.iter().map(|e| e.name.to_string()).collect();
    assert_eq!((names, slots.disk.state(SlotId::A)), (vec!["kiln-4.conf".to_owned()], SlotState::Good));
}

#[test]
fn a_root_that_did_not_arrive_whole_gets_no_label() {
    let mut store = installed();
    let second = release(2);
    let mut read = |_: u64, out: &mut [u8]| {
        out.fill(7);
        Ok(())
    };
    let length = second.root.len() as u64;
    let error = store.verify_slot(SlotId::B, &second.verity, length, &mut read).unwrap_err();
    assert_eq!(error.kind(), "disk-read-back");
    let error = store.verify_slot(SlotId::B, &second.verity, 17 * MIB, &mut read).unwrap_err();
    assert_eq!(error.kind(), "disk-slot-too-small");
}

proptest! {
    /// Bytes that anybody may have written: an error or a reading, never a panic and never without end.
    #[test]
    fn a_hostile_partition_is_survived(flips in prop::collection::vec((0_u64..200, 0_usize..SECTOR, any::<u8>()), 1..40)) {
        let mut disk = ESP.with(Clone::clone);
        for (sector, at, value) in flips {
            // Boot sector, table, root and the first directories.
            let sector = if sector < 100 { sector } else { DATA.with(|data| *data) + sector - 100 };
            disk.sectors.entry(sector).or_insert([0; SECTOR])[at] = value;
        }
        if let Ok(mut fat) = Fat::open(disk) {
            let _ = fat.list("loader/entries");
            let _ = fat.read("EFI/BOOT/BOOTX64.EFI", 1 << 20);
            let _ = fat.write("loader/entries/kiln-7.conf", 3, &mut &b"abc"[..]);
            let _ = fat.remove("loader/entries/kiln-4.conf");
        }
    }
}

thread_local! {
    /// An ESP with what an install leaves on it.
    static ESP: Recorded = {
        let store = installed();
        let range = store.layout.esp();
        let first = range.start / SECTOR as u64;
        let sectors = store.disk().sectors.range(first..range.end / SECTOR as u64);
        Recorded { sectors: sectors.map(|(at, bytes)| (at - first, *bytes)).collect(), ..Recorded::default() }
    };
    /// Its first sector of data.
    static DATA: u64 = ESP.with(|esp| {
        let boot = esp.sectors[&0];
        32 + 2 * u64::from(u32::from_le_bytes([boot[36], boot[37], boot[38], boot[39]]))
    });
}
