//! What outlives a boot: the machine's identity key and the highest versions seen. On UEFI both are EFI variables
//! (root can read them, nobody else: a weak identity, shown as such); for `kiln-agent stage` they are files; else they are gone with
//! the power. Where there is a TPM, the versions are in its own memory, and the key's variable is sealed by it. Source:
//! Linux Documentation/filesystems/efivarfs.rst.

mod copy;

pub use copy::Resumed;

use crate::error::{AgentError, Result};
use crate::net::trial::Known;
use crate::sys;
use crate::tpm::{self, Tpm, TpmFault};
use jiff::Timestamp;
use kiln_protocol::slot::Label;
use kiln_protocol::{Assignment, KeyStorage, Order, OrderError, OrderMark, RollbackMemory};
use kiln_release::tuf::Seen;
use kiln_release::{BootInfo, Signer, Site, hex};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Goes with the power.
const BOOT_PLACE: &str = "/run/kiln";
const EFIVARS: &str = "/sys/firmware/efi/efivars";
const GUID: &str = "6b696c6e-0000-4000-8000-6b696c6e0001";
/// Non-volatile, boot-service and run-time access (UEFI 2.10 §8.2).
const ATTRIBUTES: u32 = 7;

/// Further tries of a busy TPM, a second apart.
const UNSEAL_TRIES: u32 = 3;
/// The identity key's seed, and the same sealed by the TPM.
const KEY: &str = "Key";
const SEALED: &str = "Sealed";

/// Orders remembered until they expire: what an EFI variable holds.
const ORDERS: usize = 16;

/// The highest versions seen, and the time floor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// TUF versions.
    pub seen: Seen,
    /// Highest assignment sequence.
    #[serde(default)]
    pub sequence: u64,
    /// No time before this is believed.
    #[serde(default)]
    pub time_floor: Option<Timestamp>,
    /// SHA-256 over the director's key ids, as the site signs them: a sequence counts only under the director that made
    /// it, so that a number driven to its end with a stolen key is forgotten when the key is replaced.
    #[serde(default)]
    pub director: String,
    /// How far the boot loader's order had come under the directors before this one: what this one assigns stands behind
    /// all of that, whatever its number is.
    #[serde(default)]
    pub order_base: u64,
    /// Lowest release that may run, by image.
    #[serde(default)]
    pub floors: BTreeMap<String, u64>,
    /// Boots in a row that ended because what was served did not verify.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed_boots: u32,
    /// The last boot of an image that keeps data was restarted through firmware, because a kexec had started it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub restarted_for_data: bool,
    /// Operators' orders that were taken and have not expired, by id: none is done twice.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub orders: BTreeMap<String, OrderMark>,
    /// When the last of those that were forgotten expires. Another director may say an earlier time again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orders_until: Option<Timestamp>,
    /// What may be kept on the state partition: release, by the beginning of its root hash, and the digest of what is kept of it
    /// ([`crate::disk::record::digest`]), the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<(String, String)>,
}

/// A release's name in [`Memory::records`]; what lies there is bound to the release by its own signatures.
fn record_name(release: &Label) -> String {
    hex::encode(&release.0[..4])
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_false(value: &bool) -> bool {
    !*value
}

/// So many boots may fail to verify before the pauses between them grow: as many as a trial has.
const QUICK_FAILURES: u32 = 3;
/// Longest pause between them, besides that of every restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(290);

/// Shortest pause of a machine that cannot count them, and so much more at most.
const UNCOUNTED_PAUSE: Duration = Duration::from_secs(60);
const UNCOUNTED_MORE: Duration = Duration::from_secs(230);

/// How long a boot that did not verify rests before it restarts the machine. One that is not remembered may be the first or
/// the thousandth: it rests for one to five minutes, by chance, so that a rack does not come back in step. Whoever stands
/// before it reads the reason meanwhile; it verifies again at the next boot.
pub fn rest(counted: Duration, is_kept: bool, jitter: u8) -> Duration {
    if is_kept {
        return counted;
    }
    counted.max(UNCOUNTED_PAUSE + UNCOUNTED_MORE * u32::from(jitter) / u32::from(u8::MAX))
}

impl Memory {
    /// One more boot ended because what was served did not verify. So long it rests before it restarts: somebody on the
    /// network who serves nonsense gets a slow, told loop, and storage does not wear.
    pub fn boot_failed(&mut self) -> Duration {
        self.failed_boots = self.failed_boots.saturating_add(1);
        match self.failed_boots.checked_sub(QUICK_FAILURES).filter(|more| *more > 0) {
            None => Duration::ZERO,
            Some(more) => Duration::from_secs(10).saturating_mul(1 << more.min(16)).min(LONGEST_PAUSE),
        }
    }

    /// That this boot image is not below the floor of its image.
    pub fn may_boot(&self, boot: &BootInfo) -> Result<()> {
        let floor = self.floor(&boot.image);
        if boot.release < floor {
            return Err(AgentError::BelowFloor { image: boot.image.clone(), release: boot.release, floor });
        }
        Ok(())
    }

    /// Whether this boot restarts through firmware, because its kernel is `past` the state in which the TPM gives the data's
    /// key. Not twice in a row: firmware that leads here by kexec again would do so for ever.
    pub fn restart_for_data(&mut self, past: bool) -> bool {
        let restarted = std::mem::replace(&mut self.restarted_for_data, past);
        past && !restarted
    }

    /// The floor of `image`; 1 where none was signed.
    pub fn floor(&self, image: &str) -> u64 {
        self.floors.get(image).copied().unwrap_or(1)
    }

    /// Whose sequence numbers count from now on. With another director the time that the one before said is forgotten
    /// too: with a stolen key it can have been any up to the newest offline date. Orders stay known: operators signed them. True if
    /// something was forgotten.
    pub fn directed_by(&mut self, site: &Site) -> bool {
        let keys: Vec<&str> = site.directors.keys().map(String::as_str).collect();
        let director = hex::sha256(keys.join(",").as_bytes());
        if self.director != director {
            let replaced = !self.director.is_empty();
            if replaced {
                self.order_base = self.order_base.saturating_add(self.sequence);
                self.sequence = 0;
                self.time_floor = None;
            }
            self.director = director;
            return replaced;
        }
        false
    }

    /// What is remembered of this order. One that is not known and may have been forgotten counts as done.
    pub fn mark(&self, order: &Order) -> Option<OrderMark> {
        let forgotten = self.orders_until.is_some_and(|until| order.expires <= until);
        let done = forgotten.then_some(OrderMark { sequence: 0, expires: order.expires });
        self.orders.get(order.id.as_str()).copied().or(done)
    }

    /// Remembers that an order was taken under the assignment of this sequence; with 0 that it is done. One that cannot
    /// be remembered is not taken: it could be replayed. What is forgotten because it has expired by `now` has expired for good: an
    /// earlier time is not believed after a restart either, whatever the director says by then.
    pub fn take_order(&mut self, order: &Order, sequence: u64, now: Timestamp) -> std::result::Result<(), OrderError> {
        let is_kept = |id: &String, mark: &OrderMark| mark.expires > now || id == order.id.as_str();
        let gone = self.orders.iter().filter(|(id, mark)| !is_kept(id, mark)).map(|(_, mark)| mark.expires).max();
        if gone.is_some() {
            self.orders.retain(|id, mark| is_kept(id, mark));
            self.orders_until = self.orders_until.max(gone);
            self.time_floor = self.time_floor.max(Some(now));
        }
        if self.orders.len() >= ORDERS && !self.orders.contains_key(order.id.as_str()) {
            return Err(OrderError::MemoryFull { limit: ORDERS });
        }
        self.orders.insert(order.id.to_string(), OrderMark { sequence, expires: order.expires });
        Ok(())
    }

    /// A record with this digest is about to be written for a release, and `slots` hold these. Until a boot has seen which lies there,
    /// it may be this one or the one before; what belongs to none of them is forgotten.
    pub fn expect_record(&mut self, release: &Label, digest: &str, slots: &[Label]) {
        let new = (record_name(release), digest.to_owned());
        let wanted: Vec<String> = slots.iter().map(record_name).collect();
        self.records.retain(|kept| *kept != new && (kept.0 == new.0 || wanted.contains(&kept.0)));
        let mut same = self.records.iter().enumerate().filter(|(_, kept)| kept.0 == new.0).map(|(n, _)| n);
        // Of several that were never written the newest counts.
        if let (Some(_), Some(unwritten)) = (same.next(), same.next()) {
            self.records.remove(unwritten);
        }
        self.records.push(new);
    }

    /// Whether this is what was written for the release.
    pub fn has_record(&self, release: &Label, digest: &str) -> bool {
        let name = record_name(release);
        self.records.iter().any(|kept| kept.0 == name && kept.1 == digest)
    }

    /// Whether this may lie on the disk, by what is remembered. A memory that has none, of an earlier agent, does not say.
    pub fn may_find_record(&self, release: &Label, digest: &str) -> bool {
        self.records.is_empty() || self.has_record(release, digest)
    }

    /// That this lies on the disk, and so no other that was to be written. A memory that has none, of an earlier agent, takes what it
    /// finds. False: it was not written here, or was replaced since.
    pub fn found_record(&mut self, release: &Label, digest: &str) -> bool {
        let name = record_name(release);
        if self.records.is_empty() {
            self.records.push((name, digest.to_owned()));
            return true;
        }
        let known = self.has_record(release, digest);
        if known {
            self.records.retain(|kept| kept.0 != name || kept.1 == digest);
        }
        known
    }

    /// Where an assignment of this director stands in the boot loader's order.
    pub fn order(&self, sequence: u64) -> u64 {
        self.order_base.saturating_add(sequence)
    }

    /// The sequence of the assignment that stands there, if this director made it.
    pub fn sequence_of(&self, order: u64) -> Option<u64> {
        order.checked_sub(self.order_base).filter(|sequence| *sequence > 0)
    }

    /// Takes over an accepted assignment's sequence.
    pub fn accept(&mut self, assignment: &Assignment) {
        self.sequence = self.sequence.max(assignment.sequence);
    }
}

/// Which key a machine with EFI variables has. One that was sealed is the machine's, whatever lies beside it: an agent that
/// knows no TPM, or does not reach it for one boot, must not make it another machine for ever. One that was never sealed is
/// of an earlier release: the machine is known by it.
fn efi_key(sealed: bool, plain: bool, tpm: bool) -> KeyStorage {
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
    /// EFI variables where the firmware has them, else this boot only.
    pub fn of_this_machine() -> Self {
        let place = if Path::new(EFIVARS).read_dir().is_ok_and(|mut d| d.next().is_some()) {
            Self::Efi
        } else {
            Self::Boot(BOOT_PLACE.into())
        };
        match Tpm::open().and_then(|tpm| tpm.map(|mut tpm| tpm.make_memory()).transpose()) {
            Ok(Some(())) => Self::Tpm(Box::new(place)),
            Ok(None) => place,
            Err(fault) => {
                println!("kiln-agent: the TPM keeps no versions, {} does: {fault}", place.rollback_memory());
                place
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

    fn path(&self, what: &str) -> PathBuf {
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
fn write_file(dir: &Path, path: &Path, data: &[u8]) -> std::io::Result<()> {
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

#[cfg(test)]
mod tests;
