//! Release metadata: its formats, its verification (a TUF 1.0 client as a pure state machine), its signing, and the
//! dm-verity tree.
//!
//! Pure: no I/O, no clock, no random numbers; time and key seeds are arguments.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod acceptance;
pub mod authenticode;
pub mod canonical;
pub mod certificate;
mod checks;
pub mod crossing;
pub mod declared;
pub mod efi;
pub mod envelope;
mod error;
mod exec;
mod formats;
pub mod hex;
pub mod kexec;
pub mod key;
pub mod machine_ca;
pub mod measured;
pub mod network;
pub mod newc;
pub mod pe;
pub mod pkcs7;
pub mod secrets;
mod spki;
pub mod tuf;
pub mod verity;

pub use acceptance::{ACCEPTANCE_PATH, AcceptancePlan, MAX_TEST};
pub use checks::{MAX_DIRECTOR_STATEMENT, is_image_name};
pub use declared::{Expected, HealthCheck, HealthKind, Hook, HookKind, OnTimeout, Threshold, UnitLimit};
pub use envelope::{KeySet, Unverified, Verified, sign_envelope};
pub use error::{
    CanonicalError, DirectorError, EnvelopeError, FormatError, KeyError, OperatorError, TufError, VerityError,
    with_causes,
};
pub use exec::{EXEC_PATH, EXEC_TYPE, ExecFail, ExecMode, ExecPolicy, ExecRule, MAX_EXEC_HASHES, MAX_EXEC_RULES};
pub use formats::{
    AGENT_API_NAME, AgentApi, Artifact, BOOT_PATH, BootInfo, Crossing, DataSettings, DbxUpdate, DiskSettings,
    FilePolicy, HANDOFF_PATH, IPE_POLICY_PATH, MANIFEST_TYPE, Manifest, Measured, Mode, ROOT_SIGNATURE_PATH,
    RevokedProgram, SITE_TYPE, Site, SiteSettings, VerityParams, WipePolicy, WritableMount,
};
pub use key::{PublicKey, Scheme, Signer};
pub use secrets::{CertificatePolicy, IDENTITY_NAME, MACHINE_CA_NAME, SECRETS_PATH, WantedCertificate, WantedSecret};
