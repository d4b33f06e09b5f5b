//! What hardware a machine is made of, as its agent found it: posted once after each boot, and again when it changed.
//!
//! A call of its own beside the report: it is a hundred times as long and changes a few times in a machine's life, and a
//! report that is answered every 30 s must neither carry it nor fail with it.
//!
//! Both sides ignore fields they do not know, and every field may be missing. Nothing here proves anything, and all of it
//! is as long as firmware, disks and switches like: [`Inventory::tame`] bounds it on both sides.

mod tame;
mod units;

pub(crate) use tame::clean;
pub use units::{binary_size, decimal_size, speed};

use crate::ids::MachineId;
use serde::{Deserialize, Serialize};

/// Where inventories are posted.
pub const INVENTORY_PATH: &str = "/agent/v1/inventory";
/// [`Inventory::version`] of what this crate writes.
pub const INVENTORY_VERSION: u32 = 1;
/// Longest [`InventoryReport`] on the wire, bytes; one that is [`Inventory::tame`] is shorter.
pub const INVENTORY_LIMIT: usize = 1280 << 10;

/// What the agent posts to [`INVENTORY_PATH`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InventoryReport {
    /// Who it is; the TLS handshake proves it.
    pub machine: MachineId,
    /// The kernel's boot id, as in [`crate::Report::boot_id`].
    pub boot_id: String,
    /// What was found.
    pub inventory: Inventory,
}

/// The hardware of one machine. Empty texts and zeros mean that the machine does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inventory {
    /// [`INVENTORY_VERSION`] of the agent.
    pub version: u32,
    /// The machine as a whole.
    pub system: System,
    /// Its firmware.
    pub firmware: FirmwareVersion,
    /// CPU sockets with a processor in them.
    pub cpus: Vec<Cpu>,
    /// Memory slots, the empty ones too.
    pub dimms: Vec<Dimm>,
    /// PCI devices, without the virtual functions.
    pub pci: Vec<PciDevice>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Network interfaces that are devices.
    pub nics: Vec<Nic>,
    /// The management controller.
    pub bmc: Bmc,
    /// The TPM, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<Tpm>,
    /// Memory that the kernel has, bytes (`MemTotal`): less than the modules' sum by what firmware and kernel keep.
    pub memory_bytes: u64,
    /// What could not be looked at, and so says nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unread: Vec<Unread>,
}

/// SMBIOS types 1 and 3.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct System {
    /// Who made it.
    pub manufacturer: String,
    /// Product name.
    pub product: String,
    /// Serial number.
    pub serial: String,
    /// The owner's tag, of the chassis.
    pub asset_tag: String,
    /// What kind of box: `rack mount`, `blade`, …
    pub chassis: String,
    /// The box's own serial number.
    pub chassis_serial: String,
}

/// SMBIOS type 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FirmwareVersion {
    /// Who made it.
    pub vendor: String,
    /// Its version.
    pub version: String,
    /// Its date, as the vendor writes it.
    pub date: String,
}

/// A processor in its socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// The socket's name on the board.
    pub socket: String,
    /// Model.
    pub model: String,
    /// Cores that are enabled.
    pub cores: u32,
    /// Threads.
    pub threads: u32,
}

/// A memory slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dimm {
    /// The slot's name on the board; no two of a machine are equal.
    pub slot: String,
    /// Size of the module in it; 0: empty.
    pub bytes: u64,
    /// `DDR5`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// Megatransfers a second, as configured.
    pub mts: u32,
    /// Who made it.
    pub manufacturer: String,
    /// Part number.
    pub part: String,
    /// Serial number.
    pub serial: String,
}

/// A PCI device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PciDevice {
    /// `0000:03:00.0`.
    pub address: String,
    /// Vendor and device, `8086:100e`.
    pub id: String,
    /// Class code, `020000`.
    pub class: String,
    /// The driver that has it; empty: none.
    pub driver: String,
}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// The kernel's name, `nvme0n1`; another boot may give another.
    pub name: String,
    /// Model.
    pub model: String,
    /// Serial number.
    pub serial: String,
    /// Size.
    pub bytes: u64,
    /// `nvme`, `sata`, `sas`, `usb`, `virtio`, `scsi`, `mmc`.
    pub transport: String,
    /// Driver of its controller.
    pub driver: String,
    /// PCI address of its controller.
    pub pci: String,
    /// It turns.
    pub rotational: bool,
    /// Its firmware's version; of SCSI and ATA the four characters of their INQUIRY.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub firmware: String,
    /// What it says of its own health; none: it was not asked, or has no answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<DiskHealth>,
}

/// A disk's word on itself: NVMe's SMART log, or ATA's SMART status. Nothing in it counts up with every hour.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskHealth {
    /// It does not expect to fail.
    pub passed: bool,
    /// Why, or how worn it is; for people.
    pub detail: String,
}

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nic {
    /// The kernel's name.
    pub name: String,
    /// The permanent hardware address, `52:54:00:00:00:01`.
    pub mac: String,
    /// Driver.
    pub driver: String,
    /// PCI address.
    pub pci: String,
    /// Its firmware's version, as its driver says it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub firmware: String,
    /// Whether there is a link; none: the interface is down, and nobody knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carrier: Option<bool>,
    /// Speed of the link, Mbit/s; 0: the driver does not say.
    pub mbps: u32,
    /// What is at the other end of the cable, if it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neighbour: Option<Neighbour>,
}

/// The switch port at the other end, as its LLDP says (IEEE 802.1AB).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Neighbour {
    /// Chassis id, mostly a MAC address.
    pub chassis: String,
    /// Port id.
    pub port: String,
    /// The port's description.
    pub port_description: String,
    /// The switch's name.
    pub system_name: String,
    /// Heard in an earlier boot, and not again yet. Only ever set by the server.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub earlier: bool,
}

impl Neighbour {
    /// `switch s1 port 3`: by name where it has one.
    pub fn place(&self) -> String {
        format!("switch {} port {}", self.switch(), self.port)
    }

    /// The switch's name, else its chassis id.
    pub fn switch(&self) -> &str {
        if self.system_name.is_empty() { &self.chassis } else { &self.system_name }
    }
}

/// The management controller, as far as the host can tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bmc {
    /// There is one.
    pub present: bool,
    /// Its address; empty: not known, [`Bmc::note`] says why.
    pub address: String,
    /// Its firmware's version, if the kernel has its driver.
    pub firmware: String,
    /// How it was found, or why its address is not known; for people.
    pub note: String,
}

/// The TPM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tpm {
    /// `1.2` or `2.0`.
    pub version: String,
}

/// A part of the machine that could not be looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Unread {
    /// One of [`Unread::SECTIONS`].
    pub section: String,
    /// Why, in a sentence.
    pub reason: String,
}

impl Unread {
    /// What can be unread: SMBIOS (`system`, `firmware`, `cpus`, `dimms`), PCI devices, disks, network interfaces.
    pub const SECTIONS: [&str; 4] = ["smbios", "pci", "disks", "nics"];
}

impl Inventory {
    /// The section could not be looked at.
    pub fn is_unread(&self, section: &str) -> bool {
        self.unread.iter().any(|u| u.section == section)
    }

    /// Memory of all modules, bytes; 0 where SMBIOS lists none.
    pub fn module_bytes(&self) -> u64 {
        self.dimms.iter().fold(0, |sum, d| sum.saturating_add(d.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn full() -> Inventory {
        Inventory {
            version: INVENTORY_VERSION,
            system: System { manufacturer: "QEMU".into(), serial: "S1".into(), ..System::default() },
            firmware: FirmwareVersion { vendor: "SeaBIOS".into(), version: "1".into(), date: "04/01/2014".into() },
            cpus: vec![Cpu { socket: "CPU 0".into(), model: "m".into(), cores: 2, threads: 4 }],
            dimms: vec![Dimm { slot: "A1".into(), bytes: 1 << 30, kind: "DDR4".into(), mts: 3200, ..Dimm::default() }],
            pci: vec![PciDevice { address: "0000:00:03.0".into(), id: "8086:100e".into(), ..PciDevice::default() }],
            disks: vec![Disk {
                name: "nvme0n1".into(),
                health: Some(DiskHealth { passed: true, detail: "1 % worn".into() }),
                ..Disk::default()
            }],
            nics: vec![Nic {
                name: "eth0".into(),
                carrier: Some(true),
                neighbour: Some(Neighbour { port: "3".into(), ..Neighbour::default() }),
                ..Nic::default()
            }],
            bmc: Bmc { present: true, note: "n".into(), ..Bmc::default() },
            tpm: Some(Tpm { version: "2.0".into() }),
            memory_bytes: 1 << 30,
            unread: vec![Unread { section: "pci".into(), reason: "r".into() }],
        }
    }

    #[test]
    fn golden_bytes_of_version_1() {
        let report = InventoryReport {
            machine: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
            boot_id: "b".into(),
            inventory: full(),
        };
        let golden = concat!(
            r#"{"machine":"00000000-0000-0000-0000-000000000001","boot_id":"b","inventory":{"version":1,"#,
            r#""system":{"manufacturer":"QEMU","product":"","serial":"S1","asset_tag":"","chassis":"","chassis_serial":""},"#,
            r#""firmware":{"vendor":"SeaBIOS","version":"1","date":"04/01/2014"},"#,
            r#""cpus":[{"socket":"CPU 0","model":"m","cores":2,"threads":4}],"#,
            r#""dimms":[{"slot":"A1","bytes":1073741824,"type":"DDR4","mts":3200,"manufacturer":"","part":"","serial":""}],"#,
            r#""pci":[{"address":"0000:00:03.0","id":"8086:100e","class":"","driver":""}],"#,
            r#""disks":[{"name":"nvme0n1","model":"","serial":"","bytes":0,"transport":"","driver":"","pci":"","#,
            r#""rotational":false,"health":{"passed":true,"detail":"1 % worn"}}],"#,
            r#""nics":[{"name":"eth0","mac":"","driver":"","pci":"","carrier":true,"mbps":0,"#,
            r#""neighbour":{"chassis":"","port":"3","port_description":"","system_name":""}}],"#,
            r#""bmc":{"present":true,"address":"","firmware":"","note":"n"},"tpm":{"version":"2.0"},"#,
            r#""memory_bytes":1073741824,"unread":[{"section":"pci","reason":"r"}]}}"#,
        );
        assert_eq!(serde_json::to_string(&report).unwrap(), golden);
        assert_eq!(serde_json::from_str::<InventoryReport>(golden).unwrap(), report);
        let newer = golden.replace(r#"{"slot""#, r#"{"rank":2,"slot""#).replace(r#""tpm":{"#, r#""tpm":{"maker":"x","#);
        assert_eq!(serde_json::from_str::<InventoryReport>(&newer).unwrap(), report, "unknown fields are ignored");
        let empty: Inventory = serde_json::from_str("{}").unwrap();
        assert_eq!(empty, Inventory::default(), "and every field may be missing");
    }

    #[test]
    fn golden_bytes_of_the_firmware_that_was_added() {
        let disk = Disk { name: "sda".into(), firmware: "F1".into(), ..Disk::default() };
        let nic = Nic { name: "eth0".into(), firmware: "9.20".into(), ..Nic::default() };
        let golden = concat!(
            r#"[{"name":"sda","model":"","serial":"","bytes":0,"transport":"","driver":"","pci":"","rotational":false,"#,
            r#""firmware":"F1"},{"name":"eth0","mac":"","driver":"","pci":"","firmware":"9.20","mbps":0}]"#,
        );
        assert_eq!(serde_json::to_string(&(&disk, &nic)).unwrap(), golden);
        assert_eq!(serde_json::from_str::<(Disk, Nic)>(golden).unwrap(), (disk, nic));
    }
}
