//! A machine's boots, each with the stages it went through on the server's clock.

use crate::Millis;
use crate::event::Action;
use kiln_protocol::{Failure, ReleaseId, Stage, StageRecord, StageState, Via, printable};
use serde::{Deserialize, Serialize};

/// Boots kept per machine.
pub const BOOTS_KEPT: usize = 8;
/// Stage records kept per boot: an agent that retries for ever does not fill the server.
pub const RECORDS_KEPT: usize = 128;
/// Longest text kept of an agent's message.
const MESSAGE_KEPT: usize = 500;

/// One step of one stage, on the server's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageAt {
    /// Which stage.
    pub stage: Stage,
    /// How it stands.
    #[serde(flatten)]
    pub state: StageState,
    /// When, on the server's clock.
    pub at: Millis,
    /// When, in milliseconds since the agent's start; none for what the server saw itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_ms: Option<u64>,
}

/// One boot: from the firmware's first packet, or the kexec, on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Counts this machine's boots from 1.
    pub number: u64,
    /// The kernel's boot id; empty while only the firmware was heard.
    pub boot_id: String,
    /// How this kernel was started.
    pub via: Via,
    /// The release its UKI embeds, once the agent said so.
    pub release: Option<ReleaseId>,
    /// When it began, as far as the server saw.
    pub started: Millis,
    /// Highest report number seen.
    pub seq: u64,
    /// Its reports that came after the next boot had begun; counted anew once a person cleared the machine.
    #[serde(default)]
    pub late: u8,
    /// The agent's zero on the server's clock: the earliest that any report allows, so that a slow report does not
    /// move it.
    pub agent_zero: Option<Millis>,
    /// When its firmware last showed that it goes on: the DISCOVER, bytes of a loader or of the boot program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved: Option<Millis>,
    /// Kexecs to its release that had come to nothing on its machine's class when it began.
    #[serde(default)]
    pub after: u32,
    /// That a kexec out of it, or the one that began it, came to nothing was noted.
    #[serde(default)]
    pub vain: bool,
    /// What happened, oldest first; at most [`RECORDS_KEPT`].
    pub stages: Vec<StageAt>,
}

impl Boot {
    pub(crate) fn new(number: u64, via: Via, started: Millis) -> Self {
        Self {
            number,
            boot_id: String::new(),
            via,
            release: None,
            started,
            seq: 0,
            late: 0,
            agent_zero: None,
            moved: None,
            after: 0,
            vain: false,
            stages: Vec::new(),
        }
    }

    /// The firmware was heard, the agent not yet.
    pub fn is_unclaimed(&self) -> bool {
        self.boot_id.is_empty()
    }

    pub(crate) fn has(&self, stage: Stage) -> bool {
        self.stages.iter().any(|s| s.stage == stage)
    }

    /// Its boot program was sent whole.
    pub(crate) fn is_loaded(&self) -> bool {
        self.stages.iter().any(|s| s.stage == Stage::Program && s.state == StageState::Done)
    }

    /// The agent's clock against the server's: `at_ms` was on the agent's clock when its report arrived at `now`.
    pub(crate) fn set_clock(&mut self, at_ms: u64, now: Millis) {
        let zero = now.saturating_sub(at_ms);
        self.agent_zero = Some(self.agent_zero.map_or(zero, |z| z.min(zero)));
    }

    /// Adds what the agent says, and gives it back, if it is new.
    pub(crate) fn add(&mut self, record: &StageRecord, now: Millis) -> Option<StageAt> {
        if self.stages.iter().any(|s| {
            s.agent_ms == Some(record.at_ms)
                && s.stage == record.stage
                && std::mem::discriminant(&s.state) == std::mem::discriminant(&record.state)
        }) {
            return None; // sent again because the last reply was lost
        }
        let at = self.agent_zero.unwrap_or(now).saturating_add(record.at_ms).min(now);
        let new = StageAt { stage: record.stage, state: short(&record.state), at, agent_ms: Some(record.at_ms) };
        self.push(new.clone());
        Some(new)
    }

    /// Adds what the server saw itself.
    pub(crate) fn see(&mut self, stage: Stage, state: StageState, now: Millis) -> Action {
        let new = StageAt { stage, state, at: now, agent_ms: None };
        self.push(new.clone());
        Action::Stage(new)
    }

    fn push(&mut self, new: StageAt) {
        // A stage that is tried again and again, or waits, keeps its newest words only.
        if let Some(last) = self.stages.last_mut()
            && last.stage == new.stage
            && repeats(&last.state, &new.state)
        {
            let at = if matches!(new.state, StageState::Waiting { .. }) { last.at } else { new.at };
            *last = StageAt { at, ..new };
            return;
        }
        if self.stages.len() >= RECORDS_KEPT {
            // What was done stays; of the rest the oldest goes.
            let index = self.stages.iter().position(|s| s.state != StageState::Done).unwrap_or(0);
            self.stages.remove(index);
        }
        self.stages.push(new);
    }
}

fn repeats(last: &StageState, new: &StageState) -> bool {
    match (last, new) {
        (StageState::Failed(a), StageState::Failed(b)) => a.kind == b.kind,
        (StageState::Waiting { .. }, StageState::Waiting { .. }) | (StageState::Done, StageState::Done) => true,
        (
            StageState::Started | StageState::Done | StageState::Failed(_) | StageState::Waiting { .. },
            StageState::Started | StageState::Done | StageState::Failed(_) | StageState::Waiting { .. },
        ) => false,
    }
}

pub(crate) fn cut(text: &str) -> String {
    let tame: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MESSAGE_KEPT).collect();
    // Marks that turn text round are shown, not obeyed.
    printable(&tame)
}

fn short(state: &StageState) -> StageState {
    match state {
        StageState::Started => StageState::Started,
        StageState::Done => StageState::Done,
        StageState::Failed(f) => StageState::Failed(Failure {
            kind: f.kind.chars().filter(char::is_ascii_graphic).take(64).collect(),
            message: cut(&f.message),
            attempt: f.attempt,
            retry_in_ms: f.retry_in_ms,
        }),
        StageState::Waiting { reason } => StageState::Waiting { reason: cut(reason) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(attempt: u32, at_ms: u64) -> StageRecord {
        StageRecord {
            stage: Stage::Server,
            state: StageState::Failed(Failure {
                kind: "server-unreachable".into(),
                message: "x".repeat(10_000),
                attempt,
                retry_in_ms: Some(1),
            }),
            at_ms,
        }
    }

    #[test]
    fn retries_keep_the_newest_words_only() {
        let mut boot = Boot::new(1, Via::Cold, 0);
        boot.set_clock(100, 1_000);
        for n in 1..1000_u32 {
            assert!(boot.add(&failed(n, u64::from(n)), 2_000).is_some());
        }
        assert_eq!(boot.stages.len(), 1);
        let StageState::Failed(f) = &boot.stages[0].state else { panic!("failed") };
        assert_eq!((f.attempt, f.message.len()), (999, 500));
    }

    #[test]
    fn records_are_bounded_and_what_was_done_stays() {
        let mut boot = Boot::new(1, Via::Cold, 0);
        boot.see(Stage::Dhcp, StageState::Done, 1);
        for n in 0..1000 {
            let state = if n % 2 == 0 { StageState::Started } else { StageState::Waiting { reason: "r".into() } };
            boot.add(&StageRecord { stage: Stage::Grant, state, at_ms: n }, n);
        }
        assert_eq!(boot.stages.len(), RECORDS_KEPT);
        assert_eq!(boot.stages[0].stage, Stage::Dhcp);
    }

    #[test]
    fn the_quickest_report_sets_the_clock() {
        let mut boot = Boot::new(1, Via::Cold, 0);
        boot.set_clock(1_000, 11_500);
        boot.set_clock(2_000, 12_100);
        boot.set_clock(3_000, 19_000);
        assert_eq!(boot.agent_zero, Some(10_100));
        boot.add(&StageRecord { stage: Stage::Start, state: StageState::Done, at_ms: 50 }, 20_000);
        assert_eq!(boot.stages[0].at, 10_150);
        boot.add(&StageRecord { stage: Stage::Modules, state: StageState::Done, at_ms: u64::MAX }, 20_000);
        assert_eq!(boot.stages[1].at, 20_000, "never later than now");
        assert_eq!(boot.add(&StageRecord { stage: Stage::Start, state: StageState::Done, at_ms: 50 }, 21_000), None);
    }
}
