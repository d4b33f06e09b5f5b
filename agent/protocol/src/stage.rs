//! The stages of a boot and a reimage: the only list. The CLI, the web page, the console and
//! docs/boot-walkthrough.md take their labels and their order from here.

use crate::ids::word_enum;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

use crate::ids::IdError;

word_enum! {
    /// Where a machine is on its way, in order. The server sees the first two; the agent reports the rest.
    Stage {
        /// The firmware asked for an address and a boot program, and the server answered.
        Dhcp = "dhcp",
        /// The boot program (the UKI, or on BIOS kernel and initramfs) is downloading.
        Program = "program",
        /// The agent runs as PID 1 of the initramfs.
        Start = "start",
        /// Drivers for the hardware found are loaded.
        Modules = "modules",
        /// A link is up and has an address.
        Network = "network",
        /// The boot server is found and answers.
        Server = "server",
        /// Release metadata is verified against the trust root in the initramfs.
        Metadata = "metadata",
        /// Assignment and freshness are verified.
        Assignment = "assignment",
        /// The root artifact is fetched and its hash is the manifest's.
        Root = "root",
        /// dm-verity is set up with the root hash that this UKI embeds, and mounted.
        Verity = "verity",
        /// switch_root to the image's own init.
        Handover = "handover",
        /// The agent runs as a service of the running system.
        Service = "service",
        /// Health checks run, and must hold for the soak time.
        Health = "health",
        /// The machine is healthy.
        Healthy = "healthy",
        /// Another release is assigned; it is being fetched and verified.
        Prefetch = "prefetch",
        /// Fetched; waiting for the server's grant.
        Grant = "grant",
        /// It may leave; what the release declares lets running work end first.
        Drain = "drain",
        /// Leaving for the other release, by kexec or by cold boot.
        Going = "going",
        /// An operator ordered it: the machine's disks are being wiped.
        Wipe = "wipe",
    }
}

impl Stage {
    /// A short phrase for people: the CLI, the web page, the console and the walkthrough's headings.
    pub fn label(self) -> &'static str {
        match self {
            Self::Dhcp => "Asks for an address",
            Self::Program => "Downloads its boot program",
            Self::Start => "Agent starts",
            Self::Modules => "Loads drivers",
            Self::Network => "Brings up the network",
            Self::Server => "Finds its boot server",
            Self::Metadata => "Verifies release metadata",
            Self::Assignment => "Verifies its assignment",
            Self::Root => "Fetches the root artifact",
            Self::Verity => "Mounts the verified root",
            Self::Handover => "Hands over to the image",
            Self::Service => "Runs as a service",
            Self::Health => "Checks health",
            Self::Healthy => "Healthy",
            Self::Prefetch => "Prefetches the next release",
            Self::Grant => "Waits for its turn",
            Self::Drain => "Lets its work end",
            Self::Going => "Reimages itself",
            Self::Wipe => "Wipes its disks",
        }
    }
}

/// How a stage stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum StageState {
    /// Begun.
    Started,
    /// Complete.
    Done,
    /// This try failed. The agent goes on as [`Failure::retry_in_ms`] says.
    Failed(Failure),
    /// Not failed, but held up by something outside: a person's approval, a grant.
    Waiting {
        /// For what, in a sentence.
        reason: String,
    },
}

/// Why a stage failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The typed reason, kebab-case and stable: `metadata-bad-signature`, `root-hash-mismatch`, `network-no-offer`.
    pub kind: String,
    /// A sentence that names what, where and what to do.
    pub message: String,
    /// Which try this was, from 1.
    pub attempt: u32,
    /// Milliseconds until the next try; none: the agent gives up this boot and restarts the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_in_ms: Option<u64>,
}

/// One step of one stage, as the agent saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Which stage.
    pub stage: Stage,
    /// How it stands.
    #[serde(flatten)]
    pub state: StageState,
    /// Milliseconds since the agent's start of this boot, by the monotonic clock.
    pub at_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_their_wire_form() {
        let record = StageRecord {
            stage: Stage::Network,
            state: StageState::Failed(Failure {
                kind: "network-no-offer".into(),
                message: "no DHCP offer on eth0 within 10 s".into(),
                attempt: 2,
                retry_in_ms: Some(4000),
            }),
            at_ms: 12,
        };
        let golden = r#"{"stage":"network","state":"failed","kind":"network-no-offer","message":"no DHCP offer on eth0 within 10 s","attempt":2,"retry_in_ms":4000,"at_ms":12}"#;
        assert_eq!(serde_json::to_string(&record).unwrap(), golden);
        assert_eq!(serde_json::from_str::<StageRecord>(golden).unwrap(), record);
    }
}
