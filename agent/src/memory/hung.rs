//! A disk that answers when it is looked at, and hangs when its slot is read. The boot that meets it ends, as its root lies there;
//! so would each boot after it. The next one leaves the disk alone and runs in memory, the one after that tries the disk again.
//!
//! A kexec out of such a boot may hang as well, until the machine is reset, and firmware starts the same UKI again: that is tried a few
//! times for one assignment.

use super::Memory;
use crate::disk::DiskError;
use crate::error::AgentError;

/// As long as the kernel's names of disks are (`DISK_NAME_LEN` of linux/blkdev.h).
const NAME: usize = 32;

/// So often a kexec is tried beside what gives no answer, for one assignment.
const KEXECS: u8 = 3;

impl Memory {
    /// This error ends the boot. Whether a disk is to be left alone by the next because of it.
    pub fn disk_hangs(&mut self, error: &AgentError) -> bool {
        let AgentError::Disk(DiskError::Late { disk, .. }) = error else { return false };
        self.disk_hung = Some(disk.chars().filter(char::is_ascii_alphanumeric).take(NAME).collect());
        true
    }

    /// Whether a kexec under this sequence may be tried once more beside what gives no answer.
    pub fn may_kexec(&self, sequence: u64) -> bool {
        self.kexecs.is_none_or(|(under, tried)| under != sequence || tried < KEXECS)
    }

    /// One is tried. Where the next release comes up by it that is forgotten.
    pub fn tries_kexec(&mut self, sequence: u64) {
        let tried = self.kexecs.filter(|(under, _)| *under == sequence).map_or(0, |(_, tried)| tried);
        self.kexecs = Some((sequence, tried.saturating_add(1)));
    }
}
