//! Agent ⇄ server, version 1: one POST of a [`Report`], answered by a [`crate::Reply`]. JSON over mutual TLS.
//!
//! Both sides ignore fields they do not know, so that either may be newer.

use crate::acceptance::Acceptance;
use crate::attestation::TpmPresence;
use crate::condition::Condition;
use crate::dbx::DbxState;
use crate::exec::ExecState;
use crate::ids::IdError;
use crate::ids::{Architecture, ImageName, MachineId, Nonce, Sha256Hex, word_enum};
use crate::log::printable;
use crate::secrets::{SECRETS_OF_A_RELEASE, SecretVersions};
use crate::slot::Fallback;
use crate::stage::StageRecord;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Where reports are posted.
pub const REPORT_PATH: &str = "/agent/v1/report";
/// DHCP option 60 (RFC 2132 §9.13) that the agent sends, so that Kiln can say where it is.
pub const VENDOR_CLASS: &str = "KilnAgent";
/// Sub-option of DHCP option 43 in Kiln's answer to [`VENDOR_CLASS`]: base URL of artifacts, ASCII.
pub const VENDOR_OPTION_HTTP_URL: u8 = 1;
/// Sub-option of DHCP option 43 in Kiln's answer to [`VENDOR_CLASS`]: base URL of the agent API, ASCII.
pub const VENDOR_OPTION_AGENT_URL: u8 = 2;

word_enum! {
    /// How the machine booted.
    Firmware {
        /// UEFI.
        Uefi = "uefi",
        /// Legacy BIOS.
        Bios = "bios",
    }
}

word_enum! {
    /// Where the machine's identity key lives: how strong its name is.
    KeyStorage {
        /// Sealed by the TPM in an EFI variable: of no use without that TPM.
        Tpm = "tpm",
        /// An EFI variable: survives reboots, readable by root; shown as weak.
        EfiVariable = "efi-variable",
        /// A file, given with `kiln-agent stage --state`.
        File = "file",
        /// New at each boot: the machine is only a name.
        Ephemeral = "ephemeral",
    }
}

word_enum! {
    /// Where the highest versions seen are kept.
    RollbackMemory {
        /// The TPM's own memory.
        TpmNv = "tpm-nv",
        /// An EFI variable.
        EfiVariable = "efi-variable",
        /// A file, given with `kiln-agent stage --state`.
        File = "file",
        /// Nowhere: an older, validly signed repository is not noticed after a reboot.
        None = "none",
    }
}

word_enum! {
    /// What a machine's boot can promise.
    ProtectionClass {
        /// Secure Boot with the site's key only.
        Enforced = "enforced",
        /// TPM quote checked.
        Attested = "attested",
        /// Neither.
        Unprotected = "unprotected",
    }
}

word_enum! {
    /// How a machine leaves for another release.
    Via {
        /// The new kernel is started directly.
        Kexec = "kexec",
        /// Through firmware.
        Cold = "cold",
    }
}

/// What the machine says it is. For people and for pre-loaded lists; it proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// SMBIOS system UUID.
    pub id: MachineId,
    /// MAC addresses, `52:54:00:00:00:01`, sorted.
    pub macs: Vec<String>,
    /// SMBIOS manufacturer and product name.
    pub product: String,
    /// SMBIOS serial number; empty if it has none.
    pub serial: String,
    /// How it booted.
    pub firmware: Firmware,
    /// Its architecture.
    pub arch: Architecture,
    /// Where its identity key lives.
    pub key_storage: KeyStorage,
    /// Where its rollback memory lives.
    pub rollback_memory: RollbackMemory,
    /// What its boot can promise.
    pub protection: ProtectionClass,
    /// `MemTotal` in bytes.
    pub memory_bytes: u64,
    /// What it found of a TPM; none: an agent that does not look for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmPresence>,
}

/// A release that runs, or that the UKI embeds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningRelease {
    /// Image.
    pub image: ImageName,
    /// Release number.
    pub release: u64,
    /// dm-verity root hash. In [`Report::running`] it is read back from the kernel's device-mapper table.
    pub root_hash: Sha256Hex,
}

/// The judgement of the health checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// All checks pass and have done so for the soak time.
    pub healthy: bool,
    /// Which check fails or how long the soak still lasts, in a sentence.
    pub detail: String,
}

/// How far the next release is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefetch {
    /// Which image.
    pub image: ImageName,
    /// Which release.
    pub release: u64,
    /// Sequence of the assignment that asks for it.
    pub sequence: u64,
    /// Fetched and verified, ready to go.
    pub ready: bool,
    /// How much of it has come, once its size is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

impl Prefetch {
    /// Whether the other says the same but for progress within one tenth of the way: news that is worth no commit.
    pub fn says_as_much_as(&self, other: &Self) -> bool {
        let tenths = |p: &Self| p.progress.map(Progress::tenths);
        let rest = |p: &Self| Self { progress: None, ..p.clone() };
        tenths(self) == tenths(other) && rest(self) == rest(other)
    }
}

/// How far a transfer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes received, over all files of the release.
    pub received_bytes: u64,
    /// Bytes that the release's manifest names for them.
    pub total_bytes: u64,
}

impl Progress {
    /// Tenths of the way, 0 to 10; whoever claims more than all has all.
    pub fn tenths(self) -> u64 {
        let tenths = u128::from(self.received_bytes) * 10 / u128::from(self.total_bytes.max(1));
        u64::try_from(tenths).unwrap_or(u64::MAX).min(10)
    }
}

/// What the agent costs the machine, as its kernel counts it (proc_pid_status(5), proc_pid_stat(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentMemory {
    /// `VmRSS`: resident now, bytes.
    pub rss_bytes: u64,
    /// `VmHWM`: the most that ever was resident, bytes.
    pub peak_bytes: u64,
    /// Processor time that it has had since it started, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_ms: Option<u64>,
    /// The same of the programs that it ran to their end: health checks and hooks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ran_ms: Option<u64>,
}

/// What the agent posts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The kernel's boot id (`/proc/sys/kernel/random/boot_id`): one per kernel start, also after kexec.
    pub boot_id: String,
    /// Counts reports of this boot from 1, over the hand-over; a lower one than seen is a stray and changes nothing.
    pub seq: u64,
    /// Who it is.
    pub machine: MachineFacts,
    /// For this reply's freshness statement.
    pub nonce: Nonce,
    /// What its UKI embeds.
    pub embedded: RunningRelease,
    /// What runs after the hand-over, read from the kernel; none in the initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<RunningRelease>,
    /// Every stage record since the last report the server answered, oldest first; at most 256.
    #[serde(default)]
    pub stages: Vec<StageRecord>,
    /// Milliseconds since the agent's start of this boot, when this report was made.
    pub at_ms: u64,
    /// The health judgement, once checks run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// The prefetch, if one is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<Prefetch>,
    /// In disk mode: the newest trial that failed on this machine by its boot loader's count or its disk's fault, until
    /// a newer one is good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
    /// What the agent itself costs: of PID 1 in the initramfs, of the service once the release runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_memory: Option<AgentMemory>,
    /// Allow-listing of programs, where the release asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecState>,
    /// What came of the site's list of revoked boot programs, once it was offered to this boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dbx: Option<DbxState>,
    /// Drift, draining and events; of a running system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<Condition>,
    /// The acceptance run, of a release of class `acceptance`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acceptance: Option<Acceptance>,
    /// The secrets it holds; none: its release wants none, or its agent knows of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets: Option<SecretVersions>,
    /// Seconds the server may hold this report until the desired state differs from [`Report::desired_etag`]; 0: none.
    #[serde(default)]
    pub wait_s: u32,
    /// [`crate::Desired::etag`] of the last reply.
    #[serde(default)]
    pub desired_etag: String,
}

impl Report {
    /// Cuts what an agent can make long, and makes visible what could pass for something else. The server's record of the
    /// machine cuts the rest, each where it is kept.
    pub fn tame(&mut self) {
        fn cut(text: &mut String, max: usize) {
            let tame: String = text.chars().filter(|c| !c.is_control()).take(max).collect();
            *text = printable(&tame);
        }
        let machine = &mut self.machine;
        machine.macs.truncate(32);
        machine.macs.retain(|mac| is_mac(mac));
        cut(&mut machine.product, 128);
        cut(&mut machine.serial, 128);
        self.stages.truncate(256);
        cut(&mut self.boot_id, 64);
        if let Some(health) = &mut self.health {
            cut(&mut health.detail, 500);
        }
        self.exec.iter_mut().for_each(ExecState::tame);
        if let Some(held) = &mut self.secrets {
            while held.len() > SECRETS_OF_A_RELEASE {
                held.pop_last();
            }
        }
        self.dbx.iter_mut().for_each(DbxState::tame);
    }
}

/// `52:54:00:00:00:01`, in lower case.
fn is_mac(text: &str) -> bool {
    text.len() == 17
        && text.bytes().enumerate().all(|(i, b)| match i % 3 {
            2 => b == b':',
            _ => matches!(b, b'0'..=b'9' | b'a'..=b'f'),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Desired, Difference, Draining, DriftKind, Noted, SpoolReport};

    #[test]
    fn golden_bytes_of_what_disk_mode_added() {
        let golden = r#"{"release":{"image":"minimal","release":2},"sequence":5,"reason":"trial-tries-used-up"}"#;
        let fallback: Fallback = serde_json::from_str(golden).unwrap();
        assert_eq!(fallback.reason, crate::slot::FallbackReason::TriesUsedUp);
        assert_eq!(serde_json::to_string(&fallback).unwrap(), golden);
        let looped = golden.replace("trial-tries-used-up", "good-boot-loop");
        let fallback = Fallback { reason: crate::slot::FallbackReason::BootLoop, ..fallback };
        assert_eq!(serde_json::to_string(&fallback).unwrap(), looped);
        assert_eq!(serde_json::from_str::<Fallback>(&looped).unwrap(), fallback);
        let golden = r#"{"etag":"7","decision":"wait","reason":"r"}"#;
        let desired: Desired = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&desired).unwrap(), golden);
    }

    #[test]
    fn golden_bytes_of_a_report_and_of_what_was_added_to_it() {
        let old = r#"{"boot_id":"b","seq":1,"machine":{"id":"00000000-0000-0000-0000-000000000001","macs":[],"product":"p","serial":"","firmware":"uefi","arch":"x86_64","key_storage":"file","rollback_memory":"file","protection":"unprotected","memory_bytes":1},"nonce":"NONCE","embedded":{"image":"minimal","release":1,"root_hash":"ROOT"},"stages":[],"at_ms":5,"wait_s":0,"desired_etag":""}"#;
        let old = old.replace("NONCE", &"aa".repeat(32)).replace("ROOT", &"bb".repeat(32));
        let mut report: Report = serde_json::from_str(&old).unwrap();
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            old,
            "an agent that says no more is read and written as ever"
        );
        let mut looks = report.clone();
        looks.machine.tpm = Some(TpmPresence::Absent);
        let told = old.replace(r#""memory_bytes":1"#, r#""memory_bytes":1,"tpm":"absent""#);
        assert_eq!(serde_json::to_string(&looks).unwrap(), told);
        assert_eq!(serde_json::from_str::<Report>(&told).unwrap(), looks);

        report.agent_memory = Some(AgentMemory { rss_bytes: 3, peak_bytes: 4, cpu_ms: None, ran_ms: None });
        let new = old.replace(r#""wait_s""#, r#""agent_memory":{"rss_bytes":3,"peak_bytes":4},"wait_s""#);
        assert_eq!(serde_json::to_string(&report).unwrap(), new);
        assert_eq!(serde_json::from_str::<Report>(&new).unwrap(), report);

        let mut timed = report.clone();
        timed.agent_memory = timed.agent_memory.map(|a| AgentMemory { cpu_ms: Some(5), ran_ms: Some(6), ..a });
        let text = new.replace(r#""peak_bytes":4"#, r#""peak_bytes":4,"cpu_ms":5,"ran_ms":6"#);
        assert_eq!(serde_json::to_string(&timed).unwrap(), text);
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), timed);

        let event = Noted { number: 3, age_ms: 9, kind: "drift".into(), alarm: true, text: "x".into() };
        report.condition = Some(Condition {
            drift: vec![Difference { kind: DriftKind::CommandLine, what: "w".into(), text: "t".into() }],
            drift_count: 1,
            put_up: None,
            draining: Some(Draining { hook: "h".into(), number: 1, of: 2, since_ms: 40_000, left_ms: 5 }),
            spool: SpoolReport { id: "i".into(), confirmed: 2, events: vec![event] },
        });
        let condition = r#""condition":{"drift":[{"kind":"command-line","what":"w","text":"t"}],"drift_count":1,"draining":{"hook":"h","number":1,"of":2,"since_ms":40000,"left_ms":5},"spool":{"id":"i","confirmed":2,"events":[{"number":3,"age_ms":9,"kind":"drift","alarm":true,"text":"x"}]}},"#;
        let new = new.replace(r#""wait_s""#, &format!(r#"{condition}"wait_s""#));
        assert_eq!(serde_json::to_string(&report).unwrap(), new);
        assert_eq!(serde_json::from_str::<Report>(&new).unwrap(), report);
        assert_eq!(report.condition.unwrap().draining.unwrap().words(), "draining: 1 of 2, hook h since 40 s");
    }

    #[test]
    fn progress_is_optional_on_the_wire_and_small_steps_of_it_are_no_news() {
        let old = r#"{"image":"minimal","release":2,"sequence":3,"ready":false}"#;
        let first: Prefetch = serde_json::from_str(old).unwrap();
        assert_eq!(serde_json::to_string(&first).unwrap(), old, "what an older agent sends stays as it is");
        let at = |received_bytes| Prefetch {
            progress: Some(Progress { received_bytes, total_bytes: 1000 }),
            ..first.clone()
        };
        let golden = r#"{"image":"minimal","release":2,"sequence":3,"ready":false,"progress":{"received_bytes":7,"total_bytes":1000}}"#;
        assert_eq!(serde_json::to_string(&at(7)).unwrap(), golden);
        assert!(at(7).says_as_much_as(&at(99)) && !at(99).says_as_much_as(&at(100)) && !at(7).says_as_much_as(&first));
        assert!(!at(7).says_as_much_as(&Prefetch { ready: true, ..at(7) }));
        let liar = Progress { received_bytes: u64::MAX, total_bytes: 0 };
        assert_eq!(liar.tenths(), 10);
    }
}
