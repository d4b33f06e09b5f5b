//! What a machine keeps of a release's signed word, so that it starts again without a boot server: the metadata and the
//! assignment as they came, verified anew at each boot against the trust root in the boot image.

use crate::verifier::Servers;
use kiln_release::hex;
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

impl Record {
    /// Which signed word this is: the beginning of its SHA-256, as a machine remembers it. Where the boot server was is no part of it.
    pub fn digest(&self) -> String {
        digest(&self.files, &self.assignment)
    }
}

/// [`Record::digest`] of these.
pub fn digest(files: &BTreeMap<String, String>, assignment: &str) -> String {
    let bytes = serde_json::to_vec(&(files, assignment)).expect("strings always become JSON");
    // What it must withstand is another signed word of the same digest: nobody chooses both.
    hex::sha256(&bytes)[..32].to_owned()
}
