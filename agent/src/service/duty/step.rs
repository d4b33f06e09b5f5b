//! What each event makes of the way to another release.

use super::{Action, Duty, Grant, Health, Millis, Target, Trouble, Wanted, Way, millis};
use crate::error::FailureClass;
use crate::retry::{self, Next};
use kiln_protocol::{Failure, Stage, StageState};
use std::time::Duration;

/// Longest pause between tries of a release in a running system, and the pause after its tries are used up: it may be
/// mended on the server at any time.
const REST: Duration = Duration::from_secs(60);
/// After it was drained in vain: its work was interrupted for nothing, and is not to be again at once.
const STUCK: Duration = Duration::from_secs(15 * 60);

impl Duty {
    /// What changes is a stage, and news.
    pub(super) fn checked(&mut self, health: Health, out: &mut Vec<Action>) {
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
    pub(super) fn answered(&mut self, wanted: Option<Wanted>, out: &mut Vec<Action>) -> Way {
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

    pub(super) fn set_out(&mut self, target: Target, out: &mut Vec<Action>) -> Way {
        out.push(Action::Record(Stage::Prefetch, StageState::Started));
        out.push(Action::Fetch(target.clone()));
        self.news = true;
        Way::Fetches { target, failed: 0 }
    }

    pub(super) fn fetched(&mut self, note: Option<&str>, out: &mut Vec<Action>) {
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

    pub(super) fn may_go(&mut self, out: &mut Vec<Action>) {
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
    pub(super) fn drained(&mut self, trouble: Option<&Trouble>, now: Millis, jitter: u8, out: &mut Vec<Action>) {
        self.way = match (std::mem::take(&mut self.way), trouble) {
            (Way::Drains { target, .. }, None) => {
                out.push(Action::Record(Stage::Drain, StageState::Done));
                out.push(Action::Load);
                Way::Leaves { target }
            }
            (Way::Drains { target, failed }, Some(trouble)) => {
                let way = self.tries_to_go_again(target, failed, trouble, now, jitter, out);
                out.push(Action::Undrain);
                way
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

    pub(super) fn failed(&mut self, trouble: &Trouble, now: Millis, jitter: u8, out: &mut Vec<Action>) {
        self.way = match std::mem::take(&mut self.way) {
            Way::Fetches { target, failed } => {
                let failed = if trouble.moved { 1 } else { failed.saturating_add(1) };
                let (pause, gave_up) = pause(trouble.class, failed, jitter);
                out.push(failure(trouble, failed, Some(pause)));
                self.news = true;
                Way::Rests { target, failed, until: now + millis(pause), gave_up }
            }
            Way::Asks { target, failed } => self.tries_to_go_again(target, failed, trouble, now, jitter, out),
            way @ (Way::Stays
            | Way::Rests { .. }
            | Way::Ready { .. }
            | Way::Drains { .. }
            | Way::Leaves { .. }
            | Way::Gone) => way,
        };
    }

    /// It may go, and could not: it does its work until the next try.
    fn tries_to_go_again(
        &mut self,
        target: Target,
        failed: u32,
        trouble: &Trouble,
        now: Millis,
        jitter: u8,
        out: &mut Vec<Action>,
    ) -> Way {
        let failed = failed.saturating_add(1);
        let (pause, _) = pause(trouble.class, failed, jitter);
        out.push(failure(trouble, failed, Some(pause)));
        self.news = true;
        Way::Ready { target, grant: Some(Grant::Go), failed, until: now + millis(pause) }
    }

    pub(super) fn loaded(&mut self, trouble: Option<Trouble>, out: &mut Vec<Action>) {
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

    /// Leaving would lead elsewhere: it stays, does its work, and begins anew after a while.
    pub(super) fn stuck(&mut self, trouble: &Trouble, now: Millis, out: &mut Vec<Action>) {
        self.way = match std::mem::take(&mut self.way) {
            Way::Leaves { target } => {
                out.push(failure(trouble, 1, Some(STUCK)));
                out.push(Action::Undrain);
                out.push(Action::Discard);
                self.news = true;
                Way::Rests { target, failed: 0, until: now + millis(STUCK), gave_up: true }
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
    pub(super) fn take_up(&mut self, now: Millis, out: &mut Vec<Action>) {
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

pub(super) fn waiting(stage: Stage, reason: &str) -> Action {
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
