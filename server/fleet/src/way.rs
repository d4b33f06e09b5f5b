//! By which way a machine goes to another release. What only a kexec has started may be something that no firmware can start:
//! it stays a trial until a cold boot of it was healthy, and nothing is stacked on it by another kexec.

use crate::boots::Boot;
use crate::classes::Ways;
use crate::error::NoRoute;
use crate::machine::{Assigned, Machine};
use kiln_protocol::{ReleaseId, Stage, StageState, Via};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Good releases remembered.
const GOOD_KEPT: usize = 8;

/// How a person says that a machine is to go to a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// By kexec: whoever says so tries it, on a class that has not shown it too.
    Kexec,
    /// Through firmware.
    Cold,
    /// By kexec where machines of its class came up on the release both ways, else through firmware.
    Auto,
}

impl Route {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Kexec, Self::Cold, Self::Auto];

    /// The word of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kexec => "kexec",
            Self::Cold => "cold",
            Self::Auto => "auto",
        }
    }

    /// The way where nothing speaks against it.
    pub(crate) fn at_best(self) -> Via {
        match self {
            Self::Kexec | Self::Auto => Via::Kexec,
            Self::Cold => Via::Cold,
        }
    }

    /// The way where nothing was shown, and nothing will be: of an operator's order.
    pub fn unproven(self) -> Via {
        match self {
            Self::Kexec => Via::Kexec,
            Self::Cold | Self::Auto => Via::Cold,
        }
    }
}

impl From<Via> for Route {
    fn from(via: Via) -> Self {
        match via {
            Via::Kexec => Self::Kexec,
            Via::Cold => Self::Cold,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Route {
    type Err = NoRoute;

    fn from_str(text: &str) -> Result<Self, NoRoute> {
        Self::ALL.into_iter().find(|route| route.as_str() == text).ok_or_else(|| NoRoute(text.to_owned()))
    }
}

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
            Some(a) if a.auto && self.why_not_by_itself(a).is_some() => Via::Cold,
            Some(a) if self.is_proven_cold() => self.secrets_policy.via(a.via),
            Some(_) | None => Via::Cold,
        }
    }

    /// Why the server, to whom the way was left, sends it through firmware; none: by kexec.
    fn why_not_by_itself(&self, assigned: &Assigned) -> Option<String> {
        let release = &assigned.release;
        if let Some(current) = self.current() {
            if !self.is_proven_cold() {
                return Some(format!("no firmware has started {}/{} here yet", current.image, current.release));
            }
            if current.image != release.image {
                return Some(format!("it runs {}, and another image is started by firmware first", current.image));
            }
        }
        if self.secrets_policy.via(Via::Kexec) == Via::Cold {
            return Some("its role's secrets are for boots that firmware began".to_owned());
        }
        if self.class.is_none() {
            return Some("its class is not known: no inventory came that names its model and firmware".to_owned());
        }
        let shown = |how: &str| Some(format!("no machine of its class has come up on {release}{how} yet"));
        let proof = self.proofs.get(release).copied().unwrap_or_default();
        if proof.is_taken_back() {
            return Some(format!(
                "a kexec to {release} came to nothing on a machine of its class, and none has come up by one since"
            ));
        }
        match proof.ways {
            Ways { cold: true, kexec: true } => None,
            Ways { cold: true, kexec: false } => shown(" by kexec"),
            Ways { cold: false, kexec: true } => shown(" from firmware"),
            Ways { cold: false, kexec: false } => shown(""),
        }
    }

    /// Why it leaves by a cold boot although a kexec was asked for, or might have been; empty where that is not so. To be put
    /// behind a sentence.
    pub(crate) fn why_no_kexec(&self) -> String {
        if let Some(assigned) = self.assigned.as_ref().filter(|a| a.auto) {
            let why = self.why_not_by_itself(assigned);
            return why.map_or_else(String::new, |why| format!(", by cold boot: {why}"));
        }
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

    /// Where a kexec led to that came to nothing, now that something else than that boot is heard, or nothing for too long: it went
    /// there and its agent never spoke there, or never called it healthy. Whether that was the hardware's fault nobody can tell.
    pub(crate) fn vain_kexec(&self) -> Option<ReleaseId> {
        let assigned = self.assigned.as_ref().filter(|assigned| assigned.order.is_none())?;
        let boot = self.boots.back().filter(|boot| !boot.is_unclaimed() && !boot.vain)?;
        let there = boot.via == Via::Kexec && boot.release.as_ref() == Some(&assigned.release);
        let never_well = there && !self.boot_loop.well && !boot.said_it_goes();
        (never_well || self.jumped()).then(|| assigned.release.clone())
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

    /// The release is healthy. Firmware must have started it for it to be one to come back to: a kexec says nothing of
    /// what the next power cut needs.
    pub(crate) fn note_well(&mut self, id: ReleaseId) {
        self.note_way(&id);
        if !self.came_through_firmware() && !self.good.contains(&id) {
            self.carried = Some(id);
            return;
        }
        if self.carried.as_ref() == Some(&id) {
            self.carried = None;
        }
        if self.good.last() != Some(&id) {
            self.good.retain(|g| *g != id);
            self.good.push(id);
            if self.good.len() > GOOD_KEPT {
                self.good.remove(0);
            }
        }
    }
}
