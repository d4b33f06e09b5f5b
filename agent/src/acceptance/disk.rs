//! Disks, side by side, and one that hangs is the result of none but itself: each is read from its beginning for its speed, and read twice at places over its whole length: the
//! same bytes must come both times, from the disk and not from memory. A disk with anything on it is only read. One that is
//! blank is written to where the release says so, and made blank again.

use super::{GRACE, result};
use crate::disk::block::Block;
use crate::disk::device::Device;
use crate::disk::layout::{self, Found};
use crate::inventory::{Root, disks, health_of};
use kiln_protocol::{Disk, Outcome, TestKind, TestResult, binary_size, decimal_size};
use kiln_release::AcceptancePlan;
use ring::digest::{SHA256, digest};
use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Read and written at once.
const PIECE: usize = 1 << 20;
/// What O_DIRECT wants buffers and offsets to be multiples of.
const ALIGN: usize = 4096;
/// Places over the length of a disk that are read twice, or written.
const PLACES: u64 = 256;

/// A buffer that O_DIRECT takes.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let bytes = vec![0; PIECE + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { bytes, start }
    }

    fn piece(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

/// Where a piece begins: place `number` of [`PLACES`], on a boundary.
fn place(size: u64, number: u64) -> u64 {
    let last = size.saturating_sub(PIECE as u64);
    let at = u128::from(last) * u128::from(number) / u128::from(PLACES - 1);
    u64::try_from(at).unwrap_or(0) / ALIGN as u64 * ALIGN as u64
}

/// A piece of a disk, at most; whole blocks.
fn length(size: u64, at: u64) -> usize {
    usize::try_from(size - at).unwrap_or(PIECE).min(PIECE) / ALIGN * ALIGN
}

/// What reading gave.
#[derive(Debug, Default)]
struct Read {
    mib_s: u64,
    bytes: u64,
    places: u64,
}

fn at_byte(what: &'static str, at: u64) -> impl FnOnce(Error) -> Error {
    move |e| Error::new(e.kind(), format!("{what} at byte {at}: {e}"))
}

/// Reads, and reads again. The time is cut in two: half for the speed, half for the places.
fn read(file: &File, size: u64, most: u64, within: Duration) -> Result<Read> {
    let mut buffer = Buffer::new();
    let begun = Instant::now();
    let mut done = Read::default();
    let end = size.min(most) / ALIGN as u64 * ALIGN as u64;
    while done.bytes < end && begun.elapsed() < within / 2 {
        let piece = length(end, done.bytes);
        file.read_exact_at(buffer.piece(piece), done.bytes).map_err(at_byte("reading", done.bytes))?;
        done.bytes += piece as u64;
    }
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
    done.mib_s = (done.bytes.saturating_mul(1000) / ms) >> 20;
    for number in 0..PLACES {
        if begun.elapsed() >= within {
            break;
        }
        let at = place(size, number);
        let piece = length(size, at);
        let mut hash = || {
            file.read_exact_at(buffer.piece(piece), at).map_err(at_byte("reading", at))?;
            Ok::<_, Error>(digest(&SHA256, buffer.piece(piece)))
        };
        if hash()?.as_ref() != hash()?.as_ref() {
            return Err(Error::other(format!("read twice at byte {at}, other bytes came the second time")));
        }
        done.places += 1;
    }
    Ok(done)
}

/// A pattern that is another at each place.
fn pattern(piece: &mut [u8], at: u64) {
    for (n, word) in piece.chunks_exact_mut(8).enumerate() {
        let number = (at + 8 * n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xa5a5_a5a5_a5a5_a5a5;
        word.copy_from_slice(&number.to_le_bytes());
    }
}

/// Writes to a blank disk, reads back, and makes it blank again, whatever happened.
fn write(disk: &mut Device, within: Duration) -> Result<u64> {
    let begun = Instant::now();
    let mut written = Vec::new();
    let outcome = write_places(disk, begun, within, &mut written);
    let zeros = vec![0; PIECE];
    for at in &written {
        disk.write_at(*at, &zeros[..length(disk.size(), *at)]).map_err(at_byte("making it blank again", *at))?;
    }
    disk.flush()?;
    outcome.map(|()| written.len() as u64)
}

fn write_places(disk: &mut Device, begun: Instant, within: Duration, written: &mut Vec<u64>) -> Result<()> {
    let size = disk.size();
    let (mut piece, mut back) = (vec![0; PIECE], Buffer::new());
    for number in 0..PLACES {
        if begun.elapsed() >= within {
            break;
        }
        let at = place(size, number);
        let piece = &mut piece[..length(size, at)];
        pattern(piece, at);
        written.push(at);
        disk.write_at(at, piece).map_err(at_byte("writing", at))?;
    }
    disk.flush()?;
    let file = disk.uncached().map_err(Error::other)?;
    for at in written.iter().copied() {
        let piece = &mut piece[..length(size, at)];
        pattern(piece, at);
        let back = back.piece(piece.len());
        file.read_exact_at(back, at).map_err(at_byte("reading back", at))?;
        // On a small disk places overlap: the later one's pattern is the same function of the place.
        if back != piece {
            return Err(Error::other(format!("written at byte {at}, other bytes came back")));
        }
    }
    Ok(())
}

fn title(disk: &Disk) -> String {
    let mut about = vec![decimal_size(disk.bytes)];
    about.extend((!disk.model.is_empty()).then(|| disk.model.clone()));
    about.extend((!disk.serial.is_empty()).then(|| format!("serial number {}", disk.serial)));
    format!("disk {} ({})", disk.name, about.join(", "))
}

fn one(disk: &Disk, path: &Path, plan: &AcceptancePlan, within: Duration) -> TestResult {
    let kind = TestKind::Disk;
    let failed = |detail: String| result(kind, title(disk), Outcome::Failed, detail, &[]);
    if let Some(health) = disk.health.as_ref().filter(|health| !health.passed) {
        return failed(format!("it expects to fail: {}", health.detail));
    }
    let mut device = match Device::open(path) {
        Ok(device) => device,
        Err(error) => return failed(error.to_string()),
    };
    let size = device.size();
    if size < 2 * PIECE as u64 {
        return result(kind, title(disk), Outcome::Skipped, "too small to be tested", &[]);
    }
    let reads = device.uncached().map_err(Error::other);
    let done = match reads.and_then(|file| read(&file, size, plan.disk_read_mib << 20, within / 2)) {
        Ok(done) => done,
        Err(error) => return failed(error.to_string()),
    };
    let measures = [("read_mib_s", done.mib_s), ("tested_mib", (done.bytes + 2 * done.places * PIECE as u64) >> 20)];
    let detail = format!(
        "{} read with {} MiB/s, {} places of it twice and the same",
        binary_size(done.bytes),
        done.mib_s,
        done.places
    );
    let written = match (plan.disk_write_blank, layout::look(&device, "")) {
        (false, _) => "only read".to_owned(),
        (true, Ok(Found::Foreign(_) | Found::Ours(_))) => "only read: it is not blank".to_owned(),
        (true, Err(error)) => return failed(error.to_string()),
        (true, Ok(Found::Blank)) => match write(&mut device, within / 2) {
            Ok(places) => format!("{places} places written, read back, and blank again"),
            Err(error) => return failed(error.to_string()),
        },
    };
    if done.places == 0 {
        return failed(format!("no place could be read twice in {} s", within.as_secs()));
    }
    result(kind, title(disk), Outcome::Passed, format!("{detail}; {written}"), &measures)
}

pub fn test(plan: &AcceptancePlan, within: Duration) -> Vec<TestResult> {
    let root = Root::of_this_machine();
    let found = match disks(&root) {
        Ok(found) => found,
        Err(error) => return vec![result(TestKind::Disk, "disks", Outcome::Failed, error, &[])],
    };
    let removable = |disk: &Disk| {
        let says = std::fs::read_to_string(root.sys.join("class/block").join(&disk.name).join("removable"));
        disk.transport == "usb" || says.is_ok_and(|text| text.trim() == "1")
    };
    let disks: Vec<Disk> = found.into_iter().filter(|disk| disk.bytes > 0 && !removable(disk)).collect();
    let (root, plan) = (Arc::new(root), plan.clone());
    side_by_side(disks, within + GRACE, move |disk| {
        let disk = Disk { health: health_of(&root, disk), ..disk.clone() };
        one(&disk, &root.dev.join(&disk.name), &plan, within)
    })
}

/// Each in a thread of its own. One that does not end in its time is named, and left behind.
fn side_by_side(
    disks: Vec<Disk>,
    within: Duration,
    work: impl Fn(&Disk) -> TestResult + Clone + Send + 'static,
) -> Vec<TestResult> {
    let until = Instant::now() + within;
    let begun = disks.into_iter().map(|disk| {
        let (tell, told) = channel();
        let (work, tested) = (work.clone(), disk.clone());
        // Without a thread nobody answers, and nobody listens to what comes late.
        let _ = thread::Builder::new().spawn(move || tell.send(work(&tested)).is_ok());
        (disk, told)
    });
    // Collected before the first answer is waited for: this is what begins them.
    let begun: Vec<_> = begun.collect();
    let answers = begun.into_iter().map(|(disk, told)| {
        told.recv_timeout(until.saturating_duration_since(Instant::now())).unwrap_or_else(|error| {
            let detail = match error {
                RecvTimeoutError::Timeout => format!("it gave no answer within {} s: it hangs", within.as_secs()),
                RecvTimeoutError::Disconnected => "the test of it ended early".to_owned(),
            };
            result(TestKind::Disk, title(&disk), Outcome::Failed, detail, &[])
        })
    });
    answers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::DiskHealth;

    const SIZE: usize = 5 * PIECE;

    fn file(content: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, content).unwrap();
        (dir, path)
    }

    fn run(path: &Path, disk: &Disk, blank: bool) -> TestResult {
        let plan = AcceptancePlan { disk_write_blank: blank, disk_read_mib: 2, ..AcceptancePlan::default() };
        one(disk, path, &plan, Duration::from_secs(600))
    }

    fn a_disk() -> Disk {
        Disk { name: "vda".into(), serial: "S1".into(), bytes: SIZE as u64, ..Disk::default() }
    }

    #[test]
    fn a_disk_with_data_is_read_and_stays_as_it_is() {
        let content: Vec<u8> = (0..SIZE).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let (_dir, path) = file(&content);
        let said = run(&path, &a_disk(), true);
        assert_eq!(said.outcome, Outcome::Passed, "{}", said.detail);
        assert!(said.detail.contains("2 MiB read") && said.detail.ends_with("only read: it is not blank"), "{said:?}");
        assert_eq!(said.part, "disk vda (5.2 MB, serial number S1)");
        assert_eq!(std::fs::read(&path).unwrap(), content, "not a byte of it is another");
        assert_eq!(said.measures["tested_mib"], 2 + 2 * PLACES);
    }

    #[test]
    fn a_blank_disk_is_written_where_the_release_says_so_and_is_blank_again() {
        let (_dir, path) = file(&vec![0; SIZE]);
        assert!(run(&path, &a_disk(), false).detail.ends_with("; only read"));
        let said = run(&path, &a_disk(), true);
        assert!(said.detail.ends_with(&format!("{PLACES} places written, read back, and blank again")), "{said:?}");
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_disk_that_expects_to_fail_or_is_not_there_fails() {
        let health = Some(DiskHealth { passed: false, detail: "little spare is left".into() });
        let said = run(Path::new("/nowhere"), &Disk { health, ..a_disk() }, false);
        assert_eq!((said.outcome, said.detail.as_str()), (Outcome::Failed, "it expects to fail: little spare is left"));
        assert_eq!(run(Path::new("/nowhere"), &a_disk(), false).outcome, Outcome::Failed);
        let (_dir, path) = file(&[0; 512]);
        assert_eq!(run(&path, &a_disk(), false).outcome, Outcome::Skipped);
    }

    /// Its thread hangs in the kernel: in a FIFO that nobody writes to.
    #[test]
    fn a_disk_that_hangs_is_named_and_the_others_keep_their_results() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let disks = ["vda", "vdb", "vdc"].map(|name| Disk { name: name.into(), ..a_disk() });
        let hangs = fifo.clone();
        // Long enough for the two that do not hang, on any host.
        let results = side_by_side(disks.into(), Duration::from_secs(5), move |disk| {
            match disk.name.as_str() {
                "vda" => drop(std::fs::read(&hangs)),
                "vdb" => panic!("on purpose: the thread of this disk dies"),
                _ => {}
            }
            result(TestKind::Disk, title(disk), Outcome::Passed, "well", &[])
        });
        let said: Vec<_> = results.iter().map(|r| (&r.part[..8], r.outcome, r.detail.as_str())).collect();
        let expected = [
            ("disk vda", Outcome::Failed, "it gave no answer within 5 s: it hangs"),
            ("disk vdb", Outcome::Failed, "the test of it ended early"),
            ("disk vdc", Outcome::Passed, "well"),
        ];
        assert_eq!(said, expected);
        // Its thread ends with the test.
        std::fs::write(&fifo, "").unwrap();
    }

    #[test]
    fn places_are_on_boundaries_and_reach_the_end() {
        for size in [2 * PIECE as u64, 10_000_000, 8_000_000_000_000, u64::MAX / 2] {
            let last = place(size, PLACES - 1);
            assert!((0..PLACES).all(|n| place(size, n).is_multiple_of(ALIGN as u64)));
            assert!(last + PIECE as u64 <= size && size - last < (PIECE + ALIGN) as u64, "{size} {last}");
            assert!(length(size, last) > 0 && length(size, last).is_multiple_of(ALIGN));
        }
    }
}
