//! A hostile agent: what it says is harmless wherever it is printed, it speaks for no other machine, and a key that was
//! taken away is not heard.

use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::*;
use serde_json::{Value, json};
use std::sync::Arc;

/// Clears a screen, forges a line of a log and of JSON, turns text round, and is long.
pub fn evil() -> String {
    let tricks =
        "\x1b[2J\x1b]0;owned\x07\r\n2026-01-01T00:00:00Z kiln all is well\n\u{9b}31m\u{202e}lla\u{2066}\u{85}\0\u{7f}";
    format!("{tricks}</script><b onclick=x>\",\"what\":\"{}", "A".repeat(3_000))
}

/// Every place of a string in a document.
fn leaves(value: &Value, path: &str, out: &mut Vec<String>) {
    match value {
        Value::String(_) => out.push(path.to_owned()),
        Value::Array(all) => all.iter().enumerate().for_each(|(n, v)| leaves(v, &format!("{path}/{n}"), out)),
        Value::Object(all) => all.iter().for_each(|(name, v)| leaves(v, &format!("{path}/{name}"), out)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

pub fn harmless(what: &str, text: &str) {
    let bad = text.char_indices().find(|(_, c)| {
        (c.is_control() && *c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    });
    if let Some((at, c)) = bad {
        let from = text[..at].char_indices().rev().nth(200).map_or(0, |(n, _)| n);
        panic!("{what} has {c:?} at {at}: …{:?}", &text[from..at]);
    }
    assert!(!text.lines().any(|line| line.starts_with("2026-01-01T00:00:00Z kiln")), "{what}: a forged line");
}

fn strings(value: &Value, out: &mut String) {
    match value {
        Value::String(text) => out.push_str(text),
        Value::Array(all) => all.iter().for_each(|v| strings(v, out)),
        Value::Object(all) => all.values().for_each(|v| strings(v, out)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[tokio::test]
async fn what_a_hostile_machine_says_is_harmless_wherever_it_is_printed() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;

    let failed = StageState::Failed(Failure { kind: "k".into(), message: "m".into(), attempt: 1, retry_in_ms: None });
    let difference = Difference { kind: DriftKind::User, what: "w".into(), text: "t".into() };
    let noted = Noted { number: 1, age_ms: 1, kind: "k".into(), alarm: true, text: "t".into() };
    let draining = Draining { hook: "h".into(), number: 1, of: 1, since_ms: 1, left_ms: 1 };
    let mut report = agent.healthy();
    report.stages = vec![
        StageRecord { stage: Stage::Network, state: failed, at_ms: 1 },
        StageRecord { stage: Stage::Network, state: StageState::Waiting { reason: "r".into() }, at_ms: 2 },
    ];
    report.health = Some(Health { healthy: false, detail: "d".into() });
    report.condition = Some(Condition {
        drift: vec![difference],
        drift_count: 1,
        draining: Some(draining),
        spool: SpoolReport { id: "s".into(), confirmed: 0, events: vec![noted] },
        ..Condition::default()
    });
    let mut full = serde_json::to_value(report).unwrap();
    full["exec"] = json!({
        "running": true, "restarts": 0, "alarm": "a", "denied": 1, "reported": 0, "late": 0,
        "violations": [{ "path": "/p", "verdict": "denied", "ancestry": [{ "pid": 1, "comm": "c", "exe": "/e" }],
                         "at_ms": 1, "count": 1 }],
    });
    let first = server.post(server.tls(Some(agent.identity())), serde_json::to_vec(&full).unwrap()).await.unwrap();
    assert_eq!(first.status, StatusCode::OK, "{}", first.text());
    let mut places = Vec::new();
    leaves(&full, "", &mut places);
    // Another boot makes what the one before says a stray: it comes last.
    places.sort_by_key(|place| place == "/boot_id");
    assert!(places.len() > 20, "{places:?}");
    let mut taken = 0;
    for (n, place) in places.iter().enumerate() {
        let mut report = full.clone();
        report["seq"] = json!(100 + n);
        if place != "/machine/id" {
            *report.pointer_mut(place).unwrap() = json!(evil());
        }
        let config = server.tls(Some(agent.identity()));
        let answer = server.post(config, serde_json::to_vec(&report).unwrap()).await.unwrap();
        taken += usize::from(answer.status == StatusCode::OK);
        harmless(place, &answer.text().replace('\r', ""));
    }
    assert!(taken > 5, "some of it is taken: {taken} of {}", places.len());

    let (boot_id, machine) = (format!("boot-1-{}", agent.boot), machine_id(1));
    let line = LogLine { source: LogSource::Kernel, level: 3, at_us: 1, text: evil() };
    let batch = LogBatch { boot_id, machine: machine.clone(), first: 0, at_us: 9, lines: vec![line] };
    server.post_to(LOG_PATH, server.tls(Some(agent.identity())), serde_json::to_vec(&batch).unwrap()).await.unwrap();
    let dimm = Dimm { slot: evil(), bytes: 1 << 30, ..Dimm::default() };
    let inventory = Inventory { dimms: vec![dimm], ..Inventory::default() };
    let inventory = InventoryReport { machine, boot_id: evil(), inventory };
    let body = serde_json::to_vec(&inventory).unwrap();
    server.post_to(INVENTORY_PATH, server.tls(Some(agent.identity())), body).await.unwrap();
    let excused = server.order("POST", "machines/rack-1/excuse", json!({ "reason": evil() })).await;
    assert_eq!(excused.status, StatusCode::UNPROCESSABLE_ENTITY);

    let dir = site.path().to_str().unwrap().to_owned();
    for command in [
        &["machine", "list"][..],
        &["machine", "list", "--json"],
        &["machine", "show", "rack-1"],
        &["machine", "show", "rack-1", "--json"],
        &["machine", "inventory", "rack-1"],
        &["machine", "inventory", "rack-1", "--json"],
        &["machine", "log", "rack-1"],
        &["machine", "log", "rack-1", "--boot", "1"],
        &["audit", "list"],
        &["audit", "export"],
    ] {
        let (_, out, error) = site.kiln(&[command, &["--site", &dir]].concat());
        harmless(&command.join(" "), &out);
        harmless(&command.join(" "), &error);
        if command.contains(&"--json") {
            serde_json::from_str::<Value>(&out).unwrap();
        }
    }
    let (ok, out, error) = site.kiln(&["audit", "verify", "--site", &dir]);
    assert!(ok, "{out}{error}");
    for path in ["machines", "machines/rack-1", "machines/rack-1/inventory", "machines/rack-1/log?boot=1"] {
        let mut all = String::new();
        strings(&server.http("GET", &format!("/api/v1/{path}"), &[]).await.json(), &mut all);
        harmless(path, &all.replace('\n', " "));
    }
    harmless("the server's log", &std::fs::read_to_string(site.path().join("log")).unwrap());
}

#[tokio::test]
async fn a_machine_speaks_only_for_itself() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let (mut one, mut two) = (Agent::new(1, &site.manifest(1)), Agent::new(2, &site.manifest(1)));
    for agent in [&mut one, &mut two] {
        let report = agent.healthy();
        agent.send(&server, &report).await;
    }
    let before = server.machine("rack-2").await;
    let post = async |path: &str, body: Value| {
        let body = serde_json::to_vec(&body).unwrap();
        server.post_to(path, server.tls(Some(one.identity())), body).await.unwrap()
    };
    // A report in the other's name gets nothing, and changes nothing but that another key is named.
    let mut forged = two.report();
    forged.health = Some(Health { healthy: false, detail: "on fire".into() });
    let answer = post(REPORT_PATH, serde_json::to_value(&forged).unwrap()).await;
    waits(&serde_json::from_slice(&answer.body).unwrap());
    assert!(!answer.text().contains("kiln-assignment"), "{}", answer.text());
    let log = LogBatch {
        boot_id: format!("boot-2-{}", two.boot),
        machine: machine_id(2),
        first: 0,
        at_us: 1,
        lines: vec![LogLine { source: LogSource::Kernel, level: 6, at_us: 0, text: "forged".into() }],
    };
    assert_eq!(post(LOG_PATH, json!(log)).await.status, StatusCode::CONFLICT);
    let inventory = json!({ "machine": machine_id(2), "boot_id": "b", "inventory": Inventory::default() });
    assert_eq!(post(INVENTORY_PATH, inventory).await.status, StatusCode::FORBIDDEN);
    let commit = Introduction::Commit { machine: machine_id(2), commitment: commitment(&forged.nonce) };
    assert_eq!(post(INTRODUCTION_PATH, json!(commit)).await.status, StatusCode::CONFLICT);
    // Of proofs, of the word before a kexec and of receipts the tests of attestation, kexecs and orders show it.
    let after = server.machine("rack-2").await;
    assert_eq!((after.key, after.state, after.boots), (before.key, before.state, before.boots));
    assert_eq!(after.other_key, Some(one.key_id()));
    let answer = server.http("GET", "/api/v1/machines/rack-2/log", &[]).await;
    assert!(!answer.text().contains("forged"), "{}", answer.text());
    assert_eq!(server.http("GET", "/api/v1/machines/rack-2/inventory", &[]).await.status, StatusCode::NOT_FOUND);
    // The operator API is not behind the agent API's door.
    for path in ["/api/v1/machines", "/api/v1/tokens", "/"] {
        let answer = post(path, json!({})).await;
        assert!([StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED].contains(&answer.status), "{path}");
    }
    let report = two.healthy();
    assigned(&two.send(&server, &report).await);
}

#[tokio::test]
async fn a_revoked_key_is_not_heard_until_a_person_accepts_another() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    let etag = agent.send(&server, &report).await.desired.etag;
    let dir = site.path().to_str().unwrap().to_owned();
    // A report that is held when it happens gets nothing either.
    let held = Report { wait_s: 50, desired_etag: etag, ..agent.healthy() };
    let (reply, ()) = tokio::join!(agent.send(&server, &held), async {
        until(&server, |status| status["held_reports"] == 1).await;
        let (ok, out, error) = site.kiln(&["machine", "revoke-key", "rack-1", "--site", &dir]);
        assert!(ok && out.contains(agent.key_id().as_str()), "{out}{error}");
    });
    assert!(waits(&reply).contains("revoked"));
    let (ok, _, error) = site.kiln(&["machine", "revoke-key", "rack-1", "--site", &dir]);
    assert!(!ok && error.contains("revoked already"), "{error}");
    drop(server);

    let server = Server::start(&site).await;
    let report = agent.healthy();
    for (path, body) in [
        (REPORT_PATH, serde_json::to_vec(&report).unwrap()),
        (LOG_PATH, b"{}".to_vec()),
        (INVENTORY_PATH, b"{}".to_vec()),
        (RECEIPT_PATH, b"{}".to_vec()),
        (INTRODUCTION_PATH, b"{}".to_vec()),
    ] {
        let answer = server.post_to(path, server.tls(Some(agent.identity())), body).await.unwrap();
        assert!(
            answer.status == StatusCode::FORBIDDEN && answer.text().contains("revoked"),
            "{path}: {}",
            answer.text()
        );
    }
    assert!(server.machine("rack-1").await.reason.contains("its identity key was revoked"));
    // Another key waits for a person, who says that it is the machine's.
    let mut other = Agent { signer: Arc::new(kiln_release::Signer::from_seed(&[77; 32])), ..agent.clone() };
    other.boot = 50;
    let report = other.healthy();
    assert!(waits(&other.send(&server, &report).await).contains("kiln machine clear rack-1 --key"));
    let named = json!({ "key": other.key_id() });
    assert_eq!(server.order("POST", "machines/rack-1/clear", named).await.status, StatusCode::OK);
    let report = other.healthy();
    assigned(&other.send(&server, &report).await);
    let machine = server.machine("rack-1").await;
    assert_eq!((machine.key, machine.reason.contains("revoked")), (Some(other.key_id()), false));
    let report = agent.healthy();
    let answer = server.post(server.tls(Some(agent.identity())), serde_json::to_vec(&report).unwrap()).await.unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN, "for good");
    let audit = server.audit().await;
    assert!(audit.iter().any(|r| r.what == format!("revoked the identity key {}", agent.key_id())), "{audit:?}");
}
