//! The loader on the disk, and a list of revoked boot programs.

use super::*;
use crate::disk::loader::{LoaderHold, put_right, renew};
use crate::testing::pe;
use kiln_release::authenticode;
use std::collections::BTreeSet;

fn loader(text: &[u8]) -> Vec<u8> {
    pe(&[(".text", text)])
}

fn list(loaders: &[&[u8]]) -> BTreeSet<String> {
    loaders.iter().map(|loader| hex::encode(&authenticode::digest(loader).unwrap())).collect()
}

#[test]
fn a_list_waits_for_the_loader_that_the_disk_starts_through() {
    let (old, new) = (loader(b"of release 1"), loader(b"of release 2"));
    let mut store = installed();
    assert_eq!(renew(&mut store, &list(&[&old]), true, Some(&new)), Ok(None), "no boot program");
    assert!(store.loaders().unwrap().iter().all(|(_, file)| file == b"the boot loader"), "it stays as it is");
    store.install_loader(&old).unwrap();
    let first = LOADERS[0];
    let mut renewed =
        |revoked: &[&[u8]], good, own: Option<&[u8]>| renew(&mut store, &list(revoked), good, own).unwrap();
    assert_eq!(renewed(&[&new], true, Some(&new)), None, "the list names another");
    assert_eq!(renewed(&[&old], false, Some(&new)), Some(LoaderHold::NotGood(first)));
    assert_eq!(renewed(&[&old], true, None), Some(LoaderHold::NoneKept(first)));
    assert_eq!(renewed(&[&old, &new], true, Some(&new)), Some(LoaderHold::OwnRevoked(first)));
    assert_eq!(renewed(&[&old], true, Some(&old)), Some(LoaderHold::OwnRevoked(first)));
    // All the while the disk has the one that it had.
    assert_eq!(renewed(&[&new], false, None), None);
    assert_eq!(renewed(&[&old], true, Some(&new)), None, "its own is there, and nothing is left to wait for");
    assert_eq!(renewed(&[&old], false, None), None);
    assert_eq!(store.loaders().unwrap(), LOADERS.map(|path| (path, new.clone())));
    // One of the two is enough for firmware to be stopped by.
    let range = store.layout.esp();
    let mut esp = Fat::open(Part::new(store.disk_mut(), &range)).unwrap();
    esp.write(LOADERS[1], old.len() as u64, &mut old.as_slice()).unwrap();
    assert_eq!(renew(&mut store, &list(&[&old]), false, None), Ok(Some(LoaderHold::NotGood(LOADERS[1]))));
}

/// Whatever is cut, both files are a whole loader, and the list, which waits for both, is not in.
#[test]
fn every_cut_of_a_renewal_leaves_two_whole_loaders() {
    let (old, new) = (loader(b"of release 1"), loader(&[7; 5000]));
    let mut store = installed();
    store.install_loader(&old).unwrap();
    let before = store.disk().clone();
    let (mut store, _) = opened(Recorded { steps: Vec::new(), ..before.clone() });
    assert_eq!(renew(&mut store, &list(&[&old]), true, Some(&new)), Ok(None));
    let steps = &store.disk().steps;
    let mut seen = BTreeSet::new();
    for count in 0..=steps.len() {
        for keep in [true, false] {
            let (mut store, slots) = opened(Recorded::cut(&before, &steps[..count], &mut || keep));
            let files = store.loaders().unwrap();
            assert!(files.len() == 2 && files.iter().all(|(_, file)| *file == old || *file == new), "behind {count}");
            assert_eq!(slots.disk.state(SlotId::A), SlotState::Good);
            seen.insert(files.iter().filter(|(_, file)| *file == new).count());
        }
    }
    assert_eq!(seen, BTreeSet::from([0, 1, 2]));
}

fn overwrite(store: &mut Store<Recorded>, path: &str, bytes: &[u8]) {
    let range = store.layout.esp();
    let mut esp = Fat::open(Part::new(store.disk_mut(), &range)).unwrap();
    let mut from = bytes;
    esp.write(path, bytes.len() as u64, &mut from).unwrap();
}

#[test]
fn a_flipped_byte_in_a_loader_is_put_right() {
    let (old, new) = (loader(b"of release 1"), loader(b"of release 2"));
    let none = &BTreeSet::new();
    let mut flipped = old.clone();
    flipped[40] ^= 1;
    for wrong in LOADERS {
        let mut store = installed();
        store.install_loader(&old).unwrap();
        assert_eq!(put_right(&mut store, Some(&new), none), Ok(vec![]), "two that are the same stay");
        overwrite(&mut store, wrong, &flipped);
        assert!(matches!(put_right(&mut store, None, none), Err(DiskError::ReadBack { .. })), "which one is right?");
        assert_eq!(put_right(&mut store, Some(&old), none), Ok(vec![wrong]));
        assert_eq!(store.loaders().unwrap(), LOADERS.map(|path| (path, old.clone())));
        // The release that runs brought another one: both are its own then.
        overwrite(&mut store, wrong, &flipped);
        assert_eq!(put_right(&mut store, Some(&new), none), Ok(LOADERS.to_vec()));
        overwrite(&mut store, "loader/loader.conf", b"timeout 99\n");
        assert_eq!(put_right(&mut store, None, none), Ok(vec!["loader/loader.conf"]));
        assert_eq!(put_right(&mut store, None, none), Ok(vec![]));
        assert_eq!(store.loaders().unwrap(), LOADERS.map(|path| (path, new.clone())));
    }
}

#[test]
fn a_loader_that_the_firmware_revokes_is_written_nowhere() {
    let (old, new) = (loader(b"of release 1"), loader(b"of release 2"));
    let mut store = installed();
    store.install_loader(&old).unwrap();
    // The running release's own is.
    let revoked = list(&[&new]);
    assert_eq!(put_right(&mut store, Some(&new), &revoked), Ok(vec![]));
    let mut flipped = old.clone();
    flipped[40] ^= 1;
    overwrite(&mut store, LOADERS[0], &flipped);
    assert!(matches!(put_right(&mut store, Some(&new), &revoked), Err(DiskError::ReadBack { .. })));
    assert_eq!(store.loaders().unwrap(), [(LOADERS[0], flipped), (LOADERS[1], old.clone())]);
    assert_eq!(put_right(&mut store, Some(&old), &revoked), Ok(vec![LOADERS[0]]));
    assert_eq!(store.loaders().unwrap(), LOADERS.map(|path| (path, old.clone())));
}

/// Somebody with the disk in hand put the old ones back.
#[test]
fn two_revoked_loaders_give_way_to_that_of_a_good_release() {
    let (old, new) = (loader(b"of release 1"), loader(b"of release 2"));
    let mut store = installed();
    store.install_loader(&old).unwrap();
    let revoked = list(&[&old]);
    assert_eq!(
        put_right(&mut store, None, &revoked),
        Ok(vec![]),
        "a release that is not good yet has no other at hand"
    );
    assert_eq!(put_right(&mut store, Some(&old), &revoked), Ok(vec![]), "nor has one whose own it is");
    assert_eq!(store.loaders().unwrap(), LOADERS.map(|path| (path, old.clone())));
    assert_eq!(put_right(&mut store, Some(&new), &revoked), Ok(LOADERS.to_vec()));
    assert_eq!(store.loaders().unwrap(), LOADERS.map(|path| (path, new.clone())));
    assert_eq!(put_right(&mut store, Some(&new), &revoked), Ok(vec![]));
}

#[test]
fn a_wrong_uki_is_found_under_whichever_entry_names_it() {
    let mut store = installed();
    assert_eq!(store.wrong_ukis(), Ok(vec![]));
    let first = release(1);
    let path = format!("EFI/kiln/{}", first.content.uki_name());
    let mut flipped = first.uki.clone();
    flipped[2999] ^= 1;
    overwrite(&mut store, &path, &flipped);
    assert_eq!(store.wrong_ukis(), Ok(vec![first.content.clone()]));
    let mut uki = first.uki.as_slice();
    store.perform(&Action::PutUki(first.content.clone()), Some((first.uki.len() as u64, &mut uki))).unwrap();
    assert_eq!(store.wrong_ukis(), Ok(vec![]));
    let range = store.layout.esp();
    Fat::open(Part::new(store.disk_mut(), &range)).unwrap().remove(&path).unwrap();
    assert_eq!(store.wrong_ukis(), Ok(vec![first.content]), "one that is gone is wrong as well");
}
