//! `kiln release prune`: old releases are taken out of an image's list, and later their artifacts out of `repo/`.
//!
//! First it is noted what goes, then the list is signed anew, then machines are served it; only after that anything is
//! deleted, and only what no state that a machine may still read names. Killed anywhere, nothing is missing that is
//! named.

use crate::files::{Batch, PUBLIC, read_capped, write_atomic};
use crate::repository::{newest_state, release_of, served_state};
use crate::signing::{Draft, Signing, Waiting, role_of, serve};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::{SignedDuration, Timestamp};
use kiln_release::tuf::{Outcome, TargetPath};
use kiln_release::{Manifest, is_image_name};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Far more than its one line per release comes to.
const MAX_RECORD: u64 = 64 << 20;

/// What to take out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PruneOptions {
    /// Of which image.
    pub image: String,
    /// So many of its newest releases stay; the newest always does.
    pub keep: usize,
    /// Artifacts go when their release has been out of the list for so long. None: with the next prune.
    pub grace: Option<SignedDuration>,
    /// Only say what would be taken out.
    pub dry_run: bool,
}

/// What a prune did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Taken out of the list.
    pub removed: Vec<u64>,
    /// Old enough, and kept because machines need them.
    pub needed: Vec<u64>,
    /// Files deleted, and their bytes.
    pub deleted: (usize, u64),
    /// Releases out of the list whose artifacts are still there.
    pub waiting: usize,
    /// Machines are served the new list. False where the online key is not on this machine.
    pub served: bool,
    /// People must sign first: nothing is taken out yet.
    pub request: Option<Waiting>,
}

/// Takes old releases out of an image's list. `needed` says which ones of those machines need; it is asked when the list is
/// read and nobody else can publish.
pub fn prune<E: From<SiteError>>(
    site: &SiteDir,
    options: &PruneOptions,
    now: Timestamp,
    needed: impl FnOnce(&[u64]) -> Result<BTreeSet<u64>, E>,
) -> Result<Pruned, E> {
    let PruneOptions { image, keep, grace, dry_run } = options;
    let _lock = site.lock_offline()?;
    let before = newest_state(site, now)?;
    let role = before.roles.get(&role_of(image)).filter(|_| is_image_name(image));
    let role = role.ok_or_else(|| SiteError::NoSuchImage { image: image.clone() })?;
    let mut listed: Vec<u64> = role.targets.keys().filter_map(|path| release_of(path)).map(|(_, n)| n).collect();
    listed.sort_unstable();
    listed.truncate(listed.len().saturating_sub((*keep).max(1)));
    let needed = needed(&listed)?;
    let (needed, removed): (Vec<u64>, Vec<u64>) = listed.into_iter().partition(|release| needed.contains(release));
    let mut pruned = Pruned { removed, needed, ..Pruned::default() };
    if *dry_run {
        return Ok(pruned);
    }

    let mut record = Record::read(site)?;
    // Noted by a prune that got no further: what is still listed was not taken out.
    record.retired.retain(|retired| !before.targets.contains_key(&retired.manifest()));
    let earlier = record.retired.len();
    for release in &pruned.removed {
        record.retire(site, &before, image, *release, now)?;
    }
    if !pruned.removed.is_empty() {
        record.write(site)?;
        let mut draft = Draft::on(site, &before, now, format!("prune {image}"))?;
        let gone = |path: &String| release_of(path).is_some_and(|(_, n)| pruned.removed.contains(&n));
        draft.image(image)?.targets.retain(|path, _| !gone(path));
        match draft.sign()? {
            Signing::Complete(change) => change.write(site, Batch::default())?,
            Signing::Open(waiting) => return Ok(Pruned { request: Some(waiting), ..pruned }),
        }
    }
    pruned.served = serve(site, now)?;

    let after = newest_state(site, now)?;
    // Without a timestamp that verifies nobody knows what machines read: then all of it stays.
    if let Ok(served) = served_state(site, now) {
        let due = |at: usize, retired: &Retired| {
            let time = match grace {
                None => at < earlier,
                Some(grace) => retired.at.saturating_add(*grace).is_ok_and(|end| end <= now),
            };
            // What is still served stays, and stays noted: it goes with a later prune.
            time && !served.targets.contains_key(&retired.manifest())
        };
        let retired = std::mem::take(&mut record.retired).into_iter().enumerate();
        let (due, waiting): (Vec<_>, Vec<_>) = retired.partition(|(at, retired)| due(*at, retired));
        record.retired = waiting.into_iter().map(|(_, retired)| retired).collect();
        let states = [&after, &before, &served];
        let mut named: BTreeSet<TargetPath> = record.retired.iter().flat_map(|r| r.files.iter().cloned()).collect();
        for state in [&after, &served] {
            for path in state.targets.keys().filter(|path| release_of(path).is_some()) {
                named.extend(files_of(site, state, path)?);
            }
        }
        for file in due.iter().flat_map(|(_, retired)| &retired.files).filter(|file| !named.contains(*file)) {
            delete(site, file.as_str(), &mut pruned.deleted)?;
        }
        for file in superseded(site, &states)? {
            delete(site, &file, &mut pruned.deleted)?;
        }
        record.write(site)?;
    }
    pruned.waiting = record.retired.len();
    Ok(pruned)
}

/// Noted releases leave their lists now, and not when that was proposed: so long machines were served them.
pub(crate) fn taken_out(
    site: &SiteDir,
    releases: &BTreeMap<String, BTreeSet<u64>>,
    now: Timestamp,
) -> Result<(), SiteError> {
    if releases.is_empty() {
        return Ok(());
    }
    let mut record = Record::read(site)?;
    for retired in &mut record.retired {
        if releases.get(&retired.image).is_some_and(|numbers| numbers.contains(&retired.release)) {
            retired.at = now;
        }
    }
    record.write(site)
}

/// What was taken out: `offline/pruned.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The highest release ever taken out, by image: no number is used again.
    highest: BTreeMap<String, u64>,
    /// Releases whose artifacts are still in `repo/`, in the order they were taken out.
    retired: Vec<Retired>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Retired {
    image: String,
    release: u64,
    /// When it was taken out.
    at: Timestamp,
    /// Its files, under `repo/`.
    files: Vec<TargetPath>,
}

impl Retired {
    fn manifest(&self) -> String {
        format!("{}/{}/manifest.json", self.image, self.release)
    }
}

impl Record {
    fn path(site: &SiteDir) -> PathBuf {
        site.path.join("offline/pruned.json")
    }

    pub(crate) fn read(site: &SiteDir) -> Result<Self, SiteError> {
        let path = Self::path(site);
        match read_capped(&path, MAX_RECORD)? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| SiteError::PruneRecord { path, reason: error.to_string() }),
            None => Ok(Self::default()),
        }
    }

    fn write(&self, site: &SiteDir) -> Result<(), SiteError> {
        let text = serde_json::to_vec_pretty(self).expect("plain structs have a JSON form");
        write_atomic(&Self::path(site), &text, PUBLIC)
    }

    /// That a release which is not listed was not taken out before.
    pub(crate) fn check_new(&self, image: &str, release: u64) -> Result<(), SiteError> {
        match self.highest.get(image) {
            Some(&highest) if release <= highest => {
                Err(SiteError::NumberUsed { image: image.to_owned(), release, highest })
            }
            Some(_) | None => Ok(()),
        }
    }

    fn retire(
        &mut self,
        site: &SiteDir,
        state: &Outcome,
        image: &str,
        release: u64,
        at: Timestamp,
    ) -> Result<(), SiteError> {
        let mut retired = Retired { image: image.to_owned(), release, at, files: Vec::new() };
        retired.files = files_of(site, state, &retired.manifest())?;
        let highest = self.highest.entry(retired.image.clone()).or_default();
        *highest = release.max(*highest);
        self.retired.push(retired);
        Ok(())
    }
}

/// The files under `repo/` that a listed release consists of.
fn files_of(site: &SiteDir, state: &Outcome, path: &str) -> Result<Vec<TargetPath>, SiteError> {
    let (Some(target), Some((image, release))) = (state.targets.get(path), release_of(path)) else {
        return Ok(Vec::new());
    };
    let format = SiteError::format(site.repo().join("targets").join(path));
    let manifest = Manifest::read(&target.bytes, image, release).map_err(format)?;
    let Manifest { uki, kernel, initramfs, root, extra, sbom, .. } = &manifest;
    let artifacts = [Some(uki), Some(kernel), Some(initramfs), Some(root), extra.as_ref(), sbom.as_ref()];
    let mut files: Vec<String> = artifacts.into_iter().flatten().map(|a| format!("a/{}", a.sha256)).collect();
    files.push(format!("b/{}/kiln.efi", uki.sha256));
    files.push(format!("targets/{image}/{release}/{}.manifest.json", target.sha256));
    files.into_iter().map(|file| TargetPath::new(file).map_err(SiteError::metadata(site))).collect()
}

/// Metadata that the first of these states replaced and none of them names. Roots stay: machines walk their chain.
fn superseded(site: &SiteDir, states: &[&Outcome; 3]) -> Result<Vec<String>, SiteError> {
    let version_of = |state: &Outcome, file: &str| match file {
        "snapshot.json" => Some(state.snapshot.version),
        _ => state.snapshot.meta.get(file).map(|meta| meta.version),
    };
    let folder = site.repo().join("metadata");
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).map_err(SiteError::io("list", &folder))? {
        let name = entry.map_err(SiteError::io("list", &folder))?.file_name().to_string_lossy().into_owned();
        let Some((Ok(version), file)) = name.split_once('.').map(|(n, file)| (n.parse::<u64>(), file)) else {
            continue;
        };
        let older = version_of(states[0], file).is_some_and(|newest| version < newest);
        if older && !states.iter().any(|state| version_of(state, file) == Some(version)) {
            found.push(format!("metadata/{name}"));
        }
    }
    Ok(found)
}

/// Deletes a file of `repo/`, and the folders that were its own.
fn delete(site: &SiteDir, file: &str, (files, bytes): &mut (usize, u64)) -> Result<(), SiteError> {
    let path = site.repo().join(file);
    // Of two names the first to go frees nothing.
    let freed = fs::symlink_metadata(&path).map_or(0, |meta| if meta.nlink() > 1 { 0 } else { meta.len() });
    match fs::remove_file(&path) {
        Ok(()) => (*files, *bytes) = (*files + 1, *bytes + freed),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(SiteError::io("delete", &path)(error)),
    }
    if file.matches('/').count() > 1
        && let Some(folder) = path.parent()
    {
        let _ = fs::remove_dir(folder); // it stays while something is in it
    }
    Ok(())
}
