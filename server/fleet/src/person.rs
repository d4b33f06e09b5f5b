//! What a person's word may do, and what it ends: what holds a machine, and its service.

use crate::error::Refusal;
use crate::event::Action;
use crate::machine::Machine;
use crate::state::StateKind;
use crate::step::{save, wake};
use crate::{BOOT_DEADLINE_MS, LIVE_MS, Millis};
use kiln_protocol::{ReleaseId, Stage, StageState};

/// Kind of the failure of an agent that cannot read what its machine remembers.
const UNREADABLE: &str = "machine-format";

impl Machine {
    /// May a person assign this release?
    pub fn check_assign(&self, release: &ReleaseId) -> Result<(), Refusal> {
        let machine = self.title().to_owned();
        match self.state.kind {
            StateKind::Discovered => return Err(Refusal::NotApproved { machine }),
            StateKind::Retired => return Err(Refusal::Retired { machine }),
            StateKind::Quarantined => {
                return Err(Refusal::Held { machine, state: self.state.kind, reason: self.state.reason.clone() });
            }
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack => {}
        }
        match self.refused.iter().find(|r| r.release == *release) {
            Some(r) => Err(Refusal::PairQuarantined { machine, release: release.clone(), reason: r.reason.clone() }),
            None => Ok(()),
        }
    }

    /// May a person excuse it?
    pub fn check_excuse(&self) -> Result<(), Refusal> {
        let machine = self.title().to_owned();
        match self.state.kind {
            StateKind::Discovered => Err(Refusal::NotApproved { machine }),
            StateKind::Retired => Err(Refusal::Retired { machine }),
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack
            | StateKind::Quarantined => {
                if self.is_available() {
                    Err(Refusal::Available { machine })
                } else {
                    Ok(())
                }
            }
        }
    }

    /// A person dealt with what held it. That makes no other key its own: anybody can report under an id.
    pub(crate) fn clear(&mut self, now: Millis, out: &mut Vec<Action>) {
        if self.pinned.is_some() {
            // No word of a person takes one of these: they are said anew if they speak.
            self.strangers.clear();
        }
        if let Some(words) = self.other_keys_wait() {
            out.push(Action::Say { warn: true, text: format!("cleared; {words}") });
        }
        self.end_holds(now, out);
    }

    /// Ends whatever holds it.
    pub(crate) fn end_holds(&mut self, now: Millis, out: &mut Vec<Action>) {
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
