//! Devices as sysfs shows them: Documentation/ABI/testing/sysfs-bus-pci, sysfs-block, sysfs-class-net, sysfs-class-tpm,
//! and for where a disk is attached the path of its device.

use super::{Root, said};
use kiln_protocol::{Disk, Nic, PciDevice, Tpm};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Most entries of a directory looked at.
const ENTRIES: usize = 4096;
/// A sysfs attribute is at most a page.
const PAGE: usize = 4096;

/// The first bytes of a file.
pub fn read(path: &Path, limit: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// An attribute; empty where there is none, or it cannot be read: a network card that is down has no carrier to read.
pub fn text(path: &Path) -> String {
    read(path, PAGE).map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()).unwrap_or_default()
}

fn number(path: &Path) -> u64 {
    text(path).parse().unwrap_or(0)
}

/// The last part of where a link points to.
fn link(path: &Path) -> String {
    let target = std::fs::read_link(path).unwrap_or_default();
    target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The names in a directory, in order.
pub fn names(dir: &Path) -> Result<Vec<String>, String> {
    let entries = dir.read_dir().map_err(|error| said(dir, &error))?;
    let mut names: Vec<String> =
        entries.flatten().take(ENTRIES).map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// PCI devices without virtual functions. A kernel without PCI has none.
pub fn pci(root: &Root) -> Result<Vec<PciDevice>, String> {
    let dir = root.sys.join("bus/pci/devices");
    let mut found = Vec::new();
    for address in names(&dir)? {
        let device = dir.join(&address);
        if device.join("physfn").exists() {
            continue;
        }
        let hex = |name: &str| text(&device.join(name)).trim_start_matches("0x").to_owned();
        let id = format!("{}:{}", hex("vendor"), hex("device"));
        found.push(PciDevice { id, class: hex("class"), driver: link(&device.join("driver")), address });
    }
    Ok(found)
}

/// A device and those that it is attached to, the nearest first, down to the bus it all hangs on.
fn ancestors(root: &Root, device: &Path) -> Vec<PathBuf> {
    let Ok(path) = device.canonicalize() else { return Vec::new() };
    let top = root.sys.canonicalize().unwrap_or_default();
    path.ancestors().take_while(|p| **p != *top).map(Path::to_owned).collect()
}

/// PCI address and driver of what a device hangs on.
fn controller(ancestors: &[PathBuf]) -> (String, String) {
    let is_pci = |path: &&PathBuf| link(&path.join("subsystem")) == "pci";
    let name = |path: &PathBuf| path.file_name().map(|n| n.to_string_lossy().into_owned());
    let pci = ancestors.iter().find(is_pci).and_then(name).unwrap_or_default();
    // `sd` is every SCSI disk's.
    let driver = ancestors.iter().map(|path| link(&path.join("driver"))).find(|d| !d.is_empty() && d != "sd");
    (pci, driver.unwrap_or_default())
}

/// Disks: not their partitions, not what is only made of them or of memory, no drives for discs.
pub fn disks(root: &Root) -> Result<Vec<Disk>, String> {
    const DISC: &str = "5";
    let dir = root.sys.join("class/block");
    let mut found = Vec::new();
    for name in names(&dir)? {
        let (block, device) = (dir.join(&name), dir.join(&name).join("device"));
        let bytes = number(&block.join("size")).saturating_mul(512);
        let is_disk = device.exists() && !block.join("partition").exists() && !name.starts_with("fd");
        let empty_reader = bytes == 0 && text(&block.join("removable")) == "1";
        if !is_disk || empty_reader || text(&device.join("type")) == DISC || text(&block.join("hidden")) == "1" {
            continue;
        }
        let mut ancestors = ancestors(root, &device);
        if name.starts_with("nvme") && controller(&ancestors).0.is_empty() {
            // With several paths to it, its parent is its subsystem, which names the controllers.
            let paths = names(&device).unwrap_or_default().into_iter().map(|n| device.join(n));
            let path = paths.into_iter().find(|p| p.is_symlink() && p.join("device").exists());
            ancestors = path.map(|p| self::ancestors(root, &p.join("device"))).unwrap_or_default();
        }
        let (pci, driver) = controller(&ancestors);
        let transport = transport(&name, &ancestors);
        let serial = serial(&block, &device, transport, &ancestors);
        let model = [device.join("model"), device.join("name")].iter().map(|p| text(p)).find(|t| !t.is_empty());
        let vendor = text(&device.join("vendor"));
        // ATA's is only the word ATA, virtio's a number.
        let vendor = if matches!(transport, "scsi" | "sas" | "usb") { vendor } else { String::new() };
        let model = format!("{vendor} {}", model.unwrap_or_default());
        let rotational = text(&block.join("queue/rotational")) == "1";
        let transport = transport.to_owned();
        // NVMe's, SCSI's with ATA, MMC's.
        let firmware = ["firmware_rev", "rev", "fwrev"].map(|name| text(&device.join(name)));
        let firmware = firmware.into_iter().find(|t| !t.is_empty()).unwrap_or_default();
        found.push(Disk { name, model, serial, bytes, transport, driver, pci, rotational, firmware, health: None });
    }
    Ok(found)
}

/// How it is attached, by its name and the names of what it hangs on.
fn transport(name: &str, ancestors: &[PathBuf]) -> &'static str {
    let by_name = [("nvme", "nvme"), ("vd", "virtio"), ("mmc", "mmc")];
    let by_parent = [("usb", "usb"), ("ata", "sata"), ("end_device-", "sas"), ("virtio", "virtio")];
    let numbered = |part: &str, start: &str| {
        part.strip_prefix(start).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let mut parts = ancestors.iter().filter_map(|p| p.file_name()).map(|part| part.to_string_lossy());
    by_name
        .iter()
        .find(|(start, _)| name.starts_with(start))
        .or_else(|| parts.find_map(|part| by_parent.iter().find(|(start, _)| numbered(&part, start))))
        .map_or("scsi", |(_, transport)| transport)
}

/// Where each kind keeps its serial number. SCSI's is page 80h of its vital product data (SPC-4 §7.8.15).
fn serial(block: &Path, device: &Path, transport: &str, ancestors: &[PathBuf]) -> String {
    let page = read(&device.join("vpd_pg80"), PAGE).unwrap_or_default();
    let page = String::from_utf8_lossy(page.get(4..).unwrap_or_default()).trim().to_owned();
    let usb = || match transport {
        "usb" => ancestors.iter().find(|p| p.join("idVendor").exists()).map(|p| text(&p.join("serial"))),
        _ => None,
    };
    [page, text(&block.join("serial")), text(&device.join("serial"))]
        .into_iter()
        .find(|t| !t.is_empty())
        .or_else(usb)
        .unwrap_or_default()
}

/// Network interfaces that are devices, with the address they were made with.
pub fn nics(root: &Root) -> Result<Vec<Nic>, String> {
    let dir = root.sys.join("class/net");
    let mut found = Vec::new();
    for name in names(&dir)? {
        let nic = dir.join(&name);
        let device = nic.join("device");
        if !device.exists() || device.join("physfn").exists() {
            continue;
        }
        // In a bond it wears the bond's address.
        let own = [nic.join("bonding_slave/perm_hwaddr"), nic.join("address")];
        let mac = own.iter().map(|p| text(p)).find(|t| !t.is_empty()).unwrap_or_default();
        let carrier = match text(&nic.join("carrier")).as_str() {
            "1" => Some(true),
            "0" => Some(false),
            _ => None,
        };
        let mbps = if carrier == Some(true) { text(&nic.join("speed")).parse().unwrap_or(0) } else { 0 };
        let (pci, driver) = controller(&ancestors(root, &device));
        let firmware = (root.card_firmware)(&name);
        found.push(Nic { name, mac, driver, pci, firmware, carrier, mbps, neighbour: None });
    }
    Ok(found)
}

/// The first TPM.
pub fn tpm(root: &Root) -> Option<Tpm> {
    let tpm = root.sys.join("class/tpm/tpm0");
    tpm.exists().then(|| {
        let version = match text(&tpm.join("tpm_version_major")).as_str() {
            "1" => "1.2",
            "2" => "2.0",
            _ => "",
        };
        Tpm { version: version.to_owned() }
    })
}
