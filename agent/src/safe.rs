//! Safe mode: the good release in the slot was started again and again and never became healthy. No other is known to
//! start, so nothing is started: the agent stays in its initramfs, says so to whoever listens, and waits for an
//! assignment that was made since. A site whose boot server is dead must not keep a machine down for ever: after a
//! pause the release is tried once more.

use crate::change;
use crate::coldplug::Drivers;
use crate::disk::machine::{SharedDisk, on_disk};
use crate::disk::store::Starts;
use crate::error::{AgentError, Result};
use crate::flow::Flow;
use crate::init;
use crate::plan::Plan;
use crate::uplink::Network;
use kiln_protocol::{Stage, Via};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Then the release is tried once more.
const LASTS: Duration = Duration::from_secs(15 * 60);
/// So often the server hears that the machine still waits.
const TELL_EVERY: Duration = Duration::from_secs(30);

/// Comes back when the machine must restart: with an error after [`LASTS`], without one after a new assignment.
pub async fn stay(
    flow: &mut Flow,
    drivers: &mut Option<Drivers>,
    network: &mut Network,
    disk: &SharedDisk,
    starts: Starts,
) -> Result<()> {
    let release = flow.verifier.here()?.to_string();
    let over =
        || AgentError::BootLoop { release: release.clone(), starts: starts.count, minutes: LASTS.as_secs() / 60 };
    println!("kiln-agent: SAFE MODE: {}", over());
    flow.journal.failed(Stage::Modules, &over(), starts.count, Some(LASTS));
    timeout(LASTS, wait(flow, drivers, network, disk, starts)).await.unwrap_or_else(|_| Err(over()))
}

async fn wait(
    flow: &mut Flow,
    drivers: &mut Option<Drivers>,
    network: &mut Network,
    disk: &SharedDisk,
    starts: Starts,
) -> Result<()> {
    network.connect(flow, drivers).await?;
    let here = flow.verifier.here()?;
    loop {
        let mut verified = init::metadata(flow, &here, Stage::Metadata).await?;
        let (assignment, _, plan) = init::wait_for_assignment(flow, &mut verified).await?;
        if assignment.sequence > starts.begun {
            let root_hash = flow.journal.embedded.root_hash.clone();
            match plan {
                Plan::Stay => return on_disk(disk, move |disk| disk.forget_starts(&root_hash)).await,
                // The firmware would start the disk again: only a kexec leads elsewhere.
                Plan::Change(_) => {
                    change::now(flow, &assignment, Via::Kexec, change::Otherwise::Kexec).await?;
                    return Err(AgentError::NoWayOut);
                }
            }
        }
        flow.journal.waiting(Stage::Assignment, "safe mode: nothing is started before a new assignment");
        flow.report().await;
        sleep(TELL_EVERY).await;
    }
}
