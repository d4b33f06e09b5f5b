//! What the service decides, without doing any of it: when to report and for how long to let itself be held, whether to
//! fetch another release, when to go. `event(self, event, now, jitter) → (self, actions)`, every event listed in every
//! state; docs/state-machines.md has the table.
//!
//! Nothing here is trusted: an [`Answer`] is what a reply *claims*. Whoever performs [`Action::Fetch`] and
//! [`Action::AskWhetherToGo`] verifies the claim before anything of it is done, and reports back what came of it.

use crate::error::FailureClass;
use crate::retry::{self, Next};
use kiln_protocol::{Failure, Grant, Health, Prefetch, ReleaseId, Stage, StageState};
use std::time::Duration;

/// Milliseconds of a clock that only goes forward.
pub type Millis = u64;

/// Longest a report is held by the server, seconds.
const HOLD_S: u32 = 50;
/// The same while a release is fetched: how far it is goes with each report.
const PROGRESS_S: u32 = 5;
/// Least pause between reports, whatever is news: a server that answers holds at once, or with ever other assignments,
/// must not be asked without pause.
const BREATH_MS: Millis = 200;
/// What a server may ask for as the pause between reports.
const PAUSES_MS: std::ops::RangeInclusive<Millis> = BREATH_MS..=300_000;
/// Longest pause between tries of a release in a running system, and the pause after its tries are used up: it may be
/// mended on the server at any time.
const REST: Duration = Duration::from_secs(60);

/// Another release, as an assignment names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub release: ReleaseId,
    pub sequence: u64,
}

/// What the service claims to want of this machine, and whether it may leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub target: Target,
    pub grant: Grant,
}

/// A reply, as far as it decides what comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub again_ms: u64,
    pub may_wait: bool,
    /// None: what runs is what is assigned, or nothing is.
    pub wanted: Option<Wanted>,
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub stage: Stage,
    pub class: FailureClass,
    pub kind: String,
    pub message: String,
    /// The release came on before it failed: not one more failure in a row.
    pub moved: bool,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A round of health checks is over.
    Checked(Health),
    /// A report was answered.
    Answered(Answer),
    /// It was not, and why.
    Unanswered(String),
    /// The release that [`Action::Fetch`] named is here and verified; a note for people about how it will be gone to.
    Fetched(Option<String>),
    /// [`Action::AskWhetherToGo`]: the grant and all it rests on are verified.
    MayGo,
    /// Either of the two failed.
    Failed(Trouble),
    /// [`Action::Drain`] is through, or a hook keeps the machine.
    Drained(Option<Trouble>),
    /// Something else that the server should hear at once.
    News,
    /// [`Action::Load`] is done, or could not be.
    Loaded(Option<Trouble>),
    /// Time passed.
    Time,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Into the journal.
    Record(Stage, StageState),
    /// To the console, nowhere else.
    Say(String),
    /// Post a report that the server may hold for so many seconds.
    Report(u32),
    /// Let go of the held report.
    EndHold,
    /// Verify the newest reply's assignment, which claims this, and fetch what it names.
    Fetch(Target),
    /// Verify the newest reply anew: its grant, and that it is still this release.
    AskWhetherToGo(Target),
    /// Drop the running one of the two.
    CallOff,
    /// Drop what was fetched.
    Discard,
    /// Run the drain hooks, instead of what hooks run.
    Drain,
    /// Run the undrain hooks, instead of what hooks run.
    Undrain,
    /// Load the next kernel, for a kexec. From here there is no way back.
    Load,
    /// Go, by cold boot if the kernel could not be loaded.
    Leave { cold: bool },
}

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
    /// The next kernel is being loaded: no answer changes that any more.
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
    /// The last words to the console.
    said: String,
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
            said: String::new(),
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
                if words != self.said {
                    out.push(Action::Say(words.clone()));
                    self.said = words;
                }
                self.post = Post::Due(now + jittered(1000 << self.unanswered.min(6), jitter));
            }
            Event::Fetched(note) => self.fetched(note.as_deref(), &mut out),
            Event::MayGo => self.may_go(&mut out),
            Event::Drained(trouble) => self.drained(trouble.as_ref(), now, jitter, &mut out),
            Event::News => self.news = true,
            Event::Failed(trouble) => self.failed(&trouble, now, jitter, &mut out),
            Event::Loaded(trouble) => self.loaded(trouble, &mut out),
            Event::Time => {}
        }
        self.take_up(now, &mut out);
        self.post(now, &mut out);
        (self, out)
    }

    fn is_healthy(&self) -> bool {
        self.health.as_ref().is_some_and(|h| h.healthy)
    }

    /// What changes is a stage, and news.
    fn checked(&mut self, health: Health, out: &mut Vec<Action>) {
        match &self.way {
            // The last word was that it leaves.
            Way::Gone => return,
            Way::Stays
            | Way::Fetches { .. }
            | Way::Rests { .. }
            | Way::Ready { .. }
            | Way::Asks { .. }
            | Way::Drains { .. }
            | Way::Leaves { .. } => {}
        }
        if health.healthy && !std::mem::replace(&mut self.up, true) {
            match &self.way {
                Way::Drains { .. } | Way::Leaves { .. } | Way::Gone => {}
                Way::Stays | Way::Fetches { .. } | Way::Rests { .. } | Way::Ready { .. } | Way::Asks { .. } => {
                    out.push(Action::Undrain);
                }
            }
        }
        match (self.is_healthy(), health.healthy) {
            (false, true) => {
                out.push(Action::Record(Stage::Health, StageState::Done));
                out.push(Action::Record(Stage::Healthy, StageState::Done));
                self.news = true;
            }
            (true, false) => {
                out.push(waiting(Stage::Health, &health.detail));
                self.news = true;
            }
            (true, true) | (false, false) => {}
        }
        self.health = Some(health);
    }

    /// The way on after an answer that claims to want this.
    fn answered(&mut self, wanted: Option<Wanted>, out: &mut Vec<Action>) -> Way {
        let Some(Wanted { target: new, grant }) = wanted else {
            return match std::mem::take(&mut self.way) {
                way @ (Way::Stays | Way::Leaves { .. } | Way::Gone) => way,
                way @ (Way::Fetches { .. }
                | Way::Rests { .. }
                | Way::Ready { .. }
                | Way::Asks { .. }
                | Way::Drains { .. }) => {
                    drop_what_runs(&way, out);
                    out.push(waiting(Stage::Prefetch, "called off: no other release is assigned any more"));
                    Way::Stays
                }
            };
        };
        match std::mem::take(&mut self.way) {
            Way::Stays => self.set_out(new, out),
            way @ (Way::Fetches { .. }
            | Way::Rests { .. }
            | Way::Ready { .. }
            | Way::Asks { .. }
            | Way::Drains { .. })
                if way.target() != Some(&new) =>
            {
                drop_what_runs(&way, out);
                out.push(waiting(Stage::Prefetch, "another assignment has come"));
                self.set_out(new, out)
            }
            way @ (Way::Fetches { .. } | Way::Rests { .. } | Way::Leaves { .. } | Way::Gone) => way,
            Way::Ready { target, grant: old, failed, until } => {
                if let Grant::Hold { reason, .. } = &grant
                    && old.as_ref() != Some(&grant)
                {
                    out.push(waiting(Stage::Grant, reason));
                }
                Way::Ready { target, grant: Some(grant), failed, until }
            }
            Way::Asks { target, failed } => match &grant {
                Grant::Go => Way::Asks { target, failed },
                Grant::Hold { reason, .. } => {
                    out.push(Action::CallOff);
                    out.push(waiting(Stage::Grant, reason));
                    Way::Ready { target, grant: Some(grant), failed: 0, until: 0 }
                }
            },
            Way::Drains { target, failed } => match &grant {
                Grant::Go => Way::Drains { target, failed },
                Grant::Hold { reason, .. } => {
                    out.push(Action::Undrain);
                    out.push(waiting(Stage::Drain, "called off: it may not leave any more"));
                    out.push(waiting(Stage::Grant, reason));
                    self.news = true;
                    Way::Ready { target, grant: Some(grant), failed: 0, until: 0 }
                }
            },
        }
    }

    fn set_out(&mut self, target: Target, out: &mut Vec<Action>) -> Way {
        out.push(Action::Record(Stage::Prefetch, StageState::Started));
        out.push(Action::Fetch(target.clone()));
        self.news = true;
        Way::Fetches { target, failed: 0 }
    }

    fn fetched(&mut self, note: Option<&str>, out: &mut Vec<Action>) {
        self.way = match std::mem::take(&mut self.way) {
            Way::Fetches { target, .. } => {
                out.push(Action::Record(Stage::Prefetch, StageState::Done));
                out.extend(note.map(|note| waiting(Stage::Grant, note)));
                out.push(Action::Record(Stage::Grant, StageState::Started));
                self.news = true;
                Way::Ready { target, grant: None, failed: 0, until: 0 }
            }
            way @ (Way::Stays
            | Way::Rests { .. }
            | Way::Ready { .. }
            | Way::Asks { .. }
            | Way::Drains { .. }
            | Way::Leaves { .. }
            | Way::Gone) => way,
        };
    }

    fn may_go(&mut self, out: &mut Vec<Action>) {
        self.way = match std::mem::take(&mut self.way) {
            Way::Asks { target, failed } => {
                out.push(Action::Record(Stage::Grant, StageState::Done));
                out.push(Action::Record(Stage::Drain, StageState::Started));
                out.push(Action::Drain);
                self.news = true;
                Way::Drains { target, failed }
            }
            way @ (Way::Stays
            | Way::Fetches { .. }
            | Way::Rests { .. }
            | Way::Ready { .. }
            | Way::Drains { .. }
            | Way::Leaves { .. }
            | Way::Gone) => way,
        };
    }

    /// Its work is at an end, and it leaves; or a hook keeps it, and it works on until the next try.
    fn drained(&mut self, trouble: Option<&Trouble>, now: Millis, jitter: u8, out: &mut Vec<Action>) {
        self.way = match (std::mem::take(&mut self.way), trouble) {
            (Way::Drains { target, .. }, None) => {
                out.push(Action::Record(Stage::Drain, StageState::Done));
                out.push(Action::Load);
                Way::Leaves { target }
            }
            (Way::Drains { target, failed }, Some(trouble)) => {
                let failed = failed.saturating_add(1);
                let (pause, _) = pause(trouble.class, failed, jitter);
                out.push(failure(trouble, failed, Some(pause)));
                out.push(Action::Undrain);
                self.news = true;
                Way::Ready { target, grant: Some(Grant::Go), failed, until: now + millis(pause) }
            }
            (
                way @ (Way::Stays
                | Way::Fetches { .. }
                | Way::Rests { .. }
                | Way::Ready { .. }
                | Way::Asks { .. }
                | Way::Leaves { .. }
                | Way::Gone),
                None | Some(_),
            ) => way,
        };
    }

    fn failed(&mut self, trouble: &Trouble, now: Millis, jitter: u8, out: &mut Vec<Action>) {
        self.way = match std::mem::take(&mut self.way) {
            Way::Fetches { target, failed } => {
                let failed = if trouble.moved { 1 } else { failed.saturating_add(1) };
                let (pause, gave_up) = pause(trouble.class, failed, jitter);
                out.push(failure(trouble, failed, Some(pause)));
                self.news = true;
                Way::Rests { target, failed, until: now + millis(pause), gave_up }
            }
            Way::Asks { target, failed } => {
                let failed = failed.saturating_add(1);
                let (pause, _) = pause(trouble.class, failed, jitter);
                out.push(failure(trouble, failed, Some(pause)));
                self.news = true;
                Way::Ready { target, grant: Some(Grant::Go), failed, until: now + millis(pause) }
            }
            way @ (Way::Stays
            | Way::Rests { .. }
            | Way::Ready { .. }
            | Way::Drains { .. }
            | Way::Leaves { .. }
            | Way::Gone) => way,
        };
    }

    fn loaded(&mut self, trouble: Option<Trouble>, out: &mut Vec<Action>) {
        self.way = match std::mem::take(&mut self.way) {
            Way::Leaves { target } => {
                // The verified release can still be reached through the firmware: that needs nothing from this kernel.
                let cold = trouble.is_some();
                out.extend(trouble.map(|t| failure(&t, 1, None)));
                out.push(Action::Record(Stage::Going, StageState::Started));
                out.push(Action::Leave { cold });
                self.health = Some(Health { healthy: false, detail: format!("leaving for {}", target.release) });
                Way::Gone
            }
            way @ (Way::Stays
            | Way::Fetches { .. }
            | Way::Rests { .. }
            | Way::Ready { .. }
            | Way::Asks { .. }
            | Way::Drains { .. }
            | Way::Gone) => way,
        };
    }

    /// What has waited for its time.
    fn take_up(&mut self, now: Millis, out: &mut Vec<Action>) {
        self.way = match std::mem::take(&mut self.way) {
            Way::Rests { target, failed, until, .. } if until <= now => {
                out.push(Action::Fetch(target.clone()));
                Way::Fetches { target, failed }
            }
            Way::Ready { target, grant: Some(Grant::Go), failed, until } if until <= now => {
                out.push(Action::AskWhetherToGo(target.clone()));
                Way::Asks { target, failed }
            }
            way @ (Way::Stays
            | Way::Fetches { .. }
            | Way::Rests { .. }
            | Way::Ready { .. }
            | Way::Asks { .. }
            | Way::Drains { .. }
            | Way::Leaves { .. }
            | Way::Gone) => way,
        };
    }

    /// The report, if it is due. While health may still change, reports are short; a healthy machine lets itself be
    /// held, and breaks the hold when there is news.
    fn post(&mut self, now: Millis, out: &mut Vec<Action>) {
        let news = self.news && self.posted_at + BREATH_MS <= now;
        let due = match (&self.post, &self.way) {
            (Post::Due(_) | Post::Posted | Post::Held, Way::Gone) | (Post::Posted, _) => false,
            (Post::Due(at), _) => news || *at <= now,
            (Post::Held, _) => news,
        };
        if !due {
            return;
        }
        if self.post == Post::Held {
            out.push(Action::EndHold);
        }
        let hold = self.hold_s();
        (self.news, self.posted_at) = (false, now);
        self.post = if hold > 0 { Post::Held } else { Post::Posted };
        out.push(Action::Report(hold));
    }

    fn hold_s(&self) -> u32 {
        if !self.is_healthy() || !self.may_wait {
            return 0;
        }
        match self.way {
            Way::Stays | Way::Rests { .. } | Way::Ready { .. } => HOLD_S,
            Way::Fetches { .. } | Way::Asks { .. } | Way::Drains { .. } | Way::Leaves { .. } | Way::Gone => PROGRESS_S,
        }
    }
}

impl Way {
    fn target(&self) -> Option<&Target> {
        match self {
            Self::Stays | Self::Gone => None,
            Self::Fetches { target, .. }
            | Self::Rests { target, .. }
            | Self::Ready { target, .. }
            | Self::Asks { target, .. }
            | Self::Drains { target, .. }
            | Self::Leaves { target } => Some(target),
        }
    }
}

fn drop_what_runs(way: &Way, out: &mut Vec<Action>) {
    match way {
        Way::Fetches { .. } | Way::Asks { .. } => out.push(Action::CallOff),
        Way::Drains { .. } => {
            out.push(Action::Undrain);
            out.push(waiting(Stage::Drain, "called off"));
        }
        Way::Stays | Way::Rests { .. } | Way::Ready { .. } | Way::Leaves { .. } | Way::Gone => {}
    }
    out.push(Action::Discard);
}

fn waiting(stage: Stage, reason: &str) -> Action {
    Action::Record(stage, StageState::Waiting { reason: reason.to_owned() })
}

fn failure(trouble: &Trouble, attempt: u32, retry_in: Option<Duration>) -> Action {
    let (kind, message, retry_in_ms) = (trouble.kind.clone(), trouble.message.clone(), retry_in.map(millis));
    Action::Record(trouble.stage, StageState::Failed(Failure { kind, message, attempt, retry_in_ms }))
}

/// The pause before the next try, and whether the tries of this round are used up.
fn pause(class: FailureClass, failed: u32, jitter: u8) -> (Duration, bool) {
    match retry::next(class, failed, jitter) {
        Next::After(pause) => (pause.min(REST), false),
        Next::GiveUp => (REST, true),
    }
}

fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// 80 to 120 % of it.
fn jittered(pause: Millis, jitter: u8) -> Millis {
    pause * (80 + u64::from(jitter) * 40 / 255) / 100
}

#[cfg(test)]
mod tests;
