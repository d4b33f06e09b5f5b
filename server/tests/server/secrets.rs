//! Secrets against a running `kiln serve`, with real TPMs in software: who gets them, who does not, and where they are not.

use crate::common::chip::*;
use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::tpm::{QUOTED, code, command, delivery_policy};
use kiln_protocol::*;
use kiln_server::view::SecretView;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce as Once, UnboundKey};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Neither is a piece of anything else.
const FIRST: &str = "correct horse battery staple 41";
const SECOND: &str = "wrong donkey capacitor paperclip 97";

/// A site whose release 2 wants two secrets, a server, a machine that runs it, attested.
async fn rack(more: &str) -> Option<(TestSite, Server, Agent, Chip)> {
    let mut chip = Chip::new()?;
    let site = TestSite::new();
    let manifest = site.publish_wanting(2, &["db-password", "tls.key"]);
    let file = site.path().join("kiln.toml");
    let text = std::fs::read_to_string(&file).unwrap().replace("name = \"lab\"\n", &format!("name = \"lab\"\n{more}"));
    std::fs::write(file, text).unwrap();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &manifest);
    chip.boot(2, b"firmware", 1);
    let reply = report(&server, &mut agent, &[]).await;
    assert!(reply.attest && reply.secrets.is_none(), "nothing before a proof, and nothing is set");
    let (judged, _) = prove(&server, &agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
    assert_eq!((judged.secrets, judged.refused), (None, None), "it asked for none");
    Some((site, server, agent, chip))
}

/// A report of the running system, which holds these.
async fn report(server: &Server, agent: &mut Agent, held: &[(&str, u64)]) -> Reply {
    let held = held.iter().map(|(name, version)| (name.parse().unwrap(), *version)).collect();
    let mut report = Report { secrets: Some(held), ..agent.healthy() };
    report.machine.tpm = Some(TpmPresence::Ready);
    agent.send(server, &report).await
}

fn set(site: &TestSite, name: &str, whom: [&str; 2], value: &str) -> (bool, String) {
    let file = site.path().join("value");
    std::fs::write(&file, value).unwrap();
    let (file, dir) = (file.to_str().unwrap(), site.path().to_str().unwrap());
    let (good, out, err) = site.kiln(&["secret", "set", name, whom[0], whom[1], "--file", file, "--site", dir]);
    std::fs::remove_file(file).unwrap();
    // A short one is a piece of many words.
    assert!(value.len() < 9 || !(out.clone() + &err).contains(value));
    (good, out + &err)
}

/// The number that a value was given.
fn version(said: &str) -> u64 {
    let number = said.split("is version ").nth(1).and_then(|rest| rest.split(' ').next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no version: {said}"))
}

/// The policy of a delivery key under the PCRs as they are.
fn policy_now(chip: &mut Chip) -> [u8; 32] {
    let values: Vec<[u8; 32]> = QUOTED.iter().map(|pcr| chip.run(&command::pcr_read(*pcr))).collect();
    delivery_policy(&values).unwrap()
}

fn unseal(key: &[u8], delivered: &Delivered, agent: &Agent, nonce: &Nonce) -> BTreeMap<String, (u64, String)> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap());
    let bound = bound_to(&machine_id(agent.n), &boot_id(agent), nonce);
    let mut sealed = delivered.sealed.0.clone();
    let once = Once::assume_unique_for_key([0; 12]);
    let opened = key.open_in_place(once, Aad::from(bound), &mut sealed).unwrap();
    let set = SecretSet::decode(opened).unwrap();
    let text = |value: &[u8]| String::from_utf8(value.to_vec()).unwrap();
    set.0.iter().map(|(name, (version, value))| (name.to_string(), (*version, text(value)))).collect()
}

/// What an attested machine gets when it asks.
async fn fetch(server: &Server, agent: &Agent, chip: &mut Chip) -> BTreeMap<String, (u64, String)> {
    let (judged, _, nonce) = prove_for(server, agent, chip, true).await;
    let delivered = judged.secrets.unwrap_or_else(|| panic!("{:?}", judged.refused));
    let policy = policy_now(chip);
    let key = chip.open(&delivered, policy).unwrap();
    unseal(&key, &delivered, agent, &nonce)
}

async fn refused(server: &Server, agent: &Agent, chip: &mut Chip) -> String {
    let (judged, ..) = prove_for(server, agent, chip, true).await;
    assert_eq!(judged.secrets, None);
    judged.refused.unwrap()
}

async fn list(server: &Server) -> Vec<SecretView> {
    serde_json::from_slice(&server.order("GET", "secrets", Value::Null).await.body).unwrap()
}

/// Every file below, but for those named.
fn files(dir: &Path, but: &[&str], out: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, but, out);
        } else if path.is_file() && !but.iter().any(|name| path.ends_with(name)) {
            out.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
}

fn contains(bytes: &[u8], piece: &str) -> bool {
    let hex = kiln_release::hex::encode(piece.as_bytes());
    [piece, &hex].iter().any(|piece| bytes.windows(piece.len()).any(|window| window == piece.as_bytes()))
}

#[tokio::test]
async fn an_attested_machine_gets_its_secrets_their_rotation_and_their_removal() {
    let Some((site, server, mut agent, mut chip)) = rack("").await else { return };
    let (good, said) = set(&site, "db-password", ["--role", "lab"], FIRST);
    assert!(good && said.starts_with("db-password is version ") && said.contains(" for role lab"), "{said}");
    let first = version(&said);
    assert_eq!(report(&server, &mut agent, &[]).await.secrets, Some(SecretsWord::Ask));
    // Recorded, as a thief would.
    let (judged, shown, nonce) = prove_for(&server, &agent, &mut chip, true).await;
    let delivered = judged.secrets.unwrap();
    let policy = policy_now(&mut chip);
    let key = chip.open(&delivered, policy).unwrap();
    let got = unseal(&key, &delivered, &agent, &nonce);
    assert_eq!(got, [("db-password".to_owned(), (first, FIRST.to_owned()))].into());
    assert_eq!(report(&server, &mut agent, &[("db-password", first)]).await.secrets, None);
    let listed = list(&server).await;
    assert_eq!(listed[0].holding, 1);
    let holder = listed[0].machines.iter().find(|m| m.machine == "rack-1").unwrap();
    assert_eq!((holder.version, &holder.why), (Some(first), &None));
    assert_eq!(server.machine("rack-1").await.secrets, [("db-password".parse().unwrap(), first)].into());

    // The machine's own comes before its role's; one that the release does not want is not sent.
    let own = version(&set(&site, "db-password", ["--machine", "rack-1"], "own").1);
    let unwanted = version(&set(&site, "unwanted", ["--role", "lab"], "x").1);
    let tls = version(&set(&site, "tls.key", ["--role", "lab"], "key").1);
    assert!(first < own && own < unwanted && unwanted < tls, "no number twice");
    let got = fetch(&server, &agent, &mut chip).await;
    assert_eq!(got["db-password"], (own, "own".to_owned()));
    assert_eq!((got["tls.key"].clone(), got.len()), ((tls, "key".to_owned()), 2));
    let (good, ..) =
        site.kiln(&["secret", "remove", "db-password", "--machine", "rack-1", "--site", site.path().to_str().unwrap()]);
    assert!(good);

    // Rotation ends a held report.
    let held = [("db-password", first), ("tls.key", tls)];
    let reply = report(&server, &mut agent, &held).await;
    assert_eq!(reply.secrets, None);
    let secrets = Some(held.iter().map(|(name, version)| (name.parse().unwrap(), *version)).collect());
    let mut waits = Report { secrets, wait_s: 25, desired_etag: reply.desired.etag, ..agent.healthy() };
    waits.machine.tpm = Some(TpmPresence::Ready);
    let (reply, second) = tokio::join!(agent.send(&server, &waits), async {
        until(&server, |status| status["held_reports"] == 1).await;
        version(&set(&site, "db-password", ["--role", "lab"], SECOND).1)
    });
    assert_eq!(reply.secrets, Some(SecretsWord::Ask));
    let got = fetch(&server, &agent, &mut chip).await;
    assert_eq!(got["db-password"], (second, SECOND.to_owned()));

    // A server that starts again has them, and gives them for a new proof only.
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(post(&server, &agent, &shown).await.status, StatusCode::CONFLICT, "an old proof");
    assert_eq!(report(&server, &mut agent, &held).await.secrets, Some(SecretsWord::Ask));
    assert_eq!(fetch(&server, &agent, &mut chip).await["db-password"], (second, SECOND.to_owned()));

    for name in ["db-password", "tls.key"] {
        let answer = server.order("DELETE", &format!("secrets/{name}?role=lab"), Value::Null).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
    assert_eq!(report(&server, &mut agent, &held).await.secrets, Some(SecretsWord::Drop));
    assert!(refused(&server, &agent, &mut chip).await.contains("none for it"));

    // What a thief of everything but the keys finds; and what everybody reads.
    let mut found = Vec::new();
    files(site.path(), &["secrets.key"], &mut found);
    assert!(found.iter().any(|(name, bytes)| name.contains("kiln.db") && contains(bytes, "newest-secret")));
    assert!(found.iter().any(|(name, _)| name.ends_with("/log")));
    for text in ["secrets", "machines", "audit/records", "status"] {
        found.push((text.to_owned(), server.order("GET", text, Value::Null).await.body));
    }
    for (name, bytes) in &found {
        for value in [FIRST, SECOND] {
            assert!(!contains(bytes, value), "{name} has a secret in clear");
        }
    }
    let audit = server.audit().await;
    let has = |what: &str| audit.iter().any(|record| record.what.contains(what));
    assert!(has(&format!("set the secret db-password of role lab: version {first}")));
    assert!(has(&format!("was given the secrets db-password (version {second}), tls.key (version {tls})")));
    assert!(has(&format!("removed the secret tls.key of role lab: version {tls}")));
    let secret = std::fs::metadata(site.path().join("online/secrets.key")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&secret.permissions()) & 0o777, 0o600);
}

#[tokio::test]
async fn what_was_recorded_opens_in_no_other_tpm_and_in_no_other_state() {
    let Some((site, server, agent, mut chip)) = rack("").await else { return };
    assert!(set(&site, "db-password", ["--role", "lab"], FIRST).0);
    let (judged, shown, nonce) = prove_for(&server, &agent, &mut chip, true).await;
    let delivered = judged.secrets.unwrap();
    let policy = policy_now(&mut chip);

    // Another machine's TPM that booted the very same.
    let mut other = Chip::new().unwrap();
    other.boot(2, b"firmware", 1);
    assert_eq!(policy_now(&mut other), policy);
    assert!(other.open(&delivered, policy).is_err());
    // Its own, but something else was started since; under the old policy, or a policy of its own.
    chip.run(&command::pcr_extend(11, &[9; 32]));
    let refused = chip.open(&delivered, policy).unwrap_err();
    assert!(matches!(refused, tpm::TpmError::Refused { code: code::POLICY_FAIL, .. }), "{refused}");
    let own = policy_now(&mut chip);
    assert!(chip.open(&delivered, own).is_err());
    // After a restart into another system under the same firmware and keys.
    chip.restart();
    chip.boot(1, b"firmware", 1);
    assert!(chip.open(&delivered, policy).is_err());
    // And again in the state that it was sealed to: it was not simply broken.
    chip.restart();
    chip.boot(2, b"firmware", 1);
    let key = chip.open(&delivered, policy).unwrap();
    assert_eq!(unseal(&key, &delivered, &agent, &nonce).len(), 1);

    // The set is bound to machine, boot and proof.
    let aead = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap());
    for bound in [
        bound_to(&machine_id(2), &boot_id(&agent), &nonce),
        bound_to(&machine_id(1), "another", &nonce),
        bound_to(&machine_id(1), &boot_id(&agent), &"00".repeat(32).parse().unwrap()),
    ] {
        let mut sealed = delivered.sealed.0.clone();
        assert!(aead.open_in_place(Once::assume_unique_for_key([0; 12]), Aad::from(bound), &mut sealed).is_err());
    }
    assert_eq!(post(&server, &agent, &shown).await.status, StatusCode::CONFLICT, "a proof is good once");
}

#[tokio::test]
async fn a_key_that_is_not_bound_to_the_quoted_state_is_given_nothing() {
    let Some((site, server, agent, mut chip)) = rack("").await else { return };
    assert!(set(&site, "db-password", ["--role", "lab"], FIRST).0);
    let (_, attestation) = chip.run(&command::create_primary(tpm::ENDORSEMENT, tpm::Template::Attestation));
    let (_, loose) = chip.run(&command::create_primary(tpm::ENDORSEMENT, tpm::Template::Delivery([0; 32])));
    chip.restart();
    chip.boot(2, b"firmware", 1);
    for area in [attestation, loose, Vec::new()] {
        let (judged, said) = prove_with(&server, &agent, &mut chip, area).await;
        assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
        assert!(said.contains("under the PCRs that it quoted"), "{said}");
    }
}

/// A proof with a delivery key of the asker's choice.
async fn prove_with(server: &Server, agent: &Agent, chip: &mut Chip, area: Vec<u8>) -> (Judged, String) {
    let (judged, ..) = prove_as(server, agent, chip, Some(HexBytes(area))).await;
    let said = judged.refused.clone().unwrap();
    assert_eq!(judged.secrets, None);
    (judged, said)
}

#[tokio::test]
async fn a_machine_that_is_not_attested_or_not_in_service_gets_nothing() {
    let Some((site, server, mut agent, mut chip)) = rack("").await else { return };
    assert!(set(&site, "db-password", ["--role", "lab"], FIRST).0);
    // No proof in this boot: no word, and the endpoint has none without one.
    agent.restart(&site.manifest(2));
    let reply = report(&server, &mut agent, &[]).await;
    assert!(reply.attest && reply.secrets.is_none());

    // Something was added to the command line: a true quote, and a failed boot.
    chip.run(&command::pcr_extend(12, &[1; 32]));
    let said = refused(&server, &agent, &mut chip).await;
    assert!(said.contains("attested boots only") && said.contains("PCR 12"), "{said}");
    assert_eq!(report(&server, &mut agent, &[]).await.secrets, None, "it is not asked to try again");

    // Secure Boot off.
    chip.restart();
    chip.boot(2, b"firmware", 0);
    agent.restart(&site.manifest(2));
    report(&server, &mut agent, &[]).await;
    assert!(refused(&server, &agent, &mut chip).await.contains("Secure Boot is off"));

    // A boot that is attested as another release than the system says it runs.
    chip.restart();
    chip.boot(1, b"firmware", 1);
    agent.restart(&site.manifest(1));
    report(&server, &mut agent, &[]).await;
    agent.embedded = running(&site.manifest(1));
    let lie = Report { running: Some(running(&site.manifest(2))), ..agent.healthy() };
    let mut lie = Report { secrets: Some(SecretVersions::new()), ..lie };
    lie.machine.tpm = Some(TpmPresence::Ready);
    agent.send(&server, &lie).await;
    let said = refused(&server, &agent, &mut chip).await;
    assert!(said.contains("firmware started minimal/1, and it says it runs minimal/2"), "{said}");

    // Its key in other hardware.
    let mut thief = Chip::new().unwrap();
    thief.boot(2, b"firmware", 1);
    agent.restart(&site.manifest(2));
    report(&server, &mut agent, &[]).await;
    let said = refused(&server, &agent, &mut thief).await;
    assert!(said.contains("another TPM") || said.contains("approved with"), "{said}");

    // Another key, under the machine's name, with the machine's own TPM.
    chip.restart();
    chip.boot(2, b"firmware", 1);
    agent.restart(&site.manifest(2));
    report(&server, &mut agent, &[]).await;
    let (stranger, shown) = {
        let stranger = Agent { signer: Agent::new(9, &site.manifest(2)).signer, ..agent.clone() };
        let (_, shown, _) = prove_for(&server, &agent, &mut chip, true).await;
        (stranger, shown)
    };
    assert_eq!(post(&server, &stranger, &shown).await.status, StatusCode::CONFLICT);

    // The machine as it should be gets them; retired, it is told to forget them, and a proof gives none.
    assert_eq!(fetch(&server, &agent, &mut chip).await.len(), 1);
    let answer = server.order("POST", "machines/rack-1/retire", json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(report(&server, &mut agent, &[("db-password", 1)]).await.secrets, Some(SecretsWord::Drop));
    let said = refused(&server, &agent, &mut chip).await;
    assert!(said.contains("out of service"), "{said}");
    report(&server, &mut agent, &[]).await;
    let holder = &list(&server).await[0].machines[0];
    assert!(holder.why.as_ref().unwrap().contains("out of service"), "{holder:?}");

    // And one whose key was taken away is not heard at all.
    let answer = server.order("POST", "machines/rack-1/revoke-key", json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(post(&server, &agent, &shown).await.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_role_that_gives_secrets_to_cold_boots_only_never_goes_by_kexec() {
    let Some((site, server, mut agent, mut chip)) = rack("secrets = \"cold\"\n").await else { return };
    assert!(set(&site, "db-password", ["--role", "lab"], FIRST).0);
    assert_eq!(fetch(&server, &agent, &mut chip).await.len(), 1, "it booted through firmware");
    site.publish_wanting(3, &["db-password"]);
    server.assign("rack-1", 3).await;
    let reply = report(&server, &mut agent, &[("db-password", 1)]).await;
    let Decision::Assigned { via, .. } = reply.desired.decision else { panic!("{reply:?}") };
    assert_eq!(via, Via::Cold, "whatever way was asked for");
    // It came by kexec all the same.
    chip.run(&command::pcr_extend(11, &kiln_release::measured::cap()));
    agent.restart(&site.manifest(3));
    report(&server, &mut agent, &[]).await;
    let said = refused(&server, &agent, &mut chip).await;
    assert!(said.contains("only to cold boots"), "{said}");
    assert_eq!(server.machine("rack-1").await.attestation.unwrap().state, AttestationState::Attested);
}

#[tokio::test]
async fn the_database_without_its_key_gives_nobody_anything() {
    let Some((site, server, mut agent, mut chip)) = rack("").await else { return };
    assert!(set(&site, "db-password", ["--role", "lab"], FIRST).0);
    drop(server);
    let key = site.path().join("online/secrets.key");
    std::fs::rename(&key, site.path().join("kept")).unwrap();
    let server = Server::start(&site).await;
    report(&server, &mut agent, &[]).await;
    let said = refused(&server, &agent, &mut chip).await;
    assert!(said.contains("secrets.key is missing"), "{said}");
    let (good, said) = set(&site, "tls.key", ["--role", "lab"], SECOND);
    assert!(!good && said.contains("restore it") && !key.exists(), "{said}");
    drop(server);
    // A key of the thief's own.
    std::fs::write(&key, format!("{}\n", "11".repeat(32))).unwrap();
    let server = Server::start(&site).await;
    report(&server, &mut agent, &[]).await;
    assert!(refused(&server, &agent, &mut chip).await.contains("cannot be read from the database"));
    drop(server);
    std::fs::rename(site.path().join("kept"), &key).unwrap();
    let server = Server::start(&site).await;
    report(&server, &mut agent, &[]).await;
    assert_eq!(fetch(&server, &agent, &mut chip).await.len(), 1);
}

#[tokio::test]
async fn people_set_secrets_within_their_role_and_limits() {
    let site = TestSite::new();
    let four_eyes = "[access]\nfour_eyes = [\"secret-set\"]";
    let with = std::fs::read_to_string(site.path().join("kiln.toml")).unwrap() + four_eyes;
    let error = kiln_server::config::Config::parse(&with).unwrap_err().to_string();
    assert!(error.contains("secret-set"), "its value would lie in the open: {error}");
    let server = Server::start(&site).await;
    let technician = server.token("t", "technician").await;
    for (method, path) in [("GET", "secrets"), ("PUT", "secrets/a?role=lab"), ("DELETE", "secrets/a?role=lab")] {
        assert_eq!(server.with(&technician, method, path, json!({})).await.status, StatusCode::FORBIDDEN);
    }
    let operator = server.token("o", "operator").await;
    assert_eq!(server.with(&operator, "PUT", "secrets/a?role=lab", json!({})).await.status, StatusCode::OK);
    let limit = "x".repeat(SECRET_LIMIT);
    assert!(set(&site, "a", ["--role", "lab"], &limit).0);
    for (name, whom, value, words) in [
        ("a", ["--role", "lab"], format!("{limit}y"), "has 1 to 16384 bytes"),
        ("a", ["--role", "lab"], String::new(), "has 1 to 16384 bytes"),
        ("../a", ["--role", "lab"], "v".into(), "secret's name"),
        ("a", ["--role", "nobody"], "v".into(), "is no role"),
        ("a", ["--machine", "nobody"], "v".into(), "no machine"),
    ] {
        let (good, said) = set(&site, name, whom, &value);
        assert!(!good && said.contains(words), "{said}");
    }
    for name in ["b", "c", "d"] {
        assert!(set(&site, name, ["--role", "lab"], &limit).0);
    }
    let (good, said) = set(&site, "e", ["--role", "lab"], "v");
    assert!(!good && said.contains("65536 bytes together"), "{said}");
    // What failed is in the audit log, without what was sent.
    let audit = serde_json::to_string(&server.audit().await).unwrap();
    assert!(audit.contains("PUT /api/v1/secrets/e") && !audit.contains("xxxxx"));
    let (good, out, _) = site.kiln(&["secret", "list", "--site", site.path().to_str().unwrap()]);
    assert!(good && out.contains("role lab") && !out.contains("xxxxx"), "{out}");
}

#[tokio::test]
async fn a_value_is_not_sent_over_an_unencrypted_connection() {
    let site = TestSite::new();
    let file = site.path().join("value");
    std::fs::write(&file, FIRST).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let file = file.to_str().unwrap();
    let (good, out, err) =
        site.kiln(&["secret", "set", "db-password", "--role", "lab", "--file", file, "--server", &url]);
    assert!(!good && err.contains("is not encrypted: the secret would be shown"), "{out}{err}");
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "nobody was asked anything");
}

#[tokio::test]
async fn no_version_comes_back_with_an_older_database() {
    let site = TestSite::new();
    let database = || {
        let files = std::fs::read_dir(site.path().join("state")).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("kiln.db")).collect::<Vec<_>>()
    };
    let server = Server::start(&site).await;
    let first = version(&set(&site, "db-password", ["--role", "lab"], FIRST).1);
    drop(server);
    let backup: Vec<_> = database().into_iter().map(|path| (std::fs::read(&path).unwrap(), path)).collect();
    let server = Server::start(&site).await;
    let lost = version(&set(&site, "db-password", ["--role", "lab"], SECOND).1);
    drop(server);
    for path in database() {
        std::fs::remove_file(path).unwrap();
    }
    for (bytes, path) in &backup {
        std::fs::write(path, bytes).unwrap();
    }
    let server = Server::start(&site).await;
    assert_eq!(list(&server).await[0].version, first, "it is the older one");
    // A machine that holds what was lost must not take it for this.
    let next = version(&set(&site, "db-password", ["--role", "lab"], "another value").1);
    assert!(first < lost && lost < next, "{first} {lost} {next}");
}
