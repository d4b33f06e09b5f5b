//! The list of what the kernel measured (IMA, the kernel's integrity measurement architecture): `binary_runtime_measurements`,
//! as `ima_measurements_show` of the kernel's security/integrity/ima/ima_fs.c writes it. Each entry is one extension of PCR 10.
//!
//! A list is a claim; [`ImaList::replay`] gives the value that it explains. What the TPM proves of an entry is its data and
//! nothing beside: neither the template's name nor the SHA-1 in the list is read, and what an entry says is taken from the data's
//! form alone. Under Secure Boot the kernel measures modules too, and does not say of a file what it was read for. So the agent's
//! rule for a kexec's initramfs asks for a form that no other measurement has (`ima-ngv2`).

use super::{extend, sha256};
use crate::hex;

/// What the agent has the kernel measure. A kernel for a kexec keeps the default form: under Secure Boot a rule of the kernel's
/// own comes first. All are of one PCR: with one of its own (`pcr=`), an initramfs that was measured as a module before would be
/// measured again, by the hash that its file had then (`IMA_COLLECTED`), and pass for what it was.
pub const IMA_POLICY: [&str; 3] = [
    "measure func=KEXEC_KERNEL_CHECK\n",
    "measure func=KEXEC_INITRAMFS_CHECK template=ima-ngv2\n",
    "measure func=KEXEC_CMDLINE\n",
];
/// `CONFIG_IMA_MEASURE_PCR_IDX`, as everybody has it.
pub const IMA_PCR: u8 = 10;
/// Entries that are read: a thousand modules, and some kexecs.
const MAX_ENTRIES: usize = 2048;
/// Longest name of a template.
const MAX_NAME: usize = 64;
/// What the agent extends PCR 10 by where kexecs are not measured. No entry of the kernel's is like it: they begin with a length.
const UNMEASURED: &[u8] = b"kiln: kexecs are not measured";
/// A kernel's first word, on the boot before it.
pub(super) const BOOT_AGGREGATE: &[u8] = b"boot_aggregate\0";

/// Why a list cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ImaError {
    #[error("it is cut short at entry {0}")]
    Short(usize),
    #[error("entry {entry} is of PCR {pcr}, not of PCR {IMA_PCR}")]
    OtherPcr { entry: usize, pcr: u32 },
    #[error("the template of entry {0} has a name of more than {MAX_NAME} bytes")]
    LongName(usize),
    #[error("it has more than {MAX_ENTRIES} entries")]
    TooMany,
}

/// What an entry says, by the form of its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImaWhat<'a> {
    /// A file in one of the default forms: the kernel's first word on the boot before it, a module, or a kernel for a kexec.
    File {
        /// Of its content.
        sha256: [u8; 32],
        /// Its path when it was measured, with a zero behind. Whoever may mount chooses it.
        name: &'a [u8],
    },
    /// The initramfs of a kexec.
    Initramfs {
        /// Of all that was loaded.
        sha256: [u8; 32],
    },
    /// The command line of a kexec.
    CommandLine(&'a [u8]),
    /// The agent's own word: from here on this kernel measures no kexec.
    Unmeasured,
    /// Nothing that the policy asks for.
    Other,
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImaEntry<'a> {
    /// What PCR 10 was extended by.
    pub digest: [u8; 32],
    /// What that was.
    pub what: ImaWhat<'a>,
}

/// A list that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImaList<'a>(pub Vec<ImaEntry<'a>>);

impl<'a> ImaList<'a> {
    /// Reads a whole list.
    pub fn read(mut list: &'a [u8]) -> Result<Self, ImaError> {
        let mut entries = Vec::new();
        while !list.is_empty() {
            let entry = entries.len() + 1;
            if entry > MAX_ENTRIES {
                return Err(ImaError::TooMany);
            }
            let short = ImaError::Short(entry);
            let pcr = u32::from_le_bytes(take(&mut list).ok_or(short)?);
            if pcr != u32::from(IMA_PCR) {
                return Err(ImaError::OtherPcr { entry, pcr });
            }
            let sha1: [u8; 20] = take(&mut list).ok_or(short)?;
            if sized(&mut list).ok_or(short)?.len() > MAX_NAME {
                return Err(ImaError::LongName(entry));
            }
            let data = sized(&mut list).ok_or(short)?;
            // A file that was written to while it was measured: the list has zeros, the PCR was extended by ones
            // (`ima_add_template_entry`).
            let violation = sha1 == [0; 20];
            let (digest, what) = if violation { ([0xff; 32], ImaWhat::Other) } else { (sha256(data), what(data)) };
            entries.push(ImaEntry { digest, what });
        }
        Ok(Self(entries))
    }

    /// The value of PCR 10 after all of this, and `from` before.
    pub fn replay(&self, from: [u8; 32]) -> [u8; 32] {
        self.0.iter().fold(from, |value, entry| extend(&value, &entry.digest))
    }

    /// Whether PCR 10 had this value after some of it, one entry at least, and `from` before: more may have come between a quote and
    /// the reading of the list.
    pub fn explains(&self, from: [u8; 32], value: &[u8; 32]) -> bool {
        let mut at = from;
        self.0.iter().any(|entry| {
            at = extend(&at, &entry.digest);
            at == *value
        })
    }

    /// Whether the kernel extends a TPM by what it measures. One that found none when it started says zeros of the boot before it.
    pub fn is_extended(&self) -> bool {
        match self.0.first().map(|entry| entry.what) {
            Some(ImaWhat::File { sha256, name }) => name == BOOT_AGGREGATE && sha256 != [0; 32],
            Some(ImaWhat::Initramfs { .. } | ImaWhat::CommandLine(_) | ImaWhat::Unmeasured | ImaWhat::Other) | None => {
                false
            }
        }
    }

    /// The agent has said that kexecs are not measured.
    pub fn is_unmeasured(&self) -> bool {
        self.0.iter().any(|entry| entry.what == ImaWhat::Unmeasured)
    }
}

/// The agent's word that kexecs are not measured: what it extends PCR 10 by, and the entry for the list.
pub fn ima_unmeasured() -> ([u8; 32], Vec<u8>) {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a constant").to_le_bytes();
    let name = b"kiln";
    let head = [&u32::from(IMA_PCR).to_le_bytes()[..], &[1; 20], &length(name), name].concat();
    (sha256(UNMEASURED), [&head[..], &length(UNMEASURED), UNMEASURED].concat())
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*taken)
}

fn sized<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(u32::from_le_bytes(take(bytes)?)).ok()?;
    let (taken, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(taken)
}

/// What the data is, by its fields: each a length and so many bytes.
fn what(data: &[u8]) -> ImaWhat<'_> {
    if data == UNMEASURED {
        return ImaWhat::Unmeasured;
    }
    let mut rest = data;
    let (Some(digest), Some(name)) = (sized(&mut rest), sized(&mut rest)) else { return ImaWhat::Other };
    let none: &[u8] = &[];
    let third = if rest.is_empty() { Some(none) } else { sized(&mut rest) };
    let Some(third) = third.filter(|_| rest.is_empty()) else { return ImaWhat::Other };
    let of = |form: &[u8]| <[u8; 32]>::try_from(digest.strip_prefix(form)?).ok();
    if let Some(sha256) = of(b"ima:sha256:\0") {
        return ImaWhat::Initramfs { sha256 };
    }
    match of(b"sha256:\0") {
        Some(hash) if name == b"kexec-cmdline\0" && hash == sha256(third) => ImaWhat::CommandLine(third),
        Some(sha256) => ImaWhat::File { sha256, name },
        None => ImaWhat::Other,
    }
}

impl ImaWhat<'_> {
    /// In a few words, for people.
    pub fn describe(&self) -> String {
        let text = |bytes: &[u8]| -> String {
            String::from_utf8_lossy(bytes).trim_end_matches('\0').escape_debug().take(200).collect()
        };
        match self {
            Self::File { sha256, name } => format!("the file {} ({})", text(name), hex::encode(sha256)),
            Self::Initramfs { sha256 } => format!("the initramfs {}", hex::encode(sha256)),
            Self::CommandLine(line) => format!("the command line \"{}\"", text(line)),
            Self::Unmeasured => "the agent's word that kexecs are not measured".to_owned(),
            Self::Other => "something that no rule of the agent's or the kernel's asks for".to_owned(),
        }
    }
}
