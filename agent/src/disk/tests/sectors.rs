//! A disk of which one sector can be neither read nor written.

use super::*;
use crate::disk::loader::{LoaderHold, put_right, renew};
use std::collections::BTreeSet;

/// With all that is kept of a release.
fn kept() -> Store<Recorded> {
    let (mut store, root_hash) = (installed(), release(1).content.root_hash);
    store.keep_record(&root_hash, b"signed metadata").unwrap();
    store.keep_starts(&root_hash, Some(Starts { count: 3, begun: 7 })).unwrap();
    store.keep_put_up(&root_hash, 6).unwrap();
    store
}

/// What a disk holds, in words.
fn all_of(disk: Recorded) -> String {
    let ((mut store, slots), root_hash) = (opened(disk), release(1).content.root_hash);
    let kept =
        (store.record(&root_hash).unwrap(), store.starts(&root_hash).unwrap(), store.put_up(&root_hash).unwrap());
    format!("{:?} {:?} {kept:?}", slots.disk, store.loaders().unwrap())
}

/// The sectors that begin so.
fn beginning(store: &Store<Recorded>, with: &[u8]) -> Vec<u64> {
    let sectors = store.disk().sectors.iter();
    sectors.filter(|(_, bytes)| bytes.starts_with(with)).map(|(at, _)| *at).collect()
}

#[test]
fn one_bad_sector_erases_nothing() {
    let mut store = kept();
    let (layout, whole) = (store.layout.clone(), store.disk().clone());
    let labels = store.read().unwrap().labels;
    let expected = all_of(whole.clone());
    let mut costs_the_disk = Vec::new();
    for range in [layout.esp(), layout.state()] {
        let first = range.start / SECTOR as u64;
        let all = whole.sectors.range(first..range.end / SECTOR as u64);
        let used = all.filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)).map(|(at, _)| *at);
        for at in used {
            let mut disk = Recorded { failing: Some(at..at + 1), ..whole.clone() };
            let part = Part::new(&mut disk, &(0..SIZE));
            match Store::open(part, layout.clone(), false, "test").and_then(|mut store| store.read()) {
                Ok(read) => assert_eq!(read.labels, labels, "sector {at}"),
                Err(error) => {
                    assert_eq!(error.kind(), "disk-io-error", "sector {at}: {error}");
                    costs_the_disk.push(at);
                }
            }
            disk.failing = None;
            assert_eq!(all_of(disk), expected, "sector {at}");
        }
        assert!(!costs_the_disk.contains(&first), "its boot sector is there twice");
    }
    let entries = beginning(&store, b"title");
    assert!(!entries.is_empty() && !entries.iter().any(|at| costs_the_disk.contains(at)), "an entry costs itself");
    // And not its UKI, which would be removed if nothing named it.
    assert_eq!(store.read().unwrap().ukis.len(), 1);
    let mut costs = |at: u64| {
        store.disk_mut().failing = Some(at..at + 1);
        let read = store.read().unwrap();
        assert_eq!(read.entries.len(), read.ukis.len(), "{read:?}");
        read.entries.is_empty()
    };
    // Others are what was written before it, and is free.
    assert_eq!(entries.into_iter().filter(|at| costs(*at)).count(), 1);
}

/// A flash that turned read-only in the middle of a write leaves tables that differ, and clusters that nothing names.
#[test]
fn what_is_to_be_mended_costs_nothing_on_a_disk_that_takes_no_writes() {
    let store = kept();
    let (whole, layout) = (store.disk().clone(), store.layout.clone());
    let expected = all_of(whole.clone());
    for range in [layout.esp(), layout.state()] {
        let mut disk = whole.clone();
        // The first of the table's sectors behind 32 reserved ones: the last of its clusters is free, by all that is named.
        let mut table = [0; SECTOR];
        disk.read_at(range.start + 32 * SECTOR as u64, &mut table).unwrap();
        assert_eq!(table[..3], [0xf8, 0xff, 0xff], "it is the table");
        table[SECTOR - 4..].copy_from_slice(&0x0fff_ffff_u32.to_le_bytes());
        disk.write_at(range.start + 32 * SECTOR as u64, &table).unwrap();
        disk.read_only = true;
        assert_eq!(all_of(disk.clone()), expected);
        let mut store = Store::open(disk, layout.clone(), false, "test").unwrap();
        assert_eq!(store.keep_put_up(&release(1).content.root_hash, 9).unwrap_err().kind(), "disk-io-error");
    }
}

#[test]
fn what_lies_on_a_bad_sector_is_written_elsewhere() {
    let (mut store, root_hash) = (kept(), release(1).content.root_hash);
    let at = beginning(&store, format!("{root_hash} 6\n").as_bytes())[0];
    store.disk_mut().failing = Some(at..at + 1);
    assert!(store.put_up(&root_hash).is_err());
    store.keep_put_up(&root_hash, 8).unwrap();
    assert_eq!(store.put_up(&root_hash).unwrap(), 8);

    // Whether the list revokes it is not known.
    let at = beginning(&store, b"the boot loader")[0];
    store.disk_mut().failing = Some(at..at + 1);
    let none = BTreeSet::new();
    assert!(matches!(renew(&mut store, &none, false, None), Ok(Some(LoaderHold::NotGood(_)))));
    assert_eq!(renew(&mut store, &none, true, Some(b"another")), Ok(None));
    assert_eq!(store.loaders().unwrap(), LOADERS.map(|path| (path, b"another".to_vec())));

    // Two of which nothing can be read are no loader, though they are the same.
    store.disk_mut().failing = None;
    store.install_loader(b"").unwrap();
    assert!(put_right(&mut store, None, &none).is_err());
    put_right(&mut store, Some(b"another"), &none).unwrap();
    assert_eq!(store.loaders().unwrap(), LOADERS.map(|path| (path, b"another".to_vec())));
}
