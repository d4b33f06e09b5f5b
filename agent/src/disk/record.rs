//! What a machine keeps of a release's signed word, so that it starts again without a boot server: the metadata and the
//! assignment as they came, verified anew at each boot against the trust root in the boot image.

use crate::verifier::Servers;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Kept on the state partition, one for each slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The repository's files that the release was verified with, by path.
    pub files: BTreeMap<String, String>,
    /// The director's statement that this machine runs this release.
    pub assignment: String,
    /// Where the boot server was.
    pub servers: Servers,
}
