//! What hardware a machine is made of, as its agent found it: posted once after each boot, and again when it changed.
//!
//! A call of its own beside the report: it is a hundred times as long and changes a few times in a machine's life, and a
//! report that is answered every 30 s must neither carry it nor fail with it.
//!
//! Both sides ignore fields they do not know, and every field may be missing. Nothing here proves anything, and all of it
//! is as long as firmware, disks and switches like: [`Inventory::tame`] bounds it on both sides.

use crate::ids::MachineId;
use serde::{Deserialize, Serialize};

/// Where inventories are posted.
pub const INVENTORY_PATH: &str = "/agent/v1/inventory";
/// [`Inventory::version`] of what this crate writes.
pub const INVENTORY_VERSION: u32 = 1;
/// Longest [`InventoryReport`] on the wire, bytes; one that is [`Inventory::tame`] is shorter.
pub const INVENTORY_LIMIT: usize = 1280 << 10;
/// Longest text in it, bytes.
const TEXT: usize = 64;
/// Longest sentence in it, bytes.
const SENTENCE: usize = 200;
/// Most CPU sockets, memory slots, PCI devices, disks and network interfaces kept.
const CPUS: usize = 64;
const DIMMS: usize = 256;
const PCI: usize = 1024;
const DISKS: usize = 256;
const NICS: usize = 128;

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

/// Trimmed, without characters that nobody sees, and cut to so many bytes.
pub(crate) fn clean(text: &str, limit: usize) -> String {
    let mut short = String::new();
    for c in text.chars().filter(|c| !c.is_control() && !is_direction(*c)) {
        // Blanks before the first word count neither way: they are not kept.
        if short.is_empty() && c.is_whitespace() {
            continue;
        }
        if short.len() + c.len_utf8() > limit {
            break;
        }
        short.push(c);
    }
    short.truncate(short.trim_end().len());
    short
}

/// Characters that turn the direction of what follows: they make a line say something else than it does (UAX #9).
fn is_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

impl Inventory {
    /// Cuts everything to its bounds, and puts it in order, so that the same machine always gives the same bytes.
    #[must_use]
    pub fn tame(mut self) -> Self {
        let text = |t: &mut String| *t = clean(t, TEXT);
        let s = &mut self.system;
        for t in [&mut s.manufacturer, &mut s.product, &mut s.serial, &mut s.asset_tag, &mut s.chassis] {
            text(t);
        }
        text(&mut s.chassis_serial);
        let f = &mut self.firmware;
        [&mut f.vendor, &mut f.version, &mut f.date].into_iter().for_each(text);
        self.cpus.truncate(CPUS);
        self.dimms.truncate(DIMMS);
        self.pci.truncate(PCI);
        self.disks.truncate(DISKS);
        self.nics.truncate(NICS);
        self.unread.truncate(Unread::SECTIONS.len());
        for c in &mut self.cpus {
            [&mut c.socket, &mut c.model].into_iter().for_each(text);
        }
        for d in &mut self.dimms {
            let texts = [&mut d.slot, &mut d.kind, &mut d.manufacturer, &mut d.part, &mut d.serial];
            texts.into_iter().for_each(text);
        }
        for p in &mut self.pci {
            let short = |t: &mut String| *t = clean(t, 32);
            [&mut p.address, &mut p.id, &mut p.class, &mut p.driver].into_iter().for_each(short);
        }
        for d in &mut self.disks {
            let texts = [&mut d.name, &mut d.model, &mut d.serial, &mut d.transport, &mut d.driver, &mut d.pci];
            texts.into_iter().for_each(text);
            text(&mut d.firmware);
            if let Some(health) = &mut d.health {
                health.detail = clean(&health.detail, SENTENCE);
            }
        }
        for n in &mut self.nics {
            n.mac.make_ascii_lowercase();
            [&mut n.name, &mut n.mac, &mut n.driver, &mut n.pci, &mut n.firmware].into_iter().for_each(text);
            if let Some(to) = &mut n.neighbour {
                let texts = [&mut to.chassis, &mut to.port, &mut to.port_description, &mut to.system_name];
                texts.into_iter().for_each(text);
            }
        }
        let b = &mut self.bmc;
        [&mut b.address, &mut b.firmware].into_iter().for_each(text);
        b.note = clean(&b.note, SENTENCE);
        if let Some(tpm) = &mut self.tpm {
            text(&mut tpm.version);
        }
        for u in &mut self.unread {
            text(&mut u.section);
            u.reason = clean(&u.reason, SENTENCE);
        }
        self.pci.sort_by(|a, b| a.address.cmp(&b.address));
        self.disks.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
        self.nics.sort_by(|a, b| a.name.cmp(&b.name));
        self
    }

    /// The section could not be looked at.
    pub fn is_unread(&self, section: &str) -> bool {
        self.unread.iter().any(|u| u.section == section)
    }

    /// Memory of all modules, bytes; 0 where SMBIOS lists none.
    pub fn module_bytes(&self) -> u64 {
        self.dimms.iter().fold(0, |sum, d| sum.saturating_add(d.bytes))
    }
}

/// `64 GiB`, `1.5 TiB`: the largest binary unit, a decimal where it says something. For memory.
pub fn binary_size(bytes: u64) -> String {
    size(bytes, 1024, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// `960 GB`, `7.7 TB`: likewise with decimal units. For disks.
pub fn decimal_size(bytes: u64) -> String {
    size(bytes, 1000, &["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

fn size(bytes: u64, step: u64, units: &[&str]) -> String {
    let (mut unit, mut power) = (0, 1_u64);
    while unit + 1 < units.len() && bytes / power >= step {
        power *= step;
        unit += 1;
    }
    // One decimal below ten, rounded to the nearest.
    let tenths = (u128::from(bytes) * 10 + u128::from(power) / 2) / u128::from(power);
    let (whole, tenth) = (tenths / 10, tenths % 10);
    let name = units.get(unit).copied().unwrap_or_default();
    if tenth == 0 || whole >= 10 {
        let rounded = (u128::from(bytes) + u128::from(power) / 2) / u128::from(power);
        format!("{rounded} {name}")
    } else {
        format!("{whole}.{tenth} {name}")
    }
}

/// `25 Gb/s`, `100 Mb/s`, `2.5 Gb/s`.
pub fn speed(mbps: u32) -> String {
    match (mbps / 1000, mbps % 1000 / 100) {
        (0, _) => format!("{mbps} Mb/s"),
        (gbps, 0) => format!("{gbps} Gb/s"),
        (gbps, tenth) => format!("{gbps}.{tenth} Gb/s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn full() -> Inventory {
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

    #[test]
    fn sizes_and_speeds_are_read_aloud() {
        let binary = |b: u64| binary_size(b);
        assert_eq!(
            (binary(64 << 30), binary(1536 << 20), binary(0)),
            ("64 GiB".into(), "1.5 GiB".into(), "0 B".into())
        );
        assert_eq!(decimal_size(960_197_124_096), "960 GB");
        assert_eq!((decimal_size(7_681_501_126_656), decimal_size(999)), ("7.7 TB".into(), "999 B".into()));
        assert_eq!(binary(u64::MAX), "16 EiB");
        assert_eq!((speed(25_000), speed(2_500), speed(100)), ("25 Gb/s".into(), "2.5 Gb/s".into(), "100 Mb/s".into()));
    }

    #[test]
    fn the_largest_that_is_tame_fits_the_wire() {
        // Each becomes two bytes of JSON.
        let wide = "\\".repeat(1000);
        let mut big = full();
        let text = |t: &mut String| t.clone_from(&wide);
        for d in &mut big.disks {
            [&mut d.name, &mut d.model, &mut d.serial, &mut d.transport, &mut d.driver, &mut d.pci]
                .into_iter()
                .for_each(text);
            d.firmware.clone_from(&wide);
            d.health = Some(DiskHealth { passed: true, detail: wide.clone() });
        }
        big.disks = vec![big.disks[0].clone(); 2000];
        for n in &mut big.nics {
            [&mut n.name, &mut n.mac, &mut n.driver, &mut n.pci, &mut n.firmware].into_iter().for_each(text);
            let to = n.neighbour.as_mut().unwrap();
            [&mut to.chassis, &mut to.port, &mut to.port_description, &mut to.system_name].into_iter().for_each(text);
        }
        big.nics = vec![big.nics[0].clone(); 2000];
        let d = &mut big.dimms[0];
        [&mut d.slot, &mut d.kind, &mut d.manufacturer, &mut d.part, &mut d.serial].into_iter().for_each(text);
        big.dimms = vec![big.dimms[0].clone(); 2000];
        let p = &mut big.pci[0];
        [&mut p.address, &mut p.id, &mut p.class, &mut p.driver].into_iter().for_each(text);
        big.pci = vec![big.pci[0].clone(); 2000];
        let c = &mut big.cpus[0];
        [&mut c.socket, &mut c.model].into_iter().for_each(text);
        big.cpus = vec![big.cpus[0].clone(); 2000];
        let length = serde_json::to_vec(&big.tame()).unwrap().len();
        assert!((INVENTORY_LIMIT / 2..INVENTORY_LIMIT).contains(&length), "{length}");
    }

    proptest! {
        #[test]
        fn tame_is_final(text in "\\PC{0,300}", control in "[\\x00-\\x1f\u{202e}a]{0,20}") {
            let mut any = full();
            any.system.product = format!("{control}{text}{control}");
            any.disks[0].health = Some(DiskHealth { passed: false, detail: format!("{text}{control}") });
            let once = any.tame();
            prop_assert!(once.system.product.len() <= TEXT);
            prop_assert!(!once.system.product.chars().any(|c| c.is_control() || is_direction(c)));
            prop_assert_eq!(once.clone().tame(), once);
        }
    }
}
