//! Secrets, without their values.

use kiln_protocol::SecretName;
use serde::{Deserialize, Serialize};

/// A secret, without its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretView {
    /// Its name.
    pub name: SecretName,
    /// The role whose machines get it.
    #[serde(default)]
    pub role: Option<String>,
    /// Or the one machine.
    #[serde(default)]
    pub machine: Option<String>,
    /// Its newest version: a number that no other value of the site has.
    pub version: u64,
    /// When it was set.
    pub set_ms: i64,
    /// By whom.
    pub by: String,
    /// How many of the machines that it is for hold this version.
    #[serde(default)]
    pub holding: usize,
    /// And how many do not.
    #[serde(default)]
    pub lacking: usize,
    /// At most a hundred of them, those first that do not hold it.
    pub machines: Vec<SecretHolderView>,
}

/// A machine that a secret is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretHolderView {
    /// Its name.
    pub machine: String,
    /// The version that it holds, by its own word.
    pub version: Option<u64>,
    /// Why it does not hold the newest, if it does not.
    pub why: Option<String>,
}
