//! What the operator API says of machines and releases: the one shape that CLI, web page and lab read.
//! Times are on the server's clock, unix milliseconds.

mod classes;
mod people;
mod protection;
mod secrets;

pub use classes::{ClassReleaseView, ClassView};
pub use people::{PendingView, TokenView};
pub use protection::protection_words;
pub use secrets::{SecretHolderView, SecretView};

use jiff::Timestamp;
use kiln_fleet::{AcceptanceRun, Comparison, ExpectedMachine, Sku};
use kiln_protocol::{
    AgentMemory, ApprovalCode, AttestationState, DbxState, Difference, Draining, ExecState, Firmware, Inventory, KeyId,
    KeyStorage, MachineId, OrderId, Prefetch, ProtectionClass, Receipt, ReleaseId, RollbackMemory, SecretVersions,
    Sha256Hex, Stage, Stale, Via,
};
use serde::{Deserialize, Serialize};

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineView {
    /// SMBIOS UUID.
    pub id: MachineId,
    /// Its name; the id where nobody gave it one.
    pub name: String,
    /// Its role, once approved.
    pub role: Option<String>,
    /// `discovered`, `approved`, `booting`, `healthy`, …
    pub state: String,
    /// Why it is in that state, and what a person can do.
    pub reason: String,
    /// The newest stage.
    pub stage: Option<Stage>,
    /// Its label.
    pub stage_label: String,
    /// Since when.
    pub stage_since_ms: i64,
    /// What runs: image.
    pub image: Option<String>,
    /// What runs: release.
    pub release: Option<u64>,
    /// What runs: the root hash that the machine read from its kernel.
    pub root_hash: Option<String>,
    /// What it shall run.
    pub assigned: Option<AssignedView>,
    /// When it is put up anew for its age.
    #[serde(default)]
    pub rebuild_due_ms: Option<i64>,
    /// The newest order that an operator signed for it, and what came of it.
    #[serde(default)]
    pub order: Option<String>,
    /// How far the next release is fetched, if another is assigned.
    #[serde(default)]
    pub prefetch: Option<Prefetch>,
    /// What its agent costs.
    #[serde(default)]
    pub agent_memory: Option<AgentMemory>,
    /// What its allow-list of programs says.
    #[serde(default)]
    pub exec: Option<ExecState>,
    /// What its firmware has of the site's list of revoked boot programs.
    #[serde(default)]
    pub dbx: Option<DbxState>,
    /// Drift, draining and events.
    #[serde(default)]
    pub condition: ConditionView,
    /// Its metadata has expired: it runs what it was assigned, and goes nowhere else.
    #[serde(default)]
    pub stale: Option<Stale>,
    /// What the list of expected machines says of it, if there is a list.
    #[serde(default)]
    pub comparison: Option<Comparison>,
    /// The newest acceptance run.
    #[serde(default)]
    pub acceptance: Option<AcceptanceRun>,
    /// Its role holds it until it passed one.
    #[serde(default)]
    pub awaits_acceptance: bool,
    /// The newest release that was proven good here.
    pub last_good: Option<ReleaseId>,
    /// Releases that it runs, or may come to without anybody's asking anew: no floor goes above them.
    #[serde(default)]
    pub needs: Vec<ReleaseId>,
    /// How it boots.
    pub firmware: Option<Firmware>,
    /// Its hardware class: model and firmware version.
    #[serde(default)]
    pub class: Option<String>,
    /// Its identity key: SHA-256 of the public key's SPKI, as `key` in kiln.toml takes it.
    #[serde(default)]
    pub key: Option<KeyId>,
    /// The last other key that reported under its id.
    #[serde(default)]
    pub other_key: Option<KeyId>,
    /// All that are remembered, the newest last.
    #[serde(default)]
    pub other_keys: Vec<KeyId>,
    /// What makes one of them its own, in a sentence.
    #[serde(default)]
    pub other_keys_note: Option<String>,
    /// While it waits for a person: the code that its screen shows, if nobody stands between.
    #[serde(default)]
    pub code: Option<ApprovalCode>,
    /// How strong its name is.
    pub key_storage: Option<KeyStorage>,
    /// Where it is, by which it is known: a trusted relay's address, remote id and circuit id.
    #[serde(default)]
    pub position: Option<String>,
    /// Where it remembers versions.
    pub rollback_memory: Option<RollbackMemory>,
    /// What its boot can promise.
    pub protection: Option<ProtectionClass>,
    /// The same and what was proven of it, for people.
    #[serde(default)]
    pub protection_words: String,
    /// The secrets that it holds, by their versions.
    #[serde(default)]
    pub secrets: SecretVersions,
    /// The newest certificate that it was issued, until that is over; only where one machine is asked for.
    #[serde(default)]
    pub certificate: Option<CertificateView>,
    /// What its TPM proved of this boot.
    #[serde(default)]
    pub attestation: Option<AttestationView>,
    /// Manufacturer and product.
    pub product: String,
    /// Serial number.
    pub serial: String,
    /// MAC addresses.
    pub macs: Vec<String>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The last thing it said, for people.
    pub last_words: String,
    /// When it last spoke.
    pub last_seen_ms: i64,
    /// The last eight boots, oldest first.
    pub boots: Vec<BootView>,
}

/// The site's list of revoked boot programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DbxView {
    /// SHA-256 of the signed change.
    pub update: Sha256Hex,
    /// What it names.
    pub revoked: Vec<ReleaseId>,
    /// Machines in service whose firmware does not have all of it.
    pub lacking: Vec<DbxLackingView>,
}

/// A machine without the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DbxLackingView {
    /// Its name.
    pub machine: String,
    /// Why.
    pub why: String,
}

/// A certificate that a machine was issued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateView {
    /// Serial number, hex.
    pub serial: String,
    /// When it was issued.
    pub issued_ms: i64,
    /// When it is over.
    pub expires_ms: i64,
    /// Why it was revoked, if it was.
    #[serde(default)]
    pub revoked: Option<String>,
}

/// What a machine's TPM proved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttestationView {
    /// The verdict on this boot.
    pub state: AttestationState,
    /// Why, in a sentence.
    pub reason: String,
    /// A kexec after the cold boot that was attested.
    #[serde(default)]
    pub carried: bool,
    /// When it was proven.
    #[serde(default)]
    pub at_ms: Option<i64>,
    /// SHA-256 of the TPM's endorsement key (SPKI), proven in this boot.
    #[serde(default)]
    pub endorsement: Option<Sha256Hex>,
    /// The one that was approved.
    #[serde(default)]
    pub approved_endorsement: Option<Sha256Hex>,
    /// Authenticode digests of the drivers in its option ROMs, as its TPM proved them last; none: that was never proven.
    #[serde(default)]
    pub option_roms: Option<Vec<Sha256Hex>>,
}

/// What a running machine says besides its health.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConditionView {
    /// In what it differs from its release; at most 32.
    #[serde(default)]
    pub drift: Vec<Difference>,
    /// How many differences there are.
    #[serde(default)]
    pub drift_count: u32,
    /// What its role says of drift: `report`, `reimage`.
    #[serde(default)]
    pub drift_policy: String,
    /// What is done about it.
    #[serde(default)]
    pub drift_note: Option<String>,
    /// Which drain hook runs.
    #[serde(default)]
    pub draining: Option<Draining>,
    /// What happened, oldest first; at most 32.
    #[serde(default)]
    pub events: Vec<EventView>,
}

/// Something that happened on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    /// When, on the server's clock.
    pub at_ms: i64,
    /// `health`, `drift`, `hook`, `limit`, `threshold`, `dropped`, `expected`, `stale`.
    pub kind: String,
    /// It needs a person's eye.
    pub alarm: bool,
    /// In a sentence.
    pub text: String,
}

/// An operator's order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderView {
    /// Its id.
    pub id: OrderId,
    /// What it is to do.
    pub action: String,
    /// When it was submitted.
    pub submitted_ms: i64,
    /// By whom.
    pub by: String,
    /// When it was signed.
    pub issued: Timestamp,
    /// Until when it holds.
    pub expires: Timestamp,
    /// For whom, and what came of it.
    pub machines: Vec<OrderedView>,
}

/// One machine of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderedView {
    /// SMBIOS UUID.
    pub id: MachineId,
    /// Its name.
    pub name: String,
    /// `open`, `done`, `refused: …`, `failed: …`, `expired`, `superseded`.
    pub state: String,
}

/// A wipe's receipt, verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptView {
    /// When it came.
    pub received_ms: i64,
    /// At least one disk was wiped, and none failed.
    pub complete: bool,
    /// What it says.
    pub receipt: Receipt,
    /// The file, byte for byte: `kiln order verify-receipt` reads it anywhere.
    pub text: String,
}

/// What a machine shall run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssignedView {
    /// Image.
    pub image: String,
    /// Release.
    pub release: u64,
    /// Sequence number of the assignment.
    pub sequence: u64,
    /// How it goes there.
    pub via: Via,
    /// That was left to the server.
    #[serde(default)]
    pub auto: bool,
}

/// One boot of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootView {
    /// The kernel's boot id; empty until the agent has spoken.
    pub boot_id: String,
    /// By firmware or by kexec.
    pub via: Via,
    /// What it booted.
    pub image: Option<String>,
    /// What it booted.
    pub release: Option<u64>,
    /// When its first stage was seen.
    pub started_ms: i64,
    /// Its stages in the order they came.
    pub stages: Vec<StageView>,
}

/// One stage record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageView {
    /// Which.
    pub stage: Stage,
    /// `started`, `done`, `failed`, `waiting`.
    pub state: String,
    /// When, on the server's clock.
    pub at_ms: i64,
    /// When, since the agent's start.
    pub agent_ms: Option<u64>,
    /// The typed reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// What it said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// One boot's log, or what came after a line of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogView {
    /// The kernel's boot id.
    pub boot_id: String,
    /// Its lines, oldest first; more than 5000 come in several answers.
    pub entries: Vec<LogEntry>,
}

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Counts the lines of a boot from 0.
    pub number: u64,
    /// When, on the server's clock, as well as it is known.
    pub at_ms: i64,
    /// `kernel`, `system`, `agent`, `earlier`; `missing` where lines are missing.
    pub source: String,
    /// syslog's level, 0 to 7.
    pub level: u8,
    /// One line, with nothing in it that a terminal would obey.
    pub text: String,
}

/// A machine by id and name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRef {
    /// SMBIOS UUID.
    pub id: MachineId,
    /// Its name; the id where nobody gave it one.
    pub name: String,
}

/// A machine on the list of expected ones, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedView {
    /// Serial number, else UUID, else Ethernet address.
    pub title: String,
    /// As it is listed.
    pub listed: ExpectedMachine,
    /// `as expected`, `2 differences`, `expected since 2026-11-20, never seen`, …
    pub state: String,
    /// A person should look.
    pub differs: bool,
    /// The machines that came up as this one; more than one is a difference.
    pub machines: Vec<MachineRef>,
    /// In what they differ, in sentences.
    pub differences: Vec<String>,
}

/// The list of expected machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedWhole {
    /// By serial number.
    pub machines: Vec<ExpectedView>,
    /// Machines that came up and are not on the list.
    pub unlisted: Vec<MachineRef>,
    /// Kinds of machine.
    pub skus: Vec<Sku>,
    /// How many switch ports have a place of their own.
    pub ports: usize,
}

/// What an import did, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportView {
    /// Nothing was done.
    pub dry_run: bool,
    /// So many entries are new.
    pub new: usize,
    /// So many are other than before.
    pub changed: usize,
    /// So many are as they were.
    pub same: usize,
    /// So many were taken off.
    pub gone: usize,
    /// Machines on the list after it.
    pub machines: usize,
    /// Kinds of machine after it.
    pub skus: usize,
    /// Switch ports after it.
    pub ports: usize,
}

/// What a machine is made of, and what changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardwareView {
    /// SMBIOS UUID.
    pub machine: MachineId,
    /// The machine's name.
    pub name: String,
    /// When it was last said.
    pub taken_ms: i64,
    /// The boot that said it.
    pub boot_id: String,
    /// In a line.
    pub summary: String,
    /// All of it.
    pub inventory: Inventory,
    /// What changed, oldest first.
    pub events: Vec<HardwareEventView>,
}

/// Something that changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardwareEventView {
    /// When the server heard of it.
    pub at_ms: i64,
    /// A person should look.
    pub warn: bool,
    /// The sentence.
    pub text: String,
}

/// One published release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseView {
    /// Image.
    pub image: String,
    /// Release.
    pub release: u64,
    /// Signed class.
    pub class: String,
    /// Architecture.
    pub architecture: String,
    /// dm-verity root hash.
    pub root_hash: String,
    /// Bytes of the root artifact.
    pub root_bytes: u64,
    /// Bytes of the UKI.
    pub uki_bytes: u64,
    /// When it was built, RFC 3339.
    pub built: String,
    /// How many machines run it.
    pub machines: u64,
    /// How many machines run it, shall run it or would fall back to it: such a release is not pruned.
    pub needed_by: u64,
}
