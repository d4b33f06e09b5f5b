//! Whoever has the disk in hand puts files beside the UKI on the EFI system partition, as systemd's stub takes them: credentials,
//! extensions. They are not signed. Firmware and loader start the release all the same; the TPM tells. Where there is none, a release
//! may refuse what was added to its command line.

use crate::secure_boot::secure;
use crate::support::on_disk;
use kiln_lab::api::{AttestationView, MachineView};
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, MachineSpec};
use kiln_lab::rack::{Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{command, site, testing};
use kiln_protocol::Stage;
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
        let mut rack = on_disk::rack_of(paths, "esp-extras", spec);
        on_disk::installed(&mut rack);
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

/// Without a TPM nobody measures what is added to the command line. A release that says so does not start with it: its agent ends the
/// boot, and the server hears why. Without the addition the same machine comes up.
#[test]
#[ignore = "slow: three boots of the firmware; make test-slow"]
fn an_addition_to_the_command_line_is_refused_where_the_release_says_so() {
    const ADDED: &str = "io.systemd.stub.kernel-cmdline-extra=kiln.extra=1";
    const REFUSED: &str = "command-line-mismatch";
    testing::rack(|paths| {
        let mut options = RackOptions::scenario(paths, "command-line", secure(paths, NetworkBoot::Pxe));
        options.image = site::PROBE.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "probe/1"]).unwrap();
        let (view, _) = boots(&mut rack);
        assert!(view.failures().is_empty(), "{view:#?}");
        assert_eq!(proof(&view).state, "no-tpm", "{:?}", proof(&view));

        rack.machine(NAME).spec.smbios = vec![ADDED.to_owned()];
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait(NAME, REFUSED, |v| v.failures().contains(&REFUSED)).unwrap();
        let failed = view.boot().unwrap().stages.iter().find(|stage| stage.kind.as_deref() == Some(REFUSED)).unwrap();
        assert!(failed.message.as_deref().unwrap().contains("kiln.extra=1"), "{failed:?}");
        let said = rack.machine(NAME).console().unwrap().since(Mark::default());
        assert!(said.contains("command line differs from the embedded one"), "{said}");
        assert!(!said.contains(Stage::Root.label()) && !said.contains(Stage::Handover.label()), "{said}");
        rack.machine(NAME).power_off();

        rack.machine(NAME).spec.smbios.clear();
        let (view, _) = boots(&mut rack);
        assert!(view.failures().is_empty(), "{view:#?}");
    });
}

/// The ordinary image starts with it, without a TPM; what may have switched off a part of what the kernel enforces is called *enforced*
/// nowhere.
#[test]
#[ignore = "slow: two boots of the firmware; make test-slow"]
fn an_addition_to_the_command_line_takes_the_word_enforced_away() {
    testing::rack(|paths| {
        let mut rack =
            Rack::start(paths, &RackOptions::scenario(paths, "enforced", secure(paths, NetworkBoot::Pxe))).unwrap();
        let (view, _) = boots(&mut rack);
        assert_eq!(view.protection.as_deref(), Some("enforced"), "{view:#?}");
        rack.machine(NAME).spec.smbios = vec!["io.systemd.stub.kernel-cmdline-extra=kiln.extra=1".to_owned()];
        let (view, said) = boots(&mut rack);
        assert_eq!(view.protection.as_deref(), Some("unprotected"), "{view:#?}");
        assert!(said.contains("class    unprotected"), "nor on its screen: {said}");
    });
}
