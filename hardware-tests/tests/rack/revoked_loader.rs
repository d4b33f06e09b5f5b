//! The boot loader on a disk is revoked with the release that brought it: the machine gets another first, then the list. What the
//! agent does at each cut: `agent/src/disk/tests/loader.rs`.

use crate::secure_boot::{LOCKED, is_enforced, secure, signed_loader};
use crate::support::esp;
use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::site::OTHER_LOADER;
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::DbxOutcome;
use kiln_release::{authenticode, hex};

const NAME: &str = "rack-1";
/// Where the agent puts it: firmware starts the first where it knows no other, the second by a boot option.
const PLACES: [&str; 2] = ["EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi"];
/// The firmware's name for that option.
const OPTION: &str = "\"Kiln\" from HD(";

fn digest(program: &[u8]) -> String {
    hex::encode(&authenticode::digest(program).unwrap())
}

/// The digest of a release's loader, as its manifest has it.
fn loader_of(rack: &Rack, release: u64) -> String {
    let manifest = site::manifest_of(&rack.site, site::DISK, release).unwrap();
    manifest["measured"]["loader"].as_str().unwrap().to_owned()
}

/// Takes away what was built besides the two releases with the first one's loader: while a release that stays has it, it is not
/// revoked.
fn keep_two_releases(rack: &Rack) {
    for built in [format!("{}/2", site::DISK), site::VAULT.to_owned()] {
        let folder = rack.site.join("build").join(built);
        if folder.exists() {
            std::fs::remove_dir_all(folder).unwrap();
        }
    }
}

/// What lies in both places of the machine's disk.
fn on_the_disk(rack: &mut Rack) -> [String; 2] {
    let (disk, scratch) = (rack.machine(NAME).disk(0), rack.paths().scratch.clone());
    PLACES.map(|place| digest(&esp::read(&disk, &scratch, place)))
}

/// Switches it on, and waits until the newer release runs.
fn starts(rack: &mut Rack) -> String {
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    console.wait_for(&format!("disk/{OTHER_LOADER} is healthy: vda: "), Mark::default(), IDLE).unwrap();
    console.since(Mark::default())
}

fn boot_id(view: &MachineView) -> Option<String> {
    view.boot().map(|boot| boot.boot_id.clone())
}

/// A machine whose disk starts through the first release's loader goes to a release with another; the first is revoked with its
/// loader. Once the second is good, the list is in the firmware and the second's loader on the disk, from which the machine comes up
/// with its boot server gone. The first loader, put back by hand, is refused by the firmware; the machine comes by the network, and
/// puts its own there again.
#[test]
#[ignore = "slow: an install and three boots; make test-slow"]
fn a_revoked_loader_is_replaced_first_and_then_refused() {
    testing::rack(|paths| {
        let spec = MachineSpec { disks: vec![Disk::VirtioBlk], ..secure(paths, NetworkBoot::Pxe) };
        let mut options = RackOptions::scenario(paths, "revoked-loader", spec);
        options.image = site::DISK.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        keep_two_releases(&rack);
        let (old, new) = (loader_of(&rack, 1), loader_of(&rack, OTHER_LOADER));
        assert_ne!(old, new, "`kiln-lab prepare --image disk` builds a release with another loader");
        rack.kiln(&["release", "publish", "disk/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("A Good disk/1, B Empty -", Mark::default(), IDLE).unwrap();

        let newer = format!("disk/{OTHER_LOADER}");
        rack.kiln(&["trust", "revoke", "disk/1"]).unwrap();
        let revoked = std::fs::read_to_string(rack.site.join("offline/secure-boot/revoked")).unwrap();
        assert!(revoked.contains(&old) && !revoked.contains(&new), "{revoked}");
        rack.kiln(&["release", "publish", &newer]).unwrap();
        // Through the first release's loader still: a reimage leaves it as it is.
        rack.kiln(&["assign", NAME, &newer, "--via", "cold"]).unwrap();
        let status = rack.kiln(&["trust", "status"]).unwrap();
        assert!(status.contains("rack-1 lacks them: held: it runs disk/1"), "{status}");
        rack.wait_healthy(NAME, OTHER_LOADER).unwrap();
        let has = |v: &MachineView| v.dbx.as_ref().is_some_and(|dbx| dbx.outcome == DbxOutcome::Installed);
        let view = rack.wait(NAME, "dbx is in its firmware", has).unwrap();
        let before = boot_id(&view);
        let status = rack.kiln(&["trust", "status"]).unwrap();
        assert!(status.contains("every machine in service has them"), "{status}");
        rack.machine(NAME).power_off();
        assert_eq!(on_the_disk(&mut rack), [&*new; 2], "in both places");

        rack.kill_server();
        let said = starts(&mut rack);
        assert!(said.contains(LOCKED), "{said}");
        assert!(!said.contains("Access Denied") && !said.contains("Start PXE"), "from the disk: {said}");
        rack.machine(NAME).power_off();

        rack.start_server().unwrap();
        let (disk, first) = (rack.machine(NAME).disk(0), signed_loader(paths));
        for place in PLACES {
            esp::replace(&disk, &paths.scratch, place, &first);
        }
        assert_eq!(on_the_disk(&mut rack), [&*old; 2], "as it was");
        let said = starts(&mut rack);
        let refusal = said.lines().find(|line| line.contains("failed to load") && line.contains(OPTION));
        let refusal = refusal.unwrap_or_else(|| panic!("the firmware says so: {said}"));
        println!("{refusal}");
        assert!(refusal.contains("Access Denied") && said.contains("Start PXE"), "by the network: {said}");
        let again = |v: &MachineView| v.is_healthy_on(OTHER_LOADER) && boot_id(v) != before;
        assert!(is_enforced(&rack.wait(NAME, "healthy again", again).unwrap()));
        rack.machine(NAME).power_off();
        assert_eq!(on_the_disk(&mut rack), [&*new; 2], "the next start is from the disk");
    });
}
