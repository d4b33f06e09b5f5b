//! Machines that have nothing but a name, known by the switch port at which a trusted relay hears them. What a relay's word is:
//! `server/netboot/tests/proxy.rs`.

use crate::common::*;
use kiln_netboot::Mac;
use kiln_protocol::*;
use kiln_server::control::Control;
use kiln_server::view::MachineView;
use std::sync::Arc;

const PLACE: &str = "10.9.0.1 sw-7 eth1";
const ELSEWHERE: &str = "10.9.0.1 sw-7 eth2";

fn mac(n: u8) -> Mac {
    format!("52:54:00:00:00:{n:02x}").parse().unwrap()
}

fn view(control: &Control, n: u8) -> MachineView {
    control.views().into_iter().find(|view| view.id == machine_id(n)).unwrap()
}

async fn says(control: &Control, agent: &mut Agent) -> Reply {
    let report = agent.report();
    control.report(agent.key_id(), report).await.unwrap()
}

#[tokio::test]
async fn a_machine_with_nothing_but_a_name_is_known_where_a_trusted_relay_hears_it() {
    let site = TestSite::new();
    let path = site.path().join("kiln.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let config = config.replacen("mode = \"off\"", "mode = \"proxy\"\nrelays = [\"10.9.0.1\"]", 1);
    let listed = format!("[[machine]]\nposition = \"{PLACE}\"\nname = \"by-port\"\nrole = \"lab\"\n");
    std::fs::write(&path, config + &listed).unwrap();
    let (control, _stop) = control(&site).await;
    let new = |n: u8| Agent { storage: KeyStorage::Ephemeral, ..Agent::new(n, &site.manifest(1)) };

    // Heard nowhere, or elsewhere; or one that keeps a key, at the place.
    let mut agent = new(9);
    waits(&says(&control, &mut agent).await);
    control.heard_at(mac(9), ELSEWHERE);
    waits(&says(&control, &mut agent).await);
    let mut keeps = Agent { storage: KeyStorage::EfiVariable, ..new(8) };
    control.heard_at(mac(8), PLACE);
    waits(&says(&control, &mut keeps).await);
    assert_eq!(view(&control, 9).state, "discovered");

    control.heard_at(mac(9), PLACE);
    assigned(&says(&control, &mut agent).await);
    let seen = view(&control, 9);
    assert_eq!((seen.name.as_str(), seen.position.as_deref()), ("by-port", Some(PLACE)));
    // Another machine behind that port is for a person to look at.
    let mut second = new(7);
    control.heard_at(mac(7), PLACE);
    waits(&says(&control, &mut second).await);
    let why = view(&control, 7).reason;
    assert!(why.contains("its position is by-port's already"), "{why}");

    // Its next boot makes another key. The same from another port is somebody else.
    let signer = Arc::new(kiln_release::Signer::from_seed(&[78; 32]));
    let mut next = Agent { signer, boot: 2, seq: 0, ..agent.clone() };
    control.heard_at(mac(9), ELSEWHERE);
    waits(&says(&control, &mut next).await);
    assert_eq!(view(&control, 9).other_key, Some(next.key_id()));
    assigned(&says(&control, &mut agent).await);
    control.heard_at(mac(9), PLACE);
    assigned(&says(&control, &mut next).await);
    assert_eq!(view(&control, 9).key, Some(next.key_id()));
}
