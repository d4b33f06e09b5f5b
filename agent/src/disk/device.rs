//! A machine's disk as a [`Block`].

use super::block::Block;
use crate::error::{AgentError, Result};
use crate::sys;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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
        Self::open_by(OpenOptions::new().read(true).write(true), path)
    }

    /// One that refuses each write.
    #[cfg(test)]
    pub fn open_for_reading(path: &Path) -> Result<Self> {
        Self::open_by(OpenOptions::new().read(true), path)
    }

    fn open_by(options: &OpenOptions, path: &Path) -> Result<Self> {
        use std::io::{Seek, SeekFrom};
        let mut file = options.open(path).map_err(AgentError::file(path))?;
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
        sys::flush(&self.file)
    }

    fn forget(&self) {
        // Advice: where it is not taken, what is read back comes from the cache.
        let _ = nix::fcntl::posix_fadvise(&self.file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}
