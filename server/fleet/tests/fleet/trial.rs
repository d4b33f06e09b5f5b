//! A trial that is up and does not become healthy.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use std::collections::BTreeMap;

/// Good on release 1, and up on the trial 2.
fn on_trial() -> Story {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec).then(Event::Granted).leaves();
    s.then(by(1, report(1, "t", 1, 2))).is(StateKind::Reimaging);
    s
}

fn ready(seq: u64) -> Report {
    let sequence = 3;
    let prefetch = Prefetch { image: "minimal".parse().unwrap(), release: 1, sequence, ready: true, progress: None };
    Report { prefetch: Some(prefetch), ..unwell(1, "t", seq, 2) }
}

#[test]
fn it_falls_back_by_itself_and_leaves_under_the_limit() {
    let mut s = on_trial();
    s.reports_for(BOOT_DEADLINE_MS - 30_000, |seq| unwell(1, "t", seq, 2)).is(StateKind::Reimaging);
    s.reports_for(60_000, |seq| unwell(1, "t", seq, 2)).is(StateKind::FellBack);
    let why = "minimal/2 came up and was not healthy within 15 min (systemd is degraded; failed: web.service): \
               back on minimal/1";
    assert_eq!(s.m.state.reason, why);
    assert_eq!(s.m.check_assign(&rel(2)).unwrap_err().to_string().matches(why).count(), 1, "not offered again");
    let a = s.m.assigned.clone().unwrap();
    assert_eq!((a.release, a.sequence), (rel(1), 3));
    assert_eq!(s.m.boot_release(LIMIT), Some(&rel(1)), "also if somebody presses its button");
    assert!(matches!(desire(&s.m, &key(1)), Desire::Run(a) if a.release == rel(1)), "its agent is told so");

    // It fetches the good release while it is up, and leaves: it does no work that its leaving would end.
    let limits = Limits::default();
    let mut other = Story::good_on_1().m;
    other.id = id(2);
    let mut machines = BTreeMap::from([(id(1), s.m.clone()), (id(2), other.clone())]);
    let Grant::Hold { reason, .. } = grant(&id(1), &machines, limits) else { panic!("not fetched yet") };
    assert_eq!(reason, "it fetches minimal/1 first");
    s.then(by(1, ready(100))).is(StateKind::FellBack);
    machines.insert(id(1), s.m.clone());
    machines.insert(id(2), other.clone().event(Event::Granted, LIMITS, s.now).0);
    assert_eq!(grant(&id(1), &machines, limits), Grant::Go, "one that is away does not hold the way home");
    machines.insert(id(2), other.clone());
    s.then(Event::Granted).is(StateKind::Draining);
    s.then(by(1, ready(101))).is(StateKind::Draining);
    machines.insert(id(1), s.m.clone());
    let Grant::Hold { reason, .. } = grant(&id(2), &machines, limits) else {
        panic!("{:?}", machines[&id(2)].assigned);
    };
    assert!(reason.starts_with("it runs"), "{reason}");

    s.leaves().then(Event::Asked).then(Event::Downloads(rel(1)));
    s.then(by(1, report(1, "back", 1, 1))).then(by(1, healthy(1, "back", 2, 1))).is(StateKind::FellBack);
    assert!(s.m.is_available() && s.m.runs_assigned());
    assert_eq!(s.m.state.reason, why, "it works, and says why it is not where it was sent");
}

/// Power came back in a rack that was on its way to a bad release: all of it is up on it and unwell.
#[test]
fn machines_that_are_all_unwell_do_not_hold_each_other() {
    let mut machines: BTreeMap<MachineId, Machine> = (1..=3)
        .map(|n| {
            let mut s = on_trial();
            s.reports_for(BOOT_DEADLINE_MS + 30_000, |seq| unwell(1, "t", seq, 2)).is(StateKind::FellBack);
            s.then(by(1, ready(100))).is(StateKind::FellBack);
            s.m.id = id(n);
            (id(n), s.m)
        })
        .collect();
    let limits = Limits::default();
    assert_eq!(grant(&id(1), &machines, limits), Grant::Go, "nobody works less for it");
    let first = machines.remove(&id(1)).unwrap().event(Event::Granted, LIMITS, 10 * BOOT_DEADLINE_MS).0;
    machines.insert(id(1), first);
    assert_eq!(grant(&id(2), &machines, limits), Grant::Go, "nor is it held by another on its way home");

    // One that works is held by all of them.
    let mut works = Story::good_on_1();
    works.assign(2, Via::Kexec);
    let prefetch = Prefetch { image: "minimal".parse().unwrap(), release: 2, sequence: 2, ready: true, progress: None };
    works.then(by(1, Report { prefetch: Some(prefetch), ..healthy(1, "a", 3, 1) })).is(StateKind::Healthy);
    works.m.id = id(4);
    machines.insert(id(4), works.m);
    let Grant::Hold { reason, .. } = grant(&id(4), &machines, limits) else { panic!("it would be one more") };
    assert!(reason.starts_with("3 of at most 1"), "{reason}");
}

#[test]
fn without_an_earlier_good_release_it_stays_and_says_what_to_do() {
    let mut s = Story::new();
    s.then(by(1, report(1, "t", 1, 1))).approve();
    s.reports_for(2 * BOOT_DEADLINE_MS, |seq| unwell(1, "t", seq, 1)).is(StateKind::Degraded);
    let said = "systemd is degraded; failed: web.service; there is no earlier good release to go back to: assign \
                another with `kiln assign rack-1 NAME/N`";
    assert_eq!(s.m.state.reason, said);
    assert_eq!((s.m.assigned.clone().unwrap().sequence, s.m.refused.len()), (1, 0));
    s.then(by(1, healthy(1, "t", 1000, 1))).is(StateKind::Healthy);
    s.then(by(1, unwell(1, "t", 1001, 1))).is(StateKind::Degraded);
    assert!(!s.m.state.reason.contains("kiln assign"), "good now: {}", s.m.state.reason);
}

#[test]
fn a_root_that_was_not_published_is_given_up_too() {
    let mut s = on_trial();
    let wrong = |seq| {
        let mut r = healthy(1, "t", seq, 2);
        r.running.as_mut().unwrap().root_hash = root(9);
        r
    };
    s.reports_for(60_000, wrong).is(StateKind::Degraded);
    s.reports_for(BOOT_DEADLINE_MS, wrong).is(StateKind::Degraded);
    assert_eq!(s.m.assigned.clone().unwrap().release, rel(1), "{:?}", s.m.refused);
    assert!(s.m.is_refused(&rel(2)) && !s.m.is_available());
}

#[test]
fn silence_is_no_verdict_and_a_new_word_is_a_new_chance() {
    let mut s = on_trial();
    s.wait(BOOT_DEADLINE_MS).is(StateKind::Unreachable);
    s.reports_for(BOOT_DEADLINE_MS - 30_000, |seq| unwell(1, "t", seq, 2)).is(StateKind::Booting);
    assert_eq!(s.m.assigned.clone().unwrap().release, rel(2));
    s.then(by(1, healthy(1, "t", 1000, 2))).is(StateKind::Healthy);
    s.reports_for(2 * BOOT_DEADLINE_MS, |seq| unwell(1, "t", seq, 2)).is(StateKind::Degraded);
    assert_eq!(s.m.assigned.clone().unwrap().release, rel(2), "it was well: no time gives it up, only boots");
}

#[test]
fn a_machine_on_another_release_than_the_trial_is_not_judged_for_it() {
    let mut s = Story::good_on_1();
    s.then(by(1, report(1, "b", 1, 1))).is(StateKind::Booting).assign(2, Via::Cold);
    s.reports_for(2 * BOOT_DEADLINE_MS, |seq| unwell(1, "b", seq, 1)).is(StateKind::Degraded);
    assert_eq!(s.m.assigned.clone().unwrap().release, rel(2));
}

#[test]
fn an_order_and_a_restart_of_the_server_give_it_time_again() {
    let mut s = on_trial();
    s.reports_for(BOOT_DEADLINE_MS - 60_000, |seq| unwell(1, "t", seq, 2)).assign(2, Via::Cold);
    s.reports_for(BOOT_DEADLINE_MS - 60_000, |seq| unwell(1, "t", seq, 2)).is(StateKind::Degraded);
    s.now += BOOT_DEADLINE_MS;
    s.then(Event::ServerStarted).then(Event::Tick).is(StateKind::Degraded);
    s.reports_for(LIVE_MS + 30_000, |seq| unwell(1, "t", seq, 2)).is(StateKind::FellBack);
}

/// A machine with a disk is back on 1: its own boot loader gave the trial up.
#[test]
fn what_the_machine_itself_gave_up_is_not_offered_again() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Cold).then(Event::Granted).leaves();
    let fallback = |sequence| {
        let reason = slot::FallbackReason::TriesUsedUp;
        Some(slot::Fallback { release: rel(2), sequence, reason })
    };
    let back = |seq, sequence| Report { fallback: fallback(sequence), ..healthy(1, "back", seq, 1) };
    s.then(by(1, Report { fallback: fallback(1), ..report(1, "back", 1, 1) })).is(StateKind::Reimaging);
    assert_eq!(s.m.assigned.clone().unwrap().release, rel(2), "what failed under another assignment is known");
    s.then(by(1, Report { fallback: fallback(2), ..report(1, "back", 2, 1) })).is(StateKind::FellBack);
    let why = "minimal/2 was started as often as it may be and never became healthy (trial-tries-used-up): back on \
               minimal/1";
    assert_eq!(s.m.state.reason, why);
    let a = s.m.assigned.clone().unwrap();
    assert_eq!((a.release, a.sequence), (rel(1), 3));
    assert!(s.m.check_assign(&rel(2)).is_err(), "not offered again");
    s.then(by(1, back(3, 2))).is(StateKind::FellBack);
    assert!(s.m.is_available() && s.m.runs_assigned() && s.m.assigned.clone().unwrap().sequence == 3);
    // A person looked, and wants it tried anew: what the disk remembers of the old assignment changes nothing.
    s.then(Event::Clear).then(by(1, back(4, 2))).is(StateKind::Healthy);
    s.assign(2, Via::Cold).then(by(1, back(5, 2))).is(StateKind::Healthy);
    assert_eq!(s.m.assigned.clone().unwrap().release, rel(2));
}

/// The server lost its memory of the machine, or never had one: the machine's word says what is good.
#[test]
fn the_release_that_the_machine_came_back_on_is_good_by_its_word() {
    for reason in [slot::FallbackReason::RootSpoilt, slot::FallbackReason::BootLoop] {
        let mut s = Story::new();
        s.then(by(1, report(1, "a", 1, 2))).approve().assign(2, Via::Cold);
        let sequence = s.m.assigned.clone().unwrap().sequence;
        let fallback = Some(slot::Fallback { release: rel(2), sequence, reason });
        s.then(by(1, Report { fallback, ..report(1, "b", 1, 1) })).is(StateKind::FellBack);
        assert_eq!(s.m.assigned.clone().unwrap().release, rel(1));
        assert!(s.m.state.reason.contains(reason.as_str()), "{}", s.m.state.reason);
    }
}
