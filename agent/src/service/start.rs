//! From the hand-over of the initramfs to a running service.

use super::Service;
use super::leave::Door;
use super::secrets::Secrets;
use super::starts;
use super::watch::Watch;
use crate::api::Api;
use crate::change;
use crate::disk::machine::{MachineDisk, SharedDisk, on_disk};
use crate::disk::search;
use crate::error::{AgentError, Result};
use crate::handoff::{Handoff, OnDisk};
use crate::health::{Checks, Probe};
use crate::journal::{Journal, monotonic_ms};
use crate::memory::{Identity, Place, Resumed};
use crate::verifier::Verifier;
use crate::watchdog::Watchdog;
use crate::{console, exec, facts, init, inventory, local, log, restart, tpm, uplink, verity};
use kiln_protocol::{MachineId, ReleaseId, RollbackMemory, RunningRelease, Stage, slot};
use kiln_release::EXEC_PATH;
use std::path::Path;
use std::time::Duration;

/// Runs until the machine leaves for another release.
pub fn run() -> Result<()> {
    log::begin();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::system("starting the runtime"))?;
    let ended = runtime.block_on(serve());
    // A check that hangs in the kernel must not hang the end as well.
    runtime.shutdown_background();
    log::flush();
    ended
}

async fn serve() -> Result<()> {
    let failed = starts::count(Path::new(starts::PATH));
    let handoff = Handoff::read();
    // First of all: what waits for this service to be ready may want to execute.
    let serve = |of: &Handoff| exec::serve(Path::new(EXEC_PATH), of.settings.exec, of.journal.started_ms);
    let exec = handoff.as_ref().ok().and_then(serve);
    if let Some(watchdog) = Watchdog::arm() {
        tokio::spawn(watchdog.keep());
    }
    let door = Door { systemctl: "systemctl".into(), reboot: restart::leave };
    starts::check(failed, &door).await?;
    let handoff = handoff?;
    forget_an_earlier_start();
    let probe = Probe::new(verity::running_root_hash, "systemctl");
    let checks = Checks::new(handoff.manifest.health.clone(), handoff.manifest.verity.root_hash.clone(), probe);
    let (wanted, certificate) = (&handoff.manifest.secrets, handoff.manifest.certificate.as_ref());
    let secrets = Secrets::of(wanted, certificate);
    let wants = !wanted.is_empty() || certificate.is_some();
    let checks = if wants { checks.with_secrets(secrets.keeper()) } else { checks };
    let checks = match &handoff.no_data {
        None => checks,
        Some(reason) => checks.without_data(reason.clone()),
    };
    let place = Place::of_this_machine();
    // What another place remembers may be older: it does not stand in for the TPM's.
    let other =
        |from: RollbackMemory| from != RollbackMemory::TpmNv && place.rollback_memory() == RollbackMemory::TpmNv;
    let resumed = place.resume(handoff.memory.as_ref().filter(|_| !handoff.remembers.is_some_and(other)))?;
    let (disk, unopened) = match slots(&handoff, resumed.memory.lowest(), place.clone()).await {
        Ok(disk) => (disk, None),
        Err(error) => (None, Some(error)),
    };
    console::open(facts_id()?.as_str(), &format!("{}/{}", handoff.boot.image, handoff.boot.release));
    if let Some(uplink) = &handoff.uplink {
        console::address(&uplink.describe());
    }
    if let Some(url) = handoff.servers.agent.first() {
        console::server(url);
    }
    log::take_over();
    tokio::spawn(log::follow());
    let watch = Watch::of(&handoff.manifest, disk.clone(), handoff.left.clone()).await;
    let uplink = handoff.uplink.clone();
    let lives_on = handoff.disk.as_ref().map(|on| Path::new("/sys/class/block").join(&on.name));
    let (verifier, mut journal) = resume(handoff, place, resumed, disk.as_ref()).await?;
    journal.fallback = disk.as_ref().and_then(|disk| local::fallback(&verifier.memory, disk));
    if let Some(error) = &unopened {
        journal.failed(Stage::Service, error, 1, Some(Duration::ZERO));
    }
    let site = &verifier.boot.site;
    let api = Api::new(&verifier.servers.agent, &site.agent_api_ca_pem, &verifier.key, &verifier.clock)?;
    let api = api.pinned(&verifier.pins);
    let known = || Place::of_this_machine().network();
    let machine = journal.machine.id.clone();
    tokio::spawn(uplink::stay(uplink, known, verifier.boot.clone(), machine, api.another(), uplink::LOOK));
    log::ship(api, &journal.state.boot_id, &journal.machine.id);
    journal.done(Stage::Handover);
    journal.done(Stage::Service);
    let (boot, servers) = (&verifier.boot, &verifier.servers.agent);
    let api = Api::new(servers, &boot.site.agent_api_ca_pem, &verifier.key, &verifier.clock)?.pinned(&verifier.pins);
    tokio::spawn(inventory::keep(api, journal.machine.id.clone(), journal.state.boot_id.clone()));
    let mut service = Service::new(verifier, journal, change::NEXT, door)?;
    (service.disk, service.watch, service.exec, service.secrets) = (disk, watch, exec, secrets);
    service.lives_on = lives_on;
    service.starts = Some(starts::PATH.into());
    Err(Box::pin(service.run(checks)).await)
}

/// The disk that this system runs from. One that cannot be opened any more, or not in time, costs the slots and is told of: the
/// release goes on.
async fn slots(handoff: &Handoff, floors: Vec<ReleaseId>, place: Place) -> Result<Option<SharedDisk>> {
    let Some(OnDisk { name, via }) = handoff.disk.clone() else { return Ok(None) };
    let (disk, boot) = (name.clone(), handoff.boot.clone());
    let open = move || {
        let mut disk = MachineDisk::reopen(&disk, &boot, floors)?.beside(place);
        let root_hash = init::embedded(&boot)?.root_hash;
        disk.event(slot::Event::Started(root_hash, via), None)?;
        Ok::<_, AgentError>(SharedDisk::new(disk))
    };
    let opened = search::in_time(&name, search::OPENING, search::OPENS, open).await;
    opened.map_err(AgentError::from).flatten().map(Some)
}

fn facts_id() -> Result<MachineId> {
    let place = Place::of_this_machine();
    Ok(facts::read(place.key_storage(), place.rollback_memory())?.id)
}

/// What a start of the service that was killed had fetched: it is memory.
fn forget_an_earlier_start() {
    for path in change::files(Path::new(change::NEXT)) {
        if path.exists()
            && let Err(error) = std::fs::remove_file(&path)
        {
            eprintln!("kiln-agent: {}: cannot be removed: {error}", path.display());
        }
    }
}

async fn resume(
    handoff: Handoff,
    place: Place,
    resumed: Resumed,
    disk: Option<&SharedDisk>,
) -> Result<(Verifier, Journal)> {
    let Identity { key, lost } = place.key()?;
    let mut machine = facts::read(place.key_storage(), place.rollback_memory())?;
    machine.protection = init::protection(&handoff.boot);
    machine.tpm = Some(tpm::presence());
    let embedded = init::embedded(&handoff.boot)?;
    let root_hash = verity::running_root_hash()?;
    if root_hash != handoff.manifest.verity.root_hash {
        return Err(AgentError::RunningRoot { expected: handoff.manifest.verity.root_hash, got: root_hash });
    }
    let root_hash = root_hash.parse().map_err(|e: kiln_protocol::IdError| AgentError::Format {
        path: "/dev/mapper/control".into(),
        reason: e.to_string(),
    })?;
    let running = RunningRelease { root_hash, ..embedded.clone() };
    // Not the hand-over's: this may be a later start of the service, and what was seen since then counts.
    let Resumed { memory, spoilt } = resumed;
    let now = memory.time_floor.map_or(handoff.now, |t| t.max(handoff.now));
    let mut state = handoff.journal;
    // Likewise reports: their numbers go on above all that an earlier start can have made.
    state.seq = state.seq.max(monotonic_ms());
    let mut journal = Journal {
        state,
        machine,
        embedded,
        running: Some(running),
        health: None,
        prefetch: None,
        fallback: None,
        condition: None,
    };
    for error in [lost.as_ref(), spoilt.as_ref()].into_iter().flatten() {
        journal.failed(Stage::Service, error, 1, Some(Duration::ZERO));
    }
    let mut verifier = Verifier::new(handoff.boot, place, key, memory, handoff.servers, now);
    // Else the next boot could not read it, and would wait for a person. That it cannot be stored is told with the first report.
    if spoilt.is_some() && verifier.keep() {
        eprintln!("kiln-agent: what this machine remembers is stored anew");
    }
    verifier.settings = handoff.settings;
    verifier.stale.clone_from(&journal.state.stale);
    verifier.pins.set(&handoff.agent_api_keys);
    verifier.held = disk.map(|disk| local::held(&disk.slots())).unwrap_or_default();
    // A system in memory was fetched for this boot; one on a disk was verified whole when the disk says so.
    verifier.put_up = match disk {
        None if handoff.disk.is_some() => u64::MAX,
        None => handoff.sequence,
        Some(disk) => {
            let root_hash = journal.embedded.root_hash.clone();
            let order = on_disk(disk, move |disk| Ok(disk.put_up(&root_hash))).await;
            order.ok().and_then(|order| verifier.memory.sequence_of(order)).unwrap_or(0)
        }
    };
    Ok((verifier, journal))
}
