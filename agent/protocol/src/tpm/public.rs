//! The keys and objects that Kiln makes in a TPM, each by a fixed template, and what a public area says (part 2, §12.2).
//! A public area that is not its template with a point behind is refused: nothing of it is interpreted beyond that.

use super::wire::{Reader, Writer};
use super::{AES, CFB, ECC, ECDSA, KEYED_HASH, NULL, P256, SHA256, TpmError};
use ring::digest::{SHA256 as HASH, digest};

// TPMA_OBJECT (part 2, §8.3).
const FIXED_TPM: u32 = 1 << 1;
const FIXED_PARENT: u32 = 1 << 4;
const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
const USER_WITH_AUTH: u32 = 1 << 6;
const ADMIN_WITH_POLICY: u32 = 1 << 7;
const NO_DA: u32 = 1 << 10;
const RESTRICTED: u32 = 1 << 16;
const DECRYPT: u32 = 1 << 17;
const SIGN: u32 = 1 << 18;

/// `PolicySecret(TPM_RH_ENDORSEMENT)`: the policy of an endorsement key of the low range (EK Credential Profile, B.3.3).
const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd, 0x52, 0xd7,
    0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];

/// An ECC P-256 key of a fixed kind. Each comes from the TPM's own seed: the same key at each boot, with nothing stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Template {
    /// The endorsement key: template L-2 of the EK Credential Profile. It proves which TPM this is.
    Endorsement,
    /// Attestation key: restricted to what the TPM itself made, so that its quotes cannot be forged with it.
    Attestation,
    /// Parent of what is sealed.
    Storage,
    /// What secrets are delivered to: usable for nothing but opening a credential, and only under this policy
    /// ([`super::delivery_policy`]).
    Delivery([u8; 32]),
}

/// A point of P-256, both coordinates in 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EccPoint {
    /// Its x.
    pub x: [u8; 32],
    /// Its y.
    pub y: [u8; 32],
}

impl EccPoint {
    /// As SEC 1 §2.3.3 writes it, uncompressed.
    pub fn uncompressed(&self) -> [u8; 65] {
        let mut out = [4; 65];
        out[1..33].copy_from_slice(&self.x);
        out[33..].copy_from_slice(&self.y);
        out
    }
}

impl Template {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Endorsement => "endorsement key (ECC P-256, L-2)",
            Self::Attestation => "attestation key (ECC P-256, restricted)",
            Self::Storage => "storage key (ECC P-256)",
            Self::Delivery(_) => "delivery key (ECC P-256, restricted, bound to these PCRs)",
        }
    }

    /// Everything of the public area (`TPMT_PUBLIC`) but the point.
    fn head(self) -> Vec<u8> {
        let kind = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN;
        let (attributes, policy): (u32, &[u8]) = match &self {
            Self::Endorsement => (kind | ADMIN_WITH_POLICY | RESTRICTED | DECRYPT, &EK_POLICY),
            Self::Attestation => (kind | USER_WITH_AUTH | NO_DA | RESTRICTED | SIGN, &[]),
            Self::Storage => (kind | USER_WITH_AUTH | NO_DA | RESTRICTED | DECRYPT, &[]),
            // No password opens it: its policy is asked for every use.
            Self::Delivery(policy) => (kind | ADMIN_WITH_POLICY | NO_DA | RESTRICTED | SIGN, policy),
        };
        let head = Writer::default().u16(ECC).u16(SHA256).u32(attributes).sized(policy);
        let head = match self {
            Self::Endorsement | Self::Storage => head.u16(AES).u16(128).u16(CFB).u16(NULL),
            Self::Attestation | Self::Delivery(_) => head.u16(NULL).u16(ECDSA).u16(SHA256),
        };
        head.u16(P256).u16(NULL).0
    }

    /// What `CreatePrimary` is given. The endorsement key's has a point of zeros, as its profile wants.
    pub(super) fn input(self) -> Vec<u8> {
        let zeros: &[u8] = match self {
            Self::Endorsement => &[0; 32],
            Self::Attestation | Self::Storage | Self::Delivery(_) => &[],
        };
        Writer(self.head()).sized(zeros).sized(zeros).0
    }

    /// The point of a public area of exactly this kind.
    pub fn point(self, public: &[u8]) -> Result<EccPoint, TpmError> {
        let other = TpmError::OtherTemplate(self.name());
        let rest = public.strip_prefix(self.head().as_slice()).ok_or(other.clone())?;
        let mut reader = Reader(rest);
        let (x, y) = (reader.sized("x")?, reader.sized("y")?);
        reader.end()?;
        match (padded(x), padded(y)) {
            (Some(x), Some(y)) => Ok(EccPoint { x, y }),
            (Some(_) | None, _) => Err(other),
        }
    }
}

/// 32 bytes of a number that a TPM may have written with fewer.
pub(super) fn padded(number: &[u8]) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    out.get_mut(32_usize.checked_sub(number.len())?..)?.copy_from_slice(number);
    (!number.is_empty()).then_some(out)
}

/// The public area of data that is sealed under `policy` (a digest; empty: without one, for whoever asks this TPM).
pub(super) fn sealed(policy: &[u8]) -> Vec<u8> {
    let kind = FIXED_TPM | FIXED_PARENT | NO_DA;
    let attributes = if policy.is_empty() { kind | USER_WITH_AUTH } else { kind };
    Writer::default().u16(KEYED_HASH).u16(SHA256).u32(attributes).sized(policy).u16(NULL).sized(&[]).0
}

/// The name of an object: what a credential is made for (part 1, §16).
pub fn name_of(public: &[u8]) -> Vec<u8> {
    [&SHA256.to_be_bytes()[..], digest(&HASH, public).as_ref()].concat()
}

/// `SubjectPublicKeyInfo` of a P-256 key, DER (RFC 5480 §2): what its SHA-256 names the key by.
pub fn spki_of(point: &EccPoint) -> Vec<u8> {
    const HEAD: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7,
        3, 0x42, 0,
    ];
    [&HEAD[..], &point.uncompressed()].concat()
}
