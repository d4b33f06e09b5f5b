//! Safe mode: the good release in the slot was started again and again and never became healthy. No other is known to
//! start ([`crate::local::leave_loop`] would have gone to it), so nothing is started: the agent stays in its initramfs, says so to whoever listens, and waits for an
//! assignment that was made since. A site whose boot server is dead must not keep a machine down for ever: after a
//! pause the release is tried once more.
//!
//! The same where what the machine remembers cannot be read. An empty memory in its place would forget all that was seen, for
//! whoever can spoil a variable, and a restart would read the same again: a person decides, by a new assignment.

use crate::change;
use crate::coldplug::Drivers;
use crate::disk::machine::{SharedDisk, on_disk};
use crate::disk::store::Starts;
use crate::error::{AgentError, Result};
use crate::flow::Flow;
use crate::init;
use crate::memory::Place;
use crate::plan::Plan;
use crate::uplink::Network;
use kiln_protocol::{Stage, Via};
use std::path::Path;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Then the release is tried once more.
const LASTS: Duration = Duration::from_secs(15 * 60);
/// So often the server hears that the machine still waits.
pub const TELL_EVERY: Duration = Duration::from_secs(30);

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
                Plan::Stay => return on_disk(disk, move |disk| disk.forget_starts(&root_hash)).await.map(drop),
                // The firmware would start the disk again: only a kexec leads elsewhere.
                Plan::Change(_) => {
                    let next = Path::new(change::NEXT);
                    match change::now(flow, &assignment, Via::Kexec, change::Otherwise::Kexec, next).await {
                        // It was tried and hung, again and again: no further restart before this is over.
                        Err(AgentError::KexecHangs { .. }) => {}
                        Err(error) => return Err(error),
                        Ok(()) => return Err(AgentError::NoWayOut),
                    }
                }
            }
        }
        flow.journal.waiting(Stage::Assignment, "safe mode: nothing is started before a new assignment");
        flow.report().await;
        sleep(TELL_EVERY).await;
    }
}

/// Says that the memory cannot be read, and why; starts nothing. Comes back once an assignment is heard of that is newer than the
/// first: what was there is given up then, and what was verified since is kept instead. `meanwhile` keeps it until then.
pub async fn ask_a_person(
    flow: &mut Flow,
    drivers: &mut Option<Drivers>,
    network: &mut Network,
    error: &AgentError,
    (meanwhile, every): (Place, Duration),
) -> Result<()> {
    println!("kiln-agent: SAFE MODE: nothing is started: {error} ({})", error.kind());
    flow.journal.failed(Stage::Start, error, 1, Some(every));
    let kept = std::mem::replace(&mut flow.verifier.place, meanwhile);
    let word = hear_a_word(flow, drivers, network, every).await;
    flow.verifier.place = kept;
    word?;
    println!("kiln-agent: a newer assignment: what this machine remembered is given up");
    flow.verifier.place.remember(&flow.verifier.memory)
}

/// Asks for ever. An operator's wipe ends it as well.
async fn hear_a_word(
    flow: &mut Flow,
    drivers: &mut Option<Drivers>,
    network: &mut Network,
    every: Duration,
) -> Result<()> {
    let mut first = None;
    loop {
        match newest(flow, drivers, network).await {
            Ok(sequence) if sequence > *first.get_or_insert(sequence) => return Ok(()),
            Ok(_) => flow.journal.waiting(
                Stage::Assignment,
                "what this machine remembers cannot be read, and nothing is started: `kiln machine clear`, or a new \
                 assignment, lets it forget that",
            ),
            Err(error) if flow.verifier.wipe.is_some() => return Err(error),
            Err(error) => println!("kiln-agent: {error} ({})", error.kind()),
        }
        flow.report().await;
        sleep(every).await;
    }
}

/// Sequence of the newest assignment, verified.
async fn newest(flow: &mut Flow, drivers: &mut Option<Drivers>, network: &mut Network) -> Result<u64> {
    if flow.api.is_none() {
        network.connect(flow, drivers).await?;
        init::set_host_name(network, flow);
        flow.ship_log()?;
    }
    let here = flow.verifier.here()?;
    let mut verified = init::metadata(flow, &here, Stage::Metadata).await?;
    let (assignment, ..) = init::wait_for_assignment(flow, &mut verified).await?;
    Ok(assignment.sequence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::director::Director;
    use crate::testing::{TestSite, flow, web};
    use kiln_protocol::StageState;
    use std::collections::BTreeMap;
    use std::time::Instant;

    const SPOILT: &[u8] = b"{\"seen\":";
    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_memory_that_cannot_be_read_starts_nothing_until_a_person_says_so() {
        let site = TestSite::new(1);
        let dir = tempfile::tempdir().unwrap();
        let [state, meanwhile] = ["state", "meanwhile"].map(|name| dir.path().join(name));
        let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
        let director = Director::start(&site, (1, 5, Via::Cold, false));
        let verifier = site.verifier(1, &[http], std::slice::from_ref(&director.url), &state);
        let seen = state.join("seen");
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(&seen, SPOILT).unwrap();
        let error = verifier.place.memory().unwrap_err();
        assert_eq!(error.kind(), "machine-format");

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut flow = flow(verifier, None, PATIENCE);
            flow.find_server().await.unwrap();
            let mut network = Network::start(&mut flow);
            let begun = Instant::now();
            let person = std::thread::spawn(move || {
                let says = |what: &str, wanted: fn(&StageState) -> bool| {
                    director.wait(what, begun, PATIENCE, |r| r.stages.iter().any(|s| wanted(&s.state)))
                };
                says("of the memory", |s| matches!(s, StageState::Failed(f) if f.kind == "machine-format"));
                says(
                    "what to do",
                    |s| matches!(s, StageState::Waiting { reason } if reason.contains("kiln machine clear")),
                );
                assert_eq!(std::fs::read(&seen).unwrap(), SPOILT, "it stays until a person says so");
                director.order((1, 6, Via::Cold, false));
            });
            let meanwhile = (Place::Directory(meanwhile), Duration::from_millis(50));
            ask_a_person(&mut flow, &mut None, &mut network, &error, meanwhile).await.unwrap();
            person.join().unwrap();
            let kept = flow.verifier.place.memory().unwrap();
            assert_eq!((kept.sequence, &kept), (6, &flow.verifier.memory));
        });
    }
}
