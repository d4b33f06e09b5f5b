//! Which disks this machine has: sysfs (Linux Documentation/ABI/stable/sysfs-block).

use kiln_protocol::{WipeOutcome, WipedDisk};
use std::path::{Path, PathBuf};

/// A whole disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// `nvme0n1`, `sda`, `vda`.
    pub name: String,
    pub model: String,
    pub serial: String,
    pub bytes: u64,
    pub removable: bool,
}

/// All that are devices: not loops, memory, or what is put together of others. Optical drives are none.
pub fn all() -> Vec<Disk> {
    under(Path::new("/sys/block"))
}

fn under(folder: &Path) -> Vec<Disk> {
    let mut disks: Vec<Disk> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| read(&entry.path(), entry.file_name().to_str()?))
        .collect();
    disks.sort_by(|a, b| a.name.cmp(&b.name));
    disks
}

fn read(path: &Path, name: &str) -> Option<Disk> {
    let word = |file: &str| {
        let bytes = std::fs::read(path.join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        text.trim().chars().filter(|c| !c.is_control()).take(128).collect::<String>()
    };
    // NVMe multipath shows each path besides the disk itself.
    if !path.join("device").exists() || word("hidden") == "1" || name.starts_with("sr") {
        return None;
    }
    let bytes = word("size").parse::<u64>().ok()?.checked_mul(512).filter(|bytes| *bytes > 0)?;
    // SCSI and ATA: page 80h of the vital product data, four bytes of header before the number (SPC-4 §7.8.15).
    let page = std::fs::read(path.join("device/vpd_pg80")).unwrap_or_default();
    let page = page.get(4..).map(|number| String::from_utf8_lossy(number).trim_matches(['\0', ' ']).to_owned());
    let known = [word("serial"), word("device/serial"), page.unwrap_or_default()];
    let serial = known.into_iter().find(|serial| !serial.is_empty()).unwrap_or_default();
    let serial = serial.chars().filter(|c| !c.is_control()).take(128).collect();
    Some(Disk {
        name: name.to_owned(),
        model: word("device/model"),
        serial,
        bytes,
        removable: word("removable") == "1",
    })
}

impl Disk {
    /// Its device node.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    pub fn is_nvme(&self) -> bool {
        self.name.starts_with("nvme")
    }

    /// What shares one NVMe controller shares this; any other disk has its own.
    pub fn controller(&self) -> String {
        let name_space = self.is_nvme().then(|| self.name.rfind('n')).flatten().filter(|at| *at > 0);
        self.name[..name_space.unwrap_or(self.name.len())].to_owned()
    }

    /// Why an order with these serial numbers is not for this disk, if it is not.
    pub fn reason_to_skip(&self, serials: &[String]) -> Option<String> {
        if serials.contains(&self.serial) {
            return None;
        }
        let boot_area = self.name.starts_with("mmcblk") && self.name.contains("boot");
        match (serials.is_empty(), self.removable, boot_area) {
            (false, ..) => Some("the order does not name it".into()),
            (true, true, _) => Some("removable: only an order that names its serial number is for it".into()),
            (true, false, true) => Some("a boot area of an eMMC, which firmware may need".into()),
            (true, false, false) => None,
        }
    }

    /// A line of the receipt.
    pub fn became(&self, methods: Vec<String>, outcome: WipeOutcome, detail: String) -> WipedDisk {
        let Self { name, model, serial, bytes, .. } = self.clone();
        WipedDisk { name, model, serial, bytes, methods, outcome, detail }
    }

    /// The line of a disk that was ordered and is not there.
    pub fn missing(serial: &str) -> WipedDisk {
        WipedDisk {
            name: "-".into(),
            model: String::new(),
            serial: serial.to_owned(),
            bytes: 0,
            methods: Vec::new(),
            outcome: WipeOutcome::Failed,
            detail: "this machine has no disk with this serial number, or no driver for it".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `/sys/block` with these files.
    fn sys(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (file, content) in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        dir
    }

    #[test]
    fn disks_are_found_with_their_serial_numbers() {
        let dir = sys(&[
            ("vda/size", b"2048\n"),
            ("vda/serial", b"VIRT1"),
            ("vda/device/vendor", b"0x1af4\n"),
            ("nvme0n1/size", b"4096\n"),
            ("nvme0n1/device/serial", b"NVME1   \n"),
            ("nvme0n1/device/model", b"QEMU NVMe Ctrl   \n"),
            ("nvme0c0n1/size", b"4096\n"),
            ("nvme0c0n1/hidden", b"1\n"),
            ("nvme0c0n1/device/serial", b"NVME1\n"),
            ("sda/size", b"8\n"),
            ("sda/removable", b"1\n"),
            ("sda/device/vpd_pg80", b"\0\x80\0\x08  ATA77\0"),
            ("sr0/size", b"8\n"),
            ("sr0/device/model", b"DVD\n"),
            ("loop0/size", b"8\n"),
            ("sdb/size", b"0\n"),
            ("sdb/device/model", b"card reader\n"),
        ]);
        let disks = under(dir.path());
        let seen: Vec<_> = disks.iter().map(|d| (d.name.as_str(), d.serial.as_str(), d.bytes, d.removable)).collect();
        assert_eq!(
            seen,
            [("nvme0n1", "NVME1", 2 << 20, false), ("sda", "ATA77", 4096, true), ("vda", "VIRT1", 1 << 20, false)]
        );
        assert_eq!(disks[0].model, "QEMU NVMe Ctrl");
        assert_eq!((disks[0].controller(), disks[2].controller()), ("nvme0".into(), "vda".into()));
    }

    #[test]
    fn an_order_is_for_what_it_names_and_for_nothing_removable_else() {
        let disk = |name: &str, serial: &str, removable| Disk {
            name: name.into(),
            model: String::new(),
            serial: serial.into(),
            bytes: 1,
            removable,
        };
        let named = ["S1".to_owned()];
        assert_eq!(disk("sda", "S2", false).reason_to_skip(&[]), None);
        assert_eq!(disk("sda", "", false).reason_to_skip(&[]), None);
        assert!(disk("sda", "S1", true).reason_to_skip(&[]).unwrap().contains("removable"));
        assert_eq!(disk("sda", "S1", true).reason_to_skip(&named), None);
        assert!(disk("sda", "S2", false).reason_to_skip(&named).is_some());
        assert!(disk("mmcblk0boot0", "S2", false).reason_to_skip(&[]).unwrap().contains("boot area"));
    }
}
