//! A disk that answers when it is looked at, and hangs when its slot is read. The boot that meets it ends, as its root lies there;
//! so would each boot after it. The next one leaves the disk alone and runs in memory, the one after that tries the disk again.

use super::Memory;
use crate::disk::DiskError;
use crate::error::AgentError;

/// As long as the kernel's names of disks are (`DISK_NAME_LEN` of linux/blkdev.h).
const NAME: usize = 32;

impl Memory {
    /// This error ends the boot. Whether a disk is to be left alone by the next because of it.
    pub fn disk_hangs(&mut self, error: &AgentError) -> bool {
        let AgentError::Disk(DiskError::Late { disk, .. }) = error else { return false };
        self.disk_hung = Some(disk.chars().filter(char::is_ascii_alphanumeric).take(NAME).collect());
        true
    }
}
