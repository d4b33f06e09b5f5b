//! A stolen boot server: whoever has it has the repository, the agent API's key and the director's, and stands where DHCP
//! sends every machine. First each thing as a process; then one machine of the rack that meets one after the other.

use crate::support::files::{Files, Way};
use crate::support::hostile::{Forgery, Hostile, bare, director_key, sha256, wipe_order};
use crate::support::{Bench, newest_in, newest_metadata, published};
use crate::thefts::{as_long_as, forge, hours, key, recorded, thief};
use kiln_lab::console::{Console, Mark};
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::net::SERVER;
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::{Architecture, Decision, Reply, Report, Stage};
use kiln_release::Signer;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What names an image of class *rescue*, with no order of an operator.
fn rescue(forgery: &mut Forgery) {
    forgery.assignment.image = "rescue".parse().unwrap();
}

/// Wipe yourself, says a server that has every key but an operator's.
fn wipes(site: &Path) -> impl FnMut(&Report, &str) -> Reply + use<> {
    let site = site.to_owned();
    move |report, key| {
        let mut reply = Forgery::honest(&site, report, key, 1).reply(report);
        reply.desired.order = Some(wipe_order(report, key, &director_key(&site)));
        reply
    }
}

/// Takes a setting into the assignment that the director did not sign.
fn other_settings(text: String) -> String {
    let changed = text.replacen("\"sequence\":5", "\"sequence\":5,\"settings\":{\"exec\":\"report\"}", 1);
    assert_ne!(changed, text);
    changed
}

/// Neither a shell nor empty disks are to be had with the director's key.
#[test]
fn a_stolen_server_assigns_no_rescue_and_orders_no_wipe() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 1, rescue));
        let mut machine = bench.machine(1, 1);
        machine.look_at(&hostile.url);
        machine.refuses("assignment-wrong-image");
        hostile.wait_failure("assignment-wrong-image", IDLE);
        hostile.answer(wipes(&bench.site));
        machine.refuses("order-bad-signature");
        hostile.wait_failure("order-bad-signature", IDLE);
    });
}

/// What a boot server would have a machine do besides, as clouds do it: each line leaves this file, were it done.
fn user_data(leaves: &str) -> Value {
    let touch = format!("touch {leaves}");
    json!({
        "user_data": format!("#cloud-config\nruncmd: [[touch, {leaves}]]"),
        "commands": [["/bin/sh", "-c", touch]],
        "units": {"thief.service": format!("[Service]\nExecStart=/bin/sh -c '{touch}'")},
    })
}

/// An answer that is good as far as the agent reads it, and has user-data, commands and units beside it: the machine boots what
/// it is assigned, and does nothing else. It asks nobody for such things either.
#[test]
fn user_data_of_a_stolen_server_is_not_even_read() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let left = paths.scratch.join("user-data-was-done");
        let files = Files::serve(bench.site.join("repo"));
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 1, |_| {}));
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&files.url);
        machine.look_at(&hostile.url);
        hostile.besides(user_data(&left.display().to_string()));
        let ended = machine.accepts();
        let root = std::fs::read(ended.accepted.expect("it accepted the release")).unwrap();
        let manifest = site::manifest(&bench.site, 1).unwrap();
        assert_eq!(json!(sha256(&root)), manifest["root"]["sha256"], "and that alone");
        assert!(!left.exists(), "{} was made: {}", left.display(), ended.said);
        assert!(hostile.failures().is_empty(), "{:?}", hostile.failures());
        let asked = files.asked.lock().unwrap().clone();
        assert!(!asked.is_empty() && asked.iter().all(|path| is_of_a_release(path)), "{asked:#?}");
    });
}

/// Whether the agent fetches such a path for what it boots.
fn is_of_a_release(path: &str) -> bool {
    ["/metadata/", "/targets/", "/a/"].iter().any(|start| path.starts_with(start))
}

/// A manifest with a hook more, of a thief's.
fn with_a_hook(manifest: &[u8]) -> Vec<u8> {
    let mut manifest: Value = serde_json::from_slice(manifest).unwrap();
    manifest["hooks"] = json!({"drain": [{"kind": "command", "command": ["/bin/sh", "-c", "id"], "timeout": 5}]});
    serde_json::to_vec_pretty(&manifest).unwrap()
}

/// A hook runs as root on each machine; so it is in the manifest, which the signers list. Role data selects, and is signed.
#[test]
fn a_changed_hook_or_setting_is_refused() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let mut machine = bench.machine(1, 1);
        machine.accepts();
        let file = bench.manifest(1);
        let good = std::fs::read(&file).unwrap();
        let changed = with_a_hook(&good);
        std::fs::write(&file, &changed).unwrap();
        // The signers listed its length: nothing behind that is even read.
        machine.refuses("metadata-too-long");
        recorded(&bench, &machine, "metadata-too-long");
        // Cut to that length it is another file.
        std::fs::write(&file, &changed[..good.len()]).unwrap();
        machine.refuses("metadata-hash-mismatch");
        recorded(&bench, &machine, "metadata-hash-mismatch");
        std::fs::write(&file, &good).unwrap();

        // With the director's key as well: it says what the machine runs, not what that is.
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 1, |_| {}));
        machine.look_at(&hostile.url);
        let (site, hash) = (bench.site.clone(), sha256(&changed));
        hostile.answer(move |report, key| {
            let mut forgery = Forgery::honest(&site, report, key, 1);
            forgery.assignment.manifest_sha256 = hash.parse().unwrap();
            forgery.reply(report)
        });
        machine.refuses("assignment-manifest-mismatch");
        hostile.wait_failure("assignment-manifest-mismatch", IDLE);
        hostile.answer(thief(&bench.site, 1, |f| f.damage = other_settings));
        machine.refuses("director-bad-signature");
        hostile.wait_failure("director-bad-signature", IDLE);
        hostile.answer(thief(&bench.site, 1, |_| {}));
        machine.accepts();
    });
}

/// A whole other site, right in itself.
pub fn another_site(paths: &Paths, built: &Path) -> PathBuf {
    let other = paths.scratch.join("other");
    let text = other.display().to_string();
    site::kiln_quiet(paths, &["trust", "init", "--lab", &text, "--name", "lab"]).unwrap();
    site::copy_tree(&built.join("build/minimal/1"), &other.join("build/minimal/1")).unwrap();
    site::kiln_quiet(paths, &["release", "publish", "minimal/1", "--site", &text]).unwrap();
    other
}

/// A lying DHCP server names an attacker's boot server, who has all that a boot server has, of a site of his own. It learns
/// nothing by TLS; where it answers for the artifacts alone, the honest server hears what came of it.
#[test]
fn a_dhcp_server_that_points_at_an_attacker_wins_nothing() {
    testing::processes(|paths| {
        let bench = Bench::start(paths);
        let other = another_site(paths, &bench.site);
        let (files, hostile) = (Files::serve(other.join("repo")), Hostile::start(&other, thief(&other, 1, |_| {})));
        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&files.url);
        machine.look_at(&hostile.url);
        let ended = machine.stage();
        assert_eq!((ended.code, ended.kind.as_str()), (Some(10), "server-unreachable"), "{ended:#?}");
        assert!(ended.accepted.is_none() && hostile.heard.lock().unwrap().is_empty(), "{ended:#?}");

        let mut machine = bench.machine(1, 1);
        machine.fetch_from(&files.url);
        machine.refuses("metadata-bad-signature");
        recorded(&bench, &machine, "metadata-bad-signature");
        bench.machine(1, 1).accepts();
    });
}

const NAME: &str = "rack-1";

/// What it is, what the agent says of it, the release it names, and what is wrong with it.
type Answered = (&'static str, &'static str, u64, fn(&mut Forgery));

/// The machine runs 2. Answers that the director's key did not sign, or signed for something else.
const FORGED: [Answered; 8] = [
    ("an assignment by another key", "director-bad-signature", 2, |f| f.signer = Signer::from_seed(&[7; 32])),
    ("another role", "director-bad-signature", 2, |f| f.damage = |t| t.replacen(":\"lab\"", ":\"lac\"", 1)),
    ("other settings", "director-bad-signature", 2, |f| f.damage = other_settings),
    ("another machine's", "assignment-wrong-machine", 2, |f| {
        f.assignment.machine.key = "ab".repeat(32).parse().unwrap();
    }),
    ("another architecture", "assignment-wrong-architecture", 2, |f| f.assignment.arch = Architecture::Aarch64),
    ("rescue", "assignment-wrong-image", 2, rescue),
    ("a release of the thief's", "assignment-manifest-mismatch", 2, |f| {
        f.assignment.manifest_sha256 = "cd".repeat(32).parse().unwrap();
    }),
    ("an old answer", "freshness-wrong-nonce", 2, |f| f.freshness = |s| s.nonce = "ee".repeat(32).parse().unwrap()),
];

/// Answers that the director's key signed well, and that time or sequence stops. Each is remembered by the machine: their
/// order matters.
const TIMED: [Answered; 4] = [
    ("a server that was off for 60 days", "assignment-expired", 1, |f| f.assignment.expires = hours(-30 * 24)),
    ("a frozen repository", "metadata-stale", 1, |f| {
        f.assignment.expires = hours(4 * 24);
        f.freshness = |s| s.now = hours(3 * 24);
    }),
    ("a thief's 2099", "metadata-stale", 1, |f| {
        f.assignment.expires = "2100-01-01T00:00:00Z".parse().unwrap();
        f.freshness = |s| s.now = "2099-01-01T00:00:00Z".parse().unwrap();
    }),
    ("an old assignment", "assignment-old-sequence", 2, |f| f.assignment.sequence = 4),
];

/// The machine, and who stands in its boot server's place.
struct Siege {
    console: Arc<Console>,
    site: PathBuf,
    hostile: Option<Hostile>,
    files: Files,
}

fn at(port: u16) -> SocketAddr {
    (IpAddr::from(SERVER), port).into()
}

fn waits(why: &str) -> impl FnMut(&Report, &str) -> Reply + use<> {
    let reason = why.to_owned();
    move |_, _| bare(Decision::Wait { reason: reason.clone() })
}

impl Siege {
    /// In the place of the boot server that was just stopped.
    fn begin(rack: &mut Rack) -> Self {
        let console = Arc::clone(rack.machine(NAME).console().unwrap());
        let site = rack.site.clone();
        let files = Files::serve_at(at(8080), site.join("repo"));
        let thief = site.clone();
        Self { console, hostile: None, files, site }.with_server_of(&thief)
    }

    /// Whose TLS key answers from now on.
    fn with_server_of(mut self, site: &Path) -> Self {
        self.hostile = None;
        self.hostile = Some(Hostile::start_at(at(8443), site, waits("held by the thief")));
        self
    }

    fn hostile(&self) -> &Hostile {
        self.hostile.as_ref().expect("it stands")
    }

    /// Lets the machine wait, so that the next case begins with short pauses.
    fn pause(&self, after: &str) {
        let begun = self.console.mark();
        let reason = format!("the thief is done with {after}");
        self.hostile().answer(waits(&reason));
        self.console.wait_for(&reason, begun, IDLE).unwrap();
        self.hostile().heard.lock().unwrap().clear();
    }

    /// The answer has more in it than the agent knows: it reads the rest, and waits as it is told.
    fn answers_besides(&self, what: &str, members: Value) {
        println!("{what}: nothing comes of it");
        let begun = self.console.mark();
        self.hostile().besides(members);
        let reason = format!("held, with {what}");
        self.hostile().answer(waits(&reason));
        self.console.wait_for(&reason, begun, IDLE).unwrap();
        assert!(!self.console.since(begun).contains("failed ("), "{}", self.console.last_words(10));
        self.hostile().besides(Value::Null);
        self.pause(what);
    }

    /// The machine must say this of the thief's answer, on its console and to the thief, and go on asking.
    fn answered(&self, what: &str, kind: &str, answer: impl FnMut(&Report, &str) -> Reply + Send + 'static) {
        println!("{what}: {kind}");
        let begun = self.console.mark();
        self.hostile().answer(answer);
        self.console.wait_for(&format!("failed ({kind}"), begun, IDLE).unwrap();
        self.hostile().wait_failure(kind, IDLE);
        self.pause(what);
    }

    /// The machine must say this of the metadata that it reads anew after an answer which does not hold, on its console and
    /// to the thief.
    fn served(&self, what: &str, kind: &str) {
        self.answered(what, kind, thief(&self.site, 1, |f| f.assignment.arch = Architecture::Aarch64));
    }

    /// The same, with the repository changed for as long as it takes.
    fn served_changed(&self, what: &str, kind: &str, change: impl FnOnce(&Path)) {
        let metadata = self.site.join("repo/metadata");
        let good = self.site.with_extension("good");
        let _ = std::fs::remove_dir_all(&good);
        site::copy_tree(&metadata, &good).unwrap();
        change(&metadata);
        self.served(what, kind);
        replace(&metadata, &good);
    }
}

/// The manifest of the machine's own release has another hook: as it is written, and cut to the length that the signers listed.
fn serves_a_changed_hook(siege: &Siege) {
    let file = published(&siege.site.join("repo/targets/minimal/2"), ".manifest.json");
    let good = std::fs::read(&file).unwrap();
    let changed = with_a_hook(&good);
    for (what, kind, bytes) in [
        ("a changed hook", "metadata-too-long", &changed[..]),
        ("a changed hook, of the listed length", "metadata-hash-mismatch", &changed[..good.len()]),
    ] {
        std::fs::write(&file, bytes).unwrap();
        siege.served(what, kind);
    }
    std::fs::write(&file, good).unwrap();
}

fn replace(metadata: &Path, by: &Path) {
    std::fs::remove_dir_all(metadata).unwrap();
    site::copy_tree(by, metadata).unwrap();
}

/// Of the image's signers one's key is revoked, two of two sign, the snapshot's key is replaced. The keys that are worth
/// nothing now.
struct Keys {
    revoked: Signer,
    one_of_two: Signer,
    rotated: Signer,
}

fn rotate(rack: &Rack) -> Keys {
    let file = |name: &str| rack.site.join(format!("offline/{name}.key")).display().to_string();
    let public = |names: &[&str]| names.iter().map(|name| file(name) + ".pub").collect::<Vec<_>>().join(",");
    for name in ["ann", "bob", "carol"] {
        site::kiln_quiet(rack.paths(), &["trust", "key", &file(name), "--no-passphrase"]).unwrap();
    }
    let rotated = key(&rack.site, "offline/snapshot.key");
    rack.kiln(&["trust", "rotate", "image-minimal", "--keys", &format!("1:{}", public(&["ann", "bob"]))]).unwrap();
    rack.kiln(&["trust", "revoke", &public(&["ann"])]).unwrap();
    rack.kiln(&["trust", "rotate", "image-minimal", "--keys", &format!("2:{}", public(&["bob", "carol"]))]).unwrap();
    rack.kiln(&["trust", "rotate", "snapshot"]).unwrap();
    Keys { revoked: key(&rack.site, "offline/ann.key"), one_of_two: key(&rack.site, "offline/bob.key"), rotated }
}

/// Repositories that are whole, and of another time or site; two of them mixed.
fn serves_what_was_signed_for_something_else(siege: &Siege, older: &Path, other: &Path) {
    siege.served_changed("an old repository", "metadata-rollback", |metadata| replace(metadata, older));
    siege.served_changed("another site's repository", "metadata-bad-signature", |metadata| {
        for entry in other.join("repo/metadata").read_dir().unwrap().flatten() {
            std::fs::copy(entry.path(), metadata.join(entry.file_name())).unwrap();
        }
    });
    let newest = newest_metadata(&siege.site, "image-minimal");
    let old_list = std::fs::read(newest_in(older, "image-minimal")).unwrap();
    let padded = as_long_as(&old_list, &std::fs::read(&newest).unwrap());
    for (what, kind, list) in [
        ("a mixture of two states", "metadata-length-mismatch", &old_list),
        ("a mixture of two states, of one length", "metadata-hash-mismatch", &padded),
    ] {
        siege.served_changed(what, kind, |_| std::fs::write(&newest, list).unwrap());
    }
    serves_a_changed_hook(siege);
}

/// Bytes without end, none at all, and one after the other.
fn serves_it_otherwise(siege: &Siege) {
    for (way, kind) in
        [(Way::Endless, "metadata-too-long"), (Way::Silent, "transfer-stalled"), (Way::Drip, "transfer-too-slow")]
    {
        siege.files.way(way);
        siege.served(&format!("{way:?} metadata"), kind);
        siege.files.way(Way::Honest);
    }
}

/// Each of these keys signs what it signed once.
fn serves_what_these_sign(siege: &Siege, keys: &Keys) {
    let lists = |document: &mut Value| document["targets"]["minimal/1/manifest.json"]["length"] = json!(1);
    for (what, role, signer) in [
        ("a signer's key that was revoked", "image-minimal", &keys.revoked),
        ("a signer's key below the threshold", "image-minimal", &keys.one_of_two),
        ("a snapshot's key that was replaced", "snapshot", &keys.rotated),
    ] {
        siege.served_changed(what, "metadata-bad-signature", |_| match role {
            "snapshot" => forge(&siege.site, role, &[signer], &|_| {}),
            _ => forge(&siege.site, role, &[signer], &lists),
        });
    }
}

/// One machine, held in its initramfs by a boot server in a thief's hands, meets one attack after the other: its console has
/// a typed reason for each, the thief hears it where it is told, and nothing starts. Then the honest server is back, with a
/// new director: the machine comes up, and goes where it is sent.
#[test]
#[ignore = "slow: a boot, some twenty refusals and a reimage; make test-slow"]
fn a_machine_meets_one_attack_after_the_other_and_comes_up() {
    testing::rack(|paths| {
        let spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        let id = spec.uuid();
        let mut options = RackOptions::scenario(paths, "siege", spec);
        options.unknown = vec![NAME.to_owned()];
        let mut rack = Rack::start(paths, &options).unwrap();
        let older = paths.scratch.join("older");
        site::copy_tree(&rack.site.join("repo/metadata"), &older).unwrap();
        let keys = rotate(&rack);
        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        let other = another_site(paths, &rack.site);

        rack.machine(NAME).power_on().unwrap();
        rack.wait(NAME, "nobody approved it", |v| v.stage == Some(Stage::Assignment)).unwrap();
        rack.kill_server();
        let resets = rack.machine(NAME).resets();
        let siege = Siege::begin(&mut rack);
        let begun = siege.console.mark();
        siege.console.wait_for("held by the thief", Mark::default(), IDLE).unwrap();

        for (what, kind, release, change) in FORGED {
            siege.answered(what, kind, thief(&rack.site, release, change));
        }
        siege.answered("a wipe", "order-bad-signature", wipes(&rack.site));
        siege.answers_besides("user-data, commands and units", user_data("/run/kiln-user-data"));

        serves_what_was_signed_for_something_else(&siege, &older, &other);
        serves_it_otherwise(&siege);
        serves_what_these_sign(&siege, &keys);

        // Another site's server in the same place, as a lying DHCP server would name it.
        let siege = siege.with_server_of(&other);
        let mark = siege.console.mark();
        siege.console.wait_for("certificate", mark, IDLE).unwrap();
        assert!(siege.console.since(mark).contains("failed (server-unreachable"), "{}", siege.console.last_words(5));
        assert!(siege.hostile().heard.lock().unwrap().is_empty(), "it hears nothing");
        let siege = siege.with_server_of(&rack.site);
        siege.console.wait_for("held by the thief", mark, IDLE).unwrap();

        for (what, kind, release, change) in TIMED {
            siege.answered(what, kind, thief(&rack.site, release, change));
        }
        let said = siege.console.since(begun);
        assert!(
            !said.contains("Linux version") && !said.contains(Stage::Root.label()),
            "something has started: {said}"
        );
        // Nor does it look for what nobody told it of: clouds' user-data, for one.
        let asked = siege.files.asked.lock().unwrap().clone();
        assert!(!asked.is_empty() && asked.iter().all(|path| is_of_a_release(path)), "{asked:#?}");
        drop(siege);

        // What was signed during the siege had numbers of its own; what is signed now goes beyond.
        rack.start_server().unwrap();
        for _ in 0..3 {
            rack.kiln(&["trust", "renew", "--within", "3650d"]).unwrap();
        }
        rack.kiln(&["trust", "rotate", "director"]).unwrap();
        rack.kiln(&["machine", "approve", &id, "--role", "lab"]).unwrap();
        rack.wait_healthy(NAME, 2).unwrap();
        // Nor does the thief's clock hold it any longer.
        rack.kiln(&["assign", &id, "minimal/1", "--via", "kexec"]).unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        assert_eq!(rack.machine(NAME).resets(), resets, "in one boot of the firmware");
    });
}
