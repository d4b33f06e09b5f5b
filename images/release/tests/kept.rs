//! A client that keeps whole files, as the specification has it: what is not fetched again, what is never taken back,
//! and when kept files are deleted.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Key, Repo, day, now};
use kiln_release::TufError;
use kiln_release::tuf::{Client, Request, Seen};
use std::collections::BTreeMap;

type Files = BTreeMap<String, Vec<u8>>;

/// One update: what was asked for, what is kept then, and how it ended.
fn update(repo: &Repo, kept: &mut Files) -> (Vec<String>, Result<(), TufError>) {
    let root = kept.get("root").unwrap_or(&repo.trusted_root).clone();
    let client = Client::new(&root, Seen::default(), now(), repo.limits, repo.policy, repo.wanted.clone()).unwrap();
    let mut client = client.with_kept(kept.clone());
    let mut asked = Vec::new();
    let mut ended = Ok(());
    while ended.is_ok()
        && let Request::Fetch { path, .. } = client.next()
    {
        ended = client.feed(repo.fetch(&path));
        asked.push(path);
        for change in client.take_changes() {
            match change.bytes {
                Some(bytes) => kept.insert(change.role, bytes),
                None => kept.remove(&change.role),
            };
        }
    }
    (asked, ended)
}

fn names(kept: &Files) -> Vec<&str> {
    kept.keys().map(String::as_str).collect()
}

#[test]
fn what_is_still_listed_is_not_fetched_again() {
    for hashes in [true, false] {
        let mut repo = Repo::new();
        repo.hashes = hashes;
        repo.write();
        let mut kept = Files::new();
        update(&repo, &mut kept).1.unwrap();
        assert_eq!(names(&kept), ["image-minimal", "snapshot", "targets", "timestamp"]);
        for (role, bytes) in &kept {
            assert!(repo.files.values().any(|file| file == bytes), "{role} is kept as it was served");
        }
        repo.wanted.clear();
        let (asked, ended) = update(&repo, &mut kept);
        ended.unwrap();
        assert_eq!(asked, ["metadata/2.root.json", "metadata/timestamp.json"]);
        // A new image release: the top-level targets alone stay as they are.
        for role in ["image-minimal", "snapshot", "timestamp"] {
            repo.versions.insert(role.to_owned(), 2);
        }
        repo.write();
        let (asked, ended) = update(&repo, &mut kept);
        ended.unwrap();
        assert_eq!(asked[2..], ["metadata/2.snapshot.json"]);
    }
}

#[test]
fn a_kept_file_that_was_altered_is_fetched_again() {
    let repo = Repo::new();
    for role in ["targets", "image-minimal"] {
        let mut kept = Files::new();
        update(&repo, &mut kept).1.unwrap();
        let good = kept.clone();
        kept.get_mut(role).unwrap()[20] ^= 1;
        let (asked, ended) = update(&repo, &mut kept);
        ended.unwrap();
        assert!(asked.contains(&format!("metadata/1.{role}.json")), "{asked:?}");
        assert_eq!(kept, good);
    }
}

#[test]
fn a_timestamp_that_changes_without_a_new_version_is_discarded() {
    let mut repo = Repo::new();
    let mut kept = Files::new();
    update(&repo, &mut kept).1.unwrap();
    let before = kept.clone();
    repo.versions.insert("snapshot".into(), 100);
    repo.write();
    repo.files.remove("metadata/100.snapshot.json");
    let (asked, ended) = update(&repo, &mut kept);
    ended.unwrap();
    assert_eq!(asked[..2], ["metadata/2.root.json", "metadata/timestamp.json"]);
    assert!(!asked.iter().any(|path| path.contains("snapshot")), "{asked:?}");
    assert_eq!(kept, before);
}

#[test]
fn a_kept_timestamp_that_expired_does_not_hold() {
    let mut repo = Repo::new();
    repo.expires.insert("timestamp".into(), day(-1));
    let mut kept = Files::new();
    repo.policy = kiln_release::tuf::ExpiryPolicy::ReportStale;
    repo.write();
    update(&repo, &mut kept).1.unwrap();
    repo.policy = kiln_release::tuf::ExpiryPolicy::Refuse;
    // The same version with a later end is not the one that is kept.
    repo.expires.insert("timestamp".into(), day(1));
    repo.write();
    assert_eq!(update(&repo, &mut kept).1.unwrap_err().kind(), "metadata-expired");
    repo.versions.insert("timestamp".into(), 2);
    repo.write();
    update(&repo, &mut kept).1.unwrap();
}

#[test]
fn nothing_kept_is_taken_back() {
    for role in ["timestamp", "snapshot", "targets", "image-minimal"] {
        let mut repo = Repo::new();
        for at in ["timestamp", "snapshot", "targets", "image-minimal"] {
            repo.versions.insert(at.to_owned(), 5);
        }
        repo.write();
        let mut kept = Files::new();
        update(&repo, &mut kept).1.unwrap();
        let before = kept.clone();
        for at in ["timestamp", "snapshot", "targets", "image-minimal"] {
            repo.versions.insert(at.to_owned(), if at == role { 4 } else { 6 });
        }
        repo.write();
        assert_eq!(update(&repo, &mut kept).1.unwrap_err().kind(), "metadata-rollback", "{role}");
        assert_eq!(kept.get(role), before.get(role), "{role}");
    }
}

#[test]
fn rotated_keys_delete_timestamp_and_snapshot_and_undo_a_fast_forward() {
    for role in ["timestamp", "snapshot"] {
        let mut repo = Repo::new();
        for at in ["timestamp", "snapshot", "targets"] {
            repo.versions.insert(at.to_owned(), u64::MAX);
        }
        repo.write();
        let mut kept = Files::new();
        update(&repo, &mut kept).1.unwrap();
        // Without a rotation the client is locked out.
        for at in ["timestamp", "snapshot", "targets"] {
            repo.versions.insert(at.to_owned(), 2);
        }
        repo.write();
        assert_eq!(update(&repo, &mut kept).1.unwrap_err().kind(), "metadata-rollback");
        let key = Key::new(70);
        repo.keys.insert(role.to_owned(), (vec![key], 1));
        repo.signers.insert(role.to_owned(), vec![key]);
        repo.root_version(2);
        repo.write();
        // Deleted with the new root, before anything new is there.
        let timestamp = repo.files.remove("metadata/timestamp.json").unwrap();
        assert_eq!(update(&repo, &mut kept).1.unwrap_err().kind(), "metadata-missing");
        assert_eq!(names(&kept), ["image-minimal", "root", "targets"], "{role}");
        repo.files.insert("metadata/timestamp.json".into(), timestamp);
        update(&repo, &mut kept).1.unwrap();
        assert_eq!(kept["targets"], repo.files["metadata/2.targets.json"]);
    }
}

#[test]
fn what_was_accepted_before_a_failure_is_kept() {
    let mut repo = Repo::new();
    let mut kept = Files::new();
    update(&repo, &mut kept).1.unwrap();
    repo.root_version(2);
    repo.bump_all();
    let targets = repo.files.remove("metadata/2.targets.json").unwrap();
    assert_eq!(update(&repo, &mut kept).1.unwrap_err().kind(), "metadata-missing");
    for (role, file) in
        [("root", "2.root"), ("timestamp", "timestamp"), ("snapshot", "2.snapshot"), ("targets", "1.targets")]
    {
        assert_eq!(kept[role], repo.files[&format!("metadata/{file}.json")], "{role}");
    }
    repo.files.insert("metadata/2.targets.json".into(), targets);
    update(&repo, &mut kept).1.unwrap();
}

#[test]
fn a_snapshot_that_lists_version_0_is_refused() {
    let mut repo = Repo::new();
    repo.versions.insert("image-minimal".into(), 0);
    repo.write();
    repo.wanted.clear();
    let error = repo.update(Seen::default()).unwrap_err();
    assert_eq!(error.kind(), "metadata-malformed", "{error}");
}
