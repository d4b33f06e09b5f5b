//! Starting the release that this UKI embeds: its root from a slot or the network, verified, mounted, handed over to.

use super::secure_boot;
use super::switch_root::{NEW_ROOT, read_init, switch_root};
use super::unheard;
use crate::change::blocking;
use crate::coldplug::Drivers;
use crate::disk::machine::{MachineDisk, SharedDisk, on_disk, on_disk_within};
use crate::disk::{DiskError, data, loader, worker};
use crate::error::{AgentError, ROOT, Result};
use crate::fetch::Expected;
use crate::flow::Flow;
use crate::handoff::{Handoff, OnDisk};
use crate::net::Uplink;
use crate::verifier::Verified;
use crate::{coldplug, ima, kexec, local, log, mounts, secrets, tpm, verity};
use kiln_protocol::slot::{Event, SlotId};
use kiln_protocol::{Class, Stage, Via};
use kiln_release::crossing::PREFETCHED_PATH;
use kiln_release::{BootInfo, DataSettings, hex};
use nix::mount::{MsFlags, mount};
use std::convert::Infallible;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

/// The root artifact as it was downloaded, in a tmpfs that moves to the new root's /run. One that crossed a kexec stays
/// where the kernel unpacked it: it is memory there as well, and a copy would be twice as much.
const ROOT_FILE: &str = "/run/kiln/root";
/// So long a disk has to open the data, and to make its file system where it is new.
const DATA_OPENS: Duration = Duration::from_secs(10 * 60);

/// Fetches, verifies, mounts and starts the release that this UKI embeds.
pub(super) async fn start(
    flow: &mut Flow,
    drivers: &mut Option<Drivers>,
    verified: Verified,
    uplink: Option<Uplink>,
    disk: Option<SharedDisk>,
) -> Result<Infallible> {
    // The last gate before anything of it starts, whichever way led here.
    flow.verifier.may_run(&verified.manifest)?;
    // The floors may have risen since this boot began.
    flow.verifier.memory.may_boot(&flow.verifier.boot)?;
    // What an order starts never goes into a slot: the loader would start it again without the order.
    let disk = disk.filter(|_| verified.manifest.class == Class::Normal.as_str());
    flow.journal.started(Stage::Root);
    flow.report().await;
    // Beside the runtime: reports go out meanwhile.
    if let Some(mut taken) = drivers.take() {
        let settled = blocking(move || {
            // What is found late, as a USB disk is, asks for its driver only now; nobody looks later.
            taken.coldplug();
            Ok(taken)
        });
        *drivers = settled.await.ok();
    }
    if keeps_data(&flow.verifier.boot).is_some()
        && let Some(drivers) = drivers
    {
        for module in data::MODULES {
            drivers.load(module);
        }
    }
    let mut failed = None;
    if let Some(disk) = disk {
        match local::install_here(flow, &verified, &disk).await {
            Ok(slot) => {
                flow.journal.done(Stage::Root);
                through_firmware(flow).await;
                return start_slot(flow, verified, uplink, &disk, slot).await;
            }
            // A disk that fails costs the slots, not the boot. It stays open: one that hangs would hold up whoever closes it.
            Err(error) => {
                flow.journal.failed(Stage::Root, &error, 1, Some(Duration::ZERO));
                failed = Some(disk);
            }
        }
    }
    let expected =
        Expected { what: ROOT, sha256: verified.manifest.root.sha256.clone(), length: verified.manifest.root.length };
    let crossed = match prefetched(&expected) {
        Some(Ok(root)) => Some(root),
        Some(Err(error)) => {
            flow.after_failure(Stage::Root, error, 1).await?;
            None
        }
        None => None,
    };
    let root = if let Some(root) = crossed {
        root
    } else {
        flow.fetch_to(Stage::Root, expected, Path::new(ROOT_FILE)).await?;
        File::open(ROOT_FILE).map_err(AgentError::file(ROOT_FILE))?
    };
    flow.journal.done(Stage::Root);

    flow.journal.started(Stage::Verity);
    let boot = &flow.verifier.boot;
    let device = verity::open(&root, &verified.manifest.verity, &boot.root_hash, secure_boot(boot))?;
    mount_root(&device)?;
    leave(flow, verified, uplink, None, failed.as_ref()).await
}

/// The same from a slot. A root that cannot be mounted, or whose init cannot be read, is told to the slots: where it was altered,
/// or a boot server has it, the next boot is another's. What else fails says nothing of the root. Where the disk gives no answer
/// this boot ends.
async fn start_slot(
    flow: &mut Flow,
    verified: Verified,
    uplink: Option<Uplink>,
    disk: &SharedDisk,
    slot: SlotId,
) -> Result<Infallible> {
    flow.journal.started(Stage::Verity);
    let (params, root_hash) = (verified.manifest.verity.clone(), flow.verifier.boot.root_hash.clone());
    let secure_boot = secure_boot(&flow.verifier.boot);
    let device = on_disk(disk, move |disk| disk.device(slot)).await?.display().to_string();
    let place = device.clone();
    let mounted = on_disk_within(disk, "mounting the root", worker::COMMIT, move |_| {
        let mounted = verity::open_device(&device, &params, &root_hash, secure_boot).and_then(|root| mount_root(&root));
        let mounted = mounted.inspect(|()| read_init(Path::new(NEW_ROOT)));
        mounted.map_err(|error| error.of_root(&device, verity::is_corrupted().unwrap_or(false)))
    });
    let on = OnDisk { name: disk.name().to_owned(), via: kexec::started_this() };
    let left = match mounted.await {
        Ok(()) => leave(flow, verified, uplink, Some(on), Some(disk)).await,
        Err(error) => Err(error),
    };
    let error = match left {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let (event, error) = if let AgentError::RootRotten { reason, .. } = error {
        (Event::Spoilt(slot), AgentError::RootRotten { place, reason })
    } else if let AgentError::RootUnread { reason, .. } = error {
        let has_server = flow.verifier.accepted.is_some();
        let event = if has_server { Event::Spoilt(slot) } else { Event::Unread(slot) };
        (event, AgentError::RootUnread { place, reason })
    } else {
        return Err(error);
    };
    on_disk(disk, move |disk| disk.event(event, None)).await?;
    Err(error)
}

fn mount_root(device: &str) -> Result<()> {
    std::fs::create_dir_all(NEW_ROOT).map_err(AgentError::file(NEW_ROOT))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    mount(Some(device), NEW_ROOT, Some("erofs"), flags, None::<&str>)
        .map_err(AgentError::system(format!("mounting {device}")))
}

/// From the mounted root to its init. `open` is the disk that was opened, whether the root lies `on` it or not.
async fn leave(
    flow: &mut Flow,
    verified: Verified,
    uplink: Option<Uplink>,
    on: Option<OnDisk>,
    open: Option<&SharedDisk>,
) -> Result<Infallible> {
    let disk = open.filter(|_| on.is_some());
    let running = verity::running_root_hash()?;
    if running != flow.verifier.boot.root_hash {
        return Err(AgentError::RunningRoot { expected: flow.verifier.boot.root_hash.clone(), got: running });
    }
    if !verified.manifest.secrets.is_empty() || verified.manifest.certificate.is_some() {
        secrets::mount_place()?;
    }
    mounts::writable(Path::new(NEW_ROOT), &verified.manifest.writable);
    let no_data = open_data(&flow.verifier.boot, disk).await;
    flow.journal.done(Stage::Verity);
    let memory = &mut flow.verifier.memory;
    let came = kexec::started_this() == Via::Kexec && memory.kexecs.take().is_some();
    if std::mem::take(&mut memory.failed_boots) > 0 || came {
        flow.verifier.keep();
    }
    if on.is_some() {
        loader::keep();
    }
    flow.journal.started(Stage::Handover);
    flow.report().await;
    let guards = keeps_data(&flow.verifier.boot).is_some() || !verified.manifest.secrets.is_empty();
    let handoff = Handoff {
        boot: flow.verifier.boot.clone(),
        manifest: verified.manifest,
        servers: flow.verifier.servers.clone(),
        journal: flow.journal.state.clone(),
        uplink,
        disk: on,
        no_data,
        sequence: flow.verifier.memory.sequence,
        settings: flow.verifier.settings.clone(),
        agent_api_keys: flow.verifier.pins.keys(),
        memory: Some(flow.verifier.memory.clone()),
        remembers: Some(flow.verifier.place.rollback_memory()),
        left: coldplug::left(),
        now: flow.verifier.now,
    };
    handoff.write()?;
    unheard::forget(&flow.verifier.place);
    secure_boot(&flow.verifier.boot).restrict()?;
    // A machine that cannot be capped does not go on into a system that would be taken for an initramfs.
    blocking(move || {
        ima::leave_initramfs(guards)?;
        tpm::leave_initramfs(guards).map_err(AgentError::from)
    })
    .await?;
    if let Some(disk) = disk {
        local::count_start(disk).await;
    }
    log::hand_over()?;
    switch_root(open)
}

/// What the image keeps over reimages, if it keeps anything.
fn keeps_data(boot: &BootInfo) -> Option<&DataSettings> {
    boot.site.disk.as_ref().and_then(|disk| disk.data.as_ref())
}

/// The TPM gives the data's key to no kernel that a kexec started: the first release that keeps data may have come so. It lies in
/// its slot by now, and firmware starts it from there. Comes back where that is not needed, or did not help the last time.
async fn through_firmware(flow: &mut Flow) {
    if keeps_data(&flow.verifier.boot).is_none() {
        return;
    }
    let past = blocking(|| Ok(tpm::is_past_initramfs())).await.unwrap_or(false);
    let before = flow.verifier.memory.restarted_for_data;
    let restart = flow.verifier.memory.restart_for_data(past);
    if before != past
        && let Err(error) = flow.verifier.place.remember(&flow.verifier.memory)
    {
        println!("kiln-agent: a restart for the machine's data is not remembered, and not made: {error}");
        return;
    }
    if restart {
        println!(
            "kiln-agent: a kexec started this kernel, and its data's key is for boots through firmware: it restarts"
        );
        log::sent().await;
        super::restart();
    }
}

/// Opens it. A machine without it comes up, to say so: it is not healthy.
async fn open_data(boot: &BootInfo, disk: Option<&SharedDisk>) -> Option<String> {
    let settings = keeps_data(boot)?.clone();
    let opened = match disk {
        None => Err(DiskError::NoDisk.into()),
        Some(disk) => {
            let vouches = secure_boot(boot).vouches();
            let open = move |disk: &mut MachineDisk| data::open(disk, &settings, Path::new(NEW_ROOT), vouches);
            on_disk_within(disk, "opening the data", DATA_OPENS, open).await
        }
    };
    let error = opened.err()?;
    println!("kiln-agent: the machine's data is not there: {error} ({})", error.kind());
    Some(format!("the machine's data is not there: {error}"))
}

/// The root that crossed a kexec in the initrd, verified again where it lies. One that does not verify is removed, so that
/// the next try downloads.
fn prefetched(expected: &Expected) -> Option<Result<File>> {
    let path = Path::new(PREFETCHED_PATH).join(&expected.sha256);
    let file = File::open(&path).ok()?;
    let verified = verify(&file, &path, expected);
    if verified.is_err()
        && let Err(error) = std::fs::remove_file(&path)
    {
        println!("kiln-agent: {} stays in memory: {error}", path.display());
    }
    Some(verified.map(|()| file))
}

fn verify(mut file: &File, path: &Path, expected: &Expected) -> Result<()> {
    use std::io::Read;
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    // Small enough for the processor's cache: what is read into it is hashed from there.
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = file.read(&mut buffer).map_err(AgentError::file(path))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    let got = hex::encode(hash.finish().as_ref());
    if got == expected.sha256 {
        Ok(())
    } else {
        Err(AgentError::HashMismatch { what: expected.what, expected: expected.sha256.clone(), got })
    }
}
