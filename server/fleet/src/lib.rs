//! What the boot server knows of each machine, and what it decides: the machine's state machine, the counting of a
//! trial's boots, and the grant to reimage.
//!
//! Pure: no I/O, no clock, no random numbers. Times are unix milliseconds and come in as arguments; a step takes a
//! machine and an [`Event`] and gives back the machine and the [`Action`]s that the caller performs. It does not
//! sign, store or send anything, and it does not verify releases: the caller says what is published.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod acceptance;
pub mod access;
mod age;
mod attestation;
mod bootloop;
mod boots;
mod certificate;
mod classes;
mod clones;
mod condition;
mod drift;
mod error;
mod event;
mod expected;
mod grant;
mod hardware;
mod held;
mod keys;
mod machine;
mod mute;
mod orders;
mod person;
mod protection;
mod rebuild;
mod replace;
mod report;
mod secrets;
mod silence;
mod state;
mod step;
mod stored;
mod trial;
mod way;

pub use acceptance::{ACCEPTANCE_KEPT, AcceptanceRun, Demand};
pub use attestation::{Attestations, Began, BootProof, ColdBoot, Left, Pinned, Proven, ProvenBoot};
pub use bootloop::{BootLoop, LOOP_REST_MS, LOOP_STARTS, LOOP_WINDOW_MS};
pub use boots::{BOOTS_KEPT, Boot, RECORDS_KEPT, StageAt};
pub use certificate::{CertificateDemand, CertificateEnd, CertificateRefusal};
pub use classes::{CAME_UP_KEPT, Classes, HardwareClass, Proof, Proofs, ProvenBy, Ways};
pub use clones::{BOOTS_AT_ONCE, LATE_REPORTS, PAST_BOOTS, PastBoots};
pub use condition::{EVENTS_KEPT, EventAt, KnownCondition};
pub use drift::{DRIFT_PATIENCE_MS, DRIFT_REBUILDS, DRIFT_WINDOW_MS, DriftPolicy, KnownDrift};
pub use error::{NoRoute, Refusal};
pub use event::{Action, Event, Reported};
pub use expected::{
    At, Build, CameUp, Cells, Change, Claimant, Comparison, CsvError, DIFFERENCES, Due, Entry, ExpectedList,
    ExpectedMachine, Flaw, Flaws, MACHINES, Overdue, Parts, PartsError, Port, Position, Problem, Sheet, Sku, compare,
    read_csv, serial_key,
};
pub use grant::{Desire, Limits, desire, grant, grant_among};
pub use hardware::{EVENTS_AT_ONCE, HARDWARE_EVENTS_KEPT, Hardware, HardwareEvent, changes, summary};
pub use held::{HELD_KEPT, HeldBoot};
pub use keys::{KEY_DIGITS, STRANGERS_KEPT};
pub use machine::{Assigned, Machine, Refused};
pub use mute::{LONGEST_PAUSE_S, MUTE_STARTS};
pub use orders::{Errand, MachineOrder, ORDERS_KEPT, OrderState};
pub use protection::Recorded;
pub use replace::Replacement;
pub use secrets::{Barred, SecretsPolicy};
pub use state::{State, StateKind};
pub use way::Route;

/// Unix time in milliseconds, on the server's clock.
pub type Millis = u64;

/// A machine that reports is live for so long after its last report. Reports come every 30 s ± 20 %, or are held for
/// 55 s; twice that and a little is silence. So long firmware packets in its name are kept and not believed.
pub const LIVE_MS: Millis = 120_000;
/// From a boot's first sign to *healthy*. A trial that is up, and speaks, for so long without is given up.
pub const BOOT_DEADLINE_MS: Millis = 15 * 60_000;
/// A firmware that was answered downloads within so long, and goes on downloading; the default of
/// [`Limits::firmware_patience`].
pub const FIRMWARE_PATIENCE_MS: Millis = 60_000;
/// From the whole boot program to the agent's first report, in [`Limits::firmware_patience`]: kernel, drivers, network.
/// So long, too, a chain of loaders may take from the DISCOVER to the boot program.
pub const AGENT_PATIENCE: u64 = 3;
/// Kind of the failure of [`kiln_protocol::Stage::Program`]: DHCP was answered, and nothing is downloaded.
pub const NO_DOWNLOAD: &str = "no-download";
/// Kind of the failure of [`kiln_protocol::Stage::Program`]: a download began and goes no further.
pub const STALLED: &str = "download-stalled";
/// Kind of the failure of [`kiln_protocol::Stage::Start`]: the boot program was sent whole, and no agent is heard.
pub const NO_AGENT: &str = "no-agent";
/// Kind of the failure of [`kiln_protocol::Stage::Start`]: a good release was started again and again, and no agent spoke.
pub const BOOT_LOOP: &str = "boot-loop";
/// From the grant to *going*; a machine whose drain hooks run has as long as they have.
pub const DRAIN_DEADLINE_MS: Millis = 5 * 60_000;
/// A machine that nobody approved is forgotten after so long without a word: anyone can make one up.
pub const FORGET_MS: Millis = 24 * 3_600_000;
