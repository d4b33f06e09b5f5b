//! Machines made of directories, as sysfs shows real ones; and whatever machine the tests run on.

use super::*;
use std::os::unix::fs::symlink;

/// A sysfs to build up.
struct Tree(Root, #[allow(dead_code)] tempfile::TempDir); // the folder goes with it

impl Tree {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let card_firmware = |name: &str| if name == "eth0" { "9.20 0x8000d8c5".to_owned() } else { String::new() };
        let root = Root { sys: dir.path().join("sys"), dev: dir.path().join("dev"), card_firmware };
        std::fs::create_dir_all(&root.sys).unwrap();
        std::fs::create_dir_all(&root.dev).unwrap();
        Self(root, dir)
    }

    fn file(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.0.sys.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// A link, absolute: only its end and where it leads count.
    fn link(&self, path: &str, to: &str) {
        let path = self.0.sys.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::create_dir_all(self.0.sys.join(to)).unwrap();
        symlink(self.0.sys.join(to), path).unwrap();
    }

    /// A PCI device with its driver; its path.
    fn pci(&self, address: &str, id: (&str, &str), class: &str, driver: &str) -> String {
        let path = format!("devices/pci0000:00/{address}");
        self.file(&format!("{path}/vendor"), format!("0x{}\n", id.0));
        self.file(&format!("{path}/device"), format!("0x{}\n", id.1));
        self.file(&format!("{path}/class"), format!("0x{class}\n"));
        self.link(&format!("{path}/subsystem"), "bus/pci");
        if !driver.is_empty() {
            self.link(&format!("{path}/driver"), &format!("bus/pci/drivers/{driver}"));
        }
        self.link(&format!("bus/pci/devices/{address}"), &path);
        path
    }

    /// A disk under its device.
    fn disk(&self, name: &str, device: &str, sectors: u64, rotational: bool) {
        let block = format!("{device}/block/{name}");
        self.file(&format!("{block}/size"), format!("{sectors}\n"));
        self.file(&format!("{block}/removable"), "0\n");
        self.file(&format!("{block}/queue/rotational"), if rotational { "1\n" } else { "0\n" });
        self.link(&format!("{block}/device"), device);
        self.link(&format!("class/block/{name}"), &block);
        std::fs::write(self.0.dev.join(name), "no disk").unwrap();
    }

    fn scsi(&self, device: &str, vendor: &str, model: &str, serial: &str) {
        self.file(&format!("{device}/vendor"), format!("{vendor:8}\n"));
        self.file(&format!("{device}/model"), format!("{model:16}\n"));
        self.file(&format!("{device}/type"), "0\n");
        self.link(&format!("{device}/driver"), "bus/scsi/drivers/sd");
        if !serial.is_empty() {
            self.file(
                &format!("{device}/vpd_pg80"),
                [&[0, 0x80, 0, 20][..], format!("  {serial}").as_bytes()].concat(),
            );
        }
    }

    fn take(&self) -> Inventory {
        take(&self.0, &Neighbours::default())
    }
}

fn server() -> Tree {
    let tree = Tree::new();
    let dmi = include_bytes!("../../protocol/tests/data/qemu-q35.dmi");
    tree.file("firmware/dmi/tables/DMI", dmi);
    let nvme = tree.pci("0000:00:04.0", ("1b36", "0010"), "010802", "nvme");
    tree.file(&format!("{nvme}/nvme/nvme0/model"), "SAMSUNG MZQL2960HCJR-00A07              \n");
    tree.file(&format!("{nvme}/nvme/nvme0/serial"), "S64FNE0R5     \n");
    tree.file(&format!("{nvme}/nvme/nvme0/firmware_rev"), "GDC5602Q\n");
    tree.disk("nvme0n1", &format!("{nvme}/nvme/nvme0"), 1_875_385_008, false);
    let ahci = tree.pci("0000:00:1f.2", ("8086", "2922"), "010601", "ahci");
    let sata = format!("{ahci}/ata1/host0/target0:0:0/0:0:0:0");
    tree.scsi(&sata, "ATA", "ST8000NM000A", "ZRT0001");
    tree.disk("sda", &sata, 15_628_053_168, true);
    tree.file(&format!("{sata}/block/sda/sda1/partition"), "1\n");
    tree.link("class/block/sda1", &format!("{sata}/block/sda/sda1"));
    let disc = format!("{ahci}/ata2/host1/target1:0:0/1:0:0:0");
    tree.scsi(&disc, "QEMU", "DVD-ROM", "");
    tree.file(&format!("{disc}/type"), "5\n");
    tree.disk("sr0", &disc, 100, false);
    let sas = tree.pci("0000:00:05.0", ("1000", "00af"), "010700", "mpt3sas");
    let sas = format!("{sas}/host2/port-2:0/end_device-2:0/target2:0:0/2:0:0:0");
    tree.scsi(&sas, "SEAGATE", "ST1200MM0099", "WFK1");
    tree.file(&format!("{sas}/rev"), "ST31\n");
    tree.disk("sdb", &sas, 2_344_225_968, true);
    let usb = tree.pci("0000:00:06.0", ("1b36", "000d"), "0c0330", "xhci_hcd");
    tree.file(&format!("{usb}/usb1/1-1/idVendor"), "0781\n");
    tree.file(&format!("{usb}/usb1/1-1/serial"), "4C530001\n");
    tree.link(&format!("{usb}/usb1/1-1/1-1:1.0/driver"), "bus/usb/drivers/usb-storage");
    let stick = format!("{usb}/usb1/1-1/1-1:1.0/host3/target3:0:0/3:0:0:0");
    tree.scsi(&stick, "SanDisk", "Ultra", "");
    tree.disk("sdc", &stick, 60_062_500, false);
    let virtio = tree.pci("0000:00:07.0", ("1af4", "1001"), "010000", "virtio-pci");
    let blk = format!("{virtio}/virtio1");
    tree.link(&format!("{blk}/driver"), "bus/virtio/drivers/virtio_blk");
    tree.file(&format!("{blk}/vendor"), "0x1af4\n");
    tree.disk("vda", &blk, 8_388_608, true);
    tree.file(&format!("{blk}/block/vda/serial"), "rack-1-disk0");
    tree.file("devices/virtual/block/loop0/size", "8\n");
    tree.link("class/block/loop0", "devices/virtual/block/loop0");
    let card = tree.pci("0000:00:08.0", ("8086", "1572"), "020000", "i40e");
    for (name, mac) in [("eth0", "0C:C4:7A:00:00:01"), ("eth1", "0c:c4:7a:ff:ff:ff")] {
        tree.file(&format!("{card}/net/{name}/address"), format!("{mac}\n"));
        tree.link(&format!("{card}/net/{name}/device"), &card);
        tree.link(&format!("class/net/{name}"), &format!("{card}/net/{name}"));
    }
    tree.file(&format!("{card}/net/eth0/carrier"), "1\n");
    tree.file(&format!("{card}/net/eth0/speed"), "25000\n");
    tree.file(&format!("{card}/net/eth1/bonding_slave/perm_hwaddr"), "0c:c4:7a:00:00:02\n");
    tree.file("class/net/lo/address", "00:00:00:00:00:00\n");
    let function = tree.pci("0000:00:09.1", ("8086", "154c"), "020000", "iavf");
    tree.link(&format!("{function}/physfn"), &card);
    tree.file(&format!("{function}/net/eth2/address"), "02:00:00:00:00:01\n");
    tree.link(&format!("{function}/net/eth2/device"), &function);
    tree.link("class/net/eth2", &format!("{function}/net/eth2"));
    tree.pci("0000:00:1f.4", ("8086", "a323"), "0c0500", "");
    tree.file("class/tpm/tpm0/tpm_version_major", "2\n");
    tree.file("bus/platform/devices/ipmi_bmc.0/firmware_revision", "1.74\n");
    tree
}

#[test]
fn a_server_is_found_with_all_its_parts() {
    let found = server().take();
    assert!(found.unread.is_empty(), "{:?}", found.unread);
    assert_eq!((found.cpus.len(), found.module_bytes()), (2, 20 << 30), "{found:#?}");
    let disks: Vec<_> = found
        .disks
        .iter()
        .map(|d| [&d.name, &d.transport, &d.driver, &d.pci, &d.model, &d.serial].map(String::as_str))
        .collect();
    let expected = [
        ["sda", "sata", "ahci", "0000:00:1f.2", "ST8000NM000A", "ZRT0001"],
        ["sdb", "sas", "mpt3sas", "0000:00:05.0", "SEAGATE ST1200MM0099", "WFK1"],
        ["sdc", "usb", "usb-storage", "0000:00:06.0", "SanDisk Ultra", "4C530001"],
        ["vda", "virtio", "virtio_blk", "0000:00:07.0", "", "rack-1-disk0"],
        ["nvme0n1", "nvme", "nvme", "0000:00:04.0", "SAMSUNG MZQL2960HCJR-00A07", "S64FNE0R5"],
    ];
    assert_eq!(disks, expected);
    let firmware: Vec<&str> = found.disks.iter().map(|d| d.firmware.as_str()).collect();
    assert_eq!(firmware, ["", "ST31", "", "", "GDC5602Q"]);
    let firmware: Vec<&str> = found.nics.iter().map(|n| n.firmware.as_str()).collect();
    assert_eq!(firmware, ["9.20 0x8000d8c5", ""]);
    assert_eq!((found.disks[0].bytes, found.disks[0].rotational), (8_001_563_222_016, true));
    assert!(found.disks.iter().all(|d| d.health.is_none()), "a file answers no disk's command");
    let nics: Vec<_> = found.nics.iter().map(|n| (&*n.name, &*n.mac, &*n.driver, n.carrier, n.mbps)).collect();
    assert_eq!(
        nics,
        [("eth0", "0c:c4:7a:00:00:01", "i40e", Some(true), 25_000), ("eth1", "0c:c4:7a:00:00:02", "i40e", None, 0)]
    );
    let bridge = found.pci.iter().find(|p| p.address == "0000:00:1f.4").unwrap();
    assert_eq!((&*bridge.id, &*bridge.class, &*bridge.driver), ("8086:a323", "0c0500", ""));
    assert_eq!(found.pci.len(), 7, "without the virtual function");
    assert_eq!(found.tpm.unwrap().version, "2.0");
    assert!(found.bmc.present && found.bmc.firmware == "1.74" && found.bmc.address.is_empty());
    assert!(found.bmc.note.contains("no address: /dev/ipmi0: No such file"), "{:?}", found.bmc);
}

#[test]
fn a_disk_with_several_paths_names_the_controller_of_one() {
    let tree = Tree::new();
    let nvme = tree.pci("0000:41:00.0", ("144d", "a824"), "010802", "nvme");
    let subsystem = "devices/virtual/nvme-subsystem/nvme-subsys0";
    tree.file(&format!("{subsystem}/model"), "PM1733\n");
    tree.file(&format!("{subsystem}/serial"), "S1\n");
    tree.link(&format!("{nvme}/nvme/nvme0/device"), &nvme);
    tree.link(&format!("{subsystem}/nvme0"), &format!("{nvme}/nvme/nvme0"));
    tree.disk("nvme0n1", subsystem, 16, false);
    tree.disk("nvme0c0n1", &format!("{nvme}/nvme/nvme0"), 16, false);
    tree.file(&format!("{nvme}/nvme/nvme0/block/nvme0c0n1/hidden"), "1\n");
    let found = tree.take().disks;
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((&*found[0].pci, &*found[0].driver, &*found[0].serial), ("0000:41:00.0", "nvme", "S1"));
}

#[test]
fn what_cannot_be_read_is_named_and_says_nothing() {
    let found = Tree::new().take();
    let sections: Vec<&str> = found.unread.iter().map(|u| u.section.as_str()).collect();
    assert_eq!(sections, Unread::SECTIONS);
    assert!(found.unread[1].reason.contains("bus/pci/devices: No such file"), "{:?}", found.unread);
    assert_eq!((found.tpm, found.bmc.present), (None, false));
}

#[test]
fn this_very_machine_is_read_as_other_programs_read_it() {
    let found = take(&Root::of_this_machine(), &Neighbours::default());
    assert_eq!(found.clone().tame(), found, "bounded and in order");
    let lines = |program: &str, arguments: &[&str]| {
        let out = std::process::Command::new(program).args(arguments).output().ok().filter(|o| o.status.success())?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        Some(text.lines().map(str::to_owned).collect::<Vec<_>>())
    };
    if found.is_unread("disks") {
        eprintln!("skipped: {:?}", found.unread);
    } else if let Some(disks) = lines("lsblk", &["-d", "-b", "-n", "-o", "TYPE,NAME,SIZE", "-e", "1,7,11,252,253,254"])
    {
        for line in disks {
            let cells: Vec<&str> = line.split_whitespace().collect();
            if let ["disk", name, size] = cells[..]
                && Path::new("/sys/class/block").join(name).join("device").exists()
            {
                let disk = found.disks.iter().find(|d| d.name == name);
                assert_eq!(disk.map(|d| d.bytes.to_string()).as_deref(), Some(size), "{name}: {:?}", found.disks);
            }
        }
    }
    let macs: Vec<String> = found.nics.iter().map(|n| n.mac.clone()).collect();
    for mac in facts::mac_addresses() {
        assert!(macs.contains(&mac), "{mac} is not in {macs:?}");
    }
}
