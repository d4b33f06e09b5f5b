//! Wipes disks by an operator's order, in the initramfs, before anything of a disk is used. What came of each disk goes
//! into a receipt that the machine signs with its identity key and the server keeps.
//!
//! What the disk offers comes first: NVMe sanitise or format, secure discard, discard. That alone is not believed: every
//! byte is read back, and unless all are zeros, or all are ones, the disk is written over with zeros and read back again.
//! A disk counts as wiped only after such a reading. What firmware keeps from the host (spare cells, host protected areas)
//! is wiped by sanitise and format alone; the receipt says which method it was.

mod disks;
mod erase;
mod nvme;

use crate::disk::data;
use crate::error::{AgentError, Result};
use crate::flow::Flow;
use crate::memory::random;
use crate::retry::{self, Next};
use disks::Disk;
use erase::Meter;
use kiln_protocol::{
    ORDER_DISKS, Order, OrderAction, RECEIPT_TYPE, Receipt, SPEC_VERSION, Stage, WipeMethod, WipeOutcome, WipedDisk,
};
use kiln_release::{hex, sign_envelope};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

/// So often the server hears how far it is.
const TELL_EVERY: Duration = Duration::from_secs(15);
/// Disks wiped side by side.
const AT_ONCE: usize = 16;

/// Wipes, and delivers the receipt. Comes back when it is delivered: the machine then starts anew.
pub async fn obey(flow: &mut Flow, order: &Order) -> Result<()> {
    let OrderAction::Wipe { disks, method } = order.action.clone() else { return Ok(()) };
    println!("kiln-agent: order {} is to {}", order.id, order.action);
    flow.journal.started(Stage::Wipe);
    flow.report().await;
    // First: whatever a disk keeps of the data in some corner, and wherever this is cut, nobody reads it.
    match data::destroy_key() {
        Ok(true) => println!("kiln-agent: the key of this machine's data is destroyed"),
        Ok(false) => {}
        Err(error) => println!("kiln-agent: the key of this machine's data is not destroyed: {error}"),
    }
    let (begun, meter) = (Instant::now(), Arc::new(Meter::default()));
    let mut work = {
        let meter = Arc::clone(&meter);
        spawn_blocking(move || wipe_all(&disks, method, &meter))
    };
    let done = loop {
        if let Ok(done) = timeout(TELL_EVERY, &mut work).await {
            break done;
        }
        flow.journal.waiting(Stage::Wipe, &meter.describe());
        flow.report().await;
    };
    let disks = done.map_err(|e| AgentError::system("wiping")(std::io::Error::other(e.to_string())))?;
    for disk in &disks {
        println!("kiln-agent: {} ({} {}): {}: {}", disk.name, disk.model, disk.serial, disk.outcome, disk.detail);
    }
    let receipt = Receipt {
        type_: RECEIPT_TYPE.into(),
        spec_version: SPEC_VERSION.into(),
        machine: flow.journal.machine.id.clone(),
        key: flow.verifier.key_id(),
        public_key: hex::encode(&flow.verifier.key.public_bytes()),
        order: order.id.clone(),
        disks,
        finished: flow.verifier.now,
        seconds: begun.elapsed().as_secs(),
    };
    let text = sign_envelope(&receipt, &[&flow.verifier.key])
        .map_err(|e| AgentError::system("signing the receipt")(std::io::Error::other(e.to_string())))?;
    deliver(flow, &text).await?;
    // Only now: a wipe whose receipt nobody has is done again after a restart.
    flow.verifier.wiped(order)?;
    flow.journal.done(Stage::Wipe);
    flow.report().await;
    Ok(())
}

/// For ever: without the receipt nobody knows that the disks are wiped.
async fn deliver(flow: &mut Flow, text: &str) -> Result<()> {
    let mut attempt = 0;
    loop {
        let error = match &mut flow.api {
            None => AgentError::NoServer,
            Some(api) => match api.receipt(text).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
        };
        attempt += 1;
        let pause = match retry::next(error.class(), attempt, random()?[0]) {
            Next::After(pause) => pause,
            Next::GiveUp => return Err(error),
        };
        flow.journal.failed(Stage::Wipe, &error, attempt, Some(pause));
        sleep(pause).await;
    }
}

/// Every disk of this machine, and what became of it; besides them the ordered ones that it does not have.
fn wipe_all(serials: &[String], method: WipeMethod, meter: &Meter) -> Vec<WipedDisk> {
    let (mut chosen, mut report) = (Vec::new(), Vec::new());
    for disk in disks::all() {
        match disk.reason_to_skip(serials) {
            None => chosen.push(disk),
            Some(reason) => report.push(disk.became(Vec::new(), WipeOutcome::Skipped, reason)),
        }
    }
    for serial in serials.iter().filter(|serial| !chosen.iter().any(|disk| disk.serial == **serial)) {
        report.push(Disk::missing(serial));
    }
    meter.expect(chosen.iter().map(|disk| disk.bytes).sum());
    // Name spaces of one NVMe controller one after the other: a sanitise is all of theirs.
    chosen.sort_by_key(Disk::controller);
    let groups: Vec<&[Disk]> = chosen.chunk_by(|a, b| a.controller() == b.controller()).collect();
    for wave in groups.chunks(AT_ONCE) {
        let done: Vec<WipedDisk> = std::thread::scope(|scope| {
            let threads: Vec<_> = wave
                .iter()
                .map(|group| scope.spawn(|| group.iter().map(|disk| wipe(disk, method, meter)).collect::<Vec<_>>()))
                .collect();
            let joined = threads.into_iter().zip(wave.iter());
            joined
                .flat_map(|(thread, group)| {
                    let lost = |disk: &Disk| {
                        disk.became(Vec::new(), WipeOutcome::Failed, "the agent failed while it was wiped".into())
                    };
                    thread.join().unwrap_or_else(|_| group.iter().map(lost).collect())
                })
                .collect()
        });
        report.extend(done);
    }
    report.sort_by(|a, b| a.name.cmp(&b.name));
    report.truncate(ORDER_DISKS);
    report
}

fn wipe(disk: &Disk, method: WipeMethod, meter: &Meter) -> WipedDisk {
    let mut methods = Vec::new();
    match erase::erase(disk, method, &mut methods, meter) {
        Ok(how) => disk.became(methods, WipeOutcome::Wiped, how),
        Err(error) => disk.became(methods, WipeOutcome::Failed, error.to_string()),
    }
}
