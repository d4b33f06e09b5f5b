//! The audit log of a running server: whole, altered in the database, cut off, written anew.

use crate::common::*;
use hyper::StatusCode;
use kiln_server::audit::Record;
use serde_json::json;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use std::str::FromStr;
use tokio::net::TcpStream;

async fn database(site: &TestSite, statement: &'static str) {
    sqlx::any::install_default_drivers();
    let options = AnyConnectOptions::from_str(&format!("sqlite://{}", site.site.database().display())).unwrap();
    let pool = AnyPoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    let done = sqlx::query(statement).execute(&pool).await.unwrap();
    assert!(done.rows_affected() > 0, "{statement}");
    pool.close().await;
}

#[tokio::test]
async fn whoever_alters_the_log_is_found_out() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    for _ in 0..4 {
        server.assign("rack-1", 1).await;
    }
    let ann = server.token("ann", "technician").await;
    server.with(&ann, "POST", "machines/rack-1/retire", json!({})).await;
    let dir = site.path().to_str().unwrap().to_owned();
    let at = ["--site", &dir];
    let file = |name: &str| site.path().join(name).to_str().unwrap().to_owned();
    let run = |arguments: &[&str]| site.kiln(arguments);

    // Whole, on the server, as an export, and against a head that the director signed.
    let (ok, head, error) = run(&[&["audit", "head"][..], &at].concat());
    assert!(ok, "{error}");
    std::fs::write(file("head.json"), head).unwrap();
    let (ok, out, error) = run(&[&["audit", "verify"][..], &at].concat());
    assert!(ok && out.contains("7 records follow each other") && out.contains("not shown"), "{out}{error}");
    let (ok, _, error) = run(&[&["audit", "export", "--out", &file("export")][..], &at].concat());
    assert!(ok && error.contains("7 records"), "{error}");
    let check = ["audit", "verify", "--file", &file("export"), "--head", &file("head.json")];
    let (ok, out, error) = run(&[&check[..], &at].concat());
    assert!(ok && out.contains("agree with 1 heads"), "{out}{error}");
    let text = std::fs::read_to_string(file("export")).unwrap();
    let records: Vec<Record> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let refused = records.iter().find(|r| r.actor == "token ann").unwrap();
    assert!(refused.result.contains("needs operator") && refused.origin == "127.0.0.1", "{refused:?}");
    let (_, list, _) = run(&[&["audit", "list"][..], &at].concat());
    assert!(list.contains("made token ann") && list.contains("assigned minimal/1 via kexec"), "{list}");
    let log = std::fs::read_to_string(file("log")).unwrap();
    assert!(log.contains("audit log: head 0"), "a head is in the log from the start on: {log}");

    // A forged head is no head.
    let forged = std::fs::read_to_string(file("head.json")).unwrap().replace("\"number\":7", "\"number\":6");
    std::fs::write(file("forged.json"), forged).unwrap();
    let (ok, _, error) = run(&[&["audit", "verify", "--head", &file("forged.json")][..], &at].concat());
    assert!(!ok && error.contains("forged.json"), "{error}");

    drop(server);
    let verify = async |expected: &str| {
        let server = Server::start(&site).await;
        let (ok, out, error) = site.kiln(&[&["audit", "verify", "--head", &file("head.json")][..], &at].concat());
        assert!(!ok && error.contains(expected), "{out}{error}");
        drop(server);
    };
    database(&site, "UPDATE audit SET actor = 'uid 1000' WHERE number = 3").await;
    verify("record 3 was changed").await;
    let uid = records[2].actor.clone();
    database(&site, Box::leak(format!("UPDATE audit SET actor = '{uid}' WHERE number = 3").into_boxed_str())).await;
    database(&site, "DELETE FROM audit WHERE number > 5").await;
    verify("its end was cut off").await;
    // What is written behind the cut follows, and the head finds it.
    let server = Server::start(&site).await;
    for _ in 0..3 {
        server.assign("rack-1", 1).await;
    }
    drop(server);
    verify("the log was rewritten").await;
    database(&site, "DELETE FROM audit WHERE number = 2").await;
    verify("record 2 is missing").await;
}

/// A viewer's token, say, in a loop.
#[tokio::test]
async fn nobody_fills_the_log_with_what_it_is_refused() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let ann = server.token("ann", "viewer").await;
    let ben = server.token("ben", "operator").await;
    for n in 0..150 {
        let refused = server.with(&ann, "POST", &format!("machines/rack-{n}/retire"), json!({})).await;
        assert_eq!(refused.status, StatusCode::FORBIDDEN);
    }
    // What fails further in counts likewise; and another's is written.
    for n in 0..30 {
        server.with(&ben, "POST", &format!("machines/nothing-{n}/clear"), json!({})).await;
    }
    server.signal("-TERM");
    let mut server = server;
    assert!(server.child.wait().unwrap().success());
    let server = Server::start(&site).await;
    let audit = server.audit().await;
    for (who, calls) in [("token ann", 150), ("token ben", 30)] {
        let lines: Vec<&Record> = audit.iter().filter(|r| r.actor == who).collect();
        let counted = |r: &&Record| r.what.strip_prefix("and ")?.split(' ').next()?.parse::<usize>().ok();
        let more: usize = lines.iter().filter_map(counted).sum();
        let single = lines.iter().filter(|r| counted(r).is_none()).count();
        // Two minutes at most, if one ended while this ran.
        assert!(single + more == calls && single <= 40, "{who}: {single} + {more}");
        assert!(lines.iter().all(|r| r.result != "done"), "{lines:?}");
    }
    let dir = site.path().to_str().unwrap();
    let (ok, out, error) = site.kiln(&["audit", "verify", "--site", dir]);
    assert!(ok, "{out}{error}");
}

/// What was asked for and not kept, and each word of a second person that did not count: who, what, and why.
#[tokio::test]
async fn what_four_eyes_refuse_is_in_the_log() {
    let site = TestSite::new();
    site.configure("[access]\nfour_eyes = [\"assign\"]");
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let ann = server.token("ann", "operator").await;
    let ben = server.token("ben", "operator").await;
    let tec = server.token("tec", "technician").await;
    let body = json!({ "image": "minimal", "release": 1, "via": "cold" });

    // Nothing waits for another: the machine is not known, or the call cannot be read.
    let unknown = server.with(&ann, "PUT", "machines/rack-9/assignment", body.clone()).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND, "{}", unknown.text());
    let stream = TcpStream::connect(server.http).await.unwrap();
    let bearer = format!("Bearer {ann}");
    let path = "/api/v1/machines/rack-1/assignment";
    let unreadable = call(stream, "PUT", path, &[("authorization", &bearer)], vec![0xff; 8]).await;
    assert_eq!(unreadable.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", unreadable.text());

    // One waits, and these do not move it.
    let ask = async |server: &Server| {
        let asked = server.with(&ann, "PUT", "machines/rack-1/assignment", body.clone()).await;
        assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.text());
        asked.json()["pending"]["id"].as_str().unwrap().to_owned()
    };
    let answers = async |server: &Server, token: &str, path: &str, status: StatusCode| {
        let answer = server.with(token, "POST", path, json!({})).await;
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
    };
    let first = ask(&server).await;
    let confirm = format!("pending/{first}/confirm");
    answers(&server, &ann, &confirm, StatusCode::CONFLICT).await;
    answers(&server, &tec, &confirm, StatusCode::FORBIDDEN).await;
    answers(&server, &ben, "pending/0a0b0c0d/confirm", StatusCode::NOT_FOUND).await;
    answers(&server, &ben, &format!("pending/{first}/refuse"), StatusCode::OK).await;
    answers(&server, &ben, &confirm, StatusCode::CONFLICT).await;
    // And one whose time is over.
    let second = ask(&server).await;
    let mut server = server;
    server.signal("-TERM");
    assert!(server.child.wait().unwrap().success());
    database(&site, "UPDATE notes SET value = json_set(value, '$.proposal.deadline', 1) WHERE name LIKE 'pending/%'")
        .await;
    let server = Server::start(&site).await;
    answers(&server, &ben, &format!("pending/{second}/confirm"), StatusCode::CONFLICT).await;

    // What is committed behind them shows that they are.
    server.token("dan", "viewer").await;
    let audit = server.audit().await;
    let about = format!(" (token ann asked for assign rack-1: {body})");
    let call = |id: &str, word: &str| format!("POST /api/v1/pending/{id}/{word}");
    let expected = [
        ("token ann", "PUT /api/v1/machines/rack-9/assignment".to_owned(), "rack-9"),
        ("token ann", format!("PUT {path}"), "and is text"),
        ("token ann", format!("{}{about}", call(&first, "confirm")), "another person confirms it"),
        ("token tec", format!("{}{about}", call(&first, "confirm")), "this call needs operator"),
        ("token ben", call("0a0b0c0d", "confirm"), "nothing waits"),
        ("token ben", format!("{}{about}", call(&first, "confirm")), "it was refused"),
        ("token ben", format!("{}{about}", call(&second, "confirm")), "nobody confirmed it in time"),
    ];
    for (who, what, why) in &expected {
        let lines = audit.iter().filter(|r| r.actor == *who && r.what == *what && r.result.contains(*why));
        assert_eq!(lines.count(), 1, "{who}, {what}, {why}: {audit:#?}");
    }
    // What was kept, and what was done, is no failure.
    let failures = audit.iter().filter(|r| r.actor.starts_with("token ") && r.result != "done");
    assert_eq!(failures.count(), expected.len(), "{audit:#?}");
}
