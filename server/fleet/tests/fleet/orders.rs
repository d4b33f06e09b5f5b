//! What the server does about operators' orders.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;

fn order(n: u8, errand: Errand, expires: Millis) -> Event {
    let id = format!("{n:02x}").repeat(16).parse().unwrap();
    Event::Ordered(MachineOrder { id, errand, expires, state: OrderState::Open })
}

fn rescue(release: u64) -> Errand {
    Errand::Run { release: rel(release), class: Class::Rescue, via: Via::Kexec }
}

fn state(s: &Story) -> String {
    s.m.orders.back().unwrap().state.to_string()
}

/// The agent leaves and comes back on this release.
fn reimages(s: &mut Story, boot: &str, release: u64) {
    s.leaves();
    s.then(by(1, healthy(1, boot, 1, release)));
}

const HOUR: Millis = 3_600_000;

#[test]
fn an_ordered_release_runs_until_the_order_is_over_and_is_never_one_to_come_back_to() {
    let mut s = Story::good_on_1();
    let over = s.now + HOUR;
    s.then(order(1, rescue(2), over));
    assert_eq!(s.m.open_order().unwrap().id, "01".repeat(16).parse().unwrap());
    assert_eq!(s.m.assigned.as_ref().unwrap().release, rel(2));
    assert!(s.last.contains(&Action::Sign) && s.last.contains(&Action::Wake));
    reimages(&mut s, "b", 2);
    s.is(StateKind::Healthy);
    assert_eq!((state(&s).as_str(), s.m.last_good()), ("done", Some(&rel(1))));
    assert!(s.m.open_order().is_some(), "it needs the order again at each start");
    assert_eq!(s.m.due(LIMITS).map(|due| due <= over), Some(true));
    s.now = over;
    s.then(Event::Tick);
    assert_eq!((state(&s).as_str(), s.m.open_order()), ("expired", None));
    let home = s.m.assigned.clone().unwrap();
    assert_eq!((home.release, home.via, home.order), (rel(1), Via::Cold, None));
    reimages(&mut s, "c", 1);
    s.is(StateKind::Healthy);
    assert!(s.m.due(LIMITS).is_none_or(|due| due > s.now), "nothing more is to be done about it");
}

#[test]
fn an_assignment_ends_an_order_and_an_ordinary_release_needs_none() {
    let mut s = Story::good_on_1();
    let over = s.now + HOUR;
    s.then(order(1, rescue(2), over)).assign(3, Via::Kexec);
    assert_eq!((state(&s).as_str(), s.m.open_order()), ("superseded", None));
    assert_eq!(s.m.assigned.as_ref().unwrap().order, None);
    s.then(order(2, Errand::Run { release: rel(2), class: Class::Normal, via: Via::Kexec }, over));
    assert_eq!((s.m.assigned.as_ref().unwrap().order.as_ref(), s.m.open_order()), (None, None));
    reimages(&mut s, "b", 2);
    assert_eq!((state(&s).as_str(), s.m.last_good()), ("done", Some(&rel(1))), "a kexec alone proves nothing");
    s.then(by(1, healthy(1, "c", 1, 2)));
    assert_eq!((state(&s).as_str(), s.m.last_good()), ("done", Some(&rel(2))));
    // The same order once more changes nothing.
    let before = s.m.clone();
    s.then(order(2, rescue(3), over));
    assert_eq!(s.m.orders, before.orders);
    assert_eq!(s.m.assigned, before.assigned);
}

#[test]
fn a_rescue_release_that_does_not_come_up_is_given_up() {
    let mut s = Story::good_on_1();
    let over = s.now + 24 * HOUR;
    s.then(order(1, rescue(2), over)).leaves();
    for _ in 0..LIMIT {
        s.boots_trial(2);
    }
    s.then(Event::Asked).is(StateKind::FellBack);
    assert_eq!(s.m.assigned.as_ref().unwrap().release, rel(1));
    assert!(state(&s).starts_with("failed: minimal/2"), "{}", state(&s));
    assert_eq!(s.m.open_order(), None);
}

#[test]
fn what_the_machine_refuses_is_recorded_with_its_reason() {
    let mut s = Story::good_on_1();
    let over = s.now + HOUR;
    s.then(order(1, Errand::Wipe, over));
    let boot = s.m.boots.back().unwrap();
    let mut report = healthy(1, &boot.boot_id.clone(), boot.seq + 1, 1);
    let failure =
        Failure { kind: "order-expired".into(), message: "by my clock".into(), attempt: 1, retry_in_ms: Some(60_000) };
    report.stages = vec![StageRecord { stage: Stage::Wipe, state: StageState::Failed(failure), at_ms: report.at_ms }];
    s.then(by(1, report));
    assert_eq!(state(&s), "refused: order-expired: by my clock");
    assert!(s.m.last_words.contains("by my clock") && s.last.contains(&Action::Save));
    assert_eq!(s.m.open_order(), None, "it is not asked again and again");

    // A release that it refuses is no longer what it shall run.
    s.then(order(2, rescue(2), over));
    let boot = s.m.boots.back().unwrap();
    let mut report = healthy(1, &boot.boot_id.clone(), boot.seq + 1, 1);
    let failure =
        Failure { kind: "order-replayed".into(), message: "again".into(), attempt: 1, retry_in_ms: Some(60_000) };
    report.stages =
        vec![StageRecord { stage: Stage::Prefetch, state: StageState::Failed(failure), at_ms: report.at_ms }];
    s.then(by(1, report)).is(StateKind::Healthy);
    assert_eq!(state(&s), "refused: order-replayed: again");
    let home = s.m.assigned.as_ref().unwrap();
    assert_eq!((&home.release, &home.order), (&rel(1), &None));
}

#[test]
fn a_wipe_is_for_machines_that_go_and_for_those_that_come() {
    let mut discovered = Story::new();
    discovered.then(by(1, report(1, "a", 1, 1))).is(StateKind::Discovered);
    let mut retired = Story::good_on_1();
    retired.then(Event::Retire).is(StateKind::Retired);
    for mut s in [discovered, retired, Story::good_on_1()] {
        assert_eq!(s.m.check_order(&Errand::Wipe), Ok(()));
        let (over, kind) = (s.now + HOUR, s.m.state.kind);
        s.then(order(1, Errand::Wipe, over)).is(kind);
        let id: OrderId = "01".repeat(16).parse().unwrap();
        s.then(Event::Wiped { order: "99".repeat(16).parse().unwrap(), failed: vec![] });
        assert_eq!(state(&s), "open", "another order's receipt");
        let mut failed = s.m.clone();
        s.then(Event::Wiped { order: id.clone(), failed: vec![] });
        assert_eq!((state(&s).as_str(), s.m.open_order()), ("done", None));
        let (next, out) = failed.event(Event::Wiped { order: id, failed: vec!["sda (S1): EIO".into()] }, LIMITS, s.now);
        failed = next;
        assert_eq!(failed.orders.back().unwrap().state.to_string(), "failed: not wiped: sda (S1): EIO");
        assert!(out.iter().any(|a| matches!(a, Action::Say { warn: true, .. })));
    }
    let mut s = Story::good_on_1();
    assert!(matches!(Story::new().m.check_order(&rescue(2)), Err(Refusal::NotApproved { .. })));
    s.then(Event::Retire);
    assert!(matches!(s.m.check_order(&rescue(2)), Err(Refusal::Retired { .. })));
}

#[test]
fn no_more_orders_are_remembered_than_are_kept() {
    let mut s = Story::good_on_1();
    for n in 1..=40 {
        let over = s.now + HOUR;
        s.then(order(n, Errand::Wipe, over));
    }
    assert_eq!(s.m.orders.len(), ORDERS_KEPT);
    assert_eq!(s.m.orders.iter().filter(|order| order.is_open()).count(), 1, "the newest one");
    let text = serde_json::to_string(&s.m).unwrap();
    assert_eq!(serde_json::from_str::<Machine>(&text).unwrap().orders, s.m.orders);
    // A row of before there were orders.
    let old: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut old = old.as_object().unwrap().clone();
    old.remove("orders");
    assert!(serde_json::from_value::<Machine>(old.into()).unwrap().orders.is_empty());
}
