//! What a disk may hold up for ever is done by a process of its own, and a thread waits for that. A thread of PID 1 must not
//! do it: it could not be ended, and execve(2) of the image's init waits for every thread, and closes what each has open,
//! which waits for the disk as well. A process that does not come back is left to the image's init.

use super::insert;
use crate::error::{AgentError, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The command of the agent that such a process is.
pub const ALONE: &str = "alone";
const OFFER: &str = "offer";
const INSERT: &str = "insert";
const READ: &str = "read";
/// By the first letter systemd knows, when it shuts down, whom it neither ends nor waits for
/// (https://systemd.io/ROOT_STORAGE_DAEMONS).
const NAME: &str = "@kiln-agent";
/// What is read at both ends of a disk: its partition table and its copy lie there.
const END: usize = 4096;

/// A process. Its number may come again, with the time at which it started it does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// Field 22 of proc_pid_stat(5): ticks since the kernel's start.
    pub started: u64,
}

impl Process {
    /// The one that has this number now.
    pub fn of(proc: &Path, pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
        // The name may hold anything, parentheses too. Behind it field 3 is the first.
        let (_, fields) = stat.rsplit_once(')')?;
        Some(Self { pid, started: fields.split_whitespace().nth(19)?.parse().ok()? })
    }
}

/// Those that have not come back yet.
static OUT: Mutex<Vec<Process>> = Mutex::new(Vec::new());

fn out() -> MutexGuard<'static, Vec<Process>> {
    OUT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The agent's own processes that have not come back: they stay behind with the image's init.
pub fn left() -> Vec<Process> {
    out().clone()
}

/// Does it and waits for it.
fn run(words: &[&str]) {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(ALONE).args(words).stdin(Stdio::null());
    if let Err(error) = wait_for(&mut command) {
        println!("kiln-agent: {}: no process for it: {error}", words.join(" "));
    }
}

/// It is one of [`left`] meanwhile.
fn wait_for(command: &mut Command) -> std::io::Result<ExitStatus> {
    let mut child = command.spawn()?;
    // Until it is waited for, nobody else has its number.
    let process = Process::of(Path::new("/proc"), child.id());
    out().extend(process);
    let status = child.wait();
    out().retain(|other| Some(*other) != process);
    status
}

/// Offers a device to its driver.
pub(super) fn offer(probe: &Path, device: &str) {
    run(&[OFFER, &probe.to_string_lossy(), device]);
}

/// Loads modules whose devices are read while they are looked at.
pub(super) fn insert_alone(dir: &Path, module: &str, order: &[(String, String)]) {
    let dir = dir.to_string_lossy();
    let mut words = vec![INSERT, &*dir, module];
    words.extend(order.iter().flat_map(|(name, path)| [name.as_str(), path.as_str()]));
    run(&words);
}

/// Comes back once a disk has answered for its first and its last block, be it with an error.
pub fn answers(disk: &Path) {
    run(&[READ, &disk.to_string_lossy()]);
}

/// Whether a module's driver reads disks while it takes them.
pub(super) fn reads_disks(module: &str) -> bool {
    ["ata/", "block/", "message/", "mmc/", "nvme/", "scsi/", "usb/storage/"]
        .iter()
        .any(|kind| module.strip_prefix("kernel/drivers/").is_some_and(|rest| rest.starts_with(kind)))
}

/// Such a process.
pub fn main(arguments: impl Iterator<Item = String>) -> Result<()> {
    let words: Vec<String> = arguments.collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [OFFER, probe, device] => std::fs::write(probe, device).map_err(AgentError::file(probe)),
        [INSERT, dir, module, ref order @ ..] => {
            let order = order.chunks_exact(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect();
            insert(Path::new(dir), module, order);
            Ok(())
        }
        [READ, disk] => read_ends(Path::new(disk)).map_err(AgentError::file(disk)),
        _ => Err(AgentError::Usage(format!("kiln-agent {ALONE}: the agent calls itself so"))),
    }
}

fn read_ends(disk: &Path) -> std::io::Result<()> {
    let mut file = File::open(disk)?;
    let mut block = [0; END];
    file.read_exact(&mut block)?;
    file.seek(SeekFrom::End(-i64::try_from(END).expect("a few KiB")))?;
    file.read_exact(&mut block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn words(words: &[&str]) -> std::vec::IntoIter<String> {
        words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn drivers_of_disks_are_known_by_their_place() {
        for module in ["kernel/drivers/block/virtio_blk.ko.xz", "kernel/drivers/ata/ahci.ko.xz"] {
            assert!(reads_disks(module), "{module}");
        }
        assert!(reads_disks("kernel/drivers/usb/storage/uas.ko.xz") && reads_disks("kernel/drivers/scsi/sd_mod.ko"));
        for module in
            ["kernel/drivers/net/virtio_net.ko.xz", "kernel/fs/erofs/erofs.ko.xz", "kernel/drivers/usb/core/x.ko"]
        {
            assert!(!reads_disks(module), "{module}");
        }
    }

    /// It reads a FIFO that nobody writes to, as another would a disk that hangs.
    #[test]
    fn a_process_that_does_not_come_back_is_known_by_its_number_and_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut command = Command::new("cat");
        command.arg(&fifo).stdout(Stdio::null());
        let hangs = std::thread::spawn(move || wait_for(&mut command).unwrap());
        // It has begun once the FIFO has its reader.
        let writer = File::options().write(true).open(&fifo).unwrap();
        let is_it = |process: &Process| {
            let line = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(fifo.to_str().unwrap())
        };
        let begun = Instant::now();
        let process = loop {
            if let Some(process) = left().into_iter().find(is_it) {
                break process;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "nobody knows it");
            std::thread::yield_now();
        };
        assert_eq!(Process::of(Path::new("/proc"), process.pid), Some(process));
        assert!(process.started > 0 && Process::of(Path::new("/proc"), std::process::id()) != Some(process));
        drop(writer);
        assert!(hangs.join().unwrap().success());
        assert!(!left().contains(&process), "it came back");
    }

    #[test]
    fn a_process_does_what_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (probe, disk) = (dir.path().join("probe"), dir.path().join("disk"));
        main(words(&[OFFER, probe.to_str().unwrap(), "virtio3"])).unwrap();
        assert_eq!(std::fs::read_to_string(&probe).unwrap(), "virtio3");
        File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        main(words(&[READ, disk.to_str().unwrap()])).unwrap();
        File::create(&disk).unwrap().set_len(100).unwrap();
        assert!(main(words(&[READ, disk.to_str().unwrap()])).is_err(), "too short for a disk");
        assert_eq!(main(words(&[])).unwrap_err().kind(), "usage");
    }
}
