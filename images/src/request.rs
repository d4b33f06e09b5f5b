//! A signing request: a file that is carried from signer to signer until each document in it has its threshold.
//!
//! It holds the documents as they will be served, what they replace, and the target files they name, so that a machine
//! without a network can say in plain words what is signed (`words.rs`). Nothing of what a request says about itself is
//! believed: the words are made of the documents, what they replace must be signed, and the signer's own memory
//! (`signer.rs`) knows which root that starts from.

use crate::files::{PUBLIC, read_capped, write_atomic};
use crate::sealed::fingerprint;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::canonical::{canonical, parse_strict};
use kiln_release::key::object_id;
use kiln_release::tuf::{Limits, RoleKeys, Root, Snapshot, TargetPath, Targets};
use kiln_release::{KeySet, PublicKey, Signer, Unverified, hex};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// `_type` of a request.
pub const REQUEST_TYPE: &str = "kiln-signing-request";
/// Roots, an image's list, manifests: more than any of them together.
const MAX_REQUEST: u64 = 32 << 20;
/// The name of a request is for people.
const MAX_NAME: usize = 200;

/// A document that is to be signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// Its file under `repo/`.
    pub path: String,
    /// The TUF role that signs it.
    pub role: String,
    /// TUF's envelope, with the signatures so far.
    pub envelope: Value,
}

/// The file that signers pass on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`REQUEST_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// `1.0`.
    pub spec_version: String,
    /// The site's name.
    pub site: String,
    /// What it is called. Not believed: what is signed is told from the documents.
    pub name: String,
    /// Every root so far, text by text; empty for a new site.
    pub roots: Vec<String>,
    /// What is replaced: the signed text by TUF role, and `site.json`.
    pub base: BTreeMap<String, String>,
    /// What is to be signed.
    pub documents: Vec<Document>,
    /// New target files by path under `repo/`.
    pub targets: BTreeMap<String, String>,
    /// What the keys are called at the site, by key id. For people; a key is known by its fingerprint.
    #[serde(default)]
    pub names: BTreeMap<String, String>,
}

/// Keys of which a threshold must sign a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Key ids.
    pub keyids: Vec<String>,
    /// So many of them.
    pub threshold: u32,
    keys: KeySet,
}

/// What a document still lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lacking {
    /// The TUF role.
    pub role: String,
    /// Key ids that have signed.
    pub signed: Vec<String>,
    /// So many must.
    pub threshold: u32,
    /// Key ids that may still sign.
    pub may_sign: Vec<String>,
}

impl Lacking {
    /// In words.
    pub fn words(&self, names: &BTreeMap<String, String>) -> String {
        let missing = usize::try_from(self.threshold).unwrap_or(usize::MAX).saturating_sub(self.signed.len());
        let who: Vec<String> = self.may_sign.iter().map(|id| called(id, names)).collect();
        let (role, have, need) = (&self.role, self.signed.len(), self.threshold);
        format!("{role} has {have} of {need} signatures and lacks {missing}, of: {}", who.join(", "))
    }
}

/// A key by its name at the site and the beginning of its fingerprint.
pub(crate) fn called(keyid: &str, names: &BTreeMap<String, String>) -> String {
    let short = fingerprint(keyid.get(..16).unwrap_or(keyid));
    names.get(keyid).map_or_else(|| short.clone(), |name| format!("{} ({short})", plain(name)))
}

/// Text of a file, fit for a terminal: nothing in it that a terminal obeys, nothing that turns the line round (Unicode UAX #9)
/// or takes no room.
pub(crate) fn plain(text: &str) -> String {
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
    };
    text.chars().map(|c| if odd(c) { '?' } else { c }).collect()
}

pub(crate) fn wrong(reason: impl Into<String>) -> SiteError {
    SiteError::Request { reason: reason.into() }
}

impl Document {
    pub(crate) fn unsigned<T: Serialize>(path: String, role: &str, document: &T) -> Result<Self, SiteError> {
        let signed = serde_json::to_value(document).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { path, role: role.to_owned(), envelope: json!({ "signatures": [], "signed": signed }) })
    }

    /// What is signed, as a document.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, SiteError> {
        serde_json::from_value(self.envelope["signed"].clone())
            .map_err(|error| wrong(format!("{}: {error}", plain(&self.path))))
    }

    /// The bytes that are signed.
    fn message(&self) -> Result<Vec<u8>, SiteError> {
        canonical(&self.envelope["signed"]).map_err(|error| wrong(format!("{}: {error}", plain(&self.path))))
    }

    /// SHA-256 of what is signed.
    pub(crate) fn digest(&self) -> Result<String, SiteError> {
        Ok(hex::sha256(&self.message()?))
    }

    /// As a file of the repository.
    pub(crate) fn text(&self) -> String {
        format!("{}\n", self.envelope)
    }

    fn put(&mut self, signature: Value) -> Result<(), SiteError> {
        let list =
            self.envelope["signatures"].as_array_mut().ok_or_else(|| wrong("a document without `signatures`"))?;
        list.retain(|known| known["keyid"] != signature["keyid"]);
        list.push(signature);
        Ok(())
    }

    fn signatures(&self) -> &[Value] {
        self.envelope["signatures"].as_array().map_or(&[], Vec::as_slice)
    }

    /// Who of these has signed.
    fn signed_by(&self, need: &Need) -> Vec<String> {
        let text = self.text();
        let Ok(envelope) = Unverified::<Value>::parse(text.as_bytes(), MAX_REQUEST) else { return Vec::new() };
        envelope.check(&need.keys.any()).unwrap_or_default()
    }
}

impl Need {
    pub(crate) fn of(objects: &BTreeMap<String, Value>, keyids: &[String], threshold: u32) -> Self {
        Self { keyids: keyids.to_vec(), threshold, keys: KeySet::of_role(objects, keyids, threshold) }
    }

    pub(crate) fn of_role(root: &Root, role: &RoleKeys) -> Self {
        Self::of(&root.keys, &role.keyids, role.threshold)
    }

    pub(crate) fn of_delegation(targets: &Targets, role: &str) -> Option<Self> {
        let delegations = targets.delegations.as_ref()?;
        let known = delegations.roles.iter().find(|known| known.name == role)?;
        Some(Self::of(&delegations.keys, &known.keyids, known.threshold))
    }

    /// The same keys, of which one is enough.
    pub(crate) fn any(&self) -> KeySet {
        self.keys.any()
    }

    /// What a text says that a threshold of these keys signed.
    pub(crate) fn verify<T: DeserializeOwned>(&self, text: &str, kind: &'static str) -> Result<T, SiteError> {
        let sign = |source| SiteError::Sign { what: format!("{kind} of the request"), source };
        let envelope = Unverified::<T>::parse(text.as_bytes(), MAX_REQUEST).map_err(sign)?;
        Ok(envelope.verify_type(&self.keys, kind).map_err(sign)?.into_inner())
    }
}

impl Request {
    /// Reads a request.
    pub fn read(path: &Path) -> Result<Self, SiteError> {
        let bytes = read_capped(path, MAX_REQUEST)?.ok_or_else(|| SiteError::NoRequest { path: path.into() })?;
        if bytes.len() as u64 > MAX_REQUEST {
            return Err(wrong(format!("longer than {MAX_REQUEST} bytes")));
        }
        let value = parse_strict(&bytes).map_err(|error| wrong(error.to_string()))?;
        let request: Self = serde_json::from_value(value).map_err(|error| wrong(error.to_string()))?;
        if request.type_ != REQUEST_TYPE || request.spec_version.split('.').next() != Some("1") {
            let (kind, version) = (plain(&request.type_), plain(&request.spec_version));
            return Err(wrong(format!("_type {kind}, spec_version {version}: not one that this kiln reads")));
        }
        request.check()?;
        Ok(request)
    }

    /// Paths lead nowhere but into the repository, and each document lies where its role and version say.
    fn check(&self) -> Result<(), SiteError> {
        if [&self.name, &self.site].into_iter().chain(self.names.values()).any(|name| name.chars().count() > MAX_NAME) {
            return Err(wrong("a name in it is too long"));
        }
        for (at, document) in self.documents.iter().enumerate() {
            if self.documents[..at].iter().any(|other| other.role == document.role) {
                return Err(wrong(format!(
                    "{} is in it twice: one document of each kind is signed",
                    plain(&document.role)
                )));
            }
        }
        for document in &self.documents {
            let version = document.envelope["signed"]["version"].as_u64();
            let version = version.ok_or_else(|| wrong("a document without `version`"))?;
            let role = TargetPath::new(document.role.clone()).map_err(|error| wrong(error.to_string()))?;
            let expected = format!("metadata/{version}.{role}.json");
            if document.path != expected || role.as_str().contains('/') {
                return Err(wrong(format!("{} is not {}", plain(&document.path), plain(&expected))));
            }
            let kind = match document.role.as_str() {
                Root::TYPE => Root::TYPE,
                Snapshot::TYPE => Snapshot::TYPE,
                _ => Targets::TYPE,
            };
            if document.role == "timestamp" || document.envelope["signed"]["_type"] != kind {
                return Err(wrong(format!("{}: signers sign no such document", plain(&document.path))));
            }
        }
        for document in &self.documents {
            let signed = &document.envelope["signed"];
            let keys = [&signed["keys"], &signed["delegations"]["keys"]];
            for (id, object) in keys.into_iter().filter_map(Value::as_object).flatten() {
                // What is shown is the id: it must be the key's own.
                if object_id(object) != *id {
                    return Err(wrong(format!("{} is not the key id of its key", plain(id))));
                }
            }
        }
        for path in self.targets.keys() {
            let known = TargetPath::new(path.clone()).is_ok() && path.starts_with("targets/");
            if !known {
                return Err(wrong(format!("{} is no target file", plain(path))));
            }
        }
        Ok(())
    }

    /// Writes it in its place.
    pub fn write(&self, path: &Path) -> Result<(), SiteError> {
        let text = serde_json::to_vec_pretty(self).expect("a request has string keys only");
        write_atomic(path, &text, PUBLIC)
    }

    pub(crate) fn document(&self, role: &str) -> Option<&Document> {
        self.documents.iter().find(|document| document.role == role)
    }

    /// The roots so far: each signed by its own keys and the one before.
    pub(crate) fn root_chain(&self) -> Result<Vec<Root>, SiteError> {
        let mut chain: Vec<Root> = Vec::new();
        for text in &self.roots {
            let value = parse_strict(text.as_bytes()).map_err(|error| wrong(error.to_string()))?;
            let root: Root = serde_json::from_value(value["signed"].clone()).map_err(|e| wrong(e.to_string()))?;
            if let Some(before) = chain.last() {
                Need::of_role(before, &before.roles.root).verify::<Root>(text, Root::TYPE)?;
                if root.version != before.version + 1 {
                    return Err(wrong("a root is missing in the chain"));
                }
            }
            chain.push(Need::of_role(&root, &root.roles.root).verify(text, Root::TYPE)?);
        }
        Ok(chain)
    }

    /// The root in force so far.
    pub(crate) fn base_root(&self) -> Result<Option<Root>, SiteError> {
        Ok(self.root_chain()?.pop())
    }

    /// The top-level targets in force so far.
    pub(crate) fn base_targets(&self) -> Result<Option<Targets>, SiteError> {
        let (Some(root), Some(text)) = (self.base_root()?, self.base.get(Targets::TYPE)) else { return Ok(None) };
        Need::of_role(&root, &root.roles.targets).verify(text, Targets::TYPE).map(Some)
    }

    /// An image's list so far.
    pub(crate) fn base_role(&self, role: &str) -> Result<Option<Targets>, SiteError> {
        let (Some(targets), Some(text)) = (self.base_targets()?, self.base.get(role)) else { return Ok(None) };
        let need = Need::of_delegation(&targets, role).ok_or_else(|| wrong("a list that nobody delegated to"))?;
        need.verify(text, Targets::TYPE).map(Some)
    }

    /// That it has what each document replaces, signed, and of the version just before: what is told is the difference, and
    /// without the one before, or with an older one, it would not tell what is taken away.
    pub(crate) fn check_bases(&self) -> Result<(), SiteError> {
        for document in &self.documents {
            let before = match document.role.as_str() {
                Root::TYPE => self.base_root()?.map(|root| root.version),
                // What it names is told whole.
                Snapshot::TYPE => continue,
                Targets::TYPE => self.base_targets()?.map(|targets| targets.version),
                role => self.base_role(role)?.map(|list| list.version),
            };
            let version = document.envelope["signed"]["version"].as_u64().unwrap_or(0);
            if before.unwrap_or(0).checked_add(1) != Some(version) {
                let before = before.map_or_else(|| "nothing".to_owned(), |before| format!("version {before}"));
                let role = plain(&document.role);
                return Err(wrong(format!(
                    "{role} version {version} shall replace {before} of it: it does not follow"
                )));
            }
        }
        Ok(())
    }

    /// The root that will be in force.
    pub(crate) fn new_root(&self) -> Result<Root, SiteError> {
        match self.document(Root::TYPE) {
            Some(document) => document.read(),
            None => self.base_root()?.ok_or_else(|| wrong("it has no root")),
        }
    }

    /// The top-level targets that will be in force.
    pub(crate) fn new_targets(&self) -> Result<Targets, SiteError> {
        match self.document(Targets::TYPE) {
            Some(document) => document.read(),
            None => self.base_targets()?.ok_or_else(|| wrong("it has no targets")),
        }
    }

    /// Which thresholds a document must reach: a root those of the root before and its own (TUF, 5.3.4).
    pub fn needs(&self, document: &Document) -> Result<Vec<Need>, SiteError> {
        let root = self.new_root()?;
        Ok(match document.role.as_str() {
            Root::TYPE => {
                let before = self.base_root()?.map(|before| Need::of_role(&before, &before.roles.root));
                let own = Need::of_role(&root, &root.roles.root);
                before.filter(|before| *before != own).into_iter().chain([own]).collect()
            }
            Targets::TYPE => vec![Need::of_role(&root, &root.roles.targets)],
            Snapshot::TYPE => vec![Need::of_role(&root, &root.roles.snapshot)],
            image => {
                let need = Need::of_delegation(&self.new_targets()?, image);
                vec![need.ok_or_else(|| wrong(format!("{} is not delegated to", plain(image))))?]
            }
        })
    }

    /// What each document lacks; empty when all is signed.
    pub fn lacking(&self) -> Result<Vec<Lacking>, SiteError> {
        let mut all = Vec::new();
        for document in &self.documents {
            for need in self.needs(document)? {
                let signed = document.signed_by(&need);
                if signed.len() < usize::try_from(need.threshold.max(1)).unwrap_or(usize::MAX) {
                    let may_sign = need.keyids.iter().filter(|id| !signed.contains(id)).cloned().collect();
                    let role = document.role.clone();
                    all.push(Lacking { role, signed, threshold: need.threshold, may_sign });
                }
            }
        }
        Ok(all)
    }

    /// Whether this document has all its signatures.
    pub(crate) fn is_signed(&self, role: &str) -> Result<bool, SiteError> {
        Ok(!self.lacking()?.iter().any(|lacking| lacking.role == role))
    }

    /// The TUF roles that this key signs here.
    pub fn roles_of(&self, key: &PublicKey) -> Result<Vec<String>, SiteError> {
        let id = key.id();
        let mut roles = Vec::new();
        for document in &self.documents {
            if self.needs(document)?.iter().any(|need| need.keyids.contains(&id)) {
                roles.push(document.role.clone());
            }
        }
        Ok(roles)
    }

    /// Adds this key's signature to each document that it may sign, and says to which.
    pub fn sign(&mut self, signer: &Signer) -> Result<Vec<String>, SiteError> {
        let roles = self.roles_of(&signer.public())?;
        let keyid = signer.public().id();
        for document in self.documents.iter_mut().filter(|document| roles.contains(&document.role)) {
            let sig = hex::encode(&signer.sign(&document.message()?));
            document.put(json!({ "keyid": keyid, "sig": sig }))?;
        }
        Ok(roles)
    }

    /// Takes over what others signed of the very same documents. What does not verify is left; the rest is counted.
    pub fn merge(&mut self, other: &Self) -> Result<usize, SiteError> {
        let same = |a: &Document, b: &Document| a.path == b.path && a.envelope["signed"] == b.envelope["signed"];
        if self.documents.len() != other.documents.len()
            || !self.documents.iter().zip(&other.documents).all(|(a, b)| same(a, b))
        {
            return Err(SiteError::OtherRequest { open: plain(&self.name), got: plain(&other.name) });
        }
        let mut taken = 0;
        for index in 0..self.documents.len() {
            let needs = self.needs(&self.documents[index])?;
            let theirs = &other.documents[index];
            let valid: Vec<String> = needs.iter().flat_map(|need| theirs.signed_by(need)).collect();
            for signature in theirs.signatures() {
                let new = !self.documents[index].signatures().contains(signature);
                let counts = signature["keyid"].as_str().is_some_and(|id| valid.iter().any(|valid| valid == id));
                if new && counts {
                    self.documents[index].put(signature.clone())?;
                    taken += 1;
                }
            }
        }
        Ok(taken)
    }

    /// When the first of the documents expires.
    pub fn expires(&self) -> Option<Timestamp> {
        let dates = self.documents.iter().filter_map(|d| d.envelope["signed"]["expires"].as_str()?.parse().ok());
        dates.min()
    }
}

/// So much of a list's limit is kept for signatures that are still to come.
pub(crate) fn signature_room(lacking: &[Lacking], role: &str) -> u64 {
    const SIGNATURE: u64 = 240;
    let of = lacking.iter().filter(|lacking| lacking.role == role);
    of.map(|l| u64::from(l.threshold).saturating_sub(l.signed.len() as u64) * SIGNATURE).sum()
}

/// Largest list of an image.
pub(crate) fn list_limit() -> u64 {
    Limits::default().delegation
}
