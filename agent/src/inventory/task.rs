//! Keeps the boot server's picture of this machine's hardware true: at the start, every ten minutes, and soon after a
//! switch named itself; sent only if it changed, or once a day for a server that forgot.

use super::{Neighbours, Root, json, take};
use crate::api::Api;
use kiln_protocol::{InventoryReport, MachineId};
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

const EVERY: Duration = Duration::from_secs(600);
const AGAIN: Duration = Duration::from_secs(24 * 3600);
/// After a failed try.
const RETRY: Duration = Duration::from_secs(30);
/// Switches on other cables follow the first within so long; a switch that changes its mind all the time is heard at
/// this pace.
const SETTLE: Duration = Duration::from_secs(5);

/// Runs for ever.
pub async fn keep(mut api: Api, machine: MachineId, boot_id: String) {
    let neighbours = Neighbours::default();
    neighbours.listen();
    let mut sent: Option<(String, Instant)> = None;
    let mut complained = false;
    loop {
        let heard = neighbours.clone();
        let mut pause = EVERY;
        if let Ok(inventory) = spawn_blocking(move || take(&Root::of_this_machine(), &heard)).await {
            let text = json(&inventory);
            if sent.as_ref().is_none_or(|(before, at)| *before != text || at.elapsed() >= AGAIN) {
                let report = InventoryReport { machine: machine.clone(), boot_id: boot_id.clone(), inventory };
                match api.inventory(&report).await {
                    Ok(()) => (sent, complained) = (Some((text, Instant::now())), false),
                    Err(error) => {
                        if !complained {
                            eprintln!("kiln-agent: inventory not delivered: {error}");
                        }
                        (complained, pause) = (true, RETRY);
                    }
                }
            }
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = neighbours.news() => sleep(SETTLE).await,
        }
    }
}
