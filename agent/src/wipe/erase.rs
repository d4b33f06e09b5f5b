//! One disk: what it offers itself, then the reading back of every byte, and zeros where that is not enough.

use super::disks::Disk;
use super::nvme;
use crate::sys;
use kiln_protocol::WipeMethod;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Read and written at once.
const PIECE: usize = 1 << 20;
/// Flushed after so many bytes: what is written lies on the disk and not in memory.
const FLUSH: u64 = 64 << 20;
/// The slowest disk that is waited for, bytes per second, and what every disk has besides; also the longest without an answer.
const SLOWEST: u64 = 8 << 20;
pub const GRACE: Duration = Duration::from_secs(30 * 60);
/// The discard of a whole disk is one command.
const DISCARD: Duration = Duration::from_secs(6 * 3600);

/// How far all disks are together.
#[derive(Debug, Default)]
pub struct Meter {
    total: AtomicU64,
    erased: AtomicU64,
    read: AtomicU64,
}

impl Meter {
    pub fn expect(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// For the console and the server.
    pub fn describe(&self) -> String {
        let [total, erased, read] = [&self.total, &self.erased, &self.read].map(|n| n.load(Ordering::Relaxed));
        let percent = |part: u64| u128::from(part.min(total)) * 100 / u128::from(total.max(1));
        format!("{} % is erased, {} % of {} MiB is read back", percent(erased), percent(read), total >> 20)
    }
}

/// Until when a disk may be silent, for whoever waits for it: one that hangs answers no deadline.
#[derive(Debug)]
pub struct Pulse {
    begun: Instant,
    /// Milliseconds from then on.
    until: AtomicU64,
}

impl Pulse {
    pub fn new() -> Self {
        Self { begun: Instant::now(), until: AtomicU64::new(0) }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// It has answered; the next answer may take so long.
    pub fn may_take(&self, next: Duration) {
        let next = u64::try_from(next.as_millis()).unwrap_or(u64::MAX);
        self.until.store(self.now().saturating_add(next), Ordering::Relaxed);
    }

    pub fn is_late(&self) -> bool {
        self.now() > self.until.load(Ordering::Relaxed)
    }
}

/// When this disk is given up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline<'a>(Instant, &'a Pulse);

impl<'a> Deadline<'a> {
    fn of(bytes: u64, pulse: &'a Pulse) -> Self {
        pulse.may_take(GRACE);
        Self(Instant::now() + GRACE + Duration::from_secs(bytes / SLOWEST), pulse)
    }

    /// One command follows that may take so long by itself.
    pub fn extend(self, command: Duration) {
        self.1.may_take(GRACE + command);
    }

    pub fn check(self) -> Result<()> {
        if Instant::now() < self.0 {
            self.1.may_take(GRACE);
            return Ok(());
        }
        Err(Error::new(ErrorKind::TimedOut, format!("slower than {} MiB/s over its whole length", SLOWEST >> 20)))
    }
}

/// Erases it; says how that was verified. `methods` is what was done, also before a failure.
pub fn erase(
    disk: &Disk,
    method: WipeMethod,
    methods: &mut Vec<String>,
    meter: &Meter,
    pulse: &Pulse,
) -> Result<String> {
    let deadline = Deadline::of(disk.bytes, pulse);
    // Exclusive: a disk that is mounted or part of another device is refused here (open(2), O_EXCL on block devices).
    let options = |exclusive| OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(disk.path());
    let file = options(libc::O_EXCL).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => Error::new(ErrorKind::ResourceBusy, "it is in use: mounted, or part of another device"),
        Some(libc::EROFS | libc::EACCES) => Error::new(e.kind(), "it is write-protected"),
        _ => e,
    })?;
    if disk.is_nvme() {
        // A controller that refuses is no failed disk: it is written over.
        match nvme::erase(&file, deadline) {
            Ok(done) => methods.extend(done.map(str::to_owned)),
            Err(error) => println!("kiln-agent: {}: {error}; it is written over instead", disk.name),
        }
    }
    if methods.is_empty() {
        deadline.extend(DISCARD);
        if sys::discard(&file, disk.bytes, true).is_ok() {
            methods.push("secure-discard".into());
        } else if sys::discard(&file, disk.bytes, false).is_ok() {
            methods.push("discard".into());
        }
    }
    if method == WipeMethod::Best && !methods.is_empty() {
        meter.erased.fetch_add(disk.bytes, Ordering::Relaxed);
        if let Ok(byte) = read_back(&file, disk.bytes, deadline, meter)? {
            return Ok(every(disk.bytes, byte));
        }
        meter.erased.fetch_sub(disk.bytes, Ordering::Relaxed);
    }
    methods.push("overwrite".into());
    write_zeros(&file, disk.bytes, deadline, meter)?;
    match read_back(&file, disk.bytes, deadline, meter)? {
        Ok(0) => Ok(every(disk.bytes, 0)),
        Ok(byte) => Err(Error::other(format!("zeros were written, {byte:#04x} is read everywhere"))),
        Err(at) => Err(Error::other(format!("zeros were written, something else is read at byte {at}"))),
    }
}

fn every(bytes: u64, byte: u8) -> String {
    format!("all {bytes} bytes were read back and are {byte:#04x}")
}

fn write_zeros(file: &File, bytes: u64, deadline: Deadline<'_>, meter: &Meter) -> Result<()> {
    let zeros = vec![0; PIECE];
    let mut at = 0;
    while at < bytes {
        deadline.check()?;
        let piece = usize::try_from(bytes - at).map_or(PIECE, |left| left.min(PIECE));
        file.write_all_at(&zeros[..piece], at).map_err(at_byte("writing", at))?;
        at += piece as u64;
        meter.erased.fetch_add(piece as u64, Ordering::Relaxed);
        if at % FLUSH == 0 || at == bytes {
            file.sync_data().map_err(at_byte("flushing", at))?;
        }
    }
    Ok(())
}

/// The one byte that all of it reads as, zeros or ones; else where it is first another. From the disk, not from memory.
fn read_back(file: &File, bytes: u64, deadline: Deadline<'_>, meter: &Meter) -> Result<std::result::Result<u8, u64>> {
    deadline.check()?;
    file.sync_all()?;
    sys::forget_buffers(file)?;
    let mut piece = vec![0; PIECE];
    let (mut at, mut byte, before) = (0, None, meter.read.load(Ordering::Relaxed));
    while at < bytes {
        deadline.check()?;
        let length = usize::try_from(bytes - at).map_or(PIECE, |left| left.min(PIECE));
        let piece = &mut piece[..length];
        file.read_exact_at(piece, at).map_err(at_byte("reading back", at))?;
        let byte = *byte.get_or_insert(piece[0]);
        if let Some(other) = piece.iter().position(|b| *b != byte || !matches!(byte, 0 | 0xff)) {
            meter.read.store(before, Ordering::Relaxed);
            return Ok(Err(at + other as u64));
        }
        at += length as u64;
        meter.read.fetch_add(length as u64, Ordering::Relaxed);
        if at % FLUSH == 0 {
            // Advice: what was read is not wanted in memory.
            let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }
    byte.map(Ok).ok_or_else(|| Error::other("it has no bytes"))
}

fn at_byte(what: &'static str, at: u64) -> impl FnOnce(Error) -> Error {
    move |e| Error::new(e.kind(), format!("{what} at byte {at}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = (2 * PIECE + 512) as u64;

    fn disk(dir: &tempfile::TempDir, content: &[u8]) -> (Disk, File) {
        let path = dir.path().join("disk");
        std::fs::write(&path, content).unwrap();
        // An absolute name stays what it is under /dev.
        let name = path.to_str().unwrap().to_owned();
        let found = Disk { name, model: "m".into(), serial: "s".into(), bytes: BYTES, removable: false };
        assert_eq!(found.path(), path);
        (found, File::options().read(true).write(true).open(path).unwrap())
    }

    #[test]
    fn what_offers_nothing_is_written_over_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..BYTES).map(|n| u8::try_from(n % 251).unwrap()).collect();
        for method in [WipeMethod::Best, WipeMethod::Overwrite] {
            let (disk, _) = disk(&dir, &content);
            let (mut methods, meter) = (Vec::new(), Meter::default());
            meter.expect(BYTES);
            let said = erase(&disk, method, &mut methods, &meter, &Pulse::new()).unwrap();
            assert_eq!(
                (said.as_str(), methods),
                ("all 2097664 bytes were read back and are 0x00", vec!["overwrite".into()])
            );
            assert!(std::fs::read(disk.path()).unwrap().iter().all(|b| *b == 0));
            assert_eq!(meter.describe(), "100 % is erased, 100 % of 2 MiB is read back");
        }
    }

    #[test]
    fn a_single_other_byte_is_found_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (_, file) = disk(&dir, &vec![0; usize::try_from(BYTES).unwrap()]);
        let pulse = Pulse::new();
        let read = |file: &File| read_back(file, BYTES, Deadline::of(BYTES, &pulse), &Meter::default()).unwrap();
        assert_eq!(read(&file), Ok(0));
        for at in [0, 1, PIECE as u64 - 1, PIECE as u64, BYTES - 1] {
            file.write_all_at(&[7], at).unwrap();
            assert_eq!(read(&file), Err(if at == 0 { 0 } else { at }), "{at}");
            file.write_all_at(&[0], at).unwrap();
        }
        let (_, file) = disk(&dir, &vec![0xff; usize::try_from(BYTES).unwrap()]);
        assert_eq!(read(&file), Ok(0xff), "erased flash reads as ones");
        let (_, file) = disk(&dir, &vec![0x55; usize::try_from(BYTES).unwrap()]);
        assert_eq!(read(&file), Err(0), "one and the same byte, but a pattern");
    }

    #[test]
    fn a_disk_that_ends_early_or_is_late_has_failed() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, file) = disk(&dir, &[1; 100]);
        let pulse = Pulse::new();
        let late = Deadline(Instant::now(), &pulse);
        assert_eq!(write_zeros(&file, BYTES, late, &Meter::default()).unwrap_err().kind(), ErrorKind::TimedOut);
        let read = read_back(&file, BYTES, Deadline::of(BYTES, &pulse), &Meter::default());
        assert!(read.unwrap_err().to_string().starts_with("reading back at byte 0"));
        let gone = Disk { name: dir.path().join("none").to_str().unwrap().into(), ..disk };
        assert!(erase(&gone, WipeMethod::Best, &mut Vec::new(), &Meter::default(), &pulse).is_err());
    }
}
