//! One identity, two machines that live. Without a TPM a key lies on a disk or in firmware variables, and can be copied:
//! whoever has the copy is, for the server, the machine. Which of two is the true one nobody here can tell, so both are
//! held until a person has looked.
//!
//! A copy speaks under the same id (the thief gives the machine's own), or under its own. Neither is taken for a machine
//! that restarted, or for a disk that moved: of a boot that has ended, what was on its way can come late, no more, because
//! each further report needs a TLS handshake with a living agent; and of a machine whose disk moved nothing comes at all.

use crate::boots::Boot;
use crate::event::Action;
use crate::machine::Machine;
use crate::state::StateKind;
use crate::step::{save, wake};
use crate::{LIVE_MS, Millis};
use kiln_protocol::Report;
use std::collections::VecDeque;

/// Reports of an earlier boot that may have been on their way when the next one began: one of its initramfs, one of its
/// service.
pub const LATE_REPORTS: u8 = 2;
/// Boots before the [`crate::BOOTS_KEPT`] newest that are remembered, so that nobody makes them forgotten by beginning others.
pub const PAST_BOOTS: usize = 64;
/// No machine ends so many boots within [`LIVE_MS`]: fewer than [`PAST_BOOTS`], or whoever begins more is not noticed.
pub const BOOTS_AT_ONCE: usize = 32;

/// Boots of which nothing else is known any more, the newest last; at most [`PAST_BOOTS`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PastBoots(VecDeque<PastBoot>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct PastBoot {
    boot_id: String,
    /// Highest report number seen.
    seq: u64,
    /// As in [`Boot`].
    late: u8,
    /// When newer ones took its place.
    left: Millis,
}

impl PastBoots {
    pub(crate) fn put(&mut self, boot: Boot, now: Millis) {
        if boot.is_unclaimed() {
            return;
        }
        let Boot { boot_id, seq, late, .. } = boot;
        self.0.retain(|past| past.boot_id != boot_id);
        self.0.push_back(PastBoot { boot_id, seq, late, left: now });
        while self.0.len() > PAST_BOOTS {
            self.0.pop_front();
        }
    }

    pub(crate) fn has(&self, boot_id: &str) -> bool {
        self.0.iter().any(|past| past.boot_id == boot_id)
    }

    /// More boots ended lately than a machine begins.
    pub(crate) fn are_too_many(&self, now: Millis) -> bool {
        self.0.iter().filter(|past| now < past.left.saturating_add(LIVE_MS)).count() >= BOOTS_AT_ONCE
    }

    /// A person has looked: what was counted is over.
    pub(crate) fn forgive(&mut self) {
        for past in &mut self.0 {
            (past.late, past.left) = (0, 0);
        }
    }
}

/// Counts a report of an earlier boot, if it is a new one. Whether there were too many.
fn is_late(report: &Report, seq: &mut u64, late: &mut u8) -> bool {
    if report.seq <= *seq {
        return false;
    }
    *seq = report.seq;
    *late = late.saturating_add(1);
    *late > LATE_REPORTS
}

impl Machine {
    /// Counts a report of an earlier boot. Whether that boot goes on beside the newest.
    pub(crate) fn speaks_beside(&mut self, report: &Report) -> bool {
        let newest = self.boots.iter().rposition(|boot| !boot.is_unclaimed());
        let of = self.boots.iter().rposition(|boot| !boot.is_unclaimed() && boot.boot_id == report.boot_id);
        if of.is_some() && of == newest {
            return false;
        }
        if let Some(boot) = of.and_then(|of| self.boots.get_mut(of)) {
            return is_late(report, &mut boot.seq, &mut boot.late);
        }
        let past = self.past.0.iter_mut().find(|past| past.boot_id == report.boot_id);
        past.is_some_and(|past| is_late(report, &mut past.seq, &mut past.late))
    }

    /// What is said then.
    pub(crate) fn has_a_copy(&self) -> String {
        let title = self.title();
        format!(
            "two machines report with the identity key of {title}: it was copied from its disk or firmware. Switch the \
             false one off, then run `kiln machine clear {title}`; whoever has the copy still has it: `kiln machine \
             revoke-key {title}` ends that"
        )
    }

    /// The other one, which has this one's key, spoke while this one's newest boot went on, and within the last
    /// [`LIVE_MS`]; and not before a person dealt with this one last.
    pub fn lives_beside(&self, other: &Self, now: Millis) -> bool {
        let began = self.boots.back().and_then(|boot| boot.agent_zero).map(|zero| zero.max(self.state.since));
        let heard = other.reported.filter(|heard| now < heard + LIVE_MS);
        matches!((began, heard), (Some(began), Some(heard)) if heard > began)
    }

    /// Another machine reports with its key.
    pub(crate) fn key_shared(&mut self, with: &str, now: Millis, out: &mut Vec<Action>) {
        let title = self.title();
        let reason = format!(
            "{title} and {with} report with one identity key: it was copied with a disk or firmware settings. Switch the \
             false one off, then run `kiln machine clear {title}`"
        );
        self.contest(reason, now, out);
    }

    /// Two claim to be this machine: neither gets anything before a person has looked.
    pub(crate) fn contest(&mut self, reason: String, now: Millis, out: &mut Vec<Action>) {
        match self.state.kind {
            // It gets nothing as it is, and anybody can make such machines up: it stays one that is forgotten.
            StateKind::Discovered => {
                if self.last_words != reason {
                    self.last_words.clone_from(&reason);
                    out.push(Action::Say { warn: true, text: reason });
                    save(out);
                }
            }
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack => {
                self.granted = None;
                self.enter(StateKind::Quarantined, reason, None, now);
                wake(out);
            }
            StateKind::Quarantined | StateKind::Retired => {}
        }
    }
}
