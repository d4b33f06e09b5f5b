//! By which way a machine goes to another release. What only a kexec has started may be something that no firmware can start:
//! it stays a trial until a cold boot of it was healthy, and nothing is stacked on it by another kexec.

use crate::boots::Boot;
use crate::machine::Machine;
use kiln_protocol::{ReleaseId, Stage, StageState, Via};

impl Boot {
    /// The agent said that it goes, and that the next kernel could not be loaded: it leaves through its firmware.
    fn leaves_through_firmware(&self) -> bool {
        self.stages.iter().any(|s| match &s.state {
            // With another try it stays.
            StageState::Failed(f) => s.stage == Stage::Going && f.retry_in_ms.is_none(),
            StageState::Started | StageState::Done | StageState::Waiting { .. } => false,
        })
    }

    fn said_it_goes(&self) -> bool {
        self.stages.iter().any(|s| {
            s.stage == Stage::Going
                && match s.state {
                    StageState::Started | StageState::Done => true,
                    StageState::Failed(_) | StageState::Waiting { .. } => false,
                }
        })
    }
}

impl Machine {
    /// The newest boot that its agent spoke in.
    pub(crate) fn last_boot(&self) -> Option<&Boot> {
        self.boots.iter().rev().find(|boot| !boot.is_unclaimed())
    }

    /// Firmware has started this boot, as far as the server saw.
    pub(crate) fn came_through_firmware(&self) -> bool {
        self.last_boot().is_none_or(|boot| boot.via == Via::Cold)
    }

    /// What runs is known to start from firmware: this boot came so, or an earlier one did and was healthy. What an operator
    /// ordered need not be: it is no release to come back to.
    fn is_proven_cold(&self) -> bool {
        let Some(current) = self.current() else { return true };
        let id = ReleaseId { image: current.image.clone(), release: current.release };
        self.came_through_firmware() || self.good.contains(&id) || self.came_by_order(&id)
    }

    /// How it leaves for what it is assigned, whatever a person asked for.
    pub fn leaves_by(&self) -> Via {
        match &self.assigned {
            Some(a) if self.is_proven_cold() => self.secrets_policy.via(a.via),
            Some(_) | None => Via::Cold,
        }
    }

    /// Why it leaves by a cold boot although a kexec was asked for; empty where that is not so. To be put behind a sentence.
    pub(crate) fn why_no_kexec(&self) -> String {
        let asked = self.assigned.as_ref().is_some_and(|a| a.via == Via::Kexec);
        match self.current() {
            Some(current) if asked && !self.is_proven_cold() => format!(
                ", by a cold boot instead of the kexec that was asked for: no firmware has started {}/{} here yet",
                current.image, current.release
            ),
            Some(_) | None => String::new(),
        }
    }

    /// How it left; before it says so, how it leaves.
    fn way(&self) -> Via {
        if self.last_boot().is_some_and(Boot::leaves_through_firmware) {
            return Via::Cold;
        }
        self.left_by.map_or_else(|| self.leaves_by(), |(_, via)| via)
    }

    /// The last that was heard of it: it goes to what is assigned by kexec.
    pub(crate) fn jumped(&self) -> bool {
        let newest = self.boots.back().filter(|boot| !boot.is_unclaimed());
        let for_this = self.left_by.is_none_or(|(sequence, _)| self.next_sequence() == sequence + 1);
        self.is_reimaging() && for_this && self.way() == Via::Kexec && newest.is_some_and(Boot::said_it_goes)
    }

    /// How a boot began that its agent is the first to tell of. No firmware was heard. If the machine was on its way to another
    /// release by kexec, this is it, also where its last words were lost.
    pub(crate) fn came_by(&self, release: &ReleaseId) -> Via {
        let firmware = self.boots.back().is_some_and(Boot::is_unclaimed);
        let same = self.last_boot().is_some_and(|before| before.release.as_ref() == Some(release));
        let on_its_way = self.is_reimaging() || self.may_leave_now();
        if on_its_way && !firmware && !same { self.way() } else { Via::Cold }
    }

    /// It is healthy in a boot that a kexec began, and was never in one that firmware began: no release to come back to
    /// yet, and its time is over no more, as it has been well; its next boots are counted.
    pub(crate) fn is_carried(&self) -> bool {
        self.assigned.as_ref().is_some_and(|a| self.carried.as_ref() == Some(&a.release))
    }
}
