//! What a running machine says besides its health: drift, draining, and what happened while nobody listened. Each event
//! is taken once, whatever reports and replies were lost.

use crate::event::Action;
use crate::machine::Machine;
use crate::state::StateKind;
use crate::{DRAIN_DEADLINE_MS, Millis};
use kiln_protocol::{Condition, DRIFT_LIMIT, Difference, Draining, Intake, Report, Stale};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Events kept of a machine.
pub const EVENTS_KEPT: usize = 32;
/// Longest that a machine may drain by its own word.
const LONGEST_DRAIN_MS: Millis = 2 * 3_600_000;

/// Something that happened on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventAt {
    /// When, on the server's clock.
    pub at: Millis,
    /// `health`, `drift`, `hook`, `limit`, `threshold`, `dropped`; the server's own: `expected`, `stale`.
    pub kind: String,
    /// It needs a person's eye.
    pub alarm: bool,
    /// In a sentence.
    pub text: String,
}

/// What is known of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownCondition {
    /// In what it differs from its release, as far as it named it.
    #[serde(default)]
    pub drift: Vec<Difference>,
    /// How many differences there are.
    #[serde(default)]
    pub drift_count: u32,
    /// Its drain hooks run.
    #[serde(default)]
    pub draining: Option<Draining>,
    /// The newest events, oldest first.
    #[serde(default)]
    pub events: VecDeque<EventAt>,
    /// Of a machine in disk mode: under which assignment its disk was last verified whole, and since when that is so.
    #[serde(default)]
    pub(crate) put_up: Option<(u64, Millis)>,
    /// Its metadata has expired, by its own word.
    #[serde(default)]
    pub stale: Option<Stale>,
    #[serde(default)]
    intake: Intake,
}

impl KnownCondition {
    /// A boot begins: what was seen in the one before is over, what happened stays.
    pub(crate) fn begin(&mut self) {
        (self.drift, self.drift_count, self.draining) = (Vec::new(), 0, None);
    }

    pub(crate) fn keep(&mut self, event: EventAt, out: &mut Vec<Action>) {
        out.push(Action::Say { warn: event.alarm, text: format!("{}: {}", event.kind, event.text) });
        self.events.push_back(event);
        while self.events.len() > EVENTS_KEPT {
            self.events.pop_front();
        }
    }
}

fn plain(text: &str) -> String {
    crate::boots::cut(&text.chars().filter(|c| !c.is_control()).collect::<String>())
}

impl Machine {
    /// Takes over what a report says. Whether anything worth keeping is new.
    pub(crate) fn note_condition(&mut self, said: Option<&Condition>, now: Millis, out: &mut Vec<Action>) -> bool {
        let known = &mut self.condition;
        let Some(said) = said else { return false };
        let clean = |d: &Difference| Difference { kind: d.kind, what: plain(&d.what), text: plain(&d.text) };
        let drift: Vec<Difference> = said.drift.iter().take(DRIFT_LIMIT).map(clean).collect();
        let mut new = known.drift != drift || known.drift_count != said.drift_count;
        (known.drift, known.drift_count) = (drift, said.drift_count);
        let hook = |d: &Option<Draining>| d.as_ref().map(|d| (d.number, d.of));
        new |= hook(&known.draining) != hook(&said.draining);
        known.draining = said.draining.clone().map(|d| Draining { hook: plain(&d.hook), ..d });
        if known.put_up.map(|(sequence, _)| sequence) != said.put_up {
            // Never heard before: it counts from this boot on, like memory.
            let first = known.put_up.is_none();
            let since = self.boots.back().filter(|_| first).map_or(now, |boot| boot.started);
            known.put_up = said.put_up.map(|sequence| (sequence, since));
            new = true;
        }
        let (missed, taken) = known.intake.take(&said.spool);
        new |= missed > 0 || !taken.is_empty();
        if missed > 0 {
            let text = format!("{missed} events were dropped on the machine: its spool was full");
            known.keep(EventAt { at: now, kind: "dropped".into(), alarm: true, text }, out);
        }
        for event in taken {
            let (kind, text) = (plain(&event.kind), plain(&event.text));
            let at = now.saturating_sub(event.age_ms);
            known.keep(EventAt { at, kind, alarm: event.alarm, text }, out);
        }
        self.note_drift(now);
        new
    }

    /// Takes over whether its metadata is stale. A boot that has verified nothing yet says nothing of it: what was known stays.
    /// Whether that is news.
    pub(crate) fn note_stale(&mut self, report: &Report, now: Millis, out: &mut Vec<Action>) -> bool {
        let known = &mut self.condition;
        let stale = report.stale.as_ref().map(|s| Stale { file: plain(&s.file), expires: s.expires });
        if known.stale == stale || (stale.is_none() && report.running.is_none()) {
            return false;
        }
        if let Some(stale) = &stale {
            let event = EventAt { at: now, kind: "stale".into(), alarm: true, text: stale.words() };
            known.keep(event, out);
        }
        known.stale = stale;
        true
    }

    /// A machine whose hooks run has as long as they have.
    pub(crate) fn prolong_drain(&mut self, now: Millis) {
        if let (StateKind::Draining, Some(draining)) = (self.state.kind, &self.condition.draining) {
            let most = self.state.since + LONGEST_DRAIN_MS;
            let asked = now + draining.left_ms.min(LONGEST_DRAIN_MS) + DRAIN_DEADLINE_MS / 5;
            self.state.deadline = self.state.deadline.max(Some(asked.min(most)));
            let words = draining.words();
            self.state.reason = match &self.assigned {
                Some(a) => format!("may leave for {}; {words}", a.release),
                None => words,
            };
        }
    }
}
