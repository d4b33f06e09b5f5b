//! Where the spool of events lies: a file in /run, so that a service that is started again goes on with it; in disk mode
//! also on the state partition, so that it outlives a restart. What it means is [`kiln_protocol::Spool`].

use crate::disk::machine::{MachineDisk, SharedDisk, on_disk};
use crate::journal::{boot_id, monotonic_ms};
use crate::memory::random;
use jiff::Timestamp;
use kiln_protocol::{Clocks, Spool, SpoolReport};
use kiln_release::hex;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::task::JoinHandle;

/// In memory, over starts of the service.
pub const PLACE: &str = "/run/kiln/spool.json";

/// The spool and its file.
pub struct Keeper {
    spool: RefCell<Spool>,
    boot_id: String,
    file: Option<PathBuf>,
    disk: Option<SharedDisk>,
    /// The disk does not have the newest.
    behind: Arc<AtomicBool>,
    /// It did not take them, and that was said.
    refused: Arc<AtomicBool>,
}

impl Keeper {
    /// What an earlier start, or an earlier boot, kept; else an empty one.
    pub async fn open_on(file: &Path, disk: Option<SharedDisk>) -> Self {
        let of_disk = match &disk {
            Some(disk) => on_disk(disk, MachineDisk::spool).await.ok().flatten(),
            None => None,
        };
        Self { disk, ..Self::open(Some(file), of_disk) }
    }

    /// The same without a disk, with what one gave. Without a file it lives as long as this value.
    pub fn open(file: Option<&Path>, of_disk: Option<Vec<u8>>) -> Self {
        let of_file = file.and_then(|path| std::fs::read(path).ok());
        let read = |bytes: Vec<u8>| serde_json::from_slice::<Spool>(&bytes).ok();
        let name = random().map_or_else(|_| monotonic_ms().to_string(), |bytes| hex::encode(&bytes[..8]));
        let spool = match (of_file.and_then(read), of_disk.and_then(read)) {
            // Of this boot, written at every event.
            (Some(spool), _) => spool,
            (None, Some(old)) => old.taken_up(name),
            (None, None) => Spool::new(name),
        };
        Self {
            spool: RefCell::new(spool),
            boot_id: boot_id().unwrap_or_default(),
            file: file.map(Path::to_owned),
            disk: None,
            behind: Arc::default(),
            refused: Arc::default(),
        }
    }

    fn clocks(&self) -> Clocks {
        let unix_ms = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0);
        Clocks { boot_id: self.boot_id.clone(), mono_ms: monotonic_ms(), unix_ms }
    }

    /// Takes an event in; it is also said on the console.
    pub fn note(&self, kind: &str, alarm: bool, text: &str) {
        eprintln!("kiln-agent: {kind}: {text}");
        self.spool.borrow_mut().note(&self.clocks(), kind, alarm, text);
        self.save();
    }

    pub fn report(&self) -> SpoolReport {
        self.spool.borrow_mut().report(&self.clocks())
    }

    /// Events that no reply has confirmed.
    pub fn kept(&self) -> usize {
        self.spool.borrow().len()
    }

    /// Whether more waits.
    pub fn answered(&self) -> bool {
        let confirmed = self.spool.borrow_mut().answered();
        if confirmed {
            self.save();
        }
        confirmed && !self.spool.borrow().is_empty()
    }

    /// The disk is behind; written by [`Self::flush`], not at every event: flash wears.
    fn save(&self) {
        self.behind.store(true, Ordering::Relaxed);
        let Some(file) = &self.file else { return };
        let new = file.with_extension("new");
        let written = std::fs::write(&new, self.bytes()).and_then(|()| std::fs::rename(&new, file));
        if let Err(error) = written {
            eprintln!("kiln-agent: {}: {error}", file.display());
        }
    }

    fn bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&*self.spool.borrow()).expect("plain structs always become JSON")
    }

    /// Brings the disk up to date, beside everything else: a disk that hangs holds nothing up. What it does not take is
    /// tried with the next.
    pub fn flush(&self) -> Option<JoinHandle<()>> {
        let disk = self.disk.clone()?;
        if !self.behind.swap(false, Ordering::Relaxed) {
            return None;
        }
        let (bytes, behind, refused) = (self.bytes(), Arc::clone(&self.behind), Arc::clone(&self.refused));
        Some(tokio::spawn(async move {
            let kept = on_disk(&disk, move |disk| disk.keep_spool(&bytes)).await;
            let said = refused.swap(kept.is_err(), Ordering::Relaxed);
            if let Err(error) = kept {
                behind.store(true, Ordering::Relaxed);
                if !said {
                    eprintln!("kiln-agent: events cannot be kept on the disk: {error}");
                }
            }
        }))
    }
}
