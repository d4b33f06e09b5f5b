//! The agent as a service of the running system: health, reports, and the next release, side by side on one thread. What
//! comes next is decided in [`duty`]; here it is done.

mod duty;
#[cfg(test)]
mod tests;
mod watch;

use crate::api::Api;
use crate::change::{self, Meter, Prefetch, Ready, blocking};
use crate::disk::machine::{MachineDisk, SharedDisk, on_disk};
use crate::error::{AgentError, Result};
use crate::handoff::{Handoff, OnDisk};
use crate::health::{Checks, Probe};
use crate::journal::{Journal, monotonic_ms};
use crate::memory::{Place, random};
use crate::net::Uplink;
use crate::plan::{self, Plan};
use crate::spool::Keeper;
use crate::verifier::{Answer, Verifier};
use crate::watchdog::Watchdog;
use crate::{console, exec, facts, init, inventory, local, log, uplink, verity};
use duty::{Action, Duty, Event, Target, Trouble, Wanted};
use kiln_protocol::slot;
use kiln_protocol::{
    Assignment, Decision, Grant, Health, Nonce, ReleaseId, Reply, Report, RunningRelease, Stage, Turn, Via,
};
use kiln_release::EXEC_PATH;
use nix::sys::reboot::{RebootMode, reboot};
use std::collections::BTreeMap;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use watch::{Hooks, Watch};

/// How often health is checked until the machine is healthy.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// How often it is checked from then on.
const WATCH_EVERY: Duration = Duration::from_secs(5);
/// The image's init has so long to stop its services before the agent leaves without it.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// A trial that is not healthy so long after the service's start leaves; the server's own limit is the same.
const TRIAL: Duration = Duration::from_secs(15 * 60);
/// An order that was refused is looked at again after so long.
const ORDER_PAUSE: Duration = Duration::from_secs(60);
/// Longest wait for a disk's commit.
const DISK_DEADLINE: Duration = Duration::from_secs(20);

/// Runs until the machine leaves for another release.
pub fn run() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::system("starting the runtime"))?;
    let ended = runtime.block_on(serve());
    // A check that hangs in the kernel must not hang the end as well.
    runtime.shutdown_background();
    ended
}

async fn serve() -> Result<()> {
    let handoff = Handoff::read()?;
    // First of all: what waits for this service to be ready may want to execute.
    let exec = exec::serve(Path::new(EXEC_PATH), handoff.journal.started_ms);
    if let Some(watchdog) = Watchdog::arm() {
        tokio::spawn(watchdog.keep());
    }
    tokio::spawn(stay_connected(handoff.uplink.clone(), handoff.boot.clone(), facts_id()?));
    forget_an_earlier_start();
    let probe = Probe::new(verity::running_root_hash, "systemctl");
    let checks = Checks::new(handoff.manifest.health.clone(), handoff.manifest.verity.root_hash.clone(), probe);
    let disk = slots(&handoff);
    console::open(facts_id()?.as_str(), &format!("{}/{}", handoff.boot.image, handoff.boot.release));
    if let Some(uplink) = &handoff.uplink {
        console::address(&uplink.describe());
    }
    if let Some(url) = handoff.servers.agent.first() {
        console::server(url);
    }
    log::take_over();
    tokio::spawn(log::follow());
    let watch = Watch::of(&handoff.manifest, disk.clone());
    let (verifier, mut journal) = resume(handoff)?;
    journal.fallback =
        disk.as_ref().and_then(|disk| local::fallback(&verifier.memory, &crate::disk::machine::lock(disk)));
    let site = &verifier.boot.site;
    let api = Api::new(&verifier.servers.agent, &site.agent_api_ca_pem, &verifier.key, &verifier.clock)?;
    log::ship(api, &journal.state.boot_id, &journal.machine.id);
    journal.done(Stage::Handover);
    journal.done(Stage::Service);
    let door = Door { systemctl: "systemctl".into(), reboot: restart };
    let (boot, servers) = (&verifier.boot, &verifier.servers.agent);
    let api = Api::new(servers, &boot.site.agent_api_ca_pem, &verifier.key, &verifier.clock)?;
    tokio::spawn(inventory::keep(api, journal.machine.id.clone(), journal.state.boot_id.clone()));
    let mut service = Service::new(verifier, journal, change::NEXT, door)?;
    (service.disk, service.watch, service.exec) = (disk, watch, exec);
    Err(Box::pin(service.run(checks)).await)
}

/// Keeps what is leased, or goes on asking: in disk mode a machine comes up without a network.
async fn stay_connected(uplink: Option<Uplink>, boot: kiln_release::BootInfo, machine: kiln_protocol::MachineId) {
    let uplink = match uplink {
        Some(uplink) => uplink,
        None => uplink::connect_later(Place::of_this_machine().network(), boot, machine.clone()).await,
    };
    uplink.keep(&machine);
}

/// The disk that this system runs from. One that cannot be opened any more costs the slots: the release goes on.
fn slots(handoff: &Handoff) -> Option<SharedDisk> {
    let OnDisk { name, via } = handoff.disk.clone()?;
    let open = || {
        let floor = Place::of_this_machine().memory()?.floor(&handoff.boot.image);
        let mut disk = MachineDisk::reopen(&name, &handoff.boot, floor)?;
        let root_hash = init::embedded(&handoff.boot)?.root_hash;
        disk.event(slot::Event::Started(root_hash, via), None)?;
        Ok::<_, AgentError>(Arc::new(std::sync::Mutex::new(disk)))
    };
    open().inspect_err(|error| eprintln!("kiln-agent: disk {name}: {error} ({})", error.kind())).ok()
}

fn facts_id() -> Result<kiln_protocol::MachineId> {
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

fn resume(handoff: Handoff) -> Result<(Verifier, Journal)> {
    let place = Place::of_this_machine();
    let key = place.key()?;
    let mut machine = facts::read(place.key_storage(), place.rollback_memory())?;
    machine.protection = init::secure_boot(&handoff.boot).class();
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
    let memory = place.memory()?;
    let now = memory.time_floor.map_or(handoff.now, |t| t.max(handoff.now));
    let mut state = handoff.journal;
    // Likewise reports: their numbers go on above all that an earlier start can have made.
    state.seq = state.seq.max(monotonic_ms());
    let journal = Journal {
        state,
        machine,
        embedded,
        running: Some(running),
        health: None,
        prefetch: None,
        fallback: None,
        condition: None,
    };
    let mut verifier = Verifier::new(handoff.boot, place, key, memory, handoff.servers, now);
    // A system on a disk stays what its slot holds: the disk's blocks are checked at each reading.
    if handoff.disk.is_none() {
        verifier.put_up = handoff.sequence;
    }
    Ok((verifier, journal))
}

/// How this system is left. The seam at which a test stays in the room.
struct Door {
    systemctl: PathBuf,
    /// Comes back only with an error.
    reboot: fn(RebootMode) -> std::io::Error,
}

fn restart(mode: RebootMode) -> std::io::Error {
    nix::unistd::sync();
    match reboot(mode) {
        Err(errno) => errno.into(),
        Ok(never) => match never {},
    }
}

/// What a job leaves behind.
struct Done {
    event: Event,
    /// Of a failed fetch: the next try goes on with it.
    prefetch: Option<Prefetch>,
    ready: Option<Ready>,
}

impl From<Event> for Done {
    fn from(event: Event) -> Self {
        Self { event, prefetch: None, ready: None }
    }
}

/// What is done beside health and reports: one thing at a time. Dropped, it is called off.
type Job = Pin<Box<dyn Future<Output = Done>>>;
/// A report on its way.
type Post = Pin<Box<dyn Future<Output = Result<Reply>>>>;
/// Whether a claimed order (its text) is one.
type Check = Pin<Box<dyn Future<Output = (String, Result<()>)>>>;
/// A round of health checks, and the pause before it.
type Round = Pin<Box<dyn Future<Output = (Checks, Health, Vec<Turn>)>>>;

/// The service: the state it decides by, and what it does it with.
struct Service {
    duty: Duty,
    journal: Journal,
    /// Held by the running job; one that is dropped gives it back.
    verifier: Rc<Mutex<Verifier>>,
    /// Likewise by the report on its way.
    api: Rc<Mutex<Api>>,
    door: Door,
    here: ReleaseId,
    /// [`Verifier::put_up`].
    put_up: u64,
    /// Where the next release's files go.
    next: PathBuf,
    /// The newest reply, and the nonce that its freshness statement must carry.
    newest: Option<(Reply, Nonce)>,
    /// The nonce of the report on its way.
    nonce: Option<Nonce>,
    /// What is being fetched, between its tries.
    prefetch: Option<Prefetch>,
    meter: Arc<Meter>,
    ready: Option<Arc<Ready>>,
    watch: Watch,
    /// In disk mode.
    disk: Option<SharedDisk>,
    /// What was last done of [`kiln_protocol::Desired::network_first`].
    ordered: Option<bool>,
    /// Where the release has an allow-list of programs.
    exec: Option<exec::Post>,
    /// The release that runs is good, or on trial since then.
    proven: Proof,
    /// An order that was refused, and when.
    refused: Option<(String, Instant)>,
}

/// What the slots know of the release that runs.
#[derive(Debug, Clone, Copy)]
enum Proof {
    Good,
    Trial(Instant),
}

impl Service {
    fn new(verifier: Verifier, journal: Journal, next: impl Into<PathBuf>, door: Door) -> Result<Self> {
        let (site, key) = (&verifier.boot.site, &verifier.key);
        let api = Api::new(&verifier.servers.agent, &site.agent_api_ca_pem, key, &verifier.clock)?;
        Ok(Self {
            duty: Duty::new(),
            journal,
            here: verifier.here()?,
            put_up: verifier.put_up,
            verifier: Rc::new(Mutex::new(verifier)),
            api: Rc::new(Mutex::new(api)),
            door,
            next: next.into(),
            newest: None,
            nonce: None,
            prefetch: None,
            meter: Arc::default(),
            ready: None,
            watch: Watch::new(Keeper::open(None, None), BTreeMap::new(), "/"),
            disk: None,
            ordered: None,
            exec: None,
            proven: Proof::Trial(Instant::now()),
            refused: None,
        })
    }

    /// Tells the slots that the release that runs is healthy, or that it is late. Whether it must leave.
    async fn prove(&mut self, healthy: bool) -> bool {
        let (Some(disk), Proof::Trial(since)) = (self.disk.clone(), self.proven) else { return false };
        let event = match healthy {
            true => slot::Event::Healthy,
            false if since.elapsed() >= TRIAL => slot::Event::Late,
            false => return false,
        };
        let done = timeout(DISK_DEADLINE, on_disk(&disk, move |disk| disk.event(event, None))).await;
        match done {
            Ok(Ok(actions)) => {
                if healthy {
                    self.proven = Proof::Good;
                    self.started_well(&disk).await;
                    eprintln!("kiln-agent: {} is healthy: {}", self.here, crate::disk::machine::lock(&disk).describe());
                }
                actions.iter().any(|action| matches!(action, slot::Action::Leave(_)))
            }
            Ok(Err(error)) => {
                eprintln!("kiln-agent: the boot loader cannot be told that this release is good: {error}");
                false
            }
            Err(_) => {
                eprintln!("kiln-agent: the disk gives no answer");
                false
            }
        }
    }

    /// What failed here before may be told no more, and the count of starts ends.
    async fn started_well(&mut self, disk: &SharedDisk) {
        let root_hash = self.journal.embedded.root_hash.clone();
        let done = timeout(DISK_DEADLINE, on_disk(disk, move |disk| disk.forget_starts(&root_hash))).await;
        if let Ok(Err(error)) = done {
            eprintln!("kiln-agent: the starts of this release stay counted: {error}");
        }
        if crate::disk::machine::lock(disk).slots().disk.fallback().is_none() {
            self.journal.fallback = None;
        }
    }

    /// The firmware's boot order is the role's.
    fn order_boot(&mut self) {
        let wanted = self.journal.state.network_first;
        if let (Some(disk), Some(network_first)) = (self.disk.clone(), wanted.filter(|_| wanted != self.ordered)) {
            self.ordered = wanted;
            tokio::spawn(async move {
                if let Err(error) = on_disk(&disk, move |disk| disk.order_boot(network_first)).await {
                    eprintln!("kiln-agent: the firmware's boot order stays as it is: {error}");
                }
            });
        }
    }

    /// Waits for whatever comes first, decides, does. Ends when the machine cannot even be left.
    async fn run(mut self, checks: Checks) -> AgentError {
        self.journal.started(Stage::Health);
        let mut round: Round = Box::pin(check(checks, Duration::ZERO));
        let mut post: Option<Post> = None;
        let mut job: Option<Job> = None;
        let mut wipe: Option<Check> = None;
        let exec = self.exec.clone();
        let mut hooks: Option<Hooks> = None;
        let mut look = self.watch.look();
        loop {
            let event = tokio::select! {
                (mut checks, health, turns) = &mut round => {
                    self.watch.turned(turns);
                    self.watch.refused(checks.set_thresholds(&self.watch.thresholds));
                    round = Box::pin(check(checks, if health.healthy { WATCH_EVERY } else { CHECK_EVERY }));
                    Event::Checked(health)
                }
                reply = maybe(&mut post) => {
                    post = None;
                    let event = self.heard(reply);
                    wipe = wipe.or_else(|| self.check_wipe());
                    event
                }
                (text, checked) = maybe(&mut wipe) => {
                    wipe = None;
                    match checked {
                        Ok(()) => {
                            // The initramfs does it, where no disk is in use.
                            self.journal.started(Stage::Going);
                            drop((round, post, job));
                            return self.leave(true).await;
                        }
                        Err(error) => {
                            self.journal.failed(Stage::Wipe, &error, 1, Some(ORDER_PAUSE));
                            self.refused = Some((text, Instant::now()));
                        }
                    }
                    Event::Time
                }
                done = maybe(&mut job) => {
                    job = None;
                    self.prefetch = done.prefetch;
                    self.ready = done.ready.map(Arc::new).or(self.ready.take());
                    done.event
                }
                () = exec::news(exec.as_ref()) => Event::News,
                event = maybe(&mut hooks) => {
                    hooks = None;
                    event
                }
                (eye, seen) = maybe(&mut look) => {
                    let (next, news) = self.watch.seen(eye, seen);
                    look = Some(next);
                    if news { Event::News } else { Event::Time }
                }
                () = until(self.duty.wakes()) => Event::Time,
            };
            if let Event::Checked(health) = &event
                && self.prove(health.healthy).await
            {
                drop((round, post, job));
                return self.leave(true).await;
            }
            let jitter = random().map_or(0, |bytes| bytes[0]);
            let (duty, actions) = self.duty.event(event, monotonic_ms(), jitter);
            self.duty = duty;
            for action in actions {
                match action {
                    Action::Record(stage, state) => self.journal.state.record(stage, state),
                    Action::Say(words) => eprintln!("kiln-agent: {words}"),
                    Action::EndHold => post = None,
                    Action::Report(hold_s) => post = Some(self.report(hold_s)),
                    Action::Fetch(target) => job = Some(self.fetch(target)),
                    Action::AskWhetherToGo(target) => job = Some(self.ask_whether_to_go(target)),
                    Action::CallOff => job = None,
                    Action::Discard => {
                        (self.prefetch, self.ready, self.meter) = (None, None, Arc::default());
                        self.call_off();
                    }
                    Action::Drain => hooks = Some(self.watch.drain()),
                    Action::Undrain => hooks = Some(self.watch.undrain()),
                    Action::Load => job = Some(self.load()),
                    Action::Leave { cold } => {
                        drop((round, post, job));
                        return self.leave(cold).await;
                    }
                }
            }
        }
    }

    /// The loader shall not hear of what was installed and is no longer wanted. In a thread of its own: nothing waits
    /// for it, and the next install calls off what is left.
    fn call_off(&self) {
        if let Some(disk) = self.disk.clone() {
            tokio::spawn(async move {
                if let Err(error) = on_disk(&disk, |disk| disk.event(slot::Event::CalledOff, None)).await {
                    eprintln!("kiln-agent: {error}");
                }
            });
        }
    }

    /// If the newest reply claims that a wipe is ordered: whether that is true. The same order is not looked at again for
    /// a while after it was refused.
    fn check_wipe(&self) -> Option<Check> {
        let (reply, nonce) = self.newest.clone()?;
        let text = reply.desired.order.as_ref()?.order.clone();
        let envelope: serde_json::Value = serde_json::from_str(&text).ok()?;
        let again = self.refused.as_ref().is_some_and(|(old, at)| *old == text && at.elapsed() < ORDER_PAUSE);
        if again || envelope.get("signed")?.get("action")?.as_str() != Some("wipe") {
            return None;
        }
        let (verifier, here) = (Rc::clone(&self.verifier), self.here.clone());
        Some(Box::pin(async move {
            let verifier = &mut *verifier.lock().await;
            let checked = match verifier.verify_metadata(&here).await {
                Ok(verified) => match verifier.check_reply(&verified, reply, &nonce) {
                    Ok(Answer::Wipe(_)) => Ok(()),
                    Ok(Answer::Wait(_) | Answer::Assigned { .. }) => Err(AgentError::Superseded),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            (text, checked)
        }))
    }

    /// What a reply says for the next decision, before anything of it is believed.
    fn heard(&mut self, reply: Result<Reply>) -> Event {
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => return Event::Unanswered(format!("{error} ({})", error.kind())),
        };
        self.journal.answered(&reply);
        self.order_boot();
        let more = self.watch.heard(&reply);
        let wanted = claimed(&reply);
        let wanted = wanted.filter(|(rebuild, wanted)| wanted.target.release != self.here || *rebuild > self.put_up);
        let wanted = wanted.map(|(_, wanted)| wanted);
        let answer = duty::Answer { again_ms: if more { 0 } else { reply.again_ms }, may_wait: reply.may_wait, wanted };
        self.newest = self.nonce.take().map(|nonce| (reply, nonce));
        Event::Answered(answer)
    }

    fn report(&mut self, hold_s: u32) -> Post {
        self.journal.health = self.duty.health().cloned();
        self.journal.prefetch =
            self.duty.prefetch().map(|p| kiln_protocol::Prefetch { progress: self.meter.read(), ..p });
        self.journal.condition = Some(self.watch.condition());
        let report = self.journal.report(hold_s);
        let report = match &self.exec {
            Some(post) => {
                report.map(|r| Report { agent_memory: post.with_guard(r.agent_memory), exec: Some(post.state()), ..r })
            }
            None => report,
        };
        let api = Rc::clone(&self.api);
        self.nonce = report.as_ref().ok().map(|report| report.nonce.clone());
        Box::pin(async move { api.lock().await.report(&report?).await })
    }

    /// Verifies the assignment against current metadata, and fetches and verifies the release.
    fn fetch(&mut self, target: Target) -> Job {
        let (verifier, prefetch, newest) = (Rc::clone(&self.verifier), self.prefetch.take(), self.newest.clone());
        let (here, next, meter) = (self.here.clone(), self.next.clone(), Arc::clone(&self.meter));
        let disk = self.disk.clone();
        Box::pin(async move {
            let verifier = &mut *verifier.lock().await;
            let mut prefetch = match prefetch {
                Some(prefetch) => prefetch,
                None => match believe(verifier, &here, &target, newest).await {
                    Ok((assignment, via, _)) => {
                        let (disk, via) = match disk {
                            Some(_) if verifier.in_memory_only() => (None, Via::Kexec),
                            disk => (disk, via),
                        };
                        let order = verifier.memory.order(assignment.sequence);
                        Prefetch::new(&assignment, via, &next, meter).onto(disk, order)
                    }
                    Err((stage, error)) => return Event::Failed(trouble(stage, &error, false)).into(),
                },
            };
            match prefetch.run(verifier).await {
                Ok(()) => {
                    let ready = prefetch.into_ready();
                    let note = ready.as_ref().and_then(|ready| ready.note.clone());
                    Done { event: Event::Fetched(note), prefetch: None, ready }
                }
                Err(error) => {
                    let event = Event::Failed(trouble(Stage::Prefetch, &error, prefetch.moved()));
                    Done { event, prefetch: Some(prefetch), ready: None }
                }
            }
        })
    }

    /// Whether the newest reply lets this machine leave for what is ready, by everything that is known now.
    fn ask_whether_to_go(&self, target: Target) -> Job {
        let (verifier, newest, here) = (Rc::clone(&self.verifier), self.newest.clone(), self.here.clone());
        Box::pin(async move {
            let verifier = &mut *verifier.lock().await;
            let event = match believe(verifier, &here, &target, newest).await {
                Ok((_, _, Grant::Go)) => Event::MayGo,
                Ok((_, _, Grant::Hold { .. })) => Event::Failed(trouble(Stage::Grant, &AgentError::Superseded, false)),
                Err((stage, error)) => Event::Failed(trouble(stage, &error, false)),
            };
            event.into()
        })
    }

    fn load(&self) -> Job {
        let ready = self.ready.clone();
        Box::pin(async move {
            let loaded = blocking(move || ready.as_deref().map_or(Ok(()), change::load)).await;
            Event::Loaded(loaded.err().map(|error| trouble(Stage::Going, &error, false))).into()
        })
    }

    /// Leaves. The server hears of it first; then the image's init stops what runs.
    async fn leave(mut self, cold: bool) -> AgentError {
        let via = match self.ready.as_deref().map(Ready::via) {
            Some(Via::Kexec) if !cold => Via::Kexec,
            Some(Via::Kexec | Via::Cold) | None => Via::Cold,
        };
        // From here there is no way back: a loaded kernel cannot be unloaded. A server that does not hear it hears the
        // next boot.
        if let Err(error) = self.report(0).await {
            eprintln!("kiln-agent: report not delivered: {error}");
        }
        log::sent().await;
        let (verb, mode) = match via {
            Via::Kexec => ("kexec", RebootMode::RB_KEXEC),
            Via::Cold => ("reboot", RebootMode::RB_AUTOBOOT),
        };
        let systemctl = self.door.systemctl.clone();
        let asked = blocking(move || {
            let status = Command::new(&systemctl).arg(verb).stdin(Stdio::null()).status();
            status.map_err(AgentError::file(systemctl))
        });
        match timeout(STOP_DEADLINE, asked).await {
            // systemd stops this service too; still being here at the deadline means that something hangs.
            Ok(Ok(status)) if status.success() => sleep(STOP_DEADLINE).await,
            Ok(Ok(_) | Err(_)) | Err(_) => eprintln!("kiln-agent: systemctl {verb} failed; leaving without it"),
        }
        AgentError::system("leaving for the next release")((self.door.reboot)(mode))
    }
}

/// Everything that stands between a reply's claim and doing it: current metadata, both signatures, the machine, the
/// sequence, the nonce, floor and expiry.
async fn believe(
    verifier: &mut Verifier,
    here: &ReleaseId,
    target: &Target,
    newest: Option<(Reply, Nonce)>,
) -> std::result::Result<(Assignment, Via, Grant), (Stage, AgentError)> {
    let verified = verifier.verify_metadata(here).await.map_err(|error| (Stage::Prefetch, error))?;
    let refused = |error| (Stage::Assignment, error);
    let (reply, nonce) = newest.ok_or(refused(AgentError::Superseded))?;
    let answer = verifier.check_reply(&verified, reply, &nonce).map_err(refused)?;
    let Answer::Assigned { assignment, via, grant } = answer else { return Err(refused(AgentError::Superseded)) };
    match plan::decide(here, &assignment, &verifier.memory, &verifier.currency(&verified)).map_err(refused)? {
        Plan::Change(release) if release == target.release && assignment.sequence == target.sequence => {
            Ok((assignment, via, grant))
        }
        // The same release once more, because the machine was put up so long ago.
        Plan::Stay
            if *here == target.release
                && assignment.sequence == target.sequence
                && assignment.rebuild > verifier.put_up =>
        {
            Ok((assignment, via, grant))
        }
        Plan::Change(_) | Plan::Stay => Err(refused(AgentError::Superseded)),
    }
}

fn trouble(stage: Stage, error: &AgentError, moved: bool) -> Trouble {
    Trouble { stage, class: error.class(), kind: error.kind().to_owned(), message: error.to_string(), moved }
}

/// What a reply claims to want, unverified: whether it is worth verifying metadata for.
fn claimed(reply: &Reply) -> Option<(u64, Wanted)> {
    let Decision::Assigned { assignment, grant, .. } = &reply.desired.decision else { return None };
    let envelope: serde_json::Value = serde_json::from_str(assignment).ok()?;
    let named: Assignment = serde_json::from_value(envelope.get("signed")?.clone()).ok()?;
    let target = Target { release: named.release_id(), sequence: named.sequence };
    Some((named.rebuild, Wanted { target, grant: grant.clone() }))
}

/// A pause and a round of checks.
async fn check(mut checks: Checks, pause: Duration) -> (Checks, Health, Vec<Turn>) {
    sleep(pause).await;
    let (health, turns) = checks.run().await;
    (checks, health, turns)
}

/// The future's output, if there is one.
async fn maybe<T>(future: &mut Option<Pin<Box<dyn Future<Output = T>>>>) -> T {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

async fn until(at: Option<duty::Millis>) {
    match at {
        Some(at) => sleep(Duration::from_millis(at.saturating_sub(monotonic_ms()))).await,
        None => pending().await,
    }
}
