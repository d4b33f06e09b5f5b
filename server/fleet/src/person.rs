//! What a person's word ends: what holds a machine, and its service.

use crate::event::Action;
use crate::machine::Machine;
use crate::state::StateKind;
use crate::step::{save, wake};
use crate::{BOOT_DEADLINE_MS, LIVE_MS, Millis};
use kiln_protocol::{Stage, StageState};

/// Kind of the failure of an agent that cannot read what its machine remembers.
const UNREADABLE: &str = "machine-format";

impl Machine {
    /// A person dealt with what held it.
    pub(crate) fn clear(&mut self, now: Millis, out: &mut Vec<Action>) {
        let keeps = self.keeps_its_own();
        self.refused.clear();
        self.fell_back = None;
        self.drift.forgive();
        self.forget_starts();
        if self.cannot_read_its_memory()
            && let Some(a) = self.assigned.as_mut().filter(|a| a.order.is_none())
        {
            // By an assignment that is newer than the one it has heard of, it knows that a person has looked.
            a.sequence += 1;
            out.push(Action::Sign);
        }
        if let Some(stranger) = self.stranger.take().filter(|_| self.pinned.is_none()) {
            if let Some(why) = keeps {
                let (short, title) = (&stranger.as_str()[..12], self.title());
                let text = format!("cleared; the other key ({short}…) is not {title}'s now: {why}");
                out.push(Action::Say { warn: true, text });
                self.stranger = Some(stranger);
            } else {
                // A person says that the other key is the machine's now.
                self.key = Some(stranger);
                self.previous_key = None;
            }
        }
        save(out);
        wake(out);
        match self.state.kind {
            StateKind::Quarantined => {
                if self.keeps_a_key() {
                    // Both had this one: whoever comes with another is no claimant. In which boot the true one is, it says.
                    self.any_boot = true;
                } else {
                    // Whichever key reports next is the machine's: the person has looked.
                    self.key = None;
                    self.previous_key = None;
                }
                self.boots.iter_mut().for_each(|boot| boot.late = 0);
                self.past.forgive();
                if self.assigned.is_some() {
                    let reason = "cleared; waits for its next report";
                    self.enter(StateKind::Approved, reason, Some(now + LIVE_MS), now);
                } else {
                    self.state = Self::discovered(self.id.clone(), now).state;
                }
            }
            StateKind::FellBack => {
                self.enter(StateKind::Booting, "cleared", Some(now + BOOT_DEADLINE_MS), now);
                self.settle(false, now);
            }
            StateKind::Discovered
            | StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::Retired => {}
        }
    }

    /// Why a clear does not make the other key that reports under its id its own; none: it does. One clear ends one thing: who
    /// is told to clear a machine for something else has not looked at keys, and anybody can report under an id.
    pub fn keeps_its_own(&self) -> Option<&'static str> {
        if self.position.is_some() {
            Some("the machine is known by its position; `kiln machine retire` ends that")
        } else if !self.stranger_last {
            Some(
                "the machine's own key spoke after it, or neither since this server started; if the key is the machine's \
                 new one, clear it again after its next report",
            )
        } else if self.key_revoked {
            // Its own can end nothing any more.
            None
        } else if self.state.kind == StateKind::Quarantined
            || self.fell_back.is_some()
            || !self.refused.is_empty()
            || self.rests().is_some()
            || self.drift.is_held()
        {
            Some("this ended something else; if the key is the machine's new one, clear it once more")
        } else if self.cannot_read_its_memory() && self.state.kind != StateKind::Unreachable {
            Some(
                "it could not read what it remembers, and this ended that; once it can, or is unreachable, another clear \
                 takes the key",
            )
        } else {
            None
        }
    }

    /// Its agent starts nothing, as it cannot read what it remembers.
    fn cannot_read_its_memory(&self) -> bool {
        self.last_boot().is_some_and(|boot| {
            boot.stages.iter().any(|s| match &s.state {
                StageState::Failed(f) => s.stage == Stage::Start && f.kind == UNREADABLE,
                StageState::Started | StageState::Done | StageState::Waiting { .. } => false,
            })
        })
    }

    /// It is out of service.
    pub(crate) fn retire(&mut self, reason: &str, now: Millis, out: &mut Vec<Action>) {
        self.former_name = self.name.take().or(self.former_name.take());
        self.granted = None;
        self.excused = None;
        self.position = None;
        self.enter(StateKind::Retired, reason, None, now);
        wake(out);
        save(out);
    }
}
