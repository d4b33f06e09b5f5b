//! What a signing request asks for, in plain words, made of the documents themselves.
//!
//! Every difference is told: what these words know no better name for is shown as it is. Text of a request is shown
//! without control characters: it must not be able to rewrite a signer's screen.

use crate::request::{Document, Need, Request, called, plain, wrong};
use crate::sealed::fingerprint;
use crate::signing::target_file;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::tuf::{RoleKeys, Root, Snapshot, TargetFile, TargetPath, Targets};
use kiln_release::{Manifest, Site, hex};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

impl Request {
    /// Line by line.
    pub fn words(&self, now: Timestamp) -> Result<Vec<String>, SiteError> {
        self.check_bases()?;
        let mut lines = vec![format!("site {}: {}", self.site, self.name)];
        for document in &self.documents {
            let (version, expires) = (&document.envelope["signed"]["version"], &document.envelope["signed"]["expires"]);
            let expires: Timestamp = serde_json::from_value(expires.clone()).map_err(|e| wrong(e.to_string()))?;
            let days = expires.duration_since(now).as_hours() / 24;
            lines.push(String::new());
            lines.push(format!("{} version {version}, expires {expires} (in {days} days)", document.role));
            match document.role.as_str() {
                Root::TYPE => self.root_words(document, &mut lines)?,
                Targets::TYPE => self.targets_words(document, &mut lines)?,
                Snapshot::TYPE => snapshot_words(document, &mut lines)?,
                _ => self.list_words(document, &mut lines)?,
            }
            lines.push(format!("  SHA-256 of what is signed: {}", document.digest()?));
        }
        lines.push(String::new());
        for lacking in self.lacking()? {
            lines.push(lacking.words(&self.names));
        }
        Ok(lines.iter().map(|line| plain(line)).collect())
    }

    /// The keys of the root in force, for comparison with what is on paper. Those of the new root at a new site.
    pub fn anchor_words(&self) -> Result<Vec<String>, SiteError> {
        let root = match self.base_root()? {
            Some(root) => root,
            None => self.new_root()?,
        };
        let mut lines =
            vec![format!("root version {}: {} of these keys sign for it", root.version, root.roles.root.threshold)];
        lines.extend(root.roles.root.keyids.iter().map(|id| self.key_line(id)));
        Ok(lines.iter().map(|line| plain(line)).collect())
    }

    fn key_line(&self, keyid: &str) -> String {
        let name = self.names.get(keyid).map_or_else(String::new, |name| format!("  {name}"));
        format!("    {}{name}", fingerprint(keyid))
    }

    fn root_words(&self, document: &Document, lines: &mut Vec<String>) -> Result<(), SiteError> {
        let (root, before) = (document.read::<Root>()?, self.base_root()?);
        let roles = |root: &Root| -> [(&'static str, RoleKeys); 4] {
            let roles = root.roles.clone();
            [
                ("root", roles.root),
                ("targets", roles.targets),
                ("snapshot", roles.snapshot),
                ("timestamp (online)", roles.timestamp),
            ]
        };
        let known = before.as_ref().map(roles);
        for (at, (name, keys)) in roles(&root).into_iter().enumerate() {
            let old = known.as_ref().map(|known| &known[at].1);
            if old == Some(&keys) {
                lines.push(format!("  {name}: {} of {} keys, as before", keys.threshold, keys.keyids.len()));
                continue;
            }
            lines.push(format!("  {name}: {} of {} keys sign:", keys.threshold, keys.keyids.len()));
            self.keys_words(&keys.keyids, old.map(|old| old.keyids.as_slice()), lines);
        }
        if !root.consistent_snapshot {
            lines.push("  consistent snapshots are off".into());
        }
        Ok(())
    }

    fn keys_words(&self, keyids: &[String], before: Option<&[String]>, lines: &mut Vec<String>) {
        for id in keyids {
            let new = before.is_some_and(|before| !before.contains(id));
            lines.push(self.key_line(id) + if new { "  NEW" } else { "" });
        }
        for gone in before.into_iter().flatten().filter(|id| !keyids.contains(id)) {
            lines.push(self.key_line(gone) + "  REMOVED");
        }
    }

    fn targets_words(&self, document: &Document, lines: &mut Vec<String>) -> Result<(), SiteError> {
        let (targets, before) = (document.read::<Targets>()?, self.base_targets()?);
        let empty = BTreeMap::new();
        let old = before.as_ref().map_or(&empty, |before| &before.targets);
        let mut same = differences(&targets.targets, old, lines, |path, file, lines| {
            if *path != TargetPath::site() {
                return Ok(false);
            }
            let new = self.new_site(path, file)?;
            let known = self.base.get(path.as_str()).filter(|_| old.contains_key(path.as_str()));
            if known.is_none() && old.contains_key(path.as_str()) {
                return Err(wrong("site.json before is not in the request: what is taken away would not be told"));
            }
            if let Some(text) = known {
                let listed = old.get(path.as_str()).and_then(TargetFile::sha256);
                if listed != Some(hex::sha256(text.as_bytes()).as_str()) {
                    return Err(wrong("site.json before is not the one that was signed"));
                }
            }
            let known: Option<Value> = match known {
                Some(text) => Some(serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?),
                None => None,
            };
            site_words(&new, known.as_ref(), lines);
            Ok(true)
        })?;
        let delegated = |targets: &Targets| targets.delegations.clone().map(|d| d.roles).unwrap_or_default();
        let old = before.as_ref().map(delegated).unwrap_or_default();
        let new = delegated(&targets);
        for role in &new {
            let known = old.iter().find(|known| known.name == role.name);
            if known == Some(role) {
                same += 1;
                continue;
            }
            let (paths, ends) = (role.paths.clone().unwrap_or_default().join(", "), role.terminating);
            lines.push(format!(
                "  {} of {} keys sign {}, which may list {paths}{}{}:",
                role.threshold,
                role.keyids.len(),
                role.name,
                if ends { "" } else { ", not terminating" },
                role.path_hash_prefixes.as_ref().map_or_else(String::new, |p| format!(", prefixes {}", p.join(" "))),
            ));
            self.keys_words(&role.keyids, known.map(|known| known.keyids.as_slice()), lines);
        }
        for gone in old.iter().filter(|known| !new.iter().any(|role| role.name == known.name)) {
            lines.push(format!("  {} is delegated to no more", gone.name));
        }
        lines.push(format!("  {same} other entries stay as they are"));
        Ok(())
    }

    fn list_words(&self, document: &Document, lines: &mut Vec<String>) -> Result<(), SiteError> {
        let (list, before) = (document.read::<Targets>()?, self.base_role(&document.role)?);
        let empty = BTreeMap::new();
        let old = before.as_ref().map_or(&empty, |before| &before.targets);
        let same = differences(&list.targets, old, lines, |path, file, lines| {
            let Some((image, release)) = crate::repository::release_of(path.as_str()) else { return Ok(false) };
            let text = self.targets.get(&target_name(path, file)).ok_or_else(|| missing(path))?;
            check_file(path, file, text)?;
            let manifest =
                Manifest::read(text.as_bytes(), image, release).map_err(SiteError::format(path.as_str().into()))?;
            lines.push(format!("  ADDS release {image}/{release}"));
            let Manifest { class, architecture, product, built, uki, root, verity, command_line, .. } = &manifest;
            for (name, value) in [
                ("class", class),
                ("for", &format!("{architecture}, {product}")),
                ("built", &built.to_string()),
                ("manifest SHA-256", &hex::sha256(text.as_bytes())),
                ("UKI SHA-256", &format!("{} ({} bytes)", uki.sha256, uki.length)),
                ("root SHA-256", &format!("{} ({} bytes)", root.sha256, root.length)),
                ("root hash", &verity.root_hash),
                ("command line", command_line),
            ] {
                lines.push(format!("    {name:<17} {value}"));
            }
            Ok(true)
        })?;
        lines.push(format!("  {same} other releases stay as they are"));
        if list.delegations.is_some() {
            lines.push("  and it delegates to others, which no list of an image should".into());
        }
        Ok(())
    }

    /// The new `site.json`: what a machine would take, field by field.
    fn new_site(&self, path: &TargetPath, file: &TargetFile) -> Result<Value, SiteError> {
        let text = self.targets.get(&target_name(path, file)).ok_or_else(|| missing(path))?;
        check_file(path, file, text)?;
        Site::read(text.as_bytes()).map_err(SiteError::format(path.as_str().into()))?;
        serde_json::from_str(text).map_err(|error| wrong(format!("{path}: {error}")))
    }

    /// The floors that this request raises, by image.
    pub fn raised_floors(&self) -> Result<BTreeMap<String, u64>, SiteError> {
        let read = |text: &String| serde_json::from_str::<Site>(text).map_err(|error| wrong(error.to_string()));
        let new = self.targets.iter().find(|(path, _)| path.ends_with(".site.json"));
        let Some((_, text)) = new else { return Ok(BTreeMap::new()) };
        let (new, old) = (read(text)?, self.base.get(TargetPath::site().as_str()).map(read).transpose()?);
        let before = |image: &str| old.as_ref().map_or(1, |old| old.floor(image));
        Ok(new.floors.iter().filter(|(image, floor)| **floor > before(image)).map(|(i, f)| (i.clone(), *f)).collect())
    }

    /// Releases that it adds, as `(image, number)`.
    pub(crate) fn added_releases(&self) -> Result<Vec<(String, u64)>, SiteError> {
        let mut added = BTreeSet::new();
        for document in self.documents.iter().filter(|document| document.role.starts_with("image-")) {
            let (list, before) = (document.read::<Targets>()?, self.base_role(&document.role)?);
            let new =
                list.targets.keys().filter(|path| !before.as_ref().is_some_and(|b| b.targets.contains_key(*path)));
            added.extend(new.filter_map(|path| crate::repository::release_of(path)).map(|(i, n)| (i.to_owned(), n)));
        }
        Ok(added.into_iter().collect())
    }

    /// Published releases that it takes out of their image's list, by image.
    pub fn removed_releases(&self) -> Result<BTreeMap<String, BTreeSet<u64>>, SiteError> {
        let mut removed: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
        for document in self.documents.iter().filter(|document| document.role.starts_with("image-")) {
            let list = document.read::<Targets>()?;
            let Some(before) = self.base_role(&document.role)? else { continue };
            let gone = before.targets.keys().filter(|path| !list.targets.contains_key(*path));
            for (image, release) in gone.filter_map(|path| crate::repository::release_of(path)) {
                removed.entry(image.to_owned()).or_default().insert(release);
            }
        }
        Ok(removed)
    }

    /// Who may sign what, for the coordinator's screen.
    pub fn needs_words(&self) -> Result<Vec<String>, SiteError> {
        let mut lines = Vec::new();
        for document in &self.documents {
            for Need { keyids, threshold, .. } in self.needs(document)? {
                let who: Vec<String> = keyids.iter().map(|id| called(id, &self.names)).collect();
                lines.push(format!("{}: {threshold} of {}", document.role, who.join(", ")));
            }
        }
        lines.dedup();
        Ok(lines.iter().map(|line| plain(line)).collect())
    }
}

/// Tells what is new, changed or gone; counts what is as before.
fn differences(
    new: &BTreeMap<String, TargetFile>,
    old: &BTreeMap<String, TargetFile>,
    lines: &mut Vec<String>,
    known: impl Fn(&TargetPath, &TargetFile, &mut Vec<String>) -> Result<bool, SiteError>,
) -> Result<usize, SiteError> {
    let mut same = 0;
    for (path, file) in new {
        if old.get(path) == Some(file) {
            same += 1;
            continue;
        }
        let word = if old.contains_key(path) { "CHANGES" } else { "ADDS" };
        let checked = TargetPath::new(path.clone()).map_err(|error| wrong(error.to_string()))?;
        if old.contains_key(path) && crate::repository::release_of(path).is_some() {
            lines.push(format!("  CHANGES a release that is published, {path}: a release never changes"));
        }
        if !known(&checked, file, lines)? {
            lines.push(format!("  {word} {path}: {} bytes, SHA-256 {}", file.length, file.sha256().unwrap_or("none")));
        }
        if let Some(custom) = &file.custom {
            lines.push(format!("    with {custom}"));
        }
    }
    for gone in old.keys().filter(|path| !new.contains_key(*path)) {
        lines.push(format!("  REMOVES {gone}"));
    }
    Ok(same)
}

fn target_name(path: &TargetPath, file: &TargetFile) -> String {
    let hash = file.sha256().unwrap_or_default();
    match path.as_str().rsplit_once('/') {
        Some((folder, name)) => format!("targets/{folder}/{hash}.{name}"),
        None => format!("targets/{hash}.{path}"),
    }
}

fn missing(path: &TargetPath) -> SiteError {
    wrong(format!("{path} is to be signed, but is not in the request"))
}

fn check_file(path: &TargetPath, file: &TargetFile, text: &str) -> Result<(), SiteError> {
    let holds = file.length == text.len() as u64 && target_name(path, file) == target_file(path, text.as_bytes());
    if holds { Ok(()) } else { Err(wrong(format!("{path} in the request is not the one that is to be signed"))) }
}

fn snapshot_words(document: &Document, lines: &mut Vec<String>) -> Result<(), SiteError> {
    let snapshot: Snapshot = document.read()?;
    let names = snapshot.meta.iter().map(|(file, meta)| format!("{file} {}", meta.version));
    lines.push(format!("  the newest versions are: {}", names.collect::<Vec<_>>().join(", ")));
    Ok(())
}

/// Field by field; keys by their fingerprints.
fn site_words(new: &Value, old: Option<&Value>, lines: &mut Vec<String>) {
    let empty = Value::Null;
    let names: BTreeSet<&String> =
        [Some(new), old].into_iter().flatten().filter_map(Value::as_object).flat_map(serde_json::Map::keys).collect();
    for name in names {
        let (is, was) = (new.get(name).unwrap_or(&empty), old.and_then(|old| old.get(name)).unwrap_or(&empty));
        if is == was {
            continue;
        }
        match (name.as_str(), is.as_object()) {
            ("directors" | "operators", Some(keys)) => {
                lines.push(format!("  site.json: {name} are"));
                lines.extend(keys.keys().map(|id| format!("    {}", fingerprint(id))));
            }
            ("floors", Some(floors)) => {
                for (image, floor) in floors.iter().filter(|(image, floor)| was.get(*image) != Some(floor)) {
                    lines.push(format!(
                        "  site.json: FLOOR of {image} is {floor}: no machine runs a lower release again"
                    ));
                }
                for image in
                    was.as_object().into_iter().flat_map(serde_json::Map::keys).filter(|i| !floors.contains_key(*i))
                {
                    lines.push(format!("  site.json: the floor of {image} is taken away"));
                }
            }
            ("agent_api", _) => {
                let pem = is["ca_pem"].as_str().unwrap_or_default();
                lines.push(format!(
                    "  site.json: the agent API's CA is the one with SHA-256 {}",
                    hex::sha256(pem.as_bytes())
                ));
                let keys = is["keys"].as_array().into_iter().flatten().filter_map(Value::as_str);
                lines.extend(
                    keys.map(|id| format!("  site.json: of the agent API only this key counts: {}", fingerprint(id))),
                );
            }
            _ if old.is_none() => lines.push(format!("  site.json: {name} is {is}")),
            _ => lines.push(format!("  site.json: {name} is {is}, was {was}")),
        }
    }
}
