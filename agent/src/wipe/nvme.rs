//! What an NVMe controller erases by itself: sanitise, which is the whole subsystem's, else format with a secure erase.
//! Source: NVM Express Base Specification 2.0, §5.17 (Identify), §5.14 (Format NVM), §5.24 (Sanitize), §5.16.1.21 (log).

use super::erase::Deadline;
use crate::sys::{NvmeCommand, nvme_admin, nvme_name_space};
use std::fs::File;
use std::io::{Error, Result};
use std::thread::sleep;
use std::time::Duration;

/// Longest that one command takes: a format may erase all there is.
const FORMAT_MS: u32 = 6 * 3600 * 1000;
const QUICK_MS: u32 = 60_000;
const ALL_NAME_SPACES: u32 = 0xffff_ffff;

/// How.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Sanitize with this action (§5.24, figure 304).
    Sanitise { action: u32, name: &'static str },
    /// Format NVM, secure erase setting 1: user data erase.
    Format,
}

/// Decides by the controller's own data (§5.17.2.1): OACS at 256, SANICAP at 328.
fn way(controller: &[u8; 4096]) -> Option<Way> {
    let capabilities = u32::from_le_bytes([controller[328], controller[329], controller[330], controller[331]]);
    let formats = controller[256] & 2 != 0;
    match (capabilities & 2 != 0, capabilities & 1 != 0, formats) {
        (true, ..) => Some(Way::Sanitise { action: 2, name: "nvme-sanitize-block" }),
        (false, true, _) => Some(Way::Sanitise { action: 4, name: "nvme-sanitize-crypto" }),
        (false, false, true) => Some(Way::Format),
        (false, false, false) => None,
    }
}

/// Where a sanitise is, by its log page (§5.16.1.21).
fn state(log: &[u8; 512]) -> Result<bool> {
    match log[2] & 7 {
        1 | 4 => Ok(true),
        2 => Ok(false),
        3 => Err(Error::other("its sanitise failed")),
        _ => Err(Error::other("it says that it was never sanitised")),
    }
}

/// Erases by what the controller offers, and says by which name; none where it offers nothing.
pub fn erase(disk: &File, deadline: Deadline<'_>) -> Result<Option<&'static str>> {
    let mut controller = [0; 4096];
    let identify = |nsid, cns| NvmeCommand { opcode: 6, nsid, cdw10: cns, timeout_ms: QUICK_MS };
    nvme_admin(disk, identify(0, 1), &mut controller)?;
    match way(&controller) {
        None => Ok(None),
        Some(Way::Format) => {
            let nsid = nvme_name_space(disk)?;
            let mut name_space = [0; 4096];
            nvme_admin(disk, identify(nsid, 0), &mut name_space)?;
            // The same form of blocks as now (FLBAS), with a secure erase of user data.
            let cdw10 = u32::from(name_space[26] & 0xf) | 1 << 9;
            deadline.extend(Duration::from_millis(FORMAT_MS.into()));
            nvme_admin(disk, NvmeCommand { opcode: 0x80, nsid, cdw10, timeout_ms: FORMAT_MS }, &mut [])?;
            Ok(Some("nvme-format"))
        }
        Some(Way::Sanitise { action, name }) => {
            nvme_admin(disk, NvmeCommand { opcode: 0x84, nsid: 0, cdw10: action, timeout_ms: QUICK_MS }, &mut [])?;
            loop {
                deadline.check()?;
                sleep(Duration::from_secs(1));
                let mut log = [0; 512];
                let cdw10 = 0x81 | (512 / 4 - 1) << 16;
                let page = NvmeCommand { opcode: 2, nsid: ALL_NAME_SPACES, cdw10, timeout_ms: QUICK_MS };
                nvme_admin(disk, page, &mut log)?;
                if state(&log)? {
                    return Ok(Some(name));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_that_is_offered_is_taken() {
        let controller = |oacs: u8, sanicap: u8| {
            let mut data = [0; 4096];
            (data[256], data[328]) = (oacs, sanicap);
            data
        };
        let block = Way::Sanitise { action: 2, name: "nvme-sanitize-block" };
        let crypto = Way::Sanitise { action: 4, name: "nvme-sanitize-crypto" };
        for (oacs, sanicap, expected) in [
            (0, 0, None),
            (0b10, 0, Some(Way::Format)),
            (0b1101, 0, None),
            (0b10, 0b100, Some(Way::Format)),
            (0b10, 0b001, Some(crypto)),
            (0b10, 0b111, Some(block)),
            (0, 0b010, Some(block)),
        ] {
            assert_eq!(way(&controller(oacs, sanicap)), expected, "{oacs:#b} {sanicap:#b}");
        }
    }

    #[test]
    fn a_sanitise_has_ended_only_when_its_log_says_so() {
        let log = |status| {
            let mut log = [0; 512];
            log[2] = status;
            state(&log)
        };
        assert!(log(1).unwrap() && log(4).unwrap() && !log(2).unwrap());
        assert!(log(3).unwrap_err().to_string().contains("failed") && log(0).is_err());
        assert!(log(0b1001).unwrap(), "the other bits say something else");
    }
}
