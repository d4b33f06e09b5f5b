//! A site's repository as its own machines see it: read through the same client, from files instead of HTTP.
//!
//! The anchor is the first root in `repo/metadata`: whoever can change that file owns the site directory anyhow.

use crate::files::{PUBLIC, read_capped, write_atomic};
use crate::site::{SiteDir, TIMESTAMP_LIFETIME, after, read_key, sign};
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::tuf::{
    Client, Expiry, ExpiryPolicy, Fetched, Limits, MetaFile, Outcome, Request, Seen, TargetPath, TimestampRole, Wanted,
};
use kiln_release::{Manifest, Signer, Site, TufError, Unverified};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A published release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Its image.
    pub image: String,
    /// Its number.
    pub release: u64,
    /// SHA-256 of the manifest's bytes, which an assignment names.
    pub manifest_sha256: String,
    /// What it is made of.
    pub manifest: Manifest,
}

/// A verified repository.
#[derive(Debug, Clone)]
pub struct Repository {
    /// The signed settings of the site.
    pub site: Site,
    /// Every release, by image and number.
    pub releases: Vec<Release>,
    /// Text of the newest root: the trust root for new images.
    pub trust_root: String,
    /// What is expired now; machines may go on with what they run, and start nothing else.
    pub stale: Vec<Expiry>,
    /// Every file's expiry.
    pub expiries: Vec<Expiry>,
    /// Version of the snapshot it shows.
    pub snapshot_version: u64,
}

impl Repository {
    /// Reads and verifies what machines are served now.
    pub fn open(dir: impl AsRef<Path>, now: Timestamp) -> Result<Self, SiteError> {
        let site = SiteDir::open(dir.as_ref())?;
        let client = Client::new(
            &anchor(&site)?,
            Seen::default(),
            now,
            Limits::default(),
            ExpiryPolicy::ReportStale,
            Wanted::All,
        )
        .map_err(SiteError::metadata(site.repo()))?;
        let outcome = run(&site, &Overlay::default(), client)?;
        Self::from_outcome(&site, outcome)
    }

    /// One release.
    pub fn release(&self, image: &str, release: u64) -> Option<&Release> {
        self.releases.iter().find(|known| known.image == image && known.release == release)
    }

    /// The highest release of an image.
    pub fn highest(&self, image: &str) -> Option<&Release> {
        self.releases.iter().filter(|known| known.image == image).max_by_key(|known| known.release)
    }

    fn from_outcome(dir: &SiteDir, outcome: Outcome) -> Result<Self, SiteError> {
        let format = |path: &str| SiteError::format(dir.repo().join("targets").join(path));
        let missing = |path: &str| SiteError::metadata(dir.repo())(TufError::TargetNotListed { path: path.to_owned() });
        let site_path = TargetPath::site();
        let site = outcome.targets.get(site_path.as_str()).ok_or_else(|| missing(site_path.as_str()))?;
        let site = Site::read(&site.bytes).map_err(format(site_path.as_str()))?;
        let mut releases = Vec::new();
        for (path, target) in &outcome.targets {
            let Some((image, release)) = release_of(path) else { continue };
            let manifest = Manifest::read(&target.bytes, image, release).map_err(format(path))?;
            releases.push(Release {
                image: image.to_owned(),
                release,
                manifest_sha256: target.sha256.clone(),
                manifest,
            });
        }
        releases.sort_by(|a, b| (&a.image, a.release).cmp(&(&b.image, b.release)));
        Ok(Self {
            site,
            releases,
            trust_root: String::from_utf8_lossy(&outcome.root_bytes).into_owned(),
            stale: outcome.stale,
            expiries: outcome.expiries,
            snapshot_version: outcome.snapshot.version,
        })
    }
}

/// `NAME/N/manifest.json`, N in its one decimal form.
fn release_of(path: &str) -> Option<(&str, u64)> {
    let (image, rest) = path.split_once('/')?;
    let number = rest.strip_suffix("/manifest.json")?;
    let release = number.parse::<u64>().ok()?;
    (release.to_string() == number).then_some((image, release))
}

/// Files that are to be written, seen as if they were there.
pub(crate) type Overlay = BTreeMap<String, Vec<u8>>;

pub(crate) fn anchor(site: &SiteDir) -> Result<Vec<u8>, SiteError> {
    read_capped(&site.metadata("1.root.json"), Limits::default().root)?
        .ok_or_else(|| SiteError::NotASite { dir: site.path.clone() })
}

/// Feeds a client from the repository's files.
pub(crate) fn run(site: &SiteDir, overlay: &Overlay, mut client: Client) -> Result<Outcome, SiteError> {
    while let Request::Fetch { path, max_bytes, may_be_absent: _ } = client.next() {
        let bytes = match overlay.get(&path) {
            Some(bytes) => Some(bytes.clone()),
            None => read_capped(&site.repo().join(&path), max_bytes)?,
        };
        client.feed(bytes.map_or(Fetched::Absent, Fetched::Bytes)).map_err(SiteError::metadata(site.repo()))?;
    }
    client.finish().map_err(SiteError::metadata(site.repo()))
}

/// The state a snapshot describes, verified, whatever the timestamp says.
pub(crate) fn verify_snapshot(
    site: &SiteDir,
    overlay: &Overlay,
    snapshot: MetaFile,
    seen: Seen,
    now: Timestamp,
) -> Result<Outcome, SiteError> {
    let policy = ExpiryPolicy::ReportStale;
    let client = Client::from_snapshot(&anchor(site)?, seen, now, Limits::default(), policy, Wanted::All, snapshot)
        .map_err(SiteError::metadata(site.repo()))?;
    run(site, overlay, client)
}

/// The newest snapshot in `repo/metadata` that verifies with all it lists. One that does not is passed over: a
/// publisher may be writing it.
pub(crate) fn newest_state(site: &SiteDir, now: Timestamp) -> Result<(Outcome, Vec<u8>), SiteError> {
    let folder = site.repo().join("metadata");
    let mut versions = Vec::new();
    for entry in fs::read_dir(&folder).map_err(SiteError::io("list", &folder))? {
        let name = entry.map_err(SiteError::io("list", &folder))?.file_name();
        versions.extend(name.to_string_lossy().strip_suffix(".snapshot.json").and_then(|n| n.parse::<u64>().ok()));
    }
    versions.sort_unstable();
    let mut first_error = None;
    for version in versions.into_iter().rev() {
        let file = format!("{version}.snapshot.json");
        let Some(bytes) = read_capped(&site.metadata(&file), Limits::default().snapshot)? else { continue };
        match verify_snapshot(site, &Overlay::default(), MetaFile::of(version, &bytes), Seen::default(), now) {
            Ok(outcome) => return Ok((outcome, bytes)),
            Err(SiteError::Metadata { source, .. }) => {
                tracing::warn!(%file, error = %source, "snapshot passed over: it does not verify");
                first_error.get_or_insert((file, source));
            }
            Err(other) => return Err(other),
        }
    }
    Err(match first_error {
        Some((file, source)) => SiteError::NoSnapshot { dir: folder, file, source },
        None => SiteError::NotASite { dir: site.path.clone() },
    })
}

/// A timestamp that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refreshed {
    /// Its version.
    pub version: u64,
    /// Version of the snapshot it covers.
    pub snapshot_version: u64,
    /// When it expires.
    pub expires: Timestamp,
    /// What of the files signed offline is expired already.
    pub stale: Vec<Expiry>,
}

/// Writes a new `timestamp.json` over the newest snapshot that verifies, with `online/timestamp.key`.
pub fn refresh_timestamp(dir: impl AsRef<Path>, now: Timestamp) -> Result<Refreshed, SiteError> {
    let site = SiteDir::open(dir.as_ref())?;
    let key = read_key(&site.online("timestamp.key"), "sign timestamp.json")?;
    let (state, snapshot) = newest_state(&site, now)?;
    write_timestamp(&site, &key, &state, &snapshot, now)
}

pub(crate) fn write_timestamp(
    site: &SiteDir,
    key: &Signer,
    state: &Outcome,
    snapshot: &[u8],
    now: Timestamp,
) -> Result<Refreshed, SiteError> {
    let path = site.metadata("timestamp.json");
    // Machines refuse a version that goes back, so that it counts on from the last one, expired or not. One that
    // cannot be read as ours is replaced from the start.
    let keys = state.root.key_set(&state.root.roles.timestamp);
    let last = read_capped(&path, Limits::default().timestamp)?
        .and_then(|bytes| Unverified::<TimestampRole>::parse(&bytes, Limits::default().timestamp).ok())
        .and_then(|envelope| envelope.verify_type(&keys, TimestampRole::TYPE).ok())
        .map_or(0, |last| last.version);
    let expires = after(now, TIMESTAMP_LIFETIME);
    let timestamp = TimestampRole::new(last + 1, expires, state.snapshot.version, snapshot);
    let text = sign("timestamp", &timestamp, &[key])?;
    if !keys.contains(&key.public().id()) {
        let file = "metadata/timestamp.json".to_owned();
        let source = TufError::BadSignature { file, expected: keys.threshold(), got: 0 };
        return Err(SiteError::metadata(site.repo())(source));
    }
    write_atomic(&path, text.as_bytes(), PUBLIC)?;
    Ok(Refreshed {
        version: timestamp.version,
        snapshot_version: state.snapshot.version,
        expires: timestamp.expires,
        stale: state.stale_at(now),
    })
}

/// The director's key, for the server: signs assignments and freshness replies.
#[derive(Debug)]
pub struct Director {
    key: Signer,
}

impl Director {
    /// Reads `online/director.key` and demands that the site names it.
    pub fn open(dir: impl AsRef<Path>, site: &Site) -> Result<Self, SiteError> {
        let path = SiteDir::open(dir.as_ref())?.online("director.key");
        let key = read_key(&path, "sign assignments")?;
        let keyid = key.public().id();
        if site.director_keys().contains(&keyid) {
            Ok(Self { key })
        } else {
            Err(SiteError::NotTheDirector { path, keyid })
        }
    }

    /// Text of the signed envelope of an assignment (`kiln_protocol::Assignment`).
    pub fn sign_assignment<T: serde::Serialize>(&self, assignment: &T) -> Result<String, SiteError> {
        sign("the assignment", assignment, &[&self.key])
    }

    /// Text of the signed envelope of a freshness reply (`kiln_protocol::Freshness`).
    pub fn sign_freshness<T: serde::Serialize>(&self, freshness: &T) -> Result<String, SiteError> {
        sign("the freshness reply", freshness, &[&self.key])
    }
}
