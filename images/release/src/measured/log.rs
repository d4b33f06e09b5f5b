//! The firmware's event log in its crypto-agile form (TCG PC Client Platform Firmware Profile 1.06 §10): what was measured, in
//! order, with the SHA-256 of each. A log is a claim; [`Log::replay`] gives the PCR values that it explains, and the quote has
//! the true ones.

use super::extend;
use std::collections::BTreeMap;

/// `TPM_ALG_SHA256`.
const SHA256: u16 = 0x000b;
/// Events that are read; real logs have a few hundred.
const MAX_EVENTS: usize = 4096;
const NO_ACTION: u32 = 3;
const STARTUP_LOCALITY: &[u8] = b"StartupLocality\0";

/// Why a log cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum LogError {
    #[error("it is cut short at event {0}")]
    Short(usize),
    #[error("it does not begin with a TCG 2.0 header")]
    NoHeader,
    #[error("it has no SHA-256 digests")]
    NoSha256,
    #[error("event {0} has a digest of an algorithm that its header does not name")]
    UnknownAlgorithm(usize),
    #[error("it has more than {MAX_EVENTS} events")]
    TooMany,
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEvent<'a> {
    /// Which PCR.
    pub pcr: u32,
    /// Event type (§10.4.1).
    pub kind: u32,
    /// What was extended in the SHA-256 bank.
    pub digest: [u8; 32],
    /// What firmware says of it. Where the digest is its hash, it is proven with it; else it is only a word.
    pub data: &'a [u8],
}

/// A log that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log<'a> {
    /// Everything that extends a PCR, in order.
    pub events: Vec<LogEvent<'a>>,
    /// Locality from which the TPM was started: PCR 0 begins with it.
    locality: u8,
}

struct Bytes<'a>(&'a [u8], usize);

impl<'a> Bytes<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], LogError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(LogError::Short(self.1))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LogError> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(LogError::Short(self.1))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn half(&mut self) -> Result<u16, LogError> {
        self.array().map(u16::from_le_bytes)
    }

    fn word(&mut self) -> Result<u32, LogError> {
        self.array().map(u32::from_le_bytes)
    }

    fn sized(&mut self) -> Result<&'a [u8], LogError> {
        let length = self.word()?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }
}

impl<'a> Log<'a> {
    /// Reads a whole log.
    pub fn read(log: &'a [u8]) -> Result<Self, LogError> {
        let mut bytes = Bytes(log, 0);
        let sizes = header(&mut bytes)?;
        if sizes.get(&SHA256) != Some(&32) {
            return Err(LogError::NoSha256);
        }
        let (mut events, mut locality) = (Vec::new(), 0);
        while !bytes.0.is_empty() {
            bytes.1 += 1;
            if bytes.1 > MAX_EVENTS {
                return Err(LogError::TooMany);
            }
            let (pcr, kind, count) = (bytes.word()?, bytes.word()?, bytes.word()?);
            let mut digest = None;
            for _ in 0..count {
                let algorithm = bytes.half()?;
                let size = sizes.get(&algorithm).ok_or(LogError::UnknownAlgorithm(bytes.1))?;
                let value = bytes.take(usize::from(*size))?;
                if algorithm == SHA256 {
                    digest = value.try_into().ok();
                }
            }
            let data = bytes.sized()?;
            if kind == NO_ACTION {
                if let Some([at, ..]) = data.strip_prefix(STARTUP_LOCALITY).filter(|_| pcr == 0) {
                    locality = *at;
                }
                continue;
            }
            let digest = digest.ok_or(LogError::NoSha256)?;
            events.push(LogEvent { pcr, kind, digest, data });
        }
        Ok(Self { events, locality })
    }

    /// The value that a PCR has after all of this.
    pub fn replay(&self, pcr: u8) -> [u8; 32] {
        let mut value = [0; 32];
        if pcr == 0 {
            value[31] = self.locality;
        }
        self.of(pcr).fold(value, |value, event| extend(&value, &event.digest))
    }

    /// What was measured into a PCR.
    pub fn of(&self, pcr: u8) -> impl Iterator<Item = &LogEvent<'a>> {
        self.events.iter().filter(move |event| event.pcr == u32::from(pcr))
    }
}

/// The first event, in the form of TPM 1.2, and what it holds (`TCG_EfiSpecIDEvent`, §10.4.5.1): digest sizes by algorithm.
fn header(bytes: &mut Bytes<'_>) -> Result<BTreeMap<u16, u16>, LogError> {
    let (_pcr, kind, _digest) = (bytes.word()?, bytes.word()?, bytes.take(20)?);
    let mut event = Bytes(bytes.sized()?, 0);
    if kind != NO_ACTION || event.take(16)? != b"Spec ID Event03\0" {
        return Err(LogError::NoHeader);
    }
    let _class_and_version = event.take(8)?;
    let count = event.word()?;
    let mut sizes = BTreeMap::new();
    for _ in 0..count {
        sizes.insert(event.half()?, event.half()?);
    }
    Ok(sizes)
}
