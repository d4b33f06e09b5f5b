//! Logs of machines, in a running `kiln serve`: who may write them, what is kept over a kill, how they are read.

use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::*;
use serde_json::Value;
use std::process::Command;

fn line(source: LogSource, at_us: u64, text: &str) -> LogLine {
    LogLine { source, level: 6, at_us, text: text.to_owned() }
}

fn batch(agent: &Agent, first: u64, lines: Vec<LogLine>) -> LogBatch {
    let (boot_id, machine) = (format!("boot-{}-{}", agent.n, agent.boot), machine_id(agent.n));
    LogBatch { boot_id, machine, first, at_us: 9_000_000, lines }
}

async fn post(server: &Server, agent: &Agent, batch: &LogBatch) -> Answer {
    let body = serde_json::to_vec(batch).unwrap();
    server.post_to(LOG_PATH, server.tls(Some(agent.identity())), body).await.unwrap()
}

async fn send(server: &Server, agent: &Agent, first: u64, lines: Vec<LogLine>) -> u64 {
    let answer = post(server, agent, &batch(agent, first, lines)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    serde_json::from_slice::<LogReply>(&answer.body).unwrap().next
}

async fn shown(server: &Server, query: &str) -> Vec<String> {
    let answer = server.http("GET", &format!("/api/v1/machines/rack-1/log{query}"), &[]).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let entries = answer.json()["entries"].clone();
    entries.as_array().unwrap().iter().map(|e| e["text"].as_str().unwrap().to_owned()).collect()
}

fn kiln(site: &TestSite, args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_kiln")).args(args).arg("--site").arg(site.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[tokio::test]
async fn a_boot_is_read_from_the_kernels_first_line_on() {
    let site = TestSite::new();
    let mut server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let refused = post(&server, &agent, &batch(&agent, 0, Vec::new())).await;
    assert_eq!(refused.status, StatusCode::CONFLICT, "nobody writes before the boot is reported");
    let report = agent.report();
    agent.send(&server, &report).await;

    assert_eq!(send(&server, &agent, 0, Vec::new()).await, 0);
    let kernel = line(LogSource::Kernel, 0, "Linux version 6.12");
    let forged = line(LogSource::Agent, 2_000_000, "quiet\n00:00:00.000  kernel   all is well\u{1b}[2J");
    assert_eq!(send(&server, &agent, 0, vec![kernel.clone(), forged]).await, 2);
    // The reply was lost, and the server killed: the same again, with one more.
    server.signal("-KILL");
    server.child.wait().unwrap();
    let server = Server::start(&site).await;
    let later = line(LogSource::Kernel, 3_000_000, "EXT4-fs mounted");
    assert_eq!(send(&server, &agent, 1, vec![line(LogSource::Agent, 0, "sent again"), later]).await, 3);
    // The machine had no room for 3 to 6.
    assert_eq!(send(&server, &agent, 7, vec![line(LogSource::Kernel, 4_000_000, "after a partition")]).await, 8);
    let missing = "4 lines are missing: there was no room for them";
    let forged = "quiet\\u{a}00:00:00.000  kernel   all is well\\u{1b}[2J";
    assert_eq!(
        shown(&server, "").await,
        ["Linux version 6.12", forged, "EXT4-fs mounted", missing, "after a partition"]
    );
    assert_eq!(shown(&server, "?after=2").await, [missing, "after a partition"]);

    // Whoever waits for the next line has it as it comes.
    let (got, next) = tokio::join!(
        shown(&server, "?after=7&wait=true"),
        send(&server, &agent, 8, vec![line(LogSource::System, 5_000_000, "systemd[1]: up")])
    );
    assert_eq!((got, next), (vec!["systemd[1]: up".to_owned()], 9));

    let text = kiln(&site, &["machine", "log", "rack-1"]);
    let at = |words: &str| text.find(words).unwrap_or_else(|| panic!("{words} is not in\n{text}"));
    assert!(
        at("kernel   Linux version") < at("kernel   EXT4-fs") && at(missing) < at("system   systemd[1]: up"),
        "{text}"
    );
    assert!(at("=====    Agent starts done") > at("Linux version"), "{text}");
    assert_eq!(text.lines().filter(|l| l.contains("all is well")).count(), 1);
    let json: Value = serde_json::from_str(&kiln(&site, &["machine", "log", "rack-1", "--json"])).unwrap();
    assert_eq!(json["entries"].as_array().unwrap().len(), 6);

    // The next boot has a log of its own, and the one before is still there.
    agent.restart(&site.manifest(1));
    let report = agent.report();
    agent.send(&server, &report).await;
    assert_eq!(send(&server, &agent, 0, vec![kernel]).await, 1);
    assert_eq!(shown(&server, "").await, ["Linux version 6.12"]);
    assert_eq!(shown(&server, "?boot=1").await.len(), 6);
    assert_eq!(server.http("GET", "/api/v1/machines/rack-1/log?boot=9", &[]).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_machine_writes_only_its_own_log() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agents: Vec<Agent> = (1..=2).map(|n| Agent::new(n, &site.manifest(1))).collect();
    for agent in &mut agents {
        let report = agent.report();
        agent.send(&server, &report).await;
    }
    // Proven to be the second, it claims to be the first.
    let lines = vec![line(LogSource::Kernel, 0, "forged")];
    let answer = post(&server, &agents[1], &batch(&agents[0], 0, lines)).await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert!(shown(&server, "").await.is_empty());
    let other = LogBatch { boot_id: "../../kiln".into(), ..batch(&agents[0], 0, Vec::new()) };
    assert_eq!(post(&server, &agents[0], &other).await.status, StatusCode::CONFLICT);
    let many = vec![line(LogSource::Kernel, 0, "x"); LOG_LINES + 1];
    let answer = post(&server, &agents[0], &batch(&agents[0], 0, many)).await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
}

/// Two have one key: whoever is the false one, what it says is not among the true one's lines, nor in its inventory.
#[tokio::test]
async fn what_is_said_while_two_claim_to_be_a_machine_is_kept_apart() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let says = |text: &str| vec![line(LogSource::Kernel, 0, text)];
    assert_eq!(send(&server, &agent, 0, says("before")).await, 1);
    let inventory = async |agent: &Agent| {
        let boot_id = format!("boot-{}-{}", agent.n, agent.boot);
        let report = InventoryReport { machine: machine_id(agent.n), boot_id, inventory: Inventory::default() };
        let body = serde_json::to_vec(&report).unwrap();
        server.post_to(INVENTORY_PATH, server.tls(Some(agent.identity())), body).await.unwrap()
    };
    let mut copy = Agent { boot: 50, seq: 0, ..agent.clone() };
    for _ in 0..4 {
        for claimant in [&mut copy, &mut agent] {
            let report = claimant.healthy();
            claimant.send(&server, &report).await;
        }
    }
    assert_eq!(server.machine("rack-1").await.state, "quarantined");

    // The false one has read the true one's boot id from the list.
    let forger = Agent { boot: agent.boot, ..copy.clone() };
    assert_eq!(send(&server, &forger, 1, says("forged")).await, 2);
    assert_eq!(send(&server, &agent, 2, says("while it was held")).await, 3);
    assert_eq!(send(&server, &copy, 0, says("of the copy")).await, 1);
    assert_eq!(shown(&server, "?boot=boot-1-1").await, ["before"]);
    assert!(shown(&server, "?boot=boot-1-50").await.is_empty());
    let missing = "1 lines are missing: there was no room for them";
    assert_eq!(shown(&server, "?boot=boot-1-1-held").await, [missing, "forged", "while it was held"]);
    assert_eq!(shown(&server, "?boot=boot-1-50-held").await, ["of the copy"]);
    let newest = kiln(&site, &["machine", "log", "rack-1", "--held"]);
    let previous = kiln(&site, &["machine", "log", "rack-1", "--boot", "1", "--held"]);
    assert!([&newest, &previous].iter().any(|text| text.contains("of the copy")), "{newest}{previous}");
    let refused = inventory(&copy).await;
    assert_eq!(refused.status, StatusCode::CONFLICT, "{}", refused.text());
    assert!(refused.text().contains("rack-1 is quarantined"), "{}", refused.text());

    // The false one is off, and a person has said so.
    assert_eq!(server.order("POST", "machines/rack-1/clear", serde_json::json!({})).await.status, StatusCode::OK);
    let report = agent.healthy();
    assigned(&agent.send(&server, &report).await);
    assert_eq!(send(&server, &agent, 1, says("after")).await, 2);
    assert_eq!(shown(&server, "?boot=boot-1-1").await, ["before", "after"]);
    assert_eq!(inventory(&agent).await.status, StatusCode::OK);
}
