//! `kiln trust apply`: signatures come back, and with the last one the request goes live.
//!
//! Until then nothing that machines are served has changed. Killed anywhere, the same command does the rest: the request
//! is removed last.

use crate::files::Batch;
use crate::keys::promote_all;
use crate::prune::taken_out;
use crate::publish::place_release;
use crate::repository::newest_state;
use crate::request::Request;
use crate::signing::{Change, Waiting, serve};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::tuf::Root;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// More signatures are needed.
    Waiting(Waiting),
    /// It is in the repository.
    Done {
        /// What it was called.
        name: String,
        /// Machines see it now. False where the online key is not on this machine.
        served: bool,
    },
}

/// What a request takes away from machines. Days may have passed since it was made: whether a machine needs any of it now is
/// asked when it is applied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TakenAway {
    /// Floors that go up, by image.
    pub floors: BTreeMap<String, u64>,
    /// Releases that are no longer listed, by image. Empty where the list is in place already.
    pub releases: BTreeMap<String, BTreeSet<u64>>,
}

/// Takes signatures from these files into the open request, and applies it when none is lacking. `may` is asked before anything
/// is taken away; what it gives is held until the end.
pub fn apply<E: From<SiteError>, Held>(
    dir: &Path,
    files: &[PathBuf],
    now: Timestamp,
    may: impl FnOnce(&TakenAway) -> Result<Held, E>,
) -> Result<Applied, E> {
    let site = SiteDir::open(dir)?;
    let _lock = site.lock_offline()?;
    let mut request = site.read_open_request()?.ok_or_else(|| SiteError::NoOpenRequest { dir: dir.into() })?;
    for file in files {
        request.merge(&Request::read(file)?)?;
    }
    request.write(&site.open_request())?;
    let lacking = request.lacking()?;
    if !lacking.is_empty() {
        return Ok(Applied::Waiting(Waiting::of(&site, &request, &lacking)));
    }
    let releases = if is_put(&site, &request) { BTreeMap::new() } else { request.removed_releases()? };
    let away = TakenAway { floors: request.raised_floors()?, releases };
    let _held = if away == TakenAway::default() { None } else { Some(may(&away)?) };
    taken_out(&site, &away.releases, now)?;
    put(&site, &request, now)?;
    let served = serve(&site, now)?;
    promote_all(&site, &newest_state(&site, now)?)?;
    remove(&site)?;
    Ok(Applied::Done { name: request.name, served })
}

/// Killed after the last file and before the request was removed.
fn is_put(site: &SiteDir, request: &Request) -> bool {
    request.documents.iter().all(|d| fs::read_to_string(site.repo().join(&d.path)).is_ok_and(|t| t == d.text()))
}

fn put(site: &SiteDir, request: &Request, now: Timestamp) -> Result<(), SiteError> {
    if is_put(site, request) {
        return Ok(());
    }
    let first = request.roots.is_empty() && request.document(Root::TYPE).is_some();
    let state = if first { None } else { Some(newest_state(site, now)?) };
    let change = Change::of(site, request, state.as_ref(), now)?;
    let mut batch = Batch::default();
    for (image, release) in request.added_releases()? {
        place_release(site, &image, release, &mut batch)?;
    }
    change.write(site, batch)
}

fn remove(site: &SiteDir) -> Result<(), SiteError> {
    let path = site.open_request();
    fs::remove_file(&path).map_err(SiteError::io("delete", &path))
}

/// Gives up the open request; what machines are served has not changed. Its name.
pub fn drop_request(dir: &Path) -> Result<String, SiteError> {
    let site = SiteDir::open(dir)?;
    let _lock = site.lock_offline()?;
    let request = site.read_open_request()?.ok_or_else(|| SiteError::NoOpenRequest { dir: dir.into() })?;
    remove(&site)?;
    Ok(request.name)
}
