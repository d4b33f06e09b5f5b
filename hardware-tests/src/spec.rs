//! What a machine of the rack is: its firmware, cards, disks, and what watches over it.

use crate::bmc::Bmc;
use crate::machine::QEMU;
use crate::variables::NetworkBoot;
use std::path::PathBuf;

/// The machine's firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// OVMF. Its own PXE or HTTP Boot runs: the card's option ROM is left out.
    Uefi(NetworkBoot),
    /// SeaBIOS with the card's iPXE option ROM.
    Bios,
}

/// What a machine is.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// Its name, also in the boot server's list.
    pub name: String,
    /// From 1: gives UUID, MAC address and tap.
    pub number: u8,
    /// Its firmware.
    pub firmware: Firmware,
    /// Its memory.
    pub memory_mib: u32,
    /// QEMU's names of its network cards. It boots from the first; all are on the bridge.
    pub cards: Vec<&'static str>,
    /// Under UEFI its further cards have their option ROMs. The first never has: the firmware's own network boot is to run.
    pub roms: bool,
    /// Its disks, empty when it is installed; they keep what is written over power cuts.
    pub disks: Vec<Disk>,
    /// A variable store with Secure Boot keys in it; none: firmware that checks nothing.
    pub keys: Option<PathBuf>,
    /// Its cables end at a [`trunk`](crate::trunk), not on the bridge.
    pub trunk: bool,
    /// It has a VGA card, of whose picture copies can be made.
    pub screen: bool,
    /// What its clock says when it is switched on, as `1970-01-01`; none: the time.
    pub clock: Option<&'static str>,
    /// It has a TPM 2.0.
    pub tpm: bool,
    /// Its management controller.
    pub bmc: Option<Bmc>,
    /// The QEMU that runs it.
    pub qemu: PathBuf,
    /// Strings for SMBIOS type 11, which systemd's stub takes settings from.
    pub smbios: Vec<String>,
    /// What restarts it when it hangs.
    pub watchdog: HardwareWatchdog,
}

/// A machine's watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HardwareWatchdog {
    /// A PCI card of Intel's 6300ESB.
    I6300esb,
    /// The chipset's own, which the kernel reaches over the LPC bridge.
    Itco,
}

/// How a disk of [`DISK_BYTES`] is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// virtio-blk.
    VirtioBlk,
    /// virtio-blk at a PCIe port of its own, out of which it can be pulled.
    VirtioBlkAtPort,
    /// virtio-scsi.
    VirtioScsi,
    /// NVMe.
    Nvme,
    /// NVMe with sectors of 4096 bytes.
    Nvme4k,
    /// The chipset's AHCI.
    Ahci,
    /// LSI MegaRAID SAS.
    Megasas,
    /// USB mass storage at an xHCI port.
    Usb,
}

/// Size of a disk; its file holds only what was written.
pub const DISK_BYTES: u64 = 4 << 30;

impl MachineSpec {
    /// Machine `rack-NUMBER` with 2 GiB.
    pub fn new(number: u8, firmware: Firmware) -> Self {
        Self {
            name: format!("rack-{number}"),
            number,
            firmware,
            memory_mib: 2048,
            cards: vec!["virtio-net-pci"],
            roms: false,
            disks: Vec::new(),
            keys: None,
            trunk: false,
            screen: false,
            clock: None,
            tpm: false,
            bmc: None,
            qemu: QEMU.into(),
            smbios: Vec::new(),
            watchdog: HardwareWatchdog::I6300esb,
        }
    }

    /// SMBIOS UUID.
    pub fn uuid(&self) -> String {
        format!("6b696c6e-0000-4000-8000-0000000000{:02x}", self.number)
    }

    /// MAC address of the card it boots from.
    pub fn mac(&self) -> [u8; 6] {
        self.mac_of(0)
    }

    /// MAC address of a card.
    pub fn mac_of(&self, card: u8) -> [u8; 6] {
        [0x52, 0x54, 0x00, 0x4b, 0x49 + card, self.number]
    }

    /// MAC address as text.
    pub fn mac_text(&self) -> String {
        text(self.mac())
    }

    /// What its firmware is called in tables.
    pub fn firmware_text(&self) -> &'static str {
        match self.firmware {
            Firmware::Uefi(NetworkBoot::Pxe) => "UEFI PXE",
            Firmware::Uefi(NetworkBoot::Http) => "UEFI HTTP",
            Firmware::Bios => "BIOS PXE",
        }
    }

    pub(crate) fn tap(&self) -> String {
        self.tap_of(0)
    }

    pub(crate) fn tap_of(&self, card: u8) -> String {
        if card == 0 { format!("tap{}", self.number) } else { format!("tap{}-{card}", self.number) }
    }

    pub(crate) fn numbered_cards(&self) -> impl Iterator<Item = (u8, &'static str)> {
        (0..).zip(self.cards.iter().copied())
    }
}

/// `52:54:00:4b:49:01`
pub fn text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

impl Disk {
    /// QEMU's controller, if it needs one of its own, and the disk at it.
    pub(crate) fn devices(self, number: usize) -> (Option<String>, String) {
        let at = |controller: &str, disk: &str| {
            (Some(format!("{controller},id=controller{number}")), format!("{disk},bus=controller{number}.0"))
        };
        match self {
            Self::VirtioBlk => (None, "virtio-blk-pci".into()),
            // The machine's own slots take and give no card while it runs.
            Self::VirtioBlkAtPort => (
                Some(format!("pcie-root-port,id=port{number},chassis={}", number + 1)),
                format!("virtio-blk-pci,id=card{number},bus=port{number}"),
            ),
            Self::VirtioScsi => at("virtio-scsi-pci", "scsi-hd"),
            Self::Nvme => (None, "nvme".into()),
            Self::Nvme4k => (None, "nvme,logical_block_size=4096,physical_block_size=4096".into()),
            Self::Ahci => (None, format!("ide-hd,bus=ide.{number}")),
            Self::Megasas => at("megasas", "scsi-hd"),
            Self::Usb => at("qemu-xhci", "usb-storage"),
        }
    }
}
