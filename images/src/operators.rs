//! `kiln trust operators`: `site.json` with other operators' keys, signed offline. Machines and the boot server take it up
//! with the next look at the repository.

use crate::signing::{Changed, change_site};
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::PublicKey;
use std::path::Path;

/// Names these operators and no others.
pub fn name_operators(dir: &Path, keys: &[PublicKey], threshold: u32, now: Timestamp) -> Result<Changed, SiteError> {
    change_site(dir, now, format!("{} operators", keys.len()), |document| {
        document.operators = keys.iter().map(|key| (key.id(), key.to_object())).collect();
        document.operator_threshold = threshold;
        Ok(true)
    })
}
