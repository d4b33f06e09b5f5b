//! What a running machine says of itself besides its health: where it differs from its release, how far it is with
//! draining, and what happened while nobody listened.

use crate::ids::{IdError, word_enum};
use crate::spool::SpoolReport;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Differences that a report names; the rest is counted.
pub const DRIFT_LIMIT: usize = 32;

word_enum! {
    /// In what a machine differs from its release.
    DriftKind {
        /// The root hash in the kernel's table, or a block of the root that dm-verity refused.
        Root = "root",
        /// The kernel's release.
        Kernel = "kernel",
        /// The kernel's command line.
        CommandLine = "command-line",
        /// A kernel module that the release does not have.
        Module = "module",
        /// A mount that is not declared, or not as declared.
        Mount = "mount",
        /// A program that is not of the verified root.
        Executable = "executable",
        /// A unit that the release does not have.
        Unit = "unit",
        /// A port that something listens on and the release does not declare.
        Listener = "listener",
        /// The users of the system.
        User = "user",
        /// The clock.
        Clock = "clock",
        /// It cannot be looked at.
        Unseen = "unseen",
    }
}

/// One difference between a machine and its release.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Difference {
    /// Which kind.
    pub kind: DriftKind,
    /// What it is about: a path, a port, a unit. With the kind it names the difference.
    pub what: String,
    /// A sentence.
    pub text: String,
}

/// A machine on its way out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draining {
    /// The hook that runs.
    pub hook: String,
    /// Which it is, from 1.
    pub number: u32,
    /// Of so many.
    pub of: u32,
    /// For so long it runs.
    pub since_ms: u64,
    /// So long all that is left may take.
    pub left_ms: u64,
}

impl Draining {
    /// For people.
    pub fn words(&self) -> String {
        let Self { hook, number, of, since_ms, .. } = self;
        format!("draining: {number} of {of}, hook {hook} since {} s", since_ms / 1000)
    }
}

/// The rest of a report of a running system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// At most [`DRIFT_LIMIT`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drift: Vec<Difference>,
    /// How many differences there are.
    #[serde(default)]
    pub drift_count: u32,
    /// Its drain hooks run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining: Option<Draining>,
    /// In disk mode: sequence of the assignment under which the disk was last verified whole; 0 where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub put_up: Option<u64>,
    /// What happened.
    #[serde(default)]
    pub spool: SpoolReport,
}
