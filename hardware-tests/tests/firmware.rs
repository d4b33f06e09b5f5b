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
