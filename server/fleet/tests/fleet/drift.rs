//! A machine that differs from its release is put up anew where its role says so, in its turn, and not for ever.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use std::collections::BTreeMap;

fn difference(kind: DriftKind) -> Difference {
    Difference { kind, what: "x".into(), text: "nc listens on tcp/4444".into() }
}

fn story() -> Story {
    let mut s = Story::good_on_1();
    s.m.drift_policy = DriftPolicy::Reimage;
    s
}

/// Its next report in this boot, with these differences.
fn says(s: &mut Story, kinds: &[DriftKind]) {
    let boot = s.m.boots.back().unwrap();
    let (name, seq) = (boot.boot_id.clone(), boot.seq + 1);
    let drift: Vec<Difference> = kinds.iter().copied().map(difference).collect();
    let drift_count = u32::try_from(drift.len()).unwrap();
    let condition = Some(Condition { drift, drift_count, ..Condition::default() });
    s.then(by(1, Report { condition, ..healthy(1, &name, seq, 1) }));
}

/// It differs, is put up anew for that, and is back. How often that was done.
fn differs_and_is_put_up_anew(s: &mut Story, boot: &str) {
    says(s, &[DriftKind::Listener]);
    let due = s.m.drift_due().unwrap();
    assert!(s.m.due(LIMITS).unwrap() <= due, "a tick comes in time");
    s.now = due - 1_000;
    s.then(Event::Tick);
    assert!(s.m.rebuilding.is_some(), "{}", s.m.why());
    s.leaves();
    s.then(by(1, healthy(1, boot, 1, 1))).is(StateKind::Healthy);
    assert!(s.m.runs_assigned() && s.m.drift_words().is_none(), "{:?}", s.m.drift_words());
}

#[test]
fn a_difference_that_lasts_is_ended_by_a_reimage_of_the_same_release() {
    let mut s = story();
    let before = s.m.assigned.clone().unwrap();
    says(&mut s, &[DriftKind::Listener]);
    let first = s.now;
    assert_eq!(s.m.drift_due(), Some(first + DRIFT_PATIENCE_MS));
    assert!(s.m.why().contains("is put up anew from 00:17:47 UTC on if that lasts"), "{}", s.m.why());
    s.now = first + DRIFT_PATIENCE_MS - 3_000;
    says(&mut s, &[DriftKind::Listener, DriftKind::User]);
    s.then(Event::Tick);
    assert_eq!(s.m.assigned.as_ref(), Some(&before), "not before its time");
    s.then(Event::Tick).is(StateKind::Healthy);
    let after = s.m.assigned.clone().unwrap();
    assert_eq!((after.release, after.via), (before.release, Via::Cold));
    assert_eq!((after.sequence, after.rebuild), (before.sequence + 1, before.sequence + 1));
    assert!(s.last.contains(&Action::Sign));
    let words = "it is put up anew for its drift (nc listens on tcp/4444)";
    assert!(s.m.state.reason.contains(words), "{}", s.m.state.reason);
    assert_eq!(s.m.why().matches(words).count(), 1, "said once: {}", s.m.why());
    assert_eq!(s.m.drift_due(), None, "it is ordered once");
    // It waits for its turn: another machine that is away has the unit.
    let image = "minimal".parse().unwrap();
    s.m.prefetch = Some(Prefetch { image, release: 1, sequence: after.sequence, ready: true, progress: None });
    let mut away = Story::good_on_1().m;
    (away.id, away.name) = (id(2), Some("rack-2".into()));
    away.state.kind = StateKind::Unreachable;
    let machines: BTreeMap<MachineId, Machine> = [(id(1), s.m.clone()), (id(2), away)].into();
    let Grant::Hold { reason, .. } = grant(&id(1), &machines, LIMITS) else { panic!("it goes") };
    assert!(reason.contains("rack-2 is unreachable"), "{reason}");
    // Also while it drains it says why.
    s.then(Event::Granted).is(StateKind::Draining);
    assert!(s.m.why().contains(words), "{}", s.m.why());
}

#[test]
fn what_passes_what_a_reimage_does_not_mend_and_what_is_only_reported_is_left() {
    let mut passes = story();
    says(&mut passes, &[DriftKind::Listener]);
    says(&mut passes, &[]);
    assert_eq!((passes.m.drift_due(), passes.m.drift_words()), (None, None));
    let mut clock = story();
    says(&mut clock, &[DriftKind::Clock]);
    assert_eq!(clock.m.drift_due(), None, "the clock would be as wrong after it");
    let mut told = story();
    told.m.drift_policy = DriftPolicy::Report;
    says(&mut told, &[DriftKind::Listener]);
    told.now += DRIFT_PATIENCE_MS;
    told.then(Event::Tick);
    assert_eq!((told.m.drift_due(), told.m.drift_words(), told.m.rebuilding.clone()), (None, None, None));
    assert_eq!(told.m.condition.drift_count, 1, "it is shown all the same");
    let mut moving = story();
    says(&mut moving, &[DriftKind::Listener]);
    moving.assign(2, Via::Cold);
    assert_eq!(moving.m.drift_due(), None, "it goes elsewhere anyhow");
    // More differences than a report names are differences too.
    let mut many = story();
    let condition = Condition { drift: vec![difference(DriftKind::Clock)], drift_count: 2, ..Condition::default() };
    many.then(by(1, Report { condition: Some(condition), ..healthy(1, "a", 3, 1) }));
    assert!(many.m.drift_due().is_some());
}

#[test]
fn a_machine_that_differs_again_and_again_is_held_and_a_person_looks() {
    let mut s = story();
    for boot in ["b", "c"] {
        differs_and_is_put_up_anew(&mut s, boot);
    }
    let sequence = s.m.assigned.as_ref().unwrap().sequence;
    says(&mut s, &[DriftKind::Listener]);
    s.now = s.m.drift_due().unwrap();
    s.then(Event::Tick).is(StateKind::Healthy);
    assert_eq!(s.m.assigned.as_ref().unwrap().sequence, sequence, "not a third time");
    let held = s.m.drift_words().unwrap();
    assert!(held.contains("put up anew 2 times within 24 h") && held.contains("kiln machine clear rack-1"), "{held}");
    assert!(s.last.iter().any(|a| matches!(a, Action::Say { warn: true, text } if *text == held)), "it is an alarm");
    assert!(s.m.why().contains(&held) && s.m.last_words == held, "and shown");
    // For ever: it stays held over days, reports, restarts of the machine and of the server.
    s.now += 10 * DRIFT_WINDOW_MS;
    s.then(by(1, healthy(1, "d", 1, 1)));
    says(&mut s, &[DriftKind::Listener]);
    s.wait(DRIFT_PATIENCE_MS);
    let mut kept: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    (kept.boots, kept.drift_policy) = (s.m.boots.clone(), DriftPolicy::Reimage);
    s.m = kept;
    s.then(Event::ServerStarted).then(Event::Tick);
    assert_eq!(s.m.assigned.as_ref().unwrap().sequence, sequence);
    assert_eq!(s.m.drift_words().as_ref(), Some(&held));
    // A person's word ends it.
    s.then(Event::Clear);
    differs_and_is_put_up_anew(&mut s, "e");
}

#[test]
fn seldom_is_not_again() {
    let mut s = story();
    for boot in ["b", "c", "d", "e"] {
        differs_and_is_put_up_anew(&mut s, boot);
        s.now += DRIFT_WINDOW_MS;
        says(&mut s, &[]);
    }
}

#[test]
fn a_dead_machine_does_not_keep_others_from_their_way_back() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec);
    s.leaves();
    s.then(by(1, unwell(1, "b", 1, 2)));
    s.reports_for(BOOT_DEADLINE_MS + 60_000, |seq| unwell(1, "b", seq, 2)).is(StateKind::FellBack);
    let sequence = s.m.assigned.as_ref().unwrap().sequence;
    let image = "minimal".parse().unwrap();
    s.m.prefetch = Some(Prefetch { image, release: 1, sequence, ready: true, progress: None });
    let mut dead = Story::good_on_1().m;
    (dead.id, dead.name) = (id(2), Some("rack-2".into()));
    dead.state.kind = StateKind::Unreachable;
    let go = |m: &Machine| {
        let machines: BTreeMap<MachineId, Machine> = [(id(1), m.clone()), (id(2), dead.clone())].into();
        grant(&id(1), &machines, LIMITS) == Grant::Go
    };
    assert!(go(&s.m));
    // One that does its work on what it runs waits like any other, and so does one that goes forward.
    let mut works = s.m.clone();
    works.health = Some(Health { healthy: true, detail: String::new() });
    assert!(!go(&works));
    let mut forward = s.m.clone();
    forward.fell_back = None;
    assert!(!go(&forward));
}
