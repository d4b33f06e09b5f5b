//! What a held report costs: it is looked at again at every change of the fleet, and signed once, when it is answered.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use kiln_protocol::*;
use kiln_server::control::Control;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

const HELD: u8 = 100;
const CHANGES: u64 = 20;

fn looked(control: &Control) -> u64 {
    control.counts.looked.load(Ordering::SeqCst)
}

fn signed(control: &Control) -> u64 {
    control.counts.signed.load(Ordering::SeqCst)
}

/// Lets the others run until it is so.
async fn until(what: &str, so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        tokio::task::yield_now().await;
    }
}

async fn reported(control: &Arc<Control>, agent: &Agent, report: Report) -> Reply {
    control.report(agent.key_id(), report).await.unwrap()
}

#[tokio::test]
async fn a_change_that_is_none_of_its_business_signs_nothing_for_a_held_report() {
    let site = TestSite::new();
    let one = site.manifest(1);
    site.publish(2);
    let mut config = std::fs::read_to_string(site.path().join("kiln.toml")).unwrap();
    for n in 10..10 + HELD {
        writeln!(config, "[[machine]]\nid = \"{}\"\nname = \"rack-{n}\"\nrole = \"lab\"", machine_id(n)).unwrap();
    }
    std::fs::write(site.path().join("kiln.toml"), config).unwrap();
    let (control, stop) = control(&site).await;
    let mut held = Vec::new();
    for n in 10..10 + HELD {
        let mut agent = Agent::new(n, &one);
        let report = agent.healthy();
        assigned(&reported(&control, &agent, report).await);
        control.assign(machine_id(n).as_str(), &"minimal/1".parse().unwrap(), Via::Cold, "test").await.unwrap();
        let report = agent.healthy();
        let desired_etag = reported(&control, &agent, report).await.desired.etag;
        let report = Report { wait_s: 50, desired_etag, ..agent.healthy() };
        let (nonce, control) = (report.nonce.clone(), control.clone());
        held.push((n, nonce, tokio::spawn(async move { reported(&control, &agent, report).await })));
    }
    let all = usize::from(HELD);
    until("all are held", || control.held.load(Ordering::SeqCst) == all).await;

    // Somebody else comes and goes: that wakes everybody.
    let mut other = Agent::new(1, &one);
    let before = signed(&control);
    for change in 0..CHANGES {
        let seen = looked(&control);
        let mut report = other.healthy();
        report.health = Some(Health { healthy: change % 2 == 0, detail: "says so".into() });
        reported(&control, &other, report).await;
        until("everybody looks", || looked(&control) > seen + u64::from(HELD)).await;
    }
    let (looks, signatures) = (u64::from(HELD) * CHANGES, signed(&control) - before);
    println!("{HELD} held reports, {CHANGES} changes: {looks} looks, {signatures} signatures");
    assert_eq!(signatures, CHANGES + 1, "one for each of the other's own replies, and its assignment");
    assert_eq!(control.held.load(Ordering::SeqCst), all);

    // Its own change is answered at once, with a statement for its own nonce.
    let before = signed(&control);
    let (n, nonce, task) = held.pop().unwrap();
    control.assign(machine_id(n).as_str(), &"minimal/2".parse().unwrap(), Via::Cold, "test").await.unwrap();
    let reply = task.await.unwrap();
    let (assignment, freshness, _) = assigned(&reply);
    let director = site.signed_site();
    let (assigned, sha256) = director.verify_director::<Assignment>(assignment.as_bytes()).unwrap();
    assert_eq!(assigned.release, 2);
    let (fresh, _) = director.verify_director::<Freshness>(freshness.as_bytes()).unwrap();
    check_freshness(&fresh, &nonce, &sha256.parse().unwrap()).unwrap();
    assert_eq!(signed(&control) - before, 2, "the assignment and its freshness");

    // At the end of the server everybody gets a whole answer.
    let before = signed(&control);
    stop.send(true).unwrap();
    for (_, nonce, task) in held {
        let reply = task.await.unwrap();
        let (fresh, _) = director.verify_director::<Freshness>(common::assigned(&reply).1.as_bytes()).unwrap();
        assert_eq!(fresh.nonce, nonce);
    }
    assert_eq!(signed(&control) - before, u64::from(HELD) - 1);
}
