//! Other hardware than virtio: what the agent finds by modalias with the generic kernel (image `servers`).

use kiln_lab::api::{self, MachineView};
use kiln_lab::bmc::{self, Bmc};
use kiln_lab::machine::{DISK_BYTES, Disk, Firmware, HardwareWatchdog, MachineSpec, text};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{command, console::Mark, newer_qemu, site, testing};
use kiln_protocol::{Inventory, Stage};
use std::net::Ipv4Addr;

const NAME: &str = "rack-1";
/// Of every machine of the rack.
const MEMORY: u64 = 2 << 30;
/// Of the management controller. It is in no network of the rack: who names it has asked the controller.
const BMC: Ipv4Addr = Ipv4Addr::new(10, 88, 9, 21);

/// Every kind of disk, and what the inventory calls its driver, how it is attached, and a part of its model.
const DISKS: [(Disk, &str, &str, &str); 6] = [
    (Disk::VirtioBlk, "virtio_blk", "virtio", ""),
    (Disk::VirtioScsi, "virtio_scsi", "virtio", "QEMU HARDDISK"),
    (Disk::Nvme, "nvme", "nvme", "QEMU NVMe"),
    (Disk::Ahci, "ahci", "sata", "QEMU HARDDISK"),
    (Disk::Megasas, "megaraid_sas", "scsi", "QEMU HARDDISK"),
    (Disk::Usb, "usb-storage", "usb", "QEMU HARDDISK"),
];
/// QEMU's cards and the kernel's drivers of them.
const CARDS: [(&str, &str); 7] = [
    ("virtio-net-pci", "virtio_net"),
    ("e1000", "e1000"),
    ("e1000e", "e1000e"),
    ("igb", "igb"),
    ("rtl8139", "8139cp"),
    ("vmxnet3", "vmxnet3"),
    // Of the first generation that takes firmware when it is brought up.
    ("i82559c", "e100"),
];

/// Whether the agent says that a card has this address. An IPv6 one may stand beside it, or come later.
fn has(said: &str, address: &str) -> bool {
    ["]", ", "].iter().any(|next| said.contains(&format!(" has [{address}{next}")))
}

fn start(paths: &kiln_lab::paths::Paths, name: &str, spec: MachineSpec) -> Rack {
    let mut options = RackOptions::scenario(paths, name, spec);
    options.image = site::SERVERS.to_owned();
    let rack = Rack::start(paths, &options).unwrap();
    rack.kiln(&["release", "publish", "servers/1"]).unwrap();
    rack
}

/// What the server shows of what the machine is made of, as soon as it knows.
fn inventory(rack: &mut Rack) -> Inventory {
    let (socket, path) = (rack.site.join("state/kiln.sock"), format!("/api/v1/machines/{NAME}/inventory"));
    rack.wait(NAME, "its inventory", |_| api::get(&socket, &path).is_ok()).unwrap();
    serde_json::from_value(api::get(&socket, &path).unwrap()["inventory"].take()).unwrap()
}

/// A BIOS machine boots through each card's own ROM, and the agent finds the card's driver. Not vmxnet3: undionly.kpxe
/// receives nothing through its ROM; the card itself is in the device matrix below.
fn boots_by(card: &'static str, test: &str, paths: &kiln_lab::paths::Paths) {
    let mut spec = MachineSpec::new(1, Firmware::Bios);
    spec.cards = vec![card];
    let mut rack = start(paths, test, spec);
    rack.machine(NAME).power_on().unwrap();
    rack.wait_healthy(NAME, 1).unwrap();
}

macro_rules! cards {
    ($($test:ident $card:literal)*) => {$(
        #[test]
        #[ignore = "slow: one boot for one network card; make test-slow"]
        fn $test() {
            testing::rack(|paths| boots_by($card, concat!("card-", $card), paths));
        }
    )*};
}

cards! {
    boots_by_e1000 "e1000"
    boots_by_e1000e "e1000e"
    boots_by_rtl8139 "rtl8139"
}

/// One machine with every card and every kind of disk: all have drivers and are in the inventory that the server shows, as are its
/// processor, memory, firmware and PCI devices, and the address is that of the card the firmware booted from, though the others could have one too.
/// Its management controller is OpenIPMI's, which alone knows its own address.
#[test]
#[ignore = "slow: the device matrix; make test-slow"]
fn every_card_and_disk_is_found_and_the_one_that_booted_is_used() {
    testing::rack(|paths| {
        let mut spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        // Debian 12's QEMU has no igb.
        spec.qemu = newer_qemu::with(paths, "igb").expect("`kiln-lab prepare --image servers` unpacks one");
        spec.cards.extend(CARDS.iter().skip(1).map(|(card, _)| *card));
        spec.disks = DISKS.map(|(disk, ..)| disk).to_vec();
        (spec.tpm, spec.bmc) = (true, Some(Bmc::At(BMC)));
        let cards = spec.cards.clone();
        let macs: Vec<String> = (0..).zip(&cards).map(|(n, _)| text(spec.mac_of(n))).collect();
        let mut rack = start(paths, "devices", spec);
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert_eq!(view.macs, macs, "every card has a driver");
        // All of them ask at once; the firmware asked for the first one's address, too.
        let site_dhcp = std::fs::read_to_string(paths.consoles.join("devices/site-dhcp.log")).unwrap();
        let given = site_dhcp.lines().find(|l| l.contains("DHCPACK") && l.contains(&macs[0])).unwrap();
        let address = given.split(' ').find(|word| word.parse::<Ipv4Addr>().is_ok()).unwrap();
        let said = rack.machine(NAME).console().unwrap().since(Mark::default());
        assert!(has(&said, address), "{given}");
        assert!(!said.contains("kiln-agent: driver "), "a driver did not load");
        assert!(!said.contains("d101m_ucode.bin"), "a card's firmware did not load");

        let found = inventory(&mut rack);
        let said = rack.kiln(&["machine", "inventory", NAME]).unwrap();
        assert_eq!(found.disks.len(), DISKS.len(), "{said}");
        for (number, (_, driver, transport, model)) in (0..).zip(DISKS) {
            let serial = format!("{NAME}-disk{number}");
            let disk =
                found.disks.iter().find(|disk| disk.serial == serial).unwrap_or_else(|| panic!("{serial}: {said}"));
            assert_eq!((&*disk.driver, &*disk.transport, disk.bytes), (driver, transport, DISK_BYTES), "{disk:?}");
            assert!(disk.model.contains(model), "{disk:?}");
            let line = said.lines().find(|line| line.contains(&serial)).unwrap();
            assert!(line.contains(&format!("driver {driver}")), "{line}");
        }
        for (card, mac) in cards.iter().zip(&macs) {
            let nic = found.nics.iter().find(|nic| nic.mac == *mac).unwrap_or_else(|| panic!("{card} {mac}: {said}"));
            let driver = CARDS.iter().find(|(known, _)| known == card).unwrap().1;
            assert_eq!(nic.driver, driver, "{nic:?}");
            // Its driver reads it from the card's memory for settings, which this one has.
            assert!(driver != "e1000e" || !nic.firmware.is_empty(), "{nic:?}");
        }
        assert!(found.cpus.iter().any(|cpu| cpu.cores > 0), "{:?}", found.cpus);
        assert_eq!(found.dimms.iter().map(|dimm| dimm.bytes).sum::<u64>(), MEMORY, "{:?}", found.dimms);
        assert_eq!(found.system.product, "Virtual rack machine", "{:?}", found.system);
        assert!(!found.firmware.vendor.is_empty() && !found.firmware.version.is_empty(), "{:?}", found.firmware);
        let has = |driver: &str| found.pci.iter().any(|device| device.driver == driver && !device.address.is_empty());
        assert!(has("nvme") && has("igb") && has("ahci"), "{:?}", found.pci);
        for healthy in ["nvme", "ahci"] {
            let disk = found.disks.iter().find(|disk| disk.driver == healthy).unwrap();
            assert!(disk.health.as_ref().is_some_and(|health| health.passed), "{disk:?}");
            assert!(!disk.firmware.is_empty(), "{disk:?}");
        }
        assert_eq!(found.tpm.as_ref().map(|tpm| &*tpm.version), Some("2.0"), "{said}");
        let expected = (true, BMC.to_string(), "IPMI, LAN channel 1", bmc::FIRMWARE);
        let bmc = &found.bmc;
        assert_eq!((bmc.present, bmc.address.clone(), &*bmc.note, &*bmc.firmware), expected, "{bmc:?}");
        assert!(said.contains(&format!("{BMC}, firmware {}", bmc::FIRMWARE)), "{said}");
        println!("{said}");
    });
}

/// The card that the firmware booted from has lost its link by the time the agent asks: one of the others that has a link carries the
/// machine, root and all. Each by a driver that no firmware here boots with. Its management controller has no network: that it was
/// asked for its address is to be seen by its answer.
#[test]
#[ignore = "slow: two boots; make test-slow"]
fn a_card_that_has_a_link_carries_the_machine_where_the_one_that_booted_has_none() {
    testing::rack(|paths| {
        let mut spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        spec.qemu = newer_qemu::with(paths, "igb").expect("`kiln-lab prepare --image servers` unpacks one");
        spec.cards = vec!["virtio-net-pci", "igb", "vmxnet3"];
        spec.bmc = Some(Bmc::WithoutNetwork);
        let macs = [1, 2].map(|card| text(spec.mac_of(card)));
        let mut rack = start(paths, "cards", spec);
        let mut before = None;
        for (card, without, mac) in [(1, 2, &macs[0]), (2, 1, &macs[1])] {
            rack.machine(NAME).power_on().unwrap();
            rack.machine(NAME).set_cable(without, false).unwrap();
            let console = rack.machine(NAME).console().unwrap().clone();
            // By the first card everything came so far; none has a driver yet.
            console.wait_for("image servers release 1", Mark::default(), IDLE).unwrap();
            rack.machine(NAME).set_cable(0, false).unwrap();
            let id = |v: &MachineView| v.boot().map(|boot| boot.boot_id.clone());
            let view = rack.wait(NAME, "healthy", |v| id(v) != before && v.is_healthy_on(1)).unwrap();
            before = id(&view);
            let dhcp = std::fs::read_to_string(paths.consoles.join("cards/site-dhcp.log")).unwrap();
            let given = dhcp.lines().rfind(|line| line.contains("DHCPACK") && line.contains(mac.as_str()));
            let given = given.unwrap_or_else(|| panic!("card {card} has no lease: {dhcp}"));
            let address = given.split(' ').find(|word| word.parse::<Ipv4Addr>().is_ok()).unwrap();
            let said = console.since(Mark::default());
            assert!(has(&said, address), "card {card}: {given}: {said}");
        }
        let bmc = inventory(&mut rack).bmc;
        assert!(bmc.present && bmc.note.contains("no address: it has no LAN channel"), "{bmc:?}");
        let said = rack.kiln(&["machine", "inventory", NAME]).unwrap();
        assert!(said.contains("no address: it has no LAN channel"), "{said}");
    });
}

/// The kernel of release 3 (recipe `hangs`) never comes to its init, and says nothing more. It was started by kexec: no firmware and no
/// boot loader is there to notice. The watchdog that the release before armed, before it loaded any other driver, restarts the machine, the boot
/// server takes that for what it is, and the machine comes back on the release that ran before.
fn a_hang_is_ended(paths: &kiln_lab::paths::Paths, test: &str, image: &str, watchdog: HardwareWatchdog) {
    let spec = MachineSpec { watchdog, ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) };
    let mut options = RackOptions::scenario(paths, test, spec);
    image.clone_into(&mut options.image);
    options.config = "[fleet]\ntrial_attempts = 1\n".into();
    let mut rack = Rack::start(paths, &options).unwrap();
    if image != site::IMAGE {
        rack.kiln(&["release", "publish", &format!("{image}/1")]).unwrap();
    }
    rack.machine(NAME).power_on().unwrap();
    rack.wait_healthy(NAME, 1).unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    let said = console.since(Mark::default());
    let at = |what: &str| said.find(what).unwrap_or_else(|| panic!("{what}: {}", console.last_words(40)));
    assert!(at("hardware watchdog: a hang of 180 s") < at(Stage::Modules.label()), "armed before other drivers");
    let release = format!("{image}/3");
    rack.kiln(&["release", "publish", &release]).unwrap();
    let resets = rack.machine(NAME).resets();
    rack.kiln(&["assign", NAME, &release, "--via", "kexec"]).unwrap();
    console.wait_for("end Kernel panic", Mark::default(), IDLE).unwrap();
    assert_eq!(rack.machine(NAME).resets(), resets, "it hangs");
    // Nobody touches it. The chipset's watchdog counts down twice.
    rack.machine(NAME).wait_reset(resets, 4 * IDLE).unwrap();
    let view = rack.wait(NAME, "back on release 1", |v| v.state == "fell-back" && v.release == Some(1)).unwrap();
    assert!(view.reason.as_deref().is_some_and(|r| r.contains(&release)), "{view:#?}");
    rack.wait(NAME, "healthy", |v| v.boot().is_some_and(|b| b.at(Stage::Healthy, "done").is_some())).unwrap();
}

#[test]
#[ignore = "slow: waits for a watchdog; make test-slow"]
fn a_kernel_that_hangs_after_kexec_is_ended_by_the_watchdog() {
    testing::rack(|paths| a_hang_is_ended(paths, "watchdog", site::IMAGE, HardwareWatchdog::I6300esb));
}

/// The same with what most servers have: a chipset's watchdog, whose device appears only once the bridge's driver is there.
#[test]
#[ignore = "slow: waits for a watchdog; make test-slow"]
fn a_chipsets_own_watchdog_ends_a_hang_too() {
    testing::rack(|paths| a_hang_is_ended(paths, "watchdog-chipset", site::SERVERS, HardwareWatchdog::Itco));
}

/// One file that needs nothing beside it, and no more of it than an initramfs should carry.
#[test]
fn the_agent_is_small_and_static() {
    let agent = std::fs::read(kiln_lab::paths::Paths::find().unwrap().agent).unwrap();
    assert!(agent.len() <= 4_000_000, "{} bytes", agent.len());
    // ELF-64 (System V ABI, chapters 4 and 5): a program header of type 3 names an interpreter.
    let half = |at: usize| usize::from(u16::from_le_bytes(agent[at..at + 2].try_into().unwrap()));
    let headers = usize::try_from(u64::from_le_bytes(agent[32..40].try_into().unwrap())).unwrap();
    let (size, count) = (half(54), half(56));
    assert!(agent.starts_with(b"\x7fELF\x02\x01") && count > 0);
    let kinds: Vec<u16> = (0..count).map(|n| u16::try_from(half(headers + n * size)).unwrap()).collect();
    assert!(!kinds.contains(&3), "it asks for a dynamic loader: {kinds:?}");
}

/// Cards and controllers that hold no firmware of their own, by the folder where the kernel looks for it.
const FIRMWARE: [&str; 9] = ["bnx2", "bnx2x", "cxgb4", "e100", "intel/ice/ddp", "netronome", "qed", "rtl_nic", "tigon"];

/// The image `servers` as it was built: its initramfs has files of every driver that needs some, and its UKI is no larger
/// than firmware is known to take by network.
#[test]
#[ignore = "slow: reads the image `servers`, which make test-slow builds"]
fn the_firmware_of_servers_is_in_their_image() {
    let paths = kiln_lab::paths::Paths::find().unwrap();
    let build = site::template(&paths).join(format!("build/{}/1", site::SERVERS));
    let list = format!("zstd -dc '{}' | cpio --quiet -it", build.join("initramfs").display());
    let names = command::run("sh", ["-c", &list]).unwrap();
    for folder in FIRMWARE {
        let start = format!("lib/firmware/{folder}/");
        let files = names.lines().filter(|name| name.starts_with(&start)).count();
        assert!(files > 0, "no {start}");
        println!("{start} {files} files");
    }
    let uki = build.join("kiln.efi").metadata().unwrap().len();
    println!("the UKI has {uki} bytes");
    assert!(uki <= 32_000_000, "{uki}");
}
