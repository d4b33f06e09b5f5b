//! A site's repository as its own machines see it: read through the same client, from files instead of HTTP. The
//! builder, the publisher and the boot server all read it here.
//!
//! The anchor is the first root in `repo/metadata`, or the newest that a reader remembers: whoever can change that file
//! owns the site directory anyhow. Artifacts are not read: their hashes are the manifests', and whoever boots them
//! checks.

use crate::files::{PUBLIC, read_capped, write_atomic};
use crate::site::{SiteDir, TIMESTAMP_LIFETIME, after, sign};
use crate::site_error::SiteError;
use jiff::{SignedDuration, Timestamp};
use kiln_release::tuf::{
    Client, Expiry, ExpiryPolicy, Fetched, Limits, MetaFile, Outcome, Request, Root, Seen, TargetPath, TimestampRole,
    Wanted,
};
use kiln_release::{Manifest, Signer, Site, TufError, Unverified};
use std::fs;

/// A timestamp is signed anew when it is so old.
const TIMESTAMP_RENEW: SignedDuration = SignedDuration::from_hours(1);
/// So many of the newest snapshots are tried.
const CANDIDATES: usize = 3;
/// The one file that is made here rather than read.
const TIMESTAMP: &str = "metadata/timestamp.json";

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

/// One verified state of a repository.
#[derive(Debug, Clone)]
pub struct Repository {
    /// The signed settings of the site.
    pub site: Site,
    /// Every release, by image and number.
    pub releases: Vec<Release>,
    /// Text of the newest root: the trust root for new images, and for the next look.
    pub trust_root: String,
    /// What to remember until the next look.
    pub seen: Seen,
    /// Every file's expiry.
    pub expiries: Vec<Expiry>,
    /// Version of the snapshot it shows.
    pub snapshot: u64,
    /// Why a newer snapshot was passed over.
    pub refused: Option<String>,
}

/// What is remembered of the repository between two looks.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// Trusted root; none: the site's first.
    pub trust_root: Option<String>,
    /// Versions seen.
    pub seen: Seen,
}

impl Repository {
    /// The newest state that verifies, whether a timestamp covers it yet or not: what the next release follows.
    pub fn newest(site: &SiteDir, now: Timestamp) -> Result<Self, SiteError> {
        Self::of(site, &newest_state(site, now)?)
    }

    /// The newest state that verifies together with a timestamp, which is signed and written where there is none that
    /// fits or it grows old. So a snapshot is shown to machines only after it was read as a machine would read it.
    ///
    /// Of `keys` the one signs that the root names: while the key is being replaced there are two.
    pub fn adopt(site: &SiteDir, keys: &[Signer], memory: &Memory, now: Timestamp) -> Result<Self, SiteError> {
        let path = site.metadata("timestamp.json");
        // Whoever published may have signed one already (a lab's key is at hand). It is kept if it holds.
        let current = read_capped(&path, Limits::default().timestamp)?;
        let anchor = anchor(site, memory, &[])?;
        let (policy, mut refused) = (ExpiryPolicy::ReportStale, None);
        for version in snapshot_versions(site)?.into_iter().take(CANDIDATES) {
            let file = format!("{version}.snapshot.json");
            let Some(snapshot) = read_capped(&site.metadata(&file), Limits::default().snapshot)? else { continue };
            let client = Client::new(&anchor, memory.seen.clone(), now, Limits::default(), policy, Wanted::All);
            let mut made = None;
            let outcome = run(site, client, |root, path| {
                if path != TIMESTAMP {
                    return Ok(None);
                }
                let text = match next_timestamp(root, current.as_deref(), &memory.seen, (version, &snapshot), now) {
                    Next::Keep(bytes) => bytes.to_vec(),
                    Next::Sign(role) => {
                        let named = &root.roles.timestamp.keyids;
                        let key = keys.iter().find(|key| named.contains(&key.public().id()));
                        let key = key.ok_or_else(|| SiteError::NotTheTimestamp { dir: site.path.join("online") })?;
                        made.insert(sign("timestamp", &role, &[key])?).clone().into_bytes()
                    }
                };
                Ok(Some(text))
            });
            match outcome.and_then(|outcome| Self::of(site, &outcome)) {
                Ok(repository) => {
                    if let Some(text) = made {
                        write_atomic(&path, text.as_bytes(), PUBLIC)?;
                    }
                    return Ok(Self { refused: refused.map(|refused: Refused| refused.to_string()), ..repository });
                }
                // A publisher may be half through, or somebody laid a file there: what was good stays good.
                Err(error) => refused.get_or_insert(Refused::of(file, error)?),
            };
        }
        Err(none_verifies(site, refused))
    }

    /// The highest release of an image.
    pub fn highest(&self, image: &str) -> Option<&Release> {
        self.releases.iter().filter(|known| known.image == image).max_by_key(|known| known.release)
    }

    pub(crate) fn of(dir: &SiteDir, outcome: &Outcome) -> Result<Self, SiteError> {
        let format = |path: &str| SiteError::format(dir.repo().join("targets").join(path));
        let missing = |path: &str| SiteError::metadata(dir)(TufError::TargetNotListed { path: path.to_owned() });
        let site_path = TargetPath::site();
        let site = outcome.targets.get(site_path.as_str()).ok_or_else(|| missing(site_path.as_str()))?;
        let site = Site::read(&site.bytes).map_err(format(site_path.as_str()))?;
        let mut releases = Vec::new();
        for (path, target) in &outcome.targets {
            let Some((image, release)) = release_of(path) else { continue }; // a target of a later kiln
            let manifest = Manifest::read(&target.bytes, image, release).map_err(format(path))?;
            let (image, manifest_sha256) = (image.to_owned(), target.sha256.clone());
            releases.push(Release { image, release, manifest_sha256, manifest });
        }
        releases.sort_by(|a, b| (&a.image, a.release).cmp(&(&b.image, b.release)));
        Ok(Self {
            site,
            releases,
            trust_root: String::from_utf8_lossy(&outcome.root_bytes).into_owned(),
            seen: outcome.seen.clone(),
            expiries: outcome.expiries.clone(),
            snapshot: outcome.snapshot.version,
            refused: None,
        })
    }
}

/// `NAME/N/manifest.json`, N in its one decimal form.
pub(crate) fn release_of(path: &str) -> Option<(&str, u64)> {
    let (image, rest) = path.split_once('/')?;
    let number = rest.strip_suffix("/manifest.json")?;
    let release = number.parse::<u64>().ok()?;
    (release.to_string() == number).then_some((image, release))
}

enum Next<'a> {
    Keep(&'a [u8]),
    Sign(TimestampRole),
}

/// Whether the timestamp there is goes on, or what replaces it.
fn next_timestamp<'a>(
    root: &Root,
    current: Option<&'a [u8]>,
    seen: &Seen,
    (version, snapshot): (u64, &[u8]),
    now: Timestamp,
) -> Next<'a> {
    // One that the root's keys did not sign says nothing, not even which version to exceed.
    let keys = root.key_set(&root.roles.timestamp);
    let verified = current.and_then(|bytes| {
        let envelope = Unverified::<TimestampRole>::parse(bytes, Limits::default().timestamp).ok()?;
        Some((bytes, envelope.verify_type(&keys, TimestampRole::TYPE).ok()?))
    });
    // Machines refuse a version that goes back, so that it counts on from the highest, expired or not.
    let seen = seen.timestamp.as_ref().map_or(0, |seen| seen.version);
    let last = verified.as_ref().map_or(0, |(_, timestamp)| timestamp.version);
    let next = TimestampRole::new(last.max(seen).saturating_add(1), after(now, TIMESTAMP_LIFETIME), version, snapshot);
    match verified {
        Some((bytes, timestamp))
            if timestamp.version >= seen
                && timestamp.meta == next.meta
                && timestamp.expires.duration_since(now) > TIMESTAMP_LIFETIME - TIMESTAMP_RENEW =>
        {
            Next::Keep(bytes)
        }
        Some(_) | None => Next::Sign(next),
    }
}

/// Files that are to be written, seen as if they were there.
pub(crate) type Overlay = Vec<(String, Vec<u8>)>;

/// A snapshot's file that does not verify, and why.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {source}")]
struct Refused {
    file: String,
    source: Box<SiteError>,
}

impl Refused {
    /// Of what the repository itself is to blame for; another error ends the look.
    fn of(file: String, error: SiteError) -> Result<Self, SiteError> {
        let its_own = matches!(error, SiteError::Metadata { .. } | SiteError::Format { .. });
        if its_own { Ok(Self { file, source: Box::new(error) }) } else { Err(error) }
    }
}

fn anchor(site: &SiteDir, memory: &Memory, overlay: &[(String, Vec<u8>)]) -> Result<Vec<u8>, SiteError> {
    if let Some(text) = &memory.trust_root {
        return Ok(text.clone().into_bytes());
    }
    if let Some((_, first)) = overlay.iter().find(|(file, _)| file == "metadata/1.root.json") {
        return Ok(first.clone());
    }
    let first = read_capped(&site.metadata("1.root.json"), Limits::default().root)?;
    first.ok_or_else(|| no_metadata(site))
}

/// A site whose first metadata is not signed yet, or none.
fn no_metadata(site: &SiteDir) -> SiteError {
    let request = site.open_request();
    if request.exists() { SiteError::Unfinished { request } } else { SiteError::NotASite { dir: site.path.clone() } }
}

/// Feeds a client from the repository's files, but for those that `instead` gives.
fn run(
    site: &SiteDir,
    client: Result<Client, TufError>,
    mut instead: impl FnMut(&Root, &str) -> Result<Option<Vec<u8>>, SiteError>,
) -> Result<Outcome, SiteError> {
    let mut client = client.map_err(SiteError::metadata(site))?;
    while let Request::Fetch { path, max_bytes, may_be_absent: _ } = client.next() {
        let bytes = match instead(client.root(), &path)? {
            Some(bytes) => Some(bytes),
            None => read_capped(&site.repo().join(&path), max_bytes)?,
        };
        client.feed(bytes.map_or(Fetched::Absent, Fetched::Bytes)).map_err(SiteError::metadata(site))?;
    }
    client.finish().map_err(SiteError::metadata(site))
}

/// The state a snapshot describes, verified, whatever the timestamp says.
pub(crate) fn verify_snapshot(
    site: &SiteDir,
    overlay: &[(String, Vec<u8>)],
    snapshot: MetaFile,
    seen: Seen,
    now: Timestamp,
) -> Result<Outcome, SiteError> {
    let (limits, policy) = (Limits::default(), ExpiryPolicy::ReportStale);
    let anchor = anchor(site, &Memory::default(), overlay)?;
    let client = Client::from_snapshot(&anchor, seen, now, limits, policy, Wanted::All, snapshot);
    run(site, client, |_, path| Ok(overlay.iter().find(|(file, _)| file == path).map(|(_, bytes)| bytes.clone())))
}

/// The state that machines are served: by the timestamp that is there.
pub(crate) fn served_state(site: &SiteDir, now: Timestamp) -> Result<Outcome, SiteError> {
    let anchor = anchor(site, &Memory::default(), &[])?;
    let (limits, policy) = (Limits::default(), ExpiryPolicy::ReportStale);
    run(site, Client::new(&anchor, Seen::default(), now, limits, policy, Wanted::All), |_, _| Ok(None))
}

/// The newest snapshot in `repo/metadata` that verifies with all it lists. One that does not is passed over: a
/// publisher may be writing it.
pub(crate) fn newest_state(site: &SiteDir, now: Timestamp) -> Result<Outcome, SiteError> {
    let mut refused = None;
    for version in snapshot_versions(site)? {
        let file = format!("{version}.snapshot.json");
        let Some(bytes) = read_capped(&site.metadata(&file), Limits::default().snapshot)? else { continue };
        match verify_snapshot(site, &[], MetaFile::of(version, &bytes), Seen::default(), now) {
            Ok(outcome) => return Ok(outcome),
            Err(error) => {
                let error = Refused::of(file, error)?;
                tracing::warn!(%error, "snapshot passed over: it does not verify");
                refused.get_or_insert(error);
            }
        }
    }
    Err(none_verifies(site, refused))
}

/// Versions of the snapshots there are, the newest first.
fn snapshot_versions(site: &SiteDir) -> Result<Vec<u64>, SiteError> {
    let folder = site.repo().join("metadata");
    let mut versions = Vec::new();
    for entry in fs::read_dir(&folder).map_err(SiteError::io("list", &folder))? {
        let name = entry.map_err(SiteError::io("list", &folder))?.file_name();
        versions.extend(name.to_string_lossy().strip_suffix(".snapshot.json").and_then(|n| n.parse::<u64>().ok()));
    }
    versions.sort_unstable_by(|a, b| b.cmp(a));
    Ok(versions)
}

fn none_verifies(site: &SiteDir, refused: Option<Refused>) -> SiteError {
    match refused {
        Some(Refused { file, source }) => SiteError::NoSnapshot { dir: site.repo().join("metadata"), file, source },
        None => no_metadata(site),
    }
}
