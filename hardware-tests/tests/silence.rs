//! From one stage on nothing answers: the agent must say a typed reason by that stage's deadline, and where it can
//! still reach the boot server, tell it. At the boot server packets are lost; at metadata, assignment and root the peer
//! takes the connection and stays silent. Before the agent has an address: `scenarios.rs`. Not shown: the firmware's own
//! DHCP and download, prefetch, grant, going.
#![allow(clippy::unwrap_used)]

mod support;

use kiln_lab::testing;
use kiln_protocol::Stage;
use std::time::{Duration, Instant};
use support::hostile::{Forgery, Hostile};
use support::{AgentMachine, Bench, silent};

/// The agent's longest wait for a byte is 15 s; the rest is a loaded host's.
const DEADLINE: Duration = Duration::from_secs(30);

#[track_caller]
fn falls_silent(machine: &AgentMachine, stage: Stage, kinds: &[&str]) {
    let begun = Instant::now();
    let ended = machine.stage();
    assert!(begun.elapsed() < DEADLINE, "{stage:?} took {:?}: {}", begun.elapsed(), ended.said);
    assert_eq!(ended.code, Some(10), "silence is the network's fault: {ended:#?}");
    assert!(kinds.contains(&ended.kind.as_str()), "{ended:#?}");
    let line = ended.said.lines().find(|l| l.contains("failed (")).unwrap();
    assert!(line.contains(stage.label()), "{line}");
}

#[track_caller]
fn is_reported(bench: &Bench, machine: &AgentMachine, stage: Stage) {
    let view = bench.view(machine);
    let failed = view.boot().unwrap().stages.iter().find(|s| s.state == "failed");
    assert_eq!(failed.map(|s| s.stage), Some(stage), "{view:#?}");
}

#[test]
fn at_the_boot_server() {
    testing::inside("at_the_boot_server", |paths| {
        let bench = Bench::start(paths);
        let mut machine = bench.machine(1, 1);
        machine.look_at(&format!("https://{}:8443", silent::address()));
        falls_silent(&machine, Stage::Server, &["server-unreachable"]);
    });
}

#[test]
fn at_the_metadata() {
    testing::inside("at_the_metadata", |paths| {
        let bench = Bench::start(paths);
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&silent::http("127.0.0.1:8080", "/metadata/"));
        falls_silent(&machine, Stage::Metadata, &["transfer-stalled", "server-unreachable"]);
        is_reported(&bench, &machine, Stage::Metadata);
    });
}

#[test]
fn at_the_assignment() {
    testing::inside("at_the_assignment", |paths| {
        let bench = Bench::start(paths);
        let site = bench.site.clone();
        let mut reports = 0;
        let hostile = Hostile::start(&bench.site, move |report, key| {
            reports += 1;
            if reports > 1 {
                loop {
                    std::thread::park();
                }
            }
            Forgery::honest(&site, report, key, 1).reply(report)
        });
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        // The report of the failure is lost as well, and has its own deadline.
        let begun = Instant::now();
        let ended = machine.stage();
        assert!(begun.elapsed() < 3 * DEADLINE, "{}", ended.said);
        assert_eq!((ended.code, ended.kind.as_str()), (Some(10), "server-unreachable"), "{ended:#?}");
        let line = ended.said.lines().find(|l| l.contains("failed (")).unwrap();
        assert!(line.contains(Stage::Assignment.label()), "{line}");
    });
}

#[test]
fn at_the_root() {
    testing::inside("at_the_root", |paths| {
        let bench = Bench::start(paths);
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&silent::http("127.0.0.1:8080", "/a/"));
        falls_silent(&machine, Stage::Root, &["transfer-stalled"]);
        is_reported(&bench, &machine, Stage::Root);
    });
}
