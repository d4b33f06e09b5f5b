//! A TUF repository in memory, with a setting for every way it can go wrong.
#![allow(dead_code)]

use jiff::{SignedDuration, Timestamp};
use kiln_release::tuf::{
    Client, ExpiryPolicy, Fetched, Limits, MetaFile, Outcome, Request, RoleKeys, Root, RootRoles, Seen, Snapshot,
    TargetFile, TargetPath, Targets, TimestampRole,
};
use kiln_release::{PublicKey, Signer, TufError, hex, sign_envelope};
use std::collections::BTreeMap;

pub fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

pub fn day(days: i64) -> Timestamp {
    now() + SignedDuration::from_hours(24 * days)
}

/// Why an update failed.
pub fn kind_of(result: Result<Outcome, TufError>) -> &'static str {
    result.unwrap_err().kind()
}

/// A key by its seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(u8);

impl Key {
    pub fn new(seed: u8) -> Self {
        Self(seed)
    }
    pub fn signer(self) -> Signer {
        Signer::from_seed(&[self.0; 32])
    }
    pub fn public(self) -> PublicKey {
        self.signer().public()
    }
}

#[derive(Debug, Clone)]
pub struct Repo {
    pub files: BTreeMap<String, Vec<u8>>,
    pub trusted_root: Vec<u8>,
    /// What root and targets say: keys and threshold of each role.
    pub keys: BTreeMap<String, (Vec<Key>, u32)>,
    /// Who signs in fact.
    pub signers: BTreeMap<String, Vec<Key>>,
    pub versions: BTreeMap<String, u64>,
    pub expires: BTreeMap<String, Timestamp>,
    /// Roles left out of snapshot.
    pub unlisted: Vec<String>,
    /// A target more: role and path.
    pub extra_target: Option<(String, String)>,
    /// A role's first key is named a second time, by this id.
    pub alias: Option<(String, String)>,
    pub hashes: bool,
    pub spec_version: String,
    pub limits: Limits,
    pub policy: ExpiryPolicy,
    pub wanted: Vec<TargetPath>,
}

const ROLES: [&str; 5] = ["root", "timestamp", "snapshot", "targets", "image-minimal"];

impl Repo {
    pub fn new() -> Self {
        Self::with_seed(0)
    }

    pub fn with_seed(seed: u8) -> Self {
        let key = |i: usize| Key(seed + u8::try_from(i).unwrap());
        let mut repo = Self {
            files: BTreeMap::new(),
            trusted_root: Vec::new(),
            keys: ROLES.iter().enumerate().map(|(i, role)| ((*role).to_owned(), (vec![key(i)], 1))).collect(),
            signers: ROLES.iter().enumerate().map(|(i, role)| ((*role).to_owned(), vec![key(i)])).collect(),
            versions: ROLES.iter().map(|role| ((*role).to_owned(), 1)).collect(),
            expires: ROLES.iter().map(|role| ((*role).to_owned(), day(365))).collect(),
            unlisted: Vec::new(),
            extra_target: None,
            alias: None,
            hashes: true,
            spec_version: "1.0.31".into(),
            limits: Limits::default(),
            policy: ExpiryPolicy::Refuse,
            wanted: vec![TargetPath::site(), TargetPath::manifest("minimal", 1).unwrap()],
        };
        repo.expires.insert("timestamp".into(), day(1));
        repo.expires.insert("image-minimal".into(), day(100));
        repo.reroot();
        repo.write();
        repo
    }

    fn sign<T: serde::Serialize>(&self, role: &str, document: &T) -> Vec<u8> {
        let signers: Vec<Signer> = self.signers[role].iter().map(|key| key.signer()).collect();
        let text = sign_envelope(document, &signers.iter().collect::<Vec<_>>()).unwrap();
        match &self.alias {
            Some((aliased, id)) if aliased == role => {
                let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
                let mut copy = value["signatures"][0].clone();
                copy["keyid"] = id.clone().into();
                value["signatures"].as_array_mut().unwrap().push(copy);
                value.to_string().into_bytes()
            }
            Some(_) | None => text.into_bytes(),
        }
    }

    fn role_keys(&self, role: &str) -> RoleKeys {
        let (keys, threshold) = &self.keys[role];
        let mut keys = RoleKeys::new(&keys.iter().map(|key| key.public()).collect::<Vec<_>>(), *threshold);
        if let Some((_, id)) = self.alias.as_ref().filter(|(aliased, _)| aliased == role) {
            keys.keyids.push(id.clone());
        }
        keys
    }

    fn root(&self, version: u64) -> Root {
        let keys: Vec<PublicKey> =
            ROLES[..4].iter().flat_map(|role| self.keys[*role].0.iter().map(|key| key.public())).collect();
        let roles = RootRoles {
            root: self.role_keys("root"),
            timestamp: self.role_keys("timestamp"),
            snapshot: self.role_keys("snapshot"),
            targets: self.role_keys("targets"),
        };
        let mut root = Root::new(version, self.expires["root"], &keys, roles);
        if let Some((role, id)) = &self.alias {
            root.keys.insert(id.clone(), self.keys[role].0[0].public().to_object());
        }
        root
    }

    /// The first root, which the client trusts, anew.
    pub fn reroot(&mut self) {
        self.root_version(1);
        self.trusted_root = self.files["metadata/1.root.json"].clone();
    }

    /// A root of this version from the present keys.
    pub fn root_version(&mut self, version: u64) {
        let bytes = self.sign("root", &self.root(version));
        self.files.insert(format!("metadata/{version}.root.json"), bytes);
    }

    /// Every other file, anew.
    pub fn write(&mut self) {
        let mut target = |path: &str, bytes: &[u8]| {
            let (folder, name) = path.rsplit_once('/').map_or((String::new(), path), |(a, b)| (format!("{a}/"), b));
            self.files.insert(format!("targets/{folder}{}.{name}", hex::sha256(bytes)), bytes.to_vec());
            (path.to_owned(), TargetFile::of(bytes))
        };
        let mut image = Targets::new(self.versions["image-minimal"], self.expires["image-minimal"]);
        image.targets.extend([target("minimal/1/manifest.json", b"{\"manifest\":1}")]);
        let mut top = Targets::new(self.versions["targets"], self.expires["targets"]);
        top.targets.extend([target("site.json", b"{\"site\":1}")]);
        if let Some((role, path)) = self.extra_target.clone() {
            let entry = target(&path, b"foreign");
            if role == "targets" { &mut top } else { &mut image }.targets.extend([entry]);
        }
        let (keys, threshold) = &self.keys["image-minimal"];
        let keys: Vec<PublicKey> = keys.iter().map(|key| key.public()).collect();
        top.delegate("image-minimal", &keys, *threshold, vec!["minimal/*/manifest.json".into()], true);

        let mut snapshot = Snapshot::new(self.versions["snapshot"], self.expires["snapshot"]);
        for (role, mut document) in [("image-minimal", image), ("targets", top)] {
            document.spec_version.clone_from(&self.spec_version);
            let version = self.versions[role];
            let bytes = self.sign(role, &document);
            if !self.unlisted.iter().any(|unlisted| unlisted == role) {
                snapshot.meta.insert(format!("{role}.json"), self.listing(version, &bytes));
            }
            self.files.insert(format!("metadata/{version}.{role}.json"), bytes);
        }
        let bytes = self.sign("snapshot", &snapshot);
        self.files.insert(format!("metadata/{}.snapshot.json", snapshot.version), bytes.clone());
        let mut timestamp =
            TimestampRole::new(self.versions["timestamp"], self.expires["timestamp"], snapshot.version, &bytes);
        timestamp.meta.insert("snapshot.json".into(), self.listing(snapshot.version, &bytes));
        let bytes = self.sign("timestamp", &timestamp);
        self.files.insert("metadata/timestamp.json".into(), bytes);
    }

    fn listing(&self, version: u64, bytes: &[u8]) -> MetaFile {
        if self.hashes {
            MetaFile::of(version, bytes)
        } else {
            MetaFile { version, length: None, hashes: BTreeMap::new() }
        }
    }

    /// Version 2 of everything but root.
    pub fn bump_all(&mut self) {
        for role in &ROLES[1..] {
            self.versions.insert((*role).to_owned(), 2);
        }
        self.write();
    }

    pub fn client(&self, seen: Seen) -> Result<Client, TufError> {
        Client::new(&self.trusted_root, seen, now(), self.limits, self.policy, self.wanted.clone())
    }

    pub fn fetch(&self, path: &str) -> Fetched {
        self.files.get(path).map_or(Fetched::Absent, |bytes| Fetched::Bytes(bytes.clone()))
    }

    pub fn drive(&self, client: &mut Client) -> Result<(), TufError> {
        while let Request::Fetch { path, .. } = client.next() {
            client.feed(self.fetch(&path))?;
        }
        Ok(())
    }

    pub fn update(&self, seen: Seen) -> Result<Outcome, TufError> {
        let mut client = self.client(seen)?;
        self.drive(&mut client)?;
        client.finish()
    }
}
