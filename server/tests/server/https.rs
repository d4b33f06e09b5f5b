//! People and programs over TLS: certificates that are made, given and renewed; sessions of the web page.

use crate::common::*;
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

fn site_with(more: &str) -> TestSite {
    let site = TestSite::new();
    site.configure(&format!("[https]\nlisten = \"127.0.0.1:0\"\n{more}"));
    site
}

#[tokio::test]
async fn a_lab_has_a_certificate_of_its_own_ca() {
    let site = site_with("names = [\"localhost\", \"127.0.0.1\", \"kiln.example\"]");
    let server = Server::start(&site).await;
    let page = server.https("GET", "/", &[], Value::Null).await;
    assert_eq!(page.status, StatusCode::OK);
    for (name, value) in [
        ("x-frame-options", "DENY"),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
        ("strict-transport-security", "max-age=31536000"),
    ] {
        assert_eq!(page.header(name), value);
    }
    assert_eq!(server.http("GET", "/", &[]).await.header("strict-transport-security"), "", "RFC 6797, section 7.2");
    let answer = server.https("GET", "/api/v1/machines", &[], Value::Null).await;
    assert_eq!(answer.header("strict-transport-security"), "max-age=31536000");
    assert_eq!((answer.status, answer.header("cache-control")), (StatusCode::OK, "no-store"));

    // The command line takes the site's CA, and nobody else's.
    let token = server.token("ann", "admin").await;
    let file = site.path().join("token");
    std::fs::write(&file, &token).unwrap();
    let url = format!("https://127.0.0.1:{}", server.https.unwrap().port());
    let ca = site.path().join("online/agent-ca.pem");
    let arguments = ["token", "list", "--server", &url, "--token-file", file.to_str().unwrap()];
    let (ok, out, error) = site.kiln(&[&arguments[..], &["--ca", ca.to_str().unwrap()]].concat());
    assert!(ok && out.contains("ann"), "{out}{error}");
    let (ok, _, error) = site.kiln(&arguments);
    assert!(!ok && error.contains("certificate"), "{error}");
    let (ok, _, error) =
        site.kiln(&["token", "list", "--server", "http://10.0.0.1:1", "--token-file", file.to_str().unwrap()]);
    assert!(!ok && error.contains("not encrypted"), "{error}");
}

/// A certificate for localhost by a CA of its own, as an ACME client leaves it; what clients need to trust.
fn write_certificate(dir: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    for (name, text) in [("tls.crt", made.cert.pem()), ("tls.key", made.signing_key.serialize_pem())] {
        // Renewed files are put in the place of the old ones.
        std::fs::write(dir.join("new"), text).unwrap();
        std::fs::rename(dir.join("new"), dir.join(name)).unwrap();
    }
    made.cert.der().clone()
}

async fn connect(
    server: &Server,
    trusted: &CertificateDer<'static>,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, std::io::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(server.https.unwrap()).await?;
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_and_no_connection_ends() {
    let files = tempfile::tempdir().unwrap();
    let first = write_certificate(files.path());
    let path = |name: &str| files.path().join(name).display().to_string();
    let site = site_with(&format!("certificate = \"{}\"\nkey = \"{}\"", path("tls.crt"), path("tls.key")));
    let server = Server::start(&site).await;
    let stream = connect(&server, &first).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut ask = async || {
        let request = Request::get("/api/v1/status").header("host", "localhost").body(Empty::<Bytes>::new()).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        let status = answer.status();
        answer.into_body().collect().await.unwrap();
        status
    };
    assert_eq!(ask().await, StatusCode::OK);

    // A file that cannot be used changes nothing.
    let log = || std::fs::read_to_string(site.path().join("log")).unwrap();
    let until = async |done: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < PATIENCE, "{}", log());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    std::fs::write(files.path().join("tls.crt"), "no certificate").unwrap();
    until(&|| log().contains("the certificate stays as it was")).await;
    assert!(connect(&server, &first).await.is_ok());

    let second = write_certificate(files.path());
    until(&|| log().contains("the renewed certificate is shown")).await;
    assert!(connect(&server, &second).await.is_ok() && connect(&server, &first).await.is_err());
    assert_eq!(ask().await, StatusCode::OK, "the old connection goes on");

    // A start without a certificate that could be shown is refused with the file's name.
    drop(server);
    std::fs::remove_file(files.path().join("tls.key")).unwrap();
    let (ok, _, error) = site.kiln(&["serve", "--site", site.path().to_str().unwrap()]);
    assert!(!ok && error.contains("tls.key"), "{error}");
}

/// A browser's session.
struct Session {
    cookie: String,
    csrf: String,
    origin: String,
}

async fn log_in(server: &Server, token: &str) -> Session {
    let login = server.https("POST", "/api/v1/session", &[], json!({ "token": token })).await;
    assert_eq!(login.status, StatusCode::OK, "{}", login.text());
    let set = login.header("set-cookie");
    for flag in ["__Host-kiln=", "; Path=/", "; Secure", "; HttpOnly", "; SameSite=Lax"] {
        assert!(set.contains(flag), "{set}");
    }
    let cookie = set.split(';').next().unwrap().to_owned();
    let known = server.https("GET", "/api/v1/session", &[("cookie", &cookie)], Value::Null).await.json();
    assert_eq!(known["csrf_header"], "x-kiln-csrf");
    Session { cookie, csrf: known["csrf"].as_str().unwrap().to_owned(), origin: "https://kiln".to_owned() }
}

async fn change(server: &Server, session: &Session, method: &str, path: &str) -> Answer {
    let headers = [("cookie", session.cookie.as_str()), ("x-kiln-csrf", &session.csrf), ("origin", &session.origin)];
    server.https(method, path, &headers, json!({})).await
}

#[tokio::test]
async fn a_session_changes_things_from_its_own_page_only_and_ends_with_its_token() {
    let site = site_with("");
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let token = server.token("ann", "operator").await;
    let nobody = server.https("GET", "/api/v1/session", &[], Value::Null).await.json();
    assert_eq!((&nobody["name"], &nobody["csrf"]), (&Value::Null, &Value::Null));
    let bad = server.https("POST", "/api/v1/session", &[], json!({ "token": format!("{token}0") })).await;
    assert_eq!((bad.status, bad.header("set-cookie")), (StatusCode::UNAUTHORIZED, ""));
    let elsewhere = [("origin", "https://evil.example")];
    let forced = server.https("POST", "/api/v1/session", &elsewhere, json!({ "token": token })).await;
    assert_eq!(forced.status, StatusCode::FORBIDDEN, "nobody is logged in by another site's page");

    let session = log_in(&server, &token).await;
    let clear = "/api/v1/machines/rack-1/clear";
    assert_eq!(change(&server, &session, "POST", clear).await.status, StatusCode::OK);
    for wrong in [
        Session { csrf: "0".repeat(64), ..log_in(&server, &token).await },
        Session { origin: "https://evil.example".into(), ..log_in(&server, &token).await },
        Session { origin: "http://kiln".into(), ..log_in(&server, &token).await },
    ] {
        let answer = change(&server, &wrong, "POST", clear).await;
        assert!(answer.status == StatusCode::FORBIDDEN && answer.text().contains("own page"), "{}", answer.text());
    }
    // Its role is its token's; the cookie is nothing over plain HTTP.
    assert_eq!(change(&server, &session, "GET", "/api/v1/tokens").await.status, StatusCode::FORBIDDEN);
    let plain = server.http("GET", "/api/v1/orders", &[("cookie", &session.cookie)]).await;
    assert_eq!(plain.status, StatusCode::FORBIDDEN);
    assert_eq!(change(&server, &session, "GET", "/api/v1/orders").await.status, StatusCode::OK);

    // It outlives the server, and ends by log-out, or with the token.
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(change(&server, &session, "GET", "/api/v1/orders").await.status, StatusCode::OK);
    let other = log_in(&server, &token).await;
    let left = change(&server, &session, "DELETE", "/api/v1/session").await;
    assert!(left.status == StatusCode::OK && left.header("set-cookie").contains("Max-Age=0"));
    assert_eq!(change(&server, &session, "GET", "/api/v1/orders").await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(change(&server, &other, "GET", "/api/v1/orders").await.status, StatusCode::OK);
    server.order("POST", "tokens/ann/revoke", json!({})).await;
    assert_eq!(change(&server, &other, "GET", "/api/v1/orders").await.status, StatusCode::UNAUTHORIZED);
    let audit = server.audit().await;
    let count = |what: &str| audit.iter().filter(|r| r.actor == "token ann" && r.what == what).count();
    assert_eq!((count("logged in with a token"), count("logged out")), (5, 1), "{audit:?}");
}

/// Reads on until this was said.
async fn until_said(stream: &mut (impl AsyncRead + Unpin), words: &str) {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).contains(words) {
        let more = tokio::time::timeout(PATIENCE, stream.read_buf(&mut read)).await.unwrap().unwrap();
        assert!(more > 0, "it ended: {}", String::from_utf8_lossy(&read));
    }
}

/// An event stream whose first event has come.
async fn events<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, header: &str) -> S {
    let head = format!("GET /api/v1/events HTTP/1.1\r\nHost: kiln\r\n{header}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    until_said(&mut stream, "event: hello").await;
    stream
}

async fn ends(mut stream: impl AsyncRead + Unpin) {
    // How a connection ends is the transport's; that it does is what counts.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("the stream goes on");
}

#[tokio::test]
async fn an_event_stream_ends_with_what_its_reader_was_let_in_by() {
    let site = site_with("[access]\nanonymous = \"none\"");
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let (ann, ben) = (server.token("ann", "viewer").await, server.token("ben", "viewer").await);
    let by_token = async |token: &str| {
        let stream = TcpStream::connect(server.http).await.unwrap();
        events(stream, &format!("Authorization: Bearer {token}")).await
    };
    let by_session = async |session: &Session| {
        let connector = tokio_rustls::TlsConnector::from(Arc::new(server.tls(None)));
        let stream = TcpStream::connect(server.https.unwrap()).await.unwrap();
        let stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
        events(stream, &format!("Cookie: {}", session.cookie)).await
    };
    let (left, kept) = (log_in(&server, &ann).await, log_in(&server, &ann).await);
    let (anns, mut bens) = (by_token(&ann).await, by_token(&ben).await);
    let (lefts, kepts) = (by_session(&left).await, by_session(&kept).await);

    assert_eq!(change(&server, &left, "DELETE", "/api/v1/session").await.status, StatusCode::OK);
    ends(lefts).await;
    server.order("POST", "tokens/ann/revoke", json!({})).await;
    tokio::join!(ends(anns), ends(kepts));
    // Whoever may goes on reading.
    server.order("POST", "machines/rack-1/clear", json!({})).await;
    until_said(&mut bens, "event: machine").await;
}

#[tokio::test]
async fn nobody_pushes_others_out_by_logging_in() {
    let site = site_with("");
    let server = Server::start(&site).await;
    let (ann, eve) = (server.token("ann", "operator").await, server.token("eve", "viewer").await);
    let session = log_in(&server, &ann).await;
    let first = log_in(&server, &eve).await;
    for _ in 0..20 {
        log_in(&server, &eve).await;
    }
    assert_eq!(change(&server, &session, "GET", "/api/v1/orders").await.status, StatusCode::OK);
    let own = server.https("GET", "/api/v1/machines/x", &[("cookie", &first.cookie)], Value::Null).await;
    assert_eq!(own.status, StatusCode::NOT_FOUND, "an old cookie is nobody's, and reading needs none");
    assert_eq!(
        change(&server, &first, "POST", "/api/v1/machines/rack-1/excuse").await.status,
        StatusCode::UNAUTHORIZED
    );
}
