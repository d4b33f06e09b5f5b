//! `kiln trust init --lab`: a site's directory from nothing.
//!
//! `--lab` means threshold 1 and unencrypted keys in `offline/`, nothing else. What a site whose keys people hold has in
//! common with it is here too; the rest of that is in `ceremony.rs`.

use crate::agent_api::new_server;
use crate::boot_keys::init_secure_boot;
use crate::files::{PUBLIC, SECRET, make_dir, sync_folder, write_atomic};
use crate::https::ca_params;
use crate::site::{OFFLINE_LIFETIME, SiteDir, TIMESTAMP_LIFETIME, after, new_key, sign, write_key};
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::tuf::{RoleKeys, Root, RootRoles, Snapshot, TargetFile, TargetPath, Targets, TimestampRole};
use kiln_release::{AgentApi, PublicKey, SITE_TYPE, Signer, Site, hex};
use rcgen::{Issuer, KeyPair};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Made first to last; the last one makes the directory a site.
const HOUSES: [&str; 4] = ["offline", "repo", "state", "online"];

struct LabKeys {
    root: Signer,
    targets: Signer,
    snapshot: Signer,
    timestamp: Signer,
    director: Signer,
    operator: Signer,
}

/// Makes a lab's site: keys, the agent API's certificates, and a repository without releases.
///
/// It is prepared in a folder of its own inside `dir` and moved into place at the end; what `dir` holds besides
/// (`kiln.toml`, a cache) is left alone.
pub fn init_lab(dir: &Path, name: &str, now: Timestamp) -> Result<SiteDir, SiteError> {
    check_name(name)?;
    let prepared = Prepared::new(dir, name)?;
    let site = &prepared.site;
    let keys = LabKeys {
        root: new_key()?,
        targets: new_key()?,
        snapshot: new_key()?,
        timestamp: new_key()?,
        director: new_key()?,
        operator: new_key()?,
    };
    for (role, key) in
        [("root", &keys.root), ("targets", &keys.targets), ("snapshot", &keys.snapshot), ("operator", &keys.operator)]
    {
        write_key(&site.offline_key(role), key)?;
    }
    write_key(&site.online("timestamp.key"), &keys.timestamp)?;
    write_key(&site.online("director.key"), &keys.director)?;
    init_secure_boot(site, None, 0)?;
    let ca_pem = write_agent_api(site, name)?;
    write_first_metadata(site, name, &keys, ca_pem, now)?;
    prepared.finish(dir)
}

/// A site's name is part of certificates and log lines.
pub(crate) fn check_name(name: &str) -> Result<(), SiteError> {
    if name.is_empty() || name.len() > 64 || !name.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(SiteError::BadName { got: name.to_owned() });
    }
    Ok(())
}

/// A site that is being made, in a folder of its own beside where it will be.
pub(crate) struct Prepared {
    draft: tempfile::TempDir,
    pub(crate) site: SiteDir,
}

impl Prepared {
    pub(crate) fn new(dir: &Path, name: &str) -> Result<Self, SiteError> {
        if let Some(found) = HOUSES.into_iter().find(|house| dir.join(house).exists()) {
            return Err(SiteError::SiteExists { dir: dir.to_owned(), found });
        }
        fs::create_dir_all(dir).map_err(SiteError::io("make directory", dir))?;
        let draft = tempfile::Builder::new()
            .prefix(".init-")
            .tempdir_in(dir)
            .map_err(SiteError::io("make a folder in", dir))?;
        let site = SiteDir { path: draft.path().to_owned(), name: name.to_owned() };
        for (house, mode) in [("offline", 0o700), ("online", 0o700), ("state", 0o700), ("repo/metadata", 0o755)] {
            make_dir(&site.path.join(house), mode)?;
        }
        for house in ["repo/a", "repo/b", "repo/targets", "repo"] {
            make_dir(&site.path.join(house), 0o755)?;
        }
        Ok(Self { draft, site })
    }

    /// Moves it into place.
    pub(crate) fn finish(self, dir: &Path) -> Result<SiteDir, SiteError> {
        let Self { draft, site } = self;
        write_atomic(&site.online("site-name"), format!("{}\n", site.name).as_bytes(), PUBLIC)?;
        for house in HOUSES {
            let (from, to) = (draft.path().join(house), dir.join(house));
            fs::rename(&from, &to).map_err(SiteError::io("move into place", &to))?;
            sync_folder(&to)?;
        }
        SiteDir::open(dir)
    }
}

/// The CA of the agent API and the server's certificate. Their dates are wide open: a machine whose clock is wrong
/// must be able to connect, and which CA counts is said by signed metadata, which expires.
pub(crate) fn write_agent_api(site: &SiteDir, name: &str) -> Result<String, SiteError> {
    let fail = |error: rcgen::Error| SiteError::Certificate { reason: error.to_string() };
    let ca_key = KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(fail)?;
    let ca = ca_params(name).map_err(fail)?;
    let ca_certificate = ca.self_signed(&ca_key).map_err(fail)?;

    let ca_key_pem = ca_key.serialize_pem();
    let (server_key, server_certificate) = new_server(&Issuer::new(ca, ca_key))?;

    let ca_pem = ca_certificate.pem();
    for (file, text, mode) in [
        ("agent-ca.key", ca_key_pem, SECRET),
        ("agent-ca.pem", ca_pem.clone(), PUBLIC),
        ("agent-server.key", server_key, SECRET),
        ("agent-server.pem", server_certificate, PUBLIC),
    ] {
        write_atomic(&site.online(file), text.as_bytes(), mode)?;
    }
    Ok(ca_pem)
}

fn write_first_metadata(
    site: &SiteDir,
    name: &str,
    keys: &LabKeys,
    ca_pem: String,
    now: Timestamp,
) -> Result<(), SiteError> {
    let expires = after(now, OFFLINE_LIFETIME);
    let one = |key: &Signer| RoleKeys::new(&[key.public()], 1);
    let public: Vec<PublicKey> =
        [&keys.root, &keys.targets, &keys.snapshot, &keys.timestamp].into_iter().map(Signer::public).collect();
    let roles = RootRoles {
        root: one(&keys.root),
        timestamp: one(&keys.timestamp),
        snapshot: one(&keys.snapshot),
        targets: one(&keys.targets),
    };
    let root = sign("root", &Root::new(1, expires, &public, roles), &[&keys.root])?;

    let (director, operator) = (keys.director.public(), keys.operator.public());
    let document = Site {
        type_: SITE_TYPE.to_owned(),
        spec_version: "1.0".to_owned(),
        name: name.to_owned(),
        directors: BTreeMap::from([(director.id(), director.to_object())]),
        director_threshold: 1,
        operators: BTreeMap::from([(operator.id(), operator.to_object())]),
        operator_threshold: 1,
        agent_api: AgentApi { ca_pem, keys: vec![] },
        floors: BTreeMap::new(),
        network: None,
        dbx: None,
    };
    let mut document = serde_json::to_vec_pretty(&document).expect("a site has string keys only");
    document.push(b'\n');
    let mut targets = Targets::new(1, expires);
    targets.targets.insert(TargetPath::site().to_string(), TargetFile::of(&document));
    let targets = sign("targets", &targets, &[&keys.targets])?;
    let mut snapshot = Snapshot::new(1, expires);
    snapshot.list(Targets::TYPE, 1, targets.as_bytes());
    let snapshot = sign("snapshot", &snapshot, &[&keys.snapshot])?;
    let timestamp = TimestampRole::new(1, after(now, TIMESTAMP_LIFETIME), 1, snapshot.as_bytes());
    let timestamp = sign("timestamp", &timestamp, &[&keys.timestamp])?;

    let site_json = format!("{}.site.json", hex::sha256(&document));
    write_atomic(&site.repo().join("targets").join(site_json), &document, PUBLIC)?;
    for (file, text) in [
        ("1.root.json", root),
        ("1.targets.json", targets),
        ("1.snapshot.json", snapshot),
        ("timestamp.json", timestamp),
    ] {
        write_atomic(&site.metadata(file), text.as_bytes(), PUBLIC)?;
    }
    Ok(())
}
