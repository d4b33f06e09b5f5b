//! `kiln trust` as people use it: the program itself, with a boot server beside it where one is asked.

use crate::common::*;
use jiff::Timestamp;
use kiln_images::{SiteDir, Unlock};
use kiln_protocol::{DbxOutcome, DbxState, Report};
use kiln_release::Unverified;
use kiln_release::certificate::{certificate_spki, spki_key_id};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// In a session of its own (setsid(1)): whoever runs the tests at a terminal is asked nothing.
fn kiln(args: &[&str]) -> (bool, String) {
    let mut command = Command::new("setsid");
    command.args(["--wait", env!("CARGO_BIN_EXE_kiln")]).args(args).stdin(Stdio::null());
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

/// Whether this host lets a program be without any network (unshare(1)); it is said if not.
fn can_be_cut_off() -> bool {
    let usable = Command::new("unshare").args(["-rn", "true"]).stderr(Stdio::null()).status();
    let usable = usable.is_ok_and(|status| status.success());
    if !usable {
        println!(
            "skipped: signers keep the network: `unshare -rn true` fails here, user namespaces are off or util-linux is missing"
        );
    }
    usable
}

/// The program in this folder, without a network where that can be.
fn kiln_at(desk: &Path, cut_off: bool, args: &[&str]) -> (bool, String) {
    let without: &[&str] = if cut_off { &["unshare", "-rn"] } else { &[] };
    let words = [without, &["setsid", "--wait", env!("CARGO_BIN_EXE_kiln")], args].concat();
    let output = Command::new(words[0]).args(&words[1..]).current_dir(desk).stdin(Stdio::null()).output().unwrap();
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

#[track_caller]
fn done(args: &[&str]) -> String {
    let (done, text) = kiln(args);
    assert!(done, "{args:?}: {text}");
    text
}

#[track_caller]
fn refused(args: &[&str]) -> String {
    let (done, text) = kiln(args);
    assert!(!done, "{args:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Three roles by one person each, root by two of three, of whom one has an encrypted key: from nothing to a published
/// release, on machines that share nothing but a file.
#[test]
fn a_site_whose_keys_people_hold_from_its_first_key_to_a_release() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let passphrase = at("passphrase");
    fs::write(&passphrase, "too short\n").unwrap();
    let ann = at("root-ann.key");
    let short = refused(&["trust", "key", text(&ann), "--passphrase-file", text(&passphrase)]);
    assert!(short.contains("a passphrase of 9 characters is too short"), "{short}");
    fs::write(&passphrase, "nine lives of a cat\n").unwrap();
    let made = done(&["trust", "key", text(&ann), "--passphrase-file", text(&passphrase)]);
    assert!(!fs::read_to_string(&ann).unwrap().contains("PRIVATE KEY"));
    for name in ["root-bob", "root-cid", "targets", "snapshot", "image"] {
        done(&["trust", "key", text(&at(&format!("{name}.key"))), "--no-passphrase"]);
    }
    let public = |name: &str| at(&format!("{name}.key.pub")).display().to_string();
    let line = done(&["trust", "fingerprint", &public("root-ann")]);
    let fingerprint = line.split("  ").next().unwrap();
    assert!(made.contains(fingerprint) && fingerprint.len() == 79, "{made} {fingerprint}");

    let site = at("site");
    let root = format!("root=2:{},{},{}", public("root-ann"), public("root-bob"), public("root-cid"));
    let of = |role: &str, name: &str| format!("{role}=1:{}", public(name));
    let missing = refused(&["trust", "init", text(&site), "--keys", &root]);
    assert!(missing.contains("--keys targets=N:FILE.pub,… is missing"), "{missing}");
    let roles = [root, of("targets", "targets"), of("snapshot", "snapshot"), of("images", "image")];
    let keys = roles.iter().flat_map(|keys| ["--keys", keys.as_str()]);
    let init: Vec<&str> = ["trust", "init", text(&site), "--name", "works"].into_iter().chain(keys).collect();
    let said = done(&init);
    assert!(said.contains(fingerprint) && said.contains("root: 2 of 3 keys sign:"), "{said}");
    let unfinished = refused(&["release", "publish", "minimal/1", "--site", text(&site)]);
    assert!(
        unfinished.contains("minimal/1/manifest.json is missing") || unfinished.contains("not signed yet"),
        "{unfinished}"
    );

    let stick = at("stick.json");
    let carry = || fs::copy(site.join("offline/request.json"), &stick).unwrap();
    // A signer's machine has no network, and nothing but the key, the stick, and what the program keeps beside the key.
    let cut_off = can_be_cut_off();
    let desk = |name: &str| {
        let desk = at(&format!("desk-{name}"));
        if !desk.exists() {
            fs::create_dir(&desk).unwrap();
            fs::copy(at(&format!("{name}.key")), desk.join("signer.key")).unwrap();
        }
        fs::copy(&stick, desk.join("stick.json")).unwrap();
        desk
    };
    let sign = |name: &str, more: &[&str]| {
        let desk = desk(name);
        let args = [&["trust", "sign", "stick.json", "--key", "signer.key"], more].concat();
        let signed = kiln_at(&desk, cut_off, &args);
        fs::copy(desk.join("stick.json"), &stick).unwrap();
        signed
    };
    carry();
    // Nobody is there to compare the fingerprints.
    let (signed, said) = sign("root-ann", &["--passphrase-file", text(&passphrase)]);
    assert!(!signed && said.contains("Compare the fingerprints with those on paper"), "{said}");
    assert!(said.find("root version 1").unwrap() < said.find("no terminal").unwrap(), "the words come first: {said}");
    let (signed, said) = sign("root-ann", &["--passphrase-file", text(&passphrase), "--yes"]);
    assert!(signed && said.contains("signed: root\n") && said.contains("root has 1 of 2 signatures"), "{said}");
    for name in ["root-cid", "targets", "snapshot"] {
        let (signed, said) = sign(name, &["--yes"]);
        assert!(signed, "{said}");
    }
    let said = done(&["trust", "apply", text(&stick), "--site", text(&site)]);
    assert!(said.contains("the first metadata of works: signed and in force"), "{said}");

    build(&SiteDir::open(&site).unwrap(), 1);
    let said = done(&["release", "publish", "minimal/1", "--site", text(&site)]);
    assert!(said.contains("waits for signatures; what machines are served has not changed"), "{said}");
    let said = done(&["trust", "status", "--site", text(&site)]);
    assert!(
        said.contains("waits for signatures: publish minimal/1") && said.contains("image-minimal has 0 of 1"),
        "{said}"
    );
    carry();
    let (shown, said) = kiln_at(&desk("image"), cut_off, &["trust", "show", "stick.json"]);
    assert!(shown && said.contains("ADDS release minimal/1"), "{said}");
    for name in ["image", "targets", "snapshot"] {
        // A key that has signed before asks nothing more; the image's signs for the first time.
        let more: &[&str] = if name == "image" { &["--yes"] } else { &[] };
        let (signed, said) = sign(name, more);
        assert!(signed, "{said}");
    }
    done(&["trust", "apply", text(&stick), "--site", text(&site)]);
    let status: Value = serde_json::from_str(&done(&["trust", "status", "--json", "--site", text(&site)])).unwrap();
    let roles = status["roles"].as_array().unwrap();
    let names: Vec<&str> = roles.iter().map(|role| role["role"].as_str().unwrap()).collect();
    assert_eq!(names, ["root", "targets", "image-minimal", "snapshot", "timestamp"]);
    assert_eq!(
        (&roles[0]["threshold"], &roles[0]["nearness"], &status["request"]),
        (&2.into(), &"far".into(), &Value::Null)
    );
    let again = done(&["release", "publish", "minimal/1", "--site", text(&site)]);
    assert!(again.contains("was published before"), "{again}");
}

#[tokio::test]
async fn a_floor_waits_for_every_machine_that_needs_less() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let second = site.publish(2);
    let path = text(site.path()).to_owned();
    let floor = ["trust", "floor", "minimal", "2", "--site", &path];
    let said = refused(&floor);
    assert!(said.contains("rack-1's last-known-good is minimal/1"), "{said}");
    server.assign("rack-1", 2).await;
    assert!(refused(&floor).contains("rack-1's last-known-good is minimal/1"));
    agent.restart(&second);
    let report = agent.healthy();
    agent.send(&server, &report).await;
    assert!(done(&floor).contains("the floor of minimal is 2"));
    assert!(done(&floor).contains("is 2 already"));
    let said = refused(&["trust", "floor", "minimal", "3", "--site", &path]);
    assert!(said.contains("rack-1's last-known-good is minimal/2"), "{said}");
    let answer = server.try_assign("rack-1", 1).await;
    assert!(answer.text().contains("minimal/1 is below the floor 2"), "{}", answer.text());
    // Nobody is asked where nobody runs.
    server.signal("-TERM");
    let mut server = server;
    assert!(server.child.wait().unwrap().success());
    site.publish(3);
    assert!(refused(&["trust", "floor", "minimal", "3", "--site", &path]).contains("--without-server"));
    done(&["trust", "floor", "minimal", "3", "--without-server", "--site", &path]);
}

/// Days can lie between a prune and its last signature: what machines need is asked again by whoever applies it.
#[tokio::test]
async fn a_prune_that_waited_for_signatures_takes_nothing_that_a_machine_shall_run_by_now() {
    let people = tempfile::tempdir().unwrap();
    let at = |name: &str| people.path().join(name);
    let mut init: Vec<String> = ["trust", "init", "--name", "works"].map(str::to_owned).into();
    for (role, name) in [("root", "root"), ("targets", "targets"), ("snapshot", "snapshot"), ("images", "image")] {
        let key = at(&format!("{name}.key"));
        done(&["trust", "key", text(&key), "--no-passphrase"]);
        init.extend(["--keys".to_owned(), format!("{role}=1:{}.pub", key.display())]);
    }
    let site = TestSite::made_by(|dir| {
        let init: Vec<&str> = init.iter().map(String::as_str).chain([text(dir)]).collect();
        done(&init);
        SiteDir::open(dir).unwrap()
    });
    let (path, stick) = (text(site.path()).to_owned(), at("stick.json"));
    let sign = |names: &[&str]| {
        fs::copy(site.path().join("offline/request.json"), &stick).unwrap();
        for name in names {
            let key = at(&format!("{name}.key"));
            done(&["trust", "sign", text(&stick), "--key", text(&key), "--yes"]);
        }
    };
    let apply = ["trust", "apply", text(&stick), "--site", &path];
    sign(&["root", "targets", "snapshot"]);
    done(&[&apply[..], &["--without-server"]].concat());
    for release in 1..=3 {
        build(&site.site, release);
        done(&["release", "publish", &format!("minimal/{release}"), "--site", &path]);
        sign(if release == 1 { &["image", "targets", "snapshot"] } else { &["image", "snapshot"] });
        done(&[&apply[..], &["--without-server"]].concat());
    }

    let mut server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let said = done(&["release", "prune", "minimal", "--keep", "1", "--site", &path]);
    assert!(said.contains("waits for signatures"), "{said}");
    sign(&["image", "snapshot"]);
    assert!(fs::read_to_string(&stick).unwrap().contains("prune minimal"));
    // What a prune withholds, it withholds for minutes; and a server that starts anew knows nothing of it.
    assert!(server.try_assign("rack-1", 2).await.text().contains("minimal/2"));
    server.signal("-TERM");
    assert!(server.child.wait().unwrap().success());
    let server = Server::start(&site).await;
    server.assign("rack-1", 2).await;
    let said = refused(&apply);
    assert!(said.contains("machines need by now what this request takes out: minimal/2"), "{said}");
    let listed = || kiln_images::Repository::newest(&site.site, Timestamp::now()).unwrap().releases.len();
    assert_eq!(listed(), 3);
    // It has its signatures still, and goes in once no machine needs any of it.
    server.assign("rack-1", 3).await;
    let said = done(&apply);
    assert!(said.contains("signed and in force"), "{said}");
    assert_eq!(listed(), 2);
    assert_eq!(server.try_assign("rack-2", 2).await.status, hyper::StatusCode::NOT_FOUND);
}

fn keyid_of(bytes: &[u8]) -> String {
    let envelope: Value = serde_json::from_slice(bytes).unwrap();
    envelope["signatures"][0]["keyid"].as_str().unwrap().to_owned()
}

/// The running server takes up new online keys: what it signs from then on is theirs.
#[tokio::test]
async fn online_keys_are_replaced_under_a_running_server() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let path = text(site.path()).to_owned();
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    let (before, ..) = assigned(&reply);
    site.signed_site().verify_director::<kiln_protocol::Assignment>(before.as_bytes()).unwrap();

    let snapshot = server.http("GET", "/api/v1/status", &[]).await.json()["snapshot"].as_u64().unwrap();
    done(&["trust", "rotate", "director", "--site", &path]);
    until(&server, |status| status["snapshot"].as_u64().unwrap() > snapshot).await;
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    let (after, freshness, _) = assigned(&reply);
    let signed = site.signed_site();
    signed.verify_director::<kiln_protocol::Assignment>(after.as_bytes()).unwrap();
    signed.verify_director::<kiln_protocol::Freshness>(freshness.as_bytes()).unwrap();
    assert!(signed.verify_director::<kiln_protocol::Assignment>(before.as_bytes()).is_err());

    let old = keyid_of(&server.http("GET", "/metadata/timestamp.json", &[]).await.body);
    done(&["trust", "rotate", "timestamp", "--site", &path]);
    let snapshot = server.http("GET", "/api/v1/status", &[]).await.json()["snapshot"].as_u64().unwrap();
    site.publish(2);
    until(&server, |status| status["snapshot"].as_u64().unwrap() > snapshot).await;
    let new = server.http("GET", "/metadata/timestamp.json", &[]).await.body;
    assert_ne!(keyid_of(&new), old);
    Unverified::<Value>::parse(&new, 1 << 20).unwrap();
    let root: Value = serde_json::from_slice(&server.http("GET", "/metadata/2.root.json", &[]).await.body).unwrap();
    assert_eq!(root["signed"]["roles"]["timestamp"]["keyids"][0], keyid_of(&new).as_str());
}

/// The key of a boot server that was stolen: another one under the same CA, and the site names it.
#[tokio::test]
async fn the_agent_api_gets_another_key_that_the_site_names() {
    let site = TestSite::new();
    let path = text(site.path()).to_owned();
    let id = || {
        let pem = String::from_utf8(site.online("agent-server.pem")).unwrap();
        let der = kiln_release::hex::pem_decode("CERTIFICATE", &pem).unwrap();
        spki_key_id(certificate_spki(&der).unwrap())
    };
    let before = id();
    assert!(site.signed_site().agent_api.keys.is_empty());
    let server = Server::start(&site).await;
    let snapshot = site.snapshot();
    let said = done(&["trust", "rotate", "agent-api", "--site", &path]);
    assert!(said.contains("the agent API has another key") && said.contains("restart `kiln serve`"), "{said}");
    assert_ne!(id(), before);
    assert_eq!(site.signed_site().agent_api.keys, [id()]);
    for file in ["agent-server.key.next", "agent-server.pem.next"] {
        assert!(!site.path().join("online").join(file).exists(), "{file}");
    }
    // The server that has the old one says so.
    until(&server, |status| status["snapshot"].as_u64().unwrap() > snapshot).await;
    let log = || fs::read_to_string(site.path().join("log")).unwrap();
    assert!(log().contains("the site names another key of the agent API"), "{}", log());
    drop(server);
    // Certificate and key belong together, and the CA is the one that machines know.
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    assigned(&agent.send(&server, &report).await);
}

/// What is about to expire is in the API with its days, and in the log.
#[tokio::test]
async fn the_end_of_signed_metadata_is_told() {
    let site = TestSite::new();
    let site_dir = site.site.clone();
    // As if it had been signed a year ago but for twenty days.
    let then = Timestamp::now() - jiff::SignedDuration::from_hours((365 - 20) * 24);
    fs::remove_dir_all(site_dir.path.join("repo")).unwrap();
    for house in ["offline", "online", "state"] {
        fs::remove_dir_all(site_dir.path.join(house)).unwrap();
    }
    kiln_images::init_lab(site.path(), "test", then).unwrap();
    site.publish(1);
    let server = Server::start(&site).await;
    let status = server.http("GET", "/api/v1/status", &[]).await.json();
    let warning = |role: &str| {
        let all = status["expiries"].as_array().unwrap();
        all.iter().find(|expiry| expiry["role"] == role).unwrap()["warning"].as_str().map(str::to_owned)
    };
    assert!(warning("root").unwrap().contains("1.root.json expires within 30 days"), "{status}");
    assert_eq!(warning("timestamp"), None);
    let log = || fs::read_to_string(site.path().join("log")).unwrap();
    let begun = std::time::Instant::now();
    while !log().contains("1.root.json expires within 30 days") {
        assert!(begun.elapsed() < PATIENCE, "{}", log());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let path = text(site.path()).to_owned();
    assert!(done(&["trust", "status", "--site", &path]).contains("expires within 30 days"));
    assert!(done(&["trust", "renew", "--within", "30d", "--site", &path]).starts_with("new dates for root\n"));
    until(&server, |status| {
        let all = status["expiries"].as_array().unwrap();
        all.iter().all(|expiry| expiry["warning"].is_null())
    })
    .await;
    // The same command by its other name.
    let again = done(&["trust", "expire", "--within", "30d", "--site", &path]);
    assert!(again.starts_with("nothing expires within 30 days"), "{again}");
}

/// The list of revoked boot programs is offered to a machine that needs none of them, and to no other.
#[tokio::test]
async fn a_revocation_waits_for_the_machine_that_needs_the_release() {
    let site = TestSite::new();
    let second = site.publish(2);
    let revoked: PathBuf = site.site.secure_boot("revoked");
    fs::write(&revoked, format!("{} minimal/1\n", "ab".repeat(32))).unwrap();
    kiln_images::publish_dbx(&site.site, Timestamp::now(), &mut Unlock::nobody()).unwrap();
    assert!(kiln_images::publish_dbx(&site.site, Timestamp::now(), &mut Unlock::nobody()).unwrap().already);
    let list = site.signed_site().dbx.unwrap();
    let server = Server::start(&site).await;
    let artifact = server.http("GET", &format!("/a/{}", list.update.sha256), &[]).await;
    assert_eq!(kiln_release::hex::sha256(&artifact.body), list.update.sha256);

    let mut agents = [Agent::new(1, &site.manifest(1)), Agent::new(2, &second)];
    let mut replies = Vec::new();
    for (agent, release) in agents.iter_mut().zip([1, 2]) {
        let report = agent.healthy();
        agent.send(&server, &report).await;
        server.assign(&format!("rack-{}", agent.n), release).await;
        let report = agent.healthy();
        replies.push(agent.send(&server, &report).await);
    }
    assert_eq!(replies[0].dbx, None);
    assert_eq!(replies[1].dbx.as_ref().unwrap().update.as_str(), list.update.sha256);
    let status = done(&["trust", "status", "--site", text(site.path())]);
    assert!(status.contains("rack-1 lacks them: held: it runs minimal/1"), "{status}");
    assert!(status.contains("rack-2 lacks them: it is offered the list"), "{status}");
    let state = |outcome| Some(DbxState { update: list.update.sha256.parse().unwrap(), outcome });
    let failed = DbxOutcome::Failed { reason: "the firmware's store is full\n\u{1b}[2J".into() };
    for (outcome, expected) in [
        (failed, "rack-2 lacks them: failed: the firmware's store is full[2J"),
        (DbxOutcome::Installed, "rack-1 lacks them"),
    ] {
        let report = Report { dbx: state(outcome.clone()), ..agents[1].healthy() };
        let reply = agents[1].send(&server, &report).await;
        assert_eq!(reply.dbx.is_none(), outcome == DbxOutcome::Installed);
        let status = done(&["trust", "status", "--site", text(site.path())]);
        assert!(status.contains(expected) && !status.contains('\u{1b}'), "{status}");
    }
    assert!(!done(&["trust", "status", "--site", text(site.path())]).contains("rack-2 lacks"));
    // A new boot says nothing of it until it is asked again; what the firmware has it keeps.
    agents[1].restart(&second);
    let report = agents[1].healthy();
    assert_eq!(agents[1].send(&server, &report).await.dbx, None);
}

/// The keys of Secure Boot as people use them: made or found plain, encrypted, and then opened by their passphrase.
#[test]
fn secure_boot_keys_are_encrypted_and_a_plain_one_is_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (site, out, phrase, wrong) = (at("site"), at("out"), at("phrase"), at("wrong"));
    done(&["trust", "init", "--lab", text(&site)]);
    fs::write(&phrase, "nine lives of a cat\n").unwrap();
    fs::write(&wrong, "nine lives of a dog\n").unwrap();
    let enroll = ["trust", "secureboot", "enroll", "--site", text(&site), "--out", text(&out)];
    assert!(!done(&enroll).contains("warning"), "a lab's keys are not encrypted");
    // Not a lab any more, as its own file says.
    let signers = r#"{"images":{"threshold":1,"keys":[]},"days":365,"names":{}}"#;
    fs::write(site.join("offline/signers.json"), signers).unwrap();
    let said = done(&enroll);
    assert!(said.contains("warning: ") && said.contains("`kiln trust secureboot encrypt"), "{said}");
    let encrypt = ["trust", "secureboot", "encrypt", "--site", text(&site), "--passphrase-file", text(&phrase)];
    let said = done(&encrypt);
    assert!(["PK.key", "KEK.key", "db.key"].iter().all(|key| said.contains(key)), "{said}");
    assert!(done(&encrypt).contains("encrypted before"));
    for key in ["PK", "KEK", "db"] {
        let file = fs::read_to_string(site.join(format!("offline/secure-boot/{key}.key"))).unwrap();
        assert!(!file.contains("PRIVATE KEY"));
    }
    let said = refused(&enroll);
    assert!(said.contains("PK.key") && said.contains("no terminal"), "{said}");
    let mut with = [&enroll[..], &["--passphrase-file", text(&wrong)]].concat();
    let said = refused(&with);
    assert!(said.contains("PK.key: the passphrase is wrong, or the file is damaged"), "{said}");
    *with.last_mut().unwrap() = text(&phrase);
    let said = done(&with);
    assert!(said.contains("dbx names 0 releases") && !said.contains("warning"), "{said}");
    let none = at("none");
    done(&["trust", "init", "--lab", text(&none)]);
    let made = refused(&["trust", "secureboot", "init", "--site", text(&none), "--passphrase-file", text(&phrase)]);
    assert!(made.contains("is there already"), "{made}");
}
