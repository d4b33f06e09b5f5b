//! Two machines with one identity key, which no TPM keeps.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::KeyStorage;

/// Boot `a` is the machine's; its copy comes up as boot `b` and both go on, report by report.
fn copied() -> Story {
    let mut s = Story::good_on_1();
    s.then(by(1, healthy(1, "b", 1, 1))).is(StateKind::Healthy);
    for n in 1..=u64::from(LATE_REPORTS) {
        s.then(by(1, healthy(1, "a", 10 + n, 1))).is(StateKind::Healthy);
        s.then(by(1, healthy(1, "b", 10 + n, 1))).is(StateKind::Healthy);
    }
    s
}

#[test]
fn a_copy_under_the_same_id_holds_both_until_a_person_has_looked() {
    let mut s = copied();
    s.then(by(1, healthy(1, "a", 20, 1))).is(StateKind::Quarantined);
    assert!(s.last.contains(&Action::Save) && s.last.contains(&Action::Wake), "{:?}", s.last);
    let why = s.m.state.reason.clone();
    assert!(why.contains("two machines report with the identity key of rack-1") && why.contains("revoke-key"), "{why}");
    assert!(matches!(desire(&s.m, &key(1)), Desire::Wait(said) if said == why));
    // It goes on like that, and is no news.
    s.then(by(1, healthy(1, "b", 21, 1))).then(by(1, healthy(1, "a", 21, 1))).is(StateKind::Quarantined);
    assert_eq!(s.last, []);
    // The false one is off: the true one goes on in the boot that it is in, though the other came after it.
    s.then(Event::Clear).is(StateKind::Approved);
    s.then(by(1, healthy(1, "a", 22, 1))).is(StateKind::Healthy);
    assert!(matches!(desire(&s.m, &key(1)), Desire::Run(_)));
    s.then(by(1, healthy(1, "a", 23, 1))).is(StateKind::Healthy);
    assert_eq!(s.m.boots.back().map(|boot| (boot.boot_id.as_str(), boot.seq)), Some(("a", 23)));
    // It was not off.
    for n in 30..=30 + u64::from(LATE_REPORTS) {
        s.then(by(1, healthy(1, "b", n, 1)));
    }
    s.is(StateKind::Quarantined);
}

/// A third one polls under the id with a key of its own while a person clears the machine.
#[test]
fn a_clear_after_a_clone_gives_the_identity_to_no_other_key() {
    for storage in [KeyStorage::Tpm, KeyStorage::EfiVariable, KeyStorage::File] {
        let mut s = copied();
        s.m.facts.as_mut().unwrap().key_storage = storage;
        s.then(by(1, healthy(1, "a", 20, 1))).is(StateKind::Quarantined);
        s.then(by(2, healthy(1, "x", 1, 1))).then(Event::Clear).is(StateKind::Approved);
        s.then(by(2, healthy(1, "x", 2, 1))).is(StateKind::Approved);
        assert_eq!(s.m.key, Some(key(1)), "{storage:?}");
        assert!(matches!(desire(&s.m, &key(2)), Desire::Wait(_)));
        // The true one goes on in its boot, once; what the other boot says then is late again.
        s.then(by(1, healthy(1, "a", 22, 1))).is(StateKind::Healthy);
        assert!(!s.m.any_boot && matches!(desire(&s.m, &key(1)), Desire::Run(_)));
    }
}

/// Whoever has the copy begins so many boots between two reports of the true machine that its boot is not among the newest.
#[test]
fn a_copy_that_begins_boot_after_boot_is_found_all_the_same() {
    let mut s = Story::good_on_1();
    let mut n = 0;
    for late in 1..=LATE_REPORTS {
        for _ in 0..=BOOTS_KEPT {
            n += 1;
            s.then(by(1, healthy(1, &format!("copy{n}"), 1, 1))).is(StateKind::Healthy);
        }
        s.wait(LIVE_MS).then(by(1, healthy(1, "a", 10 + u64::from(late), 1)));
        assert_ne!(s.m.state.kind, StateKind::Quarantined, "may have been on its way");
    }
    s.then(by(1, healthy(1, "a", 20, 1))).is(StateKind::Quarantined);
    s.then(Event::Clear).then(by(1, healthy(1, "a", 21, 1))).is(StateKind::Healthy);
    // Faster still, and the true one would be forgotten: no machine restarts like that.
    for n in 2..BOOTS_AT_ONCE {
        s.then(by(1, healthy(1, &format!("fast{n}"), 1, 1))).is(StateKind::Healthy);
    }
    s.then(by(1, healthy(1, "last", 1, 1))).is(StateKind::Quarantined);
    s.then(Event::Clear).then(by(1, healthy(1, "a", 30, 1))).is(StateKind::Healthy);
}

#[test]
fn what_was_on_its_way_when_a_machine_restarted_makes_no_copy() {
    let mut s = Story::good_on_1();
    for boot in ["b", "c", "d", "e"] {
        let before = s.m.boots.back().unwrap().clone();
        s.then(by(1, healthy(1, boot, 1, 1)));
        for late in 1..=u64::from(LATE_REPORTS) {
            s.then(by(1, healthy(1, &before.boot_id, before.seq + late, 1))).is(StateKind::Healthy);
            // The same again is not another one.
            s.then(by(1, healthy(1, &before.boot_id, before.seq + late, 1))).is(StateKind::Healthy);
        }
    }
}

#[test]
fn what_nobody_approved_is_forgotten_as_before_whoever_else_claims_it() {
    let mut s = Story::new();
    s.then(by(1, report(1, "a", 1, 1))).then(by(1, report(1, "b", 1, 1)));
    for n in 2..=3 + u64::from(LATE_REPORTS) {
        s.then(by(1, report(1, "a", n, 1))).is(StateKind::Discovered);
    }
    assert!(s.m.last_words.contains("two machines report"), "{}", s.m.last_words);
    assert_eq!(s.last, [], "said once");
    s.wait(FORGET_MS);
    assert_eq!(s.last, [Action::Forget]);
}

/// A machine that reported once, at this time.
fn came_up(n: u8, now: Millis) -> Machine {
    let m = Machine::discovered(id(n), now).event(by(1, healthy(n, "a", 1, 1)), LIMITS, now).0;
    m.event(Event::Approve { name: format!("rack-{n}"), role: "lab".into(), release: rel(1) }, LIMITS, now).0
}

#[test]
fn a_copy_under_its_own_id_is_one_where_both_live_and_a_disk_that_moved_is_none() {
    let start = 10 * LIVE_MS;
    let old = came_up(1, start);
    // The disk went from one to the other.
    let new = came_up(2, start + 60_000);
    assert!(!new.lives_beside(&old, start + 60_000));
    // The first speaks again: both have it.
    let old = old.event(by(1, healthy(1, "a", 2, 1)), LIMITS, start + 90_000).0;
    assert!(new.lives_beside(&old, start + 95_000) && old.lives_beside(&new, start + 95_000));
    // What was heard long ago, or before a restart of the server, says nothing of now.
    assert!(!new.lives_beside(&old, start + 90_000 + LIVE_MS));
    let deaf = old.clone().event(Event::ServerStarted, LIMITS, start + 95_000).0;
    assert!(!new.lives_beside(&deaf, start + 95_000));

    let (held, out) = new.event(Event::KeyShared { with: "rack-1".into() }, LIMITS, start + 95_000);
    assert_eq!((held.state.kind, held.state.reason.contains("rack-2 and rack-1")), (StateKind::Quarantined, true));
    assert!(out.contains(&Action::Wake));
    // Once the false one is off, a person's word counts at once.
    let cleared = held.event(Event::Clear, LIMITS, start + 100_000).0;
    let (well, _) = cleared.event(by(1, healthy(2, "a", 2, 1)), LIMITS, start + 101_000);
    assert_eq!(well.state.kind, StateKind::Healthy);
    assert!(!well.lives_beside(&old, start + 101_000));
}
