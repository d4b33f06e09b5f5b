//! What the slots of the disk hear of the release that runs: that it is good, that it is late, which way the firmware
//! boots.

use super::{Proof, Service};
use crate::dbx;
use crate::disk::DiskError;
use crate::disk::machine::on_disk;
use crate::error::Result;
use kiln_protocol::{BootFirst, Stage, slot};
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::sleep;

/// A trial that is not healthy so long after the service's start leaves; the server's own limit is the same.
const TRIAL: Duration = Duration::from_secs(15 * 60);
/// Longest wait for a disk while the system is left.
pub(super) const DISK_DEADLINE: Duration = Duration::from_secs(20);
/// A disk that did not take it is asked again after so long.
const AGAIN: Duration = Duration::from_secs(30);

/// What the slots are told of the release that runs, on its way: whether it is healthy, and what they make of it.
pub(super) type Proving = Pin<Box<dyn Future<Output = (bool, Result<Told>)>>>;

/// What the slots make of it, and what is wrong with a disk that counted none of its starts.
pub(super) type Told = (Vec<slot::Action>, Option<DiskError>);

/// The kernel forgets a disk that is pulled out. Of one that answers no reset any more SCSI (so SAS and SATA, too) and NVMe keep the
/// folder, and say so (`sdev_states` in drivers/scsi/scsi_sysfs.c, `nvme_sysfs_show_state`). What may come back is not gone.
fn is_gone(folder: &Path) -> bool {
    let state = std::fs::read_to_string(folder.join("device/state")).unwrap_or_default();
    let given_up = ["offline", "cancel", "deleted", "dead", "deleting", "deleting (no IO)"];
    !folder.exists() || given_up.contains(&state.trim())
}

impl Service {
    /// Tells the slots that the release that runs is healthy, or that it is late. One at a time, and nothing waits for it.
    pub(super) fn prove(&self, healthy: bool) -> Option<Proving> {
        let (Some(disk), Proof::Trial(since)) = (self.disk.clone(), self.proven) else { return None };
        let event = match healthy {
            true => slot::Event::Healthy,
            false if since.elapsed() >= TRIAL => slot::Event::Late,
            false => return None,
        };
        let (root_hash, here) = (self.journal.embedded.root_hash.clone(), self.here.clone());
        Some(Box::pin(async move {
            let told = on_disk(&disk, move |disk| {
                let actions = disk.event(event, None)?;
                let forgot = if healthy { disk.forget_starts(&root_hash) } else { Ok(None) };
                let wrong = forgot.unwrap_or_else(|error| {
                    eprintln!("kiln-agent: the starts of this release stay counted: {error}");
                    None
                });
                Ok((actions, wrong))
            });
            let told = told.await;
            if let Err(error) = &told {
                eprintln!("kiln-agent: the boot loader cannot be told how this release is: {error}");
                sleep(AGAIN).await;
            } else if healthy && let Err(error) = dbx::mend_loader(&disk, &here).await {
                eprintln!("kiln-agent: the boot loader on the disk stays as it is: {error}");
            }
            (healthy, told)
        }))
    }

    /// Whether the disk that this system runs from is still in the machine, and the kernel has not given it up. Without it the
    /// system goes on as long as nothing is read that is not in memory, so it is left, by the firmware, once a boot server answers:
    /// the machine comes up again in memory.
    pub(super) fn look_for_disk(&mut self) {
        let Some(folder) = self.lives_on.as_deref().filter(|folder| !self.gone && is_gone(folder)) else { return };
        let disk = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.gone = true;
        self.journal.failed(Stage::Service, &DiskError::Gone { disk }.into(), 1, Some(Duration::ZERO));
    }

    /// What they made of it. Whether this release must leave.
    pub(super) fn proved(&mut self, (healthy, told): (bool, Result<Told>)) -> bool {
        let Ok((actions, wrong)) = told else { return false };
        if let Some(error) = wrong {
            self.journal.failed(Stage::Service, &error.into(), 1, Some(Duration::ZERO));
        }
        if healthy {
            self.proven = Proof::Good;
            if let Some(disk) = &self.disk {
                // What failed here before may be told no more.
                if disk.slots().disk.fallback().is_none() {
                    self.journal.fallback = None;
                }
                eprintln!("kiln-agent: {} is healthy: {}", self.here, disk.describe());
            }
        }
        actions.iter().any(|action| matches!(action, slot::Action::Leave(_)))
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

    /// The loader shall not hear of what was installed and is no longer wanted. Nothing waits for it, and the next install
    /// calls off what is left.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_the_kernel_gave_up_is_gone_and_one_that_may_come_back_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("sda");
        assert!(is_gone(&folder), "pulled out");
        std::fs::create_dir_all(folder.join("device")).unwrap();
        assert!(!is_gone(&folder), "virtio's have no state");
        for (state, gone) in [
            ("running", false),
            ("blocked", false),
            ("quiesce", false),
            ("transport-offline", false),
            ("offline", true),
            ("deleted", true),
            ("live", false),
            ("resetting", false),
            ("connecting", false),
            ("deleting (no IO)", true),
            ("dead", true),
        ] {
            std::fs::write(folder.join("device/state"), format!("{state}\n")).unwrap();
            assert_eq!(is_gone(&folder), gone, "{state}");
        }
    }
}
