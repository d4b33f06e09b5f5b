//! What Kiln says to a TPM 2.0, and what it reads of its answers: the few structures and commands that a machine needs to
//! prove what it booted and who it is. Sources: TCG "Trusted Platform Module Library", family 2.0, revision 1.59, parts 2
//! (structures) and 3 (commands); TCG EK Credential Profile 2.5.
//!
//! Bytes in, bytes out: the device is the agent's. Only SHA-256, ECC P-256 and AES-128-CFB are spoken, which every TPM 2.0 of a
//! PC client has. Sessions are passwords (always empty) and policies; nothing is encrypted between processor and TPM: who can put
//! a probe on that bus is not kept out (docs/threat-model.md).

pub mod command;
mod delivery;
mod public;
mod quote;
mod wire;

pub use command::{Auth, Command};
pub use delivery::{DELIVERY, delivery_policy, pcr_policy};
pub use public::{EccPoint, Template, name_of, spki_of};
pub use quote::{Attested, ClockInfo, QUOTED, Quote, pcr_digest, qualifying_data};

/// `TPM_ALG_SHA256`.
pub const SHA256: u16 = 0x000b;
/// `TPM_ALG_ECC`.
pub(crate) const ECC: u16 = 0x0023;
/// `TPM_ALG_ECDSA`.
pub(crate) const ECDSA: u16 = 0x0018;
/// `TPM_ALG_AES`.
pub(crate) const AES: u16 = 0x0006;
/// `TPM_ALG_CFB`.
pub(crate) const CFB: u16 = 0x0043;
/// `TPM_ALG_KEYEDHASH`.
pub(crate) const KEYED_HASH: u16 = 0x0008;
/// `TPM_ALG_NULL`.
pub(crate) const NULL: u16 = 0x0010;
/// `TPM_ECC_NIST_P256`.
pub(crate) const P256: u16 = 0x0003;

/// `TPM_RH_OWNER`.
pub const OWNER: u32 = 0x4000_0001;
/// `TPM_RH_ENDORSEMENT`.
pub const ENDORSEMENT: u32 = 0x4000_000b;
/// `TPM_RC_NV_UNINITIALIZED`-like format-one and format-zero codes that the agent tells apart.
pub mod code {
    /// `TPM_RC_FAILURE`: in failure mode, which ends with a reset.
    pub const FAILURE: u32 = 0x101;
    /// `TPM_RC_HANDLE`, for the first handle: there is nothing at that index.
    pub const NO_SUCH_HANDLE: u32 = 0x18b;
    /// The same for the second handle.
    pub const NO_SUCH_SECOND_HANDLE: u32 = 0x28b;
    /// `TPM_RC_NV_DEFINED`.
    pub const NV_DEFINED: u32 = 0x14c;
    /// `TPM_RC_NV_UNINITIALIZED`: defined and never written.
    pub const NV_UNWRITTEN: u32 = 0x14a;
    /// `TPM_RC_NV_SPACE`.
    pub const NV_SPACE: u32 = 0x14b;
    /// `TPM_RC_POLICY_FAIL`, for the first session.
    pub const POLICY_FAIL: u32 = 0x99d;
}

/// Why bytes are not what a TPM should have said, or what it refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TpmError {
    #[error("the TPM refuses {command} with code {code:#x}")]
    Refused { command: &'static str, code: u32 },
    #[error("the TPM's answer is cut short at {what}")]
    Short { what: &'static str },
    #[error("the TPM's answer has {0} bytes too many")]
    Surplus(usize),
    #[error("the TPM's answer: {what} is not what was asked for")]
    Unexpected { what: &'static str },
    #[error("the public area is not of the template {0}")]
    OtherTemplate(&'static str),
    #[error("the signature is not the attestation key's")]
    BadSignature,
}

#[cfg(test)]
mod tests;
