//! tough reads what Kiln publishes, and Kiln's client reads what it writes.
//!
//! tough is a program of its own (`images/tests/tough`), so that what it links stays out of the workspace. Where
//! `KILN_TOUGH` does not name it, the tests say so and pass; `make oracle-tough` builds it and sets that.

use crate::common::{build, new_site};
use crate::python_tuf::update;
use jiff::{SignedDuration, Timestamp};
use kiln_images::publish;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program.
pub fn tough() -> Option<PathBuf> {
    let named = std::env::var_os("KILN_TOUGH").map(PathBuf::from);
    if named.is_none() {
        eprintln!("skipped: KILN_TOUGH names no program; `make oracle-tough` builds it");
    }
    named
}

fn run(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn tough_reads_what_kiln_publishes_and_kiln_reads_what_tough_writes() {
    let Some(tough) = tough() else { return };
    let now = Timestamp::now();
    let (dir, site) = new_site(now);
    for (image, release) in [("minimal", 1), ("minimal", 2), ("other", 7)] {
        build(&site, image, release, now);
        publish(dir.path(), image, release, now).unwrap();
    }
    let (repo, root) = (site.repo(), site.metadata("1.root.json"));
    let (repo, root) = (repo.to_str().unwrap(), root.to_str().unwrap());
    let arguments = ["read", repo, root, "site.json", "minimal/2/manifest.json", "other/7/manifest.json"];
    let text = run(&tough, &arguments).unwrap();
    assert!(text.contains("kiln-site") && text.contains("\"release\": 2") && text.contains("\"release\": 7"), "{text}");
    // It is a judge, not a rubber stamp: one digit of a signature, and it refuses.
    let timestamp = std::fs::read_to_string(site.metadata("timestamp.json")).unwrap();
    let (before, after) = timestamp.split_once("\"sig\":\"").unwrap();
    let flipped = if after.starts_with('0') { '1' } else { '0' };
    std::fs::write(site.metadata("timestamp.json"), format!("{before}\"sig\":\"{flipped}{}", &after[1..])).unwrap();
    let error = run(&tough, &arguments).unwrap_err();
    assert!(error.contains("Signature threshold of 1 not met for role timestamp (0 valid signatures)"), "{error}");

    let written = dir.path().join("tough");
    let expires = Timestamp::from_second(now.as_second()).unwrap() + SignedDuration::from_hours(30 * 24);
    run(&tough, &["write", written.to_str().unwrap(), &expires.to_string()]).unwrap();
    let outcome = update(&written, &["site.json", "minimal/1/manifest.json", "odd/file"]);
    assert_eq!(outcome.root.version, 2);
    assert_eq!(outcome.targets["odd/file"].bytes, b"odd/file");
    assert_eq!(outcome.targets["odd/file"].role, "odd role/ü");
    assert_eq!(outcome.targets["minimal/1/manifest.json"].role, "image-minimal");
}
