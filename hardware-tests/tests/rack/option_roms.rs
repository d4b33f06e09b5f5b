//! Option ROMs before and after a machine's firmware trusts the site alone: what is in them is listed from what the TPM proves,
//! and `kiln trust secureboot enroll --allow` lets it run.

use kiln_lab::api::MachineView;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};

const OPEN: &str = "rack-1";
const CLOSED: &str = "rack-2";
const ALLOWED: &str = "rack-3";

/// The second card's driver is in its ROM, unsigned: QEMU's is iPXE.
fn spec(number: u8) -> MachineSpec {
    let cards = vec!["virtio-net-pci", "e1000"];
    MachineSpec { tpm: true, cards, roms: true, ..MachineSpec::new(number, Firmware::Uefi(NetworkBoot::Pxe)) }
}

/// Switches it on, and waits until its TPM has proven what is in the ROMs that its firmware let in.
fn inventory(rack: &mut Rack, name: &str) -> (MachineView, Vec<String>) {
    rack.machine(name).power_on().unwrap();
    let roms = |v: &MachineView| v.attestation.as_ref().and_then(|a| a.option_roms.clone());
    rack.wait(name, "its option ROMs", |v| roms(v).is_some()).unwrap();
    let view = rack.wait_healthy(name, 1).unwrap();
    rack.machine(name).power_off();
    println!("{name}: {:?}", view.attestation);
    let roms = roms(&view).unwrap();
    (view, roms)
}

/// Three machines of one model: of the first, whose firmware starts anything, the ROM is listed; with the site's certificate alone
/// in db it is listed all the same; with its hash beside, the machine is as well protected.
#[test]
#[ignore = "slow: three boots of the firmware; make test-slow"]
fn an_option_rom_is_listed_and_then_allowed_by_its_hash() {
    testing::rack(|paths| {
        let template = site::template(paths);
        let keys = site::enroll(paths, &template, &paths.scratch.join("keys")).unwrap();
        let mut options = RackOptions::scenario(paths, "option-roms", spec(1));
        options.machines.extend([2, 3].map(|n| MachineSpec { keys: Some(keys.clone()), ..spec(n) }));
        let mut rack = Rack::start(paths, &options).unwrap();

        let (view, roms) = inventory(&mut rack, OPEN);
        assert_eq!(view.attestation.unwrap().state, "unattested", "nothing has to be enrolled for the inventory");
        assert_eq!(roms.len(), 1, "one card has a ROM");
        let shown = rack.kiln(&["machine", "show", OPEN]).unwrap();
        assert!(shown.contains(&roms[0]), "{shown}");

        let (view, without) = inventory(&mut rack, CLOSED);
        assert_eq!(view.attestation.unwrap().state, "attested");
        assert_eq!(without, roms, "firmware measures a ROM before it refuses it");

        let allowed = site::enroll_allowing(paths, &template, &paths.scratch.join("allowed"), &roms).unwrap();
        rack.machine(ALLOWED).set_keys(allowed).unwrap();
        let (view, with) = inventory(&mut rack, ALLOWED);
        assert_eq!(with, roms);
        assert_eq!(view.attestation.unwrap().state, "attested");
        assert_eq!(view.protection.as_deref(), Some("attested"));
    });
}
