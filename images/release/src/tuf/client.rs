//! The client's workflow (section 5) as a state machine that is pulled: [`Client::next`] says which file is wanted,
//! the caller fetches it and hands it to [`Client::feed`].
//!
//! Not here: transfers, retries, deadlines. The caller stops a transfer at `max_bytes` and may then feed
//! [`Fetched::TooLong`]; bytes beyond the cap are refused in any case.

mod search;

use crate::envelope::{KeySet, Unverified};
use crate::error::TufError;
use crate::hex;
use crate::tuf::kept::{Change, Kept};
pub use crate::tuf::load::Expiry;
use crate::tuf::load::{ExpiryPolicy, Limits, Trust, check_hashes};
use crate::tuf::model::{MetaFile, Root, Snapshot, TargetFile, Targets, TimestampRole};
use crate::tuf::path::TargetPath;
use crate::tuf::seen::Seen;
use jiff::Timestamp;
use search::Search;
use std::collections::{BTreeMap, VecDeque};

/// Which targets are to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// These; one that no role lists is an error.
    Paths(Vec<TargetPath>),
    /// All that any role may list: for the boot server and the publisher.
    All,
}

impl From<Vec<TargetPath>> for Wanted {
    fn from(paths: Vec<TargetPath>) -> Self {
        Self::Paths(paths)
    }
}

/// What the client wants next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// One file.
    Fetch {
        /// Under the repository's base URL: `metadata/…` or `targets/…`.
        path: String,
        /// A transfer beyond this is to be stopped.
        max_bytes: u64,
        /// Whether "no such file" is an answer (it ends the root chain) and not a failure.
        may_be_absent: bool,
    },
    /// Nothing: [`Client::finish`].
    Done,
}

/// What came of a fetch. A transfer that failed for another reason is fed as nothing at all: it is tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetched {
    /// The file.
    Bytes(Vec<u8>),
    /// The repository said it has no such file.
    Absent,
    /// There was more than `max_bytes`.
    TooLong,
}

/// A verified target file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Their SHA-256.
    pub sha256: String,
    /// The TUF role that lists it.
    pub role: String,
}

/// A finished update.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The wanted targets by path.
    pub targets: BTreeMap<String, Target>,
    /// To be kept for the next update.
    pub seen: Seen,
    /// What was expired at the time the update began; empty under [`ExpiryPolicy::Refuse`].
    pub stale: Vec<Expiry>,
    /// Every verified file's expiry, timestamp's among them.
    pub expiries: Vec<Expiry>,
    /// Earliest expiry of a file signed offline (all but timestamp).
    pub offline_expires: Timestamp,
    /// Newest of them but for root's: online-signed time moves a time floor at most here.
    pub offline_expires_newest: Timestamp,
    /// The newest root's bytes, to hand on as trusted root.
    pub root_bytes: Vec<u8>,
    /// The newest root.
    pub root: Root,
    /// The timestamp; none if the client started [`Client::from_snapshot`].
    pub timestamp: Option<TimestampRole>,
    /// The snapshot.
    pub snapshot: Snapshot,
    /// The targets roles that were read, by name.
    pub roles: BTreeMap<String, Targets>,
}

impl Outcome {
    /// What is expired at another time, once a fresher one is known.
    pub fn stale_at(&self, now: Timestamp) -> Vec<Expiry> {
        Trust::stale_at(&self.expiries, now)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Root { version: u64, taken: u32 },
    Timestamp,
    Snapshot,
    Role(Visit),
    Target { path: TargetPath, role: String, listed: TargetFile },
    Done,
}

/// A targets role to look into, and the keys that the role which delegates to it names.
#[derive(Debug, Clone)]
struct Visit {
    role: String,
    keys: KeySet,
}

/// Whether all targets are wanted. Paths then come from the roles themselves: one outside its role's delegation is
/// passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listing {
    Not,
    ToBeMade,
    Made,
}

#[derive(Debug)]
struct Loaded {
    envelope: Unverified<Targets>,
    document: Targets,
    /// Keys that were found to have signed it: with a thousand targets wanted it is visited a thousand times.
    checked: Vec<KeySet>,
}

/// One update.
#[derive(Debug)]
pub struct Client {
    trust: Trust,
    step: Step,
    roles: BTreeMap<String, Loaded>,
    todo: VecDeque<TargetPath>,
    listing: Listing,
    search: Option<Search>,
    targets: BTreeMap<String, Target>,
}

impl Client {
    /// Starts an update from a trusted root.
    pub fn new(
        trusted_root: &[u8],
        seen: Seen,
        now: Timestamp,
        limits: Limits,
        expiry: ExpiryPolicy,
        wanted: impl Into<Wanted>,
    ) -> Result<Self, TufError> {
        let trust = Trust::start(trusted_root, seen, now, limits, expiry)?;
        // 5.3.2: N is the trusted root's version; 5.3.3: ask for N + 1.
        let step = Step::Root { version: trust.root.version.saturating_add(1), taken: 0 };
        let (todo, listing) = match wanted.into() {
            Wanted::Paths(paths) => (paths.into(), Listing::Not),
            Wanted::All => (VecDeque::new(), Listing::ToBeMade),
        };
        Ok(Self { trust, step, roles: BTreeMap::new(), todo, listing, search: None, targets: BTreeMap::new() })
    }

    /// Starts an update that believes the caller which snapshot is meant, and reads no timestamp: for whoever makes
    /// the timestamp. Not for a client of a network.
    pub fn from_snapshot(
        trusted_root: &[u8],
        seen: Seen,
        now: Timestamp,
        limits: Limits,
        expiry: ExpiryPolicy,
        wanted: impl Into<Wanted>,
        snapshot: MetaFile,
    ) -> Result<Self, TufError> {
        let mut client = Self::new(trusted_root, seen, now, limits, expiry, wanted)?;
        client.trust.given_snapshot = Some(snapshot);
        Ok(client)
    }

    /// For a client that keeps whole files: `files` by TUF role (`timestamp`, `snapshot`, `targets` and delegated
    /// roles), as earlier updates left them. One that is still what the repository lists is not fetched again. The
    /// trusted root is the kept root.
    #[must_use]
    pub fn with_kept(mut self, files: BTreeMap<String, Vec<u8>>) -> Self {
        self.trust.kept = Some(Kept::new(files));
        self
    }

    /// What is to change of the kept files since the last call; to be asked for also after an update that failed.
    pub fn take_changes(&mut self) -> Vec<Change> {
        self.trust.kept.as_mut().map(Kept::take_changes).unwrap_or_default()
    }

    /// The target whose file is wanted next, if it is a target's file: whoever has it already may feed that.
    pub fn wanted_target(&self) -> Option<(&TargetPath, &TargetFile)> {
        match &self.step {
            Step::Target { path, listed, .. } => Some((path, listed)),
            Step::Root { .. } | Step::Timestamp | Step::Snapshot | Step::Role(_) | Step::Done => None,
        }
    }

    /// The verified targets so far, by path.
    pub fn targets(&self) -> &BTreeMap<String, Target> {
        &self.targets
    }

    /// Which file is wanted. Asking again asks for the same.
    #[allow(clippy::should_implement_trait)] // it is no iterator: it does not advance
    pub fn next(&self) -> Request {
        let limits = &self.trust.limits;
        let cap = |listed: Option<u64>, limit: u64| listed.map_or(limit, |length| length.min(limit));
        let max_bytes = match &self.step {
            Step::Root { .. } => limits.root,
            Step::Timestamp => limits.timestamp,
            // 5.5.1: the length timestamp lists, else the limit.
            Step::Snapshot => cap(self.trust.listed_snapshot().ok().and_then(|meta| meta.length), limits.snapshot),
            // 5.6.1
            Step::Role(visit) => {
                let limit = if visit.role == Targets::TYPE { limits.targets } else { limits.delegation };
                cap(self.trust.listed_role(&visit.role).ok().and_then(|meta| meta.length), limit)
            }
            Step::Target { listed, .. } => listed.length,
            Step::Done => return Request::Done,
        };
        Request::Fetch { path: self.file(), max_bytes, may_be_absent: matches!(self.step, Step::Root { .. }) }
    }

    /// Hands over what was fetched. After an error the update is over; [`Self::seen`] still says what to remember.
    pub fn feed(&mut self, fetched: Fetched) -> Result<(), TufError> {
        let Request::Fetch { path: file, max_bytes, may_be_absent } = self.next() else {
            return Err(TufError::NotAsked);
        };
        let bytes = match fetched {
            Fetched::Bytes(bytes) if bytes.len() as u64 <= max_bytes => bytes,
            Fetched::Bytes(bytes) => {
                return Err(TufError::TooLong { file, limit: max_bytes, got: bytes.len() as u64 });
            }
            Fetched::TooLong => {
                return Err(TufError::TooLong { file, limit: max_bytes, got: max_bytes.saturating_add(1) });
            }
            // 5.3.3: no next root: the chain ends.
            Fetched::Absent if may_be_absent => return self.end_root_chain(),
            Fetched::Absent => return Err(TufError::Missing { file }),
        };
        match self.step.clone() {
            Step::Root { version, taken } => {
                // 5.3.3: at most so many new roots.
                if taken >= self.trust.limits.root_chain {
                    return Err(TufError::EndlessRootChain { limit: self.trust.limits.root_chain });
                }
                self.trust.update_root(&file, bytes)?;
                // 5.3.9
                self.step = Step::Root { version: version.saturating_add(1), taken: taken + 1 };
                Ok(())
            }
            Step::Timestamp => {
                self.trust.update_timestamp(&file, &bytes)?;
                self.expect_snapshot()
            }
            Step::Snapshot => {
                self.trust.update_snapshot(&file, &bytes)?;
                self.expect_top()
            }
            Step::Role(visit) => {
                let (envelope, document) = self.trust.update_targets(&file, &visit.role, &visit.keys, &bytes)?;
                self.roles.insert(visit.role, Loaded { envelope, document, checked: vec![visit.keys] });
                self.advance()
            }
            Step::Target { path, role, listed } => {
                if bytes.len() as u64 != listed.length {
                    let (expected, got) = (listed.length, bytes.len() as u64);
                    return Err(TufError::LengthMismatch { file, expected, got });
                }
                // 5.7.3: hashes.
                check_hashes(&file, &role, &listed.hashes, &bytes)?;
                let sha256 = hex::sha256(&bytes);
                self.targets.insert(path.into(), Target { bytes, sha256, role });
                self.advance()
            }
            Step::Done => Err(TufError::NotAsked),
        }
    }

    /// The newest root verified so far.
    pub fn root(&self) -> &Root {
        &self.trust.root
    }

    /// What to remember, also of an update that failed: everything verified up to there.
    pub fn seen(&self) -> &Seen {
        &self.trust.seen
    }

    /// The result, once [`Self::next`] says [`Request::Done`].
    pub fn finish(self) -> Result<Outcome, TufError> {
        let unfinished = TufError::Unfinished { file: self.file() };
        let trust = self.trust;
        let (Step::Done, Some(snapshot)) = (&self.step, trust.snapshot) else {
            return Err(unfinished);
        };
        let offline = || trust.expiries.iter().filter(|e| e.role != TimestampRole::TYPE).map(|e| e.expires);
        // Root's end is years away: counted here, a stolen online clock could move time that far.
        let short_lived = || {
            trust.expiries.iter().filter(|e| e.role != TimestampRole::TYPE && e.role != Root::TYPE).map(|e| e.expires)
        };
        Ok(Outcome {
            offline_expires: offline().min().unwrap_or(trust.root.expires),
            offline_expires_newest: short_lived().max().unwrap_or(trust.root.expires),
            stale: Trust::stale_at(&trust.expiries, trust.now),
            targets: self.targets,
            seen: trust.seen,
            expiries: trust.expiries,
            root_bytes: trust.root_bytes,
            root: trust.root.into_inner(),
            timestamp: trust.timestamp,
            snapshot,
            roles: self.roles.into_iter().map(|(name, loaded)| (name, loaded.document)).collect(),
        })
    }

    /// Path of the file in hand.
    fn file(&self) -> String {
        match &self.step {
            Step::Root { version, .. } => format!("metadata/{version}.root.json"),
            Step::Timestamp => "metadata/timestamp.json".to_owned(),
            Step::Snapshot => {
                let version = self.trust.listed_snapshot().map_or(0, |meta| meta.version);
                self.trust.file_of(Snapshot::TYPE, version)
            }
            Step::Role(visit) => {
                let version = self.trust.listed_role(&visit.role).map_or(0, |meta| meta.version);
                self.trust.file_of(&visit.role, version)
            }
            Step::Target { path, listed, .. } => {
                let hash = listed.hashes.get("sha256").or_else(|| listed.hashes.get("sha512"));
                let hash = hash.filter(|_| self.trust.root.consistent_snapshot);
                format!("targets/{}", path.file(hash.map(String::as_str)))
            }
            Step::Done => "nothing".to_owned(),
        }
    }

    fn end_root_chain(&mut self) -> Result<(), TufError> {
        self.trust.close_root()?;
        self.step = if self.trust.given_snapshot.is_some() { Step::Snapshot } else { Step::Timestamp };
        Ok(())
    }

    fn expect_snapshot(&mut self) -> Result<(), TufError> {
        let listed = self.trust.listed_snapshot()?.length;
        self.step = Step::Snapshot;
        self.within_limit(listed, self.trust.limits.snapshot)?;
        let file = self.file();
        if self.trust.use_kept_snapshot(&file) { self.expect_top() } else { Ok(()) }
    }

    /// 5.6: top-level targets come first, whatever is wanted.
    fn expect_top(&mut self) -> Result<(), TufError> {
        let visit = self.top();
        if self.use_kept_role(&visit) { self.advance() } else { self.fetch_role(visit) }
    }

    /// A file listed as longer than its limit is not even fetched.
    fn within_limit(&self, listed: Option<u64>, limit: u64) -> Result<(), TufError> {
        match listed {
            Some(got) if got > limit => Err(TufError::TooLong { file: self.file(), limit, got }),
            Some(_) | None => Ok(()),
        }
    }

    fn top(&self) -> Visit {
        let root = &self.trust.root;
        Visit { role: Targets::TYPE.to_owned(), keys: root.key_set(&root.roles.targets) }
    }

    fn fetch_role(&mut self, visit: Visit) -> Result<(), TufError> {
        let limits = &self.trust.limits;
        let limit = if visit.role == Targets::TYPE { limits.targets } else { limits.delegation };
        let listed = self.trust.listed_role(&visit.role)?.length;
        self.step = Step::Role(visit);
        self.within_limit(listed, limit)
    }

    /// 5.6 without a transfer: whether the kept file is the one that snapshot lists, and passes every check.
    fn use_kept_role(&mut self, visit: &Visit) -> bool {
        let Some(bytes) = self.trust.kept.as_ref().and_then(|kept| kept.file(&visit.role)) else { return false };
        let file = self.trust.listed_role(&visit.role).map(|meta| self.trust.file_of(&visit.role, meta.version));
        match file.and_then(|file| self.trust.update_targets(&file, &visit.role, &visit.keys, &bytes)) {
            Ok((envelope, document)) => {
                let loaded = Loaded { envelope, document, checked: vec![visit.keys.clone()] };
                self.roles.insert(visit.role.clone(), loaded);
                true
            }
            Err(_) => false,
        }
    }
}
