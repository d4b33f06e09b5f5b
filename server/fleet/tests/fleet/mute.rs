//! A good release whose kernel dies before its agent speaks: counted from DISCOVER to DISCOVER.

use crate::bootloop::good_on_both;
use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use std::sync::Arc;

/// Its firmware gets the whole boot program, and nothing is heard after it.
fn dies(s: &mut Story, release: u64) {
    s.then(Event::Asked).then(Event::Downloads(rel(release))).then(Event::Downloaded).wait(60_000);
}

fn given(s: &Story) -> u64 {
    s.m.boot_release(LIMIT).unwrap().release
}

fn is_told(s: &Story) -> bool {
    s.m.boots.back().unwrap().stages.iter().any(|record| match &record.state {
        StageState::Failed(f) => record.stage == Stage::Start && f.kind == BOOT_LOOP,
        StageState::Started | StageState::Done | StageState::Waiting { .. } => false,
    })
}

#[test]
fn another_good_release_is_given_and_becomes_its_own_once_its_agent_speaks() {
    let mut s = good_on_both();
    for n in 0..MUTE_STARTS {
        assert_eq!(given(&s), 2, "start {n}");
        dies(&mut s, 2);
        assert_eq!((s.m.boot_loop.mute, is_told(&s)), (n, false), "a start counts once the firmware asks anew");
    }
    assert_eq!(given(&s), 1, "decided before the packet is recorded");
    s.then(Event::Asked).is(StateKind::Booting);
    let why = "boot loop: minimal/2 was started 5 times in a row and its agent never spoke: its firmware is given \
               minimal/1, which was good here";
    assert_eq!(s.m.state.reason, why);
    assert_eq!(s.m.last_words, format!("{}: {why}", Stage::Start.label()));
    let told = s.last.iter().filter(|a| matches!(a, Action::Stage(r) if r.stage == Stage::Start)).count();
    assert!(told == 1 && is_told(&s) && s.last.contains(&Action::Save), "{:?}", s.last);
    s.then(Event::Asked);
    assert_eq!((s.m.boot_loop.mute, given(&s)), (MUTE_STARTS, 1), "a firmware repeats itself");
    assert!(!s.last.iter().any(|a| matches!(a, Action::Stage(_))), "told once for each start: {:?}", s.last);
    s.then(Event::Downloads(rel(1))).then(Event::Downloaded);
    assert_eq!(s.m.state.reason, format!("downloads minimal/1; {why}"));
    assert!(is_told(&s), "not taken back by a download");
    let a = s.m.assigned.clone().unwrap();
    assert!(a.release == rel(2) && s.m.refused.is_empty(), "packets assign nothing and quarantine nothing");

    s.then(by(1, report(1, "back", 1, 1))).is(StateKind::FellBack);
    assert!(s.last.contains(&Action::Sign) && s.last.contains(&Action::Save) && s.last.contains(&Action::Wake));
    let back = s.m.assigned.clone().unwrap();
    assert_eq!((back.release, back.sequence, back.via), (rel(1), a.sequence + 1, Via::Cold));
    let reason = "minimal/2 was started 5 times in a row and its agent never spoke: back on minimal/1";
    assert_eq!(s.m.state.reason, reason);
    assert!(s.m.is_refused(&rel(2)) && s.m.boot_loop == BootLoop::default());
    assert!(matches!(desire(&s.m, &key(1)), Desire::Run(a) if a.release == rel(1)), "its agent is told so");
}

#[test]
fn any_word_of_its_agent_ends_the_count() {
    let mut s = good_on_both();
    for n in 0..4 {
        for _ in 1..MUTE_STARTS {
            dies(&mut s, 2);
        }
        s.then(Event::Asked).then(Event::Downloads(rel(2))).then(by(1, report(1, &format!("up{n}"), 1, 2)));
        assert_eq!((s.m.boot_loop.mute, given(&s)), (0, 2));
        s.wait(LIVE_MS);
    }
    // Also that of the boot that ran all the while: the packets were somebody else's.
    let mut s = good_on_both();
    for _ in 0..MUTE_STARTS {
        dies(&mut s, 2);
    }
    s.then(Event::Asked);
    assert_eq!((s.m.boot_loop.mute, given(&s)), (MUTE_STARTS, 1));
    s.then(by(1, healthy(1, "b", 3, 2))).is(StateKind::Healthy);
    assert_eq!((s.m.boot_loop.mute, given(&s), s.m.assigned.unwrap().release), (0, 2, rel(2)));
}

#[test]
fn what_is_no_start_of_a_good_release_does_not_count() {
    let mut s = good_on_both();
    for _ in 0..20 {
        // The power goes in the middle of the download.
        s.then(Event::Asked).then(Event::Downloads(rel(2))).then(Event::TakesBytes).wait(60_000);
    }
    assert_eq!((s.m.boot_loop.mute, given(&s)), (0, 2));
    for _ in 0..20 {
        // Another release than what it is given; and somebody fetches a file for which no firmware asked.
        dies(&mut s, 3);
        s.then(Event::Downloads(rel(2))).then(Event::Downloaded);
    }
    assert_eq!((s.m.boot_loop.mute, given(&s)), (0, 2));
    // A trial has its own count, and a machine that nobody approved none.
    s.assign(3, Via::Cold);
    for _ in 0..2 {
        dies(&mut s, 3);
    }
    assert_eq!((s.m.boot_loop.mute, s.m.attempts), (0, 2));
    let mut s = Story::new();
    for _ in 0..20 {
        dies(&mut s, 1);
    }
    assert_eq!((s.m.boot_loop.mute, s.m.boot_release(LIMIT)), (0, None));
}

#[test]
fn without_another_it_is_given_again_with_growing_pauses_and_a_person_ends_that() {
    let mut s = Story::good_on_1();
    s.wait(LIVE_MS);
    let mut pauses = Vec::new();
    for _ in 0..MUTE_STARTS + 6 {
        dies(&mut s, 1);
        assert_eq!(given(&s), 1, "its firmware is always given something");
        let pause = s.m.pause_s();
        assert_eq!(pause.is_some(), is_told(&s));
        pauses.extend(pause.map(|(seconds, _)| seconds));
    }
    assert_eq!(pauses, [5, 10, 20, 40, 40, 40]);
    assert_eq!(*pauses.last().unwrap(), LONGEST_PAUSE_S);
    s.then(Event::Asked).is(StateKind::Booting);
    let reason = &s.m.state.reason;
    assert!(reason.starts_with("boot loop: minimal/1 was started 11 times in a row"), "{reason}");
    assert!(reason.contains("no other release is known to be good here"), "{reason}");
    assert!(reason.contains("`kiln assign rack-1 NAME/N`"), "{reason}");
    assert!(s.m.refused.is_empty() && s.m.assigned.as_ref().unwrap().sequence == 1);
    for ends in [Event::Clear, Event::Assign { release: rel(1), via: Via::Cold.into() }] {
        let mut s = Story { m: s.m.clone(), now: s.now, last: vec![] };
        s.then(ends);
        assert_eq!((s.m.boot_loop.mute, s.m.pause_s()), (0, None));
    }
    // Or its agent, if it was a supply that flickered.
    s.then(Event::Downloads(rel(1))).then(by(1, report(1, "up", 1, 1)));
    s.then(by(1, healthy(1, "up", 2, 1))).is(StateKind::Healthy);
    assert!(s.m.boot_loop.mute == 0 && s.m.refused.is_empty());
}

#[test]
fn two_that_are_mute_are_given_in_turn() {
    let mut s = good_on_both();
    let mut turns = Vec::new();
    for _ in 0..4 * MUTE_STARTS {
        let release = given(&s);
        turns.push(release);
        dies(&mut s, release);
    }
    let of = |release: u64| vec![release; usize::try_from(MUTE_STARTS).unwrap()];
    assert_eq!(turns, [of(2), of(1), of(2), of(1)].concat());
    s.then(Event::Asked);
    let reason = &s.m.state.reason;
    assert!(
        reason.starts_with("boot loop: 20 starts in a row in which no agent spoke, of minimal/2 and minimal/1"),
        "{reason}"
    );
    assert_eq!(s.m.pause_s().unwrap().0, LONGEST_PAUSE_S);
    s.m.boot_loop.mute = u32::MAX;
    dies(&mut s, 2);
    assert_eq!(s.then(Event::Asked).m.boot_loop.mute, u32::MAX, "it does not begin anew at nothing");
}

#[test]
fn a_release_below_the_floor_is_no_way_back() {
    let mut s = good_on_both();
    s.m.floors = Arc::new([("minimal".to_owned(), 2)].into());
    assert_eq!(s.m.last_good(), Some(&rel(2)));
    for _ in 0..2 * MUTE_STARTS {
        dies(&mut s, 2);
        assert_eq!(given(&s), 2);
    }
    s.then(Event::Asked);
    assert!(s.m.state.reason.contains("no other release is known to be good here"), "{}", s.m.state.reason);
}

#[test]
fn what_the_repository_does_not_hold_is_no_way_back() {
    let mut s = good_on_both();
    s.m.fit = Some(Arc::new([rel(2)].into()));
    for _ in 0..3 * MUTE_STARTS {
        dies(&mut s, 2);
        assert_eq!(given(&s), 2, "never one that cannot be given");
    }
    s.then(Event::Asked);
    assert!(s.m.state.reason.contains("no other release is known to be good here"), "{}", s.m.state.reason);
    s.m.fit = Some(Arc::new([rel(1), rel(2)].into()));
    assert_eq!(given(&s), 1, "once it is there again, and the starts were three times five");
    s.m.fit = Some(Arc::default());
    assert_eq!((s.m.last_good(), s.m.last_good_here(), given(&s)), (None, Some(&rel(2)), 2));
}

#[test]
fn packets_that_are_kept_decide_what_is_served_and_nothing_else() {
    let mut s = good_on_both();
    s.then(Event::Asked).then(Event::Downloads(rel(2))).then(by(1, report(1, "c", 1, 2)));
    s.then(by(1, healthy(1, "c", 2, 2))).is(StateKind::Healthy);
    let before = s.m.clone();
    for _ in 0..MUTE_STARTS {
        assert_eq!(given(&s), 2);
        s.then(Event::Asked).then(Event::Downloads(rel(2))).then(Event::Downloaded).is(StateKind::Healthy);
    }
    assert_eq!(given(&s), 1, "as if it really restarted");
    assert_eq!(Machine { held_packets: vec![], ..s.m.clone() }, before);
    let mut real = Story { m: s.m.clone(), now: s.now, last: vec![] };
    s.then(by(1, healthy(1, "c", 3, 2))).is(StateKind::Healthy);
    assert_eq!(given(&s), 2, "the boot that ran before goes on: they were somebody else's");
    real.then(Event::Asked).then(Event::Downloads(rel(1))).then(by(1, report(1, "d", 1, 1)));
    real.is(StateKind::FellBack);
    assert_eq!(real.m.assigned.unwrap().release, rel(1));
}

/// What can become of a start.
#[derive(Debug, Clone, Copy)]
enum Start {
    /// The whole boot program, and no word.
    Mute,
    /// Its power goes while it downloads.
    Half,
    /// Its agent speaks, and then no more.
    Speaks,
    /// It comes up well, and then its power goes.
    Well,
}

/// The same by a few numbers.
#[derive(Debug, Clone, Copy)]
struct Model {
    mute: u32,
    loaded: bool,
    assigned: u64,
    /// Its other good release is not quarantined.
    other: bool,
}

impl Model {
    fn given(self) -> u64 {
        let turned = ((self.mute + u32::from(self.loaded)) / MUTE_STARTS) % 2 == 1;
        if turned && self.other { 3 - self.assigned } else { self.assigned }
    }

    fn after(self, start: Start) -> Self {
        let given = self.given();
        let asked = Self { mute: self.mute + u32::from(self.loaded), loaded: false, ..self };
        match start {
            Start::Mute => Self { loaded: true, ..asked },
            Start::Half => asked,
            Start::Speaks | Start::Well if given != asked.assigned => {
                Self { mute: 0, assigned: given, other: false, ..asked }
            }
            Start::Speaks | Start::Well => Self { mute: 0, ..asked },
        }
    }
}

fn every_life(s: &Story, model: Model, boot: &str, left: usize) {
    assert_eq!(given(s), model.given(), "{boot}");
    assert_eq!(s.m.assigned.as_ref().unwrap().release.release, model.assigned, "{boot}");
    assert_eq!(s.m.refused.is_empty(), model.other, "{boot}");
    if left == 0 {
        return;
    }
    for start in [Start::Mute, Start::Half, Start::Speaks, Start::Well] {
        let mut s = Story { m: s.m.clone(), now: s.now, last: vec![] };
        let (release, boot) = (given(&s), format!("{boot}{start:?}"));
        s.then(Event::Asked).then(Event::Downloads(rel(release)));
        match start {
            Start::Mute => {
                s.then(Event::Downloaded).wait(60_000);
            }
            Start::Half => {
                s.wait(60_000);
            }
            Start::Speaks => {
                s.then(Event::Downloaded).then(by(1, report(1, &boot, 1, release))).wait(LIVE_MS);
            }
            Start::Well => {
                s.then(Event::Downloaded).then(by(1, report(1, &boot, 1, release)));
                s.then(by(1, healthy(1, &boot, 2, release))).wait(LIVE_MS);
                assert!(s.m.boot_loop.starts.is_empty());
            }
        }
        every_life(&s, model.after(start), &boot, left - 1);
    }
}

/// Every life of seven starts.
#[test]
fn every_life_is_as_the_rule_says() {
    let s = good_on_both();
    every_life(&s, Model { mute: 0, loaded: false, assigned: 2, other: true }, "", 7);
}
