//! Why a person's order is refused.

use crate::state::StateKind;
use kiln_protocol::{Architecture, ReleaseId};

/// A word that names no way to a release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no way to a release: say kexec, cold or auto")]
pub struct NoRoute(pub String);

/// An order that the machine's state does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Refusal {
    #[error("{machine} is not approved yet: run `kiln machine approve {machine} --role ROLE` first")]
    NotApproved { machine: String },
    #[error("{machine} is {state}: {reason}. Run `kiln machine clear {machine}` when it is dealt with")]
    Held { machine: String, state: StateKind, reason: String },
    #[error("{machine} is retired: approve it again first (`kiln machine approve {machine} --role ROLE`)")]
    Retired { machine: String },
    #[error("{machine} cannot replace itself")]
    ItsOwnReplacement { machine: String },
    #[error("{machine} is in service: run `kiln machine retire {machine}` first, or name another")]
    InService { machine: String },
    #[error("{machine} has not reported yet: let it boot, so that its key and its hardware are known")]
    NeverReported { machine: String },
    #[error("{machine} is {got}, {old} is {expected}: its release would not run there")]
    OtherArchitecture { machine: String, old: String, expected: Architecture, got: Architecture },
    #[error("{machine} has no release to take over: assign one to the new machine by approving it")]
    NothingToTakeOver { machine: String },
    #[error("{machine} does its work: there is nothing to excuse")]
    Available { machine: String },
    #[error(
        "--key takes the beginning of an identity key's fingerprint, at least {digits} hex digits, as the machine's console \
         and `kiln machine show {machine}` name it"
    )]
    KeyDigits { machine: String, digits: usize },
    #[error("no other identity key was heard under the id of {machine}: let the machine report with it first")]
    NoOtherKey { machine: String },
    #[error("no identity key that was heard under the id of {machine} begins so; heard were {heard}")]
    NoSuchKey { machine: String, heard: String },
    #[error(
        "nothing is changed: several identity keys that were heard under the id of {machine} begin with {digits}: {fits}. One may \
         have been made up to look like the other. Find out which of them is on the machine itself, and run `kiln machine \
         clear {machine} --key` with so many digits of it"
    )]
    AmbiguousKey { machine: String, digits: String, fits: String },
    #[error(
        "that identity key is {machine}'s already; without --key `kiln machine clear {machine}` ends what else holds it"
    )]
    KeyIsItsOwn { machine: String },
    #[error("no other identity key is taken: {why}")]
    KeyStays { why: String },
    #[error("{release} is quarantined for {machine}: {reason}. Run `kiln machine clear {machine}` to allow it again")]
    PairQuarantined { machine: String, release: ReleaseId, reason: String },
}
