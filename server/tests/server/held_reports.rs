//! What a held report costs: it is looked at again at every change of the fleet, and signed once, when it is answered.

use crate::common::*;
use kiln_protocol::*;
use kiln_server::control::{Control, Told};
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
        let (fresh, _) = director.verify_director::<Freshness>(crate::common::assigned(&reply).1.as_bytes()).unwrap();
        assert_eq!(fresh.nonce, nonce);
    }
    assert_eq!(signed(&control) - before, u64::from(HELD) - 1);
}

#[tokio::test]
async fn whoever_reports_and_goes_before_the_answer_still_wakes_those_who_wait() {
    let site = TestSite::new();
    let one = site.manifest(1);
    site.publish(2);
    let (control, _stop) = control(&site).await;
    let (mut first, mut second) = (Agent::new(1, &one), Agent::new(2, &one));
    for agent in [&mut first, &mut second] {
        let report = agent.healthy();
        assigned(&reported(&control, agent, report).await);
    }
    let unwell = Some(Health { healthy: false, detail: "says so".into() });
    let report = Report { health: unwell, ..first.healthy() };
    reported(&control, &first, report).await;
    control.assign("rack-2", &"minimal/2".parse().unwrap(), Via::Cold, "test").await.unwrap();
    let sequence = control.view("rack-2").unwrap().assigned.unwrap().sequence;
    let report = second.ready(2, sequence);
    let reply = reported(&control, &second, report).await;
    assert!(matches!(assigned(&reply).2, Grant::Hold { .. }), "the first is away");
    let mut watch = control.watch();
    let report = Report { wait_s: 50, desired_etag: reply.desired.etag, ..second.ready(2, sequence) };
    let held = tokio::spawn({
        let control = control.clone();
        async move { reported(&control, &second, report).await }
    });
    until("it is held", || control.held.load(Ordering::SeqCst) == 1).await;

    // The first is well again, and its connection breaks while that is being stored.
    let mut report = Box::pin(control.report(first.key_id(), first.healthy()));
    let once = std::future::poll_fn(|context| std::task::Poll::Ready(report.as_mut().poll(context))).await;
    assert!(once.is_pending(), "nothing is answered before it is stored");
    drop(report);
    let reply = tokio::time::timeout(PATIENCE, held).await.expect("woken at once, not when its hold ends").unwrap();
    assert_eq!(*assigned(&reply).2, Grant::Go);
    let mut told = Vec::new();
    while let Ok(Told::Machine(view)) = watch.try_recv() {
        told.push((view.name.clone(), view.state.clone()));
    }
    assert!(told.contains(&("rack-1".to_owned(), "healthy".to_owned())), "those who watch are told: {told:?}");
}
