//! What the service decides, without doing any of it: when to report and for how long to let itself be held, whether to
//! fetch another release, when to go. `event(self, event, now, jitter) → (self, actions)`, every event listed in every
//! state; docs/state-machines.md has the table.
//!
//! Nothing here is trusted: an [`Answer`] is what a reply *claims*. Whoever performs [`Action::Fetch`] and
//! [`Action::AskWhetherToGo`] verifies the claim before anything of it is done, and reports back what came of it.

mod post;
mod step;
#[cfg(test)]
mod tests;
mod words;

pub use words::{Action, Answer, Event, Target, Trouble, Wanted};

use kiln_protocol::{Grant, Health, Prefetch, ReleaseId};
use std::time::Duration;

/// Milliseconds of a clock that only goes forward.
pub type Millis = u64;

/// Least pause between reports, whatever is news: a server that answers holds at once, or with ever other assignments,
/// must not be asked without pause.
const BREATH_MS: Millis = 200;
/// Words that are remembered as said.
const MOST_SAID: usize = 16;
/// What a server may ask for as the pause between reports.
const PAUSES_MS: std::ops::RangeInclusive<Millis> = BREATH_MS..=300_000;

/// What is being done about another release.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Way {
    /// None is assigned.
    #[default]
    Stays,
    /// It is being fetched; so many tries have failed.
    Fetches { target: Target, failed: u32 },
    /// A try failed; the next is at `until`. With `gave_up` the server is told that nothing is being fetched.
    Rests { target: Target, failed: u32, until: Millis, gave_up: bool },
    /// Fetched and verified. The server's last answer was *go*, or *hold* with this reason. After failed questions
    /// whether to go, not before `until`.
    Ready { target: Target, grant: Option<Grant>, failed: u32, until: Millis },
    /// It may go, the server says; that is being verified.
    Asks { target: Target, failed: u32 },
    /// It may go, that is verified; its work is brought to an end.
    Drains { target: Target, failed: u32 },
    /// The disk's loader is told, and the next kernel loaded: no answer changes that any more.
    Leaves { target: Target },
    /// Nothing is decided any more.
    Gone,
}

/// The report under way, or when the next is due.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Post {
    Due(Millis),
    Posted,
    Held,
}

/// The service's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Duty {
    health: Option<Health>,
    way: Way,
    post: Post,
    /// When the last report was posted.
    posted_at: Millis,
    /// The server is willing to hold a report.
    may_wait: bool,
    /// Reports in a row that were not answered.
    unanswered: u32,
    /// Something the server should hear at once.
    news: bool,
    /// It was healthy in this start of the service, and its undrain hooks were run.
    up: bool,
    /// Words to the console since the last answer: where several servers are silent, each is told of once.
    said: Vec<String>,
}

impl Duty {
    /// At the service's start: the first report is due.
    pub fn new() -> Self {
        let post = Post::Due(0);
        Self {
            health: None,
            way: Way::Stays,
            post,
            posted_at: 0,
            may_wait: false,
            unanswered: 0,
            news: false,
            up: false,
            said: Vec::new(),
        }
    }

    /// For the report.
    pub fn health(&self) -> Option<&Health> {
        self.health.as_ref()
    }

    /// For the report; none while nothing is fetched, also between the tries of a release that was given up.
    pub fn prefetch(&self) -> Option<Prefetch> {
        let (target, ready) = match &self.way {
            Way::Fetches { target, .. } | Way::Rests { target, gave_up: false, .. } => (target, false),
            Way::Ready { target, .. }
            | Way::Asks { target, .. }
            | Way::Drains { target, .. }
            | Way::Leaves { target } => (target, true),
            Way::Stays | Way::Rests { gave_up: true, .. } | Way::Gone => return None,
        };
        let ReleaseId { image, release } = target.release.clone();
        Some(Prefetch { image, release, sequence: target.sequence, ready, progress: None })
    }

    /// When [`Event::Time`] is to come at the latest.
    pub fn wakes(&self) -> Option<Millis> {
        let news = self.news.then_some(self.posted_at + BREATH_MS);
        let report = match self.post {
            Post::Due(at) => Some(news.map_or(at, |news| news.min(at))),
            Post::Held => news,
            Post::Posted => None,
        };
        let way = match &self.way {
            Way::Rests { until, .. } | Way::Ready { grant: Some(Grant::Go), until, .. } => Some(*until),
            Way::Ready { grant: Some(Grant::Hold { .. }) | None, .. }
            | Way::Stays
            | Way::Fetches { .. }
            | Way::Asks { .. }
            | Way::Drains { .. }
            | Way::Leaves { .. }
            | Way::Gone => None,
        };
        report.into_iter().chain(way).min()
    }

    /// One step; `jitter` is any random byte.
    pub fn event(mut self, event: Event, now: Millis, jitter: u8) -> (Self, Vec<Action>) {
        let mut out = Vec::new();
        match event {
            Event::Checked(health) => self.checked(health, &mut out),
            Event::Answered(answer) => {
                self.way = self.answered(answer.wanted, &mut out);
                (self.may_wait, self.unanswered) = (answer.may_wait, 0);
                self.said.clear();
                let again = answer.again_ms.clamp(*PAUSES_MS.start(), *PAUSES_MS.end());
                let pause = if self.hold_s() > 0 { BREATH_MS } else { jittered(again, jitter) };
                self.post = Post::Due(now + pause);
            }
            Event::Unanswered(words) => {
                self.unanswered += 1;
                if let Way::Ready { grant, .. } = &mut self.way {
                    // It may be taken back by now, and nobody could tell.
                    *grant = None;
                }
                if !self.said.contains(&words) {
                    out.push(Action::Say(words.clone()));
                    if self.said.len() == MOST_SAID {
                        self.said.remove(0);
                    }
                    self.said.push(words);
                }
                self.post = Post::Due(now + jittered(1000 << self.unanswered.min(6), jitter));
            }
            Event::Fetched(note) => self.fetched(note.as_deref(), &mut out),
            Event::MayGo => self.may_go(&mut out),
            Event::Drained(trouble) => self.drained(trouble.as_ref(), now, jitter, &mut out),
            Event::News => self.news = true,
            Event::Failed(trouble) => self.failed(&trouble, now, jitter, &mut out),
            Event::Loaded(trouble) => self.loaded(trouble, &mut out),
            Event::Stuck(trouble) => self.stuck(&trouble, now, &mut out),
            Event::Time => {}
        }
        self.take_up(now, &mut out);
        self.post(now, &mut out);
        (self, out)
    }

    fn is_healthy(&self) -> bool {
        self.health.as_ref().is_some_and(|h| h.healthy)
    }
}

fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// 80 to 120 % of it.
fn jittered(pause: Millis, jitter: u8) -> Millis {
    pause * (80 + u64::from(jitter) * 40 / 255) / 100
}
