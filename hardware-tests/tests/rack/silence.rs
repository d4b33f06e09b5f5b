//! From one stage on every packet is lost: the agent must say a typed reason by that stage's deadline, and complete
//! once packets arrive again. The agent's stages that use the network up to the hand-over are here, as a process; before
//! it has an address: `boots.rs`; the firmware's own: the boot server's tests (`server/tests`).

use crate::support::hostile::{Forgery, Hostile};
use crate::support::{AgentMachine, Bench, loss};
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::testing;
use kiln_lab::variables::NetworkBoot;
use kiln_protocol::Stage;

/// The agent's longest wait for a byte is 15 s; the rest is a loaded host's.
const DEADLINE_S: f64 = 30.0;

/// One boot ends with a typed reason at this stage, in time; the next, without loss, completes.
#[track_caller]
fn falls_silent(machine: &AgentMachine, stage: Stage, kinds: &[&str]) {
    let ended = machine.stage();
    loss::end();
    assert_eq!(ended.code, Some(10), "loss is the network's fault: {ended:#?}");
    assert!(kinds.contains(&ended.kind.as_str()), "{ended:#?}");
    let line = ended.said.lines().find(|l| l.contains("failed (")).unwrap();
    assert!(line.contains(stage.label()), "{line}");
    let at = line.split_once('[').and_then(|(_, rest)| rest.split_once(']')).unwrap().0;
    let seconds: f64 = at.trim().parse().unwrap();
    assert!(seconds < DEADLINE_S, "{stage:?}: {line}");
    machine.accepts();
}

#[test]
fn at_the_boot_server() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let machine = bench.machine(1, 1);
        loss::begin();
        falls_silent(&machine, Stage::Server, &["server-unreachable"]);
    });
}

#[test]
fn at_the_metadata() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&loss::begins_at("127.0.0.1:8080", "/metadata/"));
        falls_silent(&machine, Stage::Metadata, &["transfer-stalled", "server-unreachable"]);
    });
}

#[test]
fn at_the_assignment() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let site = bench.site.clone();
        let mut reports = 0;
        let hostile = Hostile::start(&bench.site, move |report, key| {
            reports += 1;
            if reports == 2 {
                loss::begin();
            }
            Forgery::honest(&site, report, key, 1).reply(report)
        });
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        falls_silent(&machine, Stage::Assignment, &["server-unreachable"]);
    });
}

#[test]
fn at_the_root() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&loss::begins_at("127.0.0.1:8080", "/a/"));
        falls_silent(&machine, Stage::Root, &["transfer-stalled", "server-unreachable"]);
    });
}

/// The running system's stages, in one life of a machine: its cable loses everything while it prefetches, while it waits
/// for its turn, and as it leaves. Each time the reason is on its console, and each time it goes on by itself.
#[test]
#[ignore = "slow: a boot, a reimage and three silences of up to a minute; make test-slow"]
fn at_prefetch_grant_and_going() {
    testing::rack(|paths| {
        const NAME: &str = "rack-1";
        let mut options =
            RackOptions::scenario(paths, "silence", MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)));
        let other = MachineSpec::new(2, Firmware::Bios);
        options.machines.push(other.clone());
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        // Another machine is away, so the first is held when its turn comes.
        rack.machine(&other.name).power_on().unwrap();
        rack.wait(&other.name, "on its way", |v| v.state == "booting").unwrap();
        rack.machine(&other.name).power_off();

        rack.machine(NAME).set_slow(8_000).unwrap();
        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        let begun = console.mark();
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "kexec"]).unwrap();
        console.wait_for(Stage::Prefetch.label(), begun, IDLE).unwrap();
        rack.machine(NAME).set_connected(false).unwrap();
        let cut = console.mark();
        console.wait_for("; next try in", cut, IDLE).unwrap(); // the whole line
        let line = failure(&console.since(cut));
        let typed = ["failed (transfer-stalled", "failed (server-unreachable"].iter().any(|kind| line.contains(kind));
        assert!(typed && line.contains(Stage::Prefetch.label()), "{line}");
        rack.machine(NAME).set_slow(1_000_000).unwrap();
        rack.machine(NAME).set_connected(true).unwrap();

        console.wait_for("of at most 1 machines are unavailable", cut, IDLE).unwrap();
        rack.machine(NAME).set_connected(false).unwrap();
        let cut = console.mark();
        console.wait_for("(server-unreachable)", cut, IDLE).unwrap();
        rack.wait(NAME, "noticed by the boot server", |v| v.state == "unreachable").unwrap();
        rack.machine(NAME).set_connected(true).unwrap();

        let before = console.mark();
        rack.kiln(&["machine", "retire", &other.name]).unwrap();
        console.wait_for(Stage::Going.label(), before, IDLE).unwrap();
        rack.machine(NAME).set_connected(false).unwrap();
        // It leaves all the same: what it carries is verified. The kernel it started says what is wrong.
        console.wait_for("(network-no-offer", before, IDLE).unwrap();
        rack.machine(NAME).set_connected(true).unwrap();
        rack.wait_healthy(NAME, 2).unwrap();
        assert!(console.since(Mark::default()).contains(Stage::Grant.label()));
    });
}

fn failure(said: &str) -> String {
    said.lines().find(|l| l.contains("failed (")).unwrap_or_default().to_owned()
}
