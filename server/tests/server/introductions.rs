//! The short approval code in a running `kiln serve`: both sides have the same, and a machine in the middle does not.

use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::*;
use kiln_release::certificate::{certificate_spki, spki_key_id};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

async fn step(server: &Server, agent: &Agent, step: &Introduction) -> Answer {
    let body = serde_json::to_vec(step).unwrap();
    server.post_to(INTRODUCTION_PATH, server.tls(Some(agent.identity())), body).await.unwrap()
}

fn nonce(n: u8) -> Nonce {
    format!("{n:02x}").repeat(32).parse().unwrap()
}

/// Introduces `agent` with a nonce; gives the server's.
async fn introduce(server: &Server, agent: &Agent, mine: &Nonce) -> Nonce {
    let machine = machine_id(agent.n);
    let commit = Introduction::Commit { machine: machine.clone(), commitment: commitment(mine) };
    let answer = step(server, agent, &commit).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let reply: IntroductionReply = serde_json::from_slice(&answer.body).unwrap();
    let answer = step(server, agent, &Introduction::Reveal { machine, nonce: mine.clone() }).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    reply.nonce
}

fn server_key(site: &TestSite) -> KeyId {
    let certificate = CertificateDer::from_pem_slice(&site.online("agent-server.pem")).unwrap();
    spki_key_id(certificate_spki(&certificate).unwrap()).parse().unwrap()
}

async fn approve(server: &Server, code: &str) -> Answer {
    let body = json!({ "role": "lab", "name": "found", "code": code });
    server.order("POST", &format!("machines/{}/approve", machine_id(9)), body).await
}

#[tokio::test]
async fn a_person_compares_one_code_and_another_is_refused() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(9, &site.manifest(1));
    let commit = Introduction::Commit { machine: machine_id(9), commitment: commitment(&nonce(1)) };
    assert_eq!(step(&server, &agent, &commit).await.status, StatusCode::CONFLICT, "after the first report");
    let report = agent.report();
    let about = agent.send(&server, &report).await.about.unwrap();
    assert!(about.introduce && !about.approved);
    let page = about.page.unwrap();
    assert_eq!(page, format!("http://{}/m/{}", server.http, machine_id(9)));
    let html = server.http("GET", page.split_once(&server.http.to_string()).unwrap().1, &[]).await;
    assert_eq!((html.status, html.header("content-type")), (StatusCode::OK, "text/html; charset=utf-8"));
    assert_eq!(approve(&server, "ABCD-EFGH").await.status, StatusCode::CONFLICT, "there is no code yet");

    let theirs = introduce(&server, &agent, &nonce(1)).await;
    let code = approval_code(&agent.key_id(), &server_key(&site), &nonce(1), &theirs);
    assert_eq!(server.machine(machine_id(9).as_str()).await.code, Some(code.clone()));
    let report = agent.report();
    assert!(!agent.send(&server, &report).await.about.unwrap().introduce);
    let again = Introduction::Reveal { machine: machine_id(9), nonce: nonce(1) };
    assert_eq!(step(&server, &agent, &again).await.status, StatusCode::CONFLICT, "each commitment is used once");

    let wrong = approve(&server, "ABCD-EFGH").await;
    assert_eq!(wrong.status, StatusCode::CONFLICT);
    assert!(wrong.text().contains("somebody stands between"), "{}", wrong.text());
    assert_eq!(approve(&server, "ABC1-EFGH").await.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(server.machine(machine_id(9).as_str()).await.state, "discovered");
    let typed = code.to_string().to_lowercase().replace('-', "");
    let right = approve(&server, &typed).await;
    assert_eq!(right.status, StatusCode::OK, "{}", right.text());
    let report = agent.report();
    let about = agent.send(&server, &report).await.about.unwrap();
    assert!(about.approved && !about.introduce && about.page.unwrap().ends_with("/m/found"));
    assert_eq!(server.machine("found").await.code, None);
}

#[tokio::test]
async fn codes_cannot_be_guessed() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(9, &site.manifest(1));
    let report = agent.report();
    agent.send(&server, &report).await;
    introduce(&server, &agent, &nonce(1)).await;
    let code = server.machine(machine_id(9).as_str()).await.code.unwrap().to_string();
    for n in 0..5 {
        assert_eq!(
            approve(&server, &format!("AAAA-AA{}A", ['B', 'C', 'D', 'E', 'F'][n])).await.status,
            StatusCode::CONFLICT
        );
    }
    let locked = approve(&server, &code).await;
    assert_eq!(locked.status, StatusCode::TOO_MANY_REQUESTS, "{}", locked.text());
    assert_eq!(server.machine(machine_id(9).as_str()).await.state, "discovered");

    // Tries are few: of two introductions within two seconds the second is refused.
    let commit = Introduction::Commit { machine: machine_id(9), commitment: commitment(&nonce(1)) };
    let begun = Instant::now();
    loop {
        let pair = Instant::now();
        let first = step(&server, &agent, &commit).await.status;
        let second = step(&server, &agent, &commit).await.status;
        if (first, second) == (StatusCode::OK, StatusCode::TOO_MANY_REQUESTS) {
            break;
        }
        // The first came too early itself, or the host stopped between them.
        let apart = first != StatusCode::OK || pair.elapsed() >= Duration::from_millis(1_900);
        assert!(apart && begun.elapsed() < PATIENCE, "{first}, {second}");
    }
}

#[tokio::test]
async fn a_machine_in_the_middle_gives_two_codes() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    // The machine, and who stands between: toward the server it has a key of its own, and the machine's id; toward the
    // machine it is a server with that key. It hands every word on as it came.
    let machine = Agent::new(9, &site.manifest(1));
    let mut middle = Agent { signer: Arc::new(kiln_release::Signer::from_seed(&[77; 32])), ..machine.clone() };
    let report = middle.report();
    middle.send(&server, &report).await;
    let theirs = introduce(&server, &middle, &nonce(1)).await;
    let on_the_screen = approval_code(&machine.key_id(), &middle.key_id(), &nonce(1), &theirs);
    let at_the_server = server.machine(machine_id(9).as_str()).await.code.unwrap();
    assert_ne!(on_the_screen, at_the_server);
    assert_eq!(approve(&server, &on_the_screen.to_string()).await.status, StatusCode::CONFLICT);
    // A nonce that suits it better than the one it committed itself to is not taken.
    let commit = Introduction::Commit { machine: machine_id(9), commitment: commitment(&nonce(1)) };
    let begun = Instant::now();
    while step(&server, &middle, &commit).await.status == StatusCode::TOO_MANY_REQUESTS {
        assert!(begun.elapsed() < PATIENCE, "it may try again after a while");
    }
    let reveal = Introduction::Reveal { machine: machine_id(9), nonce: nonce(2) };
    assert_eq!(step(&server, &middle, &reveal).await.status, StatusCode::CONFLICT);
}
