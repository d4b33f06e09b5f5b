//! The fleet in memory, and every way to change it.
//!
//! One lock holds all machines. A step is taken under it and its rows are handed to the store in the same order; then
//! the lock is given up, the commit awaited, and only after that anybody is answered or told.

mod attestation;
mod ca;
mod certificates;
mod classes;
mod crowd;
mod dbx;
mod director;
mod expected;
mod finish;
mod hardware;
mod index;
mod inner;
mod introductions;
mod kexecs;
mod leases;
mod load;
mod logs;
mod netboot;
mod orders;
mod people;
mod pin;
mod positions;
mod releases;
mod reports;
mod repository;
mod restore;
mod roles;
mod second;
mod secrets;
mod sessions;
mod signed;
mod steady;
mod views;

pub use certificates::RevokedList;
pub use crowd::MAX_DISCOVERED;
pub use leases::{lease_from, lease_to};
pub use logs::LogQuery;
pub(crate) use second::{Asked, MACHINES, MAX_PENDING_BODY};
pub use secrets::SecretFor;

use crate::access::Access;
use crate::audit;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::error::ControlError;
use crate::logs::Logs;
use crate::oidc::Provider;
use crate::store::{Commit, Envelope, Store, Whole};
use crate::view::MachineView;
use kiln_fleet::{Action, Classes, Event, LIVE_MS, Machine, Millis, StateKind};
use kiln_images::SiteDir;
use kiln_protocol::{KeyId, MachineId, StageState};
use kiln_release::Signer;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use tokio::sync::{broadcast, watch};

/// The clock of everything here.
pub fn now_ms() -> Millis {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0)
}

/// Told to those who watch.
#[derive(Debug, Clone)]
pub enum Told {
    /// A machine as it is now.
    Machine(Arc<MachineView>),
    /// It was forgotten.
    Gone(MachineId),
}

pub(crate) struct Inner {
    pub(crate) machines: BTreeMap<MachineId, Machine>,
    pub(crate) envelopes: BTreeMap<MachineId, Envelope>,
    /// Which machine has an Ethernet address.
    pub(crate) macs: index::Macs,
    names: index::Names,
    keys: index::Keys,
    missing: index::Missing,
    classes: Classes,
    /// Last-seen times that are not stored yet.
    seen: BTreeMap<MachineId, Millis>,
    /// Texts of the operators' orders in force.
    pub(crate) order_texts: signed::Texts,
    /// What unknown machines may still change.
    crowd: crowd::Crowd,
    introductions: introductions::Introductions,
    attestations: attestation::Questions,
    positions: positions::Positions,
    wrong: introductions::Wrong,
    comparing: expected::Comparing,
    withheld: releases::Withheld,
}

/// The fleet, locked.
pub(crate) struct Locked<'a> {
    inner: MutexGuard<'a, Inner>,
    _whole: Whole<'a>,
}

impl Deref for Locked<'_> {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        &mut self.inner
    }
}

/// What reports cost, since the start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Times that it was worked out what is wanted of a machine: at each report, and for each held one at each change.
    pub looked: AtomicU64,
    /// Statements that the director signed.
    pub signed: AtomicU64,
}

/// The fleet and what decides about it.
pub struct Control {
    inner: Mutex<Inner>,
    /// The store.
    pub store: Store,
    /// The site.
    pub site: SiteDir,
    /// The configuration.
    pub config: Config,
    /// The machines' logs.
    pub logs: Arc<Logs>,
    /// The director's key: another one once the site names it.
    director: RwLock<Arc<Signer>>,
    /// SHA-256 of the SPKI of the agent API's certificate.
    pub(crate) server_key: KeyId,
    catalog: RwLock<Arc<Catalog>>,
    told: broadcast::Sender<Told>,
    /// Machines are put back one at a time.
    restoring: tokio::sync::Mutex<()>,
    changed: watch::Sender<u64>,
    /// Tickets of those who want the repository looked at now, and the newest ticket that was served.
    look_wanted: watch::Sender<u64>,
    looked: watch::Sender<u64>,
    hardware: hardware::HardwareLocks,
    expected: expected::Expected,
    /// People and programs. Locked after the fleet, where both are.
    pub access: Access,
    secrets: Arc<secrets::Secrets>,
    certificates: certificates::Certificates,
    /// The identity provider, if there is one.
    pub(crate) oidc: Option<Provider>,
    /// Held reports.
    pub held: AtomicUsize,
    /// What was done for reports.
    pub counts: Counts,
    /// When this server started.
    pub started: Millis,
    stop: watch::Receiver<bool>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("site", &self.site.path).finish_non_exhaustive()
    }
}

/// What a step leaves to be done after the lock is given up.
#[derive(Default)]
#[must_use]
pub(crate) struct Pending {
    commits: Vec<Commit>,
    lines: Vec<Line>,
    touched: Vec<MachineId>,
    gone: Vec<MachineId>,
    wake: bool,
}

struct Line {
    warn: bool,
    machine: String,
    stage: &'static str,
    text: String,
}

impl Control {
    /// What is published.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.catalog.read().expect("no code panics under this lock").clone()
    }

    /// Told of every change, from now on.
    pub fn watch(&self) -> broadcast::Receiver<Told> {
        self.told.subscribe()
    }

    /// All machines, by name.
    pub fn views(&self) -> Vec<MachineView> {
        let inner = self.look();
        let mut views: Vec<_> = inner.machines.values().map(MachineView::of).collect();
        views.sort_by(|a, b| (a.name == a.id.as_str(), &a.name).cmp(&(b.name == b.id.as_str(), &b.name)));
        views
    }

    /// One machine, by name, id or an unmistakable beginning of its id.
    pub fn view(&self, name: &str) -> Result<MachineView, ControlError> {
        let inner = self.look();
        let id = inner.resolve(name)?;
        let view = inner.machines.get(&id).map(MachineView::of);
        let view = view.ok_or_else(|| ControlError::NoSuchMachine(name.to_owned()))?;
        Ok(MachineView { certificate: self.certificate_view(&id), ..view })
    }

    /// Resolves when the server is to end.
    pub async fn stopped(&self) {
        let mut stop = self.stop.clone();
        // An error means the sender is gone: the server ends as well.
        let _ = stop.wait_for(|s| *s).await;
    }

    /// Lets time pass for every machine, and stores the last-seen times. Called every second.
    pub async fn tick(&self) -> Result<(), ControlError> {
        let (pending, seen) = {
            let mut inner = self.lock();
            let now = now_ms();
            let due: Vec<MachineId> = inner
                .machines
                .values()
                .filter(|m| m.due(self.config.limits).is_some_and(|due| due <= now))
                .map(|m| m.id.clone())
                .collect();
            let mut pending = Pending::default();
            for id in due {
                self.step(&mut inner, &id, Event::Tick, now, &mut pending)?;
            }
            let flush = inner.seen.values().min().is_some_and(|first| *first + LIVE_MS / 24 <= now);
            (pending, flush.then(|| std::mem::take(&mut inner.seen)))
        };
        if let Some(seen) = seen
            && self.store.seen(seen.clone()).wait().await.is_err()
        {
            // The writer has said why. They are handed in again.
            let mut inner = self.lock();
            for (id, at) in seen {
                let last = inner.seen.entry(id).or_insert(at);
                *last = at.max(*last);
            }
        }
        self.finish(pending).await?;
        let now = now_ms();
        if self.certificates.due(now) {
            let ended = self.finish(self.end_all_certificates(now)).await;
            self.finish(self.prune_certificates(now)).await?;
            ended?;
        }
        // Of whom nobody waited for.
        self.restore().await;
        Ok(())
    }

    /// Stores what is not stored yet; at the end.
    pub fn flush(&self) {
        let seen = std::mem::take(&mut self.lock().seen);
        drop(self.store.seen(seen));
        self.note_more_refused(None);
    }

    /// To be looked at. Whoever hands something to the store takes [`Control::lock`].
    pub(crate) fn look(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no code panics under this lock: steps are total")
    }

    /// What is handed to the store while it is held is stored whole, or not at all.
    pub(crate) fn lock(&self) -> Locked<'_> {
        let inner = self.look();
        Locked { inner, _whole: self.store.whole() }
    }

    pub(crate) fn wake(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// One step of one machine, under the lock.
    pub(crate) fn step(
        &self,
        inner: &mut Inner,
        id: &MachineId,
        event: Event,
        now: Millis,
        pending: &mut Pending,
    ) -> Result<(), ControlError> {
        let machine = inner.machines.remove(id).unwrap_or_else(|| {
            // A listed machine has its name from the first packet on, so that the log reads as one story.
            let name = self.config.machines.get(id).map(|listed| listed.name.clone());
            let name = name.filter(|name| !inner.names.is_taken(name, id));
            let mut machine = Machine { name, ..Machine::discovered(id.clone(), now) };
            machine.pin(self.config.key_of(id));
            let catalog = self.catalog();
            machine.floors = Arc::clone(&catalog.floors);
            machine.fit = Some(Arc::clone(&catalog.fit));
            machine
        });
        let (held, refused) = (machine.state.kind == StateKind::Quarantined, machine.refused.len());
        let (mut machine, actions) = machine.event(event, self.config.limits, now);
        self.config.rule(&mut machine);
        machine.key_revoked = machine.key.as_ref().is_some_and(|key| self.access.is_revoked(key));
        if machine.refused.len() > refused
            && let Some(pair) = machine.refused.last()
        {
            let what = format!("quarantined {} here: {}", pair.release, pair.reason);
            self.audit(pending, &machine, "kiln", what);
        }
        if !held && machine.state.kind == StateKind::Quarantined {
            self.audit(pending, &machine, "kiln", format!("quarantined: {}", machine.state.reason));
        }
        self.end_certificates(&machine, now, pending);
        let title = machine.title().to_owned();
        inner.index(&machine);
        if let Some(class) = &machine.class {
            machine.proofs = inner.classes.proofs(class);
        }
        self.compare_soon(inner);
        inner.machines.insert(id.clone(), machine);
        pending.wake |= inner.tell_classes();
        let mut save = false;
        for action in actions {
            match action {
                Action::Save => save = true,
                Action::Sign => {
                    inner.envelopes.remove(id);
                    if let Some(machine) = inner.machines.get_mut(id) {
                        machine.unsigned = None;
                    }
                    save = true;
                }
                Action::Wake => pending.wake = true,
                Action::Stage(step) => {
                    let (warn, text) = match &step.state {
                        StageState::Started => continue,
                        StageState::Done => (false, String::new()),
                        StageState::Failed(f) => (true, f.message.clone()),
                        StageState::Waiting { reason } => (false, reason.clone()),
                    };
                    pending.lines.push(Line { warn, machine: title.clone(), stage: step.stage.label(), text });
                }
                Action::Say { warn, text } => {
                    pending.lines.push(Line { warn, machine: title.clone(), stage: "", text });
                }
                Action::Record(what) => {
                    pending.commits.push(self.store.audit_of(id, audit::Line::done(now, "kiln", &title, what)));
                }
                Action::Forget => {
                    self.forget(inner, id, pending);
                    return Ok(());
                }
            }
        }
        if save {
            self.save(inner, id, pending)?;
        }
        Ok(())
    }

    /// Hands a machine's rows to the store, under the lock, so that rows arrive in the order of the steps.
    pub(crate) fn save(&self, inner: &Inner, id: &MachineId, pending: &mut Pending) -> Result<(), ControlError> {
        if let Some(machine) = inner.machines.get(id) {
            pending.commits.push(self.store.save(machine, inner.envelopes.get(id))?);
            if !pending.touched.contains(id) {
                pending.touched.push(id.clone());
            }
        }
        Ok(())
    }

    pub(crate) fn audit(&self, pending: &mut Pending, machine: &Machine, actor: &str, what: String) {
        let line = audit::Line::done(now_ms(), actor, machine.title(), what);
        pending.commits.push(self.store.audit_of(&machine.id, line));
    }
}
