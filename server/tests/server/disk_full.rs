//! A disk that is full under a running server: what was written is kept, what was not done is said, nothing is half, and with
//! room it goes on by itself.

use crate::common::*;
use crate::namespace::{inside, tmpfs};
use hyper::StatusCode;
use jiff::Timestamp;
use kiln_images::init_lab;
use kiln_protocol::Assignment;
use kiln_server::audit::Record;
use kiln_server::view::SecretView;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Takes all the room there is.
fn fill(site: &Path) -> PathBuf {
    let path = site.join("filler");
    let mut file = fs::File::create(&path).unwrap();
    for size in [1 << 20, 4096, 1] {
        let piece = vec![1_u8; size];
        while file.write_all(&piece).is_ok() {}
    }
    path
}

async fn set(server: &Server, value: &str) -> Answer {
    server.order("PUT", "secrets/db?role=lab", json!(value)).await
}

/// The secret's version, as the running server knows it; and how often the audit log has each version set.
async fn known(server: &Server) -> (Option<u64>, Vec<u64>) {
    let list = server.order("GET", "secrets", Value::Null).await;
    let list: Vec<SecretView> = serde_json::from_slice(&list.body).unwrap();
    let version = |r: &Record| r.what.strip_prefix("set the secret db of role lab: version ")?.parse().ok();
    let told = server.audit().await.iter().filter_map(version).collect();
    (list.first().map(|view| view.version), told)
}

#[tokio::test]
async fn a_full_disk_loses_nothing_that_was_written_and_does_nothing_by_halves() {
    if !inside("disk_full::a_full_disk_loses_nothing_that_was_written_and_does_nothing_by_halves") {
        return;
    }
    // Its log is on the same disk.
    let site = TestSite::made_by(|dir| {
        tmpfs(dir, "size=24m,nr_inodes=4000");
        init_lab(dir, "test", Timestamp::now()).unwrap()
    });
    site.publish(1);
    let server = Server::start(&site).await;

    // Not even the key that seals secrets fits.
    let filler = fill(site.path());
    let refused = set(&server, "too early").await;
    assert_eq!(refused.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", refused.text());
    assert!(refused.text().contains("secrets.key: No space left on device"), "{}", refused.text());
    let left = |name: &str| site.path().join("online").join(name).exists();
    assert!(!left("secrets.key") && !left("secrets.new"), "nor half of it");
    fs::remove_file(&filler).unwrap();
    let first: SecretView = serde_json::from_slice(&set(&server, "first").await.body).unwrap();
    let mut versions = vec![first.version];

    // What the database has room for still goes in.
    let filler = fill(site.path());
    let refused = loop {
        assert!(versions.len() < 500, "it always fits");
        let answer = set(&server, &format!("value {}", "x".repeat(2_000))).await;
        if answer.status != StatusCode::OK {
            break answer;
        }
        versions.push(serde_json::from_slice::<SecretView>(&answer.body).unwrap().version);
    };
    for answer in [refused, set(&server, "again").await, set(&server, "and again").await] {
        assert_eq!(answer.status, StatusCode::INSUFFICIENT_STORAGE, "{}", answer.text());
        assert!(
            answer.text().contains("the disk of the database is full: nothing of this was done"),
            "{}",
            answer.text()
        );
    }
    let removal = server.order("DELETE", "secrets/db?role=lab", Value::Null).await;
    assert_eq!(removal.status, StatusCode::INSUFFICIENT_STORAGE, "{}", removal.text());
    // The last one that was stored is what machines would get, and each that was is in the audit log, once.
    assert_eq!(known(&server).await, (versions.last().copied(), versions.clone()));

    // With room it goes on, and what it says is stored is stored.
    fs::remove_file(&filler).unwrap();
    let after: SecretView = serde_json::from_slice(&set(&server, "after").await.body).unwrap();
    assert!(after.version > *versions.last().unwrap());
    versions.push(after.version);
    assert_eq!(known(&server).await, (Some(after.version), versions.clone()));
    server.signal("-KILL");
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(known(&server).await, (Some(after.version), versions));
    let (whole, out, error) = site.kiln(&["audit", "verify", "--site", site.path().to_str().unwrap()]);
    assert!(whole, "{out}{error}");
}

/// Sequence of what rack-1 is assigned, as the running server knows it.
async fn sequence(server: &Server) -> u64 {
    server.machine("rack-1").await.assigned.unwrap().sequence
}

#[tokio::test]
async fn what_a_full_disk_did_not_take_no_machine_is_given() {
    if !inside("disk_full::what_a_full_disk_did_not_take_no_machine_is_given") {
        return;
    }
    let site = TestSite::made_by(|dir| {
        tmpfs(dir, "size=24m,nr_inodes=4000");
        init_lab(dir, "test", Timestamp::now()).unwrap()
    });
    site.publish(1);
    site.publish(2);
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    assigned(&agent.send(&server, &report).await);

    let filler = fill(site.path());
    let mut last = sequence(&server).await;
    let refused = loop {
        assert!(last < 500, "it always fits");
        let answer = server.try_assign("rack-1", 1 + last % 2).await;
        if answer.status != StatusCode::OK {
            break answer;
        }
        last += 1;
    };
    assert_eq!(refused.status, StatusCode::INSUFFICIENT_STORAGE, "{}", refused.text());
    assert_eq!(sequence(&server).await, last, "memory is as the database is");
    // What the machine is given is what was stored; or nothing, as its envelope has no room either.
    let report = agent.healthy();
    let body = serde_json::to_vec(&report).unwrap();
    let answer = server.post(server.tls(Some(agent.identity())), body).await.unwrap();
    assert!([StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE].contains(&answer.status), "{}", answer.text());
    assert_eq!(sequence(&server).await, last);

    fs::remove_file(&filler).unwrap();
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    let (assignment, _) = site.signed_site().verify_director::<Assignment>(assigned(&reply).0.as_bytes()).unwrap();
    assert_eq!(assignment.sequence, last);
    server.assign("rack-1", 1 + last % 2).await;
    assert_eq!(sequence(&server).await, last + 1);
    server.signal("-KILL");
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(sequence(&server).await, last + 1);
}
