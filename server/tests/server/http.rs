//! What a running `kiln serve` gives to anybody: artifacts, scripts, the page, events; and how it starts and ends.

use crate::common::*;
use hyper::StatusCode;
use std::process::Command;
use std::time::Instant;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

#[tokio::test]
async fn artifacts_have_lengths_ranges_and_tags() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let manifest = site.manifest(1);
    let path = format!("/b/{}/kiln.efi", manifest.uki.sha256);
    let whole = server.http("GET", &path, &[]).await;
    assert_eq!((whole.status, whole.text().as_str()), (StatusCode::OK, "uki of minimal/1"));
    assert_eq!(whole.header("content-type"), "application/efi");
    assert_eq!((whole.header("content-length"), whole.header("transfer-encoding")), ("16", ""));
    let head = server.http("HEAD", &path, &[]).await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (StatusCode::OK, "16", 0));
    let tag = head.header("etag").to_owned();
    assert_eq!(tag, format!("\"{}\"", manifest.uki.sha256));
    assert_eq!(server.http("GET", &path, &[("if-none-match", &tag)]).await.status, StatusCode::NOT_MODIFIED);

    let part = server.http("GET", &path, &[("range", "bytes=4-5")]).await;
    assert_eq!((part.status, part.text().as_str()), (StatusCode::PARTIAL_CONTENT, "of"));
    assert_eq!(part.header("content-range"), "bytes 4-5/16");
    assert_eq!(server.http("GET", &path, &[("range", "bytes=-1")]).await.text(), "1");
    let other = [("range", "bytes=4-5"), ("if-range", "\"other\"")];
    assert_eq!(server.http("GET", &path, &other).await.status, StatusCode::OK);
    let beyond = server.http("GET", &path, &[("range", "bytes=16-")]).await;
    assert_eq!((beyond.status, beyond.header("content-range")), (StatusCode::RANGE_NOT_SATISFIABLE, "bytes */16"));

    // Larger than one read, so that pieces are put together right.
    let big: Vec<u8> = (0..1_000_003_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let hash = kiln_release::hex::sha256(&big);
    std::fs::write(site.path().join("repo/a").join(&hash), &big).unwrap();
    assert_eq!(server.http("GET", &format!("/a/{hash}"), &[]).await.body, big);
    let part = server.http("GET", &format!("/a/{hash}"), &[("range", "bytes=300000-900000")]).await;
    assert_eq!(part.body, big[300_000..=900_000]);

    for bad in [
        "/a/0000",
        "/state/kiln.db",
        "/a/../../online/director.key",
        "/metadata/../../online/director.key",
        "/targets/..%2f..%2f..%2fonline%2fdirector.key",
        "/online/director.key",
        "/metadata/",
        "/b/x/kiln.efi",
        "//",
    ] {
        assert_eq!(server.http("GET", bad, &[]).await.status, StatusCode::NOT_FOUND, "{bad}");
    }
    assert_eq!(server.http("GET", "/metadata/1.root.json", &[]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn ipxe_gets_the_script_of_its_machine() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let manifest = site.manifest(1);
    let path = format!("/boot.ipxe?uuid={}&mac=52:54:00:00:00:01", machine_id(1));
    let script = server.http("GET", &path, &[]).await.text();
    let kernel = format!("kernel http://{}/a/{} console=ttyS0", server.http, manifest.kernel.sha256);
    assert!(script.starts_with("#!ipxe\n") && script.contains(&kernel), "{script}");
    assert!(script.contains(&manifest.initramfs.sha256));
    assert!(server.http("GET", "/boot.ipxe", &[]).await.text().starts_with("#!ipxe"), "an unknown one boots, too");
    // On UEFI what starts is one signed file.
    let script = server.http("GET", &format!("{path}&platform=efi"), &[]).await.text();
    assert!(script.contains(&format!("chain http://{}/b/{}/kiln.efi", server.http, manifest.uki.sha256)), "{script}");
    assert!(!script.contains("initrd"), "{script}");
}

#[tokio::test]
async fn those_who_watch_are_told_at_once() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    stream.write_all(b"GET /api/v1/events HTTP/1.1\r\nHost: kiln\r\n\r\n").await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut next = async |prefix: &str| loop {
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
        if let Some(rest) = line.strip_prefix(prefix) {
            return rest.to_owned();
        }
    };
    assert_eq!(next("event: ").await, "hello");
    assert_eq!(next("data: ").await, "[]");
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    assert_eq!(next("event: ").await, "machine");
    let view: kiln_server::view::MachineView = serde_json::from_str(&next("data: ").await).unwrap();
    assert_eq!((view.name.as_str(), view.state.as_str()), ("rack-1", "healthy"));

    let page = server.http("GET", "/", &[]).await;
    assert!(page.header("content-security-policy").starts_with("default-src 'none'"));
    assert_eq!(server.http("GET", "/app.js", &[]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_new_release_is_noticed_and_changes_no_machine() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    site.publish(2);
    let begun = Instant::now();
    while server.http("GET", "/api/v1/releases", &[]).await.json().as_array().unwrap().len() < 2 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(server.machine("rack-1").await.assigned.unwrap().release, 1);
    // What is not signed is not adopted, and nothing is lost by it.
    std::fs::write(site.path().join("repo/metadata/99.snapshot.json"), b"{}").unwrap();
    let begun = Instant::now();
    while !std::fs::read_to_string(site.path().join("log")).unwrap().contains("the last good one stays") {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(server.http("GET", "/api/v1/releases", &[]).await.json().as_array().unwrap().len(), 2);
    site.publish(3);
    while server.http("GET", "/api/v1/releases", &[]).await.json().as_array().unwrap().len() < 3 {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn it_ends_when_told_and_a_second_one_does_not_start() {
    let site = TestSite::new();
    let mut server = Server::start(&site).await;
    let second = Command::new(env!("CARGO_BIN_EXE_kiln")).args(["serve", "--site"]).arg(site.path()).output().unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another `kiln serve` runs"));

    let mut agent = Agent::new(9, &site.manifest(1));
    let report = agent.report();
    let etag = agent.send(&server, &report).await.desired.etag;
    let held = kiln_protocol::Report { wait_s: 50, desired_etag: etag, ..agent.report() };
    let body = serde_json::to_vec(&held).unwrap();
    let (config, begun) = (server.tls(Some(agent.identity())), Instant::now());
    let (answer, ()) = tokio::join!(server.post(config, body), async {
        while server.http("GET", "/api/v1/status", &[]).await.json()["held_reports"] != 1 {
            assert!(begun.elapsed() < PATIENCE);
        }
        server.signal("-TERM");
    });
    assert_eq!(answer.unwrap().status, StatusCode::OK, "a held report is answered, not cut");
    let status = server.child.wait().unwrap();
    assert!(status.success() && begun.elapsed() < PATIENCE);
    assert!(!server.socket.exists());
}

#[test]
fn a_directory_that_is_no_site_is_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_kiln")).args(["serve", "--site"]).arg(dir.path()).output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("kiln trust init --lab"), "{text}");
}
