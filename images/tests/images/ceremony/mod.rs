//! A site whose keys people hold: the ceremony, and a publish and a prune with several signers.

mod keys;
mod refused;

use crate::common::{build, files_below, served};
use jiff::{SignedDuration, Timestamp};
use kiln_images::request::Request;
use kiln_images::sealed::{Passphrase, make_key, public_file, read_public};
use kiln_images::status::trust_status;
use kiln_images::{
    Applied, Ceremony, Repository, RoleHolders, SiteDir, SiteError, TakenAway, apply, drop_request, init_site, publish,
    sign_request,
};
use std::fs;
use std::path::{Path, PathBuf};

const PASSPHRASE: &str = "nine lives of a cat";

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn later(days: i64) -> Timestamp {
    now() + SignedDuration::from_hours(days * 24)
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
