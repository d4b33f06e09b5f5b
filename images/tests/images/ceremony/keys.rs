//! Other keys, fewer keys, new dates, and floors.

use super::{Ceremonial, files_below, later, now};
use crate::common::{build, served};
use jiff::{SignedDuration, Timestamp};
use kiln_images::request::Request;
use kiln_images::sealed::{public_file, read_public};
use kiln_images::status::{Nearness, trust_status};
use kiln_images::{
    Applied, Memory, Repository, RoleHolders, SiteError, TakenAway, apply, init_lab, publish, raise_floor, renew,
    revoke_key, rotate,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[test]
fn keys_are_rotated_under_both_thresholds_and_revoked_keys_count_no_more() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    ceremonial.publish(1, later(1));
    ceremonial.all_sign(&["image-ann", "image-bob", "targets-ann", "targets-bob", "snapshot-ann"], later(1));
    let memory = Memory { trust_root: None, seen: served(site, later(1)).seen };

    // Root: the old two and the new two.
    let people = ceremonial.dir.path().join("people");
    let holders = Ceremonial::holders(&people, 2, &["root-dan", "root-eve"]);
    assert!(rotate(&site.path, "root", Some(&holders), later(2)).unwrap().changed.waiting.is_some());
    let file = ceremonial.carried();
    for name in ["root-ann", "root-dan", "root-eve"] {
        ceremonial.sign(&file, name).unwrap();
    }
    let waiting = ceremonial.apply(&file, later(2)).unwrap();
    assert!(matches!(waiting, Applied::Waiting(_)), "one of the old root's two: {waiting:?}");
    assert!(!site.metadata("2.root.json").exists());
    ceremonial.sign(&file, "root-bob").unwrap();
    ceremonial.apply(&file, later(2)).unwrap();
    assert_eq!(served(site, later(2)).root.version, 2);

    // Online keys are made here; machines see no gap.
    for role in ["timestamp", "director"] {
        let old = fs::read(site.online(&format!("{role}.key"))).unwrap();
        assert!(rotate(&site.path, role, None, later(3)).unwrap().changed.waiting.is_some());
        assert_eq!(fs::read(site.online(&format!("{role}.key"))).unwrap(), old, "not before it is signed");
        let names: &[&str] = match role {
            "timestamp" => &["root-dan", "root-eve"],
            _ => &["targets-ann", "targets-bob", "snapshot-ann"],
        };
        ceremonial.all_sign(names, later(3));
        assert_ne!(fs::read(site.online(&format!("{role}.key"))).unwrap(), old);
        assert!(!site.online(&format!("{role}.key.next")).exists());
        let repository = Repository::adopt(site, &site.timestamp_keys().unwrap(), &memory, later(3)).unwrap();
        site.director_key(&repository.site).unwrap();
    }

    // A key is taken away from an image: two of three stay, and its old list is signed anew.
    let gone = read_public(&public_file(&ceremonial.key("image-cid"))).unwrap().id();
    assert!(revoke_key(&site.path, &gone[..12], later(4)).unwrap().changed.waiting.is_some());
    ceremonial.all_sign(&["image-ann", "image-bob", "targets-ann", "targets-bob", "snapshot-ann"], later(4));
    ceremonial.publish(2, later(5));
    let refused = ceremonial.sign(&ceremonial.carried(), "image-cid").unwrap_err();
    assert!(matches!(refused, SiteError::NotASigner { .. }), "{refused}");
    ceremonial.all_sign(&["image-ann", "image-bob", "snapshot-ann"], later(5));
    // With one key less the threshold could not be reached.
    let refused =
        revoke_key(&site.path, &read_public(&public_file(&ceremonial.key("image-ann"))).unwrap().id(), later(6));
    assert!(matches!(refused, Err(SiteError::TooFewLeft { left: 1, threshold: 2, .. })), "{refused:?}");
    assert!(matches!(revoke_key(&site.path, "0000000000", later(6)), Err(SiteError::NoSuchKey { .. })));
    // Targets and snapshot with other people, in one root.
    let holders = Ceremonial::holders(&people, 1, &["snapshot-dan"]);
    rotate(&site.path, "snapshot", Some(&holders), later(7)).unwrap();
    ceremonial.all_sign(&["root-dan", "root-eve", "snapshot-dan"], later(7));
    let holders = Ceremonial::holders(&people, 1, &["targets-dan"]);
    rotate(&site.path, "targets", Some(&holders), later(8)).unwrap();
    ceremonial.all_sign(&["root-dan", "root-eve", "targets-dan", "snapshot-dan"], later(8));
    let shared = RoleHolders { threshold: 1, keys: holders.keys.clone() };
    assert!(matches!(rotate(&site.path, "snapshot", Some(&shared), later(8)), Err(SiteError::SharedKey { .. })));
    let outcome = served(site, later(8));
    assert_eq!((outcome.root.version, outcome.targets.len()), (5, 3));
    // A machine that saw the site before any of it follows.
    Repository::adopt(site, &site.timestamp_keys().unwrap(), &memory, later(8)).unwrap();
}

#[test]
fn dates_are_renewed_without_another_change() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    ceremonial.publish(1, later(1));
    ceremonial.all_sign(&["image-ann", "image-bob", "targets-ann", "targets-bob", "snapshot-ann"], later(1));
    let of = |at: Timestamp| -> BTreeMap<String, Nearness> {
        trust_status(site, at).unwrap().roles.into_iter().map(|role| (role.role, role.nearness)).collect()
    };
    assert!(of(later(100)).iter().all(|(role, near)| *near == Nearness::Far || role == "timestamp"));
    assert_eq!(of(later(120))["root"], Nearness::Within90Days);
    assert_eq!(of(later(175))["targets"], Nearness::Within30Days);
    assert_eq!(of(later(195))["image-minimal"], Nearness::Within7Days);
    assert_eq!(of(later(300))["snapshot"], Nearness::Expired);
    assert!(renew(&site.path, SignedDuration::from_hours(24 * 90), later(10)).unwrap().changed.already);
    let before = served(site, later(1));
    let done = renew(&site.path, SignedDuration::from_hours(24 * 90), later(150)).unwrap();
    assert_eq!(done.roles, ["root", "image-minimal", "targets", "snapshot"]);
    ceremonial.all_sign(
        &["root-ann", "root-bob", "image-ann", "image-bob", "targets-ann", "targets-bob", "snapshot-ann"],
        later(150),
    );
    let after = served(site, later(150));
    assert_eq!(of(later(150))["root"], Nearness::Far);
    assert_eq!(after.root.roles, before.root.roles);
    let targets = |outcome: &kiln_release::tuf::Outcome| outcome.targets.keys().cloned().collect::<Vec<_>>();
    assert_eq!(targets(&after), targets(&before));
    assert_eq!(after.roles["targets"].delegations, before.roles["targets"].delegations);
    assert_eq!(after.roles["targets"].expires, later(350));
}

#[test]
fn a_floor_only_rises_and_only_to_a_published_release() {
    let dir = tempfile::tempdir().unwrap();
    let site = init_lab(dir.path(), "lab", now()).unwrap();
    for release in [1, 2, 3] {
        build(&site, "minimal", release, now());
        publish(dir.path(), "minimal", release, now()).unwrap();
    }
    let floor = |floor| raise_floor(dir.path(), "minimal", floor, now());
    assert!(floor(2).unwrap().served);
    assert!(floor(2).unwrap().already);
    assert!(matches!(floor(1), Err(SiteError::FloorGoesDown { floor: 2, .. })));
    assert!(matches!(floor(4), Err(SiteError::FloorAboveAll { .. })));
    assert!(matches!(raise_floor(dir.path(), "other", 1, now()), Err(SiteError::FloorAboveAll { .. })));
    assert_eq!(Repository::newest(&site, now()).unwrap().site.floor("minimal"), 2);
    assert_eq!(trust_status(&site, now()).unwrap().floors, [("minimal".to_owned(), 2)].into());

    // With signers: whoever applies it is asked, because time has passed.
    let ceremonial = Ceremonial::finished();
    for release in [1, 2] {
        ceremonial.publish(release, later(1));
        let first: &[&str] = if release == 1 { &["targets-ann", "targets-bob"] } else { &[] };
        ceremonial.all_sign(&[first, &["image-ann", "image-bob", "snapshot-ann"]].concat(), later(1));
    }
    assert!(raise_floor(&ceremonial.site.path, "minimal", 2, later(2)).unwrap().waiting.is_some());
    let file = ceremonial.carried();
    let words = Request::read(&file).unwrap().words(later(2)).unwrap().join("\n");
    assert!(words.contains("FLOOR of minimal is 2: no machine runs a lower release again"), "{words}");
    for name in ["targets-ann", "targets-bob", "snapshot-ann"] {
        ceremonial.sign(&file, name).unwrap();
    }
    let needed = |away: &TakenAway| {
        assert_eq!((&away.floors, away.releases.len()), (&[("minimal".to_owned(), 2)].into(), 0));
        Err(SiteError::NotASite { dir: "a machine needs a lower one".into() })
    };
    let refused = apply::<SiteError, ()>(&ceremonial.site.path, std::slice::from_ref(&file), later(2), needed);
    assert!(refused.is_err() && ceremonial.site.open_request().exists());
    assert_eq!(Repository::newest(&ceremonial.site, later(2)).unwrap().site.floor("minimal"), 1);
    ceremonial.apply(&file, later(2)).unwrap();
    assert_eq!(Repository::newest(&ceremonial.site, later(2)).unwrap().site.floor("minimal"), 2);
}

/// In a lab all of it is signed at once, by the keys that lie there.
#[test]
fn a_labs_keys_are_rotated_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let site = init_lab(dir.path(), "lab", now()).unwrap();
    build(&site, "minimal", 1, now());
    publish(dir.path(), "minimal", 1, now()).unwrap();
    let memory = Memory { trust_root: None, seen: served(&site, now()).seen };
    for (day, role) in
        ["root", "targets", "snapshot", "timestamp", "director", "image-minimal", "root"].iter().enumerate()
    {
        let at = later(i64::try_from(day).unwrap());
        let done = rotate(dir.path(), role, None, at).unwrap();
        assert!(done.changed.served && done.changed.waiting.is_none(), "{role}: {done:?}");
        assert!(served(&site, at).targets.contains_key("minimal/1/manifest.json"), "{role}");
        build(&site, "minimal", 2 + day as u64, now());
        publish(dir.path(), "minimal", 2 + day as u64, at).unwrap();
    }
    let repository = Repository::adopt(&site, &site.timestamp_keys().unwrap(), &memory, later(7)).unwrap();
    assert_eq!(repository.releases.len(), 8);
    assert!(matches!(rotate(dir.path(), "image-other", None, now()), Err(SiteError::NoSuchRole { .. })));
    let left: Vec<_> = files_below(dir.path())
        .into_keys()
        .filter(|name| Path::new(name).extension().is_some_and(|e| e == "next"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
