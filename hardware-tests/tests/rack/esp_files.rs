//! What a disk starts from, spoilt while the machine is off, and found by the release that runs.

use crate::support::{esp, on_disk};
use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::rack::IDLE;
use kiln_lab::{site, testing};

const NAME: &str = "rack-1";
const LOADER: &str = "EFI/BOOT/BOOTX64.EFI";

/// A byte at the end of the UKI, and one of the loader's second copy, are flipped while the machine is off. Without Secure Boot
/// it starts all the same; healthy, it finds both and says so, and both are as they were signed again.
#[test]
#[ignore = "slow: an install and a boot; make test-slow"]
fn flipped_bytes_on_the_esp_are_put_right() {
    testing::rack(|paths| {
        let mut rack = on_disk::rack(paths, "esp-files");
        on_disk::installed(&mut rack);
        rack.machine(NAME).power_off();

        let disk = rack.machine(NAME).disk(0);
        let file = |name: &str| esp::read(&disk, &paths.scratch, name);
        let manifest = site::manifest_of(&rack.site, site::DISK, 1).unwrap();
        let sha256 = manifest["uki"]["sha256"].as_str().unwrap();
        let uki = format!("EFI/kiln/{sha256}.efi");
        let (signed, loader) = (std::fs::read(rack.artifact(sha256)).unwrap(), file(LOADER));
        assert!(file(&uki) == signed, "it was installed as it was signed");
        for (name, bytes) in [(uki.as_str(), &signed), (LOADER, &loader)] {
            let mut flipped = bytes.clone();
            *flipped.last_mut().unwrap() ^= 1;
            esp::replace(&disk, &paths.scratch, name, &flipped);
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
        assert!(file(&uki) == signed && file(LOADER) == loader, "as they were signed");
    });
}
