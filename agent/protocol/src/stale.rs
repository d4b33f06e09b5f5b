//! Signed metadata whose date is over, by the newest time that a machine believes.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What of it has expired first. The machine runs what it was assigned, and goes to no other release by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stale {
    /// Which file of the repository.
    pub file: String,
    /// Until when it held.
    pub expires: Timestamp,
}

impl Stale {
    /// For people.
    pub fn words(&self) -> String {
        format!("{} expired at {}; it goes to no other release until new dates are signed", self.file, self.expires)
    }
}
