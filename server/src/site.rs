//! The site directory as the boot server uses it: paths, the online keys, the lock. `offline/` is never read here.

use crate::error::SiteError;
use kiln_release::Signer;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// A site directory.
#[derive(Debug, Clone)]
pub struct Site {
    /// Where it is.
    pub dir: PathBuf,
    /// Its name.
    pub name: String,
}

impl Site {
    /// Checks that this is a site directory.
    pub fn open(dir: &Path) -> Result<Self, SiteError> {
        for missing in ["repo/metadata", "online"] {
            if !dir.join(missing).is_dir() {
                return Err(SiteError::NotASite { dir: dir.to_owned(), missing });
            }
        }
        let site = Self { dir: dir.to_owned(), name: String::new() };
        let name = site.read_text(&site.dir.join("online/site-name")).unwrap_or_default();
        Ok(Self { name: name.trim().to_owned(), ..site })
    }

    /// What HTTP serves.
    pub fn repo(&self) -> PathBuf {
        self.dir.join("repo")
    }

    /// The TUF metadata.
    pub fn metadata(&self) -> PathBuf {
        self.dir.join("repo/metadata")
    }

    /// Where changing calls come in.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("state/kiln.sock")
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.dir.join("state/kiln.db")
    }

    /// A key of `online/`.
    pub fn online_key(&self, name: &str) -> Result<Signer, SiteError> {
        let path = self.dir.join("online").join(format!("{name}.key"));
        let text = self.read_text(&path)?;
        Signer::from_pkcs8_pem(&text).map_err(|e| SiteError::Unusable { path, reason: e.to_string() })
    }

    /// A file of `online/`.
    pub fn online(&self, name: &str) -> Result<String, SiteError> {
        self.read_text(&self.dir.join("online").join(name))
    }

    #[allow(clippy::unused_self)] // it reads files of this site
    fn read_text(&self, path: &Path) -> Result<String, SiteError> {
        std::fs::read_to_string(path).map_err(|source| SiteError::Read { path: path.to_owned(), source })
    }

    /// Makes `state/` and holds its lock for as long as the value lives: one server per site.
    pub fn lock(&self) -> Result<Flock<File>, SiteError> {
        let state = self.dir.join("state");
        let write = |path: &Path| {
            let path = path.to_owned();
            move |source| SiteError::Write { path, source }
        };
        match std::fs::DirBuilder::new().mode(0o700).create(&state) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(write(&state)(e)),
            Ok(()) | Err(_) => {}
        }
        let lock = state.join("kiln.lock");
        let file = File::options().create(true).truncate(false).write(true).open(&lock).map_err(write(&lock))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| SiteError::Locked { dir: self.dir.clone(), lock })
    }

    /// Replaces a file as a whole: a reader sees the old one or the new one, also after a power cut.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), SiteError> {
        let fail = |source| SiteError::Write { path: path.to_owned(), source };
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("file");
        let temporary = path.with_file_name(format!(".{name}.serve"));
        let mut file = File::create(&temporary).map_err(fail)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(fail)?;
        std::fs::rename(&temporary, path).map_err(fail)?;
        path.parent().map_or(Ok(()), |dir| File::open(dir).and_then(|d| d.sync_all())).map_err(fail)
    }
}
