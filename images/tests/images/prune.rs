//! Old releases are taken out of an image's list, and their artifacts go only when nothing names them any more.

use crate::common::{build, new_site, served, write_manifest};
use jiff::{SignedDuration, Timestamp};
use kiln_images::{PruneOptions, Pruned, SiteDir, SiteError, prune, publish};
use kiln_release::tuf::{Limits, MetaFile, Snapshot, TargetFile, Targets};
use kiln_release::{Artifact, Manifest, Signer, hex, sign_envelope};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn later(hours: i64) -> Timestamp {
    now() + SignedDuration::from_hours(hours)
}

fn keep(keep: usize) -> PruneOptions {
    PruneOptions { image: "minimal".into(), keep, grace: None, dry_run: false }
}

fn at_once(keep: usize) -> PruneOptions {
    PruneOptions { grace: Some(SignedDuration::ZERO), ..self::keep(keep) }
}

fn prune_at(site: &SiteDir, options: &PruneOptions, at: Timestamp, needed: &[u64]) -> Result<Pruned, SiteError> {
    prune(site, options, at, |_| Ok(needed.iter().copied().collect()))
}

/// A site with these releases of `minimal`.
fn site_with(releases: &[u64]) -> (tempfile::TempDir, SiteDir, Vec<Manifest>) {
    let (dir, site) = new_site(now());
    let mut manifests = Vec::new();
    for release in releases {
        manifests.push(build(&site, "minimal", *release, now()));
        publish(dir.path(), "minimal", *release, now()).unwrap();
    }
    (dir, site, manifests)
}

/// The releases that machines are served.
fn listed(site: &SiteDir, at: Timestamp) -> Vec<String> {
    served(site, at)
        .targets
        .into_keys()
        .filter_map(|path| Some(path.strip_suffix("/manifest.json")?.to_owned()))
        .collect()
}

/// Whether all files of a release are there, or none.
fn is_there(site: &SiteDir, manifest: &Manifest) -> bool {
    let Manifest { image, release, uki, kernel, initramfs, root, .. } = manifest;
    let artifacts = [uki, kernel, initramfs, root].map(|artifact| site.artifact(&artifact.sha256).exists());
    let folder = site.repo().join("targets").join(image).join(release.to_string());
    let all = [artifacts.as_slice(), &[site.boot_program(&uki.sha256).exists(), folder.exists()]].concat();
    assert!(all.iter().all(|there| *there == all[0]), "{image}/{release} is there in part: {all:?}");
    all[0]
}

fn names_below(path: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap().path();
        if entry.is_dir() {
            names.extend(names_below(&entry));
        }
        names.insert(entry.display().to_string());
    }
    names
}

#[test]
fn old_releases_go_but_for_those_that_machines_need_and_artifacts_follow_later() {
    let (_dir, site, manifests) = site_with(&[1, 2, 3, 4, 5]);
    let before = served(&site, now());
    let done = prune_at(&site, &keep(2), now(), &[2, 5, 77]).unwrap();
    assert_eq!((done.removed, done.needed, done.waiting, done.served), (vec![1, 3], vec![2], 2, true));
    assert_eq!(listed(&site, now()), ["minimal/2", "minimal/4", "minimal/5"]);
    // Whoever saw the list before accepts the new one: its version is higher.
    let after = served(&site, now());
    assert_eq!(after.roles["image-minimal"].version, before.roles["image-minimal"].version + 1);
    assert_eq!(after.snapshot.version, before.snapshot.version + 1);
    assert_eq!(after.roles["targets"].version, before.roles["targets"].version, "no new key, no new top list");
    assert!(manifests.iter().all(|manifest| is_there(&site, manifest)), "artifacts stay until the next prune");

    let done = prune_at(&site, &keep(2), later(1), &[2]).unwrap();
    assert_eq!((done.removed, done.waiting, done.deleted.0 > 0), (vec![], 0, true));
    let there: Vec<bool> = manifests.iter().map(|manifest| is_there(&site, manifest)).collect();
    assert_eq!(there, [false, true, false, true, true]);
    assert_eq!(listed(&site, later(1)), ["minimal/2", "minimal/4", "minimal/5"]);
    // The newest stays whatever is asked for.
    assert_eq!(prune_at(&site, &keep(0), later(2), &[]).unwrap().removed, [2, 4]);
}

#[test]
fn the_grace_is_counted_from_the_prune_that_took_a_release_out() {
    let (_dir, site, manifests) = site_with(&[1, 2, 3]);
    let day = |keep| PruneOptions { grace: Some(SignedDuration::from_hours(24)), ..self::keep(keep) };
    assert_eq!(prune_at(&site, &day(2), now(), &[]).unwrap().waiting, 1);
    assert_eq!(prune_at(&site, &day(1), later(23), &[]).unwrap().waiting, 2);
    assert!(is_there(&site, &manifests[0]));
    assert_eq!(prune_at(&site, &day(1), later(24), &[]).unwrap().waiting, 1);
    assert_eq!((is_there(&site, &manifests[0]), is_there(&site, &manifests[1])), (false, true));
    assert_eq!(prune_at(&site, &at_once(1), later(24), &[]).unwrap().waiting, 0);
    assert_eq!((is_there(&site, &manifests[1]), is_there(&site, &manifests[2])), (false, true));
}

#[test]
fn a_file_that_another_release_names_stays() {
    let (dir, site) = new_site(now());
    let old = build(&site, "minimal", 1, now());
    for (image, release) in [("minimal", 2), ("minimal", 3), ("other", 1)] {
        let kernel = fs::read(site.build("minimal", 1).join("kernel")).unwrap();
        let manifest = build(&site, image, release, now());
        fs::write(site.build(image, release).join("kernel"), &kernel).unwrap();
        write_manifest(&site, &Manifest { kernel: old.kernel.clone(), ..manifest });
    }
    for (image, release) in [("minimal", 1), ("minimal", 2), ("minimal", 3), ("other", 1)] {
        publish(dir.path(), image, release, now()).unwrap();
    }
    let there = |artifact: &Artifact| site.artifact(&artifact.sha256).exists();
    assert_eq!(prune_at(&site, &at_once(1), now(), &[]).unwrap().removed, [1, 2]);
    assert_eq!((there(&old.uki), there(&old.kernel)), (false, true));
    let outcome = served(&site, now());
    for target in outcome.targets.iter().filter(|(path, _)| path.ends_with("manifest.json")) {
        let manifest: Manifest = serde_json::from_slice(&target.1.bytes).unwrap();
        for artifact in [&manifest.uki, &manifest.kernel, &manifest.initramfs, &manifest.root] {
            assert_eq!(hex::sha256(&fs::read(site.artifact(&artifact.sha256)).unwrap()), artifact.sha256);
        }
    }
}

#[test]
fn a_number_is_never_used_again_and_numbers_go_on() {
    let (dir, site, _) = site_with(&[1, 2, 3]);
    prune_at(&site, &at_once(1), now(), &[]).unwrap();
    let error = publish(dir.path(), "minimal", 2, now()).unwrap_err();
    assert!(matches!(error, SiteError::NumberUsed { release: 2, highest: 2, .. }), "{error}");
    assert!(publish(dir.path(), "minimal", 3, now()).unwrap().already);
    build(&site, "minimal", 4, now());
    publish(dir.path(), "minimal", 4, now()).unwrap();
    assert_eq!(listed(&site, now()), ["minimal/3", "minimal/4"]);
}

#[test]
fn nothing_goes_that_machines_are_still_served() {
    let (_dir, site, manifests) = site_with(&[1, 2]);
    let key = fs::read(site.online("timestamp.key")).unwrap();
    fs::remove_file(site.online("timestamp.key")).unwrap();
    let done = prune_at(&site, &at_once(1), now(), &[]).unwrap();
    assert_eq!((done.removed, done.served, done.waiting), (vec![1], false, 1));
    assert_eq!(listed(&site, now()), ["minimal/1", "minimal/2"], "the server has not adopted it");
    assert!(is_there(&site, &manifests[0]));
    fs::write(site.online("timestamp.key"), key).unwrap();
    // Nobody can tell what machines read without a timestamp that verifies: nothing goes.
    let timestamp = fs::read(site.metadata("timestamp.json")).unwrap();
    fs::write(site.metadata("timestamp.json"), b"{}").unwrap();
    fs::rename(site.online("timestamp.key"), site.online("elsewhere")).unwrap();
    let done = prune_at(&site, &at_once(1), now(), &[]).unwrap();
    assert_eq!((done.deleted, done.served), ((0, 0), false));
    fs::rename(site.online("elsewhere"), site.online("timestamp.key")).unwrap();
    fs::write(site.metadata("timestamp.json"), timestamp).unwrap();
    assert!(prune_at(&site, &at_once(1), now(), &[]).unwrap().served);
    assert_eq!((listed(&site, now()), is_there(&site, &manifests[1])), (vec!["minimal/2".to_owned()], true));
    assert!(!is_there(&site, &manifests[0]), "what could not go before goes now");
}

#[test]
fn old_metadata_goes_and_roots_stay() {
    let (_dir, site, _) = site_with(&[1, 2, 3, 4]);
    fs::write(site.metadata("99.snapshot.json"), b"half written").unwrap();
    fs::write(site.metadata("notes.json"), b"a person's").unwrap();
    prune_at(&site, &keep(2), now(), &[]).unwrap();
    let names: BTreeSet<String> = fs::read_dir(site.repo().join("metadata"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = [
        "1.root.json",
        "2.targets.json",
        "4.image-minimal.json",
        "5.image-minimal.json",
        "5.snapshot.json",
        "6.snapshot.json",
        "99.snapshot.json",
        "notes.json",
        "timestamp.json",
    ];
    assert_eq!(names, expected.map(str::to_owned).into());
}

#[test]
fn what_is_refused_or_only_asked_for_changes_nothing() {
    let (_dir, site, _) = site_with(&[1, 2, 3]);
    let before = names_below(&site.path);
    let unknown = PruneOptions { image: "other".into(), ..keep(1) };
    assert!(matches!(prune_at(&site, &unknown, now(), &[]), Err(SiteError::NoSuchImage { .. })));
    let dry = PruneOptions { dry_run: true, ..at_once(1) };
    assert_eq!(prune_at(&site, &dry, now(), &[2]).unwrap().removed, [1]);
    let refused = |_: &[u64]| Err(SiteError::NotASite { dir: "the server does not answer".into() });
    assert!(matches!(prune(&site, &at_once(1), now(), refused), Err(SiteError::NotASite { .. })));
    // The lock of publishers is the one file that may be new.
    assert_eq!(names_below(&site.path), before);
    fs::remove_file(site.offline_key("image-minimal")).unwrap();
    assert!(matches!(prune_at(&site, &at_once(1), now(), &[]), Err(SiteError::NoKey { .. })));
    assert_eq!(listed(&site, now()).len(), 3);
}

#[test]
fn a_prune_that_was_killed_after_its_note_deletes_nothing_that_is_listed() {
    let (_dir, site, manifests) = site_with(&[1, 2]);
    // As far as the note came: the key for what follows is missing.
    let key = fs::read(site.offline_key("snapshot")).unwrap();
    fs::remove_file(site.offline_key("snapshot")).unwrap();
    prune_at(&site, &keep(1), now(), &[]).unwrap_err();
    assert!(fs::read_to_string(site.path.join("offline/pruned.json")).unwrap().contains("\"release\": 1"));
    fs::write(site.offline_key("snapshot"), key).unwrap();
    prune_at(&site, &at_once(2), later(1), &[]).unwrap();
    assert!(is_there(&site, &manifests[0]) && listed(&site, later(1)).len() == 2);
    prune_at(&site, &at_once(1), later(2), &[]).unwrap();
    assert!(!is_there(&site, &manifests[0]));
}

/// As if so many releases had been published one by one.
fn fill_up(site: &SiteDir, count: u64) {
    let key = |name: &str| Signer::from_pkcs8_pem(&fs::read_to_string(site.offline_key(name)).unwrap()).unwrap();
    let state = served(site, now());
    let first: Manifest = serde_json::from_slice(&state.targets["minimal/1/manifest.json"].bytes).unwrap();
    let mut list: Targets = state.roles["image-minimal"].clone();
    list.version += 1;
    for release in 2..=count {
        let manifest = serde_json::to_vec(&Manifest { release, ..first.clone() }).unwrap();
        let folder = site.repo().join(format!("targets/minimal/{release}"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{}.manifest.json", hex::sha256(&manifest))), &manifest).unwrap();
        list.targets.insert(format!("minimal/{release}/manifest.json"), TargetFile::of(&manifest));
    }
    let text = sign_envelope(&list, &[&key("image-minimal")]).unwrap();
    fs::write(site.metadata(&format!("{}.image-minimal.json", list.version)), &text).unwrap();
    let mut snapshot: Snapshot = state.snapshot.clone();
    snapshot.version += 1;
    snapshot.meta.insert("image-minimal.json".into(), MetaFile::of(list.version, text.as_bytes()));
    let text = sign_envelope(&snapshot, &[&key("snapshot")]).unwrap();
    fs::write(site.metadata(&format!("{}.snapshot.json", snapshot.version)), text).unwrap();
}

#[test]
fn a_full_list_is_warned_of_refused_and_cured() {
    let (dir, site, _) = site_with(&[1]);
    let limit = Limits::default().delegation;
    let publish_next = |release| {
        build(&site, "minimal", release, now());
        publish(dir.path(), "minimal", release, now())
    };
    fill_up(&site, 1_000);
    assert_eq!(publish_next(1_001).unwrap().crowded, None);
    fill_up(&site, 1_700);
    let crowded = publish_next(1_701).unwrap().crowded.expect("it is warned");
    assert!(crowded.bytes >= limit / 5 * 4 && crowded.limit == limit, "{crowded:?}");
    // As many as there is room for.
    let full = limit * 1_701 / crowded.bytes - 3;
    fill_up(&site, full);
    let before = names_below(&site.repo());
    let mut release = full;
    let error = loop {
        release += 1;
        match publish_next(release) {
            Ok(_) => assert!(release < full + 10, "the limit was passed"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SiteError::ListFull { .. }), "{error}");
    assert!(error.to_string().contains("kiln release prune minimal --keep N"), "{error}");
    let new: Vec<_> = names_below(&site.repo()).difference(&before).cloned().collect();
    assert!(!new.iter().any(|name| name.contains(&format!("/{release}"))), "what was refused left nothing: {new:?}");
    let done = prune_at(&site, &keep(100), now(), &[1]).unwrap();
    assert_eq!((done.removed.len(), done.needed), (usize::try_from(release).unwrap() - 102, vec![1]));
    assert_eq!(publish_next(release).unwrap().crowded, None);
    assert_eq!(served(&site, now()).targets.len(), 1 + 102);
}
