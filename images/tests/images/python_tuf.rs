//! The reference implementation of TUF reads what Kiln publishes, and Kiln's client reads what it writes.
//!
//! Where it cannot be installed (no Python, no network) the test says so and passes.

use crate::common::{build, new_site};
use crate::python::python;
use jiff::Timestamp;
use kiln_images::publish;
use kiln_release::tuf::{Client, ExpiryPolicy, Fetched, Limits, Outcome, Request, Seen, TargetPath};
use std::path::Path;
use std::process::Command;

fn run(python: &Path, arguments: &[&str]) -> Result<String, String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python_tuf.py");
    let output = Command::new(python).arg(script).args(arguments).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// An update of Kiln's client from a folder.
pub fn update(repo: &Path, wanted: &[&str]) -> Outcome {
    let root = std::fs::read(repo.join("metadata/1.root.json")).unwrap();
    let wanted: Vec<TargetPath> = wanted.iter().map(|path| TargetPath::new(*path).unwrap()).collect();
    let (seen, limits, policy) = (Seen::default(), Limits::default(), ExpiryPolicy::Refuse);
    let mut client = Client::new(&root, seen, Timestamp::now(), limits, policy, wanted).unwrap();
    while let Request::Fetch { path, .. } = client.next() {
        let fetched = std::fs::read(repo.join(&path)).map_or(Fetched::Absent, Fetched::Bytes);
        client.feed(fetched).unwrap();
    }
    client.finish().unwrap()
}

#[test]
fn python_reads_what_kiln_publishes_and_kiln_reads_what_python_writes() {
    let Some(python) = python() else { return };
    let now = Timestamp::now();
    let (dir, site) = new_site(now);
    for (image, release) in [("minimal", 1), ("minimal", 2), ("other", 7)] {
        build(&site, image, release, now);
        publish(dir.path(), image, release, now).unwrap();
    }
    let (repo, root) = (site.repo(), site.metadata("1.root.json"));
    let arguments = [
        "read",
        repo.to_str().unwrap(),
        root.to_str().unwrap(),
        "site.json",
        "minimal/2/manifest.json",
        "other/7/manifest.json",
    ];
    let text = run(&python, &arguments).unwrap();
    assert!(text.contains("kiln-site") && text.contains("\"release\": 2") && text.contains("\"release\": 7"), "{text}");
    // It is a judge, not a rubber stamp: one byte of a signature, and it refuses.
    let timestamp = std::fs::read_to_string(site.metadata("timestamp.json")).unwrap();
    let (before, after) = timestamp.split_once("\"sig\":\"").unwrap();
    let flipped = if after.starts_with('0') { '1' } else { '0' };
    std::fs::write(site.metadata("timestamp.json"), format!("{before}\"sig\":\"{flipped}{}", &after[1..])).unwrap();
    let error = run(&python, &arguments).unwrap_err();
    assert!(error.contains("timestamp was signed by 0/1 keys"), "{error}");

    let written = dir.path().join("python");
    run(&python, &["write", written.to_str().unwrap()]).unwrap();
    let outcome = update(&written, &["site.json", "minimal/1/manifest.json", "odd/file"]);
    assert_eq!(outcome.root.version, 2);
    assert_eq!(outcome.targets["odd/file"].bytes, b"odd/file");
    assert_eq!(outcome.targets["odd/file"].role, "odd role/ü");
    assert_eq!(outcome.targets["minimal/1/manifest.json"].role, "image-minimal");
}
