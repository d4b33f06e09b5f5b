//! A good release that comes up again and again and is never healthy.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;

/// It comes up, says so by the hand-over or by its service, and its power goes, or its kernel dies.
fn comes_up(s: &mut Story, boot: &str, release: u64, service: bool) {
    s.then(Event::Asked).then(Event::Downloads(rel(release))).then(Event::Downloaded);
    s.then(by(1, report(1, boot, 1, release)));
    let last = if service {
        unwell(1, boot, 2, release)
    } else {
        let mut r = report(1, boot, 2, release);
        r.stages = vec![StageRecord { stage: Stage::Handover, state: StageState::Started, at_ms: r.at_ms }];
        r
    };
    s.then(by(1, last)).wait(LIVE_MS);
}

fn waits(s: &Story) -> String {
    match desire(&s.m, &key(1)) {
        Desire::Wait(reason) => reason,
        Desire::Run(a) => panic!("runs {}", a.release),
    }
}

/// Good on 1, then on 2.
pub fn good_on_both() -> Story {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Cold).then(Event::Granted).leaves();
    s.then(Event::Asked).then(Event::Downloads(rel(2))).then(by(1, report(1, "b", 1, 2)));
    s.then(by(1, healthy(1, "b", 2, 2))).is(StateKind::Healthy);
    assert_eq!(s.m.good, [rel(1), rel(2)]);
    s.wait(LIVE_MS);
    s
}

#[test]
fn it_ends_in_the_older_good_release() {
    let mut s = good_on_both();
    for n in 0..LOOP_STARTS {
        comes_up(&mut s, &format!("l{n}"), 2, n % 2 == 0);
        assert_eq!(s.m.assigned.as_ref().unwrap().release, rel(2), "start {n}");
        assert_eq!(s.m.boot_loop.starts.len(), n, "a start counts once the next one reports");
    }
    s.then(Event::Asked).then(Event::Downloads(rel(2))).then(by(1, report(1, "last", 1, 2))).is(StateKind::FellBack);
    assert!(s.last.contains(&Action::Sign) && s.last.contains(&Action::Save) && s.last.contains(&Action::Wake));
    let a = s.m.assigned.clone().unwrap();
    assert_eq!((a.release, a.via), (rel(1), Via::Cold));
    assert!(s.m.state.reason.starts_with("minimal/2 came up 5 times in a row and was never healthy"));
    assert!(s.m.is_refused(&rel(2)) && s.m.boot_loop.starts.is_empty());
    assert!(matches!(desire(&s.m, &key(1)), Desire::Run(a) if a.release == rel(1)), "its agent is told so");
}

#[test]
fn without_another_it_rests_and_tries_once_more_and_a_person_ends_that() {
    let mut s = Story::good_on_1();
    s.wait(LIVE_MS);
    for n in 0..LOOP_STARTS {
        comes_up(&mut s, &format!("l{n}"), 1, true);
    }
    s.then(Event::Asked).then(Event::Downloads(rel(1))).then(by(1, report(1, "rests", 1, 1)));
    assert!(waits(&s).starts_with("boot loop: minimal/1 came up 5 times in a row"), "{}", waits(&s));
    assert!(waits(&s).contains("kiln machine clear rack-1"), "{}", waits(&s));
    assert_eq!(s.m.boot_release(LIMIT), Some(&rel(1)), "its agent is what rests");
    assert!(!s.m.is_refused(&rel(1)));

    // After the rest it has one start, not all of them.
    let until = s.m.boot_loop.rests_until.unwrap();
    assert!(s.m.due(LIMITS).is_some_and(|due| due <= until));
    let mut later = Story { m: s.m.clone(), now: until, last: vec![] };
    later.then(Event::Tick);
    assert!(later.last.contains(&Action::Wake) && matches!(desire(&later.m, &key(1)), Desire::Run(_)));
    later.then(by(1, unwell(1, "rests", 2, 1)));
    assert!(matches!(desire(&later.m, &key(1)), Desire::Run(_)), "what runs is left alone");
    later.wait(LIVE_MS).then(Event::Asked).then(by(1, report(1, "again", 1, 1)));
    assert!(waits(&later).starts_with("boot loop:"), "{}", waits(&later));
    // Once healthy, all is forgotten.
    later.now = later.m.boot_loop.rests_until.unwrap();
    later.then(Event::Tick).then(by(1, healthy(1, "again", 2, 1))).is(StateKind::Healthy);
    assert_eq!(later.m.boot_loop, BootLoop { well: true, ..BootLoop::default() });

    for ends in [Event::Clear, Event::Assign { release: rel(3), via: Via::Cold.into() }] {
        let mut s = Story { m: s.m.clone(), now: s.now, last: vec![] };
        s.then(ends);
        assert!(s.last.contains(&Action::Wake) && matches!(desire(&s.m, &key(1)), Desire::Run(_)));
    }
}

#[test]
fn starts_of_yesterday_and_those_that_end_before_the_hand_over_do_not_count() {
    let mut s = good_on_both();
    for n in 0..20 {
        comes_up(&mut s, &format!("l{n}"), 2, true);
        s.wait(LOOP_WINDOW_MS / 3);
    }
    assert_eq!(s.m.assigned.as_ref().unwrap().release, rel(2));
    assert!(s.m.boot_loop.starts.len() < LOOP_STARTS);
    let mut s = good_on_both();
    for n in 0..20 {
        s.then(Event::Asked).then(Event::Downloads(rel(2))).then(by(1, report(1, &format!("l{n}"), 1, 2)));
        s.wait(LIVE_MS);
    }
    assert!(s.m.boot_loop.starts.is_empty() && s.m.assigned.as_ref().unwrap().release == rel(2));
}

#[test]
fn one_that_leaves_unwell_has_not_failed_to_start() {
    let mut s = good_on_both();
    for n in 0..20 {
        let boot = format!("l{n}");
        s.then(by(1, report(1, &boot, 1, 2))).then(by(1, unwell(1, &boot, 2, 2)));
        s.then(by(1, going(1, &boot, 3, 2)));
    }
    assert!(s.m.boot_loop.starts.is_empty());
}
