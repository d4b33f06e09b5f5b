//! What happened on a machine, kept until the server has it: the agent numbers events and keeps them in a bounded spool,
//! the server takes each number once. Whatever is lost between the two, a report or its reply, is said again and taken
//! once, in order; what the spool had no room for is counted.
//!
//! Numbers are consecutive within one spool, which has a name of its own. Whoever cannot be sure which number was given
//! last begins another: a machine that lost its spool with its memory, and one that goes on with what its disk kept, because
//! the disk is always a little behind.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

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
    /// The spool that numbered it, where that was one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    of: Option<String>,
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
    /// `health`, `drift`, `hook`, `limit`, `boot-files`, `fall-back`, …
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
    /// Spools before this one, of which something is kept, and how far they were confirmed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    before: BTreeMap<String, u64>,
    /// The spool in the report under way, and the highest number in it.
    #[serde(skip)]
    sent: Option<(Option<String>, u64)>,
}

impl Spool {
    /// An empty one; the name must be new.
    pub fn new(id: String) -> Self {
        Self { id, last: 0, confirmed: 0, kept: VecDeque::new(), before: BTreeMap::new(), sent: None }
    }

    /// Goes on under a new name with what an older state of a spool kept: numbers that it gave since are not known. What
    /// it kept is said first, under its own name and numbers, so that the server still knows what it has taken.
    #[must_use]
    pub fn taken_up(mut self, id: String) -> Self {
        let old = std::mem::replace(&mut self.id, id);
        for kept in &mut self.kept {
            kept.of.get_or_insert_with(|| old.clone());
        }
        self.before.insert(old, self.confirmed);
        (self.last, self.confirmed, self.sent) = (0, 0, None);
        self.forget_the_empty();
        self
    }

    fn forget_the_empty(&mut self) {
        let kept = &self.kept;
        self.before.retain(|id, _| kept.iter().any(|event| event.of.as_ref() == Some(id)));
    }

    /// Takes an event in.
    pub fn note(&mut self, clocks: &Clocks, kind: &str, alarm: bool, text: &str) {
        self.last += 1;
        if self.kept.len() >= SPOOL_LIMIT {
            // The oldest, but not the last one of its spool: by that one the server counts what is missing.
            let followed = |at: &usize| self.kept.get(at + 1).is_some_and(|next| next.of == self.kept[*at].of);
            let oldest = (0..self.kept.len()).find(followed).unwrap_or(0);
            self.kept.remove(oldest);
            self.forget_the_empty();
        }
        let mut end = text.len().min(SPOOL_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.kept.push_back(Kept {
            number: self.last,
            of: None,
            boot_id: clocks.boot_id.clone(),
            mono_ms: clocks.mono_ms,
            unix_ms: clocks.unix_ms,
            kind: kind.to_owned(),
            alarm,
            text: text[..end].to_owned(),
        });
    }

    /// For a report: the oldest that are not confirmed, of one spool.
    pub fn report(&mut self, clocks: &Clocks) -> SpoolReport {
        let of = self.kept.front().and_then(|first| first.of.clone());
        let same = self.kept.iter().take_while(|kept| kept.of == of);
        let events: Vec<Noted> = same.take(SPOOL_BATCH).map(|kept| kept.noted(clocks)).collect();
        self.sent = events.last().map(|event| (of.clone(), event.number));
        let (id, confirmed) = match of {
            Some(id) => {
                let confirmed = self.before.get(&id).copied().unwrap_or(0);
                (id, confirmed)
            }
            None => (self.id.clone(), self.confirmed),
        };
        SpoolReport { id, confirmed, events }
    }

    /// The report under way was answered. Whether something was confirmed.
    pub fn answered(&mut self) -> bool {
        let Some((of, number)) = self.sent.take() else { return false };
        let before = self.kept.len();
        self.kept.retain(|kept| kept.of != of || kept.number > number);
        let confirmed = match &of {
            Some(id) => self.before.get_mut(id),
            None => Some(&mut self.confirmed),
        };
        if let Some(confirmed) = confirmed {
            *confirmed = (*confirmed).max(number);
        }
        self.forget_the_empty();
        self.kept.len() != before
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// So many wait; at most [`SPOOL_LIMIT`].
    pub fn len(&self) -> usize {
        self.kept.len()
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

/// Spools of one machine whose numbers the server remembers: one whose disk takes nothing more comes back with the same old
/// one after each restart.
const INTAKE_SPOOLS: usize = 16;

/// The server's side: the newest spool and how far it was taken, and those before it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intake {
    id: String,
    last: u64,
    /// The newest first.
    #[serde(default, skip_serializing_if = "VecDeque::is_empty")]
    before: VecDeque<(String, u64)>,
}

impl Intake {
    /// What of a report is new, in order, and how many events were dropped before it for want of room.
    pub fn take(&mut self, report: &SpoolReport) -> (u64, Vec<Noted>) {
        // Cut before it is compared: a name longer than what is kept would be new each time, and all its events with it.
        let id: String = report.id.chars().filter(|c| !c.is_control()).take(64).collect();
        if self.id != id {
            let known = self.before.iter().position(|(before, _)| *before == id);
            // A spool that is new here, not to the agent: what it knows to be taken was.
            let (id, last) = known.and_then(|at| self.before.remove(at)).unwrap_or((id, 0));
            let (old, taken) = (std::mem::replace(&mut self.id, id), std::mem::replace(&mut self.last, last));
            if !old.is_empty() {
                self.before.push_front((old, taken));
                self.before.truncate(INTAKE_SPOOLS - 1);
            }
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
