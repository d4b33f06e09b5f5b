//! What the agent refuses: every file of the repository and every statement of the director, damaged or replaced.
//! The agent is the shipped program, started as `kiln-agent stage`, which does what PID 1 does up to the first mount.
use crate::support::hostile::{Forgery, Hostile, sha256};
use crate::support::{Bench, newest_in, published};
use crate::thefts::recorded;
use kiln_lab::{site, testing};
use kiln_protocol::{Architecture, KeyStorage, Via};
use kiln_release::Signer;
use serde_json::{Value, json};
use std::path::Path;

/// The stranger: a key that nothing trusts.
fn stranger() -> Signer {
    Signer::from_seed(&[7; 32])
}

/// Signs a metadata file anew, changed by `change`, as `signer`, but under the key id it had: what is wrong is then
/// the signature and nothing else.
fn resign(path: &Path, signer: &Signer, change: impl FnOnce(&mut Value)) {
    let mut envelope: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut envelope["signed"]);
    let keyid = envelope["signatures"][0]["keyid"].clone();
    let signed = kiln_release::canonical::canonical_of(&envelope["signed"]).unwrap();
    let signature = kiln_release::hex::encode(&signer.sign(&signed));
    envelope["signatures"] = json!([{"keyid": keyid, "sig": signature}]);
    std::fs::write(path, serde_json::to_vec(&envelope).unwrap()).unwrap();
}

#[test]
fn an_honest_site_is_accepted_and_so_is_the_same_assignment_after_a_reboot() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let machine = bench.machine(1, 1);
        for boot in ["first boot", "after a reboot"] {
            let ended = machine.accepts();
            let root = std::fs::read(ended.accepted.expect(boot)).unwrap();
            let manifest = site::manifest(&bench.site, 1).unwrap();
            assert_eq!(json!(sha256(&root)), manifest["root"]["sha256"], "{boot}");
        }
    });
}

/// Release 1 ran here; release 2 is assigned, and something on its way is damaged. The machine refuses it, says so, and
/// boots release 1 again as soon as what release 1 itself needs is whole: nothing of the attack is remembered.
#[test]
fn one_flipped_byte_in_any_file_of_the_repository_is_refused_and_the_previous_release_boots() {
    testing::processes(|paths| {
        let mut bench = Bench::start(paths);
        bench.machine(1, 1).accepts();
        bench.publish_second();
        let (mut previous, mut machine) = (bench.machine(1, 1), bench.machine(1, 2));
        bench.kiln(&["assign", &previous.spec.name, "minimal/2"]);
        let (copy, files) = bench.copy_repository();
        previous.fetch_from(&files.url);
        machine.fetch_from(&files.url);
        let (metadata, targets) = (copy.join("metadata"), copy.join("targets"));
        let root = bench.root_artifact(2);
        // timestamp.json is small and signed by the online key; everything below it is pinned by hash.
        let cases = [
            (newest_in(&metadata, "timestamp"), "metadata-bad-signature", true),
            (newest_in(&metadata, "snapshot"), "metadata-hash-mismatch", true),
            (newest_in(&metadata, "targets"), "metadata-hash-mismatch", true),
            (newest_in(&metadata, "image-minimal"), "metadata-hash-mismatch", true),
            (published(&targets, "site.json"), "metadata-hash-mismatch", true),
            (published(&targets.join("minimal/2"), ".manifest.json"), "metadata-hash-mismatch", false),
            (copy.join("a").join(root.file_name().unwrap()), "root-hash-mismatch", false),
        ];
        for (file, kind, shared) in cases {
            let shown = file.display();
            let good = std::fs::read(&file).unwrap();
            let place = match kind {
                "metadata-bad-signature" => position(&good, "\"sig\":\""),
                _ => good.len() / 2,
            };
            site::flip_byte(&file, place as u64).unwrap();
            let ended = machine.refuses(kind);
            let view = bench.view(&machine);
            assert!(view.failures().contains(&kind), "{shown}: not reported: {view:#?}\n{}", ended.said);
            bench.kiln(&["assign", &previous.spec.name, "minimal/1"]);
            if shared {
                // Release 1 needs this file too: it must not be talked into going without.
                previous.refuses(kind);
                std::fs::write(&file, &good).unwrap();
            }
            previous.accepts();
            std::fs::write(&file, good).unwrap();
            bench.kiln(&["assign", &previous.spec.name, "minimal/2"]);
        }
        machine.accepts();
        bench.stop_server();
    });
}

fn position(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).position(|w| w == text.as_bytes()).unwrap() + text.len()
}

#[test]
fn a_timestamp_is_refused_when_a_byte_or_its_signer_is_another() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let (copy, files) = bench.copy_repository();
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&files.url);
        machine.accepts();
        let file = newest_in(&copy.join("metadata"), "timestamp");
        let good = std::fs::read_to_string(&file).unwrap();
        // A digit of the signature, then one of the signed part.
        for (from, to) in [("\"sig\":\"", 0), ("\"version\":", 0)] {
            let at = good.find(from).unwrap() + from.len() + to;
            site::flip_byte(&file, at as u64).unwrap();
            machine.refuses("metadata-bad-signature");
            recorded(&bench, &machine, "metadata-bad-signature");
            std::fs::write(&file, &good).unwrap();
        }
        resign(&file, &stranger(), |signed| signed["version"] = json!(signed["version"].as_u64().unwrap() + 1));
        machine.refuses("metadata-bad-signature");
        recorded(&bench, &machine, "metadata-bad-signature");
        std::fs::write(&file, &good).unwrap();
        machine.accepts();
    });
}

#[test]
fn metadata_signed_by_a_key_that_is_not_trusted_is_refused() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let machine = bench.machine(1, 1);
        // A whole repository of another site, consistent in itself.
        let other = paths.scratch.join("other");
        let text = other.display().to_string();
        site::kiln_quiet(paths, &["trust", "init", "--lab", &text, "--name", "lab"]).unwrap();
        let built = "build/minimal/1";
        site::copy_tree(&bench.site.join(built), &other.join(built)).unwrap();
        site::kiln_quiet(paths, &["release", "publish", "minimal/1", "--site", &text]).unwrap();
        machine.accepts();
        let ours = paths.scratch.join("ours");
        site::copy_tree(&bench.site.join("repo/metadata"), &ours).unwrap();
        for entry in other.join("repo/metadata").read_dir().unwrap().flatten() {
            std::fs::copy(entry.path(), bench.site.join("repo/metadata").join(entry.file_name())).unwrap();
        }
        machine.refuses("metadata-bad-signature");
        recorded(&bench, &machine, "metadata-bad-signature");
        for entry in ours.read_dir().unwrap().flatten() {
            std::fs::copy(entry.path(), bench.site.join("repo/metadata").join(entry.file_name())).unwrap();
        }
        machine.accepts();
    });
}

#[test]
fn an_older_validly_signed_repository_is_refused_after_a_newer_one_was_seen() {
    testing::processes(|paths| {
        let mut bench = Bench::start(paths);
        let machine = bench.machine(1, 1);
        let metadata = bench.site.join("repo/metadata");
        let older = paths.scratch.join("older");
        site::copy_tree(&metadata, &older).unwrap();
        bench.publish_second();
        bench.stop_server();
        bench.start_server();
        machine.accepts(); // and remembers the newer versions
        // A cold boot lies between: only the machine's state directory is carried over.
        bench.stop_server();
        std::fs::remove_dir_all(&metadata).unwrap();
        site::copy_tree(&older, &metadata).unwrap();
        let refused = bench.try_start_server().unwrap_err().to_string();
        assert!(refused.contains("an old repository is served"), "the server itself notices: {refused}");
        // A server restored from an old backup as a whole, its own memory included, does not.
        std::fs::remove_dir_all(bench.site.join("state")).unwrap();
        std::fs::create_dir(bench.site.join("state")).unwrap();
        bench.start_server();
        machine.refuses("metadata-rollback");
        recorded(&bench, &machine, "metadata-rollback");
        let fresh = bench.machine(2, 1);
        fresh.accepts(); // to one that has seen nothing newer the same bytes are good: it was the memory that refused
    });
}

#[test]
fn a_root_artifact_longer_or_shorter_than_signed_is_refused() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let machine = bench.machine(1, 1);
        machine.accepts();
        let file = bench.root_artifact(1);
        let good = std::fs::read(&file).unwrap();
        let longer: Vec<u8> = good.iter().copied().chain([0; 4096]).collect();
        let shorter = good[..good.len() - 4096].to_vec();
        for wrong in [longer, shorter] {
            std::fs::remove_file(&file).unwrap();
            std::fs::write(&file, wrong).unwrap();
            machine.refuses("root-length-mismatch");
            recorded(&bench, &machine, "root-length-mismatch");
        }
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, good).unwrap();
        machine.accepts();
    });
}

#[test]
fn a_uki_boots_only_the_root_it_embeds() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let mut machine = bench.machine(1, 1);
        let other = site::manifest(&bench.site, 2).unwrap()["verity"]["root_hash"].clone();
        assert_ne!(machine.boot["root_hash"], other);
        machine.boot["root_hash"] = other;
        machine.refuses("manifest-not-of-this-boot");
        recorded(&bench, &machine, "manifest-not-of-this-boot");
    });
}

/// What keeps its key, or what it has seen, gives nothing out and is not spoilt either, as a TPM that fails.
#[test]
fn a_machine_whose_key_or_memory_cannot_be_had_starts_nothing_and_says_why() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let site = bench.site.clone();
        let hostile =
            Hostile::start(&bench.site, move |report, key| Forgery::honest(&site, report, key, 1).reply(report));
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        machine.accepts();
        for name in ["seen", "key"] {
            let [file, aside] = [name, "aside"].map(|name| machine.state.join(name));
            std::fs::rename(&file, &aside).unwrap();
            std::fs::create_dir(&file).unwrap();
            hostile.heard.lock().unwrap().clear();
            let ended = machine.stage();
            assert_eq!((ended.code, ended.kind.as_str()), (Some(30), "machine-file"), "{ended:#?}");
            assert_eq!(ended.accepted, None, "{ended:#?}");
            let is_strange = |report: &kiln_protocol::Report| report.machine.key_storage == KeyStorage::Ephemeral;
            assert!(hostile.heard.lock().unwrap().iter().all(is_strange), "it speaks under no key of the machine's");
            hostile.told("machine-file");
            std::fs::remove_dir(&file).unwrap();
            std::fs::rename(&aside, &file).unwrap();
            machine.accepts();
        }
    });
}

/// What must be said, and the one thing that is wrong.
type Case = (&'static str, fn(&mut Forgery));

#[test]
fn an_assignment_is_refused_for_every_wrong_part() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let site = bench.site.clone();
        let forge = move |change: fn(&mut Forgery)| {
            let site = site.clone();
            move |report: &kiln_protocol::Report, key: &str| {
                let mut forgery = Forgery::honest(&site, report, key, 1);
                change(&mut forgery);
                forgery.reply(report)
            }
        };
        let hostile = Hostile::start(&bench.site, forge(|_| {}));
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        machine.accepts(); // the honest answer; sequence 5 is now remembered
        let cases: [Case; 11] = [
            ("assignment-wrong-machine", |f| f.assignment.machine.key = "ab".repeat(32).parse().unwrap()),
            ("assignment-wrong-image", |f| f.assignment.image = "other".parse().unwrap()),
            ("assignment-wrong-architecture", |f| f.assignment.arch = Architecture::Aarch64),
            ("assignment-old-sequence", |f| f.assignment.sequence = 4),
            ("assignment-wrong-type", |f| f.assignment.type_ = "kiln-freshness".into()),
            ("assignment-wrong-spec-version", |f| f.assignment.spec_version = "9.0".into()),
            ("assignment-manifest-mismatch", |f| f.assignment.manifest_sha256 = "cd".repeat(32).parse().unwrap()),
            ("director-bad-signature", |f| f.signer = stranger()),
            ("director-bad-signature", |f| f.damage = |text| text.replacen("\"role\":\"lab\"", "\"role\":\"lac\"", 1)),
            ("freshness-wrong-nonce", |f| f.freshness = |s| s.nonce = "ee".repeat(32).parse().unwrap()),
            ("freshness-wrong-assignment", |f| {
                f.freshness = |s| s.assignment_sha256 = "ef".repeat(32).parse().unwrap();
            }),
        ];
        for (kind, change) in cases {
            hostile.answer(forge(change));
            machine.refuses(kind);
            hostile.told(kind);
        }
        hostile.answer(forge(|_| {}));
        machine.accepts(); // nothing of the above was remembered
    });
}

#[test]
fn an_assignment_to_another_release_is_staged_whole_or_refused() {
    testing::processes(|paths| {
        let mut bench = Bench::start(paths);
        bench.publish_second();
        bench.stop_server();
        bench.start_server();
        let site = bench.site.clone();
        let hostile = Hostile::start(&bench.site, move |report, key| {
            let mut forgery = Forgery::honest(&site, report, key, 2);
            forgery.via = Via::Kexec;
            forgery.reply(report)
        });
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        let file = bench.root_artifact(2);
        let good = std::fs::read(&file).unwrap();
        site::flip_byte(&file, 4096).unwrap();
        machine.refuses("root-hash-mismatch");
        hostile.told("root-hash-mismatch");
        std::fs::write(&file, good).unwrap();
        machine.accepts();
    });
}
