//! The one seam to a disk: bytes at an offset, and a barrier. Everything above it is the same on a machine's disk, on a
//! file, and in the tests that cut the power at every write.

use std::io;

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
