//! The disk in the firmware's boot order (UEFI 2.10 §3.1, §3.3): a boot option of Kiln's own that names the loader on
//! this very partition, first, or last where the machine's role asks the network first. What else the firmware boots
//! stays in the order: an ESP that cannot be read falls through to the network, a network without an answer to the disk. Without the option the loader is still found at `EFI/BOOT`, where firmware looks last.

use super::gpt::Guid;
use crate::error::{AgentError, Result};
use crate::memory::write_variable;
use crate::sys;
use std::path::{Path, PathBuf};

const EFIVARS: &str = "/sys/firmware/efi/efivars";
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// Which partition the boot program was started from. Boot loader and stub say so, of nothing that came over the network; it goes
/// with the power, and stays over a kexec (systemd's Boot Loader Interface).
const STARTED_FROM: &str = "LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// `K` and the slot's tens: a number that firmware, which counts from 0, does not reach.
const NUMBER: u16 = 0x4b10;
const LOADER: &str = "\\EFI\\systemd\\systemd-bootx64.efi";

fn variable(name: &str) -> PathBuf {
    Path::new(EFIVARS).join(format!("{name}-{GLOBAL}"))
}

/// `EFI_LOAD_OPTION`: the file on the partition with this number, first sector, length and GUID.
fn load_option((number, start, sectors, id): (u32, u64, u64, Guid)) -> Vec<u8> {
    let mut path = Vec::new();
    let mut node = |kind: u8, sub: u8, data: &[u8]| {
        path.extend([kind, sub]);
        path.extend(u16::try_from(data.len() + 4).expect("a few dozen bytes").to_le_bytes());
        path.extend(data);
    };
    let utf16 = |text: &str| -> Vec<u8> { text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect() };
    let place = [&number.to_le_bytes()[..], &start.to_le_bytes(), &sectors.to_le_bytes(), &id, &[2, 2]].concat();
    node(0x04, 0x01, &place);
    node(0x04, 0x04, &utf16(LOADER));
    node(0x7f, 0xff, &[]);
    let length = u16::try_from(path.len()).expect("a few dozen bytes");
    // LOAD_OPTION_ACTIVE
    [&1_u32.to_le_bytes()[..], &length.to_le_bytes(), &utf16("Kiln"), &path].concat()
}

/// The order with the disk first, or last; none if it is so already.
fn with_disk(order: &[u8], number: u16, network_first: bool) -> Option<Vec<u8>> {
    let known: Vec<[u8; 2]> = order.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect();
    let number = number.to_le_bytes();
    let mut wanted: Vec<[u8; 2]> = known.iter().copied().filter(|n| *n != number).collect();
    wanted.insert(if network_first { wanted.len() } else { 0 }, number);
    (wanted != known).then(|| wanted.concat())
}

/// Whether firmware's way to this boot began on a disk: the next would begin there again.
pub fn is_from_disk() -> bool {
    said_by_this_boot(&Path::new(EFIVARS).join(STARTED_FROM))
}

/// Whether the variable is there and goes with the power, as loader and stub write it. One that stays was made by whoever had
/// root's rights once, and would be believed of every boot: it is removed.
fn said_by_this_boot(path: &Path) -> bool {
    const NON_VOLATILE: u8 = 1;
    let Ok(bytes) = std::fs::read(path) else { return false };
    if bytes.first().is_none_or(|attributes| attributes & NON_VOLATILE == 0) {
        return true;
    }
    let unlocked = std::fs::File::open(path).and_then(|file| sys::clear_immutable(&file));
    let is_gone = match unlocked.and_then(|()| std::fs::remove_file(path)) {
        Ok(()) => "it is removed".to_owned(),
        Err(error) => format!("it cannot be removed: {error}"),
    };
    println!("kiln-agent: {STARTED_FROM} was not said by this boot, but kept from another: {is_gone}");
    false
}

/// Puts the disk in its place, if it is not there; whether it was not. Writes nothing that is so already: variables wear.
pub fn put(esp: (u32, u64, u64, Guid), network_first: bool) -> Result<bool> {
    let read = |path: &Path| std::fs::read(path).ok().and_then(|bytes| bytes.get(4..).map(<[u8]>::to_vec));
    let option = load_option(esp);
    let path = variable(&format!("Boot{NUMBER:04X}"));
    if read(&path).as_ref() != Some(&option) {
        write_variable(&path, &option).map_err(AgentError::file(&path))?;
    }
    let path = variable("BootOrder");
    match with_disk(&read(&path).unwrap_or_default(), NUMBER, network_first) {
        Some(order) => write_variable(&path, &order).map(|()| true).map_err(AgentError::file(&path)),
        None => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_comes_first_or_last_and_nothing_is_lost() {
        let first = |order: &[u8]| with_disk(order, 0x4b10, false);
        assert_eq!(first(&[0, 0, 1, 0]), Some(vec![0x10, 0x4b, 0, 0, 1, 0]));
        assert_eq!(first(&[1, 0, 0x10, 0x4b]), Some(vec![0x10, 0x4b, 1, 0]));
        assert_eq!(first(&[0x10, 0x4b, 1, 0]), None);
        assert_eq!(first(&[]), Some(vec![0x10, 0x4b]));
        let last = |order: &[u8]| with_disk(order, 0x4b10, true);
        assert_eq!(last(&[0x10, 0x4b, 0, 0, 1, 0]), Some(vec![0, 0, 1, 0, 0x10, 0x4b]));
        assert_eq!(last(&[0, 0, 0x10, 0x4b]), None);
    }

    #[test]
    fn what_stays_without_power_is_no_word_of_this_boot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(STARTED_FROM);
        assert!(!said_by_this_boot(&path), "nothing is said");
        // Attributes: boot service and runtime access; the same, and non-volatile.
        std::fs::write(&path, [6, 0, 0, 0, b'x', 0]).unwrap();
        assert!(said_by_this_boot(&path) && path.exists());
        std::fs::write(&path, [7, 0, 0, 0, b'x', 0]).unwrap();
        assert!(!said_by_this_boot(&path));
    }

    /// As `efibootmgr -v` shows one: HD(1,GPT,…,0x800,0x80000)/File(\EFI\systemd\systemd-bootx64.efi).
    #[test]
    fn the_option_names_partition_and_file() {
        let option = load_option((1, 0x800, 0x80000, [7; 16]));
        let path = usize::from(u16::from_le_bytes([option[4], option[5]]));
        assert_eq!(option.len(), 6 + 10 + path);
        assert_eq!(option[16..20], [4, 1, 42, 0], "a hard-drive node of 42 bytes");
        assert_eq!(option[16 + 40..16 + 42], [2, 2], "GPT, and its GUID");
        assert_eq!(option[option.len() - 4..], [0x7f, 0xff, 4, 0]);
    }
}
