//! A quote: what a TPM signs about its PCRs (`TPMS_ATTEST`, part 2, §10.12), and its verification.

use super::public::padded;
use super::wire::{Reader, Writer};
use super::{ECDSA, EccPoint, SHA256, TpmError};
use ring::digest::{Context, SHA256 as HASH};
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};

/// `TPM_GENERATED_VALUE`: nothing that a restricted key signs for anybody else begins with it.
const GENERATED: u32 = 0xff54_4347;
/// `TPM_ST_ATTEST_QUOTE`.
const ATTEST_QUOTE: u16 = 0x8018;
const QUALIFYING: &[u8] = b"kiln-quote-1\0";

/// The PCRs that a machine quotes, in ascending order: firmware (0–3), boot applications (4), Secure Boot (7), kexec
/// (10), the UKI (11), what was added to its command line (12).
pub const QUOTED: [u8; 9] = [0, 1, 2, 3, 4, 7, 10, 11, 12];

/// What the TPM says, and its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote {
    /// `TPMS_ATTEST`, as it was signed.
    pub attest: Vec<u8>,
    /// `TPMT_SIGNATURE`.
    pub signature: Vec<u8>,
}

/// How often the machine was started, by its TPM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockInfo {
    /// Resets: one more at each start through firmware, the same over a kexec.
    pub resets: u32,
    /// Resumes since.
    pub restarts: u32,
}

/// A verified quote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attested {
    /// What the asker gave.
    pub qualifying: Vec<u8>,
    /// Starts.
    pub clock: ClockInfo,
    /// SHA-256 over the values of [`QUOTED`].
    pub pcr_digest: [u8; 32],
}

/// The selection of [`QUOTED`] in the SHA-256 bank (`TPML_PCR_SELECTION`).
pub(super) fn selection(pcrs: &[u8]) -> Vec<u8> {
    let mut bits = [0_u8; 3];
    for pcr in pcrs {
        bits[usize::from(pcr / 8)] |= 1 << (pcr % 8);
    }
    Writer::default().u32(1).u16(SHA256).u8(3).bytes(&bits).0
}

/// What a quote is made over: the server's nonce, the key of the TLS connection that it comes by (SHA-256 of its SPKI), and
/// the boot. A quote that was made for another nonce, key or boot says so.
pub fn qualifying_data(nonce: &str, key: &str, boot_id: &str) -> [u8; 32] {
    let mut context = Context::new(&HASH);
    context.update(QUALIFYING);
    // The first two are 64 hex digits, the last is the rest: no length is needed between them.
    for part in [nonce, key, boot_id] {
        context.update(part.as_bytes());
    }
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// What a quote's digest is over.
pub fn pcr_digest<'a>(values: impl Iterator<Item = &'a [u8; 32]>) -> [u8; 32] {
    let mut context = Context::new(&HASH);
    for value in values {
        context.update(value);
    }
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

impl Quote {
    /// Verifies the signature by this attestation key, and reads what was signed. The caller compares nonce and digest.
    pub fn verify(&self, key: &EccPoint) -> Result<Attested, TpmError> {
        let mut reader = Reader(&self.signature);
        let kind = (reader.u16("the signature")?, reader.u16("the signature")?);
        let (r, s) = (reader.sized("r")?, reader.sized("s")?);
        reader.end()?;
        let (Some(r), Some(s), (ECDSA, SHA256)) = (padded(r), padded(s), kind) else {
            return Err(TpmError::BadSignature);
        };
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key.uncompressed())
            .verify(&self.attest, &[r, s].concat())
            .map_err(|_| TpmError::BadSignature)?;

        let mut reader = Reader(&self.attest);
        if reader.u32("magic")? != GENERATED || reader.u16("type")? != ATTEST_QUOTE {
            return Err(TpmError::Unexpected { what: "what is signed" });
        }
        let _signer = reader.sized("signer")?;
        let qualifying = reader.sized("qualifying data")?.to_vec();
        let _clock = reader.u64("clock")?;
        let clock = ClockInfo { resets: reader.u32("resets")?, restarts: reader.u32("restarts")? };
        let _safe = reader.u8("safe")?;
        let _firmware = reader.u64("firmware version")?;
        let wanted = selection(&QUOTED);
        if reader.take(wanted.len(), "PCR selection")? != wanted {
            return Err(TpmError::Unexpected { what: "the PCR selection" });
        }
        let digest = reader.sized("PCR digest")?;
        reader.end()?;
        let pcr_digest = digest.try_into().map_err(|_| TpmError::Unexpected { what: "the PCR digest" })?;
        Ok(Attested { qualifying, clock, pcr_digest })
    }
}
