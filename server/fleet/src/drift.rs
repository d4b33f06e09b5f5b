//! What becomes of a machine that differs from its release, where its role says `drift = "reimage"`: it is put up anew.
//! Not for a glimpse, but for a difference that lasts; not for ever, because what makes a machine differ may come back
//! with it: after [`DRIFT_REBUILDS`] times within [`DRIFT_WINDOW_MS`] it is left as it is, and a person looks.

use crate::Millis;
use crate::boots::cut;
use crate::event::Action;
use crate::machine::Machine;
use crate::state::StateKind;
use crate::step::save;
use kiln_protocol::{Difference, DriftKind};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;

/// A difference that lasts for so long is acted on: the agent has looked twice by then.
pub const DRIFT_PATIENCE_MS: Millis = 60_000;
/// So often a machine is put up anew for its drift within [`DRIFT_WINDOW_MS`].
pub const DRIFT_REBUILDS: usize = 2;
/// The time that counts for it.
pub const DRIFT_WINDOW_MS: Millis = 24 * 3_600_000;

/// What a role says of drift.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriftPolicy {
    /// It is told.
    #[default]
    Report,
    /// It is told, and the machine is put up anew.
    Reimage,
}

impl fmt::Display for DriftPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Report => "report",
            Self::Reimage => "reimage",
        })
    }
}

/// What is remembered of a machine's drift besides the differences themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownDrift {
    /// Since when it differs in something that putting it up anew mends.
    #[serde(default)]
    since: Option<Millis>,
    /// When it was put up anew for that, the newest last; at most [`DRIFT_REBUILDS`].
    #[serde(default)]
    rebuilt: VecDeque<Millis>,
    /// Why it is not any more.
    #[serde(default)]
    held: Option<String>,
}

impl KnownDrift {
    /// A person has looked, or wants another release.
    pub(crate) fn forgive(&mut self) {
        (self.rebuilt, self.held) = (VecDeque::new(), None);
    }
}

/// A wrong clock stays wrong whatever is booted.
fn is_mended_by_reimaging(difference: &Difference) -> bool {
    match difference.kind {
        DriftKind::Clock => false,
        DriftKind::Root
        | DriftKind::Kernel
        | DriftKind::CommandLine
        | DriftKind::Module
        | DriftKind::Mount
        | DriftKind::Executable
        | DriftKind::Unit
        | DriftKind::Listener
        | DriftKind::User
        | DriftKind::Unseen => true,
    }
}

impl Machine {
    /// The newest look: since when it differs.
    pub(crate) fn note_drift(&mut self, now: Millis) {
        let said = &self.condition;
        let unnamed = said.drift_count as usize > said.drift.len();
        let differs = unnamed || said.drift.iter().any(is_mended_by_reimaging);
        self.drift.since = differs.then(|| self.drift.since.unwrap_or(now));
    }

    /// When it is put up anew for its drift, if that lasts until then.
    pub fn drift_due(&self) -> Option<Millis> {
        let acts = self.drift_policy == DriftPolicy::Reimage && self.drift.held.is_none();
        // One that fell back, or is on trial, is judged by that first.
        let stands = match self.state.kind {
            StateKind::Healthy => true,
            StateKind::Degraded => self.running.is_some() && !self.is_trial(),
            StateKind::Discovered
            | StateKind::Approved
            | StateKind::Booting
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack
            | StateKind::Quarantined
            | StateKind::Retired => false,
        };
        let since = self.drift.since.filter(|_| acts && stands && self.is_settled())?;
        Some(since + DRIFT_PATIENCE_MS)
    }

    pub(crate) fn reimage_if_it_drifts(&mut self, now: Millis, out: &mut Vec<Action>) {
        if self.drift_due().is_none_or(|due| now < due) {
            return;
        }
        let what = self.condition.drift.iter().find(|d| is_mended_by_reimaging(d));
        let what = what.map_or_else(|| "more differences than are named".to_owned(), |d| d.text.clone());
        self.drift.rebuilt.retain(|at| now < at + DRIFT_WINDOW_MS);
        let times = self.drift.rebuilt.len();
        if times < DRIFT_REBUILDS {
            self.drift.rebuilt.push_back(now);
            self.put_up_anew(
                cut(&format!("its drift ({what})")),
                &format!("differs from its release ({what})"),
                now,
                out,
            );
            return;
        }
        let words = format!(
            "it differs from its release again after it was put up anew {times} times within {} h, and is left as it is \
             ({what}); when the cause is gone, `kiln machine clear {}` or a new assignment ends that",
            DRIFT_WINDOW_MS / 3_600_000,
            self.title()
        );
        self.last_words = cut(&words);
        self.drift.held = Some(cut(&words));
        out.push(Action::Say { warn: true, text: words });
        save(out);
    }

    /// What is done about its drift, for people; none while there is nothing to say.
    pub fn drift_words(&self) -> Option<String> {
        if self.rebuilding.is_some() {
            return Some(format!("it is put up anew for {}", self.rebuild_for));
        }
        self.drift.since?;
        match (self.drift_policy, &self.drift.held) {
            (DriftPolicy::Report, _) => None,
            (DriftPolicy::Reimage, Some(held)) => Some(held.clone()),
            (DriftPolicy::Reimage, None) => self.drift_due().map(|due| {
                let second = due / 1000 % 86_400;
                let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
                format!(
                    "it differs from its release, and is put up anew from {hour:02}:{minute:02}:{second:02} UTC on if \
                     that lasts"
                )
            }),
        }
    }
}
