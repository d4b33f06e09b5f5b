//! `kiln trust operators`: `site.json` with other operators' keys, signed offline. Machines and the boot server take it up
//! with the next look at the repository.

use crate::files::{Batch, PUBLIC};
use crate::repository::newest_state;
use crate::signing::{serve, sign_site};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::tuf::TargetPath;
use kiln_release::{PublicKey, Site, TufError, hex};
use std::path::Path;

/// Names these operators and no others. Whether machines see it now, or when `kiln serve` has signed the timestamp.
pub fn name_operators(dir: &Path, keys: &[PublicKey], threshold: u32, now: Timestamp) -> Result<bool, SiteError> {
    let site = SiteDir::open(dir)?;
    let _lock = site.lock_offline()?;
    let state = newest_state(&site, now)?;
    let path = TargetPath::site();
    let known = state.targets.get(path.as_str());
    let missing = || SiteError::metadata(&site)(TufError::TargetNotListed { path: path.to_string() });
    let file = site.repo().join("targets").join(path.as_str());
    let mut document = Site::read(&known.ok_or_else(missing)?.bytes).map_err(SiteError::format(file.clone()))?;
    document.operators = keys.iter().map(|key| (key.id(), key.to_object())).collect();
    document.operator_threshold = threshold;
    document.check().map_err(SiteError::format(file))?;
    let mut bytes = serde_json::to_vec_pretty(&document).expect("a site has string keys only");
    bytes.push(b'\n');
    let mut batch = Batch::default();
    batch.write(&site.repo().join("targets").join(format!("{}.site.json", hex::sha256(&bytes))), &bytes, PUBLIC)?;
    sign_site(&site, &state, now, &bytes)?.write(&site, batch)?;
    serve(&site, now)
}
