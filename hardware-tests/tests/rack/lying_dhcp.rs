//! A DHCP server in an attacker's hands, and a machine that only the site's key boots: what its firmware starts, and whom the
//! agent talks to. What the agent makes of each way of saying it: `agent/src/net/tests.rs`.

use crate::secure_boot::{is_enforced, program, secure};
use crate::stolen::another_site;
use crate::support::files::Files;
use crate::support::hostile::Hostile;
use crate::thefts::thief;
use kiln_lab::console::Mark;
use kiln_lab::net::{self, SERVER, SiteDhcp};
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::server::DhcpMode;
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::Stage;
use kiln_release::authenticode;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

const NAME: &str = "rack-1";
const SCENARIO: &str = "lying-dhcp";
const ATTACKER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 66);

/// The only DHCP server: it has a boot program for firmware, by TFTP, and says where agents find their boot server.
fn dhcp(paths: &Paths, log: &str, folder: &Path, boot_server: Ipv4Addr) -> SiteDhcp {
    let more = [
        "--enable-tftp".to_owned(),
        format!("--tftp-root={}", folder.display()),
        "--dhcp-vendorclass=set:agent,KilnAgent".to_owned(),
        "--dhcp-boot=tag:!agent,kiln.efi".to_owned(),
        format!("--dhcp-option=tag:agent,66,{boot_server}"),
    ];
    SiteDhcp::start(&paths.program, &paths.consoles.join(SCENARIO).join(log), &more).unwrap()
}

/// The site's boot program with another site's signature.
fn foreign(paths: &Paths, other: &Path, good: &[u8]) -> Vec<u8> {
    let (bare, out) = (paths.scratch.join("bare.efi"), paths.scratch.join("foreign.efi"));
    std::fs::write(&bare, authenticode::strip(good).unwrap()).unwrap();
    let [bare, out, other] = [bare.as_path(), out.as_path(), other].map(|path| path.to_str().unwrap());
    site::kiln_quiet(paths, &["trust", "secureboot", "sign", bare, "--site", other, "--out", out]).unwrap();
    std::fs::read(out).unwrap()
}

/// The attacker has a boot server of his own, right in itself. His boot program is refused by the firmware. With a genuine one
/// the agent is sent to his server, and says nothing to it. Then DHCP is honest, and the machine comes up.
#[test]
#[ignore = "slow: two boots of the firmware; make test-slow"]
fn an_enforced_machine_under_a_lying_dhcp_server_starts_and_tells_nothing() {
    testing::rack(|paths| {
        let mut options = RackOptions::scenario(paths, SCENARIO, secure(paths, NetworkBoot::Pxe));
        options.dhcp = DhcpMode::Off;
        let mut rack = Rack::start(paths, &options).unwrap();
        let good = std::fs::read(program(&rack)).unwrap();
        // It listens at every address.
        assert!(rack.stop_server().unwrap());
        net::set_address(ATTACKER, true).unwrap();
        let other = another_site(paths, &rack.site);
        let files = Files::serve_at(SocketAddr::from((ATTACKER, 8080)), other.join("repo"));
        let hostile = Hostile::start_at(SocketAddr::from((ATTACKER, 8443)), &other, thief(&other, 1, |_| {}));
        let folder = paths.scratch.join("tftp");
        std::fs::create_dir(&folder).unwrap();
        let served = folder.join("kiln.efi");
        std::fs::write(&served, foreign(paths, &other, &good)).unwrap();
        let lying = dhcp(paths, "attacker.log", &folder, ATTACKER);

        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("Access Denied", Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        assert!(!said.contains("Linux version") && !said.contains("kiln-agent"), "{}", console.last_words(20));
        rack.machine(NAME).power_off();

        std::fs::write(&served, &good).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let unreachable = "failed (server-unreachable";
        console.wait_for_line(unreachable, Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        let line = said.lines().find(|line| line.contains(unreachable)).unwrap();
        let whom = format!("https://{ATTACKER}:8443");
        assert!(line.contains(&whom) && line.contains("certificate"), "it went where DHCP says: {line}");
        assert!(!said.contains(Stage::Root.label()), "nothing is started: {}", console.last_words(20));
        assert!(hostile.heard.lock().unwrap().is_empty(), "the attacker hears nothing");

        drop((lying, hostile, files));
        net::set_address(ATTACKER, false).unwrap();
        rack.start_server().unwrap();
        let _honest = dhcp(paths, "honest.log", &folder, SERVER);
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert!(is_enforced(&view), "{view:#?}");
    });
}
