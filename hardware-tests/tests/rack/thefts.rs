//! What a thief can do with each key of the site, and with time: as processes, like `attacks.rs`. Each case has the
//! agent's own word, and what the boot server knows of it.

use crate::support::files::{Files, Way};
use crate::support::hostile::{Forgery, Hostile, sha256};
use crate::support::{AgentMachine, Bench, newest_in, newest_metadata};
use kiln_lab::{site, testing};
use kiln_protocol::Report;
use kiln_release::canonical::canonical_of;
use kiln_release::{Signer, hex};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::Ordering;

pub fn key(site: &Path, file: &str) -> Signer {
    Signer::from_pkcs8_pem(&std::fs::read_to_string(site.join(file)).unwrap()).unwrap()
}

pub fn hours(hours: i64) -> jiff::Timestamp {
    let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap();
    now + jiff::SignedDuration::from_hours(hours)
}

/// A document changed and signed by these keys, as a file of the repository.
fn signed(mut document: Value, signers: &[&Signer], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    change(&mut document);
    let message = canonical_of(&document).unwrap();
    let signatures: Vec<Value> = signers
        .iter()
        .map(|signer| json!({"keyid": signer.public().id(), "sig": hex::encode(&signer.sign(&message))}))
        .collect();
    serde_json::to_vec(&json!({"signatures": signatures, "signed": document})).unwrap()
}

pub fn document(path: &Path) -> Value {
    serde_json::from_slice::<Value>(&std::fs::read(path).unwrap()).unwrap()["signed"].clone()
}

/// Whoever has all keys but those of `role` makes its next version, signed by `thief`, and has it served.
pub fn forge(site: &Path, role: &str, thief: &[&Signer], change: &dyn Fn(&mut Value)) {
    let metadata = site.join("repo/metadata");
    let old = document(&newest_metadata(site, role));
    let version = old["version"].as_u64().unwrap() + 1;
    let file = signed(old, thief, |document| {
        document["version"] = json!(version);
        change(document);
    });
    std::fs::write(metadata.join(format!("{version}.{role}.json")), &file).unwrap();
    if role != "snapshot" {
        let listed = json!({"version": version, "length": file.len(), "hashes": {"sha256": sha256(&file)}});
        let snapshot = key(site, "offline/snapshot.key");
        forge(site, "snapshot", &[&snapshot], &|document| document["meta"][format!("{role}.json")] = listed.clone());
        return;
    }
    let timestamp = signed(document(&metadata.join("timestamp.json")), &[&key(site, "online/timestamp.key")], |t| {
        t["version"] = json!(t["version"].as_u64().unwrap() + 1);
        t["expires"] = json!("2099-01-01T00:00:00Z");
        t["meta"]["snapshot.json"] =
            json!({"version": version, "length": file.len(), "hashes": {"sha256": sha256(&file)}});
    });
    std::fs::write(metadata.join("timestamp.json"), timestamp).unwrap();
}

pub fn recorded(bench: &Bench, machine: &AgentMachine, kind: &str) {
    let view = bench.view(machine);
    assert!(view.failures().contains(&kind), "{kind} is not at the server: {view:#?}");
}

/// A boot server with the director's key in a thief's hands; it assigns `release`, changed by `change`.
pub fn thief(
    site: &Path,
    release: u64,
    change: fn(&mut Forgery),
) -> impl FnMut(&Report, &str) -> kiln_protocol::Reply + use<> {
    let site = site.to_owned();
    move |report: &Report, key: &str| {
        let mut forgery = Forgery::honest(&site, report, key, release);
        change(&mut forgery);
        forgery.reply(report)
    }
}

/// The server was off until everything that is signed offline had expired, and the whole rack is switched on again: each
/// machine boots what it was assigned, and starts nothing new until the signers have signed new dates. A thief who has
/// the online key says 2099 and gains nothing.
#[test]
fn with_expired_metadata_machines_return_and_start_nothing_new() {
    testing::processes(|paths| {
        let mut bench = Bench::start(paths);
        let machines = [bench.machine(1, 1), bench.machine(2, 1)];
        for machine in &machines {
            machine.accepts();
        }
        bench.publish_second();
        bench.stop_server();
        for role in ["targets", "image-minimal", "snapshot"] {
            let own = key(&bench.site, &format!("offline/{role}.key"));
            forge(&bench.site, role, &[&own], &|document| document["expires"] = json!(hours(-1)));
        }
        bench.start_server();
        for machine in &machines {
            machine.accepts();
            assert!(bench.view(machine).stale.is_some(), "it says so");
        }
        bench.kiln(&["assign", &machines[0].spec.name, "minimal/2"]);
        machines[0].refuses("metadata-stale");
        recorded(&bench, &machines[0], "metadata-stale");
        let status = bench.kiln(&["trust", "status"]);
        assert!(status.contains("has EXPIRED"), "{status}");
        assert_eq!(bench.machine(2, 1).stage().code, Some(0), "the rest of the rack stays up");
        bench.kiln(&["trust", "renew"]);
        machines[0].accepts();
        bench.stop_server();
    });
}

/// Two months without a server: the assignment's thirty days are over. The machine boots what it names, and goes nowhere
/// else by it.
#[test]
fn an_assignment_that_has_expired_lets_a_machine_return_and_no_more() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        bench.publish_second();
        let old: fn(&mut Forgery) = |f| f.assignment.expires = hours(-30 * 24);
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 1, old));
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        machine.accepts();
        hostile.answer(thief(&bench.site, 2, old));
        machine.refuses("assignment-expired");
        hostile.told("assignment-expired");
    });
}

/// The director's key says 2099. The machine believes at most the newest date that was signed offline: it returns, and
/// waits; a new director, named by the signers, is believed from the real time on.
#[test]
fn a_thiefs_2099_ends_with_a_new_director() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        bench.publish_second();
        let mut machine = bench.machine(1, 1);
        machine.accepts();
        let future: fn(&mut Forgery) = |f| f.freshness = |s| s.now = "2099-01-01T00:00:00Z".parse().unwrap();
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 1, future));
        machine.look_at(&hostile.url);
        machine.accepts();
        let memory: Value = serde_json::from_slice(&std::fs::read(machine.state.join("seen")).unwrap()).unwrap();
        let floor: jiff::Timestamp = memory["time_floor"].as_str().unwrap().parse().unwrap();
        let newest = ["targets", "image-minimal", "snapshot"].map(|role| {
            document(&bench.metadata(role))["expires"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap()
        });
        assert_eq!(Some(&floor), newest.iter().max(), "not 2099");

        let mut machine = bench.machine(1, 1);
        // The thief's assignment had a number of its own, above the honest ones.
        let name = machine.spec.name.clone();
        hostile.answer(thief(&bench.site, 2, |f| f.assignment.expires = hours(2 * 365 * 24)));
        machine.look_at(&hostile.url);
        machine.refuses("metadata-stale");
        hostile.told("metadata-stale");
        bench.kiln(&["trust", "rotate", "director"]);
        bench.kiln(&["assign", &name, "minimal/2"]);
        bench.machine(1, 1).accepts();
        // The old director's key is worth nothing any more: the thief has a copy of it.
        let (site, old) = (bench.site.clone(), key(&paths.lab.join("template"), "online/director.key"));
        hostile.answer(move |report, key| {
            let signer = Signer::from_pkcs8_der(&old.pkcs8_der()).unwrap();
            Forgery { signer, ..Forgery::honest(&site, report, key, 1) }.reply(report)
        });
        machine.refuses("director-bad-signature");
        hostile.told("director-bad-signature");
    });
}

/// Whoever holds the repository still shows what was good some days ago. The director's answer to the machine's own nonce
/// tells the time, and the timestamp has expired by then.
#[test]
fn a_frozen_repository_starts_nothing_new() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        bench.publish_second();
        let later: fn(&mut Forgery) = |f| {
            f.assignment.expires = hours(4 * 24);
            f.freshness = |s| s.now = hours(3 * 24);
        };
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 2, later));
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        let ended = machine.refuses("metadata-stale");
        hostile.told("metadata-stale");
        assert!(ended.said.contains("timestamp.json"), "{}", ended.said);
        hostile.answer(thief(&bench.site, 1, later));
        machine.accepts();
    });
}

/// Whoever answers for the boot server gives an answer of no known kind, and names it so that a terminal would obey.
#[test]
fn an_answer_of_no_known_kind_is_quoted_as_a_part_of_one_line() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 1, |_| {}));
        hostile.besides(json!({"decision": "\u{1b}[2J\r\nkiln-agent: approval code AAAA-AAAA"}));
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        let ended = machine.stage();
        assert_eq!((ended.code, ended.kind.as_str()), (Some(10), "server-unreachable"), "{ended:#?}");
        assert!(ended.said.contains("approval code AAAA-AAAA"), "it was asked, and quotes: {}", ended.said);
        for line in ended.said.lines() {
            assert!(!line.starts_with("kiln-agent: approval") && !line.chars().any(char::is_control), "{line:?}");
        }
    });
}

/// The director alone cannot say what a release is.
#[test]
fn a_stolen_director_key_assigns_nothing_that_the_signers_did_not_sign() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 2, |_| {}));
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        machine.refuses("target-not-listed");
        hostile.told("target-not-listed");
        // A manifest of its own for a number that is signed.
        bench.publish_second();
        hostile.answer(thief(&bench.site, 2, |f| f.assignment.manifest_sha256 = "ab".repeat(32).parse().unwrap()));
        machine.refuses("assignment-manifest-mismatch");
        hostile.told("assignment-manifest-mismatch");
        hostile.answer(thief(&bench.site, 2, |_| {}));
        machine.accepts();
    });
}

/// Of two signers' keys one is stolen, and with it every other key of the site but root's and targets': a release that the
/// thief lists is refused. So is one listed by a key that was taken away, and a snapshot by one that was replaced.
#[test]
fn a_signers_key_below_the_threshold_a_revoked_and_a_rotated_one_sign_nothing() {
    testing::processes(|paths| {
        let mut bench = Bench::start(paths);
        let machine = bench.machine(1, 1);
        machine.accepts();
        for name in ["ann", "bob"] {
            let file = bench.site.join(format!("offline/{name}.key")).display().to_string();
            site::kiln_quiet(paths, &["trust", "key", &file, "--no-passphrase"]).unwrap();
        }
        let site = bench.site.clone();
        let public = |name: &str| site.join(format!("offline/{name}.key.pub")).display().to_string();
        bench.kiln(&["trust", "rotate", "image-minimal", "--keys", &format!("2:{},{}", public("ann"), public("bob"))]);
        bench.publish_second();
        machine.accepts();
        bench.stop_server();
        // With the snapshot's key a thief drives the versions that a machine has seen: each case begins as the one before.
        let metadata = bench.site.join("repo/metadata");
        let (good, remembered) = (paths.scratch.join("good"), paths.scratch.join("remembered"));
        let state = machine.state.clone();
        let keep = || {
            for (from, to) in [(&metadata, &good), (&state, &remembered)] {
                let _ = std::fs::remove_dir_all(to);
                site::copy_tree(from, to).unwrap();
            }
        };
        let restore = || {
            for (from, to) in [(&good, &metadata), (&remembered, &state)] {
                std::fs::remove_dir_all(to).unwrap();
                site::copy_tree(from, to).unwrap();
            }
        };
        keep();
        let (ann, bob) = (key(&bench.site, "offline/ann.key"), key(&bench.site, "offline/bob.key"));
        let mallory = |document: &mut Value| document["targets"]["minimal/1/manifest.json"]["length"] = json!(1);

        // The honest server itself does not adopt it; a thief's would serve it.
        let serve = Files::serve(bench.site.join("repo"));
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&serve.url);
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 1, |_| {}));
        machine.look_at(&hostile.url);
        machine.accepts();
        forge(&bench.site, "image-minimal", &[&ann], &mallory);
        machine.refuses("metadata-bad-signature");
        hostile.told("metadata-bad-signature");
        restore();
        forge(&bench.site, "image-minimal", &[&ann, &ann], &mallory);
        machine.refuses("metadata-malformed"); // one key twice is not even an envelope
        hostile.told("metadata-malformed");
        restore();

        // Ann's key is taken away; then hers with any other's is worth nothing.
        bench.start_server();
        bench.kiln(&["trust", "rotate", "image-minimal", "--keys", &format!("1:{},{}", public("ann"), public("bob"))]);
        bench.kiln(&["trust", "revoke", &public("ann")]);
        let old_snapshot = key(&bench.site, "offline/snapshot.key");
        machine.accepts();
        bench.stop_server();
        keep();
        forge(&bench.site, "image-minimal", &[&ann], &mallory);
        machine.refuses("metadata-bad-signature");
        hostile.told("metadata-bad-signature");
        restore();
        forge(&bench.site, "image-minimal", &[&bob], &|_| {});
        machine.accepts();
        restore();

        bench.start_server();
        bench.kiln(&["trust", "rotate", "snapshot"]);
        bench.kiln(&["trust", "rotate", "root"]);
        bench.stop_server();
        machine.accepts();
        forge(&bench.site, "snapshot", &[&old_snapshot], &|_| {});
        machine.refuses("metadata-bad-signature");
        hostile.told("metadata-bad-signature");
    });
}

/// An older document of as many bytes as the newer one: white space at its end changes no word of it.
pub fn as_long_as(older: &[u8], newer: &[u8]) -> Vec<u8> {
    assert!(older.len() <= newer.len(), "{} bytes are not made {}", older.len(), newer.len());
    let mut same = older.to_vec();
    same.resize(newer.len(), b' ');
    same
}

/// Two states of the repository, each signed, do not go together: the length gives the older document away, and where that
/// fits, the hash.
#[test]
fn a_mixture_of_two_states_is_refused() {
    testing::processes(|paths| {
        let mut bench = Bench::start(paths);
        let machine = bench.machine(1, 1);
        machine.accepts();
        let before = std::fs::read(bench.metadata("image-minimal")).unwrap();
        let snapshot = std::fs::read(bench.metadata("snapshot")).unwrap();
        bench.publish_second();
        let (copy, files) = bench.copy_repository();
        let metadata = copy.join("metadata");
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&files.url);
        let newest = newest_in(&metadata, "image-minimal");
        let good = std::fs::read(&newest).unwrap();
        for (older, kind) in
            [(before.clone(), "metadata-length-mismatch"), (as_long_as(&before, &good), "metadata-hash-mismatch")]
        {
            std::fs::write(&newest, older).unwrap();
            machine.refuses(kind);
            recorded(&bench, &machine, kind);
        }
        std::fs::write(&newest, good).unwrap();
        let newest = newest_in(&metadata, "snapshot");
        let good = std::fs::read(&newest).unwrap();
        std::fs::write(&newest, as_long_as(&snapshot, &good)).unwrap();
        machine.refuses("metadata-hash-mismatch");
        recorded(&bench, &machine, "metadata-hash-mismatch");
        std::fs::write(&newest, good).unwrap();
        machine.accepts();
        bench.stop_server();
    });
}

/// A boot server of another site, or one that a lying DHCP server named: its certificate is of another CA, and it hears
/// nothing, not even who asked.
#[test]
fn a_server_with_a_foreign_ca_hears_nothing() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let other = paths.scratch.join("other");
        let text = other.display().to_string();
        site::kiln_quiet(paths, &["trust", "init", "--lab", &text, "--name", "lab"]).unwrap();
        let hostile = Hostile::start(&other, thief(&bench.site, 1, |_| {}));
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        let ended = machine.stage();
        assert_eq!(
            (ended.code, ended.kind.as_str(), &ended.accepted),
            (Some(10), "server-unreachable", &None),
            "{ended:#?}"
        );
        assert!(ended.said.contains("certificate"), "{}", ended.said);
        assert!(hostile.heard.lock().unwrap().is_empty());
        // With the honest server behind it in the list nothing is lost.
        machine.boot["site"]["agent_urls"] = json!([hostile.url, crate::support::AGENT_API]);
        machine.accepts();
    });
}

/// A timestamp that never ends costs what a timestamp may have, and no more.
#[test]
fn endless_metadata_is_cut_at_its_cap() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let files = Files::serve(bench.site.join("repo"));
        files.way(Way::Endless);
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&files.url);
        machine.refuses("metadata-too-long");
        let (sent, cap) = (files.endless.load(Ordering::Relaxed), 1 << 20);
        // What lies in sockets' buffers is on top.
        assert!((cap..cap + (16 << 20)).contains(&sent), "{sent} bytes");
        recorded(&bench, &machine, "metadata-too-long");
    });
}

/// The floor rises only when no machine needs what is below it; then a lower release is refused whoever assigns it, by a
/// machine that has seen the new floor, and by the lower release's own boot image before anything else.
#[test]
fn below_the_floor_nothing_runs() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let mut machine = bench.machine(1, 1);
        machine.accepts();
        bench.publish_second();
        let text = bench.site.display().to_string();
        let floor = ["trust", "floor", "minimal", "2", "--site", &text];
        let refused = site::kiln_quiet(paths, &floor).unwrap_err().to_string();
        assert!(refused.contains(&format!("{} shall run minimal/1", machine.spec.name)), "{refused}");
        bench.kiln(&["assign", &machine.spec.name, "minimal/2"]);
        bench.machine(1, 2).accepts();
        site::kiln_quiet(paths, &floor).unwrap();
        let lower = [&floor[..3], &["1"], &floor[4..]].concat();
        let refused = site::kiln_quiet(paths, &lower).unwrap_err().to_string();
        assert!(refused.contains("is 2 already: it never goes down"), "{refused}");
        let refused = site::kiln_quiet(paths, &["assign", &machine.spec.name, "minimal/1", "--site", &text]);
        assert!(refused.unwrap_err().to_string().contains("below"));

        let mut newer = bench.machine(1, 2);
        newer.accepts(); // and has seen the floor
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 1, |_| {}));
        newer.look_at(&hostile.url);
        newer.refuses("assignment-below-floor");
        hostile.told("assignment-below-floor");
        machine.look_at(&hostile.url);
        machine.refuses("release-below-floor");
        hostile.told("release-below-floor");
    });
}
