//! Kexec and cold boot: what firmware has not started is no release to come back to, and carries no second kexec.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

/// Good on 1, and healthy on 2 by kexec.
fn carried() -> Story {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec).then(Event::Granted).leaves();
    s.then(by(1, report(1, "b", 1, 2))).then(by(1, healthy(1, "b", 2, 2))).is(StateKind::Healthy);
    s
}

fn wanted_via(s: &Story) -> Via {
    let Desire::Run(assigned) = desire(&s.m, &key(1)) else { panic!("{:?}", desire(&s.m, &key(1))) };
    assigned.via
}

#[test]
fn a_release_that_only_a_kexec_can_start_strands_no_machine() {
    let mut s = carried();
    // Its power is cut, and firmware does not start it: three boots, then the one that firmware is known to start.
    s.wait(LIVE_MS);
    for _ in 0..3 {
        assert_eq!(s.m.boot_release(LIMIT), Some(&rel(2)));
        s.boots_trial(2);
    }
    assert_eq!(s.m.boot_release(LIMIT), Some(&rel(1)));
    s.then(Event::Asked).is(StateKind::FellBack);
    assert!(s.m.is_refused(&rel(2)) && s.m.assigned.as_ref().unwrap().release == rel(1));
}

#[test]
fn two_kexecs_are_never_stacked_unless_firmware_has_started_what_lies_between() {
    let mut s = carried();
    s.assign(3, Via::Kexec).is(StateKind::Healthy);
    assert_eq!(wanted_via(&s), Via::Cold);
    let why = "runs minimal/2; minimal/3 is assigned, by a cold boot instead of the kexec that was asked for: no firmware \
               has started minimal/2 here yet";
    assert_eq!(s.m.state.reason, why);
    s.then(Event::Granted).leaves();
    assert_eq!(s.m.state.reason, "leaves for minimal/3 by cold");
    // A lost DISCOVER, as where another server answers, makes no kexec of it.
    s.then(by(1, report(1, "c", 1, 3))).then(by(1, healthy(1, "c", 2, 3))).is(StateKind::Healthy);
    assert_eq!((s.m.boots.back().unwrap().via, s.m.last_good()), (Via::Cold, Some(&rel(3))));
    s.assign(1, Via::Kexec);
    assert_eq!(wanted_via(&s), Via::Kexec, "what runs is known to start from firmware");

    // The same release is cold-booted in between: then another kexec may follow.
    let mut s = carried();
    s.wait(LIVE_MS).boots_trial(2).then(by(1, healthy(1, "c", 1, 2))).assign(3, Via::Kexec);
    assert_eq!(wanted_via(&s), Via::Kexec);

    // Also an order that comes while it jumps finds it where it has arrived.
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec).then(Event::Granted).leaves().assign(3, Via::Kexec);
    s.then(by(1, report(1, "b", 1, 2)));
    assert_eq!((s.m.boots.back().unwrap().via, wanted_via(&s)), (Via::Kexec, Via::Cold));
}

#[test]
fn a_lost_last_word_makes_no_cold_boot_of_a_kexec() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec).then(Event::Granted).is(StateKind::Draining);
    s.then(by(1, report(1, "b", 1, 2))).then(by(1, healthy(1, "b", 2, 2)));
    assert_eq!((s.m.boots.back().unwrap().via, s.m.last_good()), (Via::Kexec, Some(&rel(1))));
    // It restarts from its disk, and no firmware is heard: the same release is no jump.
    s.then(by(1, report(1, "c", 1, 2))).then(by(1, healthy(1, "c", 2, 2)));
    assert_eq!((s.m.boots.back().unwrap().via, s.m.last_good()), (Via::Cold, Some(&rel(2))));
}

#[test]
fn the_way_home_from_what_was_ordered_needs_no_firmware() {
    let mut s = Story::good_on_1();
    let errand = Errand::Run { release: rel(2), class: Class::Rescue, via: Via::Kexec };
    let (id, expires) = ("01".repeat(16).parse().unwrap(), s.now + 3_600_000);
    s.then(Event::Ordered(MachineOrder { id, errand, expires, state: OrderState::Open })).leaves();
    s.then(by(1, healthy(1, "b", 1, 2)));
    assert_eq!(s.m.boots.back().unwrap().via, Via::Kexec);
    s.assign(3, Via::Kexec);
    assert_eq!(wanted_via(&s), Via::Kexec);
}

fn is_a_persons(event: &Event) -> bool {
    matches!(event, Event::Assign { .. } | Event::Ordered(_))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// What the server assigns by itself (approval, fall-back, boot loop, age, drift) goes through firmware.
    #[test]
    fn only_a_person_sends_a_machine_by_kexec(
        events in proptest::collection::vec((any_event(), 0..400_000_u64), 1..60),
        persons in any::<bool>(),
    ) {
        let mut story = Story::good_on_1();
        story.m.drift_policy = DriftPolicy::Reimage;
        story.m.max_age = Some(3_600_000);
        let (mut m, mut now) = (story.m, story.now);
        for (event, pause) in events {
            if is_a_persons(&event) && !persons {
                continue;
            }
            now += pause;
            let (before, persons_word) = (m.assigned.clone(), is_a_persons(&event));
            m = m.event(event, LIMITS, now).0;
            let Some(after) = &m.assigned else { continue };
            if !persons {
                prop_assert_eq!((after.via, m.leaves_by()), (Via::Cold, Via::Cold));
            }
            let another = before.is_none_or(|b| b.release != after.release || b.rebuild != after.rebuild);
            prop_assert!(!another || persons_word || after.via == Via::Cold, "{after:?}");
        }
    }
}
