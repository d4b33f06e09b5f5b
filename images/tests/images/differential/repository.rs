//! Random TUF repositories in one or two states, some of them with defects. The same seed gives the same but for dates.

mod cases;

pub use cases::{case, tidy_case};

use super::defects::Defect::*;
use super::defects::{Defect, OF_DELEGATIONS, OF_DOCUMENT, OF_FILE, OF_KEYS, OF_LISTING, OF_TARGETS};
use super::mutate::Random;
use jiff::Timestamp;
use kiln_release::canonical::canonical;
use kiln_release::tuf::matches_pattern;
use kiln_release::{Signer, hex};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// What a client is given, and what was done to it.
pub struct Case {
    pub seed: u64,
    pub now: Timestamp,
    pub root: Vec<u8>,
    /// The repository's files at one time, then at a later one.
    pub states: Vec<BTreeMap<String, Vec<u8>>>,
    pub targets: Vec<String>,
    pub defects: Vec<String>,
    /// Delegated roles, as often as they are delegated to, and by which patterns or hash prefixes.
    pub delegations: Vec<(&'static str, Vec<String>)>,
}

const TOP: [&str; 4] = ["root", "timestamp", "snapshot", "targets"];
/// Keys that a role may have; each role has its own.
const POOL: usize = 4;

#[derive(Clone)]
struct Role {
    keys: Vec<usize>,
    threshold: u64,
    version: u64,
    expires: Timestamp,
}

#[derive(Clone)]
struct Delegation {
    parent: &'static str,
    name: &'static str,
    paths: Value,
    terminating: bool,
}

impl Delegation {
    fn words(&self) -> Vec<String> {
        self.paths.as_array().into_iter().flatten().filter_map(|path| path.as_str().map(str::to_owned)).collect()
    }

    /// Digits of a hash, and no patterns.
    fn has_prefixes(&self) -> bool {
        self.paths[0].as_str().is_some_and(|p| p.len() < 3 && p != "*")
    }

    fn covers(&self, path: &str) -> bool {
        let sum = hex::sha256(path.as_bytes());
        self.words()
            .iter()
            .any(|word| if self.has_prefixes() { sum.starts_with(word) } else { matches_pattern(word, path) })
    }
}

struct Maker {
    random: Random,
    now: Timestamp,
    roles: BTreeMap<&'static str, Role>,
    delegations: Vec<Delegation>,
    listed: Vec<(&'static str, &'static str)>,
    consistent: bool,
    with_hashes: bool,
    with_length: bool,
    /// Defects of this state: role, what.
    defects: Vec<(&'static str, Defect)>,
    noted: Vec<String>,
}

fn key(role: &str, number: usize) -> Signer {
    let mut seed = [0; 32];
    for (at, byte) in role.bytes().chain([0, u8::try_from(number).unwrap()]).enumerate() {
        seed[at % 32] ^= byte.rotate_left(u32::try_from(at / 32).unwrap());
    }
    Signer::from_seed(&seed)
}

fn days(now: Timestamp, days: i64) -> Timestamp {
    Timestamp::from_second(now.as_second() + days * 86_400).unwrap()
}

fn content(path: &str) -> Vec<u8> {
    format!("content of {path}").into_bytes()
}

fn sha512(bytes: &[u8]) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA512, bytes).as_ref())
}

impl Maker {
    fn role(&mut self) -> Role {
        let number = 1 + self.random.below(3);
        let mut keys: Vec<usize> = (0..POOL).collect();
        while keys.len() > number {
            keys.remove(self.random.below(keys.len()));
        }
        Role {
            threshold: 1 + self.random.below(number) as u64,
            keys,
            version: 1 + self.random.below(4) as u64,
            expires: days(self.now, 10 + i64::try_from(self.random.below(300)).unwrap()),
        }
    }

    fn has(&self, role: &str, defect: Defect) -> bool {
        self.defects.contains(&(self.name(role), defect))
    }

    fn name(&self, role: &str) -> &'static str {
        self.roles.keys().find(|name| **name == role).copied().unwrap_or("root")
    }

    /// Whether some chain of delegations lets a role speak of a path. Without cycles.
    fn reaches(&self, role: &str, path: &str) -> bool {
        let mut parents = self.delegations.iter().filter(|d| d.name == role && d.covers(path));
        role == "targets" || parents.any(|d| self.reaches(d.parent, path))
    }

    /// Key ids, threshold, and the key objects they name.
    fn key_list(&self, owner: &str, role: &str, keys: &mut Map<String, Value>) -> (Vec<String>, u64) {
        let of = &self.roles[role];
        let mut ids = Vec::new();
        for number in &of.keys {
            let public = key(role, *number).public();
            keys.insert(public.id(), public.to_object());
            ids.push(public.id());
        }
        let mut threshold = of.threshold;
        // A defect of who lists the keys, of the first role it lists.
        let first = role == "root" && owner == "root"
            || self.delegations.iter().find(|d| d.parent == owner).is_some_and(|d| d.name == role);
        if first {
            if self.has(owner, ThresholdZero) {
                threshold = 0;
            }
            if self.has(owner, KeyIdTwice) {
                ids.push(ids[0].clone());
            }
            if self.has(owner, KeyIdUnknown) {
                ids.push("ab".repeat(32));
            }
            if self.has(owner, KeyUnderTwoNames) {
                let public = key(role, of.keys[0]).public();
                keys.insert("another-name".into(), public.to_object());
                ids = vec![public.id(), "another-name".into()];
                threshold = 2;
            }
        }
        (ids, threshold)
    }

    fn outline(&self, role: &str, kind: &str) -> Map<String, Value> {
        let of = &self.roles[role];
        let mut map = Map::new();
        map.insert("_type".into(), if self.has(role, WrongType) { "mirror".into() } else { kind.into() });
        let spec = self.defects.iter().find_map(|(of, defect)| {
            if let SpecVersion(text) = defect { (*of == role).then_some(*text) } else { None }
        });
        map.insert("spec_version".into(), spec.unwrap_or("1.0.31").into());
        let version = if self.has(role, VersionZero) {
            json!(0)
        } else if self.has(role, NegativeVersion) {
            json!(-1)
        } else {
            json!(of.version)
        };
        map.insert("version".into(), version);
        let expires = if self.has(role, Expired) { days(self.now, -3) } else { of.expires };
        let mut text = expires.to_string();
        if self.has(role, ExpiresWithFraction) {
            text = text.replace('Z', ".5Z");
        } else if self.has(role, ExpiresWithOffset) {
            text = text.replace('Z', "+00:00");
        }
        map.insert("expires".into(), text.into());
        if self.has(role, NoVersion) {
            map.remove("version");
        }
        if self.has(role, NoExpires) {
            map.remove("expires");
        }
        if self.has(role, UnknownField) {
            map.insert("x-note".into(), json!({ "ä\"\\": [1, null, "\n"] }));
        }
        map
    }

    fn root(&self) -> Value {
        let mut map = self.outline("root", "root");
        map.insert("consistent_snapshot".into(), self.consistent.into());
        let (mut keys, mut roles) = (Map::new(), Map::new());
        for role in TOP {
            let (keyids, threshold) = self.key_list("root", role, &mut keys);
            roles.insert(role.into(), json!({ "keyids": keyids, "threshold": threshold }));
        }
        map.insert("keys".into(), keys.into());
        map.insert("roles".into(), roles.into());
        map.into()
    }

    fn targets(&self, role: &str) -> Value {
        let mut map = self.outline(role, "targets");
        let mut targets = Map::new();
        for (number, (_, path)) in self.listed.iter().filter(|(of, _)| *of == role).enumerate() {
            let bytes = content(path);
            let mut hashes = json!({ "sha256": hex::sha256(&bytes) });
            let mut length = json!(bytes.len());
            if number == 0 {
                if self.has(role, TargetWithoutHash) {
                    hashes = json!({});
                }
                if self.has(role, TargetUnknownHash) {
                    hashes["whirlpool-x"] = "00".into();
                }
                if self.has(role, TargetHashUpperCase) {
                    hashes = json!({ "sha256": hex::sha256(&bytes).to_uppercase() });
                }
                if self.has(role, TargetHashWrong) {
                    hashes = json!({ "sha256": hex::sha256(b"other") });
                }
                if self.has(role, TargetLengthWrong) {
                    length = json!(bytes.len() + 1);
                }
                if self.has(role, TargetNegativeLength) {
                    length = json!(-1);
                }
            }
            targets.insert((*path).into(), json!({ "length": length, "hashes": hashes }));
        }
        map.insert("targets".into(), targets.into());
        let children: Vec<&Delegation> = self.delegations.iter().filter(|d| d.parent == role).collect();
        if !children.is_empty() {
            let (mut keys, mut roles) = (Map::new(), Vec::new());
            for (number, child) in children.iter().enumerate() {
                let (keyids, threshold) = self.key_list(role, child.name, &mut keys);
                let mut one = json!({ "name": child.name, "keyids": keyids, "threshold": threshold,
                    "terminating": child.terminating });
                let field = if child.has_prefixes() { "path_hash_prefixes" } else { "paths" };
                one[field] = child.paths.clone();
                if number == 0 {
                    if self.has(role, TopLevelDelegation) {
                        one["name"] = "snapshot".into();
                    }
                    if self.has(role, PathsAndPrefixes) {
                        (one["paths"], one["path_hash_prefixes"]) = (json!(["*"]), json!(["0"]));
                    }
                    if self.has(role, NeitherPathsNorPrefixes) {
                        one.as_object_mut().unwrap().remove(field);
                    }
                    if self.has(role, NoTerminating) {
                        one.as_object_mut().unwrap().remove("terminating");
                    }
                }
                roles.push(one);
            }
            if self.has(role, DelegationTwice) {
                roles.push(roles[0].clone());
            }
            map.insert("delegations".into(), json!({ "keys": keys, "roles": roles }));
        }
        map.into()
    }

    /// The file of a signed document; `signers` are keys by role and number.
    fn sign(&self, role: &str, document: &Value, signers: &[(String, usize)]) -> Vec<u8> {
        let message = canonical(document).unwrap();
        let mut signatures = Vec::new();
        for (of, number) in signers {
            let signer = key(of, *number);
            let id = signer.public().id();
            signatures.push(json!({ "keyid": id, "sig": hex::encode(&signer.sign(&message)) }));
        }
        let (first, count) = (signatures.first().cloned(), signatures.len());
        if self.has(role, TooFewSignatures) {
            signatures.truncate(count.saturating_sub(1).min(usize::try_from(self.roles[role].threshold).unwrap() - 1));
        }
        if self.has(role, ForeignSignature) {
            let foreign = key("nobody", 0);
            let sig = hex::encode(&foreign.sign(&message));
            for entry in &mut signatures {
                entry["sig"] = sig.clone().into();
            }
        }
        if self.has(role, SignatureTwice) {
            signatures.extend(first.clone());
        }
        if self.has(role, SignatureEmpty) {
            signatures.push(json!({ "keyid": key(role, POOL).public().id(), "sig": "" }));
        }
        if self.has(role, SignatureUnknown) {
            signatures.push(json!({ "keyid": "cd".repeat(32), "sig": "00" }));
        }
        if self.has(role, SignatureNotHex) {
            signatures.push(json!({ "keyid": "ef".repeat(32), "sig": "no hex" }));
        }
        if self.has(role, SignatureUpperCase) {
            for entry in &mut signatures {
                entry["sig"] = entry["sig"].as_str().unwrap_or_default().to_uppercase().into();
            }
        }
        // Where a key has two names in the list of keys, it signs under both.
        let two = self.defects.iter().any(|(_, defect)| *defect == KeyUnderTwoNames);
        if let Some(mut copy) = first.filter(|_| two) {
            copy["keyid"] = "another-name".into();
            signatures.push(copy);
        }
        let envelope = json!({ "signatures": signatures, "signed": document });
        if self.has(role, Pretty) {
            serde_json::to_vec_pretty(&envelope).unwrap()
        } else {
            envelope.to_string().into_bytes()
        }
    }

    fn own_signers(&self, role: &str) -> Vec<(String, usize)> {
        self.roles[role].keys.iter().map(|number| (role.to_owned(), *number)).collect()
    }

    fn listing(&self, role: &str, bytes: &[u8]) -> Value {
        let mut version = self.roles[role].version;
        if self.has(role, ListedVersionWrong) {
            version += 1;
        }
        let mut meta = json!({ "version": version });
        if self.with_hashes {
            meta["hashes"] = json!({ "sha256": hex::sha256(bytes), "sha512": sha512(bytes) });
        }
        if self.with_length {
            meta["length"] = json!(bytes.len());
        }
        if self.has(role, ListedHashWrong) {
            meta["hashes"] = json!({ "sha256": hex::sha256(b"other") });
        }
        if self.has(role, ListedLengthWrong) {
            meta["length"] = json!(bytes.len() - 1);
        }
        if self.has(role, ListedNoHashes) {
            meta["hashes"] = json!({});
        }
        if self.has(role, ListedUnknownHash) {
            meta["hashes"] = json!({ "sha256": hex::sha256(bytes), "whirlpool-x": "00" });
        }
        meta
    }

    fn file_name(&self, role: &str) -> String {
        let mut quoted = String::new();
        for byte in role.bytes() {
            if byte.is_ascii_alphanumeric() || byte == b'-' {
                quoted.push(char::from(byte));
            } else {
                write!(quoted, "%{byte:02X}").unwrap();
            }
        }
        match role {
            "timestamp" => "metadata/timestamp.json".into(),
            "root" => format!("metadata/{}.root.json", self.roles[role].version),
            // Also where it is listed with another version than it has: else it would only be missing.
            _ if self.consistent => {
                let wrong = u64::from(self.has(role, ListedVersionWrong));
                format!("metadata/{}.{quoted}.json", self.roles[role].version + wrong)
            }
            _ => format!("metadata/{quoted}.json"),
        }
    }

    /// Damage that comes after everything was listed and signed.
    fn damage(&mut self, role: &'static str, mut bytes: Vec<u8>, files: &mut BTreeMap<String, Vec<u8>>) {
        let name = self.file_name(role);
        if self.has(role, Missing) {
            return;
        }
        if self.has(role, Truncated) {
            bytes.truncate(self.random.below(bytes.len()));
        }
        if self.has(role, FlippedByte) {
            let (at, bit) = (self.random.below(bytes.len()), self.random.below(7));
            bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << bit);
        }
        if self.has(role, JsonKeyTwice) {
            let text = String::from_utf8(bytes).unwrap();
            bytes = text.replacen("\"_type\"", "\"_type\":\"x\",\"_type\"", 1).into_bytes();
        }
        if self.has(role, TrailingBytes) {
            bytes.extend(b" {}");
        }
        if self.has(role, OtherRolesFile)
            && let Some(other) = files.values().next_back()
        {
            bytes.clone_from(other);
        }
        files.insert(name, bytes);
    }

    /// Everything but the roots.
    fn write(&mut self, files: &mut BTreeMap<String, Vec<u8>>) {
        let (mut meta, names) = (Map::new(), self.roles.keys().copied().collect::<Vec<_>>());
        for role in names.into_iter().filter(|role| !["root", "timestamp", "snapshot"].contains(role)) {
            let bytes = self.sign(role, &self.targets(role), &self.own_signers(role));
            if !self.has(role, NotListed) {
                meta.insert(format!("{role}.json"), self.listing(role, &bytes));
            }
            self.damage(role, bytes, files);
        }
        let mut snapshot = self.outline("snapshot", "snapshot");
        snapshot.insert("meta".into(), meta.into());
        let bytes = self.sign("snapshot", &snapshot.into(), &self.own_signers("snapshot"));
        let mut timestamp = self.outline("timestamp", "timestamp");
        let mut meta = json!({ "snapshot.json": self.listing("snapshot", &bytes) });
        if self.has("snapshot", NotListed) {
            meta = json!({});
        }
        timestamp.insert("meta".into(), meta);
        self.damage("snapshot", bytes, files);
        let bytes = self.sign("timestamp", &timestamp.into(), &self.own_signers("timestamp"));
        self.damage("timestamp", bytes, files);
        for (_, path) in &self.listed {
            let bytes = content(path);
            let (folder, name) = path.rsplit_once('/').map_or((String::new(), *path), |(a, b)| (format!("{a}/"), b));
            files.insert(format!("targets/{folder}{name}"), bytes.clone());
            // Under each name that a listing above can give it.
            for hash in [hex::sha256(&bytes), hex::sha256(&bytes).to_uppercase(), hex::sha256(b"other"), "00".into()] {
                files.insert(format!("targets/{folder}{hash}.{name}"), bytes.clone());
            }
        }
    }

    /// The next root: other keys for some role, signed by the old ones and the new.
    fn next_root(&mut self, files: &mut BTreeMap<String, Vec<u8>>) {
        let mut signers: BTreeSet<(String, usize)> = self.own_signers("root").into_iter().collect();
        let role = TOP[self.random.below(4)];
        let (version, fresh) = (self.roles[role].version, self.role());
        self.roles.insert(role, Role { version, ..fresh });
        self.noted.push(format!("{role} rotated"));
        self.roles.get_mut("root").unwrap().version += 1;
        signers.extend(self.own_signers("root"));
        let signers: Vec<_> = signers.into_iter().collect();
        let bytes = self.sign("root", &self.root(), &signers);
        self.damage("root", bytes, files);
    }

    fn choose_defects(&mut self) {
        self.defects.clear();
        let roles: Vec<&'static str> = self.roles.keys().copied().collect();
        let number = [0, 0, 1, 1, 1, 2][self.random.below(6)];
        for _ in 0..number {
            let role = roles[self.random.below(roles.len())];
            let groups: [&[Defect]; 6] = [&OF_DOCUMENT, &OF_KEYS, &OF_DELEGATIONS, &OF_TARGETS, &OF_LISTING, &OF_FILE];
            let group = groups[self.random.below(groups.len())];
            let defect = group[self.random.below(group.len())];
            self.noted.push(format!("{role} {defect:?}"));
            self.defects.push((role, defect));
        }
    }
}
