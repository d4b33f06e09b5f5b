//! Single steps: the entries on a disk after each event, by name.

use super::{OTHER, content, floor, good_machine};
use kiln_protocol::slot::{Action, Event, Go, Refusal, SlotId, SlotState, Slots};
use kiln_protocol::{ReleaseId, Via};

fn names(slots: &Slots) -> Vec<String> {
    let mut names: Vec<String> = slots.disk.entries.iter().map(|e| e.name.to_string()).collect();
    names.sort();
    names
}

fn steps(mut slots: Slots, events: impl IntoIterator<Item = Event>) -> (Slots, Vec<Action>) {
    let mut last = Vec::new();
    for event in events {
        (slots, last) = slots.event(event);
    }
    (slots, last)
}

#[test]
fn each_state_has_its_file_names_and_the_good_ones_never_changes() {
    let slots = good_machine(4);
    assert_eq!(names(&slots), ["kiln-4.conf"]);
    let (slots, actions) = slots.event(Event::Assign(content(2), 5, Go::Leave(Via::Cold)));
    assert_eq!(actions, [Action::Fetch(SlotId::B, content(2))]);
    assert_eq!(slots.disk.state(SlotId::B), SlotState::Empty);
    let (slots, actions) = slots.event(Event::Fetched);
    assert!(matches!(actions[..], [Action::Label(..), Action::PutUki(_), Action::PutEntry(..)]), "{actions:?}");
    assert_eq!(
        (names(&slots).join(" "), slots.disk.state(SlotId::B)),
        ("kiln-4.conf kiln-5+3.next".into(), SlotState::Allowed)
    );
    let (slots, actions) = slots.event(Event::Granted);
    assert_eq!(
        (names(&slots).join(" "), slots.disk.state(SlotId::B)),
        ("kiln-4.conf kiln-5+3.conf".into(), SlotState::Preferred)
    );
    assert_eq!(actions.last(), Some(&Action::Leave(Via::Cold)));
    let (slots, _) = steps(slots, [Event::Started(content(2).root_hash, Via::Cold), Event::Healthy]);
    assert_eq!(names(&slots), ["kiln-4.conf", "kiln-5.conf"]);
}

#[test]
fn a_kexec_is_proven_by_a_cold_boot_before_anything_is_stacked_on_it() {
    let slots = good_machine(4);
    let go = Go::Leave(Via::Kexec);
    let (slots, left) = steps(slots, [Event::Assign(content(2), 5, go), Event::Fetched, Event::Granted]);
    assert_eq!(left.last(), Some(&Action::Leave(Via::Kexec)));
    let (slots, said) = steps(slots, [Event::Started(content(2).root_hash, Via::Kexec), Event::Healthy]);
    assert_eq!((names(&slots).join(" "), said.len()), ("kiln-4.conf kiln-5+3.conf".into(), 0), "it keeps its counter");
    let (slots, said) = slots.event(Event::Assign(content(3), 6, go));
    assert_eq!(said, [Action::Refuse(Refusal::ProveFirst)]);
    // Back to what is good is always allowed, and by a cold boot.
    let (_, left) = steps(slots, [Event::Assign(content(1), 6, go), Event::Fetched, Event::Granted]);
    assert_eq!(left.last(), Some(&Action::Leave(Via::Cold)));
}

#[test]
fn a_trial_that_used_up_its_tries_is_told_and_not_installed_again() {
    let (mut slots, _) =
        steps(good_machine(4), [Event::Assign(content(3), 5, Go::Leave(Via::Cold)), Event::Fetched, Event::Granted]);
    let from = "kiln-5+3.conf".parse().unwrap();
    slots.disk.apply(&Action::RenameEntry { from, to: "kiln-5+0-3.conf".parse().unwrap() });
    let (slots, said) = Slots::new(slots.disk, Vec::new()).event(Event::Started(content(1).root_hash, Via::Cold));
    let Some(Action::Tell(fallback)) = said.last() else { panic!("{said:?}") };
    assert_eq!((fallback.release.release, fallback.reason.as_str()), (3, "trial-tries-used-up"));
    assert_eq!(names(&slots), ["kiln-4.conf", "kiln-5.failed"]);
    let again = |sequence| Event::Assign(content(3), sequence, Go::Leave(Via::Cold));
    let (slots, said) = slots.event(again(5));
    assert!(matches!(said[..], [Action::Refuse(Refusal::Quarantined { sequence: 5, .. })]), "{said:?}");
    let (_, said) = slots.event(again(6));
    assert!(!matches!(said[..], [Action::Refuse(_)]), "a person's new assignment clears it: {said:?}");
}

#[test]
fn a_good_release_that_loops_is_left_for_the_other_once() {
    let slots = good_machine(4);
    let (alone, said) = slots.clone().event(Event::Loops(SlotId::A));
    assert_eq!((alone.disk, said), (slots.disk.clone(), vec![]), "there is no other");
    let go = Go::Leave(Via::Cold);
    let (slots, _) = steps(
        slots,
        [
            Event::Assign(content(2), 5, go),
            Event::Fetched,
            Event::Granted,
            Event::Started(content(2).root_hash, Via::Cold),
            Event::Healthy,
        ],
    );
    assert_eq!(names(&slots), ["kiln-4.conf", "kiln-5.conf"]);
    let (slots, said) = Slots::new(slots.disk, Vec::new()).event(Event::Loops(SlotId::B));
    let Some(Action::Tell(fallback)) = said.last() else { panic!("{said:?}") };
    assert_eq!((fallback.release.release, fallback.sequence, fallback.reason.as_str()), (2, 5, "good-boot-loop"));
    assert_eq!(names(&slots), ["kiln-4.conf", "kiln-5.looped"]);
    assert_eq!((slots.disk.state(SlotId::B), slots.disk.fallback().as_ref()), (SlotState::Failed, Some(fallback)));
    // The other loops as well: it is the only one that is left.
    let (slots, said) = slots.event(Event::Loops(SlotId::A));
    assert_eq!((names(&slots).join(" "), said), ("kiln-4.conf kiln-5.looped".into(), vec![]));
    let (slots, _) = slots.event(Event::Started(content(1).root_hash, Via::Cold));
    let (slots, said) = slots.event(Event::Assign(content(2), 5, go));
    assert!(matches!(said[..], [Action::Refuse(Refusal::Quarantined { sequence: 5, .. })]), "{said:?}");
    let (_, said) = slots.event(Event::Assign(content(2), 6, go));
    assert_eq!(said, [Action::Verify(SlotId::B, content(2))], "a person's new assignment: its root is still there");
}

#[test]
fn what_cannot_be_read_stays_where_it_is_good_and_fails_where_it_is_a_trial() {
    let before = good_machine(4);
    let (after, said) = before.clone().event(Event::Unread(SlotId::A));
    assert_eq!((&after.disk, said.len(), after.running), (&before.disk, 0, None));
    let go = Go::Leave(Via::Cold);
    let (slots, _) = steps(before, [Event::Assign(content(2), 5, go), Event::Fetched, Event::Granted]);
    let (trial, said) = Slots::new(slots.disk.clone(), Vec::new()).event(Event::Unread(SlotId::B));
    let Some(Action::Unlabel(SlotId::B)) = said.last() else { panic!("{said:?}") };
    assert_eq!(names(&trial), ["kiln-4.conf", "kiln-5.spoilt"]);
    // Both are good: neither goes for that.
    let (both, _) = steps(slots, [Event::Started(content(2).root_hash, Via::Cold), Event::Healthy]);
    for slot in SlotId::BOTH {
        let (after, said) = Slots::new(both.disk.clone(), Vec::new()).event(Event::Unread(slot));
        assert_eq!((after.disk, said), (both.disk.clone(), vec![]));
    }
}

#[test]
fn a_power_blip_on_a_good_slot_costs_nothing() {
    let slots = good_machine(4);
    let before = slots.disk.clone();
    for _ in 0..10 {
        let (after, actions) =
            Slots::new(before.clone(), Vec::new()).event(Event::Started(content(1).root_hash, Via::Cold));
        assert_eq!((after.disk, actions), (before.clone(), vec![]));
    }
}

#[test]
fn a_floor_binds_the_releases_of_its_image_alone() {
    let go = Go::Leave(Via::Cold);
    let other = content(OTHER);
    let (slots, _) = steps(
        good_machine(4),
        [
            Event::Assign(other.clone(), 5, go),
            Event::Fetched,
            Event::Granted,
            Event::Started(other.root_hash.clone(), Via::Cold),
            Event::Healthy,
        ],
    );
    assert_eq!(names(&slots), ["kiln-4.conf", "kiln-5.conf"]);
    // other/1 has a lower number than this floor.
    let (raised, _) = slots.clone().event(Event::Floor(floor(2)));
    assert_eq!(names(&raised), ["kiln-5.conf"]);
    let rises = |release| Event::Floor(ReleaseId { release, ..other.release.clone() });
    let (raised, _) = slots.event(rises(2));
    assert_eq!(names(&raised), ["kiln-4.conf"]);
    let (lower, _) = raised.event(rises(1));
    assert_eq!(lower.floors.len(), 1, "it never goes down");
    let wanted = |content| Slots::new(lower.disk.clone(), lower.floors.clone()).event(Event::Assign(content, 6, go)).1;
    let refused = wanted(other.clone());
    assert!(matches!(refused[..], [Action::Refuse(Refusal::BelowFloor { floor: 2, .. })]), "{refused:?}");
    assert!(!matches!(wanted(content(1))[..], [Action::Refuse(_)]));
}
