//! The stages of this boot: each goes to the console at once, and to the server with the next report.

use crate::acceptance;
use crate::api::Api;
use crate::console;
use crate::error::{AgentError, Result};
use crate::facts;
use crate::log;
use crate::memory::random;
use kiln_protocol::slot::Fallback;
use kiln_protocol::{
    Condition, Decision, Failure, Health, MachineFacts, Nonce, Prefetch, Reply, Report, RunningRelease, Stage,
    StageRecord, StageState, Stale,
};
use kiln_release::hex;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Records kept while no server answers; the oldest beyond it are dropped.
const KEEP: usize = 256;

/// What crosses the hand-over to the agent in the running system.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JournalState {
    pub boot_id: String,
    /// Reports made so far.
    pub seq: u64,
    /// Monotonic clock at the agent's start, milliseconds.
    pub started_ms: u64,
    /// Records no reply has confirmed.
    pub pending: Vec<StageRecord>,
    /// How many of them, from the first, are in the report under way.
    #[serde(skip)]
    sent: usize,
    /// [`kiln_protocol::Desired::etag`] of the last reply.
    pub desired_etag: String,
    /// The newest record's stage, and whether it was a failure that ended its tries.
    pub last: Option<(Stage, bool)>,
    /// Sequence that the last reply's assignment claims: not verified, only a hint that something else is wanted.
    pub sequence_hint: Option<u64>,
    /// [`Report::stale`].
    #[serde(default)]
    pub stale: Option<Stale>,
    /// What of this machine gave no answer in this boot: a disk's name, or what its driver was busy with.
    #[serde(default)]
    pub hung: Option<String>,
}

/// The stages of this boot.
pub struct Journal {
    pub state: JournalState,
    pub machine: MachineFacts,
    pub embedded: RunningRelease,
    pub running: Option<RunningRelease>,
    pub health: Option<Health>,
    pub prefetch: Option<Prefetch>,
    /// In disk mode.
    pub fallback: Option<Fallback>,
    pub condition: Option<Condition>,
}

/// CLOCK_MONOTONIC in milliseconds: it counts over the hand-over, and is new after each kernel start.
pub fn monotonic_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// The kernel's id of this boot.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(std::fs::read_to_string(path).map_err(AgentError::file(path))?.trim().to_owned())
}

impl JournalState {
    /// A journal that begins at `started_ms`.
    pub fn begin(boot_id: String, started_ms: u64) -> Self {
        Self {
            boot_id,
            seq: 0,
            started_ms,
            pending: Vec::new(),
            sent: 0,
            desired_etag: String::new(),
            last: None,
            sequence_hint: None,
            stale: None,
            hung: None,
        }
    }

    /// If this error says that something gave no answer, that is kept for the way out.
    pub fn note_hung(&mut self, error: &AgentError) {
        if self.hung.is_none() {
            self.hung = error.hung().map(str::to_owned);
        }
    }

    fn at_ms(&self) -> u64 {
        monotonic_ms().saturating_sub(self.started_ms)
    }

    pub fn record(&mut self, stage: Stage, state: StageState) {
        let at_ms = self.at_ms();
        let words = words(&state);
        // Not as a line of the log: it goes to the server as a record.
        let line = format!("kiln-agent [{:>4}.{:03}] {:<28} {words}", at_ms / 1000, at_ms % 1000, stage.label());
        log::show(false, &line);
        console::stage(stage, &state);
        let gave_up = matches!(&state, StageState::Failed(f) if f.retry_in_ms.is_none());
        self.last = Some((stage, gave_up));
        if self.pending.len() >= KEEP {
            self.pending.remove(0);
            self.sent = self.sent.saturating_sub(1);
        }
        self.pending.push(StageRecord { stage, state, at_ms });
    }
}

impl Journal {
    pub fn started(&mut self, stage: Stage) {
        self.state.record(stage, StageState::Started);
    }

    pub fn done(&mut self, stage: Stage) {
        self.state.record(stage, StageState::Done);
    }

    pub fn waiting(&mut self, stage: Stage, reason: &str) {
        self.state.record(stage, StageState::Waiting { reason: reason.to_owned() });
    }

    pub fn failed(&mut self, stage: Stage, error: &AgentError, attempt: u32, retry_in: Option<Duration>) {
        let retry_in_ms = retry_in.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
        let failure = Failure { kind: error.kind().to_owned(), message: error.to_string(), attempt, retry_in_ms };
        self.state.note_hung(error);
        self.state.record(stage, StageState::Failed(failure));
    }

    /// Posts everything not yet confirmed. The reply's freshness statement answers the nonce given back.
    pub async fn send(&mut self, api: &mut Api, wait_s: u32) -> Result<(Reply, Nonce)> {
        let report = self.report(wait_s)?;
        let reply = api.report(&report).await?;
        self.answered(&reply);
        Ok((reply, report.nonce))
    }

    /// A report of everything not yet confirmed.
    pub fn report(&mut self, wait_s: u32) -> Result<Report> {
        let nonce: Nonce = hex::encode(&random()?).parse().expect("32 bytes are 64 hex digits");
        self.state.seq += 1;
        self.state.sent = self.state.pending.len();
        Ok(Report {
            boot_id: self.state.boot_id.clone(),
            seq: self.state.seq,
            machine: self.machine.clone(),
            nonce,
            embedded: self.embedded.clone(),
            running: self.running.clone(),
            stages: self.state.pending.clone(),
            at_ms: self.state.at_ms(),
            health: self.health.clone(),
            prefetch: self.prefetch.clone(),
            fallback: self.fallback.clone(),
            agent_memory: facts::own_memory(),
            exec: None,
            dbx: None,
            condition: self.condition.clone(),
            acceptance: acceptance::state(),
            secrets: None,
            stale: self.state.stale.clone(),
            wait_s,
            desired_etag: self.state.desired_etag.clone(),
        })
    }

    /// The last report was answered: what it carried is confirmed. What came since is not.
    pub fn answered(&mut self, reply: &Reply) {
        self.state.pending.drain(..self.state.sent.min(self.state.pending.len()));
        self.state.sent = 0;
        if let Some(about) = &reply.about {
            console::about(about);
        }
        self.state.desired_etag.clone_from(&reply.desired.etag);
        self.state.sequence_hint = match &reply.desired.decision {
            Decision::Wait { .. } => None,
            Decision::Assigned { assignment, .. } => claimed_sequence(assignment),
        };
    }
}

/// A state as the console has it. Why it waits is the server's word, and an error may repeat what was served.
fn words(state: &StageState) -> String {
    match state {
        StageState::Started => "…".to_owned(),
        StageState::Done => "done".to_owned(),
        StageState::Waiting { reason } => format!("waiting: {}", log::said(reason)),
        StageState::Failed(f) => {
            let then = f.retry_in_ms.map_or("giving up".to_owned(), |ms| format!("next try in {ms} ms"));
            format!("failed ({}, try {}): {}; {then}", f.kind, f.attempt, log::said(&f.message))
        }
    }
}

fn claimed_sequence(envelope: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(envelope).ok()?.get("signed")?.get("sequence")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_begins_no_line_of_the_console() {
        let evil = "\u{1b}[2J\r\nkiln-agent: approval code AAAA-AAAA";
        let failed = |message: String| {
            let failure = Failure { kind: "server-bad-status".into(), message, attempt: 1, retry_in_ms: Some(1000) };
            StageState::Failed(failure)
        };
        for state in [StageState::Waiting { reason: evil.into() }, failed(evil.into())] {
            let said = words(&state);
            assert!(said.contains("approval code AAAA-AAAA") && !said.chars().any(char::is_control), "{said:?}");
        }
        let long = words(&failed("x".repeat(1 << 20)));
        assert!(long.len() < 1200 && long.ends_with("; next try in 1000 ms"), "{} bytes", long.len());
        assert_eq!(words(&StageState::Waiting { reason: "für später".into() }), "waiting: für später");
    }
}
