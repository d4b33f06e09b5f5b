//! A site whose keys people hold: the ceremony, a publish with several signers, other keys, fewer keys, new dates, and
//! what a signer's machine refuses.

use crate::common::{build, served};
use jiff::{SignedDuration, Timestamp};
use kiln_images::request::Request;
use kiln_images::sealed::{Passphrase, make_key, public_file, read_public};
use kiln_images::status::{Nearness, trust_status};
use kiln_images::{
    Applied, Ceremony, Memory, Repository, RoleHolders, SiteDir, SiteError, TakenAway, apply, drop_request, init_lab,
    init_site, publish, raise_floor, renew, revoke_key, rotate, sign_request,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const PASSPHRASE: &str = "nine lives of a cat";

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn later(days: i64) -> Timestamp {
    now() + SignedDuration::from_hours(days * 24)
}

/// Everything that machines are served, by path.
fn files_below(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap().path();
        if entry.is_dir() {
            out.extend(files_below(&entry));
        } else {
            out.insert(entry.display().to_string(), fs::read(&entry).unwrap());
        }
    }
    out
}

/// People with keys on machines of their own, and a site.
struct Ceremonial {
    dir: tempfile::TempDir,
    site: SiteDir,
}

impl Ceremonial {
    fn person(dir: &Path, name: &str) -> PathBuf {
        let folder = dir.join(name);
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join(format!("{name}.key"));
        make_key(&file, Some(&Passphrase::of_line(PASSPHRASE)), 10).unwrap();
        file
    }

    fn holders(dir: &Path, threshold: u32, names: &[&str]) -> RoleHolders {
        let keys = names.iter().map(|name| {
            let file = Self::person(dir, name);
            ((*name).to_owned(), read_public(&public_file(&file)).unwrap())
        });
        RoleHolders { threshold, keys: keys.collect() }
    }

    /// Not signed yet.
    fn begin() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let people = dir.path().join("people");
        let ceremony = Ceremony {
            root: Self::holders(&people, 2, &["root-ann", "root-bob", "root-cid"]),
            targets: Self::holders(&people, 2, &["targets-ann", "targets-bob"]),
            snapshot: Self::holders(&people, 1, &["snapshot-ann", "snapshot-bob"]),
            images: Self::holders(&people, 2, &["image-ann", "image-bob", "image-cid"]),
            operators: None,
            days: 200,
        };
        let (site, waiting) = init_site(&dir.path().join("site"), "works", &ceremony, now()).unwrap();
        assert_eq!(waiting.lacking.len(), 3, "{waiting:?}");
        Self { dir, site }
    }

    fn key(&self, name: &str) -> PathBuf {
        self.dir.path().join("people").join(name).join(format!("{name}.key"))
    }

    /// The file as it is carried by hand.
    fn carried(&self) -> PathBuf {
        let file = self.dir.path().join("stick.json");
        fs::copy(self.site.open_request(), &file).unwrap();
        file
    }

    fn sign(&self, file: &Path, name: &str) -> Result<Vec<String>, SiteError> {
        let ask = || Ok::<_, SiteError>(Passphrase::of_line(PASSPHRASE));
        sign_request(&mut Request::read(file)?, file, &self.key(name), false, ask)
    }

    fn apply(&self, file: &Path, at: Timestamp) -> Result<Applied, SiteError> {
        apply::<SiteError, ()>(&self.site.path, &[file.to_owned()], at, |_| Ok(()))
    }

    /// Everybody signs one copy, one after another.
    fn all_sign(&self, names: &[&str], at: Timestamp) {
        let file = self.carried();
        for name in names {
            self.sign(&file, name).unwrap();
        }
        let done = self.apply(&file, at).unwrap();
        assert!(matches!(done, Applied::Done { served: true, .. }), "{done:?}");
    }

    fn finished() -> Self {
        let site = Self::begin();
        site.all_sign(&["root-ann", "root-cid", "targets-ann", "targets-bob", "snapshot-bob"], now());
        site
    }

    fn publish(&self, release: u64, at: Timestamp) {
        build(&self.site, "minimal", release, now());
        let done = publish(&self.site.path, "minimal", release, at).unwrap();
        assert!(done.waiting.is_some() && !done.served, "{done:?}");
    }
}

#[test]
fn a_site_begins_when_every_threshold_has_signed_and_not_before() {
    let ceremonial = Ceremonial::begin();
    let site = &ceremonial.site;
    assert!(
        !fs::read_dir(site.path.join("offline")).unwrap().any(|e| e
            .unwrap()
            .path()
            .extension()
            .is_some_and(|x| x == "key"))
    );
    let unfinished = Repository::newest(site, now()).unwrap_err();
    assert!(matches!(unfinished, SiteError::Unfinished { .. }), "{unfinished}");
    build(site, "minimal", 1, now());
    assert!(matches!(publish(&site.path, "minimal", 1, now()), Err(SiteError::Unfinished { .. })));

    // Two people sign copies of their own; the signatures are put together at the site.
    let (first, second) = (ceremonial.carried(), ceremonial.dir.path().join("other.json"));
    fs::copy(&first, &second).unwrap();
    assert_eq!(ceremonial.sign(&first, "root-ann").unwrap(), ["root"]);
    assert_eq!(ceremonial.sign(&first, "root-ann").unwrap(), ["root"], "twice is once");
    assert_eq!(ceremonial.sign(&second, "root-bob").unwrap(), ["root"]);
    for name in ["targets-ann", "targets-bob"] {
        assert_eq!(ceremonial.sign(&second, name).unwrap(), ["targets"]);
    }
    let waiting = ceremonial.apply(&first, now()).unwrap();
    assert!(matches!(&waiting, Applied::Waiting(w) if w.lacking.len() == 3), "{waiting:?}");
    let waiting = ceremonial.apply(&second, now()).unwrap();
    let Applied::Waiting(waiting) = waiting else { panic!("snapshot is not signed") };
    assert_eq!(waiting.lacking.len(), 1);
    assert!(
        waiting.lacking[0].starts_with("snapshot has 0 of 1 signatures and lacks 1, of: snapshot-ann ("),
        "{waiting:?}"
    );
    assert!(!site.metadata("1.root.json").exists());
    ceremonial.sign(&second, "snapshot-ann").unwrap();
    assert!(matches!(ceremonial.apply(&second, now()).unwrap(), Applied::Done { served: true, .. }));
    assert!(!site.open_request().exists());
    assert_eq!(served(site, now()).root.version, 1);
    let status = trust_status(site, now()).unwrap();
    let of = |role: &str| status.roles.iter().find(|known| known.role == role).unwrap();
    assert_eq!((of("root").threshold, of("root").keys.len(), of("root").days_left), (2, 3, 200));
    let signers: Vec<_> = of("root").keys.iter().filter(|k| k.signed).filter_map(|k| k.name.clone()).collect();
    assert_eq!(signers.len(), 2);
    assert!(signers.iter().all(|name| ["root-ann", "root-bob"].contains(&name.as_str())), "{signers:?}");
    assert!(matches!(ceremonial.apply(&second, now()), Err(SiteError::NoOpenRequest { .. })));
}

#[test]
fn a_half_signed_publish_changes_nothing_and_is_taken_up_again() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    let before = files_below(&site.repo());
    ceremonial.publish(1, later(1));
    assert_eq!(files_below(&site.repo()), before);

    let file = ceremonial.carried();
    let words = Request::read(&file).unwrap().words(later(1)).unwrap().join("\n");
    for expected in [
        "ADDS release minimal/1",
        "UKI SHA-256",
        "2 of 3 keys sign image-minimal, which may list minimal/*/manifest.json",
        "0 other releases stay as they are",
    ] {
        assert!(words.contains(expected), "{expected}: {words}");
    }
    // The delegation is new: top-level targets say who signs it, so both are signed.
    for name in ["image-ann", "targets-ann", "targets-bob", "snapshot-ann"] {
        ceremonial.sign(&file, name).unwrap();
    }
    let waiting = ceremonial.apply(&file, later(1)).unwrap();
    assert!(matches!(&waiting, Applied::Waiting(w) if w.lacking.len() == 1), "{waiting:?}");
    assert_eq!(files_below(&site.repo()), before, "one of two signers is none");
    // Another command finds it open; the same publish says what it waits for.
    build(site, "minimal", 2, now());
    let other = publish(&site.path, "minimal", 2, later(1)).unwrap_err();
    assert!(matches!(other, SiteError::RequestOpen { .. }), "{other}");
    let again = publish(&site.path, "minimal", 1, later(1)).unwrap();
    assert_eq!(again.waiting.unwrap().lacking.len(), 1);

    ceremonial.sign(&file, "image-cid").unwrap();
    assert!(matches!(ceremonial.apply(&file, later(2)).unwrap(), Applied::Done { served: true, .. }));
    let outcome = served(site, later(2));
    assert!(outcome.targets.contains_key("minimal/1/manifest.json"));
    // A snapshot that was made before the list had its signatures names it by version.
    assert_eq!(outcome.snapshot.meta["image-minimal.json"].length, None);
    let manifest = Repository::newest(site, later(2)).unwrap().releases[0].manifest.clone();
    assert!(site.artifact(&manifest.root.sha256).exists() && site.boot_program(&manifest.uki.sha256).exists());
    // The next one needs the image's signers and the snapshot's alone.
    ceremonial.publish(2, later(3));
    ceremonial.all_sign(&["image-bob", "image-ann", "snapshot-ann"], later(3));
    assert!(served(site, later(3)).targets.contains_key("minimal/2/manifest.json"));
    // One that is given up leaves no trace.
    let before = files_below(&site.repo());
    ceremonial.publish(3, later(4));
    assert_eq!(drop_request(&site.path).unwrap(), "publish minimal/3");
    assert_eq!(files_below(&site.repo()), before);
}

#[test]
fn killed_after_any_file_the_same_command_does_the_rest() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    ceremonial.publish(1, later(1));
    let file = ceremonial.carried();
    for name in ["image-ann", "image-bob", "targets-ann", "targets-bob", "snapshot-ann"] {
        ceremonial.sign(&file, name).unwrap();
    }
    let request = fs::read(&file).unwrap();
    ceremonial.apply(&file, later(1)).unwrap();
    let done = files_below(&site.repo());
    // As if it had been killed before the request was removed, and before the snapshot or the list was written.
    for missing in ["2.snapshot.json", "1.image-minimal.json"] {
        fs::write(site.open_request(), &request).unwrap();
        fs::remove_file(site.metadata(missing)).unwrap();
        fs::remove_file(site.metadata("timestamp.json")).unwrap();
        let again = ceremonial.apply(&file, later(1)).unwrap();
        assert!(matches!(again, Applied::Done { .. }), "{missing}: {again:?}");
        assert!(!site.open_request().exists());
        let now_there = files_below(&site.repo());
        assert_eq!(now_there.keys().collect::<Vec<_>>(), done.keys().collect::<Vec<_>>(), "{missing}");
        assert!(served(site, later(1)).targets.contains_key("minimal/1/manifest.json"));
    }
}

/// What a request says of the state before decides which differences are told.
#[test]
fn what_is_taken_away_is_told_or_nothing_is_signed() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    for release in [1, 2] {
        ceremonial.publish(release, later(1));
        let first: &[&str] = if release == 1 { &["targets-ann", "targets-bob"] } else { &[] };
        ceremonial.all_sign(&[first, &["image-ann", "image-bob", "snapshot-ann"]].concat(), later(1));
    }
    let prune = kiln_images::PruneOptions { image: "minimal".into(), keep: 1, grace: None, dry_run: false };
    let done = kiln_images::prune::<SiteError>(site, &prune, later(1), |_| Ok([].into())).unwrap();
    assert!(done.request.is_some());
    let good: serde_json::Value = serde_json::from_slice(&fs::read(ceremonial.carried()).unwrap()).unwrap();
    let bad = ceremonial.dir.path().join("bad.json");
    let write = |request: &serde_json::Value| fs::write(&bad, request.to_string()).unwrap();
    write(&good);
    let words = Request::read(&bad).unwrap().words(later(1)).unwrap().join("\n");
    assert!(words.contains("REMOVES minimal/1/manifest.json"), "{words}");
    let refused = |request: &serde_json::Value, reason: &str| {
        write(request);
        let read = Request::read(&bad);
        let told = read.and_then(|request| request.words(later(1))).unwrap_err();
        let signed = ceremonial.sign(&bad, "image-ann").unwrap_err();
        assert!([&told, &signed].iter().all(|error| error.to_string().contains(reason)), "{told}; {signed}");
    };
    // Without the list before, or with an older one that was signed all the same.
    let mut without = good.clone();
    without["base"].as_object_mut().unwrap().remove("image-minimal");
    refused(&without, "image-minimal version 3 shall replace nothing of it");
    let mut older = good.clone();
    older["base"]["image-minimal"] =
        fs::read_to_string(site.repo().join("metadata/1.image-minimal.json")).unwrap().into();
    refused(&older, "shall replace version 1 of it");
    // Two of a kind: one that is read, and one that is signed with it.
    let mut twice = good.clone();
    let documents = twice["documents"].as_array_mut().unwrap();
    documents.push(documents[0].clone());
    refused(&twice, "is in it twice");
    drop_request(&site.path).unwrap();
    // The same of the site's own object.
    assert!(raise_floor(&site.path, "minimal", 2, later(1)).unwrap().waiting.is_some());
    let mut floors: serde_json::Value = serde_json::from_slice(&fs::read(ceremonial.carried()).unwrap()).unwrap();
    floors["base"].as_object_mut().unwrap().remove("site.json");
    write(&floors);
    let told = Request::read(&bad).unwrap().words(later(1)).unwrap_err();
    assert!(told.to_string().contains("site.json before is not in the request"), "{told}");
}

/// Between the proposal and the last signature machines may have been given what is to go.
#[test]
fn whoever_applies_a_prune_is_asked_what_machines_need_by_then() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    for release in 1..=3 {
        ceremonial.publish(release, later(1));
        let first: &[&str] = if release == 1 { &["targets-ann", "targets-bob"] } else { &[] };
        ceremonial.all_sign(&[first, &["image-ann", "image-bob", "snapshot-ann"]].concat(), later(1));
    }
    let prune_at = |at: Timestamp| {
        let grace = Some(SignedDuration::from_hours(24));
        let options = kiln_images::PruneOptions { image: "minimal".into(), keep: 1, grace, dry_run: false };
        kiln_images::prune::<SiteError>(site, &options, at, |_| Ok([].into())).unwrap()
    };
    assert!(prune_at(later(1)).request.is_some());
    let file = ceremonial.carried();
    for name in ["image-ann", "image-bob", "snapshot-ann"] {
        ceremonial.sign(&file, name).unwrap();
    }
    let before = files_below(&site.repo());
    let needed = |away: &TakenAway| {
        let releases = [("minimal".to_owned(), [1, 2].into())].into();
        assert_eq!(*away, TakenAway { releases, ..TakenAway::default() });
        Err(SiteError::NotASite { dir: "a machine needs one of them".into() })
    };
    let refused = apply::<SiteError, ()>(&site.path, std::slice::from_ref(&file), later(2), needed);
    assert!(refused.is_err() && site.open_request().exists());
    assert_eq!(files_below(&site.repo()), before, "nothing is taken out");
    ceremonial.apply(&file, later(2)).unwrap();
    assert_eq!(served(site, later(2)).targets.keys().filter(|path| path.starts_with("minimal/")).count(), 1);
    // Machines were served the old list until now: from here on the grace counts, not from the proposal.
    assert_eq!(prune_at(later(2)).waiting, 2);
    assert_eq!(prune_at(later(3)).waiting, 0);
}

#[test]
fn what_is_altered_on_the_way_gets_no_signature_in() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    ceremonial.publish(1, later(1));
    let good = ceremonial.carried();
    let text = fs::read_to_string(&good).unwrap();
    let bad = ceremonial.dir.path().join("bad.json");
    let write = |text: &str| fs::write(&bad, text).unwrap();

    // A longer life, put in on the stick: its signatures are of another document.
    write(&text.replacen("\"expires\": \"2026-", "\"expires\": \"2036-", 1));
    ceremonial.sign(&bad, "image-ann").unwrap();
    let refused = ceremonial.apply(&bad, later(1)).unwrap_err();
    assert!(matches!(refused, SiteError::OtherRequest { .. }), "{refused}");
    // A manifest other than the one that is signed is not shown as if it were.
    write(&text.replace("console=ttyS0", "init=/bin/sh  "));
    assert!(Request::read(&bad).unwrap().words(later(1)).is_err());
    // A base that nobody signed could hide a difference.
    write(&text.replacen("\\\"version\\\":1", "\\\"version\\\":7", 1));
    assert!(Request::read(&bad).and_then(|request| request.words(later(1))).is_err());
    // A path out of the repository.
    write(&text.replace("metadata/1.image-minimal.json", "metadata/../../x"));
    assert!(Request::read(&bad).is_err());
    write(&text.replace("targets/minimal/1/", "targets/../../1/"));
    assert!(Request::read(&bad).is_err());
    // A forged signature is left out, and what was signed stays.
    ceremonial.sign(&good, "image-ann").unwrap();
    let signed = fs::read_to_string(&good).unwrap();
    let at = signed.find("\"sig\": \"").unwrap() + 8;
    let flipped = if &signed[at..=at] == "0" { "1" } else { "0" };
    write(&format!("{}{flipped}{}", &signed[..at], &signed[at + 1..]));
    let request = Request::read(&bad).unwrap();
    let mut open = site.read_open_request().unwrap().unwrap();
    assert_eq!(open.merge(&request).unwrap(), 0);
    assert_eq!(open.merge(&Request::read(&good).unwrap()).unwrap(), 1);
    // A stranger's key under a signer's name: the fingerprint that is shown would be that signer's.
    let stranger = Ceremonial::person(ceremonial.dir.path(), "other");
    let theirs = kiln_release::hex::encode(read_public(&public_file(&stranger)).unwrap().as_bytes());
    let anns = kiln_release::hex::encode(read_public(&public_file(&ceremonial.key("image-ann"))).unwrap().as_bytes());
    assert!(text.contains(&format!("\"public\": \"{anns}\"")));
    write(&text.replace(&format!("\"public\": \"{anns}\""), &format!("\"public\": \"{theirs}\"")));
    let refused = Request::read(&bad).unwrap_err();
    assert!(refused.to_string().contains("is not the key id of its key"), "{refused}");
    // Words cannot obey a terminal.
    write(&text.replace("\"name\": \"publish", "\"name\": \"\\u001b[2Jpublish"));
    let words = Request::read(&bad).unwrap().words(later(1)).unwrap().join("\n");
    assert!(!words.contains('\u{1b}') && words.contains("?[2Jpublish"), "{words}");
    // Nor turn a line round: a key's name could make another fingerprint of it.
    write(&text.replace("\"image-ann\"", "\"image-\u{202e}nna\""));
    let words = Request::read(&bad).unwrap().words(later(1)).unwrap().join("\n");
    assert!(!words.contains('\u{202e}') && words.contains("image-?nna"), "{words}");
    // Whoever has no part in it signs nothing.
    let stranger = Ceremonial::person(ceremonial.dir.path(), "stranger");
    let ask = || Ok::<_, SiteError>(Passphrase::of_line(PASSPHRASE));
    let refused = sign_request(&mut Request::read(&good).unwrap(), &good, &stranger, false, ask).unwrap_err();
    assert!(matches!(refused, SiteError::NotASigner { .. }), "{refused}");
}

/// The machine with the key remembers.
#[test]
fn a_key_signs_for_one_site_and_one_document_of_a_version() {
    let ceremonial = Ceremonial::finished();
    let site = &ceremonial.site;
    ceremonial.publish(1, later(1));
    let first = ceremonial.dir.path().join("first.json");
    fs::copy(site.open_request(), &first).unwrap();
    ceremonial.sign(&first, "image-ann").unwrap();
    drop_request(&site.path).unwrap();
    ceremonial.publish(2, later(2));
    let second = ceremonial.dir.path().join("second.json");
    fs::copy(site.open_request(), &second).unwrap();
    let refused = ceremonial.sign(&second, "image-ann").unwrap_err();
    assert!(matches!(refused, SiteError::SignedOther { version: 1, .. }), "{refused}");
    let ask = || Ok::<_, SiteError>(Passphrase::of_line(PASSPHRASE));
    sign_request(&mut Request::read(&second).unwrap(), &second, &ceremonial.key("image-ann"), true, ask).unwrap();
    for name in ["image-bob", "targets-ann", "targets-bob", "snapshot-ann"] {
        ceremonial.sign(&second, name).unwrap();
    }
    ceremonial.apply(&second, later(2)).unwrap();
    ceremonial.publish(3, later(3));
    ceremonial.all_sign(&["image-ann", "image-bob", "snapshot-ann"], later(3));
    // The old request again, once a newer version is signed.
    let refused = ceremonial.sign(&first, "image-ann").unwrap_err();
    assert!(matches!(refused, SiteError::SignedNewer { version: 1, last: 2, .. }), "{refused}");

    // Another site with the same people's keys, made by whoever writes requests.
    let other = Ceremonial::finished();
    other.publish(1, later(1));
    let mut request = Request::read(&other.carried()).unwrap();
    let forged = ceremonial.dir.path().join("forged.json");
    request.name = "publish minimal/4".into();
    request.write(&forged).unwrap();
    fs::copy(ceremonial.key("image-ann").with_extension("key.seen"), other.key("image-ann").with_extension("key.seen"))
        .unwrap();
    let refused = other.sign(&forged, "image-ann").unwrap_err();
    assert!(matches!(refused, SiteError::OtherRoot { .. }), "{refused}");
}

#[test]
fn a_wrong_passphrase_signs_nothing() {
    let ceremonial = Ceremonial::begin();
    let file = ceremonial.carried();
    let before = fs::read(&file).unwrap();
    let ask = || Ok::<_, SiteError>(Passphrase::of_line("not the passphrase"));
    let refused =
        sign_request(&mut Request::read(&file).unwrap(), &file, &ceremonial.key("root-ann"), false, ask).unwrap_err();
    assert!(matches!(refused, SiteError::WrongPassphrase { .. }), "{refused}");
    assert_eq!(fs::read(&file).unwrap(), before);
    assert!(!ceremonial.key("root-ann").with_extension("key.seen").exists());
}

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

#[test]
fn a_ceremony_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let holders = |threshold, names: &[&str]| Ceremonial::holders(dir.path(), threshold, names);
    let good = Ceremony {
        root: holders(2, &["a", "b"]),
        targets: holders(1, &["c"]),
        snapshot: holders(1, &["d"]),
        images: holders(1, &["e"]),
        operators: None,
        days: 365,
    };
    let refused = |ceremony: &Ceremony| init_site(&dir.path().join("site"), "works", ceremony, now()).unwrap_err();
    let too_many = Ceremony { root: RoleHolders { threshold: 3, ..good.root.clone() }, ..good.clone() };
    assert!(matches!(refused(&too_many), SiteError::Quorum { threshold: 3, keys: 2, .. }));
    let none = Ceremony { root: RoleHolders { threshold: 0, ..good.root.clone() }, ..good.clone() };
    assert!(matches!(refused(&none), SiteError::Quorum { .. }));
    let shared = Ceremony { snapshot: good.targets.clone(), ..good.clone() };
    assert!(matches!(refused(&shared), SiteError::SharedKey { .. }));
    let twice = RoleHolders { threshold: 2, keys: [good.root.keys[0].clone(), good.root.keys[0].clone()].into() };
    assert!(matches!(refused(&Ceremony { root: twice, ..good.clone() }), SiteError::Quorum { keys: 1, .. }));
    assert!(matches!(refused(&Ceremony { days: 0, ..good.clone() }), SiteError::Days { .. }));
    assert!(!dir.path().join("site").exists());
    init_site(&dir.path().join("site"), "works", &good, now()).unwrap();
}
