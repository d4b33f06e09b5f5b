//! What a disk may hold up for ever is done by a process of its own, and a thread waits for that. A thread of PID 1 must not
//! do it: it could not be ended, and execve(2) of the image's init waits for every thread, and closes what each has open,
//! which waits for the disk as well. A process that does not come back is left to the image's init.

use super::insert;
use crate::error::{AgentError, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

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

/// Does it and waits for it.
fn run(words: &[&str]) {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(ALONE).args(words).stdin(Stdio::null());
    if let Err(error) = command.status() {
        println!("kiln-agent: {}: no process for it: {error}", words.join(" "));
    }
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
