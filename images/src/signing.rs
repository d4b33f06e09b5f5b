//! An image's delegation signed anew, with the snapshot that names it: what publishing and pruning have in common.

use crate::files::{Batch, PUBLIC};
use crate::repository::{Memory, Overlay, Repository, verify_snapshot};
use crate::site::{OFFLINE_LIFETIME, SiteDir, after, new_key, read_key, sign, write_key};
use crate::site_error::SiteError;
use jiff::{SignedDuration, Timestamp};
use kiln_release::Signer;
use kiln_release::tuf::{Limits, MetaFile, Outcome, Snapshot, TargetFile, TargetPath, Targets};
use std::collections::BTreeMap;

/// What is signed offline is signed anew when less than this is left of it.
const RENEW_BELOW: SignedDuration = SignedDuration::from_hours(180 * 24);

/// New metadata, signed and verified, not yet in the repository.
pub(crate) struct Signed {
    /// The snapshot last: before it nothing else counts.
    files: Overlay,
    /// Length of the delegation.
    pub(crate) delegation: u64,
}

impl Signed {
    /// Puts it into the repository. What `batch` holds becomes part of it with the last file.
    pub(crate) fn write(&self, site: &SiteDir, mut batch: Batch) -> Result<(), SiteError> {
        for (file, bytes) in &self.files {
            batch.write(&site.repo().join(file), bytes, PUBLIC)?;
        }
        batch.keep();
        Ok(())
    }
}

/// The TUF role of an image.
pub(crate) fn role_of(image: &str) -> String {
    format!("image-{image}")
}

/// Delegation, targets where it changes, snapshot: signed, and verified as a machine would.
pub(crate) fn sign_image(
    site: &SiteDir,
    state: &Outcome,
    image: &str,
    now: Timestamp,
    edit: impl FnOnce(&mut BTreeMap<String, TargetFile>),
) -> Result<Signed, SiteError> {
    let role = role_of(image);
    let expires = after(now, OFFLINE_LIFETIME);
    let key = image_key(site, state, &role)?;
    let mut files = Overlay::new();
    let mut snapshot = Snapshot::new(state.snapshot.version + 1, expires);
    snapshot.meta.clone_from(&state.snapshot.meta);
    let mut add = |name: &str, version: u64, text: String| {
        snapshot.list(name, version, text.as_bytes());
        files.push((format!("metadata/{version}.{name}.json"), text.into_bytes()));
    };

    let mut delegation = state.roles.get(&role).cloned().unwrap_or_else(|| Targets::new(0, expires));
    delegation.version += 1;
    delegation.expires = Targets::new(0, expires).expires;
    edit(&mut delegation.targets);
    let text = sign(&role, &delegation, &[&key])?;
    let (bytes, limit) = (text.len() as u64, Limits::default().delegation);
    if bytes > limit {
        return Err(SiteError::ListFull { image: image.to_owned(), bytes, limit });
    }
    add(&role, delegation.version, text);

    if let Some(old) = state.roles.get(Targets::TYPE) {
        let mut top = old.clone();
        top.delegate(&role, &[key.public()], 1, vec![format!("{image}/*/manifest.json")], true);
        if top != *old || old.expires < after(now, RENEW_BELOW) {
            top.version += 1;
            top.expires = Targets::new(0, expires).expires;
            let key = read_key(&site.offline_key("targets"), "delegate to a new image")?;
            add(Targets::TYPE, top.version, sign(Targets::TYPE, &top, &[&key])?);
        }
    }

    Ok(Signed { delegation: bytes, ..finish(site, state, now, &snapshot, files)? })
}

/// Signs the snapshot, and verifies the whole against the versions of the state before: what a machine that saw it
/// would say.
fn finish(
    site: &SiteDir,
    state: &Outcome,
    now: Timestamp,
    snapshot: &Snapshot,
    mut files: Overlay,
) -> Result<Signed, SiteError> {
    let version = snapshot.version;
    let key = read_key(&site.offline_key("snapshot"), "sign the snapshot")?;
    let text = sign(Snapshot::TYPE, snapshot, &[&key])?.into_bytes();
    let meta = MetaFile::of(version, &text);
    files.push((format!("metadata/{version}.snapshot.json"), text));
    verify_snapshot(site, &files, meta, state.seen.clone(), now)?;
    Ok(Signed { files, delegation: 0 })
}

/// Targets with this `site.json`, snapshot: signed, and verified as a machine would.
pub(crate) fn sign_site(site: &SiteDir, state: &Outcome, now: Timestamp, document: &[u8]) -> Result<Signed, SiteError> {
    let expires = after(now, OFFLINE_LIFETIME);
    let old = state.roles.get(Targets::TYPE).ok_or_else(|| SiteError::NotASite { dir: site.path.clone() })?;
    let mut top = old.clone();
    top.targets.insert(TargetPath::site().to_string(), TargetFile::of(document));
    top.version += 1;
    top.expires = Targets::new(0, expires).expires;
    let key = read_key(&site.offline_key("targets"), "sign site.json")?;
    let text = sign(Targets::TYPE, &top, &[&key])?;
    let mut snapshot = Snapshot::new(state.snapshot.version + 1, expires);
    snapshot.meta.clone_from(&state.snapshot.meta);
    snapshot.list(Targets::TYPE, top.version, text.as_bytes());
    let files = vec![(format!("metadata/{}.{}.json", top.version, Targets::TYPE), text.into_bytes())];
    finish(site, state, now, &snapshot, files)
}

/// The image's key; made when the image is published for the first time.
fn image_key(site: &SiteDir, state: &Outcome, role: &str) -> Result<Signer, SiteError> {
    let path = site.offline_key(role);
    match read_key(&path, "sign releases of this image") {
        Err(SiteError::NoKey { .. }) if !state.roles.contains_key(role) => {
            let key = new_key()?;
            write_key(&path, &key)?;
            Ok(key)
        }
        other => other,
    }
}

/// Signs a timestamp over the newest snapshot, if its key is on this machine.
pub(crate) fn serve(site: &SiteDir, now: Timestamp) -> Result<bool, SiteError> {
    match site.timestamp_key() {
        Ok(key) => Repository::adopt(site, &key, &Memory::default(), now).map(|_| true),
        Err(SiteError::NoKey { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}
