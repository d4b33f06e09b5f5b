//! What is published: the repository's metadata, verified whole before anything of it is used, and timestamp.json.
//!
//! The server adopts a snapshot only after the TUF client accepted it together with the timestamp that would name it; only
//! then that timestamp is written. What it has seen it keeps in the database, so a repository that goes back is
//! refused here too. Artifacts are not read: their hashes are the manifests', and whoever boots them checks.

use crate::error::{CatalogError, SiteError};
use crate::site::Site;
use jiff::{SignedDuration, Timestamp};
use kiln_protocol::{ImageName, ReleaseId, Sha256Hex};
use kiln_release::tuf::{Client, ExpiryPolicy, Fetched, Limits, Request, Seen, TimestampRole, Wanted};
use kiln_release::{Manifest, Signer, sign_envelope};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// How long a timestamp holds.
const TIMESTAMP_LIFE: SignedDuration = SignedDuration::from_hours(24);
/// So many of the newest snapshots are tried.
const CANDIDATES: usize = 3;
/// A timestamp is signed anew when it is so old.
const TIMESTAMP_RENEW: SignedDuration = SignedDuration::from_hours(1);

/// One published release.
#[derive(Debug, Clone)]
pub struct Release {
    /// Its verified manifest.
    pub manifest: Manifest,
    /// SHA-256 of the manifest's bytes.
    pub manifest_sha256: Sha256Hex,
}

/// One expiry date of the metadata.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Expiry {
    /// The file.
    pub file: String,
    /// When it expires.
    pub expires: Timestamp,
}

/// Everything published, as one verified state of the repository.
#[derive(Debug, Clone)]
pub struct Catalog {
    /// All releases.
    pub releases: BTreeMap<ReleaseId, Release>,
    /// The site's own object.
    pub site: kiln_release::Site,
    /// Version of the snapshot.
    pub snapshot: u64,
    /// What to remember.
    pub seen: Seen,
    /// The newest root's text: what is trusted next time.
    pub root: String,
    /// When the metadata expires.
    pub expiries: Vec<Expiry>,
    /// Why a newer snapshot in the repository was passed over.
    pub refused: Option<String>,
}

impl Catalog {
    /// The highest release of an image.
    pub fn newest(&self, image: &ImageName) -> Option<&ReleaseId> {
        self.releases.keys().rfind(|r| r.image == *image)
    }

    /// The release that boots with this UKI, kernel or initramfs.
    pub fn booted_by(&self, sha256: &str) -> Option<(&ReleaseId, &Release)> {
        self.releases.iter().find(|(_, r)| {
            let m = &r.manifest;
            m.uki.sha256 == sha256 || m.kernel.sha256 == sha256 || m.initramfs.sha256 == sha256
        })
    }
}

/// What is remembered of the repository between two looks.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// Trusted root; none: the site's first.
    pub root: Option<String>,
    /// Versions seen.
    pub seen: Seen,
}

/// Reads the repository, verifies all of it, and writes timestamp.json where it has to be newer. Blocking.
pub fn adopt(site: &Site, key: &Signer, memory: &Memory, now: Timestamp) -> Result<Catalog, CatalogError> {
    let metadata = site.metadata();
    let trusted = match &memory.root {
        Some(root) => root.clone(),
        None => {
            let path = metadata.join("1.root.json");
            std::fs::read_to_string(&path).map_err(|source| SiteError::Read { path, source })?
        }
    };
    // Whoever published may have signed a timestamp already (a lab's key is at hand). It is kept if it holds.
    let current = read_capped(&metadata.join("timestamp.json"), 1 << 20)?;
    let old: Option<TimestampRole> = current.as_deref().and_then(signed_part);
    let newest_version = old.as_ref().map_or(0, |t| t.version);
    let versions = snapshot_versions(&metadata)?;
    let mut refused = None;
    for snapshot_version in versions.iter().copied().take(CANDIDATES) {
        let current = current.as_deref().filter(|_| {
            old.as_ref().is_some_and(|t| {
                t.expires.duration_since(now) > TIMESTAMP_LIFE - TIMESTAMP_RENEW
                    && t.meta.values().any(|m| m.version == snapshot_version)
            })
        });
        if let Some(bytes) = current
            && let Ok(catalog) = verify(site, &trusted, memory, now, bytes)
        {
            return Ok(Catalog { refused, ..catalog });
        }
        let Some(bytes) = read_capped(&metadata.join(format!("{snapshot_version}.snapshot.json")), 1 << 20)? else {
            continue;
        };
        let version = newest_version.max(memory.seen.timestamp.as_ref().map_or(0, |s| s.version)) + 1;
        let expires = Timestamp::from_second((now + TIMESTAMP_LIFE).as_second()).unwrap_or(now);
        let text = sign_envelope(&TimestampRole::new(version, expires, snapshot_version, &bytes), &[key])?;
        match verify(site, &trusted, memory, now, text.as_bytes()) {
            Ok(catalog) => {
                site.replace(&metadata.join("timestamp.json"), text.as_bytes())?;
                return Ok(Catalog { refused, ..catalog });
            }
            // A publisher may be half through, or somebody laid a file there: what was good stays good.
            Err(error) => refused.get_or_insert(error.to_string()),
        };
    }
    match refused {
        Some(reason) => Err(CatalogError::Format { path: metadata.display().to_string(), reason }),
        None => Err(CatalogError::NoSnapshot { dir: metadata }),
    }
}

/// What tells that a look is worth it: names in the metadata directory, and the timestamp's age.
pub fn fingerprint(site: &Site) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(site.metadata())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "timestamp.json" {
            // Its version may have been set back by a publisher that began before the last signing here.
            names.push(format!("{name} {:?}", entry.metadata()?.modified()?));
        } else if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn verify(site: &Site, root: &str, memory: &Memory, now: Timestamp, timestamp: &[u8]) -> Result<Catalog, CatalogError> {
    let repo = site.repo();
    let mut client = Client::new(
        root.as_bytes(),
        memory.seen.clone(),
        now,
        Limits::default(),
        ExpiryPolicy::ReportStale,
        Wanted::All,
    )?;
    while let Request::Fetch { path, max_bytes, may_be_absent: _ } = client.next() {
        let fetched = if path == "metadata/timestamp.json" {
            Fetched::Bytes(timestamp.to_vec())
        } else {
            match read_capped(&repo.join(&path), max_bytes)? {
                Some(bytes) if bytes.len() as u64 > max_bytes => Fetched::TooLong,
                Some(bytes) => Fetched::Bytes(bytes),
                None => Fetched::Absent,
            }
        };
        client.feed(fetched)?;
    }
    let outcome = client.finish()?;
    let mut releases = BTreeMap::new();
    let mut site_object = None;
    for (path, target) in &outcome.targets {
        let fail = |reason: String| CatalogError::Format { path: path.clone(), reason };
        if path == "site.json" {
            site_object = Some(kiln_release::Site::read(&target.bytes).map_err(|e| fail(e.to_string()))?);
            continue;
        }
        let Some((image, number)) = path.strip_suffix("/manifest.json").and_then(|p| p.split_once('/')) else {
            continue; // a target of a later kiln
        };
        let id: ReleaseId = format!("{image}/{number}").parse().map_err(|e| fail(format!("{e}")))?;
        let manifest = Manifest::read(&target.bytes, image, id.release).map_err(|e| fail(e.to_string()))?;
        let manifest_sha256 = target.sha256.parse().map_err(|e| fail(format!("{e}")))?;
        releases.insert(id, Release { manifest, manifest_sha256 });
    }
    let site_object = site_object
        .ok_or_else(|| CatalogError::Format { path: "site.json".into(), reason: "no role lists it".into() })?;
    Ok(Catalog {
        releases,
        site: site_object,
        snapshot: outcome.snapshot.version,
        root: String::from_utf8_lossy(&outcome.root_bytes).into_owned(),
        expiries: outcome.expiries.iter().map(|e| Expiry { file: e.file.clone(), expires: e.expires }).collect(),
        seen: outcome.seen,
        refused: None,
    })
}

/// The signed part of an envelope, unverified: only to know which version to exceed.
fn signed_part(bytes: &[u8]) -> Option<TimestampRole> {
    let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    serde_json::from_value(value.get("signed")?.clone()).ok()
}

/// Versions of the snapshots there are, the newest first.
fn snapshot_versions(dir: &Path) -> Result<Vec<u64>, CatalogError> {
    let read = |source| SiteError::Read { path: dir.to_owned(), source };
    let mut versions = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(read)? {
        let name = entry.map_err(read)?.file_name();
        let version = name.to_str().and_then(|n| n.strip_suffix(".snapshot.json")).and_then(|n| n.parse::<u64>().ok());
        versions.extend(version);
    }
    versions.sort_unstable_by(|a, b| b.cmp(a));
    Ok(versions)
}

/// At most one byte more than `max`; none if there is no such file.
fn read_capped(path: &Path, max: u64) -> Result<Option<Vec<u8>>, SiteError> {
    use std::io::Read;
    let fail = |source| SiteError::Read { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(e)),
    };
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).map_err(fail)?;
    Ok(Some(bytes))
}
