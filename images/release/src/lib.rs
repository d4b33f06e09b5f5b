//! Release metadata: its formats, its verification (a TUF 1.0 client as a pure state machine), its signing, and the
//! dm-verity tree.
//!
//! Pure: no I/O, no clock, no random numbers; time and key seeds are arguments.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod formats;

pub use formats::{
    AgentApi, Artifact, BOOT_PATH, BootInfo, FilePolicy, HANDOFF_PATH, HealthCheck, HealthKind, MANIFEST_TYPE,
    Manifest, Mode, SITE_TYPE, Site, SiteSettings, VerityParams, WritableMount,
};
