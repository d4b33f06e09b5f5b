//! What this machine is made of, as kernel and firmware say: SMBIOS, PCI devices, disks and their own word on their
//! health, network cards and who is at the other end of their cables, BMC, TPM.
//!
//! Everything is read anew each time and bounded; what cannot be read is named. It looks, and changes nothing.

mod bmc;
mod health;
mod lldp;
mod sysfs;
mod task;
#[cfg(test)]
mod tests;

pub use lldp::Neighbours;
pub use sysfs::{disks, nics};
pub use task::keep;

use crate::error::{AgentError, Result};
use crate::{facts, sys};
use kiln_protocol::{Disk, DiskHealth, INVENTORY_VERSION, Inventory, SMBIOS_LIMIT, Unread, parse_smbios};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the kernel shows its devices. The seam at which a test puts a machine of its own.
pub struct Root {
    pub sys: PathBuf,
    pub dev: PathBuf,
    /// What the driver of this interface says of its card's firmware; empty: nothing.
    pub card_firmware: fn(&str) -> String,
}

impl Root {
    pub fn of_this_machine() -> Self {
        let card_firmware = |name: &str| sys::card_firmware(name).unwrap_or_default();
        Self { sys: "/sys".into(), dev: "/dev".into(), card_firmware }
    }
}

/// Looks at everything. Takes as long as the slowest disk needs for its health, 25 s at most.
pub fn take(root: &Root, neighbours: &Neighbours) -> Inventory {
    let mut found =
        Inventory { version: INVENTORY_VERSION, memory_bytes: facts::memory("MemTotal:"), ..Inventory::default() };
    let mut unread = Vec::new();
    let mut note = |section: &str, reason: String| unread.push(Unread { section: section.into(), reason });
    let table = root.sys.join("firmware/dmi/tables/DMI");
    match sysfs::read(&table, SMBIOS_LIMIT) {
        Ok(table) => {
            let smbios = parse_smbios(&table);
            (found.system, found.firmware, found.bmc) = (smbios.system, smbios.firmware, smbios.bmc);
            (found.cpus, found.dimms) = (smbios.cpus, smbios.dimms);
        }
        Err(error) => note("smbios", format!("{}: {error}", table.display())),
    }
    match sysfs::pci(root) {
        Ok(pci) => found.pci = pci,
        Err(error) => note("pci", error),
    }
    match disks_with_health(root) {
        Ok(disks) => found.disks = disks,
        Err(error) => note("disks", error),
    }
    match nics(root) {
        Ok(nics) => found.nics = nics,
        Err(error) => note("nics", error),
    }
    for nic in &mut found.nics {
        nic.neighbour = neighbours.of(&nic.name);
    }
    found.tpm = sysfs::tpm(root);
    bmc::ask(root, &mut found.bmc);
    found.unread = unread;
    found.tame()
}

/// Disks, with their own word on their health.
fn disks_with_health(root: &Root) -> std::result::Result<Vec<Disk>, String> {
    let mut disks = disks(root)?;
    health::ask_all(&root.dev, &mut disks);
    Ok(disks)
}

/// A disk's own word on its health, if it has one.
pub fn health_of(root: &Root, disk: &Disk) -> Option<DiskHealth> {
    health::ask(&root.dev, disk)
}

/// `kiln-agent inventory`: prints it as JSON; with `--listen` after so many seconds in which switches may name
/// themselves (they do it every 30).
pub fn print(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let usage = || AgentError::Usage("usage: kiln-agent inventory [--listen SECONDS]".into());
    let seconds = match (arguments.next().as_deref(), arguments.next(), arguments.next()) {
        (None, ..) => 0,
        (Some("--listen"), Some(seconds), None) => seconds.parse::<u16>().map_err(|_| usage())?,
        (Some(_), ..) => return Err(usage()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::system("starting the runtime"))?;
    let neighbours = Neighbours::default();
    if seconds > 0 {
        runtime.block_on(async {
            neighbours.listen();
            tokio::time::sleep(Duration::from_secs(seconds.into())).await;
        });
    }
    std::println!("{}", json(&take(&Root::of_this_machine(), &neighbours)));
    Ok(())
}

fn json(inventory: &Inventory) -> String {
    serde_json::to_string(inventory).expect("wire types always become JSON")
}

/// A path below a directory, for messages.
fn said(path: &Path, error: &std::io::Error) -> String {
    format!("{}: {error}", path.display())
}
