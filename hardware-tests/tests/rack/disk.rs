//! Disk mode with real firmware, the real boot loader and a real disk. The decisions and every cut write are shown by
//! the agent's own tests (`agent/protocol/tests/slots.rs`, `agent/src/disk/tests.rs`); here is what only firmware can
//! show.

use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::Stage;
use std::os::unix::fs::FileExt;

const NAME: &str = "rack-1";
/// Where slot A begins: 1 MiB, and the 128 MiB that the recipe gives the EFI system partition.
const SLOT_A: u64 = 129 << 20;

/// A machine with a blank disk installs itself over the network; it comes up from its disk after a power cut with the
/// boot server gone; a reimage goes to the other slot through the loader; and a trial whose root is overwritten on the
/// disk is left for the release before, by itself, with the boot server gone.
#[test]
#[ignore = "slow: an install, three boots from the disk and a fall-back; make test-slow"]
fn a_machine_lives_on_its_disk() {
    testing::rack(|paths| {
        let spec =
            MachineSpec { disks: vec![Disk::VirtioBlk], ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) };
        let mut options = RackOptions::scenario(paths, "disk", spec);
        options.image = site::DISK.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "disk/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("A Good disk/1, B Empty -", Mark::default(), IDLE).unwrap();

        // The power is cut and the boot server is gone.
        rack.machine(NAME).power_off();
        rack.kill_server();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let begun = console.mark();
        console.wait_for("the release in the slot starts", begun, IDLE).unwrap();
        console.wait_for("disk/1 is healthy: vda: A Good disk/1", begun, IDLE).unwrap();
        rack.start_server().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();

        // Into the other slot, and there through the loader.
        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        let (resets, begun) = (rack.machine(NAME).resets(), console.mark());
        rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
        let view = rack.wait_healthy(NAME, 2).unwrap();
        let manifest = site::manifest_of(&rack.site, site::DISK, 2).unwrap();
        assert_eq!(view.root_hash.as_deref(), manifest["verity"]["root_hash"].as_str(), "read from inside the machine");
        assert!(rack.machine(NAME).resets() > resets, "it went through firmware");
        console.wait_for("disk/2 is healthy: vda: A Good disk/1, B Good disk/2", begun, IDLE).unwrap();
        let said = console.since(begun);
        assert!(said.contains("A Good disk/1, B Trial disk/2"), "the loader counted its start");
        assert!(!said.contains("Start PXE"), "the disk comes first in the boot order");

        // The next trial's root is overwritten while the power is off, and the boot server is gone.
        let resets = rack.machine(NAME).resets();
        rack.kiln(&["assign", NAME, "disk/1", "--via", "cold"]).unwrap();
        rack.machine(NAME).wait_reset(resets, IDLE).unwrap();
        rack.machine(NAME).power_off();
        rack.kill_server();
        let disk = std::fs::File::options().write(true).open(rack.machine(NAME).disk(0)).unwrap();
        disk.write_all_at(&[0x5a; 64 << 10], SLOT_A).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let begun = console.mark();
        console.wait_for("disk/2 is healthy: vda: A Empty -, B Good disk/2", begun, IDLE).unwrap();
        let said = console.since(begun);
        assert!(
            said.contains("image disk release 1") && said.contains("image disk release 2"),
            "a trial, then the good one"
        );
        assert!(!said.contains(Stage::Metadata.label()), "no boot server was there to ask");
        rack.start_server().unwrap();
        rack.wait(NAME, "told why", |v| v.failures().contains(&"trial-fell-back")).unwrap();
    });
}
