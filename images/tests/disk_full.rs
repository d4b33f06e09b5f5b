//! A disk that gets full at any byte and any file of a publish or a prune: an error that names the file, nothing left
//! behind, and machines are served what they were served before.
#![allow(clippy::unwrap_used)]

mod common;
mod namespace;

use common::{build, served};
use jiff::Timestamp;
use kiln_images::{PruneOptions, SiteDir, SiteError, init_lab, prune, publish};
use kiln_release::hex;
use namespace::{inside, resize, tmpfs};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

/// Every file and folder of a site but for its builds, with the SHA-256 of its bytes.
fn tree(site: &SiteDir) -> BTreeMap<String, String> {
    let (mut all, mut open) = (BTreeMap::new(), vec![site.path.clone()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&site.path).unwrap().to_str().unwrap().to_owned();
            if name == "build" {
                continue;
            }
            let hash = if path.is_dir() { String::new() } else { hex::sha256(&fs::read(&path).unwrap()) };
            all.insert(name, hash);
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    all
}

fn releases(site: &SiteDir) -> Vec<String> {
    served(site, now()).targets.into_keys().collect()
}

/// A site on a file system of its own. The build folder is elsewhere, so that its files do not count.
fn small_site(dir: &Path) -> SiteDir {
    let (disk, elsewhere) = (dir.join("disk"), dir.join("build"));
    fs::create_dir(&disk).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    tmpfs(&disk, "size=4m,nr_inodes=1000");
    let site = init_lab(&disk, "lab", now()).unwrap();
    std::os::unix::fs::symlink(&elsewhere, disk.join("build")).unwrap();
    for release in 1..=3 {
        build(&site, "minimal", release, now());
        publish(&disk, "minimal", release, now()).unwrap();
    }
    site
}

/// Blocks and files that are used.
fn used(site: &SiteDir) -> (u64, u64) {
    let output = Command::new("stat").args(["-f", "-c", "%b %f %c %d"]).arg(&site.path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let numbers: Vec<u64> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
    (numbers[0] - numbers[1], numbers[2] - numbers[3])
}

/// Tries `work` with no room, then with a little more, until it goes through; says how often it was refused before its
/// snapshot was in place, and after.
fn until_it_fits(site: &SiteDir, room: Room, mut work: impl FnMut() -> Result<(), SiteError>) -> (u32, u32) {
    let (before, listed, first) = (tree(site), releases(site), used(site));
    let is_new = |name: &&String| name.starts_with("repo/") && !before.contains_key(*name);
    let mut late = 0;
    for refused in 0..500 {
        resize(&site.path, &room(u64::from(refused), first));
        let Err(error) = work() else { return (refused - late, late) };
        let SiteError::DiskFull { path } = &error else { panic!("{refused} more: {error}") };
        let name = path.strip_prefix(&site.path).unwrap().to_str().unwrap();
        assert!(!name.contains("/."), "{name} is nothing that a person knows");
        assert!(error.to_string().contains("Free some"), "{error}");
        let after = tree(site);
        let hidden = |name: &&String| name.contains("/.") && *name != "offline/.lock";
        assert_eq!(after.keys().find(hidden), None, "{refused} more: a temporary file");
        assert_eq!(releases(site), listed, "{refused} more: machines are served something else");
        for (name, hash) in &before {
            assert!(!name.starts_with("repo/") || after.get(name) == Some(hash), "{refused} more: {name} is another");
        }
        // Until the snapshot is in place; from then on only the timestamp, or the sweep of a prune, can fail.
        if after.keys().filter(is_new).any(|name| name.ends_with(".snapshot.json")) {
            late += 1;
        } else {
            assert_eq!(after.keys().find(is_new), None, "{refused} more: it was left behind");
        }
    }
    panic!("it never fits");
}

type Room = fn(u64, (u64, u64)) -> String;

fn blocks(more: u64, (blocks, _): (u64, u64)) -> String {
    format!("size={},nr_inodes=1000", (blocks + more) * 4096)
}

fn files(more: u64, (_, files): (u64, u64)) -> String {
    format!("size=4m,nr_inodes={}", files + more)
}

#[test]
fn a_full_disk_changes_nothing_that_is_served() {
    if !inside("a_full_disk_changes_nothing_that_is_served") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let site = small_site(dir.path());
    assert_eq!(fs::metadata(&site.path).unwrap().blksize(), 4096);
    let mut late = 0;
    for (room, release) in [(blocks as Room, 4), (files as Room, 5)] {
        build(&site, "minimal", release, now());
        // A first release of an image has more to write: its key, and the list of images.
        for image in ["minimal", if release == 4 { "first" } else { "second" }] {
            build(&site, image, release, now());
            let refused = until_it_fits(&site, room, || publish(&site.path, image, release, now()).map(|_| ()));
            assert!(refused.0 >= 8, "{image}/{release} was refused {refused:?} times only");
            late += refused.1;
            assert!(releases(&site).contains(&format!("{image}/{release}/manifest.json")));
        }
        let keep = if release == 4 { 3 } else { 2 };
        let options = PruneOptions { image: "minimal".into(), keep, grace: None, dry_run: false };
        let work = || prune(&site, &options, now(), |_: &[u64]| Ok::<_, SiteError>([].into())).map(|_| ());
        let refused = until_it_fits(&site, room, work);
        assert!(refused.0 >= 2, "the prune was refused {refused:?} times only");
        late += refused.1;
        assert_eq!(releases(&site).iter().filter(|path| path.starts_with("minimal/")).count(), keep);
    }
    assert!(late > 0, "the timestamp was never what did not fit");
}
