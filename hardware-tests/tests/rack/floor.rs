//! A release below the floor on real firmware. What the agent makes of it alone: `thefts.rs`.

use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::Stage;
use std::path::Path;

const NAME: &str = "rack-1";
const REFUSED: &str = "release-below-floor";
/// What the boot server knows: its backup is older than the floor.
const FOLDERS: [&str; 2] = ["repo/metadata", "state"];

fn boot_id(view: &MachineView) -> Option<String> {
    view.boot().map(|boot| boot.boot_id.clone())
}

/// Puts these folders in the place of the boot server's while it is off.
fn put(rack: &Rack, from: &Path) {
    for folder in FOLDERS {
        let to = rack.site.join(folder);
        std::fs::remove_dir_all(&to).unwrap();
        site::copy_tree(&from.join(folder), &to).unwrap();
    }
}

/// A boot server that was put back to an old backup sends a release that the floor was raised above. The machine's TPM remembers the
/// floor: the release starts nothing, and the boot server hears why. With the newest state the machine comes up as before.
#[test]
#[ignore = "slow: four boots of the firmware; make test-slow"]
fn a_release_below_the_floor_boots_to_say_so_and_no_further() {
    testing::rack(|paths| {
        let spec = MachineSpec { tpm: true, ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) };
        let mut rack = Rack::start(paths, &RackOptions::scenario(paths, "floor", spec)).unwrap();
        let [older, newest] = ["older", "newest"].map(|name| paths.scratch.join(name));
        // Of the state nothing: it knows the machine from its list, and nothing else of it.
        site::copy_tree(&rack.site.join(FOLDERS[0]), &older.join(FOLDERS[0])).unwrap();
        std::fs::create_dir_all(older.join(FOLDERS[1])).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "cold"]).unwrap();
        let before = boot_id(&rack.wait_healthy(NAME, 2).unwrap());
        rack.kiln(&["trust", "floor", "minimal", "2"]).unwrap();
        // It sees the floor when it verifies metadata next.
        rack.machine(NAME).power_off();
        rack.machine(NAME).power_on().unwrap();
        let again = |v: &MachineView| v.is_healthy_on(2) && boot_id(v) != before;
        let view = rack.wait(NAME, "healthy again", again).unwrap();
        assert_eq!(view.rollback_memory.as_deref(), Some("tpm-nv"));
        let before = boot_id(&view);
        rack.machine(NAME).power_off();
        assert!(rack.stop_server().unwrap());
        for folder in FOLDERS {
            site::copy_tree(&rack.site.join(folder), &newest.join(folder)).unwrap();
        }

        put(&rack, &older);
        rack.start_server().unwrap();
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait(NAME, REFUSED, |v| v.failures().contains(&REFUSED)).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("this boot ends here; the machine restarts", Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        assert!(said.contains("image minimal release 1"), "the old release was sent: {said}");
        for stage in [Stage::Metadata, Stage::Root, Stage::Handover] {
            assert!(!said.contains(stage.label()), "nothing is started: {said}");
        }
        // Before a byte of the network is heard.
        let at = |words: &str| said.find(words).unwrap_or_else(|| panic!("{words}: {said}"));
        assert!(at("kiln-agent: PCR 11 is capped") < at(Stage::Network.label()), "{said}");
        assert!(!view.is_healthy_on(1), "{view:#?}");
        rack.machine(NAME).power_off();

        assert!(rack.stop_server().unwrap());
        put(&rack, &newest);
        rack.start_server().unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait(NAME, "as before", |v| v.is_healthy_on(2) && boot_id(v) != before).unwrap();
    });
}

/// The floor rises while a machine that starts from its disk first is off, above the only release there. It hears of the floor, and
/// the next start from the disk is left for the network, which brings what is assigned; that one puts the disk first again.
#[test]
#[ignore = "slow: an install, four boots from disk and network; make test-slow"]
fn a_disk_whose_release_fell_below_the_floor_is_left_for_the_network() {
    testing::rack(|paths| {
        let spec =
            MachineSpec { disks: vec![Disk::VirtioBlk], ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) };
        let mut options = RackOptions::scenario(paths, "disk-floor", spec);
        options.image = site::DISK.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "disk/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("A Good disk/1, B Empty -", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();

        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        assert!(rack.stop_server().unwrap());
        rack.kiln(&["trust", "floor", "disk", "2", "--without-server"]).unwrap();
        rack.start_server().unwrap();
        rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("the network comes before the disk", Mark::default(), IDLE).unwrap();
        let left = console.mark();
        rack.wait_healthy(NAME, 2).unwrap();
        console.wait_for("disk/2 is healthy: vda: ", left, IDLE).unwrap();
        assert!(console.since(left).contains("Start PXE"), "the network brought it");
        console.wait_for("at the next start the disk comes first", left, IDLE).unwrap();
        rack.machine(NAME).power_off();

        rack.kill_server();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("disk/2 is healthy: vda: ", Mark::default(), IDLE).unwrap();
        assert!(!console.since(Mark::default()).contains("Start PXE"), "the disk comes first again");
    });
}
