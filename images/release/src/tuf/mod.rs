//! TUF 1.0 (specification 1.0.31 and later of 1.x): documents, the client's workflow, and building documents to sign.
//!
//! Step numbers in comments are those of the specification's section 5, `off-spec:` marks a deviation.
//! Not here: fetching, storing, the clock. Not supported: succinct hash-bin delegations (TAP 15).

mod client;
mod kept;
mod load;
mod model;
mod path;
mod seen;

pub use crate::error::TufError;
pub use client::{Client, Expiry, Fetched, Outcome, Request, Target, Wanted};
pub use kept::{Change, kept_file_name, kept_role};
pub use load::{ExpiryPolicy, Limits};
pub use model::{
    DelegatedRole, Delegations, MetaFile, RoleKeys, Root, RootRoles, SPEC_VERSION, Snapshot, TargetFile, Targets,
    TimestampRole,
};
pub use path::{TargetPath, matches_pattern};
pub use seen::{Seen, SeenRole};
