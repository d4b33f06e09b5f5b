//! The rack itself, with firmware and no boot server: what every scenario stands on.
#![allow(clippy::unwrap_used)]

use kiln_lab::accel::Accelerator;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, Machine, MachineSpec};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{net, testing};
use std::time::Duration;

const IDLE: Duration = Duration::from_secs(60);

/// The boot order written into the variable store is obeyed, and the card gets an address from the site's own server.
#[test]
fn http_boot_comes_first_and_has_an_address() {
    testing::inside("http_boot_comes_first_and_has_an_address", |paths| {
        net::make_bridge().unwrap();
        let dhcp = net::SiteDhcp::start(&paths.program, &paths.scratch.join("dhcp.log")).unwrap();
        let spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Http));
        let mut machine = Machine::install(spec, Accelerator::Tcg, &paths.scratch, &paths.scratch).unwrap();
        machine.power_on().unwrap();
        let console = machine.console().unwrap();
        console.wait_for("Start HTTP Boot over IPv4", Mark::default(), IDLE).unwrap();
        assert!(!console.since(Mark::default()).contains("Start PXE"), "{}", console.last_words(20));
        dhcp.log.wait_for("DHCPDISCOVER(site1) 52:54:00:4b:49:01", Mark::default(), IDLE).unwrap();
    });
}

/// A BIOS machine's network ROM speaks on the serial console and says on the wire that it is iPXE; a cut cable is
/// silent, and a slow one still carries.
#[test]
fn a_bios_machine_asks_from_its_rom_and_a_cut_cable_is_silent() {
    testing::inside("a_bios_machine_asks_from_its_rom_and_a_cut_cable_is_silent", |paths| {
        net::make_bridge().unwrap();
        let dhcp = net::SiteDhcp::start(&paths.program, &paths.scratch.join("dhcp.log")).unwrap();
        let spec = MachineSpec::new(2, Firmware::Bios);
        let mut machine = Machine::install(spec, Accelerator::Tcg, &paths.scratch, &paths.scratch).unwrap();
        machine.set_connected(false).unwrap();
        machine.set_slow(20_000).unwrap();
        machine.power_on().unwrap();
        let console = machine.console().unwrap();
        console.wait_for("iPXE", Mark::default(), IDLE).unwrap();
        console.wait_for("Configuring", Mark::default(), IDLE).unwrap();
        assert!(!dhcp.log.since(Mark::default()).contains("DHCPDISCOVER"), "the cable is cut");
        machine.set_connected(true).unwrap();
        dhcp.log.wait_for("DHCPDISCOVER(site1) 52:54:00:4b:49:02", Mark::default(), IDLE).unwrap();
        dhcp.log.wait_for("user class: iPXE", Mark::default(), IDLE).unwrap();
        let before = machine.resets();
        machine.reset().unwrap();
        machine.wait_reset(before, IDLE).unwrap();
    });
}
