//! What an acceptance release tests, and for how long: declared in its recipe, in its root, and so signed.

use serde::{Deserialize, Serialize};

/// Where it lies in the root.
pub const ACCEPTANCE_PATH: &str = "/usr/lib/kiln/acceptance.json";
/// Longest time for a test, seconds.
pub const MAX_TEST: u64 = 24 * 3600;

/// The parameters of an acceptance run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AcceptancePlan {
    /// Seconds for memory.
    pub memory_seconds: u64,
    /// So much of the free memory, percent.
    pub memory_percent: u8,
    /// Seconds under load for the processors.
    pub cpu_seconds: u64,
    /// Seconds for the disks, which are tested side by side.
    pub disk_seconds: u64,
    /// MiB read from each disk's beginning for its speed.
    pub disk_read_mib: u64,
    /// Write to disks that are blank, and make them blank again. A disk with anything on it is only read, always.
    pub disk_write_blank: bool,
    /// Seconds of downloads.
    pub network_seconds: u64,
    /// Of a million packets, so many may be damaged or come out of order; and of a million echoes so many may be lost.
    pub network_lost_per_million: u64,
    /// What is asked at least, of each disk, MiB/s; 0: anything.
    pub least_disk_read_mib_s: u64,
    /// Of the network, MiB/s; 0: anything.
    pub least_network_mib_s: u64,
    /// Of the link to the boot server, Mbit/s; 0: anything.
    pub least_link_mbit_s: u64,
}

impl Default for AcceptancePlan {
    fn default() -> Self {
        Self {
            memory_seconds: 1800,
            memory_percent: 85,
            cpu_seconds: 600,
            disk_seconds: 600,
            disk_read_mib: 2048,
            disk_write_blank: false,
            network_seconds: 60,
            network_lost_per_million: 1000,
            least_disk_read_mib_s: 0,
            least_network_mib_s: 0,
            least_link_mbit_s: 0,
        }
    }
}

impl AcceptancePlan {
    /// The first thing in it that cannot be, with its reason.
    pub fn check(&self) -> Result<(), String> {
        for (key, seconds) in [
            ("memory_seconds", self.memory_seconds),
            ("cpu_seconds", self.cpu_seconds),
            ("disk_seconds", self.disk_seconds),
            ("network_seconds", self.network_seconds),
        ] {
            if !(1..=MAX_TEST).contains(&seconds) {
                return Err(format!("{key} = {seconds}: from 1 to {MAX_TEST}"));
            }
        }
        if !(1..=90).contains(&self.memory_percent) {
            return Err(format!("memory_percent = {}: from 1 to 90", self.memory_percent));
        }
        if !(1..=1 << 20).contains(&self.disk_read_mib) {
            return Err(format!("disk_read_mib = {}: from 1 to 1048576", self.disk_read_mib));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_can_be_and_what_cannot_is_named() {
        assert_eq!(AcceptancePlan::default().check(), Ok(()));
        let plan = AcceptancePlan { memory_percent: 91, ..AcceptancePlan::default() };
        assert_eq!(plan.check().unwrap_err(), "memory_percent = 91: from 1 to 90");
        let plan = AcceptancePlan { cpu_seconds: 0, ..AcceptancePlan::default() };
        assert!(plan.check().unwrap_err().starts_with("cpu_seconds = 0"));
        assert!(serde_json::from_str::<AcceptancePlan>(r#"{"cpu_secconds":1}"#).is_err());
    }
}
