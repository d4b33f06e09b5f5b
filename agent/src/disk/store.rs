//! A disk of Kiln's, open: what it holds is read, and the slot state machine's commits are performed.

use super::DiskError;
use super::block::{Block, Part, SECTOR};
use super::fat::{self, Fat};
use super::layout::Layout;
use kiln_protocol::Sha256Hex;
use kiln_protocol::slot::{Action, Content, Disk, Entry, Label, SlotId};
use kiln_release::{VerityParams, hex, verity::Checker};
use ring::digest::{Context, SHA256};
use std::io::{self, Read};
use std::ops::Range;

const ENTRIES: &str = "loader/entries";
const UKIS: &str = "EFI/kiln";
/// The loader, where firmware looks on a disk it knows nothing of (UEFI 2.10 §3.5.1.1), and where its own boot option
/// points.
pub const LOADERS: [&str; 2] = ["EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi"];
/// No menu, no editor, and nothing but Kiln's own entries.
const LOADER_CONF: &str = "timeout 0\neditor no\nauto-entries no\nauto-firmware no\n";
const LOADER_TEXTS: [(&str, &str); 2] = [("loader/loader.conf", LOADER_CONF), ("loader/entries.srel", "type1\n")];
const ESP_NAME: (&str, u32) = ("KILN ESP", 0x6b69_6c6e);
const STATE_NAME: (&str, u32) = ("KILN STATE", 0x6b69_6c6f);
const TEXT_LIMIT: u32 = 4096;
const LOADER_LIMIT: u32 = 4 << 20;
/// Events, on the state partition.
const SPOOL: &str = "spool.json";
const RECORD_LIMIT: u32 = 4 << 20;
/// On the state partition, a line a release: `ROOTHASH ORDER`, where the assignment under which it was last verified whole
/// stands in the loader's order.
const PUT_UP: &str = "put-up";
/// On the state partition: a line of [`Starts`].
const STARTS: &str = "starts";

/// Starts of a good release in a row, none of them healthy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Starts {
    pub count: u32,
    /// Highest sequence of an assignment that was known at the first.
    pub begun: u64,
}

impl Starts {
    /// Of a line `ROOTHASH COUNT SEQUENCE`, if it is about the release with this root hash.
    pub fn of(line: &str, root_hash: &Sha256Hex) -> Option<Self> {
        let mut words = line.split_whitespace();
        words.next().filter(|hash| *hash == root_hash.as_str())?;
        Some(Self { count: words.next()?.parse().ok()?, begun: words.next()?.parse().ok()? })
    }

    /// Such a line.
    pub fn line(self, root_hash: &Sha256Hex) -> String {
        format!("{root_hash} {} {}\n", self.count, self.begun)
    }
}

/// An open disk.
pub struct Store<B: Block> {
    disk: B,
    pub layout: Layout,
    name: String,
    /// The EFI system partition is no file system that can be read, and a release lies in a slot.
    no_esp: bool,
}

impl<B: Block> Store<B> {
    /// Opens a disk; partitions of it that were never finished, or are no file system any more, are made anew. With
    /// `format` its table is written first. An EFI system partition beside a slot that holds a release waits for what is put
    /// there: it may be what firmware has just started from, and without a boot server there would be nothing to put.
    pub fn open(disk: B, layout: Layout, format: bool, name: &str) -> Result<Self, DiskError> {
        let mut store = Self { disk, layout, name: name.to_owned(), no_esp: false };
        if format {
            let created = store.layout.table.create(&mut store.disk);
            created.map_err(|e| store.io("writing the partition table", &e))?;
        }
        let (esp, state) = (store.layout.esp(), store.layout.state());
        let is_empty = SlotId::BOTH.iter().all(|slot| store.layout.label(*slot).is_none());
        store.no_esp = !store.is_fat(&esp)?;
        if store.no_esp && is_empty {
            store.make_esp()?;
        }
        if !store.is_fat(&state)? {
            store.make(&state, STATE_NAME)?;
        }
        Ok(store)
    }

    /// Whether a partition is a file system; what opening it mends is mended.
    fn is_fat(&mut self, range: &Range<u64>) -> Result<bool, DiskError> {
        match Fat::open(Part::new(&mut self.disk, range)).map(drop) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => Ok(false),
            Err(e) => Err(self.io("opening a file system", &e)),
        }
    }

    fn make(&mut self, range: &Range<u64>, (label, serial): (&str, u32)) -> Result<(), DiskError> {
        let made = fat::format(&mut Part::new(&mut self.disk, range), serial, label);
        made.map_err(|e| self.io("making a file system", &e))
    }

    /// Before something is put there.
    fn make_esp(&mut self) -> Result<(), DiskError> {
        if self.no_esp {
            self.make(&self.layout.esp(), ESP_NAME)?;
            self.no_esp = false;
        }
        Ok(())
    }

    /// Whether the EFI system partition waits to be made anew.
    pub fn lacks_esp(&self) -> bool {
        self.no_esp
    }

    pub(super) fn io(&self, what: &'static str, error: &io::Error) -> DiskError {
        DiskError::Io { disk: self.name.clone(), what, reason: error.to_string() }
    }

    fn esp(&mut self) -> Result<Fat<Part<'_, B>>, DiskError> {
        let range = self.layout.esp();
        let name = self.name.clone();
        Fat::open(Part::new(&mut self.disk, &range)).map_err(|e| DiskError::Io {
            disk: name,
            what: "opening the EFI system partition",
            reason: e.to_string(),
        })
    }

    fn state(&mut self) -> Result<Fat<Part<'_, B>>, DiskError> {
        let range = self.layout.state();
        let name = self.name.clone();
        Fat::open(Part::new(&mut self.disk, &range)).map_err(|e| DiskError::Io {
            disk: name,
            what: "opening the state partition",
            reason: e.to_string(),
        })
    }

    /// What the disk holds, as far as it decides what boots. What cannot be read of it is not there, for the loader as well.
    pub fn read(&mut self) -> Result<Disk, DiskError> {
        let labels = SlotId::BOTH.map(|slot| self.layout.label(slot));
        if self.no_esp {
            return Ok(Disk { labels, ..Disk::default() });
        }
        let esp = self.esp()?;
        let read = || -> io::Result<(Vec<Entry>, Vec<Sha256Hex>)> {
            let (mut entries, mut unread) = (Vec::<Entry>::new(), false);
            for node in esp.list(ENTRIES)?.unwrap_or_default() {
                let Ok(name) = node.name.parse() else { continue };
                let Ok(text) = esp.read(&format!("{ENTRIES}/{}", node.name), TEXT_LIMIT) else {
                    unread = true;
                    continue;
                };
                let text = text.unwrap_or_default();
                if let Some(content) = Content::of_entry_text(&String::from_utf8_lossy(&text)) {
                    entries.push(Entry { name, content });
                }
            }
            let files = esp.list(UKIS)?.unwrap_or_default();
            let whole = files.iter().filter(|node| !node.directory && esp.is_whole(node));
            let ukis = whole.filter_map(|node| node.name.to_lowercase().strip_suffix(".efi")?.parse().ok());
            // What such an entry names must not be taken for what none names, and removed.
            let ukis = ukis.filter(|uki| !unread || entries.iter().any(|entry| entry.content.uki == *uki)).collect();
            Ok((entries, ukis))
        };
        let (mut entries, mut ukis) = read().map_err(|e| self.io("reading the EFI system partition", &e))?;
        entries.sort();
        ukis.sort();
        Ok(Disk { labels, entries, ukis })
    }

    /// Performs one commit; `uki` gives the bytes of the UKI that [`Action::PutUki`] names, and how many they are.
    pub fn perform(&mut self, action: &Action, uki: Option<(u64, &mut dyn Read)>) -> Result<(), DiskError> {
        let named = |name: &dyn std::fmt::Display| format!("{ENTRIES}/{name}");
        match action {
            Action::PutUki(content) => self.put_uki(content, uki),
            Action::RemoveUki(uki) => {
                let removed = self.esp()?.remove(&format!("{UKIS}/{uki}.efi"));
                removed.map_err(|e| self.io("removing a UKI", &e))
            }
            Action::PutEntry(name, content) => {
                self.make_esp()?;
                let text = content.entry_text(name.sequence);
                let put = self.esp()?.write(&named(name), text.len() as u64, &mut text.as_bytes());
                put.map_err(|e| self.io("writing a boot entry", &e))
            }
            Action::RenameEntry { from, to } => {
                let renamed = self.esp()?.rename(ENTRIES, &from.to_string(), &to.to_string());
                renamed.map_err(|e| self.io("renaming a boot entry", &e))
            }
            Action::RemoveEntry(name) => {
                let removed = self.esp()?.remove(&named(name));
                removed.map_err(|e| self.io("removing a boot entry", &e))
            }
            Action::Unlabel(slot) => self.set_label(*slot, None),
            Action::Label(slot, content) => self.set_label(*slot, Some(Label::of(&content.root_hash))),
            Action::Fetch(..) | Action::Verify(..) | Action::Leave(_) | Action::Tell(_) | Action::Refuse(_) => Ok(()),
        }
    }

    fn set_label(&mut self, slot: SlotId, label: Option<Label>) -> Result<(), DiskError> {
        let set = self.layout.set_label(&mut self.disk, slot, label);
        set.map_err(|e| self.io("writing the partition table", &e))
    }

    fn put_uki(&mut self, content: &Content, uki: Option<(u64, &mut dyn Read)>) -> Result<(), DiskError> {
        let path = format!("{UKIS}/{}", content.uki_name());
        let missing = io::Error::other("its bytes are not at hand");
        let (length, from) = uki.ok_or_else(|| self.io("writing a UKI", &missing))?;
        self.make_esp()?;
        let written = self.esp()?.write(&path, length, from);
        written.map_err(|e| self.io("writing a UKI", &e))?;
        let got = self.uki_hash(content)?;
        if got == content.uki.as_str() {
            return Ok(());
        }
        let removed = self.esp()?.remove(&path);
        removed.map_err(|e| self.io("removing a UKI", &e))?;
        Err(DiskError::ReadBack { disk: self.name.clone(), reason: format!("UKI {got} instead of {}", content.uki) })
    }

    /// SHA-256 of what lies on the disk as a release's UKI.
    pub fn uki_hash(&mut self, content: &Content) -> Result<String, DiskError> {
        self.disk.forget();
        let mut hash = Context::new(&SHA256);
        let read = self.esp()?.read_with(&format!("{UKIS}/{}", content.uki_name()), u32::MAX, &mut |piece| {
            hash.update(piece);
            Ok(())
        });
        read.map_err(|e| self.io("reading a UKI back", &e))?;
        Ok(hex::encode(hash.finish().as_ref()))
    }

    /// Releases that the loader knows, whose UKI is not what its name says, or cannot be read.
    pub fn wrong_ukis(&mut self) -> Result<Vec<Content>, DiskError> {
        let entries = self.read()?.entries.into_iter();
        let mut listed: Vec<Content> = entries.filter(|e| e.name.is_listed()).map(|e| e.content).collect();
        listed.sort();
        listed.dedup();
        listed.retain(|content| !self.uki_hash(content).is_ok_and(|hash| hash == content.uki.as_str()));
        Ok(listed)
    }

    /// Puts the boot loader where firmware looks for it, if it is not there yet.
    pub fn install_loader(&mut self, loader: &[u8]) -> Result<(), DiskError> {
        let install = |esp: &mut Fat<Part<'_, B>>| -> io::Result<()> {
            let files = LOADERS.map(|path| (path, loader));
            // The settings first: a loader that finds neither them nor an entry goes into the firmware's setup and stays
            // there; with them it ends, and the firmware goes on to the network.
            for (path, bytes) in LOADER_TEXTS.map(|(path, text)| (path, text.as_bytes())).into_iter().chain(files) {
                let there = esp.read(path, LOADER_LIMIT).ok().flatten();
                if there.as_deref() != Some(bytes) {
                    let mut from = bytes;
                    esp.write(path, bytes.len() as u64, &mut from)?;
                }
            }
            Ok(())
        };
        self.make_esp()?;
        let installed = install(&mut self.esp()?);
        installed.map_err(|e| self.io("installing the boot loader", &e))
    }

    /// Whether the loader and its settings are there, whichever they are.
    pub fn has_loader(&mut self) -> Result<bool, DiskError> {
        let look = |esp: &Fat<Part<'_, B>>| -> io::Result<bool> {
            for path in LOADERS.into_iter().chain(LOADER_TEXTS.map(|(path, _)| path)) {
                if esp.read(path, LOADER_LIMIT)?.is_none() {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        let there = look(&self.esp()?);
        there.map_err(|e| self.io("looking for the boot loader", &e))
    }

    /// The loader's files that are there. One that cannot be read is empty.
    pub fn loaders(&mut self) -> Result<Vec<(&'static str, Vec<u8>)>, DiskError> {
        let esp = self.esp()?;
        let read = |path| Some((path, esp.read(path, LOADER_LIMIT).unwrap_or(Some(Vec::new()))?));
        Ok(LOADERS.into_iter().filter_map(read).collect())
    }

    /// Of the loader's files and its settings those that are not as they would be with this loader, or cannot be read.
    pub fn wrong_loader_files(&mut self, loader: &[u8]) -> Result<Vec<&'static str>, DiskError> {
        self.disk.forget();
        let esp = self.esp()?;
        let texts = LOADER_TEXTS.map(|(path, text)| (path, text.as_bytes()));
        let files = texts.into_iter().chain(LOADERS.map(|path| (path, loader)));
        let is_wrong = |(path, bytes): &(&'static str, &[u8])| {
            esp.read(path, LOADER_LIMIT).ok().flatten().as_deref() != Some(*bytes)
        };
        Ok(files.filter(is_wrong).map(|(path, _)| path).collect())
    }

    /// What was kept for the release with this root hash.
    pub fn record(&mut self, root_hash: &Sha256Hex) -> Result<Option<Vec<u8>>, DiskError> {
        let read = self.state()?.read(&record_name(root_hash), RECORD_LIMIT);
        read.map_err(|e| self.io("reading the state partition", &e))
    }

    /// Keeps it, and forgets what belongs to neither a slot nor an entry nor this release.
    pub fn keep_record(&mut self, root_hash: &Sha256Hex, bytes: &[u8]) -> Result<(), DiskError> {
        let disk = self.read()?;
        let mut wanted: Vec<Label> = disk.labels.into_iter().flatten().collect();
        wanted.push(Label::of(root_hash));
        let wanted: Vec<String> = wanted.iter().map(|label| format!("{}.json", hex::encode(&label.0))).collect();
        let keep = |state: &mut Fat<Part<'_, B>>| -> io::Result<()> {
            for node in state.list("")?.unwrap_or_default() {
                let kept = [STARTS, SPOOL, PUT_UP].iter().any(|name| name.eq_ignore_ascii_case(&node.name));
                if !node.directory && !kept && !wanted.iter().any(|name| name.eq_ignore_ascii_case(&node.name)) {
                    state.remove(&node.name)?;
                }
            }
            let name = record_name(root_hash);
            if state.read(&name, RECORD_LIMIT).ok().flatten().as_deref() == Some(bytes) {
                return Ok(());
            }
            let mut from = bytes;
            state.write(&name, bytes.len() as u64, &mut from)
        };
        let kept = keep(&mut self.state()?);
        kept.map_err(|e| self.io("writing the state partition", &e))
    }

    /// Under which assignment the release with this root hash was last verified whole here; 0 where that is not known.
    pub fn put_up(&mut self, root_hash: &Sha256Hex) -> Result<u64, DiskError> {
        let known = self.all_put_up()?;
        Ok(known.iter().find(|(hash, _)| hash == root_hash.as_str()).map_or(0, |(_, order)| *order))
    }

    fn all_put_up(&mut self) -> Result<Vec<(String, u64)>, DiskError> {
        let read = self.state()?.read(PUT_UP, TEXT_LIMIT);
        let text = read.map_err(|e| self.io("reading the state partition", &e))?.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let line = |line: &str| {
            let (hash, order) = line.split_once(' ')?;
            Some((hash.to_owned(), order.trim().parse().ok()?))
        };
        Ok(text.lines().filter_map(line).collect())
    }

    /// Keeps it, and those of a few releases before.
    pub fn keep_put_up(&mut self, root_hash: &Sha256Hex, order: u64) -> Result<(), DiskError> {
        // What cannot be read costs a reading back, and not what is written in its place.
        let others = self.all_put_up().unwrap_or_default().into_iter().filter(|(hash, _)| hash != root_hash.as_str());
        let all = std::iter::once((root_hash.to_string(), order)).chain(others).take(4);
        let lines: Vec<String> = all.map(|(hash, order)| format!("{hash} {order}\n")).collect();
        let text = lines.concat();
        let done = self.state()?.write(PUT_UP, text.len() as u64, &mut text.as_bytes());
        done.map_err(|e| self.io("writing the state partition", &e))
    }

    /// What was counted of the release with this root hash.
    pub fn starts(&mut self, root_hash: &Sha256Hex) -> Result<Starts, DiskError> {
        let read = self.state()?.read(STARTS, TEXT_LIMIT);
        let text = read.map_err(|e| self.io("reading the state partition", &e))?.unwrap_or_default();
        Ok(Starts::of(&String::from_utf8_lossy(&text), root_hash).unwrap_or_default())
    }

    /// Keeps it, or forgets it; writes nothing that is so already.
    pub fn keep_starts(&mut self, root_hash: &Sha256Hex, starts: Option<Starts>) -> Result<(), DiskError> {
        let done = match starts {
            Some(starts) => {
                let text = starts.line(root_hash);
                self.state()?.write(STARTS, text.len() as u64, &mut text.as_bytes())
            }
            None => self.state()?.remove(STARTS),
        };
        done.map_err(|e| self.io("writing the state partition", &e))
    }

    /// The events that were kept.
    pub fn spool(&mut self) -> Result<Option<Vec<u8>>, DiskError> {
        let read = self.state()?.read(SPOOL, RECORD_LIMIT);
        read.map_err(|e| self.io("reading the state partition", &e))
    }

    /// Keeps events.
    pub fn keep_spool(&mut self, mut bytes: &[u8]) -> Result<(), DiskError> {
        let written = self.state()?.write(SPOOL, bytes.len() as u64, &mut bytes);
        written.map_err(|e| self.io("writing the state partition", &e))
    }

    /// Flushes a slot, reads it back from `from`, which holds nothing in a cache, and recomputes its root.
    pub fn verify_slot(
        &mut self,
        slot: SlotId,
        params: &VerityParams,
        length: u64,
        read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), DiskError> {
        let flushed = self.disk.flush();
        flushed.map_err(|e| self.io("flushing a slot", &e))?;
        let range = self.layout.slot(slot);
        self.fits(slot, length)?;
        let bad = |reason: String| DiskError::ReadBack { disk: self.name.clone(), reason };
        let mut checker = Checker::new(params).map_err(|e| bad(e.to_string()))?;
        // Aligned for reading past the page cache.
        let mut memory = vec![0; (256 << 10) + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        let buffer = &mut memory[skip..skip + (256 << 10)];
        let mut at = 0;
        while at < length {
            let piece = usize::try_from((length - at).min(buffer.len() as u64)).expect("at most 256 KiB");
            let whole = piece.next_multiple_of(SECTOR * 8);
            read(range.start + at, &mut buffer[..whole]).map_err(|e| self.io("reading a slot back", &e))?;
            checker.push(&buffer[..piece]).map_err(|e| bad(e.to_string()))?;
            at += piece as u64;
        }
        checker.finish().map_err(|e| bad(e.to_string()))
    }

    /// Whether a root artifact of this length has room.
    pub fn fits(&self, slot: SlotId, length: u64) -> Result<(), DiskError> {
        let range = self.layout.slot(slot);
        let size = range.end - range.start;
        if length <= size { Ok(()) } else { Err(DiskError::SlotTooSmall { disk: self.name.clone(), size, length }) }
    }

    pub fn disk(&self) -> &B {
        &self.disk
    }

    #[cfg(test)]
    pub fn disk_mut(&mut self) -> &mut B {
        &mut self.disk
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

fn record_name(root_hash: &Sha256Hex) -> String {
    format!("{}.json", hex::encode(&Label::of(root_hash).0))
}
