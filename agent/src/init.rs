//! PID 1 of the initramfs: from an empty machine to the image's own init. It trusts nothing that it did not verify,
//! never gives a shell, and ends in one of two ways: the verified root, or a restart with a reason.

use crate::coldplug::Drivers;
use crate::disk::machine::{self, SharedDisk, on_disk};
use crate::error::{AgentError, ROOT, Result};
use crate::fetch::Expected;
use crate::flow::{Flow, RESTART_PAUSE, TELL_EVERY};
use crate::handoff::{Handoff, OnDisk};
use crate::journal::{Journal, JournalState, boot_id, monotonic_ms};
use crate::memory::Place;
use crate::net::Uplink;
use crate::plan::{self, Plan};
use crate::secureboot::SecureBoot;
use crate::uplink::Network;
use crate::verifier::{Answer, Servers, Verified, Verifier};
use crate::watchdog::Watchdog;
use crate::{change, console, facts, kexec, local, log, mounts, safe, verity, wipe};
use kiln_protocol::slot::{Event, SlotId};
use kiln_protocol::{Assignment, Class, ReleaseId, RunningRelease, Stage, Via};
use kiln_release::{BOOT_PATH, BootInfo, hex};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

/// Where the verified root is mounted before the hand-over.
const NEW_ROOT: &str = "/newroot";
/// The root artifact, in a tmpfs that moves to the new root's /run.
const ROOT_FILE: &str = "/run/kiln/root";
/// The image's own init.
const NEXT_INIT: &str = "/sbin/init";

/// Runs as PID 1; comes back only when the machine restarts.
pub fn run() -> ! {
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
    nix::unistd::sync();
    // It returns only with an error; the loop keeps PID 1 alive, and a watchdog or a person is next.
    let error = reboot(RebootMode::RB_AUTOBOOT);
    println!("kiln-agent: the kernel does not restart the machine: {error:?}");
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

    journal.record(Stage::Modules, kiln_protocol::StageState::Started);
    let mut drivers = Drivers::open()?;
    drivers.load_always();
    drivers.coldplug();
    // The variables' file system may have been a module.
    mounts::efivars();
    journal.record(Stage::Modules, kiln_protocol::StageState::Done);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::system("starting the runtime"))?;
    let watchdog = Watchdog::arm();
    runtime.block_on(async {
        tokio::spawn(log::follow());
        if let Some(watchdog) = watchdog {
            tokio::spawn(watchdog.keep());
        }
        Box::pin(go(boot, journal, drivers)).await
    })
}

async fn go(boot: BootInfo, journal: JournalState, drivers: Drivers) -> Result<Infallible> {
    let place = Place::of_this_machine();
    let key = place.key()?;
    let memory = place.memory()?;
    // The floor comes before anything else is believed.
    let floor = memory.floor(&boot.image);
    if boot.release < floor {
        return Err(AgentError::BelowFloor { image: boot.image.clone(), release: boot.release, floor });
    }
    let embedded = embedded(&boot)?;
    let now = memory.time_floor.map_or(boot.built, |t| t.max(boot.built));
    let mut machine = facts::read(place.key_storage(), place.rollback_memory())?;
    machine.protection = secure_boot(&boot).class();
    console::open(machine.id.as_str(), &format!("{}/{}", boot.image, boot.release));
    let journal = Journal {
        state: journal,
        machine,
        embedded,
        running: None,
        health: None,
        prefetch: None,
        fallback: None,
        condition: None,
    };
    let servers = Servers { http: boot.site.http_urls.clone(), agent: boot.site.agent_urls.clone() };
    let verifier = Verifier::new(boot, place, key, memory, servers, now);
    let mut flow = Flow { verifier, journal, api: None, tries: None, tell_every: TELL_EVERY };

    let error = match Box::pin(travel(&mut flow, &mut Some(drivers))).await {
        Ok(never) => match never {},
        Err(error) => error,
    };
    if let Some(order) = flow.verifier.wipe.take() {
        wipe::obey(&mut flow, &order).await?;
        restart();
    }
    flow.give_up(&error).await;
    Err(error)
}

/// From the network to the image's init.
async fn travel(flow: &mut Flow, drivers: &mut Option<Drivers>) -> Result<Infallible> {
    let disk = local::open_disk(flow);
    let root_hash = flow.journal.embedded.root_hash.clone();
    let mut network = Network::start(flow);
    if let Some(disk) = disk.clone().filter(|disk| machine::lock(disk).boots(&root_hash)) {
        local::tell_fallback(flow, &machine::lock(&disk));
        let (root_hash, sequence) = (root_hash.clone(), flow.verifier.memory.sequence);
        let starts = on_disk(&disk, move |disk| Ok(disk.count_start(&root_hash, sequence))).await?;
        if starts.count >= machine::STARTS {
            safe::stay(flow, drivers, &mut network, &disk, starts).await?;
            restart();
        }
        if starts.count >= machine::SUSPECT {
            local::read_back(flow, &disk).await?;
        }
        // It starts from its slot whatever the network says, or does not say.
        let asked = tokio::time::timeout(local::PATIENCE, local::ask(flow, drivers, &mut network)).await;
        let error = match asked {
            Ok(Ok((verified, role))) => {
                let adopted = network.adopt(flow, drivers, &verified, &role);
                if !tokio::time::timeout(local::ADOPTION, adopted).await.is_ok_and(|adopted| adopted.is_ok()) {
                    println!("kiln-agent: the boot server is lost again; the release in the slot starts");
                }
                return start(flow, verified, network.uplink(), Some(disk)).await;
            }
            Ok(Err(error)) if flow.verifier.wipe.is_some() => return Err(error),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no word of it within {} s", local::PATIENCE.as_secs()),
        };
        println!("kiln-agent: the boot server does not decide this boot ({error}); the release in the slot starts");
        let verified = local::recorded(flow, &disk)?;
        return start(flow, verified, network.uplink(), Some(disk)).await;
    }
    network.connect(flow, drivers).await?;
    set_host_name(&network, flow);
    flow.ship_log()?;
    let here = flow.verifier.here()?;
    let verified = metadata(flow, &here, Stage::Metadata).await?;
    let boot = &flow.verifier.boot;
    verified.manifest.matches_boot(boot)?;
    let running = running_command_line();
    if verified.manifest.policy.refuse_foreign_command_line && !plan::command_line_is(&running, &boot.command_line) {
        return Err(AgentError::CommandLine { expected: boot.command_line.clone(), got: running });
    }
    loop {
        let (assignment, via) = wait_for_assignment(flow, &verified).await?;
        network.adopt(flow, drivers, &verified, &assignment.role).await?;
        match plan::decide(&here, &assignment, &flow.verifier.memory, &flow.verifier.currency(&verified))? {
            Plan::Stay => return start(flow, verified, network.uplink(), disk).await,
            // The loader started it, and would again after a cold boot: its root is fetched anew, and the running
            // system goes on from there.
            Plan::Change(release) if disk.as_ref().is_some_and(|disk| machine::lock(disk).knows(&root_hash)) => {
                println!("kiln-agent: {release} is assigned; {here} is mended in its slot first");
                return start(flow, verified, network.uplink(), disk).await;
            }
            Plan::Change(release) => {
                println!("kiln-agent: {release} is assigned, this is {here}: going there");
                match change::now(flow, &assignment, via).await {
                    Ok(()) => {
                        log::sent().await;
                        restart()
                    }
                    // The server wants something else by now: it is asked again.
                    Err(AgentError::Superseded) => {
                        flow.journal.waiting(Stage::Prefetch, "another assignment has come");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
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

/// Asks until something is assigned; a machine that waits for a person waits for ever, and says so.
pub async fn wait_for_assignment(flow: &mut Flow, verified: &Verified) -> Result<(Assignment, Via)> {
    flow.journal.started(Stage::Assignment);
    let mut attempt = 0;
    let mut told = String::new();
    let mut wait_s = 0;
    loop {
        match flow.ask(verified, wait_s).await {
            Ok(Answer::Assigned { assignment, via, .. }) => {
                flow.journal.done(Stage::Assignment);
                return Ok((assignment, via));
            }
            Ok(Answer::Wipe(order)) => {
                flow.verifier.wipe = Some(order);
                return Err(AgentError::Superseded);
            }
            Ok(Answer::Wait(reason)) => {
                attempt = 0;
                if reason != told {
                    flow.journal.waiting(Stage::Assignment, &reason);
                    told = reason;
                }
                // Held by the server until something changes; where it does not hold, this is the pause.
                let asked = tokio::time::Instant::now();
                wait_s = 30;
                tokio::time::sleep_until(asked + Duration::from_secs(2)).await;
            }
            Err(error) => {
                attempt += 1;
                flow.after_failure(Stage::Assignment, error, attempt).await?;
            }
        }
    }
}

/// Fetches, verifies, mounts and starts the release that this UKI embeds.
async fn start(
    flow: &mut Flow,
    verified: Verified,
    uplink: Option<Uplink>,
    disk: Option<SharedDisk>,
) -> Result<Infallible> {
    // The last gate before anything of it starts, whichever way led here.
    flow.verifier.may_run(&verified.manifest)?;
    // What an order starts never goes into a slot: the loader would start it again without the order.
    let disk = disk.filter(|_| verified.manifest.class == Class::Normal.as_str());
    flow.journal.started(Stage::Root);
    flow.report().await;
    if let Some(disk) = disk {
        match local::install_here(flow, &verified, &disk).await {
            Ok(slot) => {
                flow.journal.done(Stage::Root);
                return start_slot(flow, verified, uplink, &disk, slot).await;
            }
            // A disk that fails costs the slots, not the boot.
            Err(error) => flow.journal.failed(Stage::Root, &error, 1, Some(Duration::ZERO)),
        }
    }
    let root = Path::new(ROOT_FILE);
    let expected =
        Expected { what: ROOT, sha256: verified.manifest.root.sha256.clone(), length: verified.manifest.root.length };
    match take_prefetched(root, &expected) {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            flow.after_failure(Stage::Root, error, 1).await?;
            flow.fetch_to(Stage::Root, expected, root).await?;
        }
        None => flow.fetch_to(Stage::Root, expected, root).await?,
    }
    flow.journal.done(Stage::Root);

    flow.journal.started(Stage::Verity);
    let device =
        verity::open(root, &verified.manifest.verity, &flow.verifier.boot.root_hash, secure_boot(&flow.verifier.boot))?;
    mount_and_leave(flow, verified, uplink, &device, None).await
}

/// The same from a slot. A root that cannot be mounted is told to the slots: the next boot is another's.
async fn start_slot(
    flow: &mut Flow,
    verified: Verified,
    uplink: Option<Uplink>,
    disk: &SharedDisk,
    slot: SlotId,
) -> Result<Infallible> {
    flow.journal.started(Stage::Verity);
    let (name, device) = on_disk(disk, move |disk| Ok((disk.name().to_owned(), disk.device(slot)?))).await?;
    let params = verified.manifest.verity.clone();
    let boot = &flow.verifier.boot;
    let device = verity::open_device(&device.display().to_string(), &params, &boot.root_hash, secure_boot(boot))?;
    let on = OnDisk { name, via: kexec::started_this() };
    let error = match mount_and_leave(flow, verified, uplink, &device, Some(on)).await {
        Ok(never) => match never {},
        Err(error) => error,
    };
    if let AgentError::System { source, .. } = &error
        && [libc::EIO, libc::EINVAL, libc::EUCLEAN, libc::EBADMSG].map(Some).contains(&source.raw_os_error())
    {
        on_disk(disk, move |disk| disk.event(Event::Spoilt(slot), None)).await?;
    }
    Err(error)
}

async fn mount_and_leave(
    flow: &mut Flow,
    verified: Verified,
    uplink: Option<Uplink>,
    device: &str,
    disk: Option<OnDisk>,
) -> Result<Infallible> {
    std::fs::create_dir_all(NEW_ROOT).map_err(AgentError::file(NEW_ROOT))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    mount(Some(device), NEW_ROOT, Some("erofs"), flags, None::<&str>)
        .map_err(AgentError::system(format!("mounting {device}")))?;
    let running = verity::running_root_hash()?;
    if running != flow.verifier.boot.root_hash {
        return Err(AgentError::RunningRoot { expected: flow.verifier.boot.root_hash.clone(), got: running });
    }
    flow.journal.done(Stage::Verity);
    flow.journal.started(Stage::Handover);
    flow.report().await;
    let handoff = Handoff {
        boot: flow.verifier.boot.clone(),
        manifest: verified.manifest,
        servers: flow.verifier.servers.clone(),
        journal: flow.journal.state.clone(),
        uplink,
        disk,
        sequence: flow.verifier.memory.sequence,
        now: flow.verifier.now,
    };
    handoff.write()?;
    log::hand_over()?;
    secure_boot(&flow.verifier.boot).restrict()?;
    switch_root()
}

/// The root that crossed a kexec in the initrd: copied out of the initramfs and verified again. One that does not verify
/// is removed, so that the next try downloads.
fn take_prefetched(root: &Path, expected: &Expected) -> Option<Result<()>> {
    let from = Path::new(kexec::PREFETCHED).join(&expected.sha256);
    if !from.exists() {
        return None;
    }
    let copied = copy_verified(&from, root, expected);
    // Its memory is wanted, whatever came of it.
    let removed = std::fs::remove_file(&from).map_err(AgentError::file(&from));
    Some(copied.and(removed))
}

fn copy_verified(from: &Path, to: &Path, expected: &Expected) -> Result<()> {
    use std::io::{Read, Write};
    let mut source = File::open(from).map_err(AgentError::file(from))?;
    let mut target = File::create(to).map_err(AgentError::file(to))?;
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let n = source.read(&mut buffer).map_err(AgentError::file(from))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        target.write_all(&buffer[..n]).map_err(AgentError::file(to))?;
    }
    let got = hex::encode(hash.finish().as_ref());
    if got == expected.sha256 {
        Ok(())
    } else {
        Err(AgentError::HashMismatch { what: expected.what, expected: expected.sha256.clone(), got })
    }
}

/// What this machine's firmware enforces, seen from this release.
pub fn secure_boot(boot: &BootInfo) -> SecureBoot {
    SecureBoot::of_this_machine(boot.site.secure_boot.as_deref())
}

fn read_boot_info() -> Result<BootInfo> {
    let bytes = std::fs::read(BOOT_PATH).map_err(AgentError::file(BOOT_PATH))?;
    parse_boot_info(&bytes, Path::new(BOOT_PATH))
}

/// Reads and checks a `boot.json`.
pub fn parse_boot_info(bytes: &[u8], path: &Path) -> Result<BootInfo> {
    let boot: BootInfo =
        serde_json::from_slice(bytes).map_err(|e| AgentError::Format { path: path.into(), reason: e.to_string() })?;
    boot.check()?;
    Ok(boot)
}

/// What the UKI embeds, as the wire says it.
pub fn embedded(boot: &BootInfo) -> Result<RunningRelease> {
    let bad = |e: kiln_protocol::IdError| AgentError::Format { path: BOOT_PATH.into(), reason: e.to_string() };
    Ok(RunningRelease {
        image: boot.image.parse().map_err(bad)?,
        release: boot.release,
        root_hash: boot.root_hash.parse().map_err(bad)?,
    })
}

/// The command line decides nothing here; a difference from the embedded one is drift, and told.
fn tell_command_line_drift(boot: &BootInfo) {
    let running = running_command_line();
    if !plan::command_line_is(&running, &boot.command_line) {
        println!("kiln-agent: command line differs from the embedded one: {running:?}");
    }
}

pub fn running_command_line() -> String {
    std::fs::read_to_string("/proc/cmdline").unwrap_or_default().trim().to_owned()
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

/// Moves the mounts, frees the initramfs, and gives the machine to the image's init.
fn switch_root() -> Result<Infallible> {
    let step = |what: &str| AgentError::system(what.to_owned());
    for dir in ["/dev", "/proc", "/sys", "/run"] {
        let target = format!("{NEW_ROOT}{dir}");
        mount(Some(dir), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(step(&format!("moving {dir}")))?;
    }
    free_initramfs();
    std::env::set_current_dir(NEW_ROOT).map_err(AgentError::file(NEW_ROOT))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(step("moving the root"))?;
    nix::unistd::chroot(".").map_err(step("chroot"))?;
    std::env::set_current_dir("/").map_err(AgentError::file("/"))?;
    let init = CString::new(NEXT_INIT).expect("a constant without NUL");
    match nix::unistd::execv(&init, &[&init]) {
        Err(errno) => Err(step(NEXT_INIT)(errno)),
        Ok(never) => match never {},
    }
}

/// Removes the initramfs's files: they are memory. Only what is on the same file system.
fn free_initramfs() {
    use std::os::unix::fs::MetadataExt;
    let Ok(root) = std::fs::metadata("/") else { return };
    let mut dirs = vec![std::path::PathBuf::from("/")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(meta) = std::fs::symlink_metadata(&path) else { continue };
            if meta.dev() != root.dev() {
                continue;
            }
            if meta.is_dir() {
                dirs.push(path);
            } else if std::fs::remove_file(&path).is_err() {
                // What cannot be removed costs memory, nothing else.
            }
        }
    }
}
