//! What the agent and the boot server say to each other, and the words both use.
//!
//! Pure: no I/O, no clock, no random numbers. It does not verify signatures: that is `kiln-release`, whose
//! envelope carries [`Assignment`] and [`Freshness`] as its signed parts.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod acceptance;
mod assignment;
mod attestation;
mod certificate;
mod condition;
mod dbx;
pub mod drift;
mod exec;
mod ids;
mod introduction;
mod inventory;
mod lldp;
mod log;
mod order;
mod reply;
mod secrets;
pub mod slot;
mod smbios;
mod spool;
mod stage;
mod stale;
pub mod tpm;
mod verdict;
mod wire;

pub use acceptance::{Acceptance, Least, Outcome, RESULTS_LIMIT, TestKind, TestResult};
pub use assignment::{
    ASSIGNMENT_TYPE, Assignment, AssignmentError, BootFirst, BoundMachine, ExecChoice, FRESHNESS_TYPE, Freshness,
    FreshnessError, RoleSettings, Running, check_assignment, check_freshness,
};
pub use attestation::{
    ATTESTATION_LIMIT, ATTESTATION_PATH, Attestation, AttestationState, Challenge, EVENT_LOG_LIMIT, HexBytes,
    IMA_LIST_LIMIT, Judged, TpmPresence,
};
pub use certificate::{
    CERTIFICATE_LIMIT, CERTIFICATE_PATH, CertificateAnswer, CertificateRequest, IssuedCertificate, Life, Standing,
    possession,
};
pub use condition::{Condition, DRIFT_LIMIT, Difference, Draining, DriftKind};
pub use dbx::{DbxOffer, DbxOutcome, DbxState, dbx_hold};
pub use drift::Usage;
pub use exec::{EXEC_ANCESTORS, EXEC_PATH_LIMIT, EXEC_VIOLATIONS, ExecAncestor, ExecState, ExecVerdict, ExecViolation};
pub use ids::{
    Architecture, Class, IdError, ImageName, KeyId, MachineId, Nonce, OrderId, ReleaseId, SecretName, Sha256Hex,
};
pub use introduction::{
    ApprovalCode, Committed, INTRODUCTION_LIMIT, INTRODUCTION_PATH, Introduction, IntroductionError, IntroductionReply,
    approval_code, commitment,
};
pub use inventory::{
    Bmc, Cpu, Dimm, Disk, DiskHealth, FirmwareVersion, INVENTORY_LIMIT, INVENTORY_PATH, INVENTORY_VERSION, Inventory,
    InventoryReport, Neighbour, Nic, PciDevice, System, Tpm, Unread, binary_size, decimal_size, speed,
};
pub use lldp::{LLDP_ADDRESSES, LLDP_ETHERTYPE, Lldp, LldpError, parse_lldp};
pub use log::{LOG_LIMIT, LOG_LINES, LOG_PATH, LOG_TEXT, LogBatch, LogLine, LogReply, LogSource, cut_at, printable};
pub use order::{
    ORDER_DISKS, ORDER_MACHINES, ORDER_TYPE, Order, OrderAction, OrderError, OrderMark, Ordered, OrderedMachine,
    RECEIPT_PATH, RECEIPT_TYPE, Receipt, WipeMethod, WipeOutcome, WipedDisk, check_order,
};
pub use reply::{About, Decision, Desired, Grant, OrderGiven, Reply};
pub use secrets::{
    Delivered, SECRET_LIMIT, SECRETS_OF_A_MACHINE, SECRETS_OF_A_RELEASE, SecretSet, SecretSetError, SecretVersions,
    SecretsWord, bound_to,
};
pub use smbios::{SMBIOS_LIMIT, Smbios, is_placeholder, parse_smbios};
pub use spool::{Clocks, Intake, Kept, Noted, SPOOL_BATCH, SPOOL_LIMIT, SPOOL_TEXT, Spool, SpoolReport};
pub use stage::{Failure, Stage, StageRecord, StageState};
pub use stale::Stale;
pub use verdict::{Found, Rule, Turn, Verdict};
pub use wire::{
    AgentMemory, Firmware, Health, KeyStorage, MachineFacts, Prefetch, Progress, ProtectionClass, REPORT_PATH, Report,
    RollbackMemory, RunningRelease, VENDOR_CLASS, VENDOR_OPTION_AGENT_URL, VENDOR_OPTION_HTTP_URL, Via,
};

/// `spec_version` of every object whose `_type` begins with `kiln-`.
pub const SPEC_VERSION: &str = "1.0";
