//! Who may do what: access roles, how often a wrong credential may be tried, and what needs a second person. Names,
//! times and counts in, decisions out; secrets and their hashes are the server's.

mod attempts;
mod proposal;
mod refusals;
mod spree;

pub use attempts::Attempts;
pub use proposal::{Proposal, ProposalEvent, ProposalRefusal, ProposalState};
pub use refusals::Refusals;
pub use spree::Spree;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What a person or program may do. Each may do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessRole {
    /// Looks.
    Viewer,
    /// Stands in front of machines: approves, excuses, reads logs.
    Technician,
    /// Says what machines run.
    Operator,
    /// Says who may do what.
    Admin,
}

impl AccessRole {
    /// All, the least first.
    pub const ALL: [Self; 4] = [Self::Viewer, Self::Technician, Self::Operator, Self::Admin];

    /// As people write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Technician => "technician",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for AccessRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Not an access role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no access role: viewer, technician, operator or admin")]
pub struct NoAccessRole(String);

impl FromStr for AccessRole {
    type Err = NoAccessRole;
    fn from_str(text: &str) -> Result<Self, NoAccessRole> {
        Self::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| NoAccessRole(text.to_owned()))
    }
}
