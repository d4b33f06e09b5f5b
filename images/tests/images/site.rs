//! A site from nothing to published releases, and what it refuses.

use crate::common::{files_below, served, write_manifest};
use jiff::{SignedDuration, Timestamp};
use kiln_images::{Memory, Repository, SiteDir, SiteError, init_lab, publish, read_network, sign_network};
use kiln_release::network::NetworkConfig;
use kiln_release::verity::BLOCK;
use kiln_release::{Manifest, hex};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn later(hours: i64) -> Timestamp {
    now() + SignedDuration::from_hours(hours)
}

fn build(site: &SiteDir, image: &str, release: u64) -> Manifest {
    crate::common::build(site, image, release, now())
}

fn new_site() -> (tempfile::TempDir, SiteDir) {
    crate::common::new_site(now())
}

#[test]
fn a_new_site_verifies_and_its_secrets_are_its_owners() {
    let (dir, site) = new_site();
    let outcome = served(&site, now());
    assert_eq!(outcome.targets.keys().collect::<Vec<_>>(), ["site.json"]);
    assert!(outcome.stale.is_empty());
    let repository = Repository::newest(&site, now()).unwrap();
    assert_eq!((repository.site.name.as_str(), repository.releases.len()), ("lab", 0));
    assert_eq!((site.name.as_str(), SiteDir::open(dir.path()).unwrap()), ("lab", site.clone()));
    for key in [
        "offline/root.key",
        "offline/targets.key",
        "offline/snapshot.key",
        "online/timestamp.key",
        "online/director.key",
        "online/agent-ca.key",
        "online/agent-server.key",
    ] {
        let mode = fs::metadata(dir.path().join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    // Nothing is left of the draft.
    let mut names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["offline", "online", "repo", "state"]);
    assert_eq!(repository.site.agent_api.ca_pem, fs::read_to_string(site.online("agent-ca.pem")).unwrap());
}

#[test]
fn a_second_init_is_refused_and_changes_nothing_but_other_files_are_welcome() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("kiln.toml"), "").unwrap();
    fs::create_dir(dir.path().join("cache")).unwrap();
    init_lab(dir.path(), "lab", now()).unwrap();
    let before = files_below(dir.path());
    let error = init_lab(dir.path(), "other", now()).unwrap_err();
    assert!(matches!(error, SiteError::SiteExists { .. }), "{error}");
    assert_eq!(files_below(dir.path()), before);
    assert!(matches!(init_lab(dir.path(), "two words", now()), Err(SiteError::BadName { .. })));
    assert!(matches!(SiteDir::open(dir.path().join("cache")), Err(SiteError::NotASite { .. })));
}

#[test]
fn releases_are_published_listed_and_served_by_hash() {
    let (dir, site) = new_site();
    let first = build(&site, "minimal", 1);
    let second = build(&site, "minimal", 2);
    let other = build(&site, "other", 7);
    for (image, release) in [("minimal", 1), ("minimal", 2), ("other", 7)] {
        let done = publish(dir.path(), image, release, now()).unwrap();
        assert!(!done.already && done.served);
    }
    let seen_by_machines = served(&site, now()).targets;
    assert!(
        ["minimal/1", "minimal/2", "other/7"]
            .iter()
            .all(|r| seen_by_machines.contains_key(&format!("{r}/manifest.json")))
    );
    let repository = Repository::newest(&site, now()).unwrap();
    let listed: Vec<_> = repository.releases.iter().map(|r| (r.image.as_str(), r.release)).collect();
    assert_eq!(listed, [("minimal", 1), ("minimal", 2), ("other", 7)]);
    assert_eq!(repository.releases[0].manifest, first);
    assert_eq!(repository.highest("minimal").unwrap().manifest, second);
    assert_eq!(repository.highest("other").unwrap().manifest, other);
    assert_eq!(repository.highest("absent"), None);
    for artifact in [&first.uki, &first.kernel, &first.initramfs, &first.root] {
        assert_eq!(hex::sha256(&fs::read(site.artifact(&artifact.sha256)).unwrap()), artifact.sha256);
    }
    assert_eq!(hex::sha256(&fs::read(site.boot_program(&second.uki.sha256)).unwrap()), second.uki.sha256);
    // Targets was only signed anew when an image came in: 1 at first, then one for each image.
    assert!(site.metadata("3.targets.json").exists() && !site.metadata("4.targets.json").exists());
    assert!(site.metadata("2.image-minimal.json").exists());
    let leftovers: Vec<_> = files_below(&site.repo()).into_keys().filter(|name| name.contains(".new")).collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

#[test]
fn a_release_never_changes() {
    let (dir, site) = new_site();
    let mut manifest = build(&site, "minimal", 1);
    publish(dir.path(), "minimal", 1, now()).unwrap();
    let before = files_below(&site.repo());
    assert!(publish(dir.path(), "minimal", 1, now()).unwrap().already);
    manifest.command_line.push_str(" quiet");
    write_manifest(&site, &manifest);
    let error = publish(dir.path(), "minimal", 1, later(1)).unwrap_err();
    assert!(matches!(error, SiteError::PublishedDiffers { .. }), "{error}");
    assert_eq!(files_below(&site.repo()), before);
}

#[test]
fn what_does_not_fit_its_manifest_is_not_published() {
    let (dir, site) = new_site();
    let manifest = build(&site, "minimal", 1);
    let folder = site.build("minimal", 1);
    let metadata = files_below(&site.repo().join("metadata"));
    let refused = |what: &str| {
        let error = publish(dir.path(), "minimal", 1, now()).unwrap_err();
        assert_eq!(files_below(&site.repo().join("metadata")), metadata, "{what}");
        error
    };
    for name in ["kiln.efi", "kernel", "initramfs"] {
        let good = fs::read(folder.join(name)).unwrap();
        let mut bad = good.clone();
        bad[0] ^= 1;
        fs::write(folder.join(name), &bad).unwrap();
        assert!(matches!(refused(name), SiteError::ArtifactMismatch { .. }));
        fs::write(folder.join(name), [&good[..], b"x"].concat()).unwrap();
        assert!(matches!(refused(name), SiteError::ArtifactMismatch { .. }));
        fs::remove_file(folder.join(name)).unwrap();
        assert!(matches!(refused(name), SiteError::NotBuilt { .. }));
        fs::write(folder.join(name), &good).unwrap();
    }
    let root = fs::read(folder.join("root")).unwrap();
    for at in [0, 5 * BLOCK + 40, root.len() - 1] {
        let mut bad = root.clone();
        bad[at] ^= 1;
        fs::write(folder.join("root"), &bad).unwrap();
        assert!(matches!(refused("root"), SiteError::Verity { .. }), "byte {at}");
    }
    // A root artifact that is what the manifest hashes, but whose root hash is another.
    fs::write(folder.join("root"), &root).unwrap();
    let mut lying = manifest.clone();
    lying.verity.root_hash = hex::sha256(b"another");
    write_manifest(&site, &lying);
    assert!(matches!(refused("root hash"), SiteError::Verity { .. }));
    let mut misplaced = manifest.clone();
    misplaced.release = 2;
    fs::write(folder.join("manifest.json"), serde_json::to_vec(&misplaced).unwrap()).unwrap();
    assert!(matches!(refused("release"), SiteError::Format { .. }));
    write_manifest(&site, &manifest);
    publish(dir.path(), "minimal", 1, now()).unwrap();
    assert!(matches!(publish(dir.path(), "minimal", 9, now()), Err(SiteError::NotBuilt { .. })));
    assert!(matches!(publish(dir.path(), "../x", 1, now()), Err(SiteError::BadImageName { .. })));
}

#[test]
fn without_the_online_key_the_server_adopts_the_new_snapshot_later() {
    let (dir, site) = new_site();
    build(&site, "minimal", 1);
    let key = fs::read(site.online("timestamp.key")).unwrap();
    fs::remove_file(site.online("timestamp.key")).unwrap();
    assert!(!publish(dir.path(), "minimal", 1, now()).unwrap().served);
    assert_eq!(served(&site, now()).targets.len(), 1, "site.json alone");
    // A second one builds on the first although no timestamp covers it yet.
    build(&site, "minimal", 2);
    publish(dir.path(), "minimal", 2, now()).unwrap();

    fs::write(site.online("timestamp.key"), key).unwrap();
    // The server has no offline keys, and a half-written newer snapshot does not stop it.
    fs::remove_dir_all(dir.path().join("offline")).unwrap();
    fs::write(site.metadata("99.snapshot.json"), b"{\"signatures\":[],\"sig").unwrap();
    let adopted = adopt(&site, later(1)).unwrap();
    assert!(adopted.refused.unwrap().starts_with("99.snapshot.json: "));
    assert_eq!((adopted.snapshot, adopted.releases.len()), (3, 2));
    let outcome = served(&site, later(1));
    assert_eq!((outcome.timestamp.unwrap().version, outcome.targets.len()), (2, 3));
}

#[test]
fn a_publish_that_was_broken_off_before_the_timestamp_is_finished_by_the_next() {
    let (dir, site) = new_site();
    build(&site, "minimal", 1);
    let key = fs::read(site.online("timestamp.key")).unwrap();
    fs::remove_file(site.online("timestamp.key")).unwrap();
    publish(dir.path(), "minimal", 1, now()).unwrap();
    fs::write(site.online("timestamp.key"), key).unwrap();
    let again = publish(dir.path(), "minimal", 1, now()).unwrap();
    assert!(again.already && again.served);
    assert!(served(&site, now()).targets.contains_key("minimal/1/manifest.json"));
}

fn adopt(site: &SiteDir, now: Timestamp) -> Result<Repository, SiteError> {
    Repository::adopt(site, &site.timestamp_keys().unwrap(), &Memory::default(), now)
}

#[test]
fn a_timestamp_is_renewed_and_what_is_stale_is_said() {
    let (_dir, site) = new_site();
    let timestamp = || fs::read(site.metadata("timestamp.json")).unwrap();
    let first = timestamp();
    adopt(&site, now()).unwrap();
    assert_eq!(timestamp(), first, "a young one is kept");
    assert_eq!(served(&site, later(25)).stale[0].role, "timestamp");
    adopt(&site, later(25)).unwrap();
    let outcome = served(&site, later(25));
    let written = outcome.timestamp.unwrap();
    assert_eq!((written.version, written.expires, outcome.stale.len()), (2, later(49), 0));
    adopt(&site, later(366 * 24)).unwrap();
    let roles: Vec<_> = served(&site, later(366 * 24)).stale.into_iter().map(|e| e.role).collect();
    assert_eq!(roles, ["root", "snapshot", "targets"]);
}

#[test]
fn a_timestamp_counts_on_from_what_was_seen_and_from_nothing_unsigned() {
    let (dir, site) = new_site();
    for hours in [2, 4, 6] {
        adopt(&site, later(hours)).unwrap();
    }
    let seen = adopt(&site, later(6)).unwrap();
    let version = || served(&site, later(6)).timestamp.unwrap().version;
    assert_eq!(version(), 4);
    // One laid there by somebody else says nothing; what is remembered does.
    fs::write(site.metadata("timestamp.json"), r#"{"signatures":[],"signed":{"_type":"timestamp","version":99}}"#)
        .unwrap();
    let memory = Memory { trust_root: Some(seen.trust_root), seen: seen.seen };
    Repository::adopt(&site, &site.timestamp_keys().unwrap(), &memory, later(6)).unwrap();
    assert_eq!(version(), 5);
    // A repository that went back is refused, and its timestamp left alone.
    build(&site, "minimal", 1);
    let before = fs::read(site.metadata("timestamp.json")).unwrap();
    let snapshot = fs::read(site.metadata("1.snapshot.json")).unwrap();
    publish(dir.path(), "minimal", 1, later(6)).unwrap();
    let newer = adopt(&site, later(6)).unwrap();
    fs::remove_file(site.metadata("2.snapshot.json")).unwrap();
    fs::write(site.metadata("1.snapshot.json"), snapshot).unwrap();
    fs::write(site.metadata("timestamp.json"), &before).unwrap();
    let memory = Memory { trust_root: Some(newer.trust_root), seen: newer.seen };
    let error = Repository::adopt(&site, &site.timestamp_keys().unwrap(), &memory, later(7)).unwrap_err();
    assert!(matches!(error, SiteError::NoSnapshot { .. }), "{error}");
    assert_eq!(fs::read(site.metadata("timestamp.json")).unwrap(), before);
}

#[test]
fn a_foreign_timestamp_key_and_a_foreign_director_are_refused() {
    let (_dir, site) = new_site();
    let (_other_dir, other) = new_site();
    fs::copy(other.online("timestamp.key"), site.online("timestamp.key")).unwrap();
    let before = fs::read(site.metadata("timestamp.json")).unwrap();
    let error = adopt(&site, later(2)).unwrap_err();
    assert!(matches!(error, SiteError::NotTheTimestamp { .. }), "{error}");
    assert_eq!(fs::read(site.metadata("timestamp.json")).unwrap(), before);
    let signed = Repository::newest(&site, now()).unwrap().site;
    assert!(site.director_key(&signed).is_ok());
    fs::copy(other.online("director.key"), site.online("director.key")).unwrap();
    assert!(matches!(site.director_key(&signed), Err(SiteError::NotTheDirector { .. })));
}

#[test]
fn what_the_director_signs_the_site_verifies() {
    let (_dir, site) = new_site();
    let signed = Repository::newest(&site, now()).unwrap().site;
    let statement = serde_json::json!({ "_type": "kiln-assignment", "sequence": 3 });
    let text = kiln_release::sign_envelope(&statement, &[&site.director_key(&signed).unwrap()]).unwrap();
    let (read, sha256) = signed.verify_director::<serde_json::Value>(text.as_bytes()).unwrap();
    assert_eq!((read, sha256), (statement, hex::sha256(text.as_bytes())));
    for i in 0..text.len() {
        let mut altered = text.clone().into_bytes();
        altered[i] ^= 1;
        // The one byte that says nothing is the line break at the end.
        let verdict = signed.verify_director::<serde_json::Value>(&altered);
        assert!(verdict.is_err() || i + 1 == text.len(), "byte {i}");
    }
}

#[test]
fn a_site_has_one_server() {
    let (dir, site) = new_site();
    let held = site.lock_state().unwrap();
    let second = SiteDir::open(dir.path()).unwrap().lock_state().unwrap_err();
    assert!(matches!(second, SiteError::Served { .. }), "{second}");
    drop(held);
    assert!(site.lock_state().is_ok());
}

#[test]
fn a_network_configuration_is_signed_into_the_site_and_its_version_only_grows() {
    let (dir, site) = new_site();
    build(&site, "minimal", 1);
    publish(dir.path(), "minimal", 1, now()).unwrap();
    let config = |version: u64, vlan: u16| {
        let text = format!(
            "version = {version}\n[[section]]\n[[section.link]]\nname = \"up\"\nkind = \"card\"\ncard = [\"booted\"]\n\
             [[section.link]]\nname = \"v\"\nkind = \"vlan\"\non = \"up\"\nid = {vlan}\ndhcp4 = true\n"
        );
        read_network(Path::new("net.toml"), &text).unwrap()
    };
    let known = || Repository::newest(&site, now()).unwrap();
    assert_eq!(known().site.network, None);
    let before = files_below(&site.repo());
    let done = sign_network(dir.path(), config(1, 10), later(1)).unwrap();
    assert_eq!((done.already, done.served), (false, true));
    assert_eq!(known().site.network, Some(config(1, 10)));
    assert_eq!(known().releases.len(), 1, "releases are as they were");
    assert!(sign_network(dir.path(), config(1, 10), later(2)).unwrap().already);

    let signed = files_below(&site.repo());
    assert!(signed.len() > before.len());
    for stale in [config(1, 11), NetworkConfig { version: 0, ..config(1, 10) }] {
        let error = sign_network(dir.path(), stale, later(3)).unwrap_err();
        assert!(matches!(error, SiteError::NetworkVersion { old: 1, .. }), "{error}");
    }
    assert_eq!(files_below(&site.repo()), signed, "what is refused leaves nothing");
    sign_network(dir.path(), config(2, 11), later(4)).unwrap();
    // A release published afterwards leaves it in place, and the machines' own client agrees.
    build(&site, "minimal", 2);
    publish(dir.path(), "minimal", 2, later(5)).unwrap();
    assert_eq!(known().site.network.map(|network| network.version), Some(2));
    assert!(served(&site, later(5)).targets.contains_key("minimal/2/manifest.json"));
    // Without the offline key nothing can be signed.
    fs::remove_file(site.offline_key("targets")).unwrap();
    let error = sign_network(dir.path(), config(3, 12), later(6)).unwrap_err();
    assert!(matches!(error, SiteError::NoKey { .. }), "{error}");
}
