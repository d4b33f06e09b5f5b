//! Hardware classes through the real server: a canary by a person's word, and the others by what it has shown.

use crate::common::*;
use crate::inventory::post;
use hyper::StatusCode;
use kiln_protocol::*;
use kiln_server::view::{ClassView, MachineView};
use serde_json::json;

pub fn box_with(firmware: &str) -> Inventory {
    Inventory {
        system: System { manufacturer: "Maker".into(), product: "Box".into(), ..System::default() },
        firmware: FirmwareVersion { version: firmware.into(), ..FirmwareVersion::default() },
        ..Inventory::default()
    }
}

async fn classes(server: &Server) -> Vec<ClassView> {
    serde_json::from_value(server.http("GET", "/api/v1/classes", &[]).await.json()).unwrap()
}

/// Firmware, machines, and of each release whether it came up cold and by kexec.
type Told<'a> = (&'a str, usize, Vec<(u64, bool, bool)>);

fn told(classes: &[ClassView]) -> Vec<Told<'_>> {
    let one = |c: &ClassView| c.releases.iter().map(|r| (r.release, r.cold, r.kexec)).collect();
    classes.iter().map(|c| (c.firmware.as_str(), c.machines, one(c))).collect()
}

/// It is well, and how it goes to what it is assigned by that answer.
async fn via(server: &Server, agent: &mut Agent) -> Via {
    let report = agent.healthy();
    match agent.send(server, &report).await.desired.decision {
        Decision::Assigned { via, .. } => via,
        Decision::Wait { reason } => panic!("must be assigned, but: {reason}"),
    }
}

async fn rack_2(server: &Server) -> MachineView {
    server.machine("rack-2").await
}

/// In service on release 1, with firmware 1.2.
async fn two_of_a_class(site: &TestSite, server: &Server) -> Vec<Agent> {
    let mut agents: Vec<Agent> = (1..=2).map(|n| Agent::new(n, &site.manifest(1))).collect();
    for agent in &mut agents {
        let report = agent.healthy();
        agent.send(server, &report).await;
        assert_eq!(post(server, agent, box_with("1.2")).await.status, StatusCode::OK);
        let report = agent.healthy();
        agent.send(server, &report).await;
    }
    agents
}

/// It is sent to release 2 by kexec, as a person says, and goes.
async fn jump(server: &Server, agent: &mut Agent, machine: &str) {
    server.assign(machine, 2).await;
    let sequence = server.machine(machine).await.assigned.unwrap().sequence;
    let report = agent.ready(2, sequence);
    assert_eq!(*assigned(&agent.send(server, &report).await).2, Grant::Go);
    let mut going = agent.healthy();
    going.stages = vec![StageRecord { stage: Stage::Going, state: StageState::Started, at_ms: 5 }];
    agent.send(server, &going).await;
}

#[tokio::test]
async fn a_kexec_is_left_to_the_server_only_for_a_class_that_came_up_both_ways() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let two = site.publish(2);
    until(&server, |status| status["releases"] == 2).await;
    let mut agents = two_of_a_class(&site, &server).await;
    // The newest release is theirs since they were approved, and they have not gone there.
    assert_eq!(told(&classes(&server).await), [("1.2", 2, vec![(1, true, false), (2, false, false)])]);

    let body = |via: &str| json!({ "image": "minimal", "release": 2, "via": via });
    let refused = server.order("PUT", "machines/rack-2/assignment", body("fast")).await;
    assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", refused.text());
    let answer = server.order("PUT", "machines/rack-2/assignment", body("auto")).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let view = rack_2(&server).await;
    assert!(view.assigned.as_ref().is_some_and(|a| a.auto && a.via == Via::Cold), "{:?}", view.assigned);
    let why = "minimal/2 is assigned, by cold boot: no machine of its class has come up on minimal/2 yet";
    assert!(view.reason.ends_with(why), "{}", view.reason);
    assert_eq!(view.class.as_deref(), Some("Maker Box, firmware 1.2"));
    assert_eq!(via(&server, &mut agents[1]).await, Via::Cold);

    // The canary goes by kexec, as a person says, and is restarted.
    jump(&server, &mut agents[0], "rack-1").await;
    agents[0].restart(&two);
    let report = agents[0].healthy();
    agents[0].send(&server, &report).await;
    assert_eq!(server.machine("rack-1").await.boots.last().unwrap().via, Via::Kexec);
    assert_eq!(via(&server, &mut agents[1]).await, Via::Cold);
    let reason = rack_2(&server).await.reason;
    assert!(reason.ends_with("no machine of its class has come up on minimal/2 from firmware yet"), "{reason}");
    agents[0].restart(&two);
    let report = agents[0].healthy();
    agents[0].send(&server, &report).await;
    assert_eq!(via(&server, &mut agents[1]).await, Via::Kexec);
    let shown: [Told<'_>; 1] = [("1.2", 2, vec![(1, true, false), (2, true, true)])];
    assert_eq!(told(&classes(&server).await), shown);
    let dir = site.path().to_str().unwrap();
    let (ok, out, error) = site.kiln(&["classes", "--site", dir]);
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(ok && rows.len() == 3, "{out}{error}");
    assert_eq!(rows[2], ["Maker", "Box", "1.2", "2", "minimal/2", "came", "up", "came", "up"], "{out}");

    // Killed, it has what it knew. Another firmware is another class, of which nothing is known.
    server.signal("-KILL");
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(told(&classes(&server).await), shown);
    assert!(rack_2(&server).await.assigned.is_some_and(|a| a.auto && a.via == Via::Kexec));
    assert_eq!(via(&server, &mut agents[1]).await, Via::Kexec);
    assert_eq!(post(&server, &agents[1], box_with("1.3")).await.status, StatusCode::OK);
    assert_eq!(via(&server, &mut agents[1]).await, Via::Cold);
    let known = classes(&server).await;
    let split: [Told<'_>; 2] =
        [("1.2", 1, vec![(1, true, false), (2, true, true)]), ("1.3", 1, vec![(1, true, false), (2, false, false)])];
    assert_eq!(told(&known), split);
}

/// One machine came up by kexec; the next is back on its old release. How that is told, and that it is kept.
#[tokio::test]
async fn a_kexec_that_came_to_nothing_is_told_and_outlives_the_server() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let (one, two) = (site.manifest(1), site.publish(2));
    until(&server, |status| status["releases"] == 2).await;
    let mut agents = two_of_a_class(&site, &server).await;
    jump(&server, &mut agents[0], "rack-1").await;
    agents[0].restart(&two);
    let report = agents[0].healthy();
    agents[0].send(&server, &report).await;
    assert_eq!(told(&classes(&server).await), [("1.2", 2, vec![(1, true, false), (2, false, true)])]);
    jump(&server, &mut agents[1], "rack-2").await;
    agents[1].restart(&one);
    let report = agents[1].healthy();
    agents[1].send(&server, &report).await;

    let dir = site.path().to_str().unwrap().to_owned();
    let is_told = async |server: &Server| {
        let known = classes(server).await;
        assert_eq!(told(&known), [("1.2", 2, vec![(1, true, false), (2, false, false)])]);
        let failed: Vec<bool> = known[0].releases.iter().map(|r| r.kexec_failed).collect();
        assert_eq!(failed, [false, true]);
        let (ok, out, error) = site.kiln(&["classes", "--site", &dir]);
        let last: Vec<&str> = out.lines().last().unwrap_or_default().split_whitespace().collect();
        assert!(ok && last.ends_with(&["minimal/2", "not", "yet", "failed"]), "{out}{error}");
    };
    is_told(&server).await;
    let log = std::fs::read_to_string(site.path().join("log")).unwrap();
    assert!(log.contains("a kexec to minimal/2 came to nothing"), "{log}");
    server.signal("-KILL");
    drop(server);
    let server = Server::start(&site).await;
    is_told(&server).await;
    // Left to the server, the way is the cold one, and the reason is this one.
    let body = json!({ "image": "minimal", "release": 2, "via": "auto" });
    let answer = server.order("PUT", "machines/rack-2/assignment", body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(via(&server, &mut agents[1]).await, Via::Cold);
    let reason = rack_2(&server).await.reason;
    assert!(reason.contains("a kexec to minimal/2 came to nothing on a machine of its class"), "{reason}");
}
