//! What a floor that has risen leaves on a disk.

use super::super::floor::above;
use super::*;
use kiln_protocol::ReleaseId;

fn entries(slots: &Slots) -> Vec<String> {
    slots.disk.entries.iter().map(|entry| format!("{} {}", entry.name, entry.content.release.release)).collect()
}

/// This release, as a floor of its image.
fn lowest(n: u64) -> ReleaseId {
    ReleaseId { release: n, ..release(1).content.release }
}

/// Release 1 good in A, and 2 in B: on trial, and where `good` also healthy there.
fn beside(good: bool) -> (Store<Recorded>, Slots) {
    let mut store = installed();
    let (first, second) = (release(1), release(2));
    let mut slots =
        Slots::new(store.read().unwrap(), Vec::new()).event(Event::Started(first.content.root_hash, Via::Cold)).0;
    for event in [Event::Assign(second.content.clone(), 5, Go::Leave(Via::Cold)), Event::Fetched, Event::Granted] {
        slots = step(&mut store, slots, event, &second);
    }
    if good {
        slots = slots.event(Event::Started(second.content.root_hash.clone(), Via::Cold)).0;
        slots = step(&mut store, slots, Event::Healthy, &second);
    }
    (store, slots)
}

#[test]
fn what_fell_below_the_floor_is_left_for_what_is_good_and_else_stays_to_say_so() {
    let number = |slots: &Slots| above(slots).map(|release| release.release);
    let (mut store, slots) = beside(true);
    // As the next start reads it, which knows the floor from before.
    let slots = Slots::new(slots.disk, vec![lowest(2)]);
    assert_eq!(number(&slots), Some(2));
    let slots = step(&mut store, slots, Event::Floor(lowest(2)), &release(2));
    assert_eq!((entries(&slots), number(&slots)), (vec!["kiln-5.conf 2".to_owned()], Some(2)));
    assert!(!slots.disk.is_good(SlotId::A) && slots.disk.is_good(SlotId::B), "the loader knows the second alone");

    // Above both, and where the one above is not proven: nothing is taken away, and there is nothing to leave for.
    for (good, floor) in [(true, 3), (false, 2)] {
        let (mut store, slots) = beside(good);
        let before = entries(&slots);
        let slots =
            step(&mut store, Slots::new(slots.disk, vec![lowest(floor)]), Event::Floor(lowest(floor)), &release(2));
        assert_eq!((entries(&slots), number(&slots)), (before, None), "{good} {floor}");
    }

    // A good entry whose UKI is gone starts nothing.
    let (_, slots) = beside(true);
    let mut slots = Slots::new(slots.disk, vec![lowest(2)]);
    slots.disk.ukis.clear();
    assert_eq!(number(&slots), None);

    // Another image's floor binds neither.
    let (mut store, slots) = beside(true);
    let others = ReleaseId { image: "other".parse().unwrap(), release: 9 };
    let before = entries(&slots);
    let slots = step(&mut store, slots, Event::Floor(others), &release(2));
    assert_eq!((entries(&slots), number(&slots)), (before, Some(2)));
}
