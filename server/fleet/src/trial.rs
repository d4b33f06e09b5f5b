//! Giving a trial up: after its boots were counted out, or when it is up and does not become healthy.

use crate::event::Action;
use crate::machine::{Assigned, Machine, Refused};
use crate::state::StateKind;
use crate::step::{save, wake};
use crate::{BOOT_DEADLINE_MS, Millis};
use kiln_protocol::ReleaseId;
use kiln_protocol::slot::{Fallback, FallbackReason};

impl Machine {
    /// The trial is over; `failed` says why, behind its name. With a release to go back to, that one is assigned and
    /// the pair quarantined.
    pub(crate) fn fall_back(&mut self, failed: &str, now: Millis, out: &mut Vec<Action>) {
        let Some(trial) = self.assigned.clone() else { return };
        let Some(back) = self.way_back().cloned() else {
            // Nothing to go back to: it may try on, and the reason says so. Its words are the person's clue.
            self.last_words = format!(
                "{} {failed} and there is no earlier good release: assign another with `kiln assign {} NAME/N`",
                trial.release,
                self.title()
            );
            return;
        };
        let why = if self.last_words.is_empty() { String::new() } else { format!(" ({})", self.last_words) };
        let reason = format!("{} {failed}{why}: back on {back}", trial.release);
        self.refused.push(Refused { release: trial.release.clone(), reason: reason.clone() });
        self.assigned = Some(Assigned::cold(back, trial.sequence + 1));
        self.rebuilding = None;
        if trial.order.is_some() {
            self.order_failed(&reason);
        }
        self.attempts = 0;
        self.carried = None;
        self.forget_starts();
        self.granted = None;
        self.prefetch = None;
        self.health = None;
        self.fell_back = Some(reason.clone());
        match self.state.kind {
            StateKind::Discovered | StateKind::Quarantined | StateKind::Retired => {}
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack => {
                self.enter(StateKind::FellBack, reason, Some(now + BOOT_DEADLINE_MS), now);
            }
        }
        out.push(Action::Sign);
        save(out);
    }

    /// The machine's own boot loader, or its disk, gave the assigned release up, and it came back on another: that one is
    /// good by its word. What it says of an earlier assignment is known.
    pub(crate) fn told_fallback(&mut self, fallback: &Fallback, now: Millis, out: &mut Vec<Action>) {
        let assigned = self.assigned.as_ref();
        let current = assigned.is_some_and(|a| a.release == fallback.release && a.sequence == fallback.sequence);
        let Some(here) = self.embedded.as_ref().filter(|_| current && !self.runs_assigned()) else { return };
        let back = ReleaseId { image: here.image.clone(), release: here.release };
        if self.is_refused(&back) {
            return;
        }
        self.good.retain(|good| *good != back);
        self.good.push(back);
        self.last_words.clear();
        let failed = match fallback.reason {
            FallbackReason::TriesUsedUp => "was started as often as it may be and never became healthy",
            FallbackReason::RootSpoilt => "is not on the disk as it was written",
            FallbackReason::BootLoop => "was good, and was started again and again without becoming healthy",
        };
        self.fall_back(&format!("{failed} ({})", fallback.reason), now, out);
        wake(out);
    }

    /// When a trial that is up, and whose agent speaks, has had its time. None without a release to go back to: it then
    /// stays as it is, and says so.
    pub(crate) fn given_up_at(&self) -> Option<Millis> {
        let on_its_way = match self.state.kind {
            StateKind::Booting | StateKind::Reimaging | StateKind::Degraded => true,
            StateKind::Discovered
            | StateKind::Approved
            | StateKind::Healthy
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::FellBack
            | StateKind::Quarantined
            | StateKind::Retired => false,
        };
        let speaks = self.agent_seen.is_some();
        self.healthy_by.filter(|_| on_its_way && speaks && self.is_on_trial() && self.last_good().is_some())
    }

    /// It runs, or boots, a release that was never healthy here.
    fn is_on_trial(&self) -> bool {
        self.is_trial() && self.runs_assigned() && !self.is_carried()
    }

    /// What a person can do for a trial that has had its time and has nothing to go back to.
    pub(crate) fn no_way_back(&self, now: Millis) -> String {
        let over = self.healthy_by.is_some_and(|by| now >= by);
        if over && self.is_on_trial() && self.last_good().is_none() {
            let title = self.title();
            format!(
                "; there is no earlier good release to go back to: assign another with `kiln assign {title} NAME/N`"
            )
        } else {
            String::new()
        }
    }
}
