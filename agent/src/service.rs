//! The agent as a service of the running system: health, reports, and the next release.

use crate::api::Api;
use crate::change::{self, Ready};
use crate::error::{AgentError, Result};
use crate::flow::{Answer, Flow, Verified};
use crate::handoff::Handoff;
use crate::health::Checks;
use crate::journal::{Journal, monotonic_ms};
use crate::memory::{Place, random};
use crate::plan::{self, Plan};
use crate::{facts, init, net, verity};
use kiln_protocol::{Assignment, Decision, Grant, Health, Prefetch, Reply, RunningRelease, Stage, Via};
use std::path::Path;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

/// How often health is checked until the machine is healthy.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// How often it is checked from then on.
const WATCH_EVERY: Duration = Duration::from_secs(5);
/// Tries of a prefetch before the agent turns to its other duties.
const PREFETCH_TRIES: u32 = 5;
/// So long it does before it tries again.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// Longest a report is held by the server.
const HOLD_S: u32 = 50;
/// The image's init has so long to stop its services before the agent leaves without it.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// Runs until the machine leaves for another release.
pub fn run() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::system("starting the runtime"))?;
    runtime.block_on(serve())
}

async fn serve() -> Result<()> {
    let handoff = Handoff::read()?;
    tokio::spawn(net::keep(handoff.lease.clone(), facts_id()?));
    let checks = Checks::new(handoff.manifest.health.clone(), handoff.manifest.verity.root_hash.clone());
    let mut flow = resume(handoff)?;
    flow.journal.done(Stage::Handover);
    flow.journal.done(Stage::Service);
    Service { checks, healthy: false, may_wait: false, ready: None, refused: None, told: String::new() }
        .run(&mut flow)
        .await
}

fn facts_id() -> Result<kiln_protocol::MachineId> {
    let place = Place::of_this_machine();
    Ok(facts::read(place.key_storage(), place.rollback_memory())?.id)
}

fn resume(handoff: Handoff) -> Result<Flow> {
    let place = Place::of_this_machine();
    let key = place.key()?;
    let machine = facts::read(place.key_storage(), place.rollback_memory())?;
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
    let journal = Journal { state, machine, embedded, running: Some(running), health: None, prefetch: None };
    let mut flow =
        Flow { boot: handoff.boot, place, key, memory, journal, servers: handoff.servers, api: None, tries: None, now };
    if let Some(url) = flow.servers.agent.first() {
        flow.api = Some(Api::new(url, &flow.boot.site.agent_api_ca_pem, &flow.key, flow.now)?);
    }
    Ok(flow)
}

/// What the service keeps between reports.
struct Service {
    checks: Checks,
    healthy: bool,
    /// Whether the server is willing to hold a report.
    may_wait: bool,
    ready: Option<Ready>,
    /// Sequence of an assignment whose prefetch was given up, and when to try again.
    refused: Option<(u64, Instant)>,
    /// Why it is held, as last told.
    told: String,
}

impl Service {
    async fn run(mut self, flow: &mut Flow) -> Result<()> {
        flow.journal.started(Stage::Health);
        let mut failures = 0;
        loop {
            let health = self.checks.run().await;
            self.judge(flow, health);
            let pause = match self.exchange(flow).await {
                Ok(pause) => {
                    failures = 0;
                    pause
                }
                Err(error) => {
                    failures += 1;
                    let words = format!("{error} ({})", error.kind());
                    if words != self.told {
                        eprintln!("kiln-agent: {words}");
                        self.told = words;
                    }
                    jittered(Duration::from_secs(1 << failures.min(6)))?
                }
            };
            if self.healthy {
                let watched = timeout(pause, unwell(&mut self.checks)).await;
                if let Ok(health) = watched {
                    self.judge(flow, health);
                }
            } else {
                sleep(pause.min(CHECK_EVERY)).await;
            }
        }
    }

    /// Keeps the journal's judgement; what changes is a stage.
    fn judge(&mut self, flow: &mut Flow, health: Health) {
        if health.healthy && !self.healthy {
            flow.journal.done(Stage::Health);
            flow.journal.done(Stage::Healthy);
        }
        if !health.healthy && self.healthy {
            flow.journal.waiting(Stage::Health, &health.detail);
        }
        self.healthy = health.healthy;
        flow.journal.health = Some(health);
    }

    /// One report, and what its answer asks for. Gives the pause until the next. While health may still change,
    /// reports are short; a healthy machine lets itself be held, and breaks the hold when it is no longer well.
    async fn exchange(&mut self, flow: &mut Flow) -> Result<Duration> {
        let api = flow.api.as_mut().ok_or(AgentError::NoServer)?;
        let hold = self.healthy && self.may_wait;
        let (reply, nonce) = if hold {
            let held = flow.journal.send(api, HOLD_S);
            tokio::select! {
                reply = held => reply?,
                health = unwell(&mut self.checks) => {
                    self.judge(flow, health);
                    return Ok(Duration::ZERO);
                }
            }
        } else {
            flow.journal.send(api, 0).await?
        };
        self.may_wait = reply.may_wait;
        let again = jittered(Duration::from_millis(reply.again_ms.clamp(200, 300_000)))?;
        let Some(sequence) = other_release(flow, &reply) else {
            self.ready = None;
            flow.journal.prefetch = None;
            return Ok(if !self.healthy {
                CHECK_EVERY
            } else if self.may_wait {
                // Not none at all: a server that answers holds at once must not be asked without pause.
                Duration::from_millis(200)
            } else {
                again
            });
        };
        if self.refused.is_some_and(|(s, until)| s == sequence && Instant::now() < until) {
            return Ok(again);
        }
        self.follow(flow, reply, &nonce).await
    }

    /// Verifies the assignment against current metadata, prefetches, waits for the grant, goes.
    async fn follow(&mut self, flow: &mut Flow, reply: Reply, nonce: &kiln_protocol::Nonce) -> Result<Duration> {
        let here = flow.here()?;
        let verified: Verified = flow.verify_metadata(&here).await?;
        let answer = match flow.check_reply(&verified, reply, nonce) {
            Ok(answer) => answer,
            Err(error) => {
                flow.journal.failed(Stage::Assignment, &error, 1, None);
                return Err(error);
            }
        };
        let Answer::Assigned { assignment, via, grant } = answer else { return Ok(CHECK_EVERY) };
        let release = match plan::decide(&here, &assignment, &flow.memory, &flow.currency(&verified))? {
            Plan::Stay => return Ok(CHECK_EVERY),
            Plan::Change(release) => release,
        };
        if self.ready.as_ref().is_none_or(|r| r.release != release) {
            return self.prefetch(flow, &assignment, &release, via).await;
        }
        match grant {
            Grant::Hold { reason, .. } => {
                if reason != self.told {
                    flow.journal.waiting(Stage::Grant, &reason);
                    self.told = reason;
                }
                Ok(CHECK_EVERY)
            }
            Grant::Go => {
                flow.journal.done(Stage::Grant);
                self.go(flow).await
            }
        }
    }

    async fn prefetch(
        &mut self,
        flow: &mut Flow,
        assignment: &Assignment,
        release: &kiln_protocol::ReleaseId,
        via: Via,
    ) -> Result<Duration> {
        flow.journal.started(Stage::Prefetch);
        let state = |ready| Prefetch {
            image: release.image.clone(),
            release: release.release,
            sequence: assignment.sequence,
            ready,
            progress: None,
        };
        flow.journal.prefetch = Some(state(false));
        let mut attempt = 0;
        loop {
            attempt += 1;
            match change::prefetch(flow, assignment, release, via, Path::new(change::NEXT_ROOT)).await {
                Ok(ready) => {
                    flow.journal.done(Stage::Prefetch);
                    if let Some(note) = &ready.note {
                        flow.journal.waiting(Stage::Grant, note);
                    }
                    flow.journal.prefetch = Some(state(true));
                    flow.journal.started(Stage::Grant);
                    self.ready = Some(ready);
                    return Ok(Duration::ZERO);
                }
                Err(AgentError::Superseded) => {
                    flow.journal.waiting(Stage::Prefetch, "another assignment has come");
                    flow.journal.prefetch = None;
                    return Ok(Duration::ZERO);
                }
                Err(error) => {
                    if attempt >= PREFETCH_TRIES {
                        flow.journal.failed(Stage::Prefetch, &error, attempt, None);
                        self.refused = Some((assignment.sequence, Instant::now() + REFUSED_PAUSE));
                        flow.journal.prefetch = None;
                        return Err(error);
                    }
                    if let Err(error) = flow.after_failure(Stage::Prefetch, error, attempt).await {
                        // This release stays; the server knows why. It may be mended on the server, so not for ever.
                        self.refused = Some((assignment.sequence, Instant::now() + REFUSED_PAUSE));
                        flow.journal.prefetch = None;
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Leaves. The server hears of it first; then the image's init stops what runs.
    async fn go(&mut self, flow: &mut Flow) -> Result<Duration> {
        let Some(mut ready) = self.ready.take() else { return Ok(CHECK_EVERY) };
        if let Err(error) = change::load(&ready) {
            // The verified release can still be reached through the firmware: that needs nothing from this kernel.
            flow.journal.failed(Stage::Going, &error, 1, None);
            ready.via = Via::Cold;
        }
        flow.journal.started(Stage::Going);
        flow.journal.health = Some(Health { healthy: false, detail: format!("leaving for {}", ready.release) });
        // From here there is no way back: a loaded kernel cannot be unloaded. A server that does not hear it hears the
        // next boot.
        flow.report().await;
        let verb = match ready.via {
            Via::Kexec => "kexec",
            Via::Cold => "reboot",
        };
        let asked = Command::new("systemctl").arg(verb).status().await;
        if asked.is_ok_and(|s| s.success()) {
            // systemd stops this service too; still being here at the deadline means that something hangs.
            sleep(STOP_DEADLINE).await;
        } else {
            eprintln!("kiln-agent: systemctl {verb} failed; leaving without it");
        }
        nix::unistd::sync();
        let mode = match ready.via {
            Via::Kexec => nix::sys::reboot::RebootMode::RB_KEXEC,
            Via::Cold => nix::sys::reboot::RebootMode::RB_AUTOBOOT,
        };
        let error = nix::sys::reboot::reboot(mode);
        Err(AgentError::system("leaving for the next release")(std::io::Error::other(format!("{error:?}"))))
    }
}

/// Whether the reply speaks of another release than the one that runs, before anything of it is believed: only
/// then is it worth verifying metadata.
fn other_release(flow: &Flow, reply: &Reply) -> Option<u64> {
    let Decision::Assigned { assignment, .. } = &reply.desired.decision else { return None };
    let envelope: serde_json::Value = serde_json::from_str(assignment).ok()?;
    let named: Assignment = serde_json::from_value(envelope.get("signed")?.clone()).ok()?;
    let here = flow.here().ok()?;
    (named.release_id() != here).then_some(named.sequence)
}

/// Comes back when a check fails.
async fn unwell(checks: &mut Checks) -> Health {
    loop {
        sleep(WATCH_EVERY).await;
        let health = checks.run().await;
        if !health.healthy {
            return health;
        }
    }
}

/// 80 to 120 % of it.
fn jittered(pause: Duration) -> Result<Duration> {
    Ok(pause * (80 + u32::from(random()?[0]) * 40 / 255) / 100)
}
