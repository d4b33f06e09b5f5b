//! The machines' logs, kept per boot in `state/logs/MACHINE/BOOT.*`. Bounded for each boot, each machine and the site; the
//! oldest go. A machine writes only its own, and only of boots that it reported.

mod file;

use crate::error::LogError;
use file::BootFile;
pub use file::Kept;
use kiln_protocol::{LogBatch, MachineId};
use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Bytes of all logs of a site together, where kiln.toml does not say.
pub const TOTAL: u64 = 2 << 30;

#[derive(Debug, Default)]
struct Index {
    machines: BTreeMap<MachineId, BTreeMap<String, BootFile>>,
    bytes: u64,
}

/// The logs of a site.
#[derive(Debug)]
pub struct Logs {
    dir: PathBuf,
    total: u64,
    index: Mutex<Index>,
    changed: watch::Sender<u64>,
}

/// Whose log, and what may be kept beside it.
#[derive(Debug, Clone)]
pub struct Writer {
    /// The machine.
    pub machine: MachineId,
    /// Nobody approved it.
    pub stranger: bool,
    /// The boots that the server knows of it, this one among them; the logs of others go.
    pub boots: Vec<String>,
}

/// A boot id that may be a file's name: the kernel's are UUIDs.
fn is_boot(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

impl Logs {
    /// Of a site's state directory; looks at what is there.
    pub fn open(state: &Path, total: u64) -> Self {
        let dir = state.join("logs");
        let mut index = Index::default();
        for machine in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Some(id) = machine.file_name().to_str().and_then(|n| n.parse::<MachineId>().ok()) else { continue };
            let boots = index.machines.entry(id).or_default();
            for entry in std::fs::read_dir(machine.path()).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let Some(boot) = name.to_str().and_then(BootFile::boot_of).filter(|b| is_boot(b)) else { continue };
                boots.entry(boot.to_owned()).or_insert_with(|| BootFile::new(&machine.path(), boot));
            }
            index.bytes += boots.values().map(|b| b.bytes).sum::<u64>();
        }
        Self { dir, total: total.max(file::BOOT_BYTES), index: Mutex::new(index), changed: watch::channel(0).0 }
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, machine: &MachineId) -> PathBuf {
        self.dir.join(machine.as_str())
    }

    /// Told of every line that came.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Keeps what is new of a batch; gives the number wanted next. Blocks on the disk.
    pub fn append(&self, writer: &Writer, batch: &LogBatch, now_ms: i64) -> Result<u64, LogError> {
        if !is_boot(&batch.boot_id) {
            return Err(LogError::BootId);
        }
        let dir = self.of(&writer.machine);
        let fail = |source| LogError::Write { path: dir.clone(), source };
        let mut index = self.lock();
        let index = &mut *index;
        let boots = index.machines.entry(writer.machine.clone()).or_default();
        if !boots.contains_key(&batch.boot_id) {
            DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(fail)?;
            let gone: Vec<String> = boots.keys().filter(|boot| !writer.boots.contains(boot)).cloned().collect();
            for boot in gone {
                if let Some(file) = boots.remove(&boot) {
                    file.remove().map_err(fail)?;
                    index.bytes -= file.bytes.min(index.bytes);
                }
            }
            boots.insert(batch.boot_id.clone(), BootFile::new(&dir, &batch.boot_id));
        }
        let file = boots.get_mut(&batch.boot_id).expect("it was put there a moment ago");
        let before = (file.bytes, file.next().map_err(fail)?);
        let next = file.append(batch, writer.stranger, now_ms);
        index.bytes = (index.bytes + file.bytes).saturating_sub(before.0);
        let next = next.map_err(fail)?;
        if index.bytes > self.total {
            index.shrink(self.total / 10 * 9, (&writer.machine, &batch.boot_id));
        }
        if next != before.1 {
            self.changed.send_modify(|n| *n = n.wrapping_add(1));
        }
        Ok(next)
    }

    /// What is kept of a boot, and its kernel's start on the server's clock. Blocks on the disk.
    pub fn read(&self, machine: &MachineId, boot: &str) -> Result<(Option<i64>, Vec<Kept>), LogError> {
        if !is_boot(boot) {
            return Err(LogError::BootId);
        }
        let dir = self.of(machine);
        // Under the lock: no line is half written.
        let _index = self.lock();
        BootFile::read(&dir, boot).map_err(|source| LogError::Read { path: dir, source })
    }

    /// Drops all logs of a machine. Blocks on the disk.
    pub fn forget(&self, machine: &MachineId) {
        let mut index = self.lock();
        let Some(boots) = index.machines.remove(machine) else { return };
        index.bytes -= boots.values().map(|b| b.bytes).sum::<u64>().min(index.bytes);
        if let Err(error) = std::fs::remove_dir_all(self.of(machine)) {
            tracing::warn!("the logs of {machine} cannot be removed: {error}");
        }
    }
}

impl Index {
    /// Drops whole boots, those first that were silent for longest, until so many bytes are left. The one that is being
    /// written stays.
    fn shrink(&mut self, bytes: u64, writing: (&MachineId, &str)) {
        let of = |(id, boots): (&MachineId, &BTreeMap<String, BootFile>)| {
            let id = id.clone();
            boots.iter().map(move |(boot, file)| (file.written, id.clone(), boot.clone())).collect::<Vec<_>>()
        };
        let mut oldest: Vec<_> = self.machines.iter().flat_map(of).collect();
        oldest.sort();
        for (_, id, boot) in oldest {
            if self.bytes <= bytes {
                break;
            }
            let Some(boots) = self.machines.get_mut(&id).filter(|_| (&id, boot.as_str()) != writing) else { continue };
            if let Some(file) = boots.remove(&boot) {
                if let Err(error) = file.remove() {
                    tracing::warn!("an old log of {id} cannot be removed: {error}");
                }
                self.bytes -= file.bytes.min(self.bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests;
