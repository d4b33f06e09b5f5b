//! `kiln release prune` beside a running server: what its machines need stays.

use crate::common::*;
use std::process::Command;

fn prune(site: &TestSite, more: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["release", "prune", "minimal", "--site"])
        .arg(site.path())
        .args(more)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

async fn published(server: &Server) -> Vec<(u64, u64)> {
    let releases = server.http("GET", "/api/v1/releases", &[]).await.json();
    let number = |release: &serde_json::Value, key: &str| release[key].as_u64().unwrap();
    releases.as_array().unwrap().iter().map(|r| (number(r, "release"), number(r, "needed_by"))).collect()
}

#[tokio::test]
async fn what_machines_run_shall_run_or_would_fall_back_to_stays() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    // Machine 1 proves release 1; then it shall run 3, and would fall back to 1.
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    for release in 2..=5 {
        site.publish(release);
    }
    server.assign("rack-1", 3).await;
    let (done, text) = prune(&site, &["--keep", "1", "--dry-run"]);
    assert!(done && text.starts_with("would be taken out: minimal/2, minimal/4\n"), "{text}");
    let (done, text) = prune(&site, &["--keep", "1", "--grace", "0s"]);
    assert!(done && text.starts_with("no longer published: minimal/2, minimal/4\n"), "{text}");
    assert!(text.contains("stay because machines need them: minimal/1, minimal/3\n"), "{text}");
    // The server looked at the repository last up to two seconds ago: an order of what is just pruned makes it look anew.
    let refused = server.try_assign("rack-2", 4).await;
    assert_eq!(refused.status, hyper::StatusCode::NOT_FOUND, "{}", refused.text());
    assert!(refused.text().contains("minimal/4"), "{}", refused.text());
    assert_eq!(published(&server).await, [(1, 1), (3, 1), (5, 0)]);
    let gone = format!("/a/{}", site.manifest(2).root.sha256);
    assert_eq!(server.http("GET", &gone, &[]).await.status, hyper::StatusCode::NOT_FOUND);
    let there = format!("/a/{}", site.manifest(3).root.sha256);
    assert_eq!(server.http("HEAD", &there, &[]).await.status, hyper::StatusCode::OK);
    // Another server that can be asked does as well; one that cannot be is no answer.
    let url = format!("http://{}", server.http);
    let (done, text) = prune(&site, &["--keep", "1", "--server", &url]);
    assert!(!done && text.contains("needs the access role operator"), "what goes is withheld there: {text}");
    let file = site.path().join("token");
    std::fs::write(&file, server.token("ann", "operator").await).unwrap();
    let there = ["--server", &url, "--token-file", file.to_str().unwrap()];
    let (done, text) = prune(&site, &[&["--keep", "1"][..], &there].concat());
    assert!(done && text.starts_with("no release of minimal is to be taken out\n"), "{text}");
    let (done, text) = prune(&site, &["--keep", "1", "--server", "http://127.0.0.1:1"]);
    assert!(!done && text.contains("http://127.0.0.1:1"), "{text}");

    // What another site's machines need says nothing.
    let other = TestSite::new();
    let stranger = Server::start(&other).await;
    let (done, text) = prune(&site, &["--keep", "1", "--server", &format!("http://{}", stranger.http)]);
    assert!(!done && text.contains("serves another site"), "{text}");

    server.signal("-TERM");
    let mut server = server;
    assert!(server.child.wait().unwrap().success());
    let (done, text) = prune(&site, &["--keep", "1"]);
    assert!(!done && text.contains("--without-server"), "{text}");
    assert_eq!(kiln_images::Repository::newest(&site.site, jiff::Timestamp::now()).unwrap().releases.len(), 3);
    let (done, text) = prune(&site, &["--keep", "1", "--without-server"]);
    assert!(done && text.starts_with("no longer published: minimal/1, minimal/3\n"), "{text}");
    assert!(text.contains("artifacts of 2 releases stay"), "{text}");
}

#[tokio::test]
async fn a_prune_that_needs_two_goes_on_once_another_has_confirmed_it() {
    let site = TestSite::new();
    site.configure("[access]\nfour_eyes = [\"prune\"]");
    (2..=3).for_each(|release| drop(site.publish(release)));
    let server = Server::start(&site).await;
    let (ann, ben) = (server.token("ann", "operator").await, server.token("ben", "operator").await);
    let file = site.path().join("token");
    std::fs::write(&file, ann).unwrap();
    let url = format!("http://{}", server.http);
    let there = ["--keep", "1", "--grace", "0s", "--server", &url, "--token-file", file.to_str().unwrap()];
    let (done, text) = prune(&site, &there);
    assert!(!done && text.contains("another person confirms it"), "{text}");
    assert_eq!(published(&server).await.len(), 3);
    let pending = server.with(&ben, "GET", "pending", serde_json::Value::Null).await.json();
    let id = pending[0]["id"].as_str().unwrap().to_owned();
    let confirmed = server.with(&ben, "POST", &format!("pending/{id}/confirm"), serde_json::json!({})).await;
    assert_eq!(confirmed.status, hyper::StatusCode::OK, "{}", confirmed.text());
    let (done, text) = prune(&site, &there);
    assert!(done && text.starts_with("no longer published: minimal/1, minimal/2\n"), "{text}");
}
