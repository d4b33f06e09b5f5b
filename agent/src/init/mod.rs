//! PID 1 of the initramfs: from an empty machine to the image's own init. It trusts nothing that it did not verify,
//! never gives a shell, and ends in one of two ways: the verified root, or a restart with a reason.

mod begun;
mod embedded;
mod onward;
mod start;
mod switch_root;
mod unheard;

pub use begun::Begun;
pub use embedded::{embedded, parse_boot_info, protection, running_command_line, secure_boot};

use crate::coldplug::{After, Drivers};
use crate::disk::DiskError;
use crate::disk::boot_order;
use crate::disk::machine::{self, SharedDisk, on_disk};
use crate::disk::store::Starts;
use crate::error::{AgentError, FailureClass, Result};
use crate::flow::{Flow, RESTART_PAUSE};
use crate::journal::{JournalState, boot_id, monotonic_ms};
use crate::memory::{self, Memory, Place};
use crate::plan::{self, Plan};
use crate::uplink::Network;
use crate::verifier::{Answer, Verified, Verifier};
use crate::watchdog::{self, Watchdog};
use crate::{change, console, ima, kexec, local, log, mounts, net, restart, safe, tpm, wipe};
use embedded::{read_boot_info, tell_command_line_drift};
use kiln_protocol::{Assignment, Failure, ReleaseId, RollbackMemory, Stage, TpmPresence, Via};
use kiln_release::BootInfo;
use nix::sys::reboot::RebootMode;
use onward::{Again, Onward};
use start::start;
use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;
use tokio::time::timeout;

/// So long a boot that ends at once looks for a server that hears why.
const LAST_WORD: Duration = Duration::from_secs(90);
/// And so long a boot that leaves its disk alone: longer than a switch or a server takes that starts with the rack.
const WITHOUT_DISK: Duration = Duration::from_secs(10 * 60);
/// Where versions are kept while those of earlier boots cannot be read, and a key while the machine's own cannot be had.
const MEANWHILE: &str = "/run/kiln/meanwhile";

/// Runs as PID 1; comes back only when the machine restarts.
pub fn run() -> ! {
    log::begin();
    let error = match boot() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    println!("kiln-agent: {} ({})", error, error.kind());
    println!("kiln-agent: this boot ends here; the machine restarts in {} s", RESTART_PAUSE.as_secs());
    std::thread::sleep(RESTART_PAUSE);
    restart()
}

fn restart() -> ! {
    // It returns only with an error; the loop keeps PID 1 alive, and a watchdog or a person is next.
    let error = restart::leave(RebootMode::RB_AUTOBOOT);
    println!("kiln-agent: the kernel does not restart the machine: {error}");
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn boot() -> Result<Infallible> {
    mounts::pseudo_filesystems()?;
    let started_ms = monotonic_ms();
    let boot = read_boot_info()?;
    let mut journal = JournalState::begin(boot_id()?, started_ms);
    println!("kiln-agent {}: image {} release {}", env!("CARGO_PKG_VERSION"), boot.image, boot.release);
    journal.record(Stage::Start, kiln_protocol::StageState::Done);
    tell_command_line_drift(&boot);

    let mut drivers = Drivers::open()?;
    // Before anything that may hang while it looks for its hardware.
    drivers.load_watchdogs();
    let watchdog = Watchdog::is_there().then(Watchdog::arm).flatten();
    journal.record(Stage::Modules, kiln_protocol::StageState::Started);
    drivers.load_always();
    drivers.coldplug_and(&mut |after| {
        // A link takes seconds to find its other end: other drivers are loaded meanwhile.
        if after == After::Card {
            net::raise();
        }
        // Each driver has the watchdog's whole time: many that are slow are no hang.
        watchdog::pet();
    });
    drivers.load_for_root();
    ima::measure_kexecs();
    // The variables' file system may have been a module.
    mounts::efivars();
    mounts::pstore();
    log::earlier();
    for error in drivers.silent() {
        journal.note_hung(&error);
        let (kind, message) = (error.kind().to_owned(), error.to_string());
        let failure = Failure { kind, message, attempt: 1, retry_in_ms: Some(0) };
        journal.record(Stage::Modules, kiln_protocol::StageState::Failed(failure));
    }
    journal.record(Stage::Modules, kiln_protocol::StageState::Done);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::system("starting the runtime"))?;
    // A driver of another name may have brought one.
    let watchdog = watchdog.or_else(Watchdog::arm);
    let ended = runtime.block_on(async {
        tokio::spawn(log::follow());
        if let Some(watchdog) = watchdog {
            tokio::spawn(watchdog.keep());
        }
        Box::pin(go(boot, journal, drivers)).await
    });
    // A thread that hangs in a disk must not hang the restart as well.
    runtime.shutdown_background();
    ended
}

async fn go(boot: BootInfo, state: JournalState, drivers: Drivers) -> Result<Infallible> {
    // In a thread: a TPM that lets each command time out must not keep the watchdog from being petted.
    let begun = change::blocking(|| Begun::of(Place::of_this_machine(), Path::new(MEANWHILE)));
    let Begun { place, identity, memory, spoilt, fault } = begun.await?;
    let below_floor = memory.may_boot(&boot).err();
    let protection = protection(&boot);
    // One that gives no key or memory is none to this boot: a server that knows a key in it says so then.
    let presence =
        if fault.is_some() { TpmPresence::Unusable } else { change::blocking(|| Ok(tpm::presence())).await? };
    let mut flow = Flow::begin(boot, state, place, identity, memory, Some(presence))?;
    flow.journal.machine.protection = protection;
    console::open(flow.journal.machine.id.as_str(), &flow.verifier.here()?.to_string());

    if let Some(error) = unheard::told(&Place::beside_tpm()) {
        flow.journal.failed(Stage::Modules, &error, 1, Some(Duration::ZERO));
    }

    let drivers = &mut Some(drivers);
    let error = if let Some(error) = fault.or(below_floor) {
        Box::pin(tell(&mut flow, drivers, &error)).await;
        error
    } else if let Some(error) = spoilt {
        // With the memory the floor is gone: this may be a release below it.
        if is_closed().await {
            let mut network = Network::start(&mut flow);
            let meanwhile = (Place::Directory(MEANWHILE.into()), safe::TELL_EVERY);
            match Box::pin(safe::ask_a_person(&mut flow, drivers, &mut network, &error, meanwhile)).await {
                Ok(()) => restart(),
                Err(error) => error,
            }
        } else {
            error
        }
    } else {
        let error = match Box::pin(travel(&mut flow, drivers)).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        leave_out(&mut flow.verifier, &error);
        error
    };
    let error = match flow.verifier.wipe.take() {
        None => error,
        Some(order) => match wipe::obey(&mut flow, &order).await {
            Ok(()) => restart(),
            Err(error) => error,
        },
    };
    flow.give_up(&error).await;
    let Verifier { place, memory, .. } = &mut flow.verifier;
    rest(place, memory, &error).await;
    Err(error)
}

/// A boot image below the floor, or on a machine whose memory or key cannot be had, starts nothing and asks for nothing. It says so to
/// whichever server it finds, or a rack that is sent old boot programs, or whose TPMs fail, would restart for ever and nobody would
/// hear why. What it finds a server with may be old code.
async fn tell(flow: &mut Flow, drivers: &mut Option<Drivers>, error: &AgentError) {
    println!("kiln-agent: {error} ({}): nothing is started", error.kind());
    let is_closed = is_closed().await;
    if matches!(error, AgentError::BelowFloor { .. }) {
        local::leave_floor(flow).await;
    }
    if is_closed {
        let mut network = Network::start(flow);
        find_a_hearer(flow, drivers, &mut network).await;
    }
    // It goes out when the boot is given up.
    flow.journal.failed(Stage::Start, error, 1, None);
}

/// Before a byte is heard by what may be old code, this boot leaves the state in which the TPM gives out data and secrets. Where it
/// cannot, and the TPM answers, nothing is heard, and the boot is counted as one that nobody hears of.
async fn is_closed() -> bool {
    let close = || tpm::close().map_err(AgentError::from).inspect_err(|_| unheard::count(&Place::beside_tpm()));
    match change::blocking(close).await {
        Ok(()) => true,
        Err(error) => {
            println!("kiln-agent: no server is asked to hear of it: {error} ({})", error.kind());
            false
        }
    }
}

/// For a boot that ends before it asked for anything: a server that hears why, if one is found soon.
async fn find_a_hearer(flow: &mut Flow, drivers: &mut Option<Drivers>, network: &mut Network) {
    match timeout(LAST_WORD, network.connect(flow, drivers)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => println!("kiln-agent: no server hears of it: {error} ({})", error.kind()),
        Err(_) => println!("kiln-agent: no server hears of it within {} s", LAST_WORD.as_secs()),
    }
}

/// A boot that ends because its disk gives no answer is the last one of its kind: the next runs in memory, without it.
fn leave_out(verifier: &mut Verifier, error: &AgentError) {
    if verifier.memory.disk_hangs(error)
        && let Err(error) = verifier.place.remember(&verifier.memory)
    {
        println!("kiln-agent: that a disk gave no answer is not remembered, and the next boot tries it again: {error}");
    }
}

/// A boot that ends because what was served does not verify: the more of them in a row, the longer the pause.
async fn rest(place: &Place, memory: &mut Memory, error: &AgentError) {
    match error.class() {
        FailureClass::Verification => {}
        FailureClass::Unreachable | FailureClass::Machine | FailureClass::Usage => return,
    }
    let counted = memory.boot_failed();
    let is_kept = match place.remember(memory) {
        Ok(()) => place.rollback_memory() != RollbackMemory::None,
        Err(error) => {
            println!("kiln-agent: that this boot failed is not remembered: {error}");
            false
        }
    };
    let jitter = memory::random().map_or(u8::MAX, |bytes| bytes[0]);
    let pause = memory::rest(counted, is_kept, jitter);
    if pause.is_zero() {
        return;
    }
    let seconds = pause.as_secs();
    if is_kept {
        println!(
            "kiln-agent: {} boots in a row did not verify; this machine rests for {seconds} s",
            memory.failed_boots
        );
    } else {
        println!(
            "kiln-agent: this boot did not verify, and how many did before is not known; it rests for {seconds} s"
        );
    }
    tokio::time::sleep(pause).await;
}

/// From the network to the image's init.
async fn travel(flow: &mut Flow, drivers: &mut Option<Drivers>) -> Result<Infallible> {
    let hung = flow.verifier.memory.disk_hung.clone();
    let disk = local::open_disk(flow).await;
    let root_hash = flow.journal.embedded.root_hash.clone();
    let mut network = Network::start(flow);
    let from_disk = boot_order::is_from_disk();
    // Also where firmware reads its EFI system partition and the agent cannot.
    let starts_from = |disk: &SharedDisk| {
        machine::boots(&disk.slots(), &root_hash) || (from_disk && disk.unlisted(&root_hash).is_some())
    };
    if let Some(disk) = disk.clone().filter(starts_from) {
        local::tell_fallback(flow, &disk);
        let (release, sequence) = (root_hash.clone(), flow.verifier.memory.sequence);
        let counted = on_disk(&disk, move |disk| Ok(disk.count_start(&release, sequence))).await;
        // A disk that hangs costs the count, not the boot.
        let starts = counted.unwrap_or_else(|error| {
            println!("kiln-agent: the start is not counted: {error}");
            Starts::default()
        });
        if starts.count >= machine::STARTS {
            if local::leave_loop(flow, &disk, starts).await {
                restart();
            }
            safe::stay(flow, drivers, &mut network, &disk, starts).await?;
            restart();
        }
        // Where the network chose it, or a cold boot leads nowhere else, another release that is assigned goes before it.
        let only_kexec = disk.unlisted(&root_hash).is_some();
        let leave = (only_kexec || (!from_disk && kexec::started_this() == Via::Cold)).then_some(only_kexec);
        let error = match Box::pin(from_slot(flow, drivers, &mut network, &disk, (starts, leave))).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        local::count_failed(&disk, &error).await;
        return Err(error);
    }
    match hung.filter(|_| disk.is_none()) {
        // Without a server there is nothing but the disk: it is tried again.
        Some(disk) => {
            let late = |_| Err(DiskError::LeftOut { disk }.into());
            timeout(WITHOUT_DISK, network.connect(flow, drivers)).await.unwrap_or_else(late)?;
        }
        None => network.connect(flow, drivers).await?,
    }
    set_host_name(&network, flow);
    flow.ship_log()?;
    let here = flow.verifier.here()?;
    let mut verified = metadata(flow, &here, Stage::Metadata).await?;
    let boot = &flow.verifier.boot;
    verified.manifest.matches_boot(boot)?;
    plan::check_command_line(&verified.manifest, &boot.command_line, &running_command_line())?;
    let slots = disk.as_ref().map(SharedDisk::slots);
    let mode = flow.verifier.boot.site.mode;
    let again = Again::of(from_disk, kexec::started_this(), mode, slots.as_ref(), &root_hash);
    let only_kexec = again.only_kexec();
    loop {
        let (assignment, via, plan) = wait_for_assignment(flow, &mut verified).await?;
        network.adopt(flow, drivers, &verified, &assignment.role).await?;
        match plan {
            Plan::Stay => return Box::pin(start(flow, drivers, verified, network.uplink(), disk)).await,
            // The loader started it, and would again after a cold boot: its root is fetched anew, and the running
            // system goes on from there. One that may not start any more is only left.
            Plan::Change(release)
                if again == Again::Here && flow.verifier.memory.may_boot(&flow.verifier.boot).is_ok() =>
            {
                println!("kiln-agent: {release} is assigned; {here} is mended in its slot first");
                return Box::pin(start(flow, drivers, verified, network.uplink(), disk)).await;
            }
            Plan::Change(release) => match go_there(flow, &assignment, via, only_kexec, &release).await {
                Ok(()) => return Box::pin(start(flow, drivers, verified, network.uplink(), disk)).await,
                // The server wants something else by now: it is asked again.
                Err(AgentError::Superseded) => {
                    flow.journal.waiting(Stage::Prefetch, "another assignment has come");
                }
                Err(error) => return Err(error),
            },
        }
    }
}

/// To the assigned release. Where that is left undone, what is here starts.
async fn go_there(
    flow: &mut Flow,
    assignment: &Assignment,
    via: Via,
    only_kexec: bool,
    release: &ReleaseId,
) -> Result<()> {
    let here = flow.verifier.here()?;
    let how = if only_kexec { ", by kexec only" } else { "" };
    println!("kiln-agent: {release} is assigned, this is {here}: going there{how}");
    match Box::pin(onward::go(flow, assignment, via, only_kexec, Path::new(change::NEXT))).await? {
        Onward::Restart => {
            log::sent().await;
            restart()
        }
        Onward::Stay(error) => {
            println!("kiln-agent: no kexec leads to {release} ({error}): {here} starts");
            Ok(())
        }
    }
}

/// The release in the slot starts, whatever the network says, or does not say; but where it is to `leave` for the one that a boot
/// server assigns (by kexec only?), it starts only if that cannot be had.
async fn from_slot(
    flow: &mut Flow,
    drivers: &mut Option<Drivers>,
    network: &mut Network,
    disk: &SharedDisk,
    (starts, leave): (Starts, Option<bool>),
) -> Result<Infallible> {
    if starts.count >= machine::SUSPECT
        && let Err(error) = local::read_back(flow, disk).await
    {
        println!("kiln-agent: {error} ({})", error.kind());
        find_a_hearer(flow, drivers, network).await;
        return Err(error);
    }
    let asked = timeout(local::PATIENCE, local::ask(flow, drivers, network)).await;
    let error = match asked {
        Ok(Ok((verified, (assignment, via, plan)))) => {
            let adopted = network.adopt(flow, drivers, &verified, &assignment.role);
            if !timeout(local::ADOPTION, adopted).await.is_ok_and(|adopted| adopted.is_ok()) {
                println!("kiln-agent: the boot server is lost again; the release in the slot starts");
            } else if let (Plan::Change(release), Some(only_kexec)) = (plan, leave) {
                let going = go_there(flow, &assignment, via, only_kexec, &release);
                let why = match timeout(local::GOING, going).await {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => {
                        if error.class() == FailureClass::Verification || flow.verifier.wipe.is_some() {
                            return Err(error);
                        }
                        Some(error.to_string())
                    }
                    Err(_) => Some(format!("not within {} s", local::GOING.as_secs())),
                };
                if let Some(why) = why {
                    println!("kiln-agent: {release} cannot be had ({why}); the release in the slot starts");
                }
            }
            return Box::pin(start(flow, drivers, verified, network.uplink(), Some(disk.clone()))).await;
        }
        Ok(Err(error)) if flow.verifier.wipe.is_some() => return Err(error),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no word of it within {} s", local::PATIENCE.as_secs()),
    };
    println!("kiln-agent: the boot server does not decide this boot ({error}); the release in the slot starts");
    let verified = local::only_recorded(flow, disk).await?;
    Box::pin(start(flow, drivers, verified, network.uplink(), Some(disk.clone()))).await
}

/// Verifies metadata, with retries; `stage` is Metadata at boot.
pub async fn metadata(flow: &mut Flow, release: &ReleaseId, stage: Stage) -> Result<Verified> {
    flow.journal.started(stage);
    let mut attempt = 0;
    loop {
        attempt += 1;
        match flow.verifier.verify_metadata(release).await {
            Ok(verified) => {
                if let Some((file, expires)) = verified.stale_at(flow.verifier.now) {
                    println!("kiln-agent: metadata is stale: {file} expired at {expires}");
                }
                flow.journal.done(stage);
                return Ok(verified);
            }
            Err(error) => flow.after_failure(stage, error, attempt).await?,
        }
    }
}

/// Asks until something is assigned that this machine may go to; one that waits for a person waits for ever, and says so.
/// What does not hold of an answer is told, and asked for again with the metadata read anew: the director's key may have
/// been replaced. No answer of a server ends the boot.
pub async fn wait_for_assignment(flow: &mut Flow, verified: &mut Verified) -> Result<(Assignment, Via, Plan)> {
    flow.journal.started(Stage::Assignment);
    let here = flow.verifier.here()?;
    let mut attempt = 0;
    let mut told = String::new();
    let mut wait_s = 0;
    loop {
        let answer = match flow.ask(verified, wait_s).await {
            Ok(Answer::Assigned { assignment, via, .. }) => {
                let currency = flow.verifier.currency(verified);
                plan::decide(&here, &assignment, &flow.verifier.memory, &currency)
                    .map(|plan| Some((assignment, via, plan)))
            }
            Ok(Answer::Wipe(order)) => {
                flow.verifier.wipe = Some(order);
                return Err(AgentError::Superseded);
            }
            Ok(Answer::Wait(reason)) => {
                if reason != told {
                    flow.journal.waiting(Stage::Assignment, &reason);
                    told = reason;
                }
                Ok(None)
            }
            Err(error) => Err(error),
        };
        match answer {
            Ok(Some(decided)) => {
                flow.journal.done(Stage::Assignment);
                return Ok(decided);
            }
            Ok(None) => {
                attempt = 0;
                // Held by the server until something changes; where it does not hold, this is the pause.
                let asked = tokio::time::Instant::now();
                wait_s = 30;
                tokio::time::sleep_until(asked + Duration::from_secs(2)).await;
            }
            Err(error) => {
                attempt += 1;
                // The site may have named another key, of the director or of the agent API.
                let newer =
                    matches!(error, AgentError::AgentApiKey { .. }) || error.class() == FailureClass::Verification;
                told.clear();
                flow.after_answer(Stage::Assignment, error, attempt).await?;
                if newer {
                    read_anew(flow, &here, verified, attempt).await;
                }
            }
        }
    }
}

/// The newest metadata, where there is any that holds; what is known stays otherwise, and the next report says why.
async fn read_anew(flow: &mut Flow, here: &ReleaseId, verified: &mut Verified, attempt: u32) {
    let read = flow.verifier.verify_metadata(here).await;
    match read.and_then(|newest| Ok(newest.manifest.matches_boot(&flow.verifier.boot).map(|()| newest)?)) {
        Ok(newest) => *verified = newest,
        Err(error) => flow.journal.failed(Stage::Metadata, &error, attempt, Some(Duration::ZERO)),
    }
}

/// The first label of what DHCP says, else one of the machine's id. A name is no reason not to boot.
pub fn set_host_name(network: &Network, flow: &Flow) {
    let short = &flow.journal.machine.id.as_str()[24..];
    let said = network.hostname().and_then(|n| n.split('.').next()).filter(|n| (1..=63).contains(&n.len()));
    let name = said.map_or_else(|| format!("kiln-{short}"), str::to_owned);
    if let Err(error) = nix::unistd::sethostname(&name) {
        println!("kiln-agent: the host name {name} cannot be set: {error}");
    }
}
