//! New metadata, signed: what publishing, pruning and every command of `kiln trust` have in common.
//!
//! A [`Draft`] says what changes. Where the keys are at hand (a lab), it is signed at once; where people hold them, it
//! becomes the site's open signing request, and nothing that machines are served changes until `kiln trust apply` has
//! all signatures. A site has one open request: each is made on the state before it.

use crate::files::{Batch, PUBLIC, read_capped};
use crate::repository::{Memory, Overlay, Repository, newest_state, verify_snapshot};
use crate::request::{Document, Lacking, REQUEST_TYPE, Request, list_limit, signature_room};
use crate::signers::Signers;
use crate::site::{SiteDir, after, new_key, read_key, write_key};
use crate::site_error::SiteError;
use jiff::{SignedDuration, Timestamp};
use kiln_release::tuf::{Limits, MetaFile, Outcome, Root, Snapshot, TargetFile, TargetPath, Targets};
use kiln_release::{PublicKey, Signer, Site, hex};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a lab signs offline is signed anew when less than this is left of it.
const RENEW_BELOW: SignedDuration = SignedDuration::from_hours(180 * 24);

/// What became of a draft.
pub(crate) enum Signing {
    /// All signatures are there; it is not yet in the repository.
    Complete(Change),
    /// People must sign it.
    Open(Waiting),
}

/// A request that lacks signatures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// What it is called.
    pub name: String,
    /// Where it lies at the site.
    pub file: PathBuf,
    /// What it lacks, a sentence for each document.
    pub lacking: Vec<String>,
}

impl Waiting {
    pub(crate) fn of(site: &SiteDir, request: &Request, lacking: &[Lacking]) -> Self {
        let lacking = lacking.iter().map(|lacking| lacking.words(&request.names)).collect();
        Self { name: request.name.clone(), file: site.open_request(), lacking }
    }
}

impl SiteDir {
    /// The one signing request that may be open.
    pub fn open_request(&self) -> PathBuf {
        self.path.join("offline/request.json")
    }

    /// The open request, if there is one.
    pub fn read_open_request(&self) -> Result<Option<Request>, SiteError> {
        let path = self.open_request();
        if path.exists() { Request::read(&path).map(Some) } else { Ok(None) }
    }

    /// What stands in the way of a new request.
    fn none_open(&self) -> Result<(), SiteError> {
        match self.read_open_request()? {
            Some(request) => Err(SiteError::RequestOpen { name: request.name, file: self.open_request() }),
            None => Ok(()),
        }
    }
}

/// Signed and verified metadata, not yet in the repository.
pub(crate) struct Change {
    /// In the order in which it is written: what counts comes last.
    files: Overlay,
    /// Length of the image's list.
    pub(crate) delegation: u64,
}

impl Change {
    /// Of a request that lacks nothing; it is run through the client as a machine would, against the state before.
    pub(crate) fn of(
        site: &SiteDir,
        request: &Request,
        state: Option<&Outcome>,
        now: Timestamp,
    ) -> Result<Self, SiteError> {
        let mut files: Overlay = Vec::new();
        for (path, text) in &request.targets {
            files.push((path.clone(), text.clone().into_bytes()));
        }
        // Before the snapshot nothing counts. A root comes after it: a snapshot by new keys is passed over until then.
        let rank = |role: &str| match role {
            Snapshot::TYPE => 1,
            Root::TYPE => 2,
            _ => 0,
        };
        let mut documents: Vec<&Document> = request.documents.iter().collect();
        documents.sort_by_key(|document| rank(&document.role));
        let mut delegation = 0;
        for document in documents {
            let text = document.text().into_bytes();
            if rank(&document.role) == 0 && document.role != Targets::TYPE {
                delegation = text.len() as u64;
            }
            files.push((document.path.clone(), text));
        }
        let snapshot = match (request.document(Snapshot::TYPE), state) {
            (Some(document), _) => {
                let snapshot: Snapshot = document.read()?;
                MetaFile::of(snapshot.version, document.text().as_bytes())
            }
            (None, Some(state)) => MetaFile { version: state.snapshot.version, length: None, hashes: BTreeMap::new() },
            (None, None) => return Err(SiteError::NotASite { dir: site.path.clone() }),
        };
        let seen = state.map(|state| state.seen.clone()).unwrap_or_default();
        verify_snapshot(site, &files, snapshot, seen, now)?;
        Ok(Self { files, delegation })
    }

    /// Puts it into the repository. What `batch` holds becomes part of it with the last file.
    pub(crate) fn write(&self, site: &SiteDir, mut batch: Batch) -> Result<(), SiteError> {
        for (file, bytes) in &self.files {
            let path = site.repo().join(file);
            if let Some(folder) = path.parent() {
                batch.folder(folder, 0o755)?;
            }
            batch.write(&path, bytes, PUBLIC)?;
        }
        batch.keep();
        Ok(())
    }
}

/// The TUF role of an image.
pub(crate) fn role_of(image: &str) -> String {
    format!("image-{image}")
}

/// Where a target file with these bytes lies under `repo/`.
pub(crate) fn target_file(path: &TargetPath, bytes: &[u8]) -> String {
    let (folder, name) = path.as_str().rsplit_once('/').map_or(("", path.as_str()), |(folder, name)| (folder, name));
    let folder = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    format!("targets/{folder}{}.{name}", hex::sha256(bytes))
}

/// A change that is being put together.
pub(crate) struct Draft<'a> {
    site: &'a SiteDir,
    state: Option<&'a Outcome>,
    expires: Timestamp,
    signers: Option<Signers>,
    name: String,
    root: Option<Root>,
    targets: Option<Targets>,
    roles: BTreeMap<String, Targets>,
    snapshot: bool,
    files: BTreeMap<String, String>,
    now: Timestamp,
}

impl<'a> Draft<'a> {
    /// On the state in force; `name` is what the request is called.
    pub(crate) fn on(
        site: &'a SiteDir,
        state: &'a Outcome,
        now: Timestamp,
        name: impl Into<String>,
    ) -> Result<Self, SiteError> {
        site.none_open()?;
        Ok(Self::new(site, Some(state), Signers::read(site)?, now, name))
    }

    /// From nothing: root, targets and snapshot of version 1.
    pub(crate) fn first(site: &'a SiteDir, signers: Signers, root: Root, now: Timestamp) -> Self {
        let name = format!("the first metadata of {}", site.name);
        let mut draft = Self::new(site, None, Some(signers), now, name);
        draft.root = Some(Root { expires: whole(draft.expires), ..root });
        draft.targets = Some(Targets::new(1, draft.expires));
        draft
    }

    fn new(
        site: &'a SiteDir,
        state: Option<&'a Outcome>,
        signers: Option<Signers>,
        now: Timestamp,
        name: impl Into<String>,
    ) -> Self {
        let lifetime = signers.as_ref().map_or(crate::site::OFFLINE_LIFETIME, Signers::lifetime);
        Self {
            site,
            state,
            expires: after(now, lifetime),
            signers,
            name: name.into(),
            root: None,
            targets: None,
            roles: BTreeMap::new(),
            snapshot: false,
            files: BTreeMap::new(),
            now,
        }
    }

    fn known(&self, role: &str) -> Option<&'a Targets> {
        self.state.and_then(|state| state.roles.get(role))
    }

    /// The next root.
    pub(crate) fn root(&mut self) -> Result<&mut Root, SiteError> {
        if self.root.is_none() {
            let state = self.state.ok_or_else(|| SiteError::NotASite { dir: self.site.path.clone() })?;
            let version = state.root.version + 1;
            self.root = Some(Root { version, expires: whole(self.expires), ..state.root.clone() });
        }
        Ok(self.root.as_mut().expect("it was just put there"))
    }

    /// The next top-level targets.
    pub(crate) fn targets(&mut self) -> Result<&mut Targets, SiteError> {
        if self.targets.is_none() {
            let known = self.known(Targets::TYPE).cloned();
            let known = known.ok_or_else(|| SiteError::NotASite { dir: self.site.path.clone() })?;
            self.targets = Some(Targets { version: known.version + 1, expires: whole(self.expires), ..known });
        }
        Ok(self.targets.as_mut().expect("it was just put there"))
    }

    /// An image's next list of releases.
    pub(crate) fn list(&mut self, role: &str) -> &mut Targets {
        let (known, expires) = (self.known(role).cloned(), self.expires);
        self.roles.entry(role.to_owned()).or_insert_with(|| {
            let known = known.unwrap_or_else(|| Targets::new(0, expires));
            Targets { version: known.version + 1, expires: whole(expires), ..known }
        })
    }

    /// The snapshot is signed anew even if nothing else is.
    pub(crate) fn snapshot(&mut self) {
        self.snapshot = true;
    }

    /// A target file that the new documents name.
    pub(crate) fn file(&mut self, path: &TargetPath, bytes: &[u8]) {
        self.files.insert(target_file(path, bytes), String::from_utf8_lossy(bytes).into_owned());
    }

    /// What keys are called now.
    pub(crate) fn names(&mut self, signers: &Signers) {
        self.signers = Some(signers.clone());
    }

    /// The site's own object, read from the state in force.
    pub(crate) fn site_document(&self) -> Result<Site, SiteError> {
        let state = self.state.ok_or_else(|| SiteError::NotASite { dir: self.site.path.clone() })?;
        site_document(self.site, state)
    }

    /// The site's own object as it shall be.
    pub(crate) fn put_site(&mut self, document: &Site) -> Result<(), SiteError> {
        let path = TargetPath::site();
        let shown = self.site.repo().join("targets").join(path.as_str());
        document.check().map_err(SiteError::format(shown))?;
        let mut bytes = serde_json::to_vec_pretty(document).expect("a site has string keys only");
        bytes.push(b'\n');
        let (got, limit) = (bytes.len() as u64, Limits::default().target);
        if got > limit {
            return Err(SiteError::SiteTooLong { bytes: got, limit });
        }
        self.targets()?.targets.insert(path.to_string(), TargetFile::of(&bytes));
        self.file(&path, &bytes);
        Ok(())
    }

    /// The image's list, delegated to if it is new. In a lab its key is made, and targets kept young on the way.
    pub(crate) fn image(&mut self, image: &str) -> Result<&mut Targets, SiteError> {
        let role = role_of(image);
        let paths = vec![format!("{image}/*/manifest.json")];
        if self.known(&role).is_none() {
            let (keys, threshold) = match &self.signers {
                Some(signers) => (signers.image_keys()?, signers.images.threshold),
                None => (vec![self.image_key(&role)?], 1),
            };
            self.targets()?.delegate(&role, &keys, threshold, paths, true);
        } else if self.signers.is_none()
            && self.known(Targets::TYPE).is_some_and(|top| top.expires < after(self.now, RENEW_BELOW))
        {
            self.targets()?;
        }
        Ok(self.list(&role))
    }

    /// The key of a lab's image; made when the image is published for the first time.
    fn image_key(&self, role: &str) -> Result<PublicKey, SiteError> {
        let path = self.site.offline_key(role);
        match read_key(&path, "sign releases of this image") {
            Err(SiteError::NoKey { .. }) => {
                let key = new_key()?;
                write_key(&path, &key)?;
                Ok(key.public())
            }
            other => other.map(|key| key.public()),
        }
    }

    /// Signs with every key at hand. What lacks signatures after that becomes the open request of a site with signers.
    pub(crate) fn sign(self) -> Result<Signing, SiteError> {
        let (request, lacking) = self.request()?;
        if lacking.is_empty() {
            return Change::of(self.site, &request, self.state, self.now).map(Signing::Complete);
        }
        if let (None, Some(lacking)) = (&self.signers, lacking.first()) {
            let path = self.site.offline_key(&lacking.role);
            return Err(SiteError::NoKey { path, purpose: "sign with" });
        }
        request.write(&self.site.open_request())?;
        Ok(Signing::Open(Waiting::of(self.site, &request, &lacking)))
    }

    fn request(&self) -> Result<(Request, Vec<Lacking>), SiteError> {
        let mut request = Request {
            type_: REQUEST_TYPE.into(),
            spec_version: "1.0".into(),
            site: self.site.name.clone(),
            name: self.name.clone(),
            roots: self.roots()?,
            base: self.base()?,
            documents: Vec::new(),
            targets: self.files.clone(),
            names: self.signers.as_ref().map(|signers| signers.names.clone()).unwrap_or_default(),
        };
        let path = |version: u64, role: &str| format!("metadata/{version}.{role}.json");
        if let Some(root) = &self.root {
            request.documents.push(Document::unsigned(path(root.version, Root::TYPE), Root::TYPE, root)?);
        }
        let top = self.targets.as_ref().map(|targets| (Targets::TYPE, targets));
        let lists = self.roles.iter().map(|(role, targets)| (role.as_str(), targets));
        for (role, targets) in top.into_iter().chain(lists) {
            request.documents.push(Document::unsigned(path(targets.version, role), role, targets)?);
        }
        let keys = self.site.plain_keys()?;
        sign_all(&mut request, &keys)?;
        let lacking = request.lacking()?;
        for role in self.roles.keys() {
            let text = request.document(role).map(Document::text).unwrap_or_default();
            let (bytes, limit) = (text.len() as u64 + signature_room(&lacking, role), list_limit());
            if bytes > limit {
                let image = role.trim_start_matches("image-").to_owned();
                return Err(SiteError::ListFull { image, bytes, limit });
            }
        }
        if self.targets.is_some() || !self.roles.is_empty() || self.snapshot {
            let snapshot = self.next_snapshot(&request)?;
            request.documents.push(Document::unsigned(
                path(snapshot.version, Snapshot::TYPE),
                Snapshot::TYPE,
                &snapshot,
            )?);
            sign_all(&mut request, &keys)?;
        }
        let lacking = request.lacking()?;
        Ok((request, lacking))
    }

    /// A file that still lacks signatures is named by version alone: its bytes are not known yet.
    fn next_snapshot(&self, request: &Request) -> Result<Snapshot, SiteError> {
        let before = self.state.map(|state| &state.snapshot);
        let mut snapshot = Snapshot::new(before.map_or(0, |before| before.version) + 1, self.expires);
        snapshot.meta = before.map(|before| before.meta.clone()).unwrap_or_default();
        for document in request.documents.iter().filter(|document| document.role != Root::TYPE) {
            let targets: Targets = document.read()?;
            let meta = if request.is_signed(&document.role)? {
                MetaFile::of(targets.version, document.text().as_bytes())
            } else {
                MetaFile { version: targets.version, length: None, hashes: BTreeMap::new() }
            };
            snapshot.meta.insert(format!("{}.json", document.role), meta);
        }
        Ok(snapshot)
    }

    fn roots(&self) -> Result<Vec<String>, SiteError> {
        let newest = self.state.map_or(0, |state| state.root.version);
        let limit = Limits::default().root;
        let text = |version: u64| {
            let path = self.site.metadata(&format!("{version}.root.json"));
            let bytes =
                read_capped(&path, limit)?.ok_or_else(|| SiteError::NotASite { dir: self.site.path.clone() })?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        (1..=newest).map(text).collect()
    }

    /// What the new documents replace, as it was signed.
    fn base(&self) -> Result<BTreeMap<String, String>, SiteError> {
        let Some(state) = self.state else { return Ok(BTreeMap::new()) };
        let mut base = BTreeMap::new();
        for role in self.roles.keys().map(String::as_str).chain([Targets::TYPE]) {
            let Some(known) = state.roles.get(role) else { continue };
            let path = self.site.metadata(&format!("{}.{role}.json", known.version));
            let bytes = read_capped(&path, Limits::default().targets)?.unwrap_or_default();
            base.insert(role.to_owned(), String::from_utf8_lossy(&bytes).into_owned());
        }
        if let Some(known) = state.targets.get(TargetPath::site().as_str()) {
            base.insert(TargetPath::site().to_string(), String::from_utf8_lossy(&known.bytes).into_owned());
        }
        Ok(base)
    }
}

/// Signs with every key that a document wants.
fn sign_all(request: &mut Request, keys: &[Signer]) -> Result<(), SiteError> {
    for key in keys {
        request.sign(key)?;
    }
    Ok(())
}

/// What became of a change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    /// It was so before; nothing was signed.
    pub already: bool,
    /// Machines see it now. False where the online key is not on this machine: `kiln serve` signs the timestamp then.
    pub served: bool,
    /// People must sign first: nothing that machines are served has changed.
    pub waiting: Option<Waiting>,
}

/// Puts a draft into the repository if it is signed.
pub(crate) fn finish(site: &SiteDir, draft: Draft<'_>, now: Timestamp) -> Result<Changed, SiteError> {
    match draft.sign()? {
        Signing::Complete(change) => {
            change.write(site, Batch::default())?;
            Ok(Changed { served: serve(site, now)?, ..Changed::default() })
        }
        Signing::Open(waiting) => Ok(Changed { waiting: Some(waiting), ..Changed::default() }),
    }
}

/// Signs another `site.json`. `edit` says whether it changed anything.
pub(crate) fn change_site(
    dir: &Path,
    now: Timestamp,
    name: String,
    edit: impl FnOnce(&mut Site) -> Result<bool, SiteError>,
) -> Result<Changed, SiteError> {
    let site = SiteDir::open(dir)?;
    let _lock = site.lock_offline()?;
    let state = newest_state(&site, now)?;
    let mut document = site_document(&site, &state)?;
    if !edit(&mut document)? {
        return Ok(Changed { already: true, served: serve(&site, now)?, waiting: None });
    }
    let mut draft = Draft::on(&site, &state, now, name)?;
    draft.put_site(&document)?;
    finish(&site, draft, now)
}

/// `site.json` of a state.
pub(crate) fn site_document(site: &SiteDir, state: &Outcome) -> Result<Site, SiteError> {
    let path = TargetPath::site();
    let known = state.targets.get(path.as_str()).ok_or_else(|| SiteError::NotASite { dir: site.path.clone() })?;
    Site::read(&known.bytes).map_err(SiteError::format(site.repo().join("targets").join(path.as_str())))
}

/// TUF's dates have no fraction of a second.
pub(crate) fn whole(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// Signs a timestamp over the newest snapshot, if its key is on this machine.
pub(crate) fn serve(site: &SiteDir, now: Timestamp) -> Result<bool, SiteError> {
    match site.timestamp_keys() {
        Ok(keys) => Repository::adopt(site, &keys, &Memory::default(), now).map(|_| true),
        Err(SiteError::NoKey { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}
