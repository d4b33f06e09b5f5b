//! What a disk says of its own health. NVMe: SMART / Health Information (NVM Express Base 2.0 §5.16.1.3). ATA: SMART
//! RETURN STATUS and SMART READ DATA (ACS-3 §7.48) through ATA PASS-THROUGH (SAT-4 §12.2). SCSI: the Informational
//! Exceptions log page (SPC-4 §7.3.8).
//!
//! Not asked: disks behind USB (bridges hang over it), in a controller's array, and emulated ones without an answer.

use crate::sys::{self, DISK_PATIENCE_MS, NvmeCommand};
use kiln_protocol::{Disk, DiskHealth};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So long all have: two commands of [`DISK_PATIENCE_MS`], and some more.
const PATIENCE: Duration = Duration::from_secs(25);
/// Of a thread that asks.
const STACK: usize = 64 << 10;
/// Who has not answered yet.
static ASKED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn asked() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    ASKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks all side by side, each in a thread: one that hangs in its driver never answers, whatever time its command was given. It
/// is told of, and asked again only when that question has come to its end.
pub fn ask_all(dev: &Path, disks: &mut [Disk]) {
    side_by_side(dev, disks, PATIENCE, ask);
}

fn side_by_side(dev: &Path, disks: &mut [Disk], within: Duration, ask: fn(&Path, &Disk) -> Option<DiskHealth>) {
    let until = Instant::now() + within;
    let begin = |disk: &Disk| {
        let path = dev.join(&disk.name);
        if !asked().insert(path.clone()) {
            return None;
        }
        let (tell, told) = channel();
        let (dev, disk, done) = (dev.to_owned(), disk.clone(), path.clone());
        let begun = std::thread::Builder::new().stack_size(STACK).spawn(move || {
            let health = ask(&dev, &disk);
            asked().remove(&done);
            // Nobody listens to what comes late.
            let _ = tell.send(health);
        });
        if begun.is_err() {
            asked().remove(&path);
        }
        Some(told)
    };
    let begun: Vec<Option<Receiver<Option<DiskHealth>>>> = disks.iter().map(begin).collect();
    for (disk, told) in disks.iter_mut().zip(begun) {
        let left = until.saturating_duration_since(Instant::now());
        disk.health = match told.map(|told| told.recv_timeout(left)) {
            Some(Ok(health)) => health,
            Some(Err(RecvTimeoutError::Disconnected)) => None,
            Some(Err(RecvTimeoutError::Timeout)) | None => {
                Some(DiskHealth { passed: false, detail: "it gives no answer".into() })
            }
        };
    }
}

/// None: it was not asked, or has no answer.
pub fn ask(dev: &Path, disk: &Disk) -> Option<DiskHealth> {
    let open = || OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(dev.join(&disk.name)).ok();
    match disk.transport.as_str() {
        "nvme" => {
            let mut log = [0; 512];
            let dwords = 512 / 4 - 1;
            let get_log =
                NvmeCommand { opcode: 0x02, nsid: u32::MAX, cdw10: dwords << 16 | 0x02, timeout_ms: DISK_PATIENCE_MS };
            sys::nvme_admin(&open()?, get_log, &mut log).ok()?;
            Some(nvme(&log))
        }
        "sata" => {
            let file = open()?;
            let sense = smart(&file, NO_DATA, RETURN_STATUS, &mut [])?;
            let mut data = [0; 512];
            let data = smart(&file, DATA_IN, READ_DATA, &mut data).map(|_| data);
            ata(&sense, data.as_ref())
        }
        "sas" | "scsi" => {
            let mut page = [0; 64];
            let cdb = [0x4d, 0, 0x40 | EXCEPTIONS, 0, 0, 0, 0, 0, 64, 0];
            let (status, _) = sys::scsi_command(&open()?, &cdb, &mut page).ok()?;
            scsi(status, &page)
        }
        _ => None,
    }
}

/// Protocol and flags of a pass-through: no data, its registers wanted back; one sector in.
const NO_DATA: [u8; 2] = [3 << 1, 0x20];
const DATA_IN: [u8; 2] = [4 << 1, 0x0e];
/// SMART's subcommands.
const RETURN_STATUS: u8 = 0xda;
const READ_DATA: u8 = 0xd0;
/// Log page "Informational Exceptions".
const EXCEPTIONS: u8 = 0x2f;

fn smart(file: &File, [protocol, flags]: [u8; 2], subcommand: u8, data: &mut [u8]) -> Option<[u8; 32]> {
    let sectors = u8::from(!data.is_empty());
    let cdb = [0x85, protocol, flags, 0, subcommand, 0, sectors, 0, 0, 0, 0x4f, 0, 0xc2, 0, 0xb0, 0];
    sys::scsi_command(file, &cdb, data).ok().map(|(_, sense)| sense)
}

fn nvme(log: &[u8; 512]) -> DiskHealth {
    const WARNINGS: [&str; 6] = [
        "little spare is left",
        "it is too hot or too cold",
        "it is not reliable any more",
        "it is read-only",
        "the backup of its memory failed",
        "its persistent memory is not reliable any more",
    ];
    let mut detail = String::new();
    for (bit, words) in WARNINGS.iter().enumerate() {
        if log[0] & (1 << bit) != 0 {
            detail += words;
            detail += "; ";
        }
    }
    let errors = u64::from_le_bytes(log[160..168].try_into().expect("eight bytes"));
    let _ = write!(detail, "{} % worn, {} % of its spare left, {errors} media errors", log[5], log[3]);
    DiskHealth { passed: log[0] == 0, detail }
}

/// LBA mid and high come back as they were sent, or turned where a threshold is exceeded. In descriptor or in fixed
/// format, as the disk's control page asks for.
fn ata(sense: &[u8; 32], data: Option<&[u8; 512]>) -> Option<DiskHealth> {
    let registers = match (sense[0] & 0x7f, sense[8]) {
        (0x72, 0x09) => [sense[17], sense[19]],
        (0x70, _) => [sense[10], sense[11]],
        _ => return None,
    };
    let passed = match registers {
        [0x4f, 0xc2] => true,
        [0xf4, 0x2c] => false,
        _ => return None,
    };
    let mut detail = String::new();
    for entry in data.into_iter().flat_map(|data| data[2..362].chunks_exact(12)) {
        let raw = u32::from_le_bytes([entry[5], entry[6], entry[7], entry[8]]);
        let what = match entry[0] {
            5 => "reallocated",
            197 => "unstable",
            198 => "unreadable",
            _ => continue,
        };
        if raw > 0 {
            let comma = if detail.is_empty() { "" } else { ", " };
            let _ = write!(detail, "{comma}{raw} {what} sectors");
        }
    }
    Some(DiskHealth { passed, detail })
}

fn scsi(status: u8, page: &[u8; 64]) -> Option<DiskHealth> {
    const WARNING: u8 = 0x0b;
    const FAILURE_PREDICTED: u8 = 0x5d;
    if status != 0 || page[0] & 0x3f != EXCEPTIONS || page[7] < 2 {
        return None;
    }
    let (code, qualifier) = (page[8], page[9]);
    let passed = !matches!(code, WARNING | FAILURE_PREDICTED);
    let detail = if passed { String::new() } else { format!("it gives {code:02x}h/{qualifier:02x}h as its reason") };
    Some(DiskHealth { passed, detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_hangs_is_told_of_and_hides_no_other_and_is_asked_once() {
        static BEGUN: Mutex<Vec<String>> = Mutex::new(Vec::new());
        fn answer(_: &Path, disk: &Disk) -> Option<DiskHealth> {
            BEGUN.lock().unwrap().push(disk.name.clone());
            if disk.name == "sdb" {
                loop {
                    std::thread::park();
                }
            }
            (!disk.name.is_empty()).then(|| DiskHealth { passed: true, detail: disk.name.clone() })
        }
        let disk = |name: &str| Disk { name: name.into(), ..Disk::default() };
        let mut disks = ["sda", "sdb", "sdc"].map(disk);
        let silent = Some(DiskHealth { passed: false, detail: "it gives no answer".into() });
        for round in 0..2 {
            // Long enough for the two that answer, on any host.
            side_by_side(Path::new("/dev/of-a-test"), &mut disks, Duration::from_secs(5), answer);
            let [first, hangs, last] = &disks;
            assert!(first.health.as_ref().is_some_and(|health| health.passed), "round {round}: {first:?}");
            assert!(last.health.as_ref().is_some_and(|health| health.passed), "round {round}: {last:?}");
            assert_eq!(hangs.health, silent, "round {round}");
        }
        let begun = BEGUN.lock().unwrap();
        assert_eq!(begun.iter().filter(|name| *name == "sdb").count(), 1, "{begun:?}");
    }

    #[test]
    fn nvme_says_why_it_is_unwell() {
        let mut log = [0; 512];
        (log[3], log[5], log[160]) = (100, 3, 7);
        let well = nvme(&log);
        assert!(well.passed);
        assert_eq!(well.detail, "3 % worn, 100 % of its spare left, 7 media errors");
        log[0] = 0b1001;
        let ill = nvme(&log);
        assert!(!ill.passed && ill.detail.starts_with("little spare is left; it is read-only; 3 % worn"), "{ill:?}");
    }

    #[test]
    fn ata_is_read_in_both_formats_of_sense() {
        let sense = |bytes: &[(usize, u8)]| {
            let mut sense = [0; 32];
            for (at, byte) in bytes {
                sense[*at] = *byte;
            }
            sense
        };
        let descriptor = |mid, high| sense(&[(0, 0x72), (8, 0x09), (9, 12), (17, mid), (19, high)]);
        let fixed = |mid, high| sense(&[(0, 0x70), (10, mid), (11, high)]);
        for form in [&descriptor as &dyn Fn(u8, u8) -> [u8; 32], &fixed] {
            assert!(ata(&form(0x4f, 0xc2), None).unwrap().passed);
            assert!(!ata(&form(0xf4, 0x2c), None).unwrap().passed);
            assert_eq!(ata(&form(0, 0), None), None, "no answer is no health");
        }
        assert_eq!(ata(&[0; 32], None), None);
        let mut data = [0; 512];
        data[2] = 9;
        (data[14], data[14 + 5]) = (5, 3);
        (data[26], data[26 + 6]) = (197, 1);
        data[38] = 198;
        let told = ata(&descriptor(0x4f, 0xc2), Some(&data)).unwrap();
        assert_eq!(told.detail, "3 reallocated sectors, 256 unstable sectors");
    }

    #[test]
    fn scsi_predicts_a_failure_by_its_log_page() {
        let page = |code: u8| {
            let mut page = [0; 64];
            (page[0], page[3], page[7], page[8]) = (0x2f, 8, 4, code);
            page
        };
        assert!(scsi(0, &page(0)).unwrap().passed);
        let ill = scsi(0, &page(0x5d)).unwrap();
        assert!(!ill.passed && ill.detail.contains("5dh/00h"), "{ill:?}");
        assert_eq!((scsi(2, &page(0)), scsi(0, &[0; 64])), (None, None));
    }
}
