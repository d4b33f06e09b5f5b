//! What the slots of the disk hear of the release that runs: that it is good, that it is late, which way the firmware
//! boots.

use super::{Proof, Service};
use crate::dbx;
use crate::disk::DiskError;
use crate::disk::machine::{SharedDisk, on_disk};
use kiln_protocol::{BootFirst, Stage, slot};
use std::time::Duration;
use tokio::time::timeout;

/// A trial that is not healthy so long after the service's start leaves; the server's own limit is the same.
const TRIAL: Duration = Duration::from_secs(15 * 60);
/// Longest wait for a disk's commit.
pub(super) const DISK_DEADLINE: Duration = Duration::from_secs(20);

impl Service {
    /// Tells the slots that the release that runs is healthy, or that it is late. Whether it must leave.
    pub(super) async fn prove(&mut self, healthy: bool) -> bool {
        let (Some(disk), Proof::Trial(since)) = (self.disk.clone(), self.proven) else { return false };
        let event = match healthy {
            true => slot::Event::Healthy,
            false if since.elapsed() >= TRIAL => slot::Event::Late,
            false => return false,
        };
        let done = timeout(DISK_DEADLINE, on_disk(&disk, move |disk| disk.event(event, None))).await;
        match done {
            Ok(Ok(actions)) => {
                if healthy {
                    self.proven = Proof::Good;
                    self.started_well(&disk).await;
                    eprintln!("kiln-agent: {} is healthy: {}", self.here, crate::disk::machine::lock(&disk).describe());
                }
                actions.iter().any(|action| matches!(action, slot::Action::Leave(_)))
            }
            Ok(Err(error)) => {
                eprintln!("kiln-agent: the boot loader cannot be told that this release is good: {error}");
                false
            }
            Err(_) => {
                eprintln!("kiln-agent: the disk gives no answer");
                false
            }
        }
    }

    /// Whether the disk that this system runs from is still in the machine: the kernel forgets one that is pulled out. Without it the
    /// system goes on as long as nothing is read that is not in memory, so it is left, by the firmware, once a boot server answers:
    /// the machine comes up again in memory.
    pub(super) fn look_for_disk(&mut self) {
        let Some(folder) = self.lives_on.as_deref().filter(|folder| !self.gone && !folder.exists()) else { return };
        let disk = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.gone = true;
        self.journal.failed(Stage::Service, &DiskError::Gone { disk }.into(), 1, Some(Duration::ZERO));
    }

    /// What failed here before may be told no more, the count of starts ends, and a loader that the firmware refuses is replaced.
    async fn started_well(&mut self, disk: &SharedDisk) {
        let root_hash = self.journal.embedded.root_hash.clone();
        let done = timeout(DISK_DEADLINE, on_disk(disk, move |disk| disk.forget_starts(&root_hash))).await;
        if let Ok(Err(error)) = done {
            eprintln!("kiln-agent: the starts of this release stay counted: {error}");
        }
        if crate::disk::machine::lock(disk).slots().disk.fallback().is_none() {
            self.journal.fallback = None;
        }
        if let Err(error) = dbx::mend_loader(disk, &self.here).await {
            eprintln!("kiln-agent: the boot loader on the disk stays as it is: {error}");
        }
    }

    /// The firmware's boot order is the role's.
    pub(super) fn order_boot(&mut self) {
        let network_first = self.settings.boot_first == BootFirst::Network;
        if let Some(disk) = self.disk.clone() {
            tokio::spawn(async move {
                if let Err(error) = on_disk(&disk, move |disk| disk.order_boot(network_first)).await {
                    eprintln!("kiln-agent: the firmware's boot order stays as it is: {error}");
                }
            });
        }
    }

    /// The loader shall not hear of what was installed and is no longer wanted. In a thread of its own: nothing waits
    /// for it, and the next install calls off what is left.
    pub(super) fn call_off(&self) {
        if let Some(disk) = self.disk.clone() {
            tokio::spawn(async move {
                if let Err(error) = on_disk(&disk, |disk| disk.event(slot::Event::CalledOff, None)).await {
                    eprintln!("kiln-agent: {error}");
                }
            });
        }
    }
}
