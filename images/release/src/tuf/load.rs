//! The trusted state during one update: what each fetched file must pass before it is believed.
//!
//! One function per kind of file, checks in the specification's order. `client.rs` decides which file comes next.

use crate::envelope::{KeySet, Unverified, Verified};
use crate::error::TufError;
use crate::hex;
use crate::tuf::kept::Kept;
use crate::tuf::model::{MetaFile, Root, Snapshot, Targets, TimestampRole};
use crate::tuf::path::quote;
use crate::tuf::seen::{Seen, SeenRole};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Caps, in bytes unless said otherwise. `Default` is what Kiln promises in its documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// One root: 1 MiB.
    pub root: u64,
    /// New roots in one update: 1 024.
    pub root_chain: u32,
    /// Timestamp: 1 MiB.
    pub timestamp: u64,
    /// Snapshot: 1 MiB.
    pub snapshot: u64,
    /// Top-level targets: 1 MiB.
    pub targets: u64,
    /// One delegated role: 256 KiB.
    pub delegation: u64,
    /// One target file: 256 KiB. Targets are manifests and `site.json`; artifacts are no TUF targets.
    pub target: u64,
    /// TUF roles visited in search of one target: 32.
    pub roles: u32,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            root: MIB,
            root_chain: 1024,
            timestamp: MIB,
            snapshot: MIB,
            targets: MIB,
            delegation: 256 << 10,
            target: 256 << 10,
            roles: 32,
        }
    }
}

/// What expired metadata means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExpiryPolicy {
    /// The update fails: the specification's rule.
    #[default]
    Refuse,
    /// off-spec: the update goes on and names what is expired. A machine whose server was off for a month may then
    /// still boot the release it was assigned; that it starts no other one is for the caller to hold.
    ReportStale,
}

/// When one verified file expires.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expiry {
    /// The TUF role.
    pub role: String,
    /// Its file, under the repository's base URL.
    pub file: String,
    /// When it expires.
    pub expires: Timestamp,
}

/// Everything believed so far.
#[derive(Debug)]
pub(crate) struct Trust {
    pub(crate) root: Verified<Root>,
    pub(crate) root_bytes: Vec<u8>,
    pub(crate) timestamp: Option<TimestampRole>,
    pub(crate) snapshot: Option<Snapshot>,
    pub(crate) seen: Seen,
    pub(crate) expiries: Vec<Expiry>,
    pub(crate) limits: Limits,
    /// Stands for what a timestamp would say.
    pub(crate) given_snapshot: Option<MetaFile>,
    /// For a client that keeps whole files.
    pub(crate) kept: Option<Kept>,
    pub(crate) now: Timestamp,
    policy: ExpiryPolicy,
}

const TRUSTED_ROOT: &str = "trusted root";

impl Trust {
    /// 5.1 (the fixed update start time is `now`), 5.2 (the trusted root).
    pub(crate) fn start(
        trusted_root: &[u8],
        seen: Seen,
        now: Timestamp,
        limits: Limits,
        policy: ExpiryPolicy,
    ) -> Result<Self, TufError> {
        let envelope: Unverified<Root> = parse(TRUSTED_ROOT, trusted_root, limits.root)?;
        // It is trusted because it was shipped; that it is signed by its own keys shows it was shipped whole.
        let root =
            envelope.clone().read_type(Vec::new(), Root::TYPE).map_err(|e| TufError::of_envelope(TRUSTED_ROOT, e))?;
        check_root(TRUSTED_ROOT, &root)?;
        envelope.check(&root.key_set(&root.roles.root)).map_err(|e| TufError::of_envelope(TRUSTED_ROOT, e))?;
        Ok(Self {
            root,
            root_bytes: trusted_root.to_vec(),
            timestamp: None,
            snapshot: None,
            seen,
            expiries: Vec::new(),
            limits,
            given_snapshot: None,
            kept: None,
            now,
            policy,
        })
    }

    /// 5.3.4 to 5.3.8: one step along the root chain.
    pub(crate) fn update_root(&mut self, file: &str, bytes: Vec<u8>) -> Result<(), TufError> {
        let fail = |e| TufError::of_envelope(file, e);
        let envelope: Unverified<Root> = parse(file, &bytes, self.limits.root)?;
        // 5.3.4: a threshold of the trusted root's keys, then of its own.
        let signers = envelope.check(&self.root.key_set(&self.root.roles.root)).map_err(fail)?;
        let root = envelope.clone().read_type(signers, Root::TYPE).map_err(fail)?;
        check_root(file, &root)?;
        envelope.check(&root.key_set(&root.roles.root)).map_err(fail)?;
        // 5.3.5: exactly the next version.
        let expected = self.root.version.saturating_add(1);
        if root.version < expected {
            let (role, seen) = (Root::TYPE.to_owned(), self.root.version);
            return Err(TufError::Rollback { file: file.to_owned(), role, seen, got: root.version });
        }
        same_version(file, expected, root.version)?;
        // 5.3.6: an intermediate root's expiry does not matter. 5.3.7: trusted from here on; 5.3.8: `seen` remembers.
        self.root = root;
        self.keep(Root::TYPE, &bytes);
        self.root_bytes = bytes;
        self.seen.root = self.seen.root.max(self.root.version);
        Ok(())
    }

    /// 5.3.10 to 5.3.12, at the end of the chain.
    pub(crate) fn close_root(&mut self) -> Result<(), TufError> {
        let file = format!("metadata/{}.root.json", self.root.version);
        // off-spec: the client starts from the root in its initramfs, not from the newest it ever saw, so that the
        // chain must lead at least as far as before is checked here.
        if self.root.version < self.seen.root {
            let (role, seen) = (Root::TYPE.to_owned(), self.seen.root);
            return Err(TufError::Rollback { file, role, seen, got: self.root.version });
        }
        // 5.3.10: freeze attack.
        self.expiry(Root::TYPE, &file, self.root.expires)?;
        // 5.3.11: fast-forward recovery.
        self.seen.root = self.root.version;
        self.seen.forget_rotated(&self.root);
        if let Some(kept) = &mut self.kept {
            kept.recall(&self.root, &self.limits, &mut self.seen);
        }
        Ok(())
    }

    fn keep(&mut self, role: &str, bytes: &[u8]) {
        if let Some(kept) = &mut self.kept {
            kept.write(role, bytes);
        }
    }

    /// 5.4.2 to 5.4.5.
    pub(crate) fn update_timestamp(&mut self, file: &str, bytes: &[u8]) -> Result<(), TufError> {
        let envelope: Unverified<TimestampRole> = parse(file, bytes, self.limits.timestamp)?;
        // 5.4.2: signatures.
        let timestamp = envelope
            .verify_type(&self.root.key_set(&self.root.roles.timestamp), TimestampRole::TYPE)
            .map_err(|e| TufError::of_envelope(file, e))?;
        check_outline(file, &timestamp.spec_version, timestamp.version)?;
        let listed = snapshot_of(file, &timestamp)?;
        // 5.4.3.1: one of the same version is discarded, and the kept one holds: 5.4.4.
        if let Some(kept) = self.kept.as_ref().and_then(|kept| kept.same_timestamp(timestamp.version)) {
            self.expiry(TimestampRole::TYPE, file, kept.expires)?;
            self.timestamp = Some(kept);
            return Ok(());
        }
        // 5.4.3.1: its version never goes back. off-spec: without a kept one an equal one is read again.
        let seen = self.seen.timestamp.as_ref().map_or(0, |seen| seen.version);
        not_older(file, TimestampRole::TYPE, seen, timestamp.version)?;
        // 5.4.3.2: neither does the snapshot version it lists.
        not_older(file, Snapshot::TYPE, self.seen.timestamp_snapshot, listed.version)?;
        // 5.4.4: freeze attack.
        self.expiry(TimestampRole::TYPE, file, timestamp.expires)?;
        // 5.4.5
        self.seen.timestamp = Some(SeenRole::new(timestamp.version, &timestamp.signers));
        self.seen.timestamp_snapshot = listed.version;
        self.timestamp = Some(timestamp.into_inner());
        self.keep(TimestampRole::TYPE, bytes);
        Ok(())
    }

    /// What the trusted timestamp says of snapshot.
    pub(crate) fn listed_snapshot(&self) -> Result<&MetaFile, TufError> {
        if let Some(given) = &self.given_snapshot {
            return Ok(given);
        }
        let timestamp = self.timestamp.as_ref().ok_or(TufError::NotAsked)?;
        snapshot_of("metadata/timestamp.json", timestamp)
    }

    /// 5.5.2 to 5.5.7.
    pub(crate) fn update_snapshot(&mut self, file: &str, bytes: &[u8]) -> Result<(), TufError> {
        let listed = self.listed_snapshot()?.clone();
        // 5.5.2: hashes, before anything is parsed.
        matches_listing(file, Snapshot::TYPE, &listed, bytes)?;
        let envelope: Unverified<Snapshot> = parse(file, bytes, self.limits.snapshot)?;
        // 5.5.3: signatures.
        let snapshot = envelope
            .verify_type(&self.root.key_set(&self.root.roles.snapshot), Snapshot::TYPE)
            .map_err(|e| TufError::of_envelope(file, e))?;
        check_snapshot(file, &snapshot)?;
        // 5.5.4: the version timestamp lists (mix-and-match).
        same_version(file, listed.version, snapshot.version)?;
        let seen = self.seen.snapshot.as_ref().map_or(0, |seen| seen.version);
        not_older(file, Snapshot::TYPE, seen, snapshot.version)?;
        // 5.5.5: no targets role goes back or disappears.
        for (role, seen) in &self.seen.roles {
            match snapshot.meta.get(&format!("{role}.json")) {
                Some(meta) => not_older(file, role, *seen, meta.version)?,
                None => {
                    return Err(TufError::RoleRemoved { file: file.to_owned(), role: role.clone(), seen: *seen });
                }
            }
        }
        // 5.5.6: freeze attack.
        self.expiry(Snapshot::TYPE, file, snapshot.expires)?;
        // 5.5.7
        self.seen.snapshot = Some(SeenRole::new(snapshot.version, &snapshot.signers));
        self.seen.roles = snapshot.role_versions();
        self.snapshot = Some(snapshot.into_inner());
        self.keep(Snapshot::TYPE, bytes);
        Ok(())
    }

    /// 5.5 without a transfer: whether the kept snapshot is the one that timestamp lists, and passes every check.
    pub(crate) fn use_kept_snapshot(&mut self, file: &str) -> bool {
        let bytes = self.kept.as_ref().and_then(|kept| kept.file(Snapshot::TYPE));
        bytes.is_some_and(|bytes| self.update_snapshot(file, &bytes).is_ok())
    }

    /// What the trusted snapshot says of a targets role.
    pub(crate) fn listed_role(&self, role: &str) -> Result<&MetaFile, TufError> {
        let snapshot = self.snapshot.as_ref().ok_or(TufError::NotAsked)?;
        snapshot.meta.get(&format!("{role}.json")).ok_or_else(|| TufError::RoleNotListed {
            file: self.file_of(Snapshot::TYPE, snapshot.version),
            role: role.to_owned(),
        })
    }

    /// 5.6.2 to 5.6.6, for top-level targets and every delegated role.
    pub(crate) fn update_targets(
        &mut self,
        file: &str,
        role: &str,
        keys: &KeySet,
        bytes: &[u8],
    ) -> Result<(Unverified<Targets>, Targets), TufError> {
        let listed = self.listed_role(role)?.clone();
        // 5.6.2: hashes.
        matches_listing(file, role, &listed, bytes)?;
        let limit = if role == Targets::TYPE { self.limits.targets } else { self.limits.delegation };
        let envelope: Unverified<Targets> = parse(file, bytes, limit)?;
        // 5.6.3: signatures, by the keys of the role that delegates here.
        let targets = envelope.clone().verify_type(keys, Targets::TYPE).map_err(|e| TufError::of_envelope(file, e))?;
        check_outline(file, &targets.spec_version, targets.version)?;
        check_delegations(file, &targets)?;
        // 5.6.4: the version snapshot lists.
        same_version(file, listed.version, targets.version)?;
        // 5.6.5: freeze attack.
        self.expiry(role, file, targets.expires)?;
        // 5.6.6: `seen` has the version since snapshot was trusted.
        self.keep(role, bytes);
        Ok((envelope, targets.into_inner()))
    }

    /// Path of a versioned metadata file under the repository's base URL.
    pub(crate) fn file_of(&self, role: &str, version: u64) -> String {
        let role = quote(role, b"");
        // 5.3.12: consistent snapshots decide the names of snapshot and targets.
        if self.root.consistent_snapshot {
            format!("metadata/{version}.{role}.json")
        } else {
            format!("metadata/{role}.json")
        }
    }

    fn expiry(&mut self, role: &str, file: &str, expires: Timestamp) -> Result<(), TufError> {
        if expires <= self.now {
            match self.policy {
                ExpiryPolicy::Refuse => {
                    return Err(TufError::Expired { file: file.to_owned(), expires, now: self.now });
                }
                ExpiryPolicy::ReportStale => {}
            }
        }
        self.expiries.push(Expiry { role: role.to_owned(), file: file.to_owned(), expires });
        Ok(())
    }

    pub(crate) fn stale_at(expiries: &[Expiry], now: Timestamp) -> Vec<Expiry> {
        expiries.iter().filter(|expiry| expiry.expires <= now).cloned().collect()
    }
}

fn parse<T: serde::de::DeserializeOwned>(file: &str, bytes: &[u8], limit: u64) -> Result<Unverified<T>, TufError> {
    Unverified::parse(bytes, limit).map_err(|e| TufError::of_envelope(file, e))
}

fn malformed(file: &str, reason: &str) -> TufError {
    TufError::Malformed { file: file.to_owned(), reason: reason.to_owned() }
}

pub(crate) fn check_outline(file: &str, spec_version: &str, version: u64) -> Result<(), TufError> {
    let mut parts = spec_version.split('.');
    let numbers = parts.clone().count() >= 2 && parts.clone().all(|part| part.parse::<u32>().is_ok());
    if !numbers || parts.next() != Some("1") {
        return Err(TufError::UnsupportedSpecVersion { file: file.to_owned(), got: spec_version.to_owned() });
    }
    if version == 0 {
        return Err(malformed(file, "versions start at 1"));
    }
    Ok(())
}

fn check_root(file: &str, root: &Root) -> Result<(), TufError> {
    check_outline(file, &root.spec_version, root.version)?;
    let roles = &root.roles;
    [&roles.root, &roles.timestamp, &roles.snapshot, &roles.targets]
        .into_iter()
        .try_for_each(|role| check_role_keys(file, &root.keys, &role.keyids, role.threshold))
}

fn check_delegations(file: &str, targets: &Targets) -> Result<(), TufError> {
    let Some(delegations) = &targets.delegations else { return Ok(()) };
    for (i, role) in delegations.roles.iter().enumerate() {
        // A top-level role's keys are root's to name, and its file is asked for under its name.
        if [Root::TYPE, TimestampRole::TYPE, Snapshot::TYPE, Targets::TYPE].contains(&role.name.as_str()) {
            return Err(malformed(file, "a delegation to a top-level role's name"));
        }
        if role.name.is_empty() || delegations.roles[..i].iter().any(|other| other.name == role.name) {
            return Err(malformed(file, "a delegation without a name, or two of the same name"));
        }
        if role.paths.is_some() == role.path_hash_prefixes.is_some() {
            return Err(malformed(file, "a delegation has either `paths` or `path_hash_prefixes`"));
        }
        check_role_keys(file, &delegations.keys, &role.keyids, role.threshold)?;
    }
    Ok(())
}

// off-spec (TAP 12): that a key id is the hash of its key object is not demanded; others' repositories hold keys with
// fields added later. What is counted is distinct keys, whatever they are called.
fn check_role_keys(
    file: &str,
    keys: &BTreeMap<String, serde_json::Value>,
    keyids: &[String],
    threshold: u32,
) -> Result<(), TufError> {
    if threshold == 0 {
        return Err(malformed(file, "a threshold of 0"));
    }
    for (i, id) in keyids.iter().enumerate() {
        if keyids[..i].contains(id) {
            return Err(malformed(file, "a key id twice in one role"));
        }
        if !keys.contains_key(id) {
            return Err(malformed(file, "a role names a key that is not listed"));
        }
    }
    Ok(())
}

fn check_snapshot(file: &str, snapshot: &Snapshot) -> Result<(), TufError> {
    check_outline(file, &snapshot.spec_version, snapshot.version)?;
    if snapshot.meta.values().any(|meta| meta.version == 0) {
        return Err(malformed(file, "lists version 0 of a role, versions start at 1"));
    }
    Ok(())
}

pub(crate) fn snapshot_of<'a>(file: &str, timestamp: &'a TimestampRole) -> Result<&'a MetaFile, TufError> {
    match timestamp.meta.get("snapshot.json") {
        Some(meta) if meta.version > 0 => Ok(meta),
        Some(_) | None => Err(malformed(file, "no version of snapshot.json")),
    }
}

fn not_older(file: &str, role: &str, seen: u64, got: u64) -> Result<(), TufError> {
    if got < seen {
        return Err(TufError::Rollback { file: file.to_owned(), role: role.to_owned(), seen, got });
    }
    Ok(())
}

fn same_version(file: &str, expected: u64, got: u64) -> Result<(), TufError> {
    if got != expected {
        return Err(TufError::VersionMismatch { file: file.to_owned(), expected, got });
    }
    Ok(())
}

/// Length and hashes, as far as they are listed: for metadata both are optional.
fn matches_listing(file: &str, role: &str, listed: &MetaFile, bytes: &[u8]) -> Result<(), TufError> {
    if listed.length.is_some_and(|length| length != bytes.len() as u64) {
        let expected = listed.length.unwrap_or_default();
        return Err(TufError::LengthMismatch { file: file.to_owned(), expected, got: bytes.len() as u64 });
    }
    if listed.hashes.is_empty() { Ok(()) } else { check_hashes(file, role, &listed.hashes, bytes) }
}

/// Every hash of a known algorithm must match, and there must be one.
pub(crate) fn check_hashes(
    file: &str,
    listed_as: &str,
    hashes: &BTreeMap<String, String>,
    bytes: &[u8],
) -> Result<(), TufError> {
    let mut known = false;
    for (algorithm, digest) in [("sha256", &ring::digest::SHA256), ("sha512", &ring::digest::SHA512)] {
        if let Some(expected) = hashes.get(algorithm) {
            known = true;
            let got = hex::encode(ring::digest::digest(digest, bytes).as_ref());
            if !expected.eq_ignore_ascii_case(&got) {
                let (file, expected) = (file.to_owned(), expected.clone());
                return Err(TufError::HashMismatch { file, algorithm, expected, got });
            }
        }
    }
    if known { Ok(()) } else { Err(TufError::NoKnownHash { file: file.to_owned(), role: listed_as.to_owned() }) }
}
