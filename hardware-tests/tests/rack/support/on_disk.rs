//! A machine that lives on its disk, as tests of disk, firmware and boot loader begin with it.

use kiln_lab::console::{Console, Mark};
use kiln_lab::machine::{Disk, Firmware, MachineSpec};
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::site;
use kiln_lab::variables::NetworkBoot;
use std::sync::Arc;

const NAME: &str = "rack-1";

/// A UEFI machine with one blank disk.
pub fn spec() -> MachineSpec {
    MachineSpec { disks: vec![Disk::VirtioBlk], ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) }
}

/// A rack with that machine, off, and release 1 of the image for disks published.
pub fn rack(paths: &Paths, name: &str) -> Rack {
    rack_of(paths, name, spec())
}

/// The same with another machine.
pub fn rack_of(paths: &Paths, name: &str, spec: MachineSpec) -> Rack {
    let mut options = RackOptions::scenario(paths, name, spec);
    options.image = site::DISK.to_owned();
    let rack = Rack::start(paths, &options).unwrap();
    rack.kiln(&["release", "publish", "disk/1"]).unwrap();
    rack
}

/// Switches it on and waits until it runs release 1 from slot A.
pub fn installed(rack: &mut Rack) -> Arc<Console> {
    installed_as(rack, 1)
}

/// The same with the newest release that is published.
pub fn installed_as(rack: &mut Rack, release: u64) -> Arc<Console> {
    rack.machine(NAME).power_on().unwrap();
    rack.wait_healthy(NAME, release).unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    console.wait_for(&format!("A Good disk/{release}, B Empty -"), Mark::default(), IDLE).unwrap();
    console
}

/// With release 1 [`installed`]: reimages to release 2, so that both slots hold a good one, and switches it off; the boot server is dead.
pub fn reimaged_and_alone(rack: &mut Rack, console: &Console) {
    rack.kiln(&["release", "publish", "disk/2"]).unwrap();
    rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
    rack.wait_healthy(NAME, 2).unwrap();
    console.wait_for("disk/2 is healthy: vda: A Good disk/1, B Good disk/2", Mark::default(), IDLE).unwrap();
    rack.machine(NAME).power_off();
    rack.kill_server();
}
