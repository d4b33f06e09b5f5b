//! This machine's disk: the one that is Kiln's, or becomes it, and the slot state machine on it.

mod starts;
#[cfg(test)]
mod trial;

pub use starts::{STARTS, SUSPECT};

use super::block::Block;
use super::device::Device;
use super::layout::{Choice, Found, Layout, choose, look};
use super::loader::{self, LOADER, LoaderHold};
use super::record::Record;
use super::search::{self, BLOCKS};
use super::store::{Starts, Store};
use super::worker::{self, COMMIT, Worker};
use super::{DiskError, boot_order};
use crate::error::{AgentError, Result};
use crate::fetch::Put;
use crate::memory::{Place, random};
use crate::sys;
use kiln_protocol::slot::{Action, Content, Entry, EntryKind, Event, Go, Label, SlotId, Slots};
use kiln_protocol::{ReleaseId, Sha256Hex, Via};
use kiln_release::{BootInfo, DiskSettings, Manifest};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// What is said of a commit that gets no answer.
const COMMITTING: &str = "working on it";
/// What a slot is flushed after, bytes: nothing that comes later waits long for what was written before.
const FLUSH: u64 = 16 << 20;

/// The disk, for whoever works on it beside the runtime.
#[derive(Clone)]
pub struct SharedDisk {
    worker: Worker<MachineDisk>,
    /// Its slots, as whoever had the last turn left them.
    slots: Arc<Mutex<Slots>>,
    /// As long as this is open, nothing else that closes the disk has to wait for it.
    file: Option<Arc<File>>,
    /// The EFI system partition could not be read when the disk was opened.
    lacks_esp: bool,
}

impl SharedDisk {
    pub fn new(disk: MachineDisk) -> Self {
        let slots = Arc::new(Mutex::new(disk.slots.clone()));
        let file = disk.store.disk().file().try_clone().ok().map(Arc::new);
        let (name, lacks_esp) = (disk.name().to_owned(), disk.store.lacks_esp());
        Self { worker: Worker::new(&name, disk), slots, file, lacks_esp }
    }

    /// The disk, open.
    pub fn file(&self) -> Option<&File> {
        self.file.as_deref()
    }

    /// `vda`, `nvme0n1`.
    pub fn name(&self) -> &str {
        self.worker.name()
    }

    /// Whether it owes an answer.
    pub fn hangs(&self) -> bool {
        self.worker.hangs()
    }

    /// Its slots, as they are known. Waits for no disk.
    pub fn slots(&self) -> Slots {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the EFI system partition could not be read when the disk was opened.
    pub fn lacks_esp(&self) -> bool {
        self.lacks_esp
    }

    /// The slot that holds the release with this root hash, where no entry could be read: its loader may know it all the same.
    pub fn unlisted(&self, root_hash: &Sha256Hex) -> Option<SlotId> {
        self.slots().disk.slot_of(root_hash).filter(|_| self.lacks_esp)
    }

    /// For the console: the disk and what its slots hold.
    pub fn describe(&self) -> String {
        let disk = self.slots().disk;
        let slots = SlotId::BOTH.map(|slot| {
            let release = disk.entries_of(slot).next().map_or("-".to_owned(), |e| e.content.release.to_string());
            format!("{slot:?} {:?} {release}", disk.state(slot))
        });
        format!("{}: {}", self.name(), slots.join(", "))
    }
}

/// Makes a commit on it beside the runtime: a disk may be slow, or hang. Late is [`DiskError::Late`].
pub async fn on_disk<T: Send + 'static>(
    disk: &SharedDisk,
    work: impl FnOnce(&mut MachineDisk) -> Result<T> + Send + 'static,
) -> Result<T> {
    on_disk_within(disk, COMMITTING, COMMIT, work).await
}

/// The same with what is said of a disk that gives no answer, and when.
pub async fn on_disk_within<T: Send + 'static>(
    disk: &SharedDisk,
    what: &'static str,
    patience: Duration,
    work: impl FnOnce(&mut MachineDisk) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (slots, (tell, mut told)) = (Arc::clone(&disk.slots), oneshot::channel());
    // Of one type: the machinery is compiled once.
    let work: Box<dyn FnOnce(&mut MachineDisk) + Send> = Box::new(move |disk| {
        let done = work(disk);
        slots.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&disk.slots);
        // Nobody listens to what comes late.
        let _ = tell.send(done);
    });
    disk.worker.run(what, patience, work).await?;
    told.try_recv().expect("work that has ended has told what it did")
}

/// For work that reads a slot back whole.
pub async fn read_slot<T: Send + 'static>(
    disk: &SharedDisk,
    length: u64,
    work: impl FnOnce(&mut MachineDisk) -> Result<T> + Send + 'static,
) -> Result<T> {
    on_disk_within(disk, "reading a slot back", worker::patience(length), work).await
}

/// Where a root artifact of this length goes.
pub async fn place(disk: &SharedDisk, slot: SlotId, length: u64) -> Result<Put> {
    on_disk(disk, move |disk| Ok(disk.store.fits(slot, length)?)).await?;
    let disk = disk.clone();
    let put: Put = Box::new(move |at, bytes| {
        let disk = disk.clone();
        let write = move |disk: &mut MachineDisk| disk.write_slot(slot, at, &bytes);
        Box::pin(async move { on_disk_within(&disk, "writing a slot", COMMIT, write).await })
    });
    Ok(put)
}

/// Whether the loader can start the release with this root hash from these slots: it lies in one, and an entry names it.
pub fn boots(slots: &Slots, root_hash: &Sha256Hex) -> bool {
    let disk = &slots.disk;
    disk.slot_of(root_hash).is_some_and(|slot| {
        disk.entries_of(slot).any(|entry| matches!(entry.name.kind, EntryKind::Trial(_) | EntryKind::Good))
    })
}

/// The good release in the slot beside the one that holds this root hash.
pub fn good_beside(slots: &Slots, root_hash: &Sha256Hex) -> Option<(SlotId, Content)> {
    let disk = &slots.disk;
    let other = disk.slot_of(root_hash)?.other();
    let good = |entry: &&Entry| entry.name.kind == EntryKind::Good && !slots.is_below(&entry.content.release);
    let newest = disk.entries_of(other).filter(good).max_by_key(|entry| entry.name.sequence)?;
    disk.is_good(other).then(|| (other, newest.content.clone()))
}

/// The disk that is used, open.
pub struct MachineDisk {
    store: Store<Device>,
    slots: Slots,
    /// What is written as `starts` when this start comes to the hand-over.
    starts: Option<(Sha256Hex, Starts)>,
    /// Where starts are counted that the disk does not take.
    beside: Option<Place>,
}

fn settings(boot: &BootInfo) -> DiskSettings {
    boot.site.disk.clone().unwrap_or_default()
}

/// The release that this boot image embeds, as a slot holds it.
pub fn content(manifest: &Manifest) -> Result<Content> {
    let bad = |e: kiln_protocol::IdError| AgentError::Format { path: "manifest.json".into(), reason: e.to_string() };
    Ok(Content {
        release: ReleaseId { image: manifest.image.parse().map_err(bad)?, release: manifest.release },
        root_hash: manifest.verity.root_hash.parse().map_err(bad)?,
        uki: manifest.uki.sha256.parse().map_err(bad)?,
    })
}

/// Whether what was read back is not what was written, rather than not to be read.
fn is_other(error: &AgentError) -> bool {
    matches!(error, AgentError::Disk(DiskError::ReadBack { .. }))
}

impl MachineDisk {
    /// Finds the machine's disk, partitions it where that is allowed, and reads it. Whatever the disks do, it ends within
    /// the time that [`search`] gives them, and the runtime goes on meanwhile. With it come the disks beside it that failed, or
    /// gave no answer.
    pub async fn find(boot: &BootInfo, floors: Vec<ReleaseId>) -> Result<(Self, Vec<DiskError>)> {
        let wanted: Option<Sha256Hex> = boot.root_hash.parse().ok();
        let site = &boot.site.name;
        let disks = search::candidates(site).await;
        let broken = search::broken(&disks);
        let (name, layout, format) = match choose(disks, &settings(boot), site, wanted.as_ref().map(Label::of))? {
            Choice::Use(name, layout) => (name, layout, false),
            Choice::Format(name, mut layout) => {
                layout.name_esp(&random()?);
                println!("kiln-agent: {name} is partitioned: loader, two slots, state");
                (name, layout, true)
            }
        };
        let disk = name.clone();
        // Given up, its thread may still write, until the release starts and ends it: an empty table and empty file systems, onto
        // the disk that the signed settings gave it. Cut there it is a blank disk again, or one with empty slots.
        let open = move || Self::open(&disk, layout, format, floors);
        Ok((search::in_time(&name, search::OPENING, search::OPENS, open).await??, broken))
    }

    /// Opens the disk that the initramfs chose.
    pub fn reopen(name: &str, boot: &BootInfo, floors: Vec<ReleaseId>) -> Result<Self> {
        let device = Device::open(&Path::new("/dev").join(name))?;
        match look(&device, &boot.site.name).map_err(AgentError::file(device.path()))? {
            Found::Ours(layout) => Self::open(name, layout, false, floors),
            Found::Blank | Found::Foreign(_) => {
                Err(DiskError::Foreign { disk: name.to_owned(), what: "another table than at boot" }.into())
            }
        }
    }

    fn open(name: &str, layout: Layout, format: bool, floors: Vec<ReleaseId>) -> Result<Self> {
        let device = Device::open(&Path::new("/dev").join(name))?;
        let mut store = Store::open(device, layout, format, name)?;
        if format {
            sys::reread_partitions(store.disk().file())
                .map_err(AgentError::system(format!("making the kernel read {name}'s table")))?;
        }
        if store.lacks_esp() {
            println!(
                "kiln-agent: {name}: the EFI system partition cannot be read: it is made anew by what a boot server says"
            );
        }
        let disk = store.read()?;
        Ok(Self { store, slots: Slots::new(disk, floors), starts: None, beside: None })
    }

    /// `vda`, `nvme0n1`.
    pub fn name(&self) -> &str {
        self.store.name()
    }

    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Performs what an event asks for; `uki` is the file of the UKI that is put in place. Gives back what is no
    /// commit. When a commit fails, the disk is read anew: what is there counts, not what was meant.
    pub fn event(&mut self, event: Event, uki: Option<&Path>) -> Result<Vec<Action>> {
        let (slots, actions) = self.slots.clone().event(event);
        for action in &actions {
            self.commit_or_read(action, uki)?;
        }
        self.slots = slots;
        let mut rest = Vec::new();
        for action in actions {
            match action {
                Action::Refuse(refusal) => return Err(DiskError::Refused(refusal).into()),
                Action::Fetch(..) | Action::Verify(..) | Action::Leave(_) | Action::Tell(_) => rest.push(action),
                Action::PutUki(_)
                | Action::RemoveUki(_)
                | Action::PutEntry(..)
                | Action::RenameEntry { .. }
                | Action::RemoveEntry(_)
                | Action::Unlabel(_)
                | Action::Label(..) => {}
            }
        }
        Ok(rest)
    }

    fn commit_or_read(&mut self, action: &Action, uki: Option<&Path>) -> Result<()> {
        if let Err(error) = self.commit(action, uki) {
            let disk = self.store.read()?;
            self.slots = Slots { disk, install: None, ..self.slots.clone() };
            return Err(error);
        }
        Ok(())
    }

    fn commit(&mut self, action: &Action, uki: Option<&Path>) -> Result<()> {
        let mut source = None;
        if let (Action::PutUki(_), Some(path)) = (action, uki) {
            let file = File::open(path).map_err(AgentError::file(path))?;
            source = Some((file.metadata().map_err(AgentError::file(path))?.len(), file));
        }
        let uki = source.as_mut().map(|(length, file)| (*length, file as &mut dyn Read));
        Ok(self.store.perform(action, uki)?)
    }

    /// Writes bytes of a root artifact, from its byte `at` on. What is left of them in memory is little.
    fn write_slot(&self, slot: SlotId, at: u64, bytes: &[u8]) -> Result<()> {
        let (start, end) = (self.store.layout.slot(slot).start, at + bytes.len() as u64);
        let file = self.store.disk().file();
        let flush = || if at / FLUSH == end / FLUSH { Ok(()) } else { sys::flush(file) };
        let written = file.write_all_at(bytes, start + at).and_then(|()| flush());
        Ok(written.map_err(|e| self.store.io("writing a slot", &e))?)
    }

    /// Reads a slot back from the disk itself, and recomputes its root.
    pub fn verify(&mut self, slot: SlotId, manifest: &Manifest) -> Result<()> {
        let uncached = self.store.disk().uncached()?;
        let mut read = |at: u64, bytes: &mut [u8]| uncached.read_exact_at(bytes, at);
        // What was written through the page cache is flushed first; then it is read past it.
        self.store.disk().forget();
        Ok(self.store.verify_slot(slot, &manifest.verity, manifest.root.length, &mut read)?)
    }

    /// Where the data partition is, in bytes.
    pub fn data(&self) -> Option<std::ops::Range<u64>> {
        self.store.layout.data()
    }

    /// The kernel's device of a slot.
    pub fn device(&self, slot: SlotId) -> Result<PathBuf> {
        self.partition(self.store.layout.slot(slot).start)
    }

    /// The kernel's device of the partition that begins at this byte.
    pub fn partition(&self, start: u64) -> Result<PathBuf> {
        let start = start / 512;
        let folder = Path::new(BLOCKS).join(self.name());
        let entries = std::fs::read_dir(&folder).map_err(AgentError::file(&folder))?;
        for entry in entries.flatten() {
            let text = std::fs::read_to_string(entry.path().join("start")).unwrap_or_default();
            if text.trim().parse() == Ok(start) {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
        }
        let reason = format!("the kernel shows no partition that begins at sector {start}");
        Err(AgentError::Format { path: folder, reason })
    }

    /// The loader onto the disk, and the disk into the firmware's boot order. Firmware that takes no boot option still
    /// finds the loader where it looks last.
    pub fn install_loader(&mut self, network_first: bool) -> Result<()> {
        let loader = std::fs::read(LOADER).map_err(AgentError::file(LOADER))?;
        self.store.install_loader(&loader)?;
        if let Err(error) = self.order_boot(network_first) {
            println!("kiln-agent: the disk cannot be put into its place in the firmware's boot order: {error}");
        }
        Ok(())
    }

    /// The loader where an install was cut before it: its entry is there, so that no other install follows. A loader that is
    /// there stays as it is.
    pub fn mend_loader(&mut self, network_first: bool) {
        let mended = match self.store.has_loader() {
            Ok(true) => Ok(()),
            Ok(false) => self.install_loader(network_first),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = mended {
            println!(
                "kiln-agent: the boot loader is not on the disk, which starts nothing without the network: {error}"
            );
        }
    }

    /// [`loader::renew`] by the loader that the initramfs left.
    pub fn renew_loader(&mut self, revoked: &BTreeSet<String>, good: bool) -> Result<Option<LoaderHold>> {
        let own = std::fs::read(loader::KEPT).ok();
        Ok(loader::renew(&mut self.store, revoked, good, own.as_deref())?)
    }

    /// [`loader::put_right`]; by the loader that the initramfs left, once the release that runs is good.
    pub fn put_loader_right(&mut self, runs: &ReleaseId, revoked: &BTreeSet<String>) -> Result<Vec<&'static str>> {
        let is_good = self.slots.disk.newest_good().as_ref() == Some(runs);
        let own = std::fs::read(loader::KEPT).ok().filter(|_| is_good);
        Ok(loader::put_right(&mut self.store, own.as_deref(), revoked)?)
    }

    /// [`Store::wrong_ukis`].
    pub fn wrong_ukis(&mut self) -> Result<Vec<Content>> {
        Ok(self.store.wrong_ukis()?)
    }

    /// The disk's place in the firmware's boot order.
    pub fn order_boot(&self, network_first: bool) -> Result<()> {
        if boot_order::put(self.store.layout.esp_address(), network_first)? {
            let first = if network_first { "the network comes before the disk" } else { "the disk comes first" };
            eprintln!("kiln-agent: at the next start {first}");
        }
        Ok(())
    }

    /// After a slot was written, or found to hold the release: reads it back, keeps the signed metadata, puts UKI and
    /// entry in place. Says how the release will be gone to.
    pub fn finish_install(&mut self, slot: SlotId, manifest: &Manifest, record: &Record, uki: &Path) -> Result<Via> {
        if let Err(error) = self.verify(slot, manifest) {
            // Without another that is good, what only cannot be read stays.
            let spoilt = is_other(&error) || self.slots.disk.is_good(slot.other());
            self.event(if spoilt { Event::Spoilt(slot) } else { Event::Unread(slot) }, None)?;
            return Err(error);
        }
        self.event(Event::Fetched, Some(uki))?;
        self.keep_record(&content(manifest)?.root_hash, record)?;
        Ok(match self.slots.install.as_ref().map(|install| install.go) {
            Some(Go::Leave(via) | Go::Here(via)) => via,
            None => Via::Cold,
        })
    }

    /// What runs from here, by [`Self::is_whole`]: the next boot fetches a root anew that is not.
    pub fn look_whole(&mut self, manifest: &Manifest) -> Result<bool> {
        let content = content(manifest)?;
        let runs = self.slots.running.as_ref().map(|running| running.slot);
        let slot = runs.filter(|slot| self.slots.disk.slot_of(&content.root_hash) == Some(*slot));
        self.is_whole(slot.ok_or(AgentError::Superseded)?, manifest)
    }

    /// A slot's release is read back whole: its root, and its UKI. Whether the UKI is as it was signed. A root that is not ends
    /// with an error, and its slot is spoilt; one that cannot be read ends with an error alone.
    pub fn is_whole(&mut self, slot: SlotId, manifest: &Manifest) -> Result<bool> {
        let content = content(manifest)?;
        if let Err(error) = self.verify(slot, manifest) {
            if is_other(&error) {
                self.event(Event::Spoilt(slot), None)?;
            }
            return Err(error);
        }
        Ok(self.store.uki_hash(&content).is_ok_and(|hash| hash == content.uki.as_str()))
    }

    /// Puts a UKI in place of the same that is not as it was signed any more. Superseded is one whose release was swept meanwhile:
    /// nothing would remove it again.
    pub fn mend_uki(&mut self, manifest: &Manifest, uki: &Path) -> Result<()> {
        let content = content(manifest)?;
        if !self.slots.disk.entries.iter().any(|entry| entry.name.is_listed() && entry.content == content) {
            return Err(AgentError::Superseded);
        }
        let put = Action::PutUki(content);
        self.commit_or_read(&put, Some(uki))?;
        // It may have been gone.
        self.slots.disk.apply(&put);
        Ok(())
    }

    /// [`Store::put_up`]. A disk that does not say is read back once more than it had to be.
    pub fn put_up(&mut self, root_hash: &Sha256Hex) -> u64 {
        self.store.put_up(root_hash).unwrap_or(0)
    }

    pub fn keep_put_up(&mut self, root_hash: &Sha256Hex, order: u64) -> Result<()> {
        Ok(self.store.keep_put_up(root_hash, order)?)
    }

    pub fn record(&mut self, root_hash: &Sha256Hex) -> Result<Record> {
        let bad = |reason: String| AgentError::Format { path: "the state partition".into(), reason };
        let bytes = self.store.record(root_hash)?.ok_or_else(|| bad(format!("nothing is kept of {root_hash}")))?;
        serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))
    }

    /// The events that an earlier boot kept.
    pub fn spool(&mut self) -> Result<Option<Vec<u8>>> {
        Ok(self.store.spool()?)
    }

    pub fn keep_spool(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.store.keep_spool(bytes)?)
    }

    pub fn keep_record(&mut self, root_hash: &Sha256Hex, record: &Record) -> Result<()> {
        let bytes = serde_json::to_vec(record).expect("a map of strings always becomes JSON");
        Ok(self.store.keep_record(root_hash, &bytes)?)
    }
}
