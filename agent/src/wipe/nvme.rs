//! What an NVMe controller erases by itself: sanitise, which is the whole subsystem's, else format with a secure erase.
//! Source: NVM Express Base Specification 2.0, §5.17 (Identify), §5.14 (Format NVM), §5.24 (Sanitize), §5.16.1.21 (log).
//!
//! No controller that sanitises was at hand: neither QEMU's nor Linux's own (nvmet) does. That part is read against the
//! specification, and tested with a controller of bytes.

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

/// A controller, as far as erasing needs one.
trait Controller {
    /// Sends a command; what it answers goes to `data`.
    fn admin(&mut self, command: NvmeCommand, data: &mut [u8]) -> Result<()>;
    /// Which name space the disk is.
    fn name_space(&mut self) -> Result<u32>;
    /// A command follows that may take so long by itself.
    fn may_take(&mut self, long: Duration);
    /// Between two looks at what goes on by itself. Fails when the disk is given up.
    fn pause(&mut self) -> Result<()>;
}

/// The kernel's.
struct Kernels<'a> {
    disk: &'a File,
    deadline: Deadline<'a>,
}

impl Controller for Kernels<'_> {
    fn admin(&mut self, command: NvmeCommand, data: &mut [u8]) -> Result<()> {
        nvme_admin(self.disk, command, data)
    }

    fn name_space(&mut self) -> Result<u32> {
        nvme_name_space(self.disk)
    }

    fn may_take(&mut self, long: Duration) {
        self.deadline.extend(long);
    }

    fn pause(&mut self) -> Result<()> {
        self.deadline.check()?;
        sleep(Duration::from_secs(1));
        Ok(())
    }
}

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

/// What formats a name space to the form of blocks that it has (§5.14; the NVM command set's Identify: FLBAS at 26,
/// DPS at 29), with an erase of user data.
fn format_as_now(name_space: &[u8; 4096]) -> u32 {
    let (flbas, dps) = (u32::from(name_space[26]), u32::from(name_space[29]));
    // Which form and where its metadata is; how that protects, and at which end; the upper bits of the form's number.
    (flbas & 0x1f) | ((dps & 7) << 5) | (((dps >> 3) & 1) << 8) | (1 << 9) | (((flbas >> 5) & 3) << 12)
}

/// Erases by what the controller offers, and says by which name; none where it offers nothing.
pub fn erase(disk: &File, deadline: Deadline<'_>) -> Result<Option<&'static str>> {
    erase_by(&mut Kernels { disk, deadline })
}

fn erase_by(by: &mut impl Controller) -> Result<Option<&'static str>> {
    let mut controller = [0; 4096];
    let identify = |nsid, cns| NvmeCommand { opcode: 6, nsid, cdw10: cns, timeout_ms: QUICK_MS };
    by.admin(identify(0, 1), &mut controller)?;
    match way(&controller) {
        None => Ok(None),
        Some(Way::Format) => {
            let nsid = by.name_space()?;
            let mut name_space = [0; 4096];
            by.admin(identify(nsid, 0), &mut name_space)?;
            let cdw10 = format_as_now(&name_space);
            by.may_take(Duration::from_millis(FORMAT_MS.into()));
            by.admin(NvmeCommand { opcode: 0x80, nsid, cdw10, timeout_ms: FORMAT_MS }, &mut [])?;
            Ok(Some("nvme-format"))
        }
        Some(Way::Sanitise { action, name }) => {
            by.admin(NvmeCommand { opcode: 0x84, nsid: 0, cdw10: action, timeout_ms: QUICK_MS }, &mut [])?;
            loop {
                by.pause()?;
                let mut log = [0; 512];
                let cdw10 = 0x81 | (512 / 4 - 1) << 16;
                by.admin(NvmeCommand { opcode: 2, nsid: ALL_NAME_SPACES, cdw10, timeout_ms: QUICK_MS }, &mut log)?;
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
    use std::io::ErrorKind;

    /// A controller that answers with bytes, and knows what it was sent.
    struct Bytes {
        oacs: u8,
        sanicap: u8,
        /// FLBAS and DPS of its third name space, which is the disk.
        blocks: (u8, u8),
        /// SSTAT at each look; the last is all that follow. It refuses the command where there is none.
        states: Vec<u8>,
        /// Pauses until the disk is given up.
        patience: usize,
        /// Opcode, name space, CDW10, length of the answer.
        sent: Vec<(u8, u32, u32, usize)>,
        /// Milliseconds of each, in the same order.
        limits: Vec<u32>,
        announced: Vec<Duration>,
    }

    impl Bytes {
        fn new(oacs: u8, sanicap: u8, states: &[u8]) -> Self {
            let (sent, limits, announced) = (Vec::new(), Vec::new(), Vec::new());
            Self { oacs, sanicap, blocks: (0, 0), states: states.to_vec(), patience: 5, sent, limits, announced }
        }
    }

    impl Controller for Bytes {
        fn admin(&mut self, command: NvmeCommand, data: &mut [u8]) -> Result<()> {
            let NvmeCommand { opcode, nsid, cdw10, timeout_ms } = command;
            self.sent.push((opcode, nsid, cdw10, data.len()));
            self.limits.push(timeout_ms);
            match (opcode, nsid, cdw10 & 0xff) {
                (0x06, 0, 1) => (data[256], data[328]) = (self.oacs, self.sanicap),
                (0x06, 3, 0) => (data[26], data[29]) = self.blocks,
                (0x80, 3, _) => {}
                (0x84, 0, _) if !self.states.is_empty() => {}
                (0x02, ALL_NAME_SPACES, 0x81) => {
                    // SPROG, half of the way; what is beside SSTAT's state: passes of an overwrite, and that it was erased once.
                    (data[1], data[2], data[3]) = (0x80, self.states[0] | 0xf8, 1);
                    if self.states.len() > 1 {
                        self.states.remove(0);
                    }
                }
                _ => return Err(Error::other("NVMe command ended with status 0x2")),
            }
            Ok(())
        }

        fn name_space(&mut self) -> Result<u32> {
            Ok(3)
        }

        fn may_take(&mut self, long: Duration) {
            self.announced.push(long);
        }

        fn pause(&mut self) -> Result<()> {
            self.patience = self.patience.checked_sub(1).ok_or_else(|| Error::from(ErrorKind::TimedOut))?;
            Ok(())
        }
    }

    const IDENTIFY: (u8, u32, u32, usize) = (0x06, 0, 1, 4096);
    /// 128 double words of page 81h.
    const LOG: (u8, u32, u32, usize) = (0x02, 0xffff_ffff, 0x007f_0081, 512);

    #[test]
    fn a_sanitise_is_sent_once_and_looked_at_until_it_has_ended() {
        for (sanicap, action, name) in [(0b111, 2, "nvme-sanitize-block"), (0b101, 4, "nvme-sanitize-crypto")] {
            for ended in [1, 4] {
                let mut controller = Bytes::new(0b10, sanicap, &[2, 2, ended]);
                assert_eq!(erase_by(&mut controller).unwrap(), Some(name));
                assert_eq!(controller.sent, [IDENTIFY, (0x84, 0, action, 0), LOG, LOG, LOG]);
                assert!(controller.limits.iter().all(|limit| *limit == QUICK_MS), "{:?}", controller.limits);
            }
        }
    }

    #[test]
    fn a_sanitise_that_fails_never_began_or_never_ends_is_none() {
        let outcome = |states: &[u8]| {
            let mut controller = Bytes::new(0, 0b010, states);
            (erase_by(&mut controller).unwrap_err(), controller.sent.len())
        };
        let (failed, sent) = outcome(&[2, 3]);
        assert_eq!((failed.to_string(), sent), ("its sanitise failed".to_owned(), 4));
        assert!(outcome(&[0]).0.to_string().contains("never sanitised"));
        let (late, sent) = outcome(&[2]);
        assert_eq!(
            (late.kind(), sent),
            (ErrorKind::TimedOut, 2 + 5),
            "looked at as long as the disk has, and no longer"
        );
        let (refused, sent) = outcome(&[]);
        assert_eq!((refused.to_string().contains("status 0x2"), sent), (true, 2), "{refused}");
    }

    #[test]
    fn a_format_keeps_the_form_of_the_blocks() {
        let mut controller = Bytes::new(0b10, 0b100, &[]);
        // Form 2 with metadata in the block that protects by type 1, in its first bytes; then form 17 of many, without any.
        for (blocks, cdw10) in [((0x12, 0b1001), 0x332), ((0x21, 0), 0x1201), ((0, 0), 0x200)] {
            controller.blocks = blocks;
            controller.sent.clear();
            assert_eq!(erase_by(&mut controller).unwrap(), Some("nvme-format"));
            assert_eq!(controller.sent, [IDENTIFY, (0x06, 3, 0, 4096), (0x80, 3, cdw10, 0)], "{blocks:x?}");
        }
        assert_eq!(controller.limits[2], FORMAT_MS);
        assert_eq!(controller.announced[0], Duration::from_secs(6 * 3600), "a format may erase for hours");
    }

    #[test]
    fn a_controller_that_offers_nothing_is_sent_nothing() {
        let mut controller = Bytes::new(0b1101, 0b100, &[2, 1]);
        assert_eq!(erase_by(&mut controller).unwrap(), None);
        assert_eq!(controller.sent, [IDENTIFY]);
    }

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
