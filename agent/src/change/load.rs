//! The point of no return: the loader on the disk is told, and the kernel of a kexec is loaded.

use super::{Files, Installed, Otherwise, Ready, blocking};
use crate::disk::DiskError;
use crate::disk::machine::on_disk;
use crate::error::{AgentError, Result};
use crate::{kexec, watchdog};
use kiln_protocol::Via;
use kiln_protocol::slot::{Action, Event, Refusal};
use std::fs::File;
use std::sync::Arc;

/// Loads the kernel for a kexec; a cold boot needs nothing. In disk mode the loader is told first: power that is cut
/// from here on starts the same release through the firmware. A kexec that the hardware watchdog would end is refused where a
/// cold boot leads to the release as well.
pub async fn load(ready: &Arc<Ready>, otherwise: Otherwise) -> Result<()> {
    if let Some(Installed { disk, via, .. }) = &ready.installed {
        let rest = on_disk(disk, |disk| disk.event(Event::Granted, None)).await?;
        match via {
            Via::Cold => return Ok(()),
            // What was good when it was fetched may not be by now: then it is a cold boot.
            Via::Kexec if !rest.contains(&Action::Leave(Via::Kexec)) => {
                return Err(DiskError::Refused(Refusal::ProveFirst).into());
            }
            Via::Kexec => {}
        }
    }
    let ready = Arc::clone(ready);
    blocking(move || load_kernel(&ready, otherwise)).await
}

fn load_kernel(ready: &Ready, otherwise: Otherwise) -> Result<()> {
    let watched = || match otherwise {
        Otherwise::Cold => watchdog::covers_a_kexec(),
        Otherwise::Kexec => Ok(()),
    };
    if let Some(Installed { uki, .. }) = &ready.installed {
        watched()?;
        let uki = File::open(uki.path()).map_err(AgentError::file(uki.path()))?;
        return kexec::load(&uki, &ready.manifest, None);
    }
    let Some(Files { uki, root }) = &ready.kexec else { return Ok(()) };
    watched()?;
    let uki = File::open(uki.path()).map_err(AgentError::file(uki.path()))?;
    kexec::load(&uki, &ready.manifest, Some((root.path(), ready.manifest.root.sha256.as_str())))
}
