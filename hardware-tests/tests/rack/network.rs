//! Signed network configurations on real links: bonds and VLANs of a machine whose cables end at a switch's trunk ports.
//! How the agent decides is in `agent/src/net/trial.rs` and `agent/src/uplink.rs`.

use kiln_lab::api::{self, MachineView};
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, LIMIT, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{testing, trunk};
use kiln_protocol::Inventory;
use std::fmt::Write as _;

const NAME: &str = "rack-1";
const REVERTED: &str = "network-config-reverted";

/// Signs a configuration: a bond of both cards, and on it a VLAN with a static address.
fn sign(rack: &Rack, version: u64, kind: &str, vlan: u16) {
    let server = trunk::SERVER;
    let mut text = format!("version = {version}\n[[section]]\nrole = [\"lab\"]\n");
    let _ = writeln!(text, "http_urls = [\"http://{server}:8080\"]\nagent_urls = [\"https://{server}:8443\"]");
    let _ = writeln!(text, "[[section.link]]\nname = \"bond0\"\nkind = \"{kind}\"\ncard = [\"driver:virtio_net\"]");
    let _ = writeln!(text, "[[section.link]]\nname = \"vlan10\"\nkind = \"vlan\"\non = \"bond0\"\nid = {vlan}");
    let _ = writeln!(text, "address = [\"10.77.10.{}/24\"]", 10 + version);
    let file = rack.paths().scratch.join("network.toml");
    std::fs::write(&file, text).unwrap();
    rack.kiln(&["trust", "network", &file.display().to_string()]).unwrap();
}

/// Switches it off and on, and waits until it is healthy in that boot.
fn boots_again(rack: &mut Rack, release: u64) -> MachineView {
    let id = |v: &MachineView| v.boot().map(|b| b.boot_id.clone());
    let before = rack.view(NAME).and_then(|v| id(&v));
    rack.machine(NAME).power_on().unwrap();
    rack.wait(NAME, "healthy again", |v| id(v) != before && v.is_healthy_on(release)).unwrap()
}

fn uses(version: u64) -> String {
    format!("vlan10 has [10.77.10.{}] (network configuration {version})", 10 + version)
}

/// A machine comes up by DHCP, and the server knows at which switch ports its cables end; a configuration with LACP and a VLAN is signed and it comes healthy by that at its next
/// boot. With one of the two cables pulled it reimages itself by kexec, and the next kernel makes the same links again. A
/// configuration whose VLAN nobody serves is left again, and told; one with an active-backup bond replaces the first.
#[test]
#[ignore = "slow: five boots and a trial that waits for its end; make test-slow"]
fn bonds_and_vlans_carry_a_machine_and_one_that_loses_the_server_is_left() {
    testing::rack(|paths| {
        let mut spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        // LACP bundles links of one known speed.
        spec.cards = vec!["virtio-net-pci,speed=10000,duplex=full"; 2];
        spec.trunk = true;
        let mut rack = Rack::start(paths, &RackOptions::scenario(paths, "network", spec)).unwrap();
        let trunk = rack.machine(NAME).connect_trunk().unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let (socket, path) = (rack.site.join("state/kiln.sock"), format!("/api/v1/machines/{NAME}/inventory"));
        let ports = [0, 1].map(trunk::port_name);
        let named = || {
            let found = api::get(&socket, &path).ok()?["inventory"].take();
            let found: Inventory = serde_json::from_value(found).ok()?;
            let ends = found.nics.into_iter().filter_map(|nic| nic.neighbour);
            let mut ends: Vec<String> = ends.filter(|end| end.system_name == trunk::NAME).map(|end| end.port).collect();
            ends.sort();
            Some(ends)
        };
        rack.wait(NAME, "where its cables end", |_| named().is_some_and(|ends| ends == ports)).unwrap();
        let said = rack.kiln(&["machine", "inventory", NAME]).unwrap();
        assert!(ports.iter().all(|port| said.contains(&format!("at switch {} port {port}", trunk::NAME))), "{said}");

        trunk.set_lacp(true);
        sign(&rack, 1, "lacp", trunk::VLAN);
        let view = boots_again(&mut rack, 1);
        assert!(!view.failures().contains(&REVERTED), "{view:#?}");
        let console = rack.machine(NAME).console().unwrap().clone();
        let said = console.since(Mark::default());
        assert!(said.contains("network configuration 1 is tried") && said.contains(&uses(1)), "{said}");
        trunk.wait_bundle(&[0, 1], LIMIT).unwrap();

        // One cable is pulled; the machine fetches the next release by the other and starts it by kexec.
        rack.machine(NAME).set_cable(0, false).unwrap();
        trunk.wait_bundle(&[1], LIMIT).unwrap();
        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        let begun = console.mark();
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "kexec"]).unwrap();
        rack.wait_healthy(NAME, 2).unwrap();
        let said = console.since(begun);
        assert!(said.contains(&uses(1)) && !said.contains("is tried"), "what worked is used at once: {said}");
        trunk.wait_bundle(&[1], LIMIT).unwrap();
        rack.machine(NAME).set_cable(0, true).unwrap();
        trunk.wait_bundle(&[0, 1], LIMIT).unwrap();

        // Nobody is on this VLAN.
        sign(&rack, 2, "lacp", 99);
        let view = boots_again(&mut rack, 2);
        assert!(view.failures().contains(&REVERTED), "{view:#?}");
        let said = rack.machine(NAME).console().unwrap().since(Mark::default());
        assert!(said.contains("network configuration 2 does not reach the server"), "{said}");
        assert!(said.contains(&uses(1)), "back to what worked: {said}");
        let shown = rack.kiln(&["machine", "show", NAME]).unwrap();
        assert!(shown.contains(REVERTED), "{shown}");

        trunk.set_lacp(false);
        sign(&rack, 3, "active-backup", trunk::VLAN);
        let view = boots_again(&mut rack, 2);
        // At its start it tells of version 2 once more, as it does until another one works.
        let mut told = view.boot().into_iter().flat_map(|b| &b.stages).filter_map(|s| s.message.as_deref());
        assert!(!told.any(|message| message.contains("network configuration 3 was left")), "{view:#?}");
        let console = rack.machine(NAME).console().unwrap().clone();
        assert!(console.since(Mark::default()).contains(&uses(3)), "{}", console.last_words(40));
        rack.machine(NAME).set_cable(0, false).unwrap();
        let begun = console.mark();
        rack.kiln(&["assign", NAME, "minimal/1", "--via", "kexec"]).unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        console.wait_for(&uses(3), begun, IDLE).unwrap();
    });
}
