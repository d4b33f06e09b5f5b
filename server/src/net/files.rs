//! The files TFTP serves, each held once in memory however many clients download it.

use bytes::Bytes;
use kiln_netboot::tftp::BootFile;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

/// A file larger than this is no boot program.
const MAX_FILE: u64 = 512 << 20;

/// Tells whether a file changed since it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Its length.
    pub length: u64,
    /// When it was last written.
    pub modified: SystemTime,
}

/// Where boot files come from. Both calls may block.
pub trait BootFiles: Send + Sync + 'static {
    /// Whether it is there, and which version.
    fn stamp(&self, file: &BootFile) -> io::Result<Stamp>;
    /// All of it.
    fn read(&self, file: &BootFile) -> io::Result<Vec<u8>>;
}

/// A site directory's `repo/` and the host's iPXE programs.
#[derive(Debug, Clone)]
pub struct SiteFiles {
    /// `DIR/repo`.
    pub repo: PathBuf,
    /// undionly.kpxe.
    pub undionly: PathBuf,
    /// snponly.efi.
    pub snponly: PathBuf,
    /// shimx64.efi.
    pub shim: PathBuf,
}

impl SiteFiles {
    fn path(&self, file: &BootFile) -> PathBuf {
        match file {
            // The name holds nothing but a hash: it cannot lead out of repo/.
            BootFile::Uki(_) => self.repo.join(file.path()),
            BootFile::Undionly => self.undionly.clone(),
            BootFile::Snponly | BootFile::AfterShim => self.snponly.clone(),
            BootFile::Shim => self.shim.clone(),
            // No file: `tftp` makes it for the address that it is asked at.
            BootFile::Autoexec => PathBuf::new(),
        }
    }
}

impl BootFiles for SiteFiles {
    fn stamp(&self, file: &BootFile) -> io::Result<Stamp> {
        let metadata = std::fs::metadata(self.path(file))?;
        if !metadata.is_file() || metadata.len() > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a file of at most 512 MiB"));
        }
        Ok(Stamp { length: metadata.len(), modified: metadata.modified()? })
    }

    fn read(&self, file: &BootFile) -> io::Result<Vec<u8>> {
        std::fs::read(self.path(file))
    }
}

type Slot = Arc<tokio::sync::Mutex<Option<(Stamp, Bytes)>>>;

/// What was read, until the total passes a limit; then what was asked for longest ago goes.
pub(crate) struct Cache {
    files: Arc<dyn BootFiles>,
    limit: u64,
    slots: Mutex<HashMap<BootFile, (Slot, Instant, u64)>>,
}

impl Cache {
    pub(crate) fn new(files: Arc<dyn BootFiles>, limit: u64) -> Self {
        Self { files, limit, slots: Mutex::new(HashMap::new()) }
    }

    /// The file's bytes. A thousand clients that ask at once cause one read.
    pub(crate) async fn get(&self, file: &BootFile) -> io::Result<Bytes> {
        let stamp = self.blocking(file, BootFiles::stamp).await?;
        let slot = {
            let mut slots = self.slots.lock().expect("no code that holds this lock panics");
            let entry = slots.entry(file.clone()).or_insert_with(|| (Slot::default(), Instant::now(), 0));
            entry.1 = Instant::now();
            Arc::clone(&entry.0)
        };
        let mut held = slot.lock().await;
        if let Some((_, bytes)) = held.as_ref().filter(|(s, _)| *s == stamp) {
            return Ok(bytes.clone());
        }
        let read = self.blocking(file, BootFiles::read).await;
        let bytes = match read {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) => {
                self.slots.lock().expect("no code that holds this lock panics").remove(file);
                return Err(error);
            }
        };
        *held = Some((stamp, bytes.clone()));
        drop(held);
        self.shrink(file, bytes.len() as u64);
        Ok(bytes)
    }

    fn shrink(&self, newest: &BootFile, size: u64) {
        let mut slots = self.slots.lock().expect("no code that holds this lock panics");
        if let Some(entry) = slots.get_mut(newest) {
            entry.2 = size;
        }
        while slots.values().map(|(_, _, size)| size).sum::<u64>() > self.limit {
            let others = slots.iter().filter(|(file, _)| *file != newest);
            let Some(oldest) = others.min_by_key(|(_, (_, used, _))| *used).map(|(file, _)| file.clone()) else {
                break;
            };
            slots.remove(&oldest); // downloads that still use it keep its bytes
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        file: &BootFile,
        call: fn(&dyn BootFiles, &BootFile) -> io::Result<T>,
    ) -> io::Result<T> {
        let (files, file) = (Arc::clone(&self.files), file.clone());
        tokio::task::spawn_blocking(move || call(&*files, &file)).await.map_err(io::Error::other)?
    }
}
