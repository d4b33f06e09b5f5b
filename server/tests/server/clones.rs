//! An identity that was copied with a disk or with firmware variables: two machines speak with one key to a running
//! `kiln serve`.

use crate::common::*;
use hyper::StatusCode;
use kiln_fleet::LATE_REPORTS;
use serde_json::json;

/// Reports, healthy; the answer is not of interest.
async fn speaks(server: &Server, agent: &mut Agent) {
    let report = agent.healthy();
    agent.send(server, &report).await;
}

#[tokio::test]
async fn a_cloned_identity_under_the_same_id_is_given_nothing_and_neither_is_the_true_one() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    speaks(&server, &mut agent).await;
    // The copy: the same key, the same id, in a machine of its own.
    let mut copy = Agent { boot: 50, seq: 0, ..agent.clone() };
    speaks(&server, &mut copy).await;
    for _ in 0..LATE_REPORTS {
        speaks(&server, &mut agent).await;
        assert_eq!(server.machine("rack-1").await.state, "healthy", "one that restarted may have left these");
        speaks(&server, &mut copy).await;
    }
    let said = "two machines report with the identity key of rack-1";
    for claimant in [&mut agent, &mut copy] {
        let report = claimant.ready(1, 1);
        assert!(waits(&claimant.send(&server, &report).await).contains(said));
    }
    let view = server.machine("rack-1").await;
    assert_eq!((view.state.as_str(), view.reason.contains(said)), ("quarantined", true), "{}", view.reason);
    let audit = server.audit().await;
    let recorded = audit.iter().any(|r| r.machine == "rack-1" && r.what.starts_with("quarantined: two machines"));
    assert!(recorded, "{audit:?}");
    // A person switched the false one off: the true one goes on where it was.
    assert_eq!(server.order("POST", "machines/rack-1/clear", json!({})).await.status, StatusCode::OK);
    let report = agent.healthy();
    assigned(&agent.send(&server, &report).await);
    assert_eq!(server.machine("rack-1").await.state, "healthy");
}

#[tokio::test]
async fn a_cloned_identity_under_an_id_of_its_own_holds_both() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    speaks(&server, &mut agent).await;
    let mut copy = Agent { n: 9, seq: 0, ..agent.clone() };
    // The first of each may be a disk that moved; in two rounds both were heard while the other lived.
    for _ in 0..2 {
        speaks(&server, &mut copy).await;
        speaks(&server, &mut agent).await;
    }
    let (mine, other) = (server.machine("rack-1").await, server.machine(machine_id(9).as_str()).await);
    let said = format!("rack-1 and {} report with one identity key", machine_id(9));
    assert_eq!((mine.state.as_str(), mine.reason.contains(&said)), ("quarantined", true), "{}", mine.reason);
    assert_eq!(other.state, "discovered", "anybody can make such machines up: it is forgotten as others are");
    assert!(other.last_words.contains("report with one identity key"), "{}", other.last_words);

    // Who approves it all the same has two machines that are held.
    assert_eq!(server.order("POST", "machines/rack-1/clear", json!({})).await.status, StatusCode::OK);
    let path = format!("machines/{}/approve", machine_id(9));
    let approved = server.order("POST", &path, json!({ "role": "lab", "name": "rack-9" })).await;
    assert_eq!(approved.status, StatusCode::OK, "{}", approved.text());
    for _ in 0..2 {
        speaks(&server, &mut agent).await;
        speaks(&server, &mut copy).await;
    }
    for name in ["rack-1", "rack-9"] {
        assert_eq!(server.machine(name).await.state, "quarantined", "{name}");
    }
    for claimant in [&mut agent, &mut copy] {
        let report = claimant.healthy();
        assert!(waits(&claimant.send(&server, &report).await).contains("one identity key"));
    }
}
