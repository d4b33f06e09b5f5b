//! What machines say besides their health, through a running `kiln serve`: shown, kept once over a kill; and what a role
//! may set.

use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::*;
use kiln_release::{HealthCheck, HealthKind};
use serde_json::json;

#[tokio::test]
async fn drift_and_events_are_shown_and_taken_once_over_a_kill_of_the_server() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let (first, second) = (agent.report(), agent.healthy());
    agent.send(&server, &first).await;
    agent.send(&server, &second).await;
    let clocks = |mono_ms| Clocks { boot_id: "boot-1-1".into(), mono_ms, unix_ms: 0 };
    let mut spool = Spool::new("s".into());
    spool.note(&clocks(0), "drift", true, "nc listens on tcp/4444");
    let drift =
        Difference { kind: DriftKind::Listener, what: "tcp/4444".into(), text: "nc listens on tcp/4444".into() };
    let say = |agent: &mut Agent, spool: &mut Spool| {
        let condition = Condition {
            drift: vec![drift.clone()],
            drift_count: 1,
            draining: None,
            put_up: None,
            spool: spool.report(&clocks(30_000)),
        };
        Report { condition: Some(condition), ..agent.healthy() }
    };
    let report = say(&mut agent, &mut spool);
    agent.send(&server, &report).await;
    let view = server.machine("rack-1").await;
    assert_eq!((view.state.as_str(), view.condition.drift_count), ("healthy", 1));
    let event = &view.condition.events[0];
    assert_eq!((event.kind.as_str(), event.alarm, event.text.as_str()), ("drift", true, "nc listens on tcp/4444"));
    assert!((29_000..=60_000).contains(&(view.last_seen_ms - event.at_ms)), "{view:?}");

    // The server dies before the machine has its reply; and an event comes while it is away.
    server.signal("-KILL");
    drop(server);
    spool.note(&clocks(20_000), "hook", false, "drain hook lb is through");
    let server = Server::start(&site).await;
    let report = say(&mut agent, &mut spool);
    agent.send(&server, &report).await;
    let view = server.machine("rack-1").await;
    let texts: Vec<&str> = view.condition.events.iter().map(|e| e.text.as_str()).collect();
    assert_eq!(texts, ["nc listens on tcp/4444", "drain hook lb is through"]);
}

#[tokio::test]
async fn a_role_that_reimages_for_drift_says_so_everywhere() {
    let site = TestSite::new();
    let path = site.path().join("kiln.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let set = "image = \"minimal\"\ndrift = \"reimage\"\n";
    std::fs::write(&path, config.replacen("image = \"minimal\"\n", set, 1)).unwrap();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let (first, second) = (agent.report(), agent.healthy());
    agent.send(&server, &first).await;
    agent.send(&server, &second).await;
    let text = "nc listens on tcp/4444".to_owned();
    let drift = Difference { kind: DriftKind::Listener, what: "tcp/4444".into(), text };
    let condition = Condition { drift: vec![drift], drift_count: 1, ..Condition::default() };
    let report = Report { condition: Some(condition), ..agent.healthy() };
    agent.send(&server, &report).await;
    let view = server.machine("rack-1").await;
    assert_eq!(view.condition.drift_policy, "reimage");
    let note = view.condition.drift_note.unwrap();
    assert!(note.contains("is put up anew from") && view.reason.contains(&note), "{note} / {}", view.reason);
}

#[tokio::test]
async fn a_roles_thresholds_reach_its_machines_and_only_for_what_is_declared() {
    let site = TestSite::new();
    let path = site.path().join("kiln.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let set = "image = \"minimal\"\n[role.thresholds]\nmemory = \"10%\"\n";
    std::fs::write(&path, config.replacen("image = \"minimal\"\n", set, 1)).unwrap();
    site.publish_as(2, |manifest| {
        let limit = Some(kiln_release::Threshold::Percent(5));
        manifest.health.push(HealthCheck { limit, ..HealthCheck::of(HealthKind::Memory, 5) });
    });
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(2));
    let report = agent.report();
    let reply = agent.send(&server, &report).await;
    assert_eq!(reply.thresholds, [("memory".to_owned(), "10%".to_owned())].into());
    site.publish(3);
    let order = json!({ "image": "minimal", "release": 3, "via": "cold" });
    let refused = server.order("PUT", "machines/rack-1/assignment", order).await;
    assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY);
    let words = "role lab sets the threshold memory = 10%, and minimal/3 declares: none";
    assert!(refused.text().contains(words), "{}", refused.text());
    let mut unknown = Agent::new(9, &site.manifest(1));
    let report = unknown.report();
    assert!(unknown.send(&server, &report).await.thresholds.is_empty(), "of no role yet");
}

#[tokio::test]
async fn what_a_role_selects_is_in_what_is_signed() {
    let site = TestSite::new();
    let path = site.path().join("kiln.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let settings = |reply: &Reply| {
        let envelope: serde_json::Value = serde_json::from_str(assigned(reply).0).unwrap();
        let signed: Assignment = serde_json::from_value(envelope["signed"].clone()).unwrap();
        (signed.sequence, signed.settings)
    };
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.report();
    let (sequence, plain) = settings(&agent.send(&server, &report).await);
    assert!(plain.is_default());
    server.signal("-KILL");
    drop(server);
    let set = "image = \"minimal\"\nboot_first = \"network\"\nexec = \"report\"\n[role.thresholds]\nmemory = \"10%\"\n";
    std::fs::write(&path, config.replacen("image = \"minimal\"\n", set, 1)).unwrap();
    let server = Server::start(&site).await;
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    let thresholds = [("memory".to_owned(), "10%".to_owned())].into();
    let chosen = RoleSettings { boot_first: BootFirst::Network, exec: ExecChoice::Report, thresholds };
    assert_eq!(settings(&reply), (sequence, chosen), "signed anew, under the same sequence");
    site.signed_site().verify_director::<Assignment>(assigned(&reply).0.as_bytes()).unwrap();
}
