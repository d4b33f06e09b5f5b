//! The secrets of the release that runs, and the machine's own key and certificate: files in memory that is never written to a
//! disk, each its owner's alone, with what the server gave last. No value is in a log, a report or an error.

mod identity;
mod opened;
#[cfg(test)]
pub(crate) mod tests;

pub use identity::request;
pub use opened::{Opened, open};

use crate::error::{AgentError, Result};
use kiln_protocol::{Life, SECRET_LIMIT, SecretName, SecretSet, SecretVersions};
use kiln_release::{SECRETS_PATH, WantedCertificate, WantedSecret};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is held, by versions: the service may start again in the same boot. No secret's name begins with a dot.
const VERSIONS: &str = ".versions";
const DRAFT: &str = ".draft";
/// All values of a machine, twice while they are replaced, and room for the file system's own.
const SIZE: &str = "size=1m,mode=0711";

/// The place of the files, before the root runs. Other users pass through it to their own file, and list nothing.
pub fn mount_place() -> Result<()> {
    std::fs::create_dir_all(SECRETS_PATH).map_err(AgentError::file(SECRETS_PATH))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let memory = |data: &str| mount(Some("tmpfs"), SECRETS_PATH, Some("tmpfs"), flags, Some(data));
    // Kernels from 6.4 on keep it out of the swap (tmpfs(5)).
    memory(&format!("{SIZE},noswap"))
        .or_else(|_| {
            memory(SIZE).inspect(|()| println!("kiln-agent: this kernel may swap secrets out: it knows no noswap"))
        })
        .map_err(AgentError::system(format!("mounting {SECRETS_PATH}")))
}

/// The files of this boot.
#[derive(Debug)]
pub struct Keeper {
    place: PathBuf,
    passwd: PathBuf,
    wanted: Vec<WantedSecret>,
    held: SecretVersions,
    /// Why the server gave none when it was asked last.
    refused: Option<String>,
    certificate: Option<WantedCertificate>,
    /// Of the certificate that is here.
    life: Option<Life>,
    /// Why the server issued none when it was asked last.
    uncertified: Option<String>,
}

/// For a moment: nothing is waited for under it.
pub fn lock(keeper: &Mutex<Keeper>) -> MutexGuard<'_, Keeper> {
    keeper.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keeper {
    /// Of a release that wants these.
    pub fn of(wanted: &[WantedSecret], certificate: Option<&WantedCertificate>) -> Self {
        Self::at(Path::new(SECRETS_PATH), Path::new("/etc/passwd"), wanted, certificate)
    }

    pub(crate) fn at(
        place: &Path,
        passwd: &Path,
        wanted: &[WantedSecret],
        certificate: Option<&WantedCertificate>,
    ) -> Self {
        let versions = std::fs::read(place.join(VERSIONS)).ok();
        let held: SecretVersions = versions.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        // What is not there is not held, whatever was written down.
        let held = held.into_iter().filter(|(name, _)| place.join(name.as_str()).exists()).collect();
        Self {
            place: place.into(),
            passwd: passwd.into(),
            wanted: wanted.to_vec(),
            held,
            refused: None,
            certificate: certificate.cloned(),
            life: identity::kept(place),
            uncertified: None,
        }
    }

    /// For the report; none: this release wants none.
    pub fn held(&self) -> Option<SecretVersions> {
        (!self.wanted.is_empty()).then(|| self.held.clone())
    }

    /// What is missing, in a sentence; none: all that is required is here.
    pub fn missing(&self) -> Option<String> {
        if let Some(missing) = self.wanted.iter().find(|wanted| wanted.required && !self.has(&wanted.name)) {
            let why = self.refused.as_deref().unwrap_or("the server has given none yet; `kiln secret list` says why");
            return Some(format!("the secret {} has not come: {why}", missing.name));
        }
        let certified = self.life.is_some() || self.certificate.as_ref().is_none_or(|wanted| !wanted.required);
        let why = || self.uncertified.as_deref().unwrap_or("the server was not asked yet");
        (!certified).then(|| format!("the machine's certificate has not come: {}", why()))
    }

    fn has(&self, name: &str) -> bool {
        self.held.keys().any(|held| held.as_str() == name)
    }

    /// The server gave none.
    pub fn refuse(&mut self, reason: String) {
        self.refused = Some(reason);
    }

    /// Puts the set in place of what was held. Gives the units that are to be started, reloaded or restarted for it.
    pub fn put(&mut self, set: &SecretSet<'_>) -> Result<Vec<String>> {
        self.in_memory()?;
        let was_whole = self.missing().is_none();
        let mut changed: Vec<SecretName> = Vec::new();
        for wanted in self.wanted.clone() {
            let found = set.0.iter().find(|(name, _)| name.as_str() == wanted.name);
            match found {
                Some((name, (version, _))) if self.held.get(name) == Some(version) => {}
                Some((name, (version, value))) => {
                    self.write(&wanted.name, wanted.owner.as_deref(), 0o400, value)?;
                    self.held.insert(name.clone(), *version);
                    changed.push(name.clone());
                }
                None => self.remove(&wanted.name)?,
            }
        }
        self.note_down()?;
        self.refused = None;
        Ok(self.units(was_whole, &changed, false))
    }

    /// Which are to be started, reloaded or restarted; none as long as something that is required is missing.
    fn units(&self, was_whole: bool, changed: &[SecretName], certified: bool) -> Vec<String> {
        if self.missing().is_some() {
            return Vec::new();
        }
        let concerned = |wanted: &&WantedSecret| {
            let new = changed.iter().any(|name| name.as_str() == wanted.name);
            new || (!was_whole && self.has(&wanted.name))
        };
        let of_secrets = self.wanted.iter().filter(concerned).flat_map(|wanted| &wanted.units);
        let concerned = certified || (!was_whole && self.life.is_some());
        let of_certificate = self.certificate.iter().filter(|_| concerned).flat_map(|wanted| &wanted.units);
        let mut units: Vec<String> = of_secrets.chain(of_certificate).cloned().collect();
        units.sort();
        units.dedup();
        units
    }

    /// Forgets all of them. Whether there was anything to forget.
    pub fn drop_all(&mut self) -> Result<bool> {
        let held = !self.held.is_empty();
        for name in self.wanted.iter().map(|wanted| wanted.name.clone()).collect::<Vec<_>>() {
            self.remove(&name)?;
        }
        if held {
            self.note_down()?;
        }
        Ok(held)
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        let path = self.place.join(name);
        // Over the pages themselves: memory that is given back keeps what it held.
        if let Ok(mut file) = OpenOptions::new().write(true).open(&path) {
            let length = file.metadata().map_or(0, |meta| meta.len());
            let length = usize::try_from(length).map_or(SECRET_LIMIT, |length| length.min(SECRET_LIMIT));
            let _ = file.write_all(&vec![0; length]);
        }
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(AgentError::file(path)(e)),
        }
        self.held.retain(|held, _| held.as_str() != name);
        Ok(())
    }

    fn write(&self, name: &str, owner: Option<&str>, mode: u32, value: &[u8]) -> Result<()> {
        let owner = owner.map(|owner| self.user(owner)).transpose()?;
        let draft = self.place.join(DRAFT);
        let path = self.place.join(name);
        let fail = || AgentError::file(path.clone());
        let _ = std::fs::remove_file(&draft);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft).map_err(fail())?;
        let (uid, gid) = owner.unzip();
        fchown(&file, uid, gid).map_err(fail())?;
        file.write_all(value).map_err(fail())?;
        // Whole, or as it was.
        std::fs::rename(&draft, &path).map_err(fail())
    }

    fn note_down(&self) -> Result<()> {
        let text = serde_json::to_vec(&self.held).expect("names and numbers always become JSON");
        self.write(VERSIONS, None, 0o600, &text)
    }

    /// Uid and gid, by the root's passwd(5).
    fn user(&self, name: &str) -> Result<(u32, u32)> {
        let text = std::fs::read_to_string(&self.passwd).map_err(AgentError::file(self.passwd.clone()))?;
        let user = text.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name);
        let ids = user.and_then(|fields| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)));
        let reason = || format!("it has no user {name}, who owns a secret or the certificate");
        ids.ok_or_else(|| AgentError::Format { path: self.passwd.clone(), reason: reason() })
    }

    /// Nothing is written where it would reach a disk.
    fn in_memory(&self) -> Result<()> {
        let kind = statfs(&self.place).map_err(AgentError::system(format!("looking at {}", self.place.display())))?;
        if kind.filesystem_type() == TMPFS_MAGIC {
            return Ok(());
        }
        Err(AgentError::Secrets { reason: format!("{} is no tmpfs: nothing is put there", self.place.display()) })
    }
}
