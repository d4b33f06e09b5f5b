//! Whoever has the disk in hand puts files beside the UKI on the EFI system partition, as systemd's stub takes them: credentials,
//! extensions. They are not signed. Firmware and loader start the release all the same; the TPM tells.

use crate::secure_boot::secure;
use kiln_lab::api::{AttestationView, MachineView};
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{command, site, testing};
use std::path::Path;
use std::process::Command;

const NAME: &str = "rack-1";
const DELETED: &str = "/.extra/credentials/x.cred was given to this boot beside its UKI: deleted, and not read";

/// One of the mtools on the ESP of a disk, which begins at 1 MiB.
pub fn on_esp(disk: &Path, tool: &str, arguments: &[&str]) -> String {
    let image = format!("{}@@{}", disk.display(), 1 << 20);
    command::run_command(Command::new(tool).env("MTOOLS_SKIP_CHECK", "1").args(["-i", &image]).args(arguments)).unwrap()
}

fn proof(view: &MachineView) -> &AttestationView {
    view.attestation.as_ref().unwrap()
}

/// Switches it on, and waits until this boot is healthy; what its console said.
fn boots(rack: &mut Rack) -> (MachineView, String) {
    let id = |view: &MachineView| view.boot().map(|boot| boot.boot_id.clone());
    let before = rack.view(NAME).and_then(|view| id(&view));
    rack.machine(NAME).power_on().unwrap();
    let view = rack.wait(NAME, "healthy", |v| v.is_healthy_on(1) && id(v) != before).unwrap();
    let said = rack.machine(NAME).console().unwrap().since(Mark::default());
    println!("{:?}", view.attestation);
    rack.machine(NAME).power_off();
    (view, said)
}

#[test]
#[ignore = "slow: an install and three boots from the disk; make test-slow"]
fn a_credential_beside_the_uki_fails_attestation_and_reaches_nobody() {
    testing::rack(|paths| {
        let disks = vec![Disk::VirtioBlk];
        let spec = MachineSpec { tpm: true, disks, ..secure(paths, NetworkBoot::Pxe) };
        let mut options = RackOptions::scenario(paths, "esp-extras", spec);
        options.image = site::DISK.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "disk/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("A Good disk/1, B Empty -", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();
        // From its disk, as it was installed.
        let (view, said) = boots(&mut rack);
        assert_eq!(proof(&view).state, "attested", "{:?}", proof(&view));
        assert!(!said.contains("was given to this boot beside its UKI"), "{said}");

        let disk = rack.machine(NAME).disk(0);
        let list = on_esp(&disk, "mdir", &["-b", "::/EFI/kiln"]);
        let uki = list.lines().map(str::trim).find(|line| line.ends_with(".efi")).unwrap();
        let (folder, file) = (format!("{uki}.extra.d"), paths.scratch.join("x.cred"));
        let credential = format!("{folder}/x.cred");
        std::fs::write(&file, "f /run/kiln-user-data 0644 - - - here").unwrap();
        on_esp(&disk, "mmd", &[&folder]);
        on_esp(&disk, "mcopy", &[file.to_str().unwrap(), &credential]);
        let (view, said) = boots(&mut rack);
        assert_eq!(proof(&view).state, "failed", "{:?}", proof(&view));
        assert!(proof(&view).reason.contains("PCR 12"), "{:?}", proof(&view));
        assert_eq!(view.protection.as_deref(), Some("unprotected"));
        assert!(said.contains(DELETED), "the initramfs is rid of it before anything reads it: {said}");

        on_esp(&disk, "mdel", &[&credential]);
        on_esp(&disk, "mrd", &[&folder]);
        let (view, _) = boots(&mut rack);
        assert_eq!(proof(&view).state, "attested", "{:?}", proof(&view));
    });
}
