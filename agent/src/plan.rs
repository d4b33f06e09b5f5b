//! The agent's decisions, without doing anything: which release to boot, and whether it may.

use crate::error::{AgentError, Result};
use crate::memory::Memory;
use jiff::Timestamp;
use kiln_protocol::{Assignment, ReleaseId};
use kiln_release::Manifest;

/// What to do about an assignment that has passed its checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The release this UKI embeds, or that runs, is the assigned one.
    Stay,
    /// Another release is assigned: fetch it, verify it, and go there.
    Change(ReleaseId),
}

/// What is known of time and of the metadata's age.
#[derive(Debug, Clone)]
pub struct Currency {
    /// The time floor, moved by the director's freshness statement.
    pub now: Timestamp,
    /// The metadata file that has expired at `now`, and when.
    pub stale: Option<(String, Timestamp)>,
}

/// Decides. Expiry stops change, not return: with expired metadata or an expired assignment the release that this
/// UKI embeds may still be booted if it is the assigned one; a different one is not started.
pub fn decide(here: &ReleaseId, assignment: &Assignment, memory: &Memory, currency: &Currency) -> Result<Plan> {
    let floor = memory.floor(assignment.image.as_str());
    // check_assignment refuses releases below the floor; this one speaks of the boot image itself.
    if here.image == assignment.image && here.release < floor && here.release == assignment.release {
        return Err(AgentError::BelowFloor { image: here.image.to_string(), release: here.release, floor });
    }
    let assigned = assignment.release_id();
    if assigned == *here {
        return Ok(Plan::Stay);
    }
    if assignment.expires <= currency.now {
        let expires = assignment.expires.to_string();
        return Err(AgentError::AssignmentExpired { release: assigned.to_string(), expires });
    }
    if let Some((what, expires)) = &currency.stale {
        return Err(AgentError::StaleMetadata { what: what.clone(), expires: expires.to_string() });
    }
    Ok(Plan::Change(assigned))
}

/// Whether a kernel runs with the command line that its release signs. Firmware and loaders may add which files they
/// loaded (`initrd=`, `BOOT_IMAGE=`): those words name nothing that the kernel acts on once it runs.
pub fn command_line_is(running: &str, signed: &str) -> bool {
    let words = |line: &str| -> Vec<String> {
        let loaders = |w: &&str| !w.starts_with("initrd=") && !w.starts_with("BOOT_IMAGE=");
        line.split_whitespace().filter(loaders).map(str::to_owned).collect()
    };
    words(running) == words(signed)
}

/// That a release whose policy says so does not start with another command line than its own.
pub fn check_command_line(manifest: &Manifest, signed: &str, running: &str) -> Result<()> {
    if manifest.policy.refuse_foreign_command_line && !command_line_is(running, signed) {
        return Err(AgentError::CommandLine { expected: signed.to_owned(), got: running.to_owned() });
    }
    Ok(())
}

/// What stands against a kexec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    Kexec,
    Cold,
}

/// Memory that a kexec must leave: kernel, drivers, page tables.
const MARGIN: u64 = 160 << 20;

/// How to leave for a release whose root has `root` bytes and whose kernel and initramfs have `boot` bytes together,
/// when a kexec is wanted. The root is held once here, once more in the initrd while it is loaded, and twice in the
/// new kernel while it unpacks.
pub fn may_kexec(available: u64, root: u64, boot: u64) -> Leave {
    if available >= root + 2 * boot + MARGIN { Leave::Kexec } else { Leave::Cold }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::{ASSIGNMENT_TYPE, Architecture, BoundMachine, SPEC_VERSION};

    fn assignment(release: u64) -> Assignment {
        Assignment {
            type_: ASSIGNMENT_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            machine: BoundMachine {
                id: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
                key: "aa".repeat(32).parse().unwrap(),
            },
            image: "minimal".parse().unwrap(),
            release,
            manifest_sha256: "bb".repeat(32).parse().unwrap(),
            role: "lab".into(),
            arch: Architecture::X86_64,
            sequence: 1,
            rebuild: 0,
            settings: kiln_protocol::RoleSettings::default(),
            issued: "2026-01-01T00:00:00Z".parse().unwrap(),
            expires: "2026-02-01T00:00:00Z".parse().unwrap(),
        }
    }

    #[test]
    fn expiry_stops_change_not_return() {
        let here: ReleaseId = "minimal/1".parse().unwrap();
        let memory = Memory::default();
        let late: Timestamp = "2026-03-01T00:00:00Z".parse().unwrap();
        let early: Timestamp = "2026-01-15T00:00:00Z".parse().unwrap();
        let stale = ("targets.json".to_owned(), early);
        let expired = Currency { now: late, stale: Some(stale.clone()) };
        assert_eq!(decide(&here, &assignment(1), &memory, &expired).unwrap(), Plan::Stay);
        assert_eq!(decide(&here, &assignment(2), &memory, &expired).unwrap_err().kind(), "assignment-expired");
        let stale_only = Currency { now: early, stale: Some(stale) };
        assert_eq!(decide(&here, &assignment(2), &memory, &stale_only).unwrap_err().kind(), "metadata-stale");
        let current = Currency { now: early, stale: None };
        assert_eq!(
            decide(&here, &assignment(2), &memory, &current).unwrap(),
            Plan::Change("minimal/2".parse().unwrap())
        );
    }

    #[test]
    fn a_release_below_the_floor_is_not_booted() {
        let here: ReleaseId = "minimal/1".parse().unwrap();
        let memory = Memory { floors: [("minimal".to_owned(), 2)].into(), ..Memory::default() };
        let now = Currency { now: "2026-01-15T00:00:00Z".parse().unwrap(), stale: None };
        assert_eq!(decide(&here, &assignment(1), &memory, &now).unwrap_err().kind(), "release-below-floor");
    }

    #[test]
    fn a_loaders_words_are_no_drift_and_all_others_are() {
        assert!(command_line_is("console=ttyS0 quiet initrd=initramfs\n", "console=ttyS0 quiet"));
        assert!(command_line_is("BOOT_IMAGE=kernel console=ttyS0", "console=ttyS0"));
        assert!(!command_line_is("console=ttyS0 init=/bin/sh", "console=ttyS0"));
        assert!(!command_line_is("", "console=ttyS0"));
    }

    #[test]
    fn a_foreign_command_line_starts_nothing_where_the_release_says_so() {
        let mut manifest = crate::testing::TestSite::new(1).manifests[&1].clone();
        let check = |manifest: &Manifest, running| {
            check_command_line(manifest, "console=ttyS0", running).map_err(|error| error.kind())
        };
        manifest.policy.refuse_foreign_command_line = false;
        assert_eq!(check(&manifest, "console=ttyS0 init=/bin/sh"), Ok(()), "elsewhere it is drift, and told");
        manifest.policy.refuse_foreign_command_line = true;
        assert_eq!(check(&manifest, "console=ttyS0 init=/bin/sh"), Err("command-line-mismatch"));
        assert_eq!(check(&manifest, "initrd=initramfs console=ttyS0"), Ok(()));
    }

    #[test]
    fn kexec_needs_memory() {
        assert_eq!(may_kexec(1 << 30, 70 << 20, 20 << 20), Leave::Kexec);
        assert_eq!(may_kexec(250 << 20, 70 << 20, 20 << 20), Leave::Cold);
    }
}
