//! Hardware classes, as the operator API shows them.

use kiln_protocol::ImageName;
use serde::{Deserialize, Serialize};

/// One class, and what its machines in service have shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassView {
    /// Its maker and product name.
    pub model: String,
    /// Its firmware's maker and version.
    pub firmware: String,
    /// Machines in service.
    pub machines: usize,
    /// Published releases that one of them came up on, or shall run.
    pub releases: Vec<ClassReleaseView>,
}

/// How one release came up on a class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassReleaseView {
    /// Image.
    pub image: ImageName,
    /// Release.
    pub release: u64,
    /// Healthy, started by firmware.
    pub cold: bool,
    /// Healthy, started by a kexec, and none came to nothing since.
    pub kexec: bool,
    /// A kexec to it came to nothing, and none came up since.
    #[serde(default)]
    pub kexec_failed: bool,
}
