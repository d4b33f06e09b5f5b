//! Why a person's order is refused.

use crate::state::StateKind;
use kiln_protocol::{Architecture, ReleaseId};

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
    #[error("{release} is quarantined for {machine}: {reason}. Run `kiln machine clear {machine}` to allow it again")]
    PairQuarantined { machine: String, release: ReleaseId, reason: String },
}
