//! The states a machine can be in. docs/state-machines.md draws them.

use crate::Millis;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateKind {
    /// Seen, and nobody has said what it is for.
    Discovered,
    /// It has a name, a role and an assignment; it has not booted since.
    Approved,
    /// On its way to *healthy*.
    Booting,
    /// The server saw its health checks pass on the release whose root hash it runs.
    Healthy,
    /// Up, but not as it should be.
    Degraded,
    /// No word within its deadline.
    Unreachable,
    /// It may leave for another release and is emptying itself.
    Draining,
    /// It left for another release.
    Reimaging,
    /// A trial failed; it is back on its last-known-good release.
    FellBack,
    /// Two claimed its name, or its key changed: it is told nothing until a person clears it.
    Quarantined,
    /// Taken out of service by a person.
    Retired,
}

impl StateKind {
    /// Every state, in order.
    pub const ALL: [Self; 11] = [
        Self::Discovered,
        Self::Approved,
        Self::Booting,
        Self::Healthy,
        Self::Degraded,
        Self::Unreachable,
        Self::Draining,
        Self::Reimaging,
        Self::FellBack,
        Self::Quarantined,
        Self::Retired,
    ];

    /// A person said what the machine is for, and has not taken it out of service since.
    pub fn in_fleet(self) -> bool {
        match self {
            Self::Discovered | Self::Retired => false,
            Self::Approved
            | Self::Booting
            | Self::Healthy
            | Self::Degraded
            | Self::Unreachable
            | Self::Draining
            | Self::Reimaging
            | Self::FellBack
            | Self::Quarantined => true,
        }
    }

    /// The word of it, the same everywhere.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Discovered => "discovered",
            Self::Approved => "approved",
            Self::Booting => "booting",
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Unreachable => "unreachable",
            Self::Draining => "draining",
            Self::Reimaging => "reimaging",
            Self::FellBack => "fell-back",
            Self::Quarantined => "quarantined",
            Self::Retired => "retired",
        }
    }
}

impl fmt::Display for StateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A state, why, since when, and until when at most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Which.
    pub kind: StateKind,
    /// Why, in words for a person; never empty.
    pub reason: String,
    /// When this kind of state was entered.
    pub since: Millis,
    /// When it is judged anew if nothing happens. None where only a person can end it: unreachable, quarantined,
    /// retired.
    pub deadline: Option<Millis>,
}
