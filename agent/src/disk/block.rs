//! The one seam to a disk: bytes at an offset, and a barrier. Everything above it is the same on a machine's disk, on a
//! file, and in the tests that cut the power at every write.

use crate::error::{AgentError, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of a sector. Disks with logical sectors of 4096 bytes are refused by name, not misread.
pub const SECTOR: usize = 512;

/// A disk, or a part of one. A sector is written whole or not at all; writes between two flushes may reach the disk in
/// any order.
pub trait Block {
    /// Bytes.
    fn size(&self) -> u64;
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()>;
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;
    /// Everything written before is on the disk when it returns.
    fn flush(&mut self) -> io::Result<()>;
    /// Drops what is cached of it, so that the next read is the disk's own answer.
    fn forget(&self) {}
}

/// A disk's device node, or a file in its place.
#[derive(Debug)]
pub struct Device {
    file: File,
    path: PathBuf,
    size: u64,
}

impl Device {
    /// For reading and writing.
    pub fn open(path: &Path) -> Result<Self> {
        use std::io::{Seek, SeekFrom};
        let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(AgentError::file(path))?;
        // A block device's metadata says 0.
        let size = file.seek(SeekFrom::End(0)).map_err(AgentError::file(path))?;
        Ok(Self { file, path: path.to_owned(), size })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// For reading what lies on the disk itself: past the page cache where the file system can, else after it was told
    /// to drop what it holds.
    pub fn uncached(&self) -> Result<File> {
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&self.path);
        match direct {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                let file = File::open(&self.path).map_err(AgentError::file(&self.path))?;
                let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                nix::fcntl::posix_fadvise(&file, 0, 0, advice).map_err(AgentError::system("dropping cached pages"))?;
                Ok(file)
            }
            other => other.map_err(AgentError::file(&self.path)),
        }
    }
}

impl Block for Device {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn forget(&self) {
        // Advice: where it is not taken, what is read back comes from the cache.
        let _ = nix::fcntl::posix_fadvise(&self.file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

/// A part of a disk. It cannot be left: what goes over its end is an error.
pub struct Part<'a, B: Block> {
    disk: &'a mut B,
    start: u64,
    size: u64,
}

impl<'a, B: Block> Part<'a, B> {
    /// `range` in bytes.
    pub fn new(disk: &'a mut B, range: &std::ops::Range<u64>) -> Self {
        Self { disk, start: range.start, size: range.end - range.start }
    }

    fn place(&self, at: u64, length: usize) -> io::Result<u64> {
        let inside = at.checked_add(length as u64).is_some_and(|end| end <= self.size);
        inside.then(|| self.start + at).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{length} bytes at {at} of a part of {}", self.size))
        })
    }
}

impl<B: Block> Block for Part<'_, B> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(self.place(at, bytes.len())?, bytes)
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let at = self.place(at, bytes.len())?;
        self.disk.write_at(at, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    fn forget(&self) {
        self.disk.forget();
    }
}
