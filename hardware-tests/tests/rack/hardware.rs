//! Other hardware than virtio: what the agent finds by modalias with the generic kernel (image `servers`).

use kiln_lab::machine::{Disk, Firmware, MachineSpec, text};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{command, console::Mark, site, testing};
use kiln_protocol::Stage;

const NAME: &str = "rack-1";

/// Whether this QEMU has a device. Debian 12's own does not have igb.
fn offered(device: &str) -> bool {
    let known = command::run("qemu-system-x86_64", ["-device", "help"]).unwrap();
    let found = known.contains(&format!("name \"{device}\""));
    if !found {
        eprintln!("left out: this QEMU has no {device}");
    }
    found
}

fn start(paths: &kiln_lab::paths::Paths, name: &str, spec: MachineSpec) -> Rack {
    let mut options = RackOptions::scenario(paths, name, spec);
    options.image = site::SERVERS.to_owned();
    let rack = Rack::start(paths, &options).unwrap();
    rack.kiln(&["release", "publish", "servers/1"]).unwrap();
    rack
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

/// One machine with every card and every kind of disk: all cards have drivers, and the address is that of the card the
/// firmware booted from, though the others could have one too.
#[test]
#[ignore = "slow: the device matrix; make test-slow"]
fn every_card_and_disk_is_found_and_the_one_that_booted_is_used() {
    testing::rack(|paths| {
        let mut spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        let further = ["e1000", "e1000e", "igb", "rtl8139", "vmxnet3"];
        spec.cards.extend(further.into_iter().filter(|card| offered(card)));
        spec.disks = vec![Disk::VirtioBlk, Disk::VirtioScsi, Disk::Nvme, Disk::Ahci, Disk::Megasas, Disk::Usb];
        let macs: Vec<String> = (0..).zip(&spec.cards).map(|(n, _)| text(spec.mac_of(n))).collect();
        let mut rack = start(paths, "devices", spec);
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert_eq!(view.macs, macs, "every card has a driver");
        let site_dhcp = std::fs::read_to_string(paths.consoles.join("devices/site-dhcp.log")).unwrap();
        let given: Vec<&str> = site_dhcp.lines().filter(|l| l.contains("DHCPACK")).collect();
        assert!(given.last().unwrap().contains(&macs[0]), "{given:#?}");
        let console = rack.machine(NAME).console().unwrap();
        assert!(!console.since(Mark::default()).contains("kiln-agent: driver "), "a driver did not load");
    });
}

/// The kernel of release 3 (recipe `hangs`) never comes to its init, and says nothing more. It was started by kexec: no firmware and no
/// boot loader is there to notice. The watchdog that the release before armed restarts the machine, the boot server takes
/// that for what it is, and the machine comes back on the release that ran before.
#[test]
#[ignore = "slow: waits for a watchdog; make test-slow"]
fn a_kernel_that_hangs_after_kexec_is_ended_by_the_watchdog() {
    testing::rack(|paths| {
        let mut options =
            RackOptions::scenario(paths, "watchdog", MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)));
        options.config = "[fleet]\ntrial_attempts = 1\n".into();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        assert!(console.since(Mark::default()).contains("hardware watchdog: a hang of 180 s"), "it was not armed");
        rack.kiln(&["release", "publish", "minimal/3"]).unwrap();
        let resets = rack.machine(NAME).resets();
        rack.kiln(&["assign", NAME, "minimal/3", "--via", "kexec"]).unwrap();
        console.wait_for("end Kernel panic", Mark::default(), IDLE).unwrap();
        assert_eq!(rack.machine(NAME).resets(), resets, "it hangs");
        // Nobody touches it.
        rack.machine(NAME).wait_reset(resets, 2 * IDLE).unwrap();
        let view = rack.wait(NAME, "back on release 1", |v| v.state == "fell-back" && v.release == Some(1)).unwrap();
        assert!(view.reason.as_deref().is_some_and(|r| r.contains("minimal/3")), "{view:#?}");
        rack.wait(NAME, "healthy", |v| v.boot().is_some_and(|b| b.at(Stage::Healthy, "done").is_some())).unwrap();
    });
}
