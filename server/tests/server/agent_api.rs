//! The agent API of a running `kiln serve`: identities, assignments, grants, held reports, and what survives a kill.

use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::*;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;

#[tokio::test]
async fn a_listed_machine_gets_an_assignment_it_can_verify() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.report();
    let reply = agent.send(&server, &report).await;
    let (envelope, freshness, _) = assigned(&reply);

    let signed = site.signed_site();
    let (assignment, sha256) = signed.verify_director::<Assignment>(envelope.as_bytes()).unwrap();
    let (key, image) = (agent.key_id(), "minimal".parse().unwrap());
    let me = Running { key: &key, arch: Architecture::X86_64, image: &image, highest_sequence: 0, floor: 1 };
    check_assignment(&assignment, &me).unwrap();
    assert_eq!((assignment.release, assignment.sequence, assignment.role.as_str()), (1, 1, "lab"));
    let manifest = std::fs::read(site.site.build("minimal", 1).join("manifest.json")).unwrap();
    assert_eq!(assignment.manifest_sha256.as_str(), kiln_release::hex::sha256(&manifest));
    let (fresh, _) = signed.verify_director::<Freshness>(freshness.as_bytes()).unwrap();
    check_freshness(&fresh, &report.nonce, &sha256.parse().unwrap()).unwrap();

    let view = server.machine("rack-1").await;
    assert_eq!((view.state.as_str(), view.boots.len()), ("booting", 1));
    let second = agent.healthy();
    let reply = agent.send(&server, &second).await;
    assert_eq!(assigned(&reply).0, envelope, "the same envelope, byte for byte, until it changes");
    let (fresh, _) = signed.verify_director::<Freshness>(assigned(&reply).1.as_bytes()).unwrap();
    assert_eq!(fresh.nonce, second.nonce);
    let view = server.machine("rack-1").await;
    assert_eq!((view.state.as_str(), view.last_good), ("healthy", Some("minimal/1".parse().unwrap())));
}

#[tokio::test]
async fn an_unknown_machine_waits_until_a_person_approves_it() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(9, &site.manifest(1));
    let first = agent.report();
    let reply = agent.send(&server, &first).await;
    assert!(waits(&reply).contains("kiln machine approve 00000000-0000-0000-0000-000000000009 --role ROLE"));
    assert_eq!(server.machine(machine_id(9).as_str()).await.state, "discovered");

    // Over TCP nobody changes anything.
    let path = format!("/api/v1/machines/{}/approve", machine_id(9));
    let refused = server.http("POST", &path, &[]).await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN);
    assert!(refused.text().contains("kiln.sock"));
    assert_eq!(server.http("PUT", "/api/v1/machines/x/assignment", &[]).await.status, StatusCode::FORBIDDEN);
    assert_eq!(server.http("DELETE", "/", &[]).await.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(server.http("GET", "/api/v1/audit", &[]).await.status, StatusCode::FORBIDDEN);

    let held = Report { wait_s: 50, desired_etag: reply.desired.etag.clone(), ..agent.report() };
    let (waiting, ()) = tokio::join!(agent.send(&server, &held), async {
        until(&server, |status| status["held_reports"] == 1).await;
        let orders = json!({ "role": "lab", "name": "found" });
        let wrong = server.order("POST", &format!("machines/{}/approve", machine_id(9)), json!({ "role": "db" })).await;
        assert_eq!(wrong.status, StatusCode::UNPROCESSABLE_ENTITY);
        assert!(wrong.json()["error"].as_str().unwrap().contains("known are: lab"));
        let answer = server.order("POST", &format!("machines/{}/approve", machine_id(9)), orders).await;
        assert_eq!(answer.json()["name"], "found", "{}", answer.text());
    });
    let (envelope, ..) = assigned(&waiting);
    let (assignment, _) = site.signed_site().verify_director::<Assignment>(envelope.as_bytes()).unwrap();
    assert_eq!(assignment.machine.key, agent.key_id());
    until(&server, |status| status["held_reports"] == 0).await;
}

#[tokio::test]
async fn machines_reimage_one_at_a_time_and_a_held_one_is_told_when_its_turn_comes() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agents: Vec<Agent> = (1..=2).map(|n| Agent::new(n, &site.manifest(1))).collect();
    for agent in &mut agents {
        let report = agent.healthy();
        agent.send(&server, &report).await;
    }
    let two = site.publish(2);
    until(&server, |status| status["releases"] == 2).await;
    for agent in &agents {
        server.assign(&format!("rack-{}", agent.n), 2).await;
    }
    let sequence = |view: &kiln_server::view::MachineView| view.assigned.as_ref().unwrap().sequence;
    let first = sequence(&server.machine("rack-1").await);
    let report = agents[0].ready(2, first);
    assert_eq!(*assigned(&agents[0].send(&server, &report).await).2, Grant::Go);
    assert_eq!(server.machine("rack-1").await.state, "draining");

    let second = sequence(&server.machine("rack-2").await);
    let report = agents[1].ready(2, second);
    let reply = agents[1].send(&server, &report).await;
    let Grant::Hold { reason, .. } = assigned(&reply).2 else { panic!("must hold") };
    assert!(reason.contains("rack-1 is draining"), "{reason}");

    let held = Report { wait_s: 50, desired_etag: reply.desired.etag.clone(), ..agents[1].ready(2, second) };
    let waiting = agents[1].clone();
    let (told, ()) = tokio::join!(waiting.send(&server, &held), async {
        until(&server, |status| status["held_reports"] == 1).await;
        let mut going = agents[0].healthy();
        going.stages = vec![StageRecord { stage: Stage::Going, state: StageState::Started, at_ms: 5 }];
        agents[0].send(&server, &going).await;
        assert_eq!(server.machine("rack-1").await.state, "reimaging");
        agents[0].restart(&two);
        let report = agents[0].healthy();
        agents[0].send(&server, &report).await;
        let view = server.machine("rack-1").await;
        assert_eq!((view.state.as_str(), view.release), ("healthy", Some(2)));
        assert_eq!(view.boots.last().unwrap().via, Via::Kexec);
    });
    assert!(matches!(assigned(&told).2, Grant::Go | Grant::Hold { .. }));
    // It may have been woken by an earlier step of the other; asked again it may go.
    let report = agents[1].ready(2, second);
    assert_eq!(*assigned(&agents[1].send(&server, &report).await).2, Grant::Go);
}

#[tokio::test]
async fn a_killed_server_has_lost_nothing_it_answered() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    site.publish(2);
    until(&server, |status| status["releases"] == 2).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    server.assign("rack-1", 1).await;
    server.assign("rack-1", 2).await;
    let report = agent.healthy();
    let envelope = assigned(&agent.send(&server, &report).await).0.to_owned();
    let before = server.machine("rack-1").await;
    server.signal("-KILL");
    drop(server);

    let server = Server::start(&site).await;
    let after = server.machine("rack-1").await;
    assert_eq!((&after.assigned, &after.state, &after.boots), (&before.assigned, &before.state, &before.boots));
    let report = agent.healthy();
    assert_eq!(assigned(&agent.send(&server, &report).await).0, envelope);
    let audit = server.order("GET", "audit", json!({})).await.json();
    let what: Vec<&str> = audit.as_array().unwrap().iter().map(|l| l["what"].as_str().unwrap()).collect();
    assert_eq!(what[..2], ["assigned minimal/2 via kexec", "assigned minimal/1 via kexec"]);
    let uid = std::fs::metadata(site.path()).map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap();
    assert_eq!(audit[0]["actor"], format!("uid {uid}"));
}

#[tokio::test]
async fn only_a_proven_ed25519_identity_gets_in() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let body = serde_json::to_vec(&agent.report()).unwrap();
    assert!(server.post(server.tls(None), body.clone()).await.is_err(), "no certificate");

    let ecdsa = rcgen::generate_simple_self_signed(vec!["kiln-machine".into()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(ecdsa.signing_key.serialize_der()));
    let identity = (ecdsa.cert.der().clone(), key);
    assert!(server.post(server.tls(Some(identity)), body.clone()).await.is_err(), "another kind of key");

    let mut damaged = agent.identity();
    let mut der = damaged.0.to_vec();
    *der.last_mut().unwrap() ^= 1;
    damaged.0 = der.into();
    let config = std::panic::catch_unwind(|| server.tls(Some(damaged)));
    if let Ok(config) = config {
        assert!(server.post(config, body.clone()).await.is_err(), "its own signature does not hold");
    }

    let another = kiln_release::Signer::from_seed(&[7; 32]).pkcs8_der();
    let resolver = std::sync::Arc::new(rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(
        vec![agent.identity().0],
        rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(another)).unwrap(),
    )));
    let mut config = server.tls(None);
    config.client_auth_cert_resolver = resolver;
    assert!(server.post(config, body.clone()).await.is_err(), "the certificate of another, without its key");

    let answer = server.post(server.tls(Some(agent.identity())), vec![b' '; 300 << 10]).await;
    assert!(answer.is_err() || answer.unwrap().status == StatusCode::PAYLOAD_TOO_LARGE);
    let answer = server.post(server.tls(Some(agent.identity())), b"{}".to_vec()).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let answer = server.post(server.tls(Some(agent.identity())), body).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn another_key_under_one_id_gets_nothing_until_a_person_looks() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let mut other = Agent { signer: std::sync::Arc::new(kiln_release::Signer::from_seed(&[77; 32])), ..agent.clone() };
    other.boot = 50;
    let report = other.report();
    assert!(waits(&other.send(&server, &report).await).contains("kiln machine clear rack-1"));
    assert!(server.machine("rack-1").await.last_words.contains("another identity key"));
    // The machine itself is not disturbed: anybody can make up a key and a UUID.
    let report = agent.healthy();
    assigned(&agent.send(&server, &report).await);
    assert_eq!(server.machine("rack-1").await.state, "healthy");
    // A clear makes it nobody's, though it spoke last and nothing else holds the machine; the command says how it is taken.
    let report = other.healthy();
    let told = waits(&other.send(&server, &report).await).to_owned();
    let dir = site.path().to_str().unwrap();
    let (ok, out, error) = site.kiln(&["machine", "clear", "rack-1", "--site", dir]);
    let (taken, before) = (other.key_id(), agent.key_id());
    let shown = &taken.as_str()[..16];
    let how = format!("`kiln machine clear rack-1 --key {shown}`");
    assert!(ok && out.contains(&how) && told.contains(&how), "{out}{error}{told}");
    assert_eq!(server.order("POST", "machines/rack-1/clear", json!({})).await.status, StatusCode::OK);
    let report = other.healthy();
    waits(&other.send(&server, &report).await);
    let view = server.machine("rack-1").await;
    assert_eq!((&view.key, &view.other_keys), (&Some(agent.key_id()), &vec![other.key_id()]));
    assert!(view.other_keys_note.is_some_and(|note| note.contains(&how)));
    // A person names it, by what its console shows.
    for (digits, status, said) in [
        (&shown[..15], StatusCode::UNPROCESSABLE_ENTITY, "at least 16 hex digits"),
        ("0000000000000000", StatusCode::CONFLICT, shown),
        (&before.as_str()[..16], StatusCode::CONFLICT, "already"),
    ] {
        let refused = server.order("POST", "machines/rack-1/clear", json!({ "key": digits })).await;
        assert!(refused.status == status && refused.text().contains(said), "{} {}", refused.status, refused.text());
    }
    let (ok, out, error) = site.kiln(&["machine", "clear", "rack-1", "--key", shown, "--site", dir]);
    assert!(ok && out.contains(&format!("its identity key is {taken} from now on")), "{out}{error}");
    let report = other.healthy();
    assigned(&other.send(&server, &report).await);
    let audit = server.audit().await;
    let said = format!("cleared; its identity key is {taken} from now on, it was {before}");
    assert!(audit.iter().any(|r| r.machine == "rack-1" && r.what == said), "{audit:?}");
    let report = agent.healthy();
    assert!(waits(&agent.send(&server, &report).await).contains("kiln machine clear rack-1"));
}

#[tokio::test]
async fn a_key_in_the_list_keeps_everybody_else_out_from_the_first_report_on() {
    let site = TestSite::new();
    let mut agent = Agent::new(1, &site.manifest(1));
    let mut other = Agent { signer: std::sync::Arc::new(kiln_release::Signer::from_seed(&[77; 32])), ..agent.clone() };
    // Without a key in the list the first that comes has the id.
    let server = Server::start(&site).await;
    let report = other.healthy();
    assigned(&other.send(&server, &report).await);
    let shown = |what: &str| {
        let kiln = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["machine", "show", "rack-1", "--site"])
            .arg(site.path())
            .output()
            .unwrap();
        let text = String::from_utf8(kiln.stdout).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(what)).map(|rest| rest.trim().to_owned());
        line.unwrap_or_else(|| panic!("no {what} in {text}"))
    };
    assert_eq!(shown("key "), other.key_id().as_str());
    drop(server);

    let file = site.path().join("kiln.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let line = "name = \"rack-1\"\n";
    let text = text.replace(line, &format!("{line}key = \"{}\"\n", agent.key_id()));
    std::fs::write(&file, text).unwrap();
    let server = Server::start(&site).await;
    let report = other.healthy();
    assert!(waits(&other.send(&server, &report).await).contains("kiln.toml names the identity key of rack-1"));
    assert_eq!((shown("key "), shown("other key ")), ("-".into(), other.key_id().to_string()));
    assert_eq!(server.order("POST", "machines/rack-1/clear", json!({})).await.status, StatusCode::OK);
    let report = other.healthy();
    waits(&other.send(&server, &report).await);
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    let (assignment, _) = site.signed_site().verify_director::<Assignment>(assigned(&reply).0.as_bytes()).unwrap();
    assert_eq!((assignment.machine.key, shown("key ")), (agent.key_id(), agent.key_id().to_string()));
}
