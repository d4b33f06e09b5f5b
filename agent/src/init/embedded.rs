//! What this UKI says of itself, and what of it the machine shows.

use crate::error::{AgentError, Result};
use crate::plan;
use crate::secureboot::SecureBoot;
use kiln_protocol::{ProtectionClass, RunningRelease};
use kiln_release::{BOOT_PATH, BootInfo};
use std::path::Path;

/// What this machine's firmware enforces, seen from this release.
pub fn secure_boot(boot: &BootInfo) -> SecureBoot {
    SecureBoot::of_this_machine(boot.site.secure_boot.as_deref())
}

/// What its boot can promise, as far as firmware decides it: nothing where something was added to the command line, which may have
/// switched off what the kernel enforces.
pub fn protection(boot: &BootInfo) -> ProtectionClass {
    if plan::command_line_is(&running_command_line(), &boot.command_line) {
        secure_boot(boot).class()
    } else {
        ProtectionClass::Unprotected
    }
}

pub(super) fn read_boot_info() -> Result<BootInfo> {
    let bytes = std::fs::read(BOOT_PATH).map_err(AgentError::file(BOOT_PATH))?;
    parse_boot_info(&bytes, Path::new(BOOT_PATH))
}

/// Reads and checks a `boot.json`.
pub fn parse_boot_info(bytes: &[u8], path: &Path) -> Result<BootInfo> {
    let boot: BootInfo =
        serde_json::from_slice(bytes).map_err(|e| AgentError::Format { path: path.into(), reason: e.to_string() })?;
    boot.check()?;
    Ok(boot)
}

/// What the UKI embeds, as the wire says it.
pub fn embedded(boot: &BootInfo) -> Result<RunningRelease> {
    let bad = |e: kiln_protocol::IdError| AgentError::Format { path: BOOT_PATH.into(), reason: e.to_string() };
    Ok(RunningRelease {
        image: boot.image.parse().map_err(bad)?,
        release: boot.release,
        root_hash: boot.root_hash.parse().map_err(bad)?,
    })
}

/// The command line decides nothing here; a difference from the embedded one is drift, and told.
pub(super) fn tell_command_line_drift(boot: &BootInfo) {
    let running = running_command_line();
    if !plan::command_line_is(&running, &boot.command_line) {
        println!("kiln-agent: command line differs from the embedded one: {running:?}");
    }
}

pub fn running_command_line() -> String {
    std::fs::read_to_string("/proc/cmdline").unwrap_or_default().trim().to_owned()
}
