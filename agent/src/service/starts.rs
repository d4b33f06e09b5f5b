//! Starts of this service that came to nothing. The image's init begins it again for ever, and one that fails each time says
//! nothing to its server while each start opens, and so pets, the hardware watchdog. After some in a row the machine is left by
//! the firmware: its initramfs reports, and what never becomes healthy is counted there.

use super::leave::Door;
use crate::error::{AgentError, Result};
use kiln_protocol::Via;
use std::path::Path;

/// Where they are counted: in memory, for one boot.
pub(super) const PATH: &str = "/run/kiln/service-starts";
/// So many in a row. A start that dies without a word counts as well.
const MOST: u32 = 5;

/// Counts one that begins; gives back how many before it came to nothing. Where they cannot be counted that is none: nothing is
/// left for it.
pub(super) fn count(path: &Path) -> u32 {
    let failed = std::fs::read_to_string(path).ok().and_then(|text| text.parse().ok()).unwrap_or(0_u32);
    let counted = std::fs::write(path, failed.saturating_add(1).min(MOST).to_string()).map_err(AgentError::file(path));
    if let Err(error) = counted {
        eprintln!("kiln-agent: starts of this service are not counted: {error}");
    }
    failed
}

/// Goes on, or leaves the machine for good. Comes back from that only with an error.
pub(super) async fn check(failed: u32, door: &Door) -> Result<()> {
    if failed < MOST {
        return Ok(());
    }
    eprintln!("kiln-agent: this service failed {failed} times in a row: the machine restarts");
    Err(door.go(Via::Cold).await)
}

/// This one came up: its first report was answered, or its first checks were made.
pub(super) fn came_up(path: &Path) {
    // What stays counted is one more of a later start that fails.
    let _ = std::fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::reboot::RebootMode;

    fn stays(mode: RebootMode) -> std::io::Error {
        std::io::Error::other(format!("the test stays in the room: {mode:?}"))
    }

    #[test]
    fn a_service_that_fails_at_each_start_leaves_by_the_firmware() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("service-starts");
        let door = Door { systemctl: dir.path().join("none"), reboot: stays };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let start = || runtime.block_on(check(count(&path), &door));
        for n in 1..=MOST {
            assert!(start().is_ok(), "start {n}");
        }
        for _ in 0..2 {
            let left = start().unwrap_err().to_string();
            assert!(left.contains("leaving for the next release") && left.contains("RB_AUTOBOOT"), "{left}");
        }
        // In a row: one that came up ends it.
        came_up(&path);
        for n in 1..=MOST {
            assert!(start().is_ok(), "start {n} behind one that came up");
        }
        // What cannot be read, or written, leaves nothing.
        std::fs::write(&path, "?").unwrap();
        assert!(start().is_ok());
        let nowhere = dir.path().join("no-folder/service-starts");
        for _ in 0..=MOST {
            assert_eq!(count(&nowhere), 0);
        }
    }
}
