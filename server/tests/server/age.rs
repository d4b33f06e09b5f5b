//! A role's `max_age`, from `kiln.toml` to what the director signs. Whose turn comes when is in `server/fleet/tests/fleet/age.rs`.

use crate::common::*;
use kiln_protocol::*;
use sqlx::{AnyConnection, Connection};
use std::time::Instant;

/// What the director signed, by the site's own keys.
fn signed(site: &TestSite, reply: &Reply) -> Assignment {
    site.signed_site().verify_director(assigned(reply).0.as_bytes()).unwrap().0
}

/// Lets an hour pass for the machines of a server that does not run.
async fn an_hour_later(site: &TestSite) {
    sqlx::any::install_default_drivers();
    let mut db = AnyConnection::connect(&format!("sqlite://{}", site.site.database().display())).await.unwrap();
    let earlier = "UPDATE boots SET doc = json_set(doc, '$.started', json_extract(doc, '$.started') - 3600000)";
    let boots = sqlx::query(earlier).execute(&mut db).await.unwrap();
    assert_eq!(boots.rows_affected(), 1);
    db.close().await.unwrap();
}

#[tokio::test]
async fn a_machine_that_is_too_old_for_its_role_is_signed_a_rebuild_once() {
    let site = TestSite::new();
    let path = site.path().join("kiln.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replacen("image = \"minimal\"\n", "image = \"minimal\"\nmax_age = \"1h\"\n", 1))
        .unwrap();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    let young = signed(&site, &agent.send(&server, &report).await);
    assert_eq!((young.release, young.rebuild), (1, 0));
    let view = server.machine("rack-1").await;
    let due = view.rebuild_due_ms.unwrap() - view.last_seen_ms;
    assert!((40 * 60_000..=60 * 60_000).contains(&due), "in the last quarter of an hour: {due} ms");

    server.signal("-KILL");
    drop(server);
    an_hour_later(&site).await;
    let server = Server::start(&site).await;
    let (begun, mut desired_etag) = (Instant::now(), String::new());
    let (old, via) = loop {
        // Answered at once the first time, then when something else is wanted of it.
        let report = Report { wait_s: 10, desired_etag, ..agent.healthy() };
        let reply = agent.send(&server, &report).await;
        let Decision::Assigned { via, .. } = &reply.desired.decision else { panic!("{reply:?}") };
        let assignment = signed(&site, &reply);
        if assignment.rebuild > 0 {
            break (assignment, *via);
        }
        assert!(begun.elapsed() < PATIENCE, "it is never put up anew: {:?}", server.machine("rack-1").await);
        desired_etag = reply.desired.etag;
    };
    let next = young.sequence + 1;
    assert_eq!((old.release, old.sequence, old.rebuild, via), (1, next, next, Via::Cold));
    assert!(server.machine("rack-1").await.reason.contains("for its age"), "{:?}", server.machine("rack-1").await);

    // It comes back by a boot of its own, is young, and is left alone.
    agent.restart(&site.manifest(1));
    let report = agent.healthy();
    let back = signed(&site, &agent.send(&server, &report).await);
    assert_eq!((back.sequence, back.rebuild), (next, next));
    let view = server.machine("rack-1").await;
    assert!(view.state == "healthy" && view.rebuild_due_ms.is_some_and(|due| due > view.last_seen_ms), "{view:?}");
}
