//! Another implementation of TUF reads what Kiln publishes, and Kiln's client reads what it writes.

use crate::common::{build, new_site};
use jiff::{SignedDuration, Timestamp};
use kiln_images::publish;
use kiln_release::tuf::{Client, ExpiryPolicy, Fetched, Limits, Outcome, Request, Seen, TargetPath};
use std::path::Path;
use std::process::Command;

/// Another implementation as a program. `read REPO ROOT TARGET...` prints the targets, `write FOLDER EXPIRES` makes a repository
/// whose root was rotated once, with a delegated role of an odd name.
pub struct Other<'a> {
    pub program: &'a Path,
    /// What stands before those words.
    pub arguments: &'a [&'a str],
    /// What it says of a timestamp whose one signature does not hold.
    pub refusal: &'a str,
}

impl Other<'_> {
    /// What it prints, or what it says when it refuses.
    fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(self.program).args(self.arguments).args(arguments).output();
        let output = output.unwrap_or_else(|e| panic!("{}: {e}", self.program.display()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Both ways.
    pub fn reads_kiln_and_is_read(&self) {
        let now = Timestamp::now();
        let (dir, site) = new_site(now);
        for (image, release) in [("minimal", 1), ("minimal", 2), ("other", 7)] {
            build(&site, image, release, now);
            publish(dir.path(), image, release, now).unwrap();
        }
        let (repo, root) = (site.repo(), site.metadata("1.root.json"));
        let (repo, root) = (repo.to_str().unwrap(), root.to_str().unwrap());
        let arguments = ["read", repo, root, "site.json", "minimal/2/manifest.json", "other/7/manifest.json"];
        let text = self.run(&arguments).unwrap();
        for part in ["kiln-site", "\"release\": 2", "\"release\": 7"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // It is a judge, not a rubber stamp: one digit of a signature, and it refuses.
        let timestamp = std::fs::read_to_string(site.metadata("timestamp.json")).unwrap();
        let (before, after) = timestamp.split_once("\"sig\":\"").unwrap();
        let flipped = if after.starts_with('0') { '1' } else { '0' };
        let flipped = format!("{before}\"sig\":\"{flipped}{}", &after[1..]);
        std::fs::write(site.metadata("timestamp.json"), flipped).unwrap();
        let error = self.run(&arguments).unwrap_err();
        assert!(error.contains(self.refusal), "{error}");

        let written = dir.path().join("written");
        let expires = Timestamp::from_second(now.as_second()).unwrap() + SignedDuration::from_hours(30 * 24);
        self.run(&["write", written.to_str().unwrap(), &expires.to_string()]).unwrap();
        let outcome = update(&written, &["site.json", "minimal/1/manifest.json", "odd/file"]);
        assert_eq!(outcome.root.version, 2);
        assert_eq!(outcome.targets["odd/file"].bytes, b"odd/file");
        assert_eq!(outcome.targets["odd/file"].role, "odd role/ü");
        assert_eq!(outcome.targets["minimal/1/manifest.json"].role, "image-minimal");
    }
}

/// An update of Kiln's client from a folder.
fn update(repo: &Path, wanted: &[&str]) -> Outcome {
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
