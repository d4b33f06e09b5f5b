//! What a disk holds, as the agent reads it: `kiln-agent disk FILE SITE`, for a person with a disk that will not boot, and
//! for tests. Nothing is written: what opening a disk mends is mended in memory alone.

use super::block::{Block, SECTOR};
use super::layout::{Found, look};
use super::record::Record;
use super::store::Store;
use crate::error::{AgentError, Result};
use kiln_protocol::slot::{Label, SlotId};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A disk whose writes go to memory.
struct Untouched {
    file: File,
    size: u64,
    written: BTreeMap<u64, [u8; SECTOR]>,
}

impl Block for Untouched {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)?;
        let length = SECTOR as u64;
        let end = at + bytes.len() as u64;
        for (number, sector) in self.written.range(at / length..end.div_ceil(length)) {
            let start = number * length;
            let (from, to) = (start.max(at), (start + length).min(end));
            let place = |position: u64, base: u64| usize::try_from(position - base).expect("within what is read");
            bytes[place(from, at)..place(to, at)].copy_from_slice(&sector[place(from, start)..place(to, start)]);
        }
        Ok(())
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let number = at / SECTOR as u64;
            let skip = usize::try_from(at % SECTOR as u64).expect("less than a sector");
            let (piece, later) = rest.split_at(rest.len().min(SECTOR - skip));
            let mut sector = [0; SECTOR];
            self.read_at(number * SECTOR as u64, &mut sector)?;
            sector[skip..skip + piece.len()].copy_from_slice(piece);
            self.written.insert(number, sector);
            at += piece.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Prints it, a line each: whose it is, the slots, the boot entries, the UKIs, and of which releases a record is kept.
pub fn run(path: &Path, site: &str) -> Result<()> {
    let failed = |e: io::Error| AgentError::file(path)(e);
    let mut file = File::open(path).map_err(failed)?;
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let disk = Untouched { file, size, written: BTreeMap::new() };
    let layout = match look(&disk, site).map_err(failed)? {
        Found::Blank => {
            println!("blank");
            return Ok(());
        }
        Found::Foreign(what) => {
            println!("foreign {what}");
            return Ok(());
        }
        Found::Ours(layout) => layout,
    };
    let mut store = Store::open(disk, layout, false, &path.display().to_string())?;
    let disk = store.read()?;
    println!("ours esp {}", store.layout.esp().start);
    for slot in SlotId::BOTH {
        let label = disk.labels[slot.index()].map_or("-".to_owned(), |label| kiln_release::hex::encode(&label.0));
        println!("slot {slot:?} {} {:?} {label}", store.layout.slot(slot).start, disk.state(slot));
    }
    for entry in &disk.entries {
        let content = &entry.content;
        println!("entry {} {} {} {}", entry.name, content.release, content.root_hash, content.uki);
    }
    for uki in &disk.ukis {
        println!("uki {uki}");
    }
    println!("state {}", store.layout.state().start);
    for label in disk.labels.into_iter().flatten() {
        let named = disk.entries.iter().find(|entry| Label::of(&entry.content.root_hash) == label);
        let Some(root_hash) = named.map(|entry| &entry.content.root_hash) else { continue };
        let bytes = store.record(root_hash).ok().flatten().unwrap_or_default();
        if let Ok(record) = serde_json::from_slice::<Record>(&bytes) {
            println!("record {root_hash} {}", record.digest());
        }
    }
    Ok(())
}
