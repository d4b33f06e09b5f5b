//! The fleet in memory, and every way to change it.
//!
//! One lock holds all machines. A step is taken under it and its rows are handed to the store in the same order; then
//! the lock is given up, the commit awaited, and only after that anybody is answered or told.

mod attestation;
mod crowd;
mod dbx;
mod director;
mod expected;
mod hardware;
mod index;
mod introductions;
mod kexecs;
mod leases;
mod logs;
mod netboot;
mod orders;
mod people;
mod pin;
mod positions;
mod releases;
mod reports;
mod roles;
mod second;
mod secrets;
mod sessions;
mod signed;
mod views;

pub use crowd::MAX_DISCOVERED;
pub use leases::{lease_from, lease_to};
pub use logs::LogQuery;
pub(crate) use second::{Asked, MACHINES, MAX_PENDING_BODY};
pub use secrets::SecretFor;

use crate::access::Access;
use crate::audit;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::error::{AccessError, CodeError, ControlError};
use crate::logs::Logs;
use crate::oidc::Provider;
use crate::store::{Commit, Envelope, Store};
use crate::view::MachineView;
use kiln_fleet::{Action, Event, LIVE_MS, Limits, Machine, Millis, StateKind, grant_among};
use kiln_images::{SiteDir, SiteError};
use kiln_protocol::{Grant, KeyId, MachineId, StageState};
use kiln_release::Signer;
use kiln_release::certificate::{certificate_spki, spki_key_id};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::Duration;
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

/// What reports cost, since the start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Times that it was worked out what is wanted of a machine: at each report, and for each held one at each change.
    pub looked: AtomicU64,
    /// Statements that the director signed.
    pub signed: AtomicU64,
}

/// Longest that an order waits for the repository to be looked at.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

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
    changed: watch::Sender<u64>,
    /// Tickets of those who want the repository looked at now, and the newest ticket that was served.
    look_wanted: watch::Sender<u64>,
    looked: watch::Sender<u64>,
    hardware: hardware::HardwareLocks,
    expected: expected::Expected,
    /// People and programs. Locked after the fleet, where both are.
    pub access: Access,
    secrets: Arc<secrets::Secrets>,
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
    /// From what the store holds. `stop` turns true when the server is to end.
    pub async fn load(
        store: Store,
        site: SiteDir,
        config: Config,
        director: Signer,
        catalog: Catalog,
        stop: watch::Receiver<bool>,
    ) -> Result<Arc<Self>, ControlError> {
        let now = now_ms();
        let mut inner = Inner {
            machines: BTreeMap::new(),
            envelopes: BTreeMap::new(),
            macs: index::Macs::default(),
            names: index::Names::default(),
            keys: index::Keys::default(),
            missing: index::Missing::default(),
            seen: BTreeMap::new(),
            order_texts: Self::load_orders(&store, now).await?,
            crowd: crowd::Crowd::new(now),
            introductions: introductions::Introductions::default(),
            attestations: attestation::Questions::default(),
            positions: positions::Positions::default(),
            wrong: introductions::Wrong::default(),
            comparing: expected::Comparing::default(),
            withheld: releases::Withheld::default(),
        };
        let access = Access::load(&store).await?;
        let secrets = Arc::new(secrets::Secrets::load(&store, site.online("secrets.key")).await?);
        let oidc = config.oidc.clone().map(Provider::new).transpose().map_err(AccessError::from)?;
        for (id, mut stored) in store.load().await? {
            let key = config.key_of_known(&stored.machine);
            stored.machine.pin(key);
            stored.machine.key_revoked = stored.machine.key.as_ref().is_some_and(|key| access.is_revoked(key));
            stored.machine.floors = Arc::clone(&catalog.floors);
            let (mut machine, _) = stored.machine.event(Event::ServerStarted, config.limits, now);
            config.rule(&mut machine);
            inner.index(&machine);
            inner.machines.insert(id.clone(), machine);
            if let Some(envelope) = stored.envelope {
                inner.envelopes.insert(id, envelope);
            }
        }
        let server_key = server_key(&site)?;
        let expected = expected::Expected::of(store.expected().await?);
        let logs = Arc::new(Logs::open(&site.path.join("state"), config.logs_total));
        let control = Arc::new(Self {
            inner: Mutex::new(inner),
            store,
            logs,
            server_key,
            site,
            config,
            director: RwLock::new(Arc::new(director)),
            catalog: RwLock::new(Arc::new(catalog)),
            told: broadcast::channel(1024).0,
            changed: watch::channel(0).0,
            look_wanted: watch::channel(0).0,
            looked: watch::channel(0).0,
            hardware: hardware::HardwareLocks::default(),
            expected,
            access,
            secrets,
            oidc,
            held: AtomicUsize::new(0),
            counts: Counts::default(),
            started: now,
            stop,
        });
        control.tell_if_unnamed(&control.catalog());
        Ok(control)
    }

    /// What is published.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.catalog.read().expect("no code panics under this lock").clone()
    }

    /// Has the repository looked at, and waits until that is done: what was published a moment ago is known then.
    pub(crate) async fn look_again(&self) {
        let mut looked = self.looked.subscribe();
        let mut ticket = 0;
        self.look_wanted.send_modify(|wanted| {
            *wanted += 1;
            ticket = *wanted;
        });
        // A repository on a slow disk delays the answer, no more: the caller then sees what was known.
        let served = looked.wait_for(|served| *served >= ticket);
        if tokio::time::timeout(LOOK_DEADLINE, served).await.is_err() {
            tracing::warn!("looking at the repository takes longer than {} s", LOOK_DEADLINE.as_secs());
        }
    }

    /// Waits until a look is wanted, at most `pause`. Gives the ticket that this look serves.
    pub(crate) async fn look_ticket(&self, pause: Duration) -> u64 {
        let mut wanted = self.look_wanted.subscribe();
        let served = *self.looked.borrow();
        match tokio::time::timeout(pause, wanted.wait_for(|ticket| *ticket > served)).await {
            Ok(Ok(ticket)) => *ticket,
            Ok(Err(_)) | Err(_) => *self.look_wanted.borrow(),
        }
    }

    /// A look is done.
    pub(crate) fn look_served(&self, ticket: u64) {
        self.looked.send_replace(ticket);
    }

    /// A newer state of the repository was verified.
    pub fn adopt(&self, catalog: Catalog) -> Result<(), SiteError> {
        let director = self.site.director_key(&catalog.site)?;
        if director.public() != self.director().public() {
            tracing::info!("the site names another director: every assignment is signed anew");
            *self.director.write().expect("no code panics under this lock") = Arc::new(director);
        }
        self.tell_if_unnamed(&catalog);
        let catalog = Arc::new(catalog);
        *self.catalog.write().expect("no code panics under this lock") = Arc::clone(&catalog);
        // What is served must not wait for a machine's next step.
        for machine in self.lock().machines.values_mut() {
            machine.floors = Arc::clone(&catalog.floors);
        }
        self.wake();
        Ok(())
    }

    /// Says so if this server's key of the agent API is not one that counts.
    fn tell_if_unnamed(&self, catalog: &Catalog) {
        let named = &catalog.site.agent_api.keys;
        if !named.is_empty() && !named.iter().any(|key| key == self.server_key.as_str()) {
            tracing::error!("the site names another key of the agent API: machines hang up on this server. Restart it");
        }
    }

    pub(crate) fn director(&self) -> Arc<Signer> {
        self.director.read().expect("no code panics under this lock").clone()
    }

    /// Told of every change, from now on.
    pub fn watch(&self) -> broadcast::Receiver<Told> {
        self.told.subscribe()
    }

    /// All machines, by name.
    pub fn views(&self) -> Vec<MachineView> {
        let inner = self.lock();
        let mut views: Vec<_> = inner.machines.values().map(MachineView::of).collect();
        views.sort_by(|a, b| (a.name == a.id.as_str(), &a.name).cmp(&(b.name == b.id.as_str(), &b.name)));
        views
    }

    /// One machine, by name, id or an unmistakable beginning of its id.
    pub fn view(&self, name: &str) -> Result<MachineView, ControlError> {
        let inner = self.lock();
        let id = inner.resolve(name)?;
        inner.machines.get(&id).map(MachineView::of).ok_or_else(|| ControlError::NoSuchMachine(name.to_owned()))
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
        if let Some(seen) = seen {
            self.store.seen(seen);
        }
        self.finish(pending).await
    }

    /// Stores what is not stored yet; at the end.
    pub fn flush(&self) {
        let seen = std::mem::take(&mut self.lock().seen);
        self.store.seen(seen);
        self.note_more_refused(None);
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no code panics under this lock: steps are total")
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
            machine.floors = Arc::clone(&self.catalog().floors);
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
        let title = machine.title().to_owned();
        inner.index(&machine);
        self.compare_soon(inner);
        inner.machines.insert(id.clone(), machine);
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
                    pending.commits.push(self.store.audit(audit::Line::done(now, "kiln", &title, what)));
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
        pending.commits.push(self.store.audit(line));
    }

    /// Waits for the commits, then tells everybody.
    pub(crate) async fn finish(&self, pending: Pending) -> Result<(), ControlError> {
        let mut untold = Untold { control: self, pending };
        for commit in std::mem::take(&mut untold.pending.commits) {
            if let Err(error) = commit.wait().await {
                untold.pending = Pending::default(); // it is not stored: nobody hears of it
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn tell(&self, pending: Pending) {
        if !pending.gone.is_empty() {
            let (logs, gone) = (Arc::clone(&self.logs), pending.gone.clone());
            tokio::task::spawn_blocking(move || gone.iter().for_each(|id| logs.forget(id)));
        }
        for line in pending.lines {
            if line.warn {
                tracing::warn!(machine = line.machine, stage = line.stage, "{}", line.text);
            } else {
                tracing::info!(machine = line.machine, stage = line.stage, "{}", line.text);
            }
        }
        if self.told.receiver_count() > 0 {
            for id in &pending.touched {
                let view = self.lock().machines.get(id).map(|m| Arc::new(MachineView::of(m)));
                if let Some(view) = view {
                    let _ = self.told.send(Told::Machine(view));
                }
            }
            for id in pending.gone {
                let _ = self.told.send(Told::Gone(id));
            }
        }
        if pending.wake {
            self.wake();
        }
    }
}

/// Of the certificate that machines see.
fn server_key(site: &SiteDir) -> Result<KeyId, ControlError> {
    let pem = site.read_online("agent-server.pem").map_err(|e| CodeError::ServerKey(e.to_string()))?;
    let certificate =
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| CodeError::ServerKey(e.to_string()))?;
    let spki = certificate_spki(&certificate).map_err(|e| CodeError::ServerKey(e.to_string()))?;
    Ok(spki_key_id(spki).parse().expect("a SHA-256 in hex is a key id"))
}

/// What others are to hear once it is stored. They hear it too when whoever waits for that goes, because its connection
/// breaks: the step is taken, and the store keeps the order, so that no answer overtakes it.
struct Untold<'a> {
    control: &'a Control,
    pending: Pending,
}

impl Drop for Untold<'_> {
    fn drop(&mut self) {
        self.control.tell(std::mem::take(&mut self.pending));
    }
}

impl Inner {
    fn index(&mut self, machine: &Machine) {
        self.comparing.note(machine);
        self.names.note(&machine.id, machine.name.as_ref());
        self.keys.note(&machine.id, machine.key.as_ref());
        self.missing.note(machine);
        let Some(facts) = &machine.facts else { return };
        let machines = &self.machines;
        // A machine that a person knows keeps its address against one that only claims it.
        let known = |id: &MachineId| machines.get(id).is_some_and(|m| m.state.kind != StateKind::Discovered);
        self.macs.names(&machine.id, &facts.macs, known);
    }

    /// May this machine leave for what it is assigned? Only those that are missing are looked at.
    fn grant(&self, id: &MachineId, limits: Limits) -> Grant {
        let missing = self.missing.ids().filter_map(|id| self.machines.get(id));
        match self.machines.get(id) {
            Some(machine) => grant_among(machine, missing, limits),
            None => Grant::Hold { reason: "not known".into(), until_ms: None },
        }
    }

    pub(crate) fn note_seen(&mut self, id: &MachineId, now: Millis) {
        self.seen.insert(id.clone(), now);
    }

    pub(crate) fn resolve(&self, name: &str) -> Result<MachineId, ControlError> {
        // An id is never another machine's name, nor its beginning.
        if let Ok(id) = name.parse::<MachineId>() {
            let known = self.machines.contains_key(&id);
            return if known { Ok(id) } else { Err(ControlError::NoSuchMachine(name.to_owned())) };
        }
        if let Some(id) = self.names.find(name) {
            return Ok(id.clone());
        }
        // A name that was freed, and is nobody's now.
        let mut former = self.machines.values().filter(|m| m.former_name.as_deref() == Some(name));
        if let (Some(m), None) = (former.next(), former.next()) {
            return Ok(m.id.clone());
        }
        let lower = name.to_ascii_lowercase();
        let mut fits = self.machines.keys().filter(|id| lower.len() >= 4 && id.as_str().starts_with(&lower));
        match (fits.next(), fits.next()) {
            (Some(id), None) => Ok(id.clone()),
            (Some(_), Some(_)) => Err(ControlError::Ambiguous(name.to_owned())),
            (None, _) => Err(ControlError::NoSuchMachine(name.to_owned())),
        }
    }
}
