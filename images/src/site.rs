//! The site directory: where things are in it, its keys, and the lock of its one server. Of it only `repo/` is served.

use crate::files::{SECRET, read_capped, write_atomic};
use crate::site_error::SiteError;
use jiff::{SignedDuration, Timestamp};
use kiln_release::{Signer, Site, sign_envelope};
use ring::rand::{SecureRandom, SystemRandom};
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// How long what is signed offline is valid in a lab.
pub(crate) const OFFLINE_LIFETIME: SignedDuration = SignedDuration::from_hours(365 * 24);
/// How long a timestamp is valid. `kiln serve` renews it every hour.
pub(crate) const TIMESTAMP_LIFETIME: SignedDuration = SignedDuration::from_hours(24);

const MAX_KEY_FILE: u64 = 16 << 10;

/// Paths in a site directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteDir {
    /// The directory.
    pub path: PathBuf,
    /// The site's name.
    pub name: String,
}

impl SiteDir {
    /// A directory that holds a site.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, SiteError> {
        let path = path.into();
        if !path.join("repo/metadata").is_dir() || !path.join("online/site-name").is_file() {
            return Err(SiteError::NotASite { dir: path });
        }
        let site = Self { path, name: String::new() };
        let name = site.read_online("site-name")?.trim().to_owned();
        Ok(Self { name, ..site })
    }

    /// What HTTP serves.
    pub fn repo(&self) -> PathBuf {
        self.path.join("repo")
    }

    /// A metadata file.
    pub fn metadata(&self, file: &str) -> PathBuf {
        self.path.join("repo/metadata").join(file)
    }

    /// Where `kiln image build` leaves a release.
    pub fn build(&self, image: &str, release: u64) -> PathBuf {
        self.path.join("build").join(image).join(release.to_string())
    }

    /// Where an artifact is served from.
    pub fn artifact(&self, sha256: &str) -> PathBuf {
        self.path.join("repo/a").join(sha256)
    }

    /// Where a UKI is served from.
    pub fn boot_program(&self, sha256: &str) -> PathBuf {
        self.path.join("repo/b").join(sha256).join("kiln.efi")
    }

    /// A signing key of `offline/`, without its `.key`.
    pub fn offline_key(&self, name: &str) -> PathBuf {
        self.path.join("offline").join(format!("{name}.key"))
    }

    /// A key or certificate of `online/`, with its suffix.
    pub fn online(&self, file: &str) -> PathBuf {
        self.path.join("online").join(file)
    }

    /// A file of `online/` that is text.
    pub fn read_online(&self, file: &str) -> Result<String, SiteError> {
        let path = self.online(file);
        fs::read_to_string(&path).map_err(SiteError::io("read", &path))
    }

    /// The key that signs timestamp.json; two while it is being replaced, of which the root names one.
    pub fn timestamp_keys(&self) -> Result<Vec<Signer>, SiteError> {
        self.online_keys("timestamp", "sign timestamp.json")
    }

    /// The director's key. It must be one that the site names: its assignments would else be refused by every machine.
    /// While it is being replaced there are two, and the site names one.
    pub fn director_key(&self, site: &Site) -> Result<Signer, SiteError> {
        let named = site.director_keys();
        let mut keys = self.online_keys("director", "sign assignments")?;
        if let Some(at) = keys.iter().position(|key| named.contains(&key.public().id())) {
            return Ok(keys.swap_remove(at));
        }
        let keyid = keys.first().map(|key| key.public().id()).unwrap_or_default();
        Err(SiteError::NotTheDirector { path: self.online("director.key"), keyid })
    }

    /// NAME.key, and NAME.key.next of a rotation that is under way.
    fn online_keys(&self, name: &str, purpose: &'static str) -> Result<Vec<Signer>, SiteError> {
        let mut keys = vec![read_key(&self.online(&format!("{name}.key")), purpose)?];
        let next = self.online(&format!("{name}.key.next"));
        if next.exists() {
            keys.push(read_key(&next, purpose)?);
        }
        Ok(keys)
    }

    /// Where the running server takes changing calls.
    pub fn socket(&self) -> PathBuf {
        self.path.join("state/kiln.sock")
    }

    /// The server's database.
    pub fn database(&self) -> PathBuf {
        self.path.join("state/kiln.db")
    }

    /// The lock that a running server holds: one per site. It ends with the value.
    pub fn lock_state(&self) -> Result<File, SiteError> {
        let state = self.path.join("state");
        match fs::DirBuilder::new().mode(0o700).create(&state) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(SiteError::io("make directory", &state)(e));
            }
            Ok(()) | Err(_) => {}
        }
        let lock = state.join("kiln.lock");
        let file = File::options().create(true).truncate(false).write(true).open(&lock);
        let file = file.map_err(SiteError::io("open", &lock))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(SiteError::Served { dir: self.path.clone(), lock }),
            Err(TryLockError::Error(source)) => Err(SiteError::io("lock", &lock)(source)),
        }
    }

    /// Held by whoever signs with offline keys: two publishers would make two different files of the same version.
    pub(crate) fn lock_offline(&self) -> Result<File, SiteError> {
        let path = self.path.join("offline/.lock");
        let lock = File::create(&path).map_err(SiteError::io("create", &path))?;
        lock.lock().map_err(SiteError::io("lock", &path))?;
        Ok(lock)
    }
}

/// Reads an unencrypted signing key; `purpose` completes "it is needed to …".
pub(crate) fn read_key(path: &Path, purpose: &'static str) -> Result<Signer, SiteError> {
    let bytes = read_capped(path, MAX_KEY_FILE)?.ok_or_else(|| SiteError::NoKey { path: path.to_owned(), purpose })?;
    Signer::from_pkcs8_pem(&String::from_utf8_lossy(&bytes))
        .map_err(|source| SiteError::Key { path: path.to_owned(), source })
}

/// A new key from the operating system's randomness.
pub(crate) fn new_key() -> Result<Signer, SiteError> {
    let mut seed = [0u8; 32];
    SystemRandom::new().fill(&mut seed).map_err(|_| SiteError::NoRandomness)?;
    Ok(Signer::from_seed(&seed))
}

pub(crate) fn write_key(path: &Path, key: &Signer) -> Result<(), SiteError> {
    write_atomic(path, key.pkcs8_pem().as_bytes(), SECRET)
}

/// A time so far from now.
pub(crate) fn after(now: Timestamp, lifetime: SignedDuration) -> Timestamp {
    now.saturating_add(lifetime).unwrap_or(Timestamp::MAX)
}

/// Signs a document of a TUF role; the error names it.
pub(crate) fn sign<T: serde::Serialize>(what: &str, document: &T, keys: &[&Signer]) -> Result<String, SiteError> {
    sign_envelope(document, keys).map_err(|source| SiteError::Sign { what: what.to_owned(), source })
}
