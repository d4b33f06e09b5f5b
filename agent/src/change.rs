//! Going to another release: its metadata, UKI and root are verified here, before this one is left.

mod load;
mod renew;

pub use load::{load, tell_loader};
pub use renew::{mend_uki, prepare_renewal, renew};

use crate::disk::DiskError;
use crate::disk::machine::{self, SharedDisk, on_disk, place, read_slot};
use crate::disk::record::{self, Record};
use crate::error::{self, AgentError, FailureClass, Result};
use crate::fetch::{Download, Expected, Scratch};
use crate::flow::Flow;
use crate::plan::{self, Leave};
use crate::verifier::{Servers, Verifier};
use crate::{facts, kexec, restart};
use kiln_protocol::slot::{Action, Event, Go, Refusal, SlotId};
use kiln_protocol::{Assignment, Progress, ReleaseId, RollbackMemory, Stage, Via};
use kiln_release::{Artifact, BootInfo, Manifest};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::spawn_blocking;

/// Where the next release waits for its turn.
pub const NEXT: &str = "/run/kiln";
/// The largest UKI that is fetched: a manifest that names a longer one is refused.
const UKI_LIMIT: u64 = 256 << 20;

/// The files of a kexec in that directory: UKI and root artifact.
pub fn files(next: &Path) -> [PathBuf; 2] {
    [next.join("next.efi"), next.join("next")]
}

/// A release that is verified and ready to go to. Its files go with it.
#[derive(Debug)]
pub struct Ready {
    manifest: Manifest,
    /// For a kexec of a machine in RAM mode; a cold boot fetches anew.
    kexec: Option<Files>,
    /// In disk mode: it lies in a slot, and the loader is about to be told.
    installed: Option<Installed>,
    /// Why it is a cold boot although a kexec was asked for.
    pub note: Option<String>,
}

/// A release in a slot, allowed and not yet preferred.
struct Installed {
    disk: SharedDisk,
    uki: Scratch,
    via: Via,
    /// Its place in the loader's order.
    order: u64,
}

impl std::fmt::Debug for Installed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Installed").field("uki", &self.uki).field("via", &self.via).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Files {
    uki: Scratch,
    root: Scratch,
}

impl Ready {
    /// How it will be gone to.
    pub fn via(&self) -> Via {
        match (&self.kexec, &self.installed) {
            (Some(_), _) => Via::Kexec,
            (None, Some(installed)) => installed.via,
            (None, None) => Via::Cold,
        }
    }

    /// What becomes of its kexec if that is not attested. On a machine with a disk a release that is not in a slot is reached in no
    /// other way.
    pub fn otherwise(&self, has_disk: bool) -> Otherwise {
        if has_disk && self.installed.is_none() { Otherwise::Kexec } else { Otherwise::Cold }
    }

    /// Leaves the files where they are.
    pub fn keep(self) {
        if let Some(Files { uki, root }) = self.kexec {
            uki.keep();
            root.keep();
        }
    }
}

/// How far a prefetch is, for whoever reports while it runs.
#[derive(Debug, Default)]
pub struct Meter {
    uki: Arc<AtomicU64>,
    root: Arc<AtomicU64>,
    total: AtomicU64,
}

impl Meter {
    /// None until the release's manifest is verified.
    pub fn read(&self) -> Option<Progress> {
        let total_bytes = self.total.load(Ordering::Relaxed);
        let received_bytes = self.uki.load(Ordering::Relaxed) + self.root.load(Ordering::Relaxed);
        (total_bytes > 0).then_some(Progress { received_bytes, total_bytes })
    }
}

/// What a fetch takes of the verifier.
pub struct Given {
    servers: Servers,
    /// The lowest release of the image that may be written to a disk.
    floor: ReleaseId,
    /// Bytes a second into a slot.
    rate: Option<u64>,
}

/// A release on its way here: the state over several tries. Dropped, it leaves nothing behind.
pub struct Prefetch {
    release: ReleaseId,
    manifest_sha256: String,
    via: Via,
    to: PathBuf,
    meter: Arc<Meter>,
    manifest: Option<Manifest>,
    uki: Option<Download>,
    /// The UKI is whole, and its parts are those of the manifest.
    uki_verified: bool,
    root: Option<(Leave, Download)>,
    note: Option<String>,
    /// In disk mode: where it goes.
    disk: Option<SharedDisk>,
    order: u64,
    /// The repository's files that it was verified with, and the assignment that was accepted then.
    files: BTreeMap<String, String>,
    assignment: String,
    /// The slot that is written to or read back, until the release is allowed.
    slot: Option<SlotId>,
    /// How it will be gone to, once it is allowed.
    allowed: Option<Via>,
    /// Nothing is installed: what runs must cold-boot first.
    prove_first: bool,
    /// A cold boot leads elsewhere: what must not go onto the disk that this machine starts from.
    only_kexec: bool,
    /// Which artifact server is asked: another after each that failed.
    turn: usize,
}

impl Prefetch {
    /// `to` is the directory where the files of a kexec go.
    pub fn new(assignment: &Assignment, via: Via, to: &Path, meter: Arc<Meter>) -> Self {
        Self {
            release: assignment.release_id(),
            manifest_sha256: assignment.manifest_sha256.to_string(),
            via,
            to: to.to_owned(),
            meter,
            manifest: None,
            uki: None,
            uki_verified: false,
            root: None,
            note: None,
            disk: None,
            order: assignment.sequence,
            files: BTreeMap::new(),
            assignment: String::new(),
            slot: None,
            allowed: None,
            prove_first: false,
            only_kexec: false,
            turn: 0,
        }
    }

    /// Into a slot of this disk, and to this place in its loader's order.
    pub fn onto(self, disk: Option<SharedDisk>, order: u64) -> Self {
        Self { disk, order, ..self }
    }

    /// No cold boot leads to it.
    pub fn by_kexec_only(self, only_kexec: bool) -> Self {
        Self { only_kexec, ..self }
    }

    /// After a failed try: whether it is the first since the release came on. It is then not one more in a row.
    pub fn moved(&self) -> bool {
        let current = self.root.as_ref().map(|(_, root)| root).or(self.uki.as_ref());
        current.is_some_and(|download| download.tries() == 1)
    }

    /// One try: verifies the metadata and fetches what it names. For a cold boot the root is read once too, so that a
    /// release that cannot be fetched is noticed here and not after the restart. It may be dropped at any wait and gone on
    /// with.
    pub async fn run(&mut self, verifier: &mut Verifier) -> Result<()> {
        let given = self.prepare(verifier).await;
        self.fetch(given).await
    }

    /// The short part of a try: all that needs the verifier, which others wait for.
    pub async fn prepare(&mut self, verifier: &mut Verifier) -> Result<Given> {
        if self.manifest.is_none() {
            self.verify(verifier).await?;
        }
        if let (Some(disk), Some(manifest)) = (&self.disk, &self.manifest) {
            // As they are known: nobody waits for a disk with the verifier in hand.
            let slots = disk.slots().disk.labels;
            verifier.expect_record(manifest, &record::digest(&self.files, &self.assignment), slots)?;
        }
        Ok(Given {
            servers: verifier.servers.clone(),
            floor: ReleaseId {
                release: verifier.memory.floor(self.release.image.as_str()),
                image: self.release.image.clone(),
            },
            rate: prefetch_rate(&verifier.boot),
        })
    }

    /// The long part, with what came of the short one.
    pub async fn fetch(&mut self, given: Result<Given>) -> Result<()> {
        let result = match given {
            Ok(given) => self.go_on(&given).await,
            Err(error) => Err(error),
        };
        match result.as_ref().map_err(AgentError::class) {
            Ok(()) => {}
            // The next server may be better.
            Err(FailureClass::Unreachable) => self.turn += 1,
            // What is wrong may be any part of it, also the metadata that names the parts.
            Err(FailureClass::Verification | FailureClass::Machine | FailureClass::Usage) => {
                (self.manifest, self.uki, self.root, self.uki_verified) = (None, None, None, false);
                (self.slot, self.allowed) = (None, None);
                self.meter.uki.store(0, Ordering::Relaxed);
                self.meter.root.store(0, Ordering::Relaxed);
            }
        }
        result
    }

    async fn go_on(&mut self, given: &Given) -> Result<()> {
        let manifest = self.manifest.clone().expect("it was verified when it was prepared");
        let servers = &given.servers.http;
        let base = servers.get(self.turn % servers.len().max(1)).ok_or(AgentError::NoServer)?;
        if !self.uki_verified {
            let [path, _] = files(&self.to);
            // From the initramfs nothing runs that a full link would disturb.
            let cap = self.disk.as_ref().and(given.rate);
            let uki = match &mut self.uki {
                Some(uki) => uki,
                none => {
                    let signed = expected(error::UKI, &manifest.uki);
                    none.insert(Download::new(signed, Some(&path), &self.meter.uki)?.capped(cap))
                }
            };
            uki.run(base).await?;
            let signed = manifest.clone();
            blocking(move || kexec::verify(&File::open(&path).map_err(AgentError::file(&path))?, &signed)).await?;
            self.uki_verified = true;
        }
        if let Some(disk) = self.disk.clone() {
            return self.install(given, &disk, manifest, base).await;
        }
        let (_, root) = match &mut self.root {
            Some(root) => root,
            none => {
                let free = facts::memory("MemAvailable:");
                let leave = how_to_leave(&manifest, self.via, free);
                let path = match leave {
                    Leave::Kexec => {
                        let [_, path] = files(&self.to);
                        Some(path)
                    }
                    Leave::Cold if self.only_kexec => return Err(AgentError::NoWayOut),
                    Leave::Cold => {
                        // It was verified; its memory is wanted.
                        self.uki = None;
                        self.note = (self.via == Via::Kexec).then(|| {
                            format!("{free} bytes of memory are free: too few for a kexec, so it is a cold boot")
                        });
                        None
                    }
                };
                let root = expected(error::ROOT, &manifest.root);
                none.insert((leave, Download::new(root, path.as_deref(), &self.meter.root)?))
            }
        };
        root.run(base).await
    }

    /// Into the idle slot: written, flushed, read back, recomputed, labelled; the UKI and its entry onto the EFI system
    /// partition; and the signed metadata kept. The loader does not see it yet.
    async fn install(&mut self, given: &Given, disk: &SharedDisk, manifest: Manifest, base: &str) -> Result<()> {
        if self.slot.is_none() {
            let assign = Event::Assign(machine::content(&manifest)?, self.order, Go::Leave(self.via));
            let floor = given.floor.clone();
            let begun = on_disk(disk, move |disk| {
                disk.event(Event::Floor(floor), None)?;
                if disk.slots().install.is_some() {
                    disk.event(Event::CalledOff, None)?;
                }
                disk.event(assign, None)
            });
            match begun.await {
                Ok(actions) => self.begin(disk, &manifest, given.rate, &actions).await?,
                Err(AgentError::Disk(DiskError::Refused(refusal @ Refusal::ProveFirst))) => {
                    self.note = Some(format!("{refusal}; then the release is fetched"));
                    (self.prove_first, self.uki) = (true, None);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        if let Some((_, root)) = &mut self.root {
            root.run(base).await?;
        }
        let (slot, [uki, _]) = (self.slot.ok_or(AgentError::Superseded)?, files(&self.to));
        let record =
            Record { files: self.files.clone(), assignment: self.assignment.clone(), servers: given.servers.clone() };
        let (root_hash, order) = (machine::content(&manifest)?.root_hash, self.order);
        let length = manifest.root.length.saturating_add(manifest.uki.length);
        let allowed = read_slot(disk, length, move |disk| {
            let via = disk.finish_install(slot, &manifest, &record, &uki)?;
            disk.keep_put_up(&root_hash, order)?;
            Ok(via)
        });
        let fetched = self.root.is_some();
        let allowed = allowed.await.map_err(|error| if fetched { error } else { error.of_whole_slot() })?;
        self.allowed = Some(allowed);
        Ok(())
    }

    async fn begin(
        &mut self,
        disk: &SharedDisk,
        manifest: &Manifest,
        rate: Option<u64>,
        actions: &[Action],
    ) -> Result<()> {
        for action in actions {
            if let Action::Fetch(slot, _) | Action::Verify(slot, _) = action {
                self.slot = Some(*slot);
            }
            if let Action::Fetch(slot, _) = action {
                let (slot, length) = (*slot, manifest.root.length);
                let put = place(disk, slot, length).await?;
                let root = Download::onto(expected(error::ROOT, &manifest.root), put, &self.meter.root);
                self.root = Some((Leave::Cold, root.capped(rate)));
            }
        }
        Ok(())
    }

    async fn verify(&mut self, verifier: &mut Verifier) -> Result<()> {
        let verified = verifier.verify_metadata(&self.release).await?;
        if verified.manifest_sha256 != self.manifest_sha256 {
            let (expected, got) = (verified.manifest_sha256, self.manifest_sha256.clone());
            return Err(AgentError::ManifestMismatch { expected, got });
        }
        self.files = verified.files;
        self.assignment = verifier.accepted.clone().unwrap_or_default();
        let manifest = verified.manifest;
        verifier.may_run(&manifest)?;
        if manifest.uki.length > UKI_LIMIT {
            return Err(AgentError::Uki(format!("{} bytes; at most {UKI_LIMIT} are read", manifest.uki.length)));
        }
        self.meter.total.store(manifest.uki.length.saturating_add(manifest.root.length), Ordering::Relaxed);
        self.manifest = Some(manifest);
        Ok(())
    }

    /// What [`Self::run`] made, once it has succeeded.
    pub fn into_ready(self) -> Option<Ready> {
        if let Some(disk) = self.disk {
            let manifest = self.manifest?;
            let installed = match (self.prove_first, self.allowed) {
                (true, _) => None,
                (false, via) => Some(Installed { disk, uki: self.uki?.into_file()?, via: via?, order: self.order }),
            };
            return Some(Ready { manifest, kexec: None, installed, note: self.note });
        }
        let (leave, root) = self.root?;
        let kexec = match leave {
            Leave::Kexec => Some(Files { uki: self.uki?.into_file()?, root: root.into_file()? }),
            Leave::Cold => None,
        };
        Some(Ready { manifest: self.manifest?, kexec, installed: None, note: self.note })
    }
}

/// What a running system's fetching of another release may take of the link, by its own release. Bytes per second.
pub fn prefetch_rate(boot: &BootInfo) -> Option<u64> {
    boot.site.disk.as_ref().and_then(|disk| disk.prefetch_rate)
}

/// The root must fit here, then once more in the loaded initrd.
fn how_to_leave(manifest: &Manifest, via: Via, free: u64) -> Leave {
    let (boot, need) = (manifest.loaded_kernel().length + manifest.initramfs.length, manifest.root.length);
    match via {
        Via::Cold => Leave::Cold,
        Via::Kexec => plan::may_kexec(free.saturating_sub(need), need, boot),
    }
}

/// What becomes of a kexec after which the next boot would not be attested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Otherwise {
    /// A cold boot leads to the same release.
    Cold,
    /// Nothing else leads there.
    Kexec,
}

/// From the initramfs: fetches to this folder, tells the server, and goes. Comes back when the caller must restart the machine.
pub async fn now(flow: &mut Flow, assignment: &Assignment, via: Via, otherwise: Otherwise, next: &Path) -> Result<()> {
    if otherwise == Otherwise::Kexec
        && let Some(what) = flow.journal.state.hung.clone()
        && !flow.verifier.memory.may_kexec(assignment.sequence)
    {
        let error = AgentError::KexecHangs { what };
        flow.journal.failed(Stage::Going, &error, 1, Some(Duration::ZERO));
        flow.report().await;
        return Err(error);
    }
    let ready = Arc::new(flow.prefetch(assignment, via, next).await?);
    let hung = match otherwise {
        Otherwise::Cold => flow.journal.state.hung.clone(),
        // A try is better than none, a few times: here no init waits for what hangs, and a kernel that does is reset.
        Otherwise::Kexec => None,
    };
    let told = tell_loader(&ready).await?;
    let via = match load(&ready, told, otherwise, hung).await {
        Ok(()) => ready.via(),
        Err(error @ (AgentError::ShortWatchdog { .. } | AgentError::KexecHangs { .. })) => {
            flow.journal.failed(Stage::Going, &error, 1, Some(Duration::ZERO));
            Via::Cold
        }
        Err(error) => return Err(error),
    };
    flow.journal.started(Stage::Going);
    let via = match via {
        Via::Cold => Via::Cold,
        Via::Kexec => match (flow.may_carry().await, otherwise) {
            (false, Otherwise::Cold) => Via::Cold,
            (true, Otherwise::Cold) | (_, Otherwise::Kexec) => Via::Kexec,
        },
    };
    flow.report().await;
    match via {
        Via::Cold => Ok(()),
        Via::Kexec => {
            if let Some(what) = flow.journal.state.hung.clone() {
                flow.verifier.memory.tries_kexec(assignment.sequence);
                // What cannot be counted might be done for ever.
                if !flow.verifier.keep() || flow.verifier.place.rollback_memory() == RollbackMemory::None {
                    return Err(AgentError::KexecHangs { what });
                }
            }
            let error = restart::leave(nix::sys::reboot::RebootMode::RB_KEXEC);
            Err(AgentError::system("starting the loaded kernel")(error))
        }
    }
}

/// Runs what computes or waits for a disk beside the runtime, which goes on with everything else.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(AgentError::system("working in a thread")(std::io::Error::other(e.to_string()))))
}

fn expected(what: &'static str, artifact: &Artifact) -> Expected {
    Expected { what, sha256: artifact.sha256.clone(), length: artifact.length }
}
