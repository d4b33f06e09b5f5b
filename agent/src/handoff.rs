//! Word from the agent in the initramfs to the agent in the running system. The identity key is not in it: it is read
//! again from where it lives.

use crate::coldplug::Process;
use crate::error::{AgentError, Result};
use crate::journal::JournalState;
use crate::memory::Memory;
use crate::net::Uplink;
use crate::verifier::Servers;
use jiff::Timestamp;
use kiln_protocol::{RoleSettings, RollbackMemory, Via};
use kiln_release::{BootInfo, HANDOFF_PATH, Manifest};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::OpenOptionsExt;

/// Which disk, and how what runs from it was started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OnDisk {
    /// `vda`, `nvme0n1`.
    pub name: String,
    pub via: Via,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Handoff {
    pub boot: BootInfo,
    /// Of the release that runs, verified.
    pub manifest: Manifest,
    pub servers: Servers,
    pub journal: JournalState,
    /// None: the network did not come up, and the service goes on trying.
    pub uplink: Option<Uplink>,
    /// In disk mode, the disk that the root lies on.
    pub disk: Option<OnDisk>,
    /// Why what the image keeps is not there, if it keeps something and it is not.
    #[serde(default)]
    pub no_data: Option<String>,
    /// Sequence of the assignment under which the root was fetched and verified.
    #[serde(default)]
    pub sequence: u64,
    /// What its role selects, verified.
    #[serde(default)]
    pub settings: RoleSettings,
    /// The agent API's keys that count, verified; empty: every one that its CA has signed.
    #[serde(default)]
    pub agent_api_keys: Vec<String>,
    /// What the machine remembers; none: an older initramfs.
    #[serde(default)]
    pub memory: Option<Memory>,
    /// Where that is from; none: an older initramfs, which did not say.
    #[serde(default)]
    pub remembers: Option<RollbackMemory>,
    /// The agent's own processes that wait for a device that hangs.
    #[serde(default)]
    pub left: Vec<Process>,
    /// The newest time believed.
    pub now: Timestamp,
}

impl Handoff {
    pub fn write(&self) -> Result<()> {
        use std::io::Write;
        let bytes = serde_json::to_vec(self).expect("the hand-over always becomes JSON");
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(HANDOFF_PATH)
            .map_err(AgentError::file(HANDOFF_PATH))?;
        file.write_all(&bytes).map_err(AgentError::file(HANDOFF_PATH))
    }

    pub fn read() -> Result<Self> {
        let bytes = std::fs::read(HANDOFF_PATH).map_err(AgentError::file(HANDOFF_PATH))?;
        serde_json::from_slice(&bytes)
            .map_err(|e| AgentError::Format { path: HANDOFF_PATH.into(), reason: e.to_string() })
    }
}
