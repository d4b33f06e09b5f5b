//! The chain of roots: how keys are replaced, and what an attacker makes of it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Key, Repo, day, kind_of, now};
use kiln_release::TufError;
use kiln_release::tuf::Seen;

#[test]
fn an_altered_root_in_the_chain_is_refused() {
    let mut repo = Repo::new();
    repo.root_version(2);
    repo.update(Seen::default()).unwrap();
    let good = repo.files["metadata/2.root.json"].clone();
    for at in 0..good.len() - 1 {
        repo.files.get_mut("metadata/2.root.json").unwrap()[at] ^= 1;
        let kind = kind_of(repo.update(Seen::default()));
        assert!(matches!(kind, "metadata-malformed" | "metadata-bad-signature"), "{kind} at {at}");
        repo.files.insert("metadata/2.root.json".into(), good.clone());
    }
}

#[test]
fn an_old_root_chain_after_a_newer_one_was_seen_is_refused() {
    let mut repo = Repo::new();
    let before = repo.clone();
    repo.root_version(2);
    let seen = repo.update(Seen::default()).unwrap().seen;
    assert_eq!(seen.root, 2);
    let error = before.update(seen).unwrap_err();
    assert!(matches!(&error, TufError::Rollback { role, seen: 2, got: 1, .. } if role == "root"), "{error}");
}

#[test]
fn an_endless_root_chain_is_cut_off() {
    let mut repo = Repo::new();
    repo.limits.root_chain = 3;
    for version in 2..=4 {
        repo.root_version(version);
    }
    assert_eq!(repo.update(Seen::default()).unwrap().seen.root, 4);
    repo.root_version(5);
    assert_eq!(repo.update(Seen::default()).unwrap_err(), TufError::EndlessRootChain { limit: 3 });
}

#[test]
fn root_versions_go_up_by_one() {
    for (served, kind) in [(1, "metadata-rollback"), (3, "metadata-version-mismatch")] {
        let mut repo = Repo::new();
        repo.root_version(served);
        let bytes = repo.files[&format!("metadata/{served}.root.json")].clone();
        repo.files.insert("metadata/2.root.json".into(), bytes);
        assert_eq!(kind_of(repo.update(Seen::default())), kind);
    }
}

#[test]
fn root_keys_are_rotated_by_both_thresholds() {
    let (old, new) = (Key::new(0), Key::new(80));
    for (signers, good) in [(vec![old, new], true), (vec![new], false), (vec![old], false)] {
        let mut repo = Repo::new();
        repo.keys.insert("root".into(), (vec![new], 1));
        repo.signers.insert("root".into(), signers);
        repo.root_version(2);
        match repo.update(Seen::default()) {
            Ok(outcome) => assert!(good && outcome.root.version == 2),
            Err(error) => assert!(!good && error.kind() == "metadata-bad-signature", "{error}"),
        }
    }
}

#[test]
fn an_expired_intermediate_root_is_passed() {
    let mut repo = Repo::new();
    repo.expires.insert("root".into(), now());
    repo.root_version(2);
    assert_eq!(kind_of(repo.update(Seen::default())), "metadata-expired");
    repo.expires.insert("root".into(), day(365));
    repo.root_version(3);
    assert_eq!(repo.update(Seen::default()).unwrap().seen.root, 3);
}

#[test]
fn fast_forward_is_undone_by_rotating_keys_and_by_nothing_else() {
    for role in ["timestamp", "snapshot"] {
        let good = Repo::new();
        let mut attacked = good.clone();
        attacked.bump_all();
        attacked.versions.insert(role.into(), u64::MAX);
        attacked.write();
        let seen = attacked.update(Seen::default()).unwrap().seen;
        assert_eq!(kind_of(good.update(seen.clone())), "metadata-rollback");
        // A new root with the same keys changes nothing.
        let mut same_keys = good.clone();
        same_keys.root_version(2);
        assert_eq!(kind_of(same_keys.update(seen.clone())), "metadata-rollback");
        // A key more changes nothing either: what was seen would still be accepted.
        let mut more_keys = good.clone();
        more_keys.keys.get_mut(role).unwrap().0.push(Key::new(90));
        more_keys.root_version(2);
        assert_eq!(kind_of(more_keys.update(seen.clone())), "metadata-rollback");
        let mut rotated = good.clone();
        rotated.keys.insert(role.into(), (vec![Key::new(90)], 1));
        rotated.signers.insert(role.into(), vec![Key::new(90)]);
        rotated.root_version(2);
        rotated.write();
        let after = rotated.update(seen).unwrap().seen;
        assert_eq!(after.timestamp.as_ref().unwrap().version, 1);
        // From there on nothing goes back again.
        assert_eq!(kind_of(good.update(after)), "metadata-rollback");
    }
}
