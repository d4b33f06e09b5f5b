//! What a disk starts from, spoilt while the machine is off, and found by the release that runs.

use crate::extras::on_esp;
use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use std::path::Path;

const NAME: &str = "rack-1";
const LOADER: &str = "::/EFI/BOOT/BOOTX64.EFI";

/// A file of the ESP, as mtools reads it into this folder.
fn file(disk: &Path, name: &str, folder: &Path) -> Vec<u8> {
    let to = folder.join("from-esp");
    on_esp(disk, "mcopy", &["-n", "-o", name, to.to_str().unwrap()]);
    std::fs::read(to).unwrap()
}

/// A byte at the end of the UKI, and one of the loader's second copy, are flipped while the machine is off. Without Secure Boot
/// it starts all the same; healthy, it finds both and says so, and both are as they were signed again.
#[test]
#[ignore = "slow: an install and a boot; make test-slow"]
fn flipped_bytes_on_the_esp_are_put_right() {
    testing::rack(|paths| {
        let spec =
            MachineSpec { disks: vec![Disk::VirtioBlk], ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) };
        let mut options = RackOptions::scenario(paths, "esp-files", spec);
        options.image = site::DISK.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "disk/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("A Good disk/1, B Empty -", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();

        let (disk, folder) = (rack.machine(NAME).disk(0), paths.consoles.clone());
        let manifest = site::manifest_of(&rack.site, site::DISK, 1).unwrap();
        let sha256 = manifest["uki"]["sha256"].as_str().unwrap();
        let uki = format!("::/EFI/kiln/{sha256}.efi");
        let (signed, loader) = (std::fs::read(rack.artifact(sha256)).unwrap(), file(&disk, LOADER, &folder));
        assert!(file(&disk, &uki, &folder) == signed, "it was installed as it was signed");
        for (name, bytes) in [(uki.as_str(), &signed), (LOADER, &loader)] {
            let (mut flipped, from) = (bytes.clone(), folder.join("to-esp"));
            *flipped.last_mut().unwrap() ^= 1;
            std::fs::write(&from, flipped).unwrap();
            on_esp(&disk, "mcopy", &["-n", "-o", from.to_str().unwrap(), name]);
        }

        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let told = "the UKI of disk/1 on the disk was not as it was signed: it is right again";
        console.wait_for(told, Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        assert!(said.contains("EFI/BOOT/BOOTX64.EFI was not as it was signed: it is right again"), "{said}");
        assert!(!said.contains("Start PXE"), "by its own boot loader");
        let event = |v: &MachineView, text: &str| {
            v.condition.events.iter().any(|e| e.kind == "boot-files" && e.alarm && e.text.contains(text))
        };
        rack.wait(NAME, "told of both", |v| event(v, told) && event(v, "BOOTX64.EFI")).unwrap();
        rack.machine(NAME).power_off();
        assert!(file(&disk, &uki, &folder) == signed && file(&disk, LOADER, &folder) == loader, "as they were signed");
    });
}
