//! A machine that is no longer what its release says: told, and put up anew where its role wants that. What is compared with
//! what is in `agent/src/drift/tests.rs`, what the server decides in `server/fleet/tests/fleet/drift.rs`.

use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::Stage;
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

const NAME: &str = "rack-1";
/// What differs, in the agent's words.
const DIFFERS: [&str; 3] = ["/run/kiln-copied", "/mnt", "tcp/4444"];

/// What the units with limits meet.
const LIMITS: [&str; 2] =
    ["1 process(es) killed at its memory limit", "kiln-burner.service: held back by its CPU limit"];

fn differences(view: &MachineView) -> Vec<&str> {
    view.condition.drift.iter().map(|difference| difference.what.as_str()).collect()
}

/// Healthy and as released; then a program, a mount and a listener that nobody declared: the server names all three within
/// a minute and raises an alarm, and its role's word puts the machine up anew, in which none of it is left. Meanwhile two
/// units are held to their limits, which is told too.
#[test]
#[ignore = "slow: two boots; make test-slow"]
fn a_machine_that_drifts_is_told_of_and_put_up_anew() {
    testing::rack(|paths| {
        let spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        let id = spec.uuid();
        let mut options = RackOptions::scenario(paths, "drifts", spec);
        options.image = site::DRIFTS.to_owned();
        options.unknown = vec![NAME.to_owned()];
        options.config = "[[role]]\nname = \"strict\"\nimage = \"drifts\"\ndrift = \"reimage\"\n".into();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "drifts/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait(NAME, "discovered", |v| v.state == "discovered" && v.stage == Some(Stage::Assignment)).unwrap();
        rack.kiln(&["machine", "approve", &id, "--role", "strict"]).unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert_eq!(differences(&view), [""; 0], "a Debian system as it was released");

        let console = rack.machine(NAME).console().unwrap().clone();
        let said = console.since(Mark::default());
        let (_, address) = said.rsplit_once(" has [").unwrap();
        let address: Ipv4Addr = address.split([',', ']']).next().unwrap().parse().unwrap();
        let resets = rack.machine(NAME).resets();
        let _door = TcpStream::connect((address, 4445)).unwrap();
        console.wait_for("KILN-DRIFTS done", Mark::default(), IDLE).unwrap();
        let begun = Instant::now();
        let named = |view: &MachineView| DIFFERS.iter().all(|what| differences(view).contains(what));
        let view = rack.wait(NAME, "told what differs", named).unwrap();
        let took = begun.elapsed();
        println!("told after {took:?}: {:?}", view.condition);
        assert!(took < Duration::from_secs(60), "{took:?}");
        assert!(view.condition.events.iter().any(|e| e.kind == "drift" && e.alarm), "{:#?}", view.condition);
        assert!(rack.kiln(&["machine", "list"]).unwrap().contains("drift "));
        let happened = |view: &MachineView, words| view.condition.events.iter().any(|e| e.text.contains(words));
        rack.wait(NAME, "limits", |v| LIMITS.iter().all(|words| happened(v, words))).unwrap();

        rack.machine(NAME).wait_reset(resets, 2 * IDLE).unwrap();
        let log = &rack.server().unwrap().log;
        log.wait_for("it is put up anew with drifts/1", Mark::default(), IDLE).unwrap();
        let anew = |view: &MachineView| view.boots.len() > 1 && view.is_healthy_on(1) && differences(view).is_empty();
        rack.wait(NAME, "as released again", anew).unwrap();
    });
}
