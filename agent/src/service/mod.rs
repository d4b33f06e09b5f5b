//! The agent as a service of the running system: health, reports, and the next release, side by side on one thread. What
//! comes next is decided in [`duty`]; here it is done.

mod certificate;
mod duty;
mod files;
mod leave;
mod next;
mod secrets;
mod slots;
mod start;
mod starts;
#[cfg(test)]
mod tests;
mod watch;

pub use start::run;

use crate::api::Api;
use crate::change::{Meter, Prefetch, Ready};
use crate::disk::boot_order;
use crate::disk::machine::SharedDisk;
use crate::error::{AgentError, Result};
use crate::health::Checks;
use crate::journal::{Journal, monotonic_ms};
use crate::memory::random;
use crate::spool::Keeper;
use crate::verifier::Verifier;
use crate::{attest, dbx, exec, log};
use duty::{Action, Duty, Event};
use kiln_protocol::{
    Condition, DbxOutcome, DbxState, Health, KeyId, Nonce, ReleaseId, Reply, Report, RoleSettings, Stage, Turn,
};
use kiln_release::Mode;
use leave::Door;
use next::{ORDER_PAUSE, Selects, claimed, claimed_settings};
use slots::Proving;
use std::collections::BTreeMap;
use std::future::pending;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tokio::time::sleep;
use watch::{Hooks, Watch};

/// How often health is checked until the machine is healthy.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// How often it is checked from then on.
const WATCH_EVERY: Duration = Duration::from_secs(5);

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
/// A list of revoked boot programs on its way into the firmware.
type Listing = Pin<Box<dyn Future<Output = DbxState>>>;
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
    /// What proofs are sent by, and whose they are: neither waits for the verifier.
    prover: (Api, KeyId),
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
    /// Of the image that runs.
    mode: Mode,
    /// In disk mode, if it can be used.
    disk: Option<SharedDisk>,
    /// The kernel's folder of the disk that the root lies on, in disk mode.
    lives_on: Option<PathBuf>,
    /// That disk is in the machine no more.
    gone: bool,
    /// What the role selects, by the newest assignment that was verified.
    settings: RoleSettings,
    /// What a reply claims that it selects.
    claimed: Option<RoleSettings>,
    /// When such a claim did not hold.
    disbelieved: Option<Instant>,
    /// Where the release has an allow-list of programs.
    exec: Option<exec::Post>,
    /// The release that runs is good, or on trial since then.
    proven: Proof,
    /// An order that was refused, and when.
    refused: Option<(String, Instant)>,
    /// What came of the list of revoked boot programs that was offered last, and when.
    dbx: Option<(DbxState, Instant)>,
    /// The proof on its way.
    proof: Option<tokio::task::JoinHandle<()>>,
    /// The release's secrets.
    secrets: secrets::Secrets,
    /// Looks at what the disk starts from.
    files: files::Files,
    /// Where this start is counted, until it came up.
    starts: Option<PathBuf>,
}

/// What the slots know of the release that runs.
#[derive(Debug, Clone, Copy)]
enum Proof {
    Good,
    Trial(Instant),
}

impl Service {
    fn new(verifier: Verifier, journal: Journal, next: impl Into<PathBuf>, door: Door) -> Result<Self> {
        let (site, key, settings) = (&verifier.boot.site, &verifier.key, verifier.settings.clone());
        let api = Api::new(&verifier.servers.agent, &site.agent_api_ca_pem, key, &verifier.clock)?;
        let api = api.pinned(&verifier.pins);
        let prover = (api.another(), verifier.key_id());
        Ok(Self {
            duty: Duty::new(),
            journal,
            here: verifier.here()?,
            put_up: verifier.put_up,
            mode: verifier.boot.site.mode,
            verifier: Rc::new(Mutex::new(verifier)),
            api: Rc::new(Mutex::new(api)),
            prover,
            door,
            next: next.into(),
            newest: None,
            nonce: None,
            prefetch: None,
            meter: Arc::default(),
            ready: None,
            watch: Watch::new(Keeper::open(None, None), BTreeMap::new(), "/"),
            disk: None,
            lives_on: None,
            gone: false,
            settings,
            claimed: None,
            disbelieved: None,
            exec: None,
            proven: Proof::Trial(Instant::now()),
            refused: None,
            dbx: None,
            proof: None,
            secrets: secrets::Secrets::default(),
            files: files::Files::default(),
            starts: None,
        })
    }

    /// The firmware starts what lies on a disk, also where that gives no answer here.
    fn has_disk(&self) -> bool {
        self.disk.is_some() || (self.mode == Mode::Disk && boot_order::is_from_disk())
    }

    /// What of this machine gives no answer: its own disk, or what the boot found silent.
    fn hung(&self) -> Option<String> {
        let own = self.disk.as_ref().filter(|disk| disk.hangs()).map(|disk| disk.name().to_owned());
        own.or_else(|| self.journal.state.hung.clone())
    }

    /// Waits for whatever comes first, decides, does. Ends when the machine cannot even be left.
    async fn run(mut self, checks: Checks) -> AgentError {
        self.journal.started(Stage::Health);
        let mut round: Round = Box::pin(check(checks, Duration::ZERO));
        let mut post: Option<Post> = None;
        let mut job: Option<Job> = None;
        let mut wipe: Option<Check> = None;
        let mut dbx: Option<Listing> = None;
        let mut proving: Option<Proving> = None;
        let exec = self.exec.clone();
        let mut hooks: Option<Hooks> = None;
        let mut look = self.watch.look();
        let mut selects: Option<Selects> = None;
        let mut files: Option<files::Look> = None;
        self.order_boot();
        let mut works = false;
        let changed = self.secrets.changed();
        let cold = 'service: loop {
            let event = tokio::select! {
                (mut checks, health, turns) = &mut round => {
                    // The end of the machine's downtime; that it is no accident is said by the soak.
                    if checks.all_pass() && !std::mem::replace(&mut works, true) && !health.healthy {
                        self.journal.waiting(Stage::Health, &health.detail);
                    }
                    self.watch.turned(turns);
                    self.watch.refused(checks.set_thresholds(&self.settings.thresholds));
                    round = Box::pin(check(checks, if health.healthy { WATCH_EVERY } else { CHECK_EVERY }));
                    Event::Checked(health)
                }
                reply = maybe(&mut post) => {
                    post = None;
                    let event = self.heard(reply);
                    wipe = wipe.or_else(|| self.check_wipe());
                    dbx = dbx.or_else(|| self.take_dbx());
                    selects = selects.or_else(|| self.check_settings());
                    event
                }
                (text, checked) = maybe(&mut wipe) => {
                    wipe = None;
                    match checked {
                        Ok(()) => {
                            // The initramfs does it, where no disk is in use.
                            self.journal.started(Stage::Going);
                            break 'service true;
                        }
                        Err(error) => {
                            self.journal.failed(Stage::Wipe, &error, 1, Some(ORDER_PAUSE));
                            self.refused = Some((text, Instant::now()));
                        }
                    }
                    Event::News
                }
                checked = maybe(&mut selects) => {
                    selects = None;
                    self.select(checked)
                }
                done = maybe(&mut job) => {
                    job = None;
                    self.prefetch = done.prefetch;
                    self.ready = done.ready.map(Arc::new).or(self.ready.take());
                    done.event
                }
                state = maybe(&mut dbx) => {
                    dbx = None;
                    self.dbx = Some((state, Instant::now()));
                    Event::News
                }
                told = maybe(&mut proving) => {
                    proving = None;
                    let trouble = matches!(&told, (_, Ok((_, Some(_)))));
                    if self.proved(told) {
                        break 'service true;
                    }
                    if trouble { Event::News } else { Event::Time }
                }
                wrong = maybe(&mut files) => {
                    files = None;
                    self.saw_files(&wrong)
                }
                () = exec::news(exec.as_ref()) => Event::News,
                () = changed.notified() => Event::News,
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
            // What is not in memory cannot be read any more. The boot server is there to boot from again.
            if self.gone && matches!(event, Event::Answered(_)) {
                break 'service true;
            }
            if let Event::Checked(health) = &event {
                self.look_for_disk();
                self.secrets.end_certificate();
                proving = proving.or_else(|| self.prove(health.healthy));
            }
            files = files.or_else(|| self.look_at_files());
            let jitter = random().map_or(0, |bytes| bytes[0]);
            // Who dies before this was heard of by nobody, and has not seen how its release does.
            if matches!(event, Event::Answered(_) | Event::Checked(_))
                && let Some(path) = self.starts.take()
            {
                starts::came_up(&path);
            }
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
                    Action::Leave { cold } => break 'service cold,
                }
            }
        };
        // What is not polled any more keeps the locks that it holds: none of it may be there while the machine leaves.
        drop((round, post, job, wipe, dbx, proving, selects, files));
        self.leave(cold).await
    }

    /// If the newest reply offers a list of revoked boot programs that was not tried just now.
    fn take_dbx(&self) -> Option<Listing> {
        let offer = self.newest.as_ref()?.0.dbx.clone()?;
        if let Some((state, at)) = &self.dbx {
            let same = state.update == offer.update;
            // A server that offers another list each time costs no more than a look a minute.
            let pause = if same { dbx::AGAIN } else { dbx::ANOTHER };
            if (same && state.outcome == DbxOutcome::Installed) || at.elapsed() < pause {
                return None;
            }
        }
        let (verifier, here) = (Rc::clone(&self.verifier), self.here.clone());
        let good = self.disk.as_ref().and_then(|disk| disk.slots().disk.newest_good());
        let disk = self.disk.clone();
        Some(Box::pin(async move {
            let mut verifier = verifier.lock().await;
            dbx::install(&mut verifier, &here, good.as_ref(), disk.as_ref(), &offer).await
        }))
    }

    /// What a reply says for the next decision, before anything of it is believed.
    fn heard(&mut self, reply: Result<Reply>) -> Event {
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => return Event::Unanswered(format!("{error} ({})", error.kind())),
        };
        self.journal.answered(&reply);
        self.claimed = claimed_settings(&reply);
        let ask = self.secrets.heard(reply.secrets);
        if reply.attest || ask {
            self.attest(ask);
        }
        if self.secrets.certificate_due(reply.certify) {
            self.certify();
        }
        let more = self.watch.heard(&reply);
        let wanted = claimed(&reply);
        let wanted = wanted.filter(|(rebuild, wanted)| wanted.target.release != self.here || *rebuild > self.put_up);
        let wanted = wanted.map(|(_, wanted)| wanted);
        let answer = duty::Answer { again_ms: if more { 0 } else { reply.again_ms }, may_wait: reply.may_wait, wanted };
        self.newest = self.nonce.take().map(|nonce| (reply, nonce));
        Event::Answered(answer)
    }

    /// Proves to the server what was booted: where it could not be asked in the initramfs, and for the secrets.
    fn attest(&mut self, ask: bool) {
        if self.proof.as_ref().is_some_and(|proof| !proof.is_finished()) {
            return;
        }
        let (mut api, key) = (self.prover.0.another(), self.prover.1.clone());
        let (machine, boot_id) = (self.journal.machine.id.clone(), self.journal.state.boot_id.clone());
        let taker = self.secrets.taker(ask, &self.door.systemctl);
        self.proof = Some(tokio::spawn(async move {
            let proven = attest::prove(&mut api, &machine, &boot_id, &key, ask).await;
            match proven {
                Ok(proved) => {
                    let judged = &proved.judged;
                    eprintln!("kiln-agent: {}: {}", judged.state, log::said(&judged.reason));
                    taker.take(judged.refused.clone(), proved.secrets).await;
                }
                Err(error) => {
                    eprintln!("kiln-agent: no proof of this boot: {error} ({})", error.kind());
                    taker.take(Some(error.to_string()), None).await;
                }
            }
        }));
    }

    fn report(&mut self, hold_s: u32) -> Post {
        self.journal.health = self.duty.health().cloned();
        self.journal.prefetch =
            self.duty.prefetch().map(|p| kiln_protocol::Prefetch { progress: self.meter.read(), ..p });
        let put_up = self.disk.is_some().then_some(self.put_up).filter(|sequence| *sequence != u64::MAX);
        let condition = Condition { put_up, ..self.watch.condition() };
        // What is left for the next report does not wait until the server lets this one go, nor who leaves once it answers.
        let hold_s = if self.gone || self.watch.keeper.kept() > condition.spool.events.len() { 0 } else { hold_s };
        self.journal.condition = Some(condition);
        // Whoever verifies meanwhile has the verifier; the next report has what came of it.
        if let Ok(mut verifier) = self.verifier.try_lock() {
            verifier.say(&mut self.journal);
        }
        let report = self.journal.report(hold_s);
        let listed = self.dbx.as_ref().map(|(state, _)| state.clone());
        let secrets = self.secrets.held();
        let report = report.map(|report| Report { dbx: listed, secrets, ..report });
        let report = match &self.exec {
            Some(post) => {
                report.map(|r| Report { agent_memory: post.with_guard(r.agent_memory), exec: Some(post.state()), ..r })
            }
            None => report,
        };
        let (api, verifier, here) = (Rc::clone(&self.api), Rc::clone(&self.verifier), self.here.clone());
        self.nonce = report.as_ref().ok().map(|report| report.nonce.clone());
        Box::pin(async move {
            let report = report?;
            let mut api = api.lock().await;
            match api.report(&report).await {
                // The site may name this key by now: what it has signed last decides.
                Err(AgentError::AgentApiKey { .. }) => {
                    verifier.lock().await.verify_metadata(&here).await?;
                    api.report(&report).await
                }
                answered => answered,
            }
        })
    }
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
