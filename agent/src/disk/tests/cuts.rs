//! Power that is cut behind every write: what the loader starts is whole, and never nothing.

use super::*;

/// What the loader would start: the newest entry with tries left whose UKI is whole, its root whole in a slot.
fn boots(disk: Recorded) -> Option<u64> {
    let Ok(Found::Ours(layout)) = look(&disk, SITE) else { return None };
    let mut store = Store::open(disk, layout, false, "test").ok()?;
    let state = store.read().ok()?;
    let mut entries: Vec<_> =
        state.entries.iter().filter(|e| matches!(e.name.kind, EntryKind::Trial(_) | EntryKind::Good)).collect();
    entries.sort_by_key(|e| e.name.sequence);
    let entry = entries.into_iter().rev().find(|e| state.ukis.contains(&e.content.uki))?;
    let number = entry.content.release.release;
    let release = release(number);
    let range = store.layout.esp();
    let mut disk = store.disk().clone();
    let esp = Fat::open(Part::new(&mut disk, &range)).unwrap();
    let uki = esp.read(&format!("EFI/kiln/{}", release.content.uki_name()), 1 << 20).unwrap();
    assert_eq!(uki.as_deref(), Some(release.uki.as_slice()), "a UKI that is listed is whole");
    let slot = state.slot_of(&release.content.root_hash).expect("an entry's root lies in a slot");
    let mut root = vec![0; release.root.len()];
    store.disk().read_at(store.layout.slot(slot).start, &mut root).unwrap();
    assert!(root == release.root, "a slot with a label is whole");
    for path in LOADERS {
        assert_eq!(esp.read(path, 1 << 20).unwrap().as_deref(), Some(&b"the boot loader"[..]));
    }
    Some(number)
}

/// An install of release 2 beside the good release 1, up to its being good, then of 3 over 1; cut behind every single
/// sector, with every later one of the same round kept or lost at random: what the loader starts is whole, and never
/// nothing.
#[test]
fn every_cut_of_an_install_leaves_something_whole_that_boots() {
    let store = installed();
    let before = store.disk().clone();
    let recorded = Recorded { steps: Vec::new(), ..before.clone() };
    let (mut store, slots) = opened(recorded);
    let (second, third) = (release(2), release(3));
    let first = release(1).content.root_hash;
    let mut slots = slots.event(Event::Started(first, Via::Cold)).0;
    for event in [Event::Assign(second.content.clone(), 5, Go::Leave(Via::Cold)), Event::Fetched, Event::Granted] {
        slots = step(&mut store, slots, event, &second);
    }
    slots = slots.event(Event::Started(second.content.root_hash.clone(), Via::Cold)).0;
    slots = step(&mut store, slots, Event::Healthy, &second);
    let at_two = store.disk().steps.len();
    for event in [Event::Assign(third.content.clone(), 6, Go::Leave(Via::Cold)), Event::Fetched, Event::Granted] {
        slots = step(&mut store, slots, event, &third);
    }
    assert_eq!((slots.disk.state(SlotId::A), slots.disk.state(SlotId::B)), (SlotState::Preferred, SlotState::Good));
    let steps = &store.disk().steps;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed & 1 == 1
    };
    let mut booted = std::collections::BTreeMap::new();
    for count in 0..=steps.len() {
        for sample in 0..3 {
            let mut picks = || match sample {
                0 => true,
                1 => false,
                _ => random(),
            };
            let number = boots(Recorded::cut(&before, &steps[..count], &mut picks));
            let number = number.unwrap_or_else(|| panic!("nothing boots after {count} of {} steps", steps.len()));
            assert!(number != 3 || count > at_two, "release 3 boots before it was asked for");
            *booted.entry(number).or_insert(0) += 1;
        }
    }
    println!("{} steps; booted {booted:?}", steps.len());
    assert!(booted.len() == 3 && steps.len() > 200, "{} steps, {booted:?}", steps.len());
}

/// A first install, in the order of `local::install_here`: wherever it is cut, a loader on the disk has its settings, and
/// starts something whole.
#[test]
fn every_cut_of_a_first_install_leaves_no_loader_without_what_it_starts() {
    let (mut store, mut slots) = opened(Recorded::default());
    let first = release(1);
    slots = step(&mut store, slots, Event::Assign(first.content.clone(), 4, Go::Here(Via::Cold)), &first);
    let begun = store.disk().steps.len();
    slots = step(&mut store, slots, Event::Fetched, &first);
    step(&mut store, slots, Event::Granted, &first);
    assert!(!store.has_loader().unwrap());
    store.install_loader(b"the boot loader").unwrap();
    assert!(store.has_loader().unwrap());
    let steps = &store.disk().steps;
    let (mut with, mut without) = (0, 0);
    for count in begun..=steps.len() {
        for keep in [true, false] {
            let (mut store, slots) = opened(Recorded::cut(&Recorded::default(), &steps[..count], &mut || keep));
            let range = store.layout.esp();
            let mut disk = store.disk().clone();
            let esp = Fat::open(Part::new(&mut disk, &range)).unwrap();
            let loaders: Vec<_> = LOADERS.iter().filter_map(|path| esp.read(path, 1 << 20).unwrap()).collect();
            if loaders.is_empty() {
                without += 1;
                continue;
            }
            with += 1;
            assert!(loaders.iter().all(|loader| loader == b"the boot loader"), "cut behind {count}");
            assert!(esp.read("loader/loader.conf", 1 << 20).unwrap().is_some(), "cut behind {count}");
            let listed: Vec<_> = slots.disk.entries_of(SlotId::A).map(|entry| entry.name.kind).collect();
            let starts = matches!(listed[..], [EntryKind::Trial(_) | EntryKind::Good]);
            assert!(starts && slots.disk.ukis == [first.content.uki.clone()], "cut behind {count}: {:?}", slots.disk);
            // What was cut off is taken up again.
            if !store.has_loader().unwrap() {
                store.install_loader(b"the boot loader").unwrap();
            }
            assert_eq!(boots(store.disk().clone()), Some(1), "cut behind {count}");
        }
    }
    assert!(with > 3 && without > 10, "{with} {without}");
}

/// A blank disk that is cut while it is partitioned is still nobody's: the next start makes it anew.
#[test]
fn every_cut_of_the_first_partitioning_can_be_taken_up_again() {
    let (mut store, _) = opened(Recorded::default());
    store.install_loader(b"the boot loader").unwrap();
    let steps = &store.disk().steps;
    let table: Vec<usize> = (0..steps.len()).filter(|n| *n < 120 || n % 97 == 0).collect();
    for count in table {
        for keep in [true, false] {
            let disk = Recorded::cut(&Recorded::default(), &steps[..count], &mut || keep);
            let (mut store, slots) = opened(disk);
            store.install_loader(b"the boot loader").unwrap();
            assert_eq!(slots.disk.labels, [None, None]);
        }
    }
}
