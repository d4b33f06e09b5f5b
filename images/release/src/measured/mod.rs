//! What a machine measures when it boots a release: predicted when the release is built, and judged from a TPM's quote and the
//! firmware's event log.
//!
//! Firmware and systemd's stub extend the PCRs (TCG PC Client Platform Firmware Profile 1.06 §3.3.4; UAPI "TPM2 PCR
//! Measurements"): 0–3 firmware and its settings, 4 what firmware starts, 7 Secure Boot, 11 the UKI's parts, 12 what was added to
//! its command line. The kernel extends 10 by what it loads for a kexec. The quote proves the values, the logs explain them, and
//! only what replays to the values is believed.

mod change;
mod ima;
#[cfg(test)]
mod ima_tests;
mod judge;
mod kexec;
mod log;
mod predict;
#[cfg(test)]
mod tests;

pub use change::after_change;
pub use ima::{IMA_PCR, IMA_POLICY, ImaEntry, ImaError, ImaList, ImaWhat, ima_unmeasured};
pub use judge::{Booted, Doubt, Evidence, Fault, Finding, MAX_CAPS, Quoted, caps, judge, read};
pub use kexec::{ForeignKexec, loaded};
pub use log::{Log, LogError, LogEvent};
pub use predict::{measured, pcr11};

use ring::digest::{Context, SHA256, digest};

/// Extends a PCR's value.
pub fn extend(value: &[u8; 32], digest: &[u8; 32]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(value);
    context.update(digest);
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest(&SHA256, bytes).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// What the agent extends PCR 11 by when it leaves the initramfs.
pub fn cap() -> [u8; 32] {
    sha256(b"kiln: left initramfs")
}
