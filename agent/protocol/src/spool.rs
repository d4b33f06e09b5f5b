//! What happened on a machine, kept until the server has it: the agent numbers events and keeps them in a bounded spool,
//! the server takes each number once. Whatever is lost between the two, a report or its reply, is said again and taken
//! once, in order; what the spool had no room for is counted.
//!
//! Numbers are consecutive within one spool, which has a name of its own: a machine that loses its spool with its memory
//! begins another.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Events kept while no server answers; the oldest beyond it are dropped, and counted by the server.
pub const SPOOL_LIMIT: usize = 256;
/// Events in one report.
pub const SPOOL_BATCH: usize = 32;
/// Longest sentence of an event, bytes.
pub const SPOOL_TEXT: usize = 300;

/// Clocks at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clocks {
    /// The kernel's boot id.
    pub boot_id: String,
    /// Milliseconds of this boot.
    pub mono_ms: u64,
    /// Unix milliseconds by the machine's own clock.
    pub unix_ms: u64,
}

/// An event as the agent keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    number: u64,
    boot_id: String,
    mono_ms: u64,
    unix_ms: u64,
    kind: String,
    alarm: bool,
    text: String,
}

/// An event on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// Its number in the spool, from 1.
    pub number: u64,
    /// How long before the report it happened. Of an earlier boot: by the machine's own clock.
    pub age_ms: u64,
    /// `health`, `drift`, `hook`, `limit`, `fall-back`, …
    pub kind: String,
    /// It needs a person's eye.
    pub alarm: bool,
    /// What happened, in a sentence.
    pub text: String,
}

/// A spool's part of a report.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolReport {
    /// The spool's name: another one begins its numbers anew.
    pub id: String,
    /// The highest number that the agent knows to be taken.
    pub confirmed: u64,
    /// What is not, oldest first; at most [`SPOOL_BATCH`].
    pub events: Vec<Noted>,
}

/// The agent's side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spool {
    id: String,
    /// The number that was given last.
    last: u64,
    confirmed: u64,
    kept: VecDeque<Kept>,
    /// The highest number in the report under way.
    #[serde(skip)]
    sent: u64,
}

impl Spool {
    /// An empty one; the name must be new.
    pub fn new(id: String) -> Self {
        Self { id, last: 0, confirmed: 0, kept: VecDeque::new(), sent: 0 }
    }

    /// Takes an event in.
    pub fn note(&mut self, clocks: &Clocks, kind: &str, alarm: bool, text: &str) {
        self.last += 1;
        if self.kept.len() >= SPOOL_LIMIT {
            self.kept.pop_front();
        }
        let mut end = text.len().min(SPOOL_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.kept.push_back(Kept {
            number: self.last,
            boot_id: clocks.boot_id.clone(),
            mono_ms: clocks.mono_ms,
            unix_ms: clocks.unix_ms,
            kind: kind.to_owned(),
            alarm,
            text: text[..end].to_owned(),
        });
    }

    /// For a report: the oldest that are not confirmed.
    pub fn report(&mut self, clocks: &Clocks) -> SpoolReport {
        let events: Vec<Noted> = self.kept.iter().take(SPOOL_BATCH).map(|kept| kept.noted(clocks)).collect();
        self.sent = events.last().map_or(0, |event| event.number);
        SpoolReport { id: self.id.clone(), confirmed: self.confirmed, events }
    }

    /// The report under way was answered. Whether something was confirmed.
    pub fn answered(&mut self) -> bool {
        let sent = std::mem::take(&mut self.sent);
        let before = self.kept.len();
        self.kept.retain(|kept| kept.number > sent);
        self.confirmed = self.confirmed.max(sent);
        self.kept.len() != before
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

impl Kept {
    fn noted(&self, clocks: &Clocks) -> Noted {
        let age_ms = if self.boot_id == clocks.boot_id {
            clocks.mono_ms.saturating_sub(self.mono_ms)
        } else {
            clocks.unix_ms.saturating_sub(self.unix_ms)
        };
        let Self { number, kind, alarm, text, .. } = self.clone();
        Noted { number, age_ms, kind, alarm, text }
    }
}

/// The server's side: the newest spool and how far it was taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intake {
    id: String,
    last: u64,
}

impl Intake {
    /// What of a report is new, in order, and how many events were dropped before it for want of room.
    pub fn take(&mut self, report: &SpoolReport) -> (u64, Vec<Noted>) {
        if self.id != report.id {
            // A spool that is new here, not to the agent: what it knows to be taken was.
            *self = Self { id: report.id.chars().take(64).collect(), last: 0 };
        }
        self.last = self.last.max(report.confirmed);
        let mut missed = 0_u64;
        let mut taken = Vec::new();
        for event in report.events.iter().take(SPOOL_BATCH).filter(|event| event.number > 0) {
            if event.number <= self.last {
                continue;
            }
            missed = missed.saturating_add(event.number - self.last - 1);
            self.last = event.number;
            taken.push(event.clone());
        }
        (missed, taken)
    }
}
