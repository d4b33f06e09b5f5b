//! The verdict on a boot: whether its quote and its event log say that firmware started exactly the release's UKI, under the
//! site's Secure Boot key, with nothing added.

use super::log::Log;
use super::{LogError, LogEvent, cap, extend, sha256};
use crate::efi::{Entry, entries};
use crate::formats::Measured;
use crate::hex;
use std::collections::BTreeSet;

/// Kexecs since a cold boot, at most: each leaves one cap in PCR 11.
pub const MAX_CAPS: u32 = 256;

/// Option ROMs that are told of a machine; real ones have a few.
const MAX_ROMS: usize = 64;

// Event types (TCG PC Client Platform Firmware Profile 1.06 §10.4.1).
const VARIABLE_BOOT: u32 = 0x8000_0002;
const BOOT_SERVICES_APPLICATION: u32 = 0x8000_0003;
const BOOT_SERVICES_DRIVER: u32 = 0x8000_0004;
const RUNTIME_SERVICES_DRIVER: u32 = 0x8000_0005;
const VARIABLE_BOOT2: u32 = 0x8000_000c;

/// PCR values as quoted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quoted<'a> {
    /// Which, ascending.
    pub pcrs: &'a [u8],
    /// Their values, in the same order.
    pub values: &'a [[u8; 32]],
}

impl Quoted<'_> {
    /// The value of one that was quoted; a PCR that was not has none.
    pub fn value(&self, pcr: u8) -> Option<[u8; 32]> {
        let at = self.pcrs.iter().position(|quoted| *quoted == pcr)?;
        self.values.get(at).copied()
    }
}

/// What is known of a boot that was proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Booted {
    /// Times that an initramfs was left since the machine came out of its firmware: none while it is in its first.
    pub caps: u32,
    /// Digests over what was measured into PCRs 0 to 3, hex: firmware, its settings, option ROMs, theirs. The boot order, which
    /// the agent itself sets, is left out.
    pub firmware: [String; 4],
    /// db has more than the site's certificate and the hashes of single images: firmware starts what others sign, too, and the
    /// kernel believes their signatures.
    pub others: bool,
}

/// Nothing is proven, and nothing contradicted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Doubt {
    #[error("firmware left no event log: it did not boot by UEFI with a TPM, or the kernel lost it")]
    NoLog,
    #[error("Secure Boot is off")]
    SecureBootOff,
    #[error("its release is not signed for Secure Boot")]
    ReleaseUnsigned,
    #[error("the site's certificate is not in this machine's db")]
    SiteNotInDb,
}

/// What is contradicted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Fault {
    #[error("the event log cannot be read: {0}")]
    Log(#[from] LogError),
    #[error("PCR {0} was not quoted")]
    NotQuoted(u8),
    #[error("PCR {pcr} is {}…, its event log replays to {}…: the log is false", &quoted[..12], &replayed[..12])]
    Replay { pcr: u8, quoted: String, replayed: String },
    #[error("Secure Boot's variable {0} was measured more than once")]
    Twice(&'static str),
    #[error("what was measured of Secure Boot's settings is not what the event log says (PCR 7, looking for {0})")]
    Variable(&'static str),
    #[error("firmware started {digest}, which is no boot program of this release (PCR 4)")]
    ForeignProgram { digest: String },
    #[error("firmware did not start the UKI of this release (PCR 4)")]
    OtherUki,
    #[error("the UKI's parts are not those of this release (PCR 11): measured {}…, signed {}…", &got[..12], &expected[..12])]
    Pcr11 { expected: String, got: String },
    #[error("something was added to the signed command line, or given to the boot beside the UKI (PCR 12)")]
    Pcr12,
}

/// Why a boot is not attested.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // each says it itself
pub enum Finding {
    #[error(transparent)]
    Doubt(#[from] Doubt),
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// An event log that the quote confirms, and what it says firmware started.
#[derive(Debug)]
pub struct Evidence<'a> {
    log: Log<'a>,
    quoted: Quoted<'a>,
}

/// Reads the event log, and compares it with the quote.
pub fn read<'a>(log: &'a [u8], quoted: Quoted<'a>) -> Result<Evidence<'a>, Finding> {
    if log.is_empty() {
        return Err(Doubt::NoLog.into());
    }
    let log = Log::read(log).map_err(Fault::Log)?;
    for pcr in [0, 1, 2, 3, 4, 7] {
        let value = quoted.value(pcr).ok_or(Fault::NotQuoted(pcr))?;
        let replayed = log.replay(pcr);
        if replayed != value {
            return Err(Fault::Replay { pcr, quoted: hex::encode(&value), replayed: hex::encode(&replayed) }.into());
        }
    }
    Ok(Evidence { log, quoted })
}

impl Evidence<'_> {
    /// Authenticode digests of what firmware started, in order, hex.
    pub fn programs(&self) -> Vec<String> {
        let programs = self.log.of(4).filter(|event| event.kind == BOOT_SERVICES_APPLICATION);
        programs.map(|event| hex::encode(&event.digest)).collect()
    }

    /// Authenticode digests of the drivers that firmware found in option ROMs (PCR 2), each once, in order, hex: what db must
    /// hold for them to run where nobody's certificate but the site's is in it. The quote proves the digests; that an event is
    /// a driver's is the log's word, so one that lies can leave a ROM out, and add none that was not measured.
    pub fn option_roms(&self) -> Vec<String> {
        let mut roms = Vec::new();
        for event in self.log.of(2).filter(|e| matches!(e.kind, BOOT_SERVICES_DRIVER | RUNTIME_SERVICES_DRIVER)) {
            let digest = hex::encode(&event.digest);
            if roms.len() < MAX_ROMS && !roms.contains(&digest) {
                roms.push(digest);
            }
        }
        roms
    }

    /// What was measured into PCRs 0 to 3, but for the boot order.
    fn firmware(&self) -> [String; 4] {
        [0, 1, 2, 3].map(|pcr| {
            let events = self.log.of(pcr).filter(|event| pcr != 1 || !is_boot_order(event));
            let all: Vec<u8> = events.flat_map(|event| event.digest).collect();
            hex::encode(&sha256(&all))
        })
    }

    /// The content of a variable that Secure Boot is configured by, as measured before the separator of PCR 7. Before that
    /// the firmware alone measures, and everything there must be a variable that its digest names.
    fn variable(&self, name: &'static str) -> Result<Option<Vec<u8>>, Fault> {
        let mut found = None;
        for event in self.log.of(7).take_while(|event| event.digest != sha256(&[0; 4])) {
            let (is, content) = variable_data(event).ok_or(Fault::Variable(name))?;
            if sha256(event.data) != event.digest {
                return Err(Fault::Variable(name));
            }
            if is == name && found.replace(content.to_vec()).is_some() {
                return Err(Fault::Twice(name));
            }
        }
        Ok(found)
    }
}

/// What firmware says in PCR 4 besides the programs that it starts. The type is a word of whoever wrote the log; the
/// digest is not, and no program has one of so few printable characters.
fn is_remark(event: &LogEvent<'_>) -> bool {
    let text = event.data.len() <= 128 && event.data.iter().all(|b| *b == b' ' || b.is_ascii_graphic());
    (text || event.data == [0; 4]) && sha256(event.data) == event.digest
}

/// `BootOrder` or a `Boot####` (UEFI 2.10 §3.3, §3.1.3), by its content and not only by the log's word.
fn is_boot_order(event: &LogEvent<'_>) -> bool {
    let Some((name, content)) = variable_data(event).filter(|_| matches!(event.kind, VARIABLE_BOOT | VARIABLE_BOOT2))
    else {
        return false;
    };
    let number = name.strip_prefix("Boot").is_some_and(|n| n.len() == 4 && n.bytes().all(|b| b.is_ascii_hexdigit()));
    // EFI_LOAD_OPTION: attributes, of which few bits are defined, and the length of the device path behind the name.
    let option = content.first_chunk::<6>().is_some_and(|head| {
        let attributes = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let path = usize::from(u16::from_le_bytes([head[4], head[5]]));
        attributes & !0x1f0f == 0 && path + 8 <= content.len() && content.len() <= 4096
    });
    let order = name == "BootOrder" && content.len() <= 512 && content.len() % 2 == 0;
    (order || number && option) && (sha256(content) == event.digest || sha256(event.data) == event.digest)
}

/// `UEFI_VARIABLE_DATA` (§10.2.6): name and content.
pub(super) fn variable_data<'a>(event: &LogEvent<'a>) -> Option<(String, &'a [u8])> {
    let number = |at: usize| {
        let bytes: [u8; 8] = event.data.get(at..at.checked_add(8)?)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let (name, content) = (number(16)?, number(24)?);
    let name_end = 32_usize.checked_add(name.checked_mul(2)?)?;
    let (units, []) = event.data.get(32..name_end)?.as_chunks::<2>() else { return None };
    let name = String::from_utf16(&units.iter().map(|unit| u16::from_le_bytes(*unit)).collect::<Vec<_>>()).ok()?;
    Some((name, event.data.get(name_end..name_end.checked_add(content)?)?))
}

/// How many caps lie between PCR 11 as it was in the initramfs and this value.
pub fn caps(initramfs: [u8; 32], value: [u8; 32]) -> Option<u32> {
    let mut at = initramfs;
    for number in 0..=MAX_CAPS {
        if at == value {
            return Some(number);
        }
        at = extend(&at, &cap());
    }
    None
}

/// Judges a boot against the release that it should have been. `loaders` are boot loaders that other releases of the site put
/// on disks: one of them may have started this one.
pub fn judge(evidence: &Evidence<'_>, measured: &Measured, loaders: &BTreeSet<String>) -> Result<Booted, Finding> {
    // What contradicts is told before what is only missing.
    let mut started = false;
    for event in evidence.log.of(4) {
        if is_remark(event) {
            continue;
        }
        let digest = hex::encode(&event.digest);
        let loader = measured.loader.as_ref() == Some(&digest) || loaders.contains(&digest);
        started |= digest == measured.uki;
        if !(digest == measured.uki || digest == measured.kernel || loader) {
            return Err(Fault::ForeignProgram { digest }.into());
        }
    }
    if !started {
        return Err(Fault::OtherUki.into());
    }
    if evidence.quoted.value(12).ok_or(Fault::NotQuoted(12))? != [0; 32] {
        return Err(Fault::Pcr12.into());
    }
    let pcr11 = evidence.quoted.value(11).ok_or(Fault::NotQuoted(11))?;
    let expected = hex::decode(&measured.pcr11).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    let caps = expected
        .and_then(|expected| caps(expected, pcr11))
        .ok_or_else(|| Fault::Pcr11 { expected: measured.pcr11.clone(), got: hex::encode(&pcr11) })?;
    if evidence.variable("SecureBoot")?.as_deref() != Some(&[1]) {
        return Err(Doubt::SecureBootOff.into());
    }
    let certificate = measured.certificate.as_ref().ok_or(Doubt::ReleaseUnsigned)?;
    let content = evidence.variable("db")?.unwrap_or_default();
    let db = entries(&content).unwrap_or_default();
    let of_site = |entry: &Entry<'_>| match entry {
        Entry::X509(der) => hex::sha256(der) == *certificate,
        Entry::Sha256(_) | Entry::Other => false,
    };
    if !db.iter().any(of_site) {
        return Err(Doubt::SiteNotInDb.into());
    }
    let others = db.iter().any(|entry| match entry {
        Entry::Sha256(_) => false,
        Entry::X509(_) | Entry::Other => !of_site(entry),
    });
    Ok(Booted { caps, firmware: evidence.firmware(), others })
}
