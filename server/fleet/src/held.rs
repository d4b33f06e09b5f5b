//! Firmware packets in the name of a machine whose agent speaks.
//!
//! Whoever can send on the machines' network can send them, so they move nothing while the agent was just heard. They
//! are kept, with their times, until they are known to be true (a new boot reports, or the agent falls silent) and then
//! take effect as if they came at their own times; or to be false (the boot that ran before reports again) and are
//! dropped. What the firmware is *served* is decided as if they were true: a machine that really restarts must get
//! what its next boot is counted for.

use crate::event::Action;
use crate::grant::Limits;
use crate::machine::Machine;
use crate::step::save;
use crate::{LIVE_MS, Millis};
use kiln_protocol::ReleaseId;
use serde::{Deserialize, Serialize};

/// Boots kept of one machine: within [`LIVE_MS`] no machine starts more often.
pub const HELD_KEPT: usize = 16;

/// The packets of one boot, from DISCOVER on; of those that a firmware repeats, the first and the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBoot {
    /// When an address was asked for first.
    pub asked: Millis,
    /// And last.
    pub asked_last: Millis,
    /// The boot program that was asked for, and when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downloads: Option<(Millis, ReleaseId)>,
    /// When it last took more of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved: Option<Millis>,
    /// When it was sent whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downloaded: Option<Millis>,
    /// An order came after it: its download counts no more.
    #[serde(default)]
    pub superseded: bool,
}

impl Machine {
    /// Ends the agent's word for the machine if it has not been heard for [`LIVE_MS`]; what was kept is then believed.
    pub(crate) fn lapse(&mut self, limits: Limits, now: Millis, out: &mut Vec<Action>) {
        if self.agent_seen.is_some_and(|heard| now >= heard + LIVE_MS) {
            self.agent_seen = None;
            self.believe(limits, out);
        }
    }

    /// Keeps a DISCOVER.
    pub(crate) fn hold_asked(&mut self, now: Millis, out: &mut Vec<Action>) {
        if let Some(last) = self.held_packets.last_mut()
            && last.downloads.is_none()
        {
            last.asked_last = now;
            return;
        }
        if self.held_packets.is_empty() {
            let heard = now.saturating_sub(self.agent_seen.unwrap_or(now)) / 1000;
            out.push(Action::Say {
                warn: false,
                text: format!(
                    "a boot request came in its name, but its agent spoke {heard} s ago: it counts when a new boot \
                     reports or the agent falls silent"
                ),
            });
        }
        // The first ones are what a trial's boots are counted by, the last one is where the machine is.
        if self.held_packets.len() < HELD_KEPT {
            save(out);
        } else {
            self.held_packets.pop();
        }
        let (asked, asked_last) = (now, now);
        let boot = HeldBoot { asked, asked_last, downloads: None, moved: None, downloaded: None, superseded: false };
        self.held_packets.push(boot);
    }

    /// Keeps the begin of a download. Without a DISCOVER before it, it is a running system's and says nothing.
    pub(crate) fn hold_downloads(&mut self, release: &ReleaseId, now: Millis, out: &mut Vec<Action>) {
        let full = self.held_packets.len() == HELD_KEPT;
        if let Some(last) = self.held_packets.last_mut()
            && last.downloads.is_none()
        {
            last.downloads = Some((now, release.clone()));
            if !full {
                save(out);
            }
        }
    }

    /// Keeps that a loader or a download goes on.
    pub(crate) fn hold_bytes(&mut self, now: Millis) {
        if let Some(last) = self.held_packets.last_mut() {
            last.moved = Some(now);
        }
    }

    /// Keeps the end of a download.
    pub(crate) fn hold_downloaded(&mut self, now: Millis) {
        if let Some(last) = self.held_packets.last_mut()
            && last.downloads.is_some()
            && last.downloaded.is_none()
        {
            last.downloaded = Some(now);
        }
    }

    /// What was kept is true: it takes effect, each packet at its own time.
    pub(crate) fn believe(&mut self, limits: Limits, out: &mut Vec<Action>) {
        for held in std::mem::take(&mut self.held_packets) {
            self.asked_for_boot(limits, held.asked, out);
            self.asked_for_boot(limits, held.asked_last, out);
            if let Some((at, release)) = &held.downloads {
                self.asked &= !held.superseded;
                self.downloads(release, *at, out);
            }
            if let Some(at) = held.moved {
                self.takes_bytes(at, out);
            }
            if let Some(at) = held.downloaded {
                self.downloaded(at, out);
            }
        }
    }

    /// The boot that ran before goes on: what was kept was somebody else's.
    pub(crate) fn disbelieve(&mut self, out: &mut Vec<Action>) {
        self.asked = false;
        self.mend(out);
        if !self.held_packets.is_empty() {
            self.held_packets.clear();
            let text = "a boot request in its name was not its own: the boot that ran before goes on".to_owned();
            out.push(Action::Say { warn: true, text });
            save(out);
        }
    }

    /// Boots of the assigned trial, those that are kept included.
    pub(crate) fn attempts_if_believed(&self) -> u32 {
        let of_trial = |held: &&HeldBoot| match (&held.downloads, &self.assigned) {
            (Some((_, release)), Some(a)) => !held.superseded && *release == a.release,
            (None, _) | (_, None) => false,
        };
        let kept = self.held_packets.iter().filter(of_trial).count();
        self.attempts.saturating_add(u32::try_from(kept).unwrap_or(u32::MAX))
    }

    /// Why it is in its state, and what came in its name and is not confirmed.
    pub fn why(&self) -> String {
        let excused = self.excused.as_ref().map_or(String::new(), |why| format!("; excused: {why}"));
        let drift = self.drift_words().filter(|words| !self.state.reason.contains(words.as_str()));
        let drift = drift.map_or(String::new(), |words| format!("; {words}"));
        let revoked = if self.key_revoked {
            format!(
                "; its identity key was revoked: it is not heard until it reports with another, and `kiln machine clear {} \
                 --key` names that one",
                self.title()
            )
        } else {
            String::new()
        };
        let tests = self.acceptance_words().map_or(String::new(), |words| format!("; {words}"));
        let unsigned =
            self.unsigned.as_ref().map_or(String::new(), |why| format!("; its assignment is not signed: {why}"));
        let reason = format!("{}{unsigned}{drift}{excused}{revoked}{tests}", self.state.reason);
        match self.held_packets.last() {
            None => reason,
            Some(held) => {
                let second = held.asked / 1000 % 86_400;
                format!(
                    "{reason}; a boot request came in its name at {:02}:{:02}:{:02} UTC and is not confirmed yet",
                    second / 3600,
                    second / 60 % 60,
                    second % 60
                )
            }
        }
    }
}
