//! What this machine says it is: SMBIOS by sysfs, MAC addresses, memory, firmware.

use crate::error::{AgentError, Result};
use kiln_protocol::{
    AgentMemory, Architecture, Firmware, KeyStorage, MachineFacts, MachineId, ProtectionClass, RollbackMemory,
};
use std::path::Path;

/// Reads the facts; key, memory, protection and TPM are the caller's to say.
pub fn read(key_storage: KeyStorage, rollback_memory: RollbackMemory) -> Result<MachineFacts> {
    let macs = mac_addresses();
    Ok(MachineFacts {
        id: machine_id(&macs)?,
        product: [dmi("sys_vendor"), dmi("product_name")].join(" ").trim().to_owned(),
        serial: dmi("product_serial"),
        macs,
        firmware: firmware(),
        arch: architecture(),
        key_storage,
        rollback_memory,
        protection: ProtectionClass::Unprotected,
        memory_bytes: memory("MemTotal:"),
        tpm: None,
    })
}

/// UEFI if the kernel has its run-time services' directory.
pub fn firmware() -> Firmware {
    if Path::new("/sys/firmware/efi").exists() { Firmware::Uefi } else { Firmware::Bios }
}

/// The architecture this agent is built for: it runs nowhere else.
pub fn architecture() -> Architecture {
    if cfg!(target_arch = "aarch64") { Architecture::Aarch64 } else { Architecture::X86_64 }
}

/// A line of /proc/meminfo, in bytes; 0 if it is not there.
pub fn memory(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kibibytes(&text, field).unwrap_or(0)
}

/// What this process costs; none where the kernel does not say.
pub fn own_memory() -> Option<AgentMemory> {
    memory_of("self")
}

/// What a process costs, by its name in /proc (proc_pid_status(5)).
pub fn memory_of(process: &str) -> Option<AgentMemory> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let (cpu_ms, ran_ms) =
        std::fs::read_to_string(format!("/proc/{process}/stat")).ok().and_then(|s| times(&s)).unzip();
    Some(AgentMemory {
        rss_bytes: kibibytes(&text, "VmRSS:")?,
        peak_bytes: kibibytes(&text, "VmHWM:")?,
        cpu_ms,
        ran_ms,
    })
}

/// Processor time in milliseconds, of a process and of its children that ended: fields 14 to 17 of proc_pid_stat(5), in
/// hundredths of a second (USER_HZ is 100 on every architecture that the agent is built for).
fn times(stat: &str) -> Option<(u64, u64)> {
    // The name before it may hold anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut ticks = fields.split(' ').skip(11).map(|field| field.parse::<u64>().ok());
    let mut next = || ticks.next().flatten();
    let (user, system, of_children, their_system) = (next()?, next()?, next()?, next()?);
    Some(((user + system) * 10, (of_children + their_system) * 10))
}

/// The kernel's `FIELD:   N kB`, in bytes.
fn kibibytes(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(field))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn dmi(name: &str) -> String {
    let text = std::fs::read_to_string(Path::new("/sys/class/dmi/id").join(name)).unwrap_or_default();
    text.trim().chars().filter(|c| !c.is_control()).take(128).collect()
}

/// The SMBIOS UUID; where there is none (or not enough rights), one made of the first MAC, so that a machine
/// always has a stable name.
fn machine_id(macs: &[String]) -> Result<MachineId> {
    if let Ok(id) = dmi("product_uuid").to_lowercase().parse() {
        return Ok(id);
    }
    let hex: String = macs.first().map(|m| m.replace(':', "")).unwrap_or_default();
    format!("00000000-0000-0000-0000-{hex:0>12}").parse().map_err(|e| AgentError::Format {
        path: "/sys/class/dmi/id/product_uuid".into(),
        reason: format!("no usable UUID and no MAC address to make one of: {e}"),
    })
}

/// Names of the network interfaces that are devices (not lo, bridges or tunnels).
pub fn interfaces() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.path().join("device").exists())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Their hardware addresses, sorted.
pub fn mac_addresses() -> Vec<String> {
    let mut macs: Vec<String> = interfaces()
        .iter()
        .filter_map(|name| {
            let read = |file: &str| std::fs::read_to_string(format!("/sys/class/net/{name}/{file}")).ok();
            // A bond lends its members one address.
            read("bonding_slave/perm_hwaddr").or_else(|| read("address"))
        })
        .map(|text| text.trim().to_lowercase())
        .collect();
    macs.sort();
    macs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figures_are_read_in_bytes() {
        assert_eq!(kibibytes("VmPeak:\t 9 kB\nVmHWM:\t    3584 kB\n", "VmHWM:"), Some(3584 * 1024));
        assert_eq!(kibibytes("VmHWM:\t lots kB\n", "VmHWM:"), None);
        assert_eq!(kibibytes("", "VmHWM:"), None);
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194560 1 2 3 4 11 12 13 14 20 0 1 0 5\n";
        assert_eq!(times(stat), Some((230, 270)));
        assert_eq!(times("7 (a) S 1"), None);
        let before = own_memory().unwrap();
        assert!(before.cpu_ms.is_some() && before.ran_ms.is_some(), "{before:?}");
        assert!(before.rss_bytes > 0 && before.rss_bytes <= before.peak_bytes, "{before:?}");
        let held = vec![1_u8; 32 << 20];
        let after = own_memory().unwrap();
        assert!(after.peak_bytes >= 32 << 20, "{} bytes are held: {after:?}", held.len());
    }
}
