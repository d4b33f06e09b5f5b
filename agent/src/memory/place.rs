//! Where key and memory are kept. On UEFI both are EFI variables (root can read them, nobody else: a weak identity, shown as such);
//! for `kiln-agent stage` they are files; else they are gone with the power. Where there is a TPM, the versions are in its own
//! memory, and the key's variable is sealed by it. Source: Linux Documentation/filesystems/efivarfs.rst.

use super::Memory;
use crate::error::{AgentError, Result};
use crate::net::trial::Known;
use crate::sys;
use crate::tpm::{self, Tpm, TpmFault};
use kiln_protocol::{KeyStorage, RollbackMemory};
use kiln_release::Signer;
use ring::rand::{SecureRandom, SystemRandom};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Goes with the power.
pub(super) const BOOT_PLACE: &str = "/run/kiln";
const EFIVARS: &str = "/sys/firmware/efi/efivars";
const GUID: &str = "6b696c6e-0000-4000-8000-6b696c6e0001";
/// Non-volatile, boot-service and run-time access (UEFI 2.10 §8.2).
const ATTRIBUTES: u32 = 7;

/// Further tries of a busy TPM, a second apart.
const UNSEAL_TRIES: u32 = 3;
/// The identity key's seed, and the same sealed by the TPM.
pub(super) const KEY: &str = "Key";
const SEALED: &str = "Sealed";
/// Starts that a disk did not count.
const STARTS: &str = "Starts";
/// Boots that no server could hear of: a byte.
const UNHEARD: &str = "Unheard";

/// Which key a machine with EFI variables has. One that was sealed is the machine's, whatever lies beside it: an agent that
/// knows no TPM, or does not reach it for one boot, must not make it another machine for ever. One that was never sealed is
/// of an earlier release: the machine is known by it.
pub(super) fn efi_key(sealed: bool, plain: bool, tpm: bool) -> KeyStorage {
    match (tpm, sealed, plain) {
        (true, true, _) | (true, false, false) => KeyStorage::Tpm,
        (true | false, false, true) | (false, false, false) => KeyStorage::EfiVariable,
        (false, true, _) => KeyStorage::Ephemeral,
    }
}

/// The machine's identity.
pub struct Identity {
    pub key: Signer,
    /// Why it is another than before, where what was kept of it is of no use.
    pub lost: Option<AgentError>,
}

impl Identity {
    fn of(seed: &[u8; 32], lost: Option<AgentError>) -> Self {
        Self { key: Signer::from_seed(seed), lost }
    }
}

/// Where key and memory are kept.
#[derive(Debug, Clone)]
pub enum Place {
    /// EFI variables.
    Efi,
    /// A directory.
    Directory(PathBuf),
    /// This boot's /run: the key and the memory are handed to the running system, and gone with the power.
    Boot(PathBuf),
    /// Versions in the TPM; all else in this place, the key sealed.
    Tpm(Box<Place>),
}

impl Place {
    /// EFI variables where the firmware has them, else this boot only; and the TPM, where there is one.
    pub fn of_this_machine() -> Self {
        Self::with(Tpm::open(), Self::beside_tpm())
    }

    /// The same without the TPM.
    pub fn beside_tpm() -> Self {
        if Path::new(EFIVARS).read_dir().is_ok_and(|mut d| d.next().is_some()) {
            Self::Efi
        } else {
            Self::Boot(BOOT_PLACE.into())
        }
    }

    /// Versions in the TPM, unless it says itself that it keeps none. One that only does not answer may keep newer ones than this place
    /// beside it: then nothing is known to be remembered ([`Self::memory`] is an error), not what lies here.
    pub(super) fn with(tpm: std::result::Result<Option<Tpm>, TpmFault>, place: Self) -> Self {
        match tpm.and_then(|tpm| tpm.map(|mut tpm| tpm.make_memory()).transpose()) {
            Ok(None | Some(false)) => place,
            Ok(Some(true)) => Self::Tpm(Box::new(place)),
            Err(fault) => {
                println!("kiln-agent: the TPM does not say whether it keeps versions: {fault}");
                Self::Tpm(Box::new(place))
            }
        }
    }

    /// How strong the name is.
    pub fn key_storage(&self) -> KeyStorage {
        match self {
            Self::Efi => efi_key(self.path(SEALED).exists(), self.path(KEY).exists(), false),
            Self::Directory(_) => KeyStorage::File,
            Self::Boot(_) => KeyStorage::Ephemeral,
            Self::Tpm(place) => match **place {
                Self::Efi => efi_key(place.path(SEALED).exists(), place.path(KEY).exists(), true),
                Self::Directory(_) | Self::Boot(_) | Self::Tpm(_) => place.key_storage(),
            },
        }
    }

    /// What remembers versions.
    pub fn rollback_memory(&self) -> RollbackMemory {
        match self {
            Self::Efi => RollbackMemory::EfiVariable,
            Self::Directory(_) => RollbackMemory::File,
            Self::Boot(_) => RollbackMemory::None,
            Self::Tpm(_) => RollbackMemory::TpmNv,
        }
    }

    /// The identity key, made at the first call. One that is kept and of no use (cut, or sealed by another TPM) ends no boot:
    /// a new one takes its place, the machine is a stranger to its server, and says why.
    pub fn key(&self) -> Result<Identity> {
        match (self.key_storage(), self) {
            (KeyStorage::Tpm, _) => return self.key_sealed_by(&mut open_tpm()?),
            (KeyStorage::Ephemeral, Self::Efi) => {
                println!(
                    "kiln-agent: this machine's identity key is sealed in its TPM, which does not answer: another key, for this \
                     boot only, makes it a stranger. Is the TPM switched off in the firmware's setup?"
                );
                return Self::Boot(BOOT_PLACE.into()).key();
            }
            (KeyStorage::EfiVariable | KeyStorage::File | KeyStorage::Ephemeral, _) => {}
        }
        let mut lost = None;
        if let Some(stored) = self.read(KEY)? {
            match <[u8; 32]>::try_from(stored.as_slice()) {
                Ok(seed) => return Ok(Identity::of(&seed, None)),
                Err(_) => lost = Some(self.lost(KEY, format!("{} bytes, an Ed25519 seed has 32", stored.len()))),
            }
        }
        let seed = random()?;
        self.write(KEY, &seed)?;
        Ok(Identity::of(&seed, lost))
    }

    /// The same, sealed by the TPM. A TPM that refuses what is there is another one, or was cleared: then this is another
    /// machine, with another key. One that is only busy is asked again by the next boot: the key stays what it is. A plain key
    /// beside one that was cut is never taken instead: whoever cuts must not choose which machine this is.
    pub fn key_sealed_by(&self, tpm: &mut Tpm) -> Result<Identity> {
        let mut lost = None;
        if let Some(sealed) = self.read(SEALED)? {
            let reason = if tpm::is_whole(&sealed) {
                match unsealed(tpm, &sealed) {
                    Ok(seed) => match <[u8; 32]>::try_from(seed) {
                        Ok(seed) => return Ok(Identity::of(&seed, None)),
                        Err(other) => format!("{} bytes are sealed in it, an Ed25519 seed has 32", other.len()),
                    },
                    Err(fault) if !fault.is_refusal() => return Err(fault.into()),
                    Err(fault) => format!("another TPM sealed it, or this one was cleared: {fault}"),
                }
            } else {
                format!("it is cut, or was written by something else ({} bytes)", sealed.len())
            };
            lost = Some(self.lost(SEALED, reason));
        }
        let seed = random()?;
        self.write(SEALED, &tpm.seal(&seed)?)?;
        Ok(Identity::of(&seed, lost))
    }

    fn lost(&self, what: &str, reason: String) -> AgentError {
        AgentError::LostIdentity { path: self.path(what), reason }
    }

    /// The memory. One that cannot be parsed is an error, not an empty one: it would forget what it has seen.
    pub fn memory(&self) -> Result<Memory> {
        if let Self::Tpm(place) = self {
            // Before its first writing there: what was seen without a TPM counts on.
            return recalled(&mut open_tpm()?)?.map_or_else(|| place.memory(), Ok);
        }
        match self.read("Seen")? {
            None => Ok(Memory::default()),
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| AgentError::Format { path: self.path("Seen"), reason: e.to_string() }),
        }
    }

    /// Stores the memory if it differs from what is stored: EFI variables wear.
    pub fn remember(&self, memory: &Memory) -> Result<()> {
        let bytes = serde_json::to_vec(memory).expect("a map of numbers and strings always becomes JSON");
        self.keep_copy(&bytes);
        if self.memory().is_ok_and(|stored| stored == *memory) {
            return Ok(());
        }
        if let Self::Tpm(_) = self {
            return Ok(open_tpm()?.memorise(&bytes)?);
        }
        self.write("Seen", &bytes)
    }

    /// What is known of the network. One that cannot be read is an empty one: it protects nothing, and the machine asks
    /// every card.
    pub fn network(&self) -> Known {
        let stored = self.read("Network").ok().flatten();
        stored.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    /// Stores it if it differs from what is stored.
    pub fn remember_network(&self, known: &Known) -> Result<()> {
        if self.network() == *known {
            return Ok(());
        }
        self.write("Network", &serde_json::to_vec(known).expect("strings and numbers always become JSON"))
    }

    /// What was counted for a disk that takes no writes ([`crate::disk::machine`]); nothing, where that cannot be read.
    pub fn starts(&self) -> String {
        let kept = self.read(STARTS).ok().flatten().unwrap_or_default();
        String::from_utf8_lossy(&kept).into_owned()
    }

    /// Keeps it. An EFI variable without a byte goes (UEFI 2.10 §8.2, `SetVariable`).
    pub fn keep_starts(&self, line: &str) -> Result<()> {
        self.write(STARTS, line.as_bytes())
    }

    /// Boots that ended unheard, 255 at most; none, where that cannot be read.
    pub fn unheard(&self) -> u8 {
        self.read(UNHEARD).ok().flatten().and_then(|kept| kept.first().copied()).unwrap_or(0)
    }

    /// Keeps it, if it differs from what is kept.
    pub fn keep_unheard(&self, boots: u8) -> Result<()> {
        if boots == self.unheard() {
            return Ok(());
        }
        self.write(UNHEARD, &[boots][..usize::from(boots > 0)])
    }

    pub(super) fn path(&self, what: &str) -> PathBuf {
        match self {
            Self::Efi => format!("{EFIVARS}/Kiln{what}-{GUID}").into(),
            Self::Directory(dir) | Self::Boot(dir) => dir.join(what.to_lowercase()),
            Self::Tpm(place) => place.path(what),
        }
    }

    fn read(&self, what: &str) -> Result<Option<Vec<u8>>> {
        if let Self::Tpm(place) = self {
            return place.read(what);
        }
        let path = self.path(what);
        match (std::fs::read(&path), self) {
            (Ok(bytes), Self::Efi) => Ok(bytes.get(4..).map(<[u8]>::to_vec)),
            (Ok(bytes), Self::Directory(_) | Self::Boot(_) | Self::Tpm(_)) => Ok(Some(bytes)),
            (Err(e), _) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            (Err(e), _) => Err(AgentError::file(path)(e)),
        }
    }

    fn write(&self, what: &str, data: &[u8]) -> Result<()> {
        let path = self.path(what);
        let done = match self {
            Self::Efi => write_variable(&path, data),
            Self::Directory(dir) | Self::Boot(dir) => write_file(dir, &path, data),
            Self::Tpm(place) => return place.write(what, data),
        };
        done.map_err(AgentError::file(path))
    }
}

/// A TPM that is busy is asked a few times more.
fn unsealed(tpm: &mut Tpm, sealed: &[u8]) -> std::result::Result<Vec<u8>, TpmFault> {
    let mut tries = 0;
    loop {
        match tpm.unseal(sealed) {
            Err(fault) if tries < UNSEAL_TRIES && fault.code().is_some() && !fault.is_refusal() => {
                println!("kiln-agent: the TPM does not give the identity key out yet: {fault}");
                tries += 1;
                std::thread::sleep(Duration::from_secs(1));
            }
            done => return done,
        }
    }
}

/// What a TPM remembers; none: nothing was written there yet.
pub fn recalled(tpm: &mut Tpm) -> Result<Option<Memory>> {
    let spoilt = |reason: String| AgentError::Format { path: "the TPM's memory".into(), reason };
    match tpm.recall() {
        Ok(None) => Ok(None),
        Ok(Some(bytes)) => serde_json::from_slice(&bytes).map(Some).map_err(|e| spoilt(e.to_string())),
        Err(fault @ TpmFault::Spoilt) => Err(spoilt(fault.to_string())),
        Err(fault @ (TpmFault::Device(_) | TpmFault::Answer(_))) => Err(fault.into()),
    }
}

/// The TPM that was there a moment ago.
fn open_tpm() -> Result<Tpm> {
    Tpm::open()?.ok_or(AgentError::NoTpm)
}

/// One write(2) of attributes and data, as efivarfs demands.
pub fn write_variable(path: &Path, data: &[u8]) -> std::io::Result<()> {
    if let Ok(file) = File::open(path) {
        sys::clear_immutable(&file)?;
    }
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    file.write_all(&[&ATTRIBUTES.to_le_bytes(), data].concat())
}

/// Atomic: a cut leaves the old content or the new one.
pub(super) fn write_file(dir: &Path, path: &Path, data: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(data)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

/// 32 random bytes of the kernel's.
pub fn random() -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| AgentError::system("getting random numbers")(std::io::Error::other("the kernel gave none")))?;
    Ok(bytes)
}
