//! Log-in with an identity provider: a certified one (npm's oidc-provider, a test peer) and a browser that follows its
//! redirects and fills in its forms.
//!
//! The provider is installed under the target folder, once. Where that cannot be done (no node, no npm, no network) the
//! test says so and passes, but not under `KILN_REGISTRIES`.

use crate::common::*;
use hyper::StatusCode;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

const PACKAGE: &str = "oidc-provider@8.8.1";
/// Where people find the boot server. Nothing looks the name up: what the provider answers goes to wherever that listens.
const URL: &str = "https://kiln.example";

fn installed() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("oidc-provider");
    let there = || dir.join("node_modules/oidc-provider/package.json").exists();
    if !there() {
        std::fs::create_dir_all(&dir).unwrap();
        let npm = Command::new("npm")
            .args(["install", "--no-audit", "--no-fund", "--fetch-retries=1", "--prefix"])
            .arg(&dir)
            .arg(PACKAGE)
            .output();
        if !there() {
            let why = match npm {
                Ok(output) => String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("").to_owned(),
                Err(error) => error.to_string(),
            };
            oracle::out_of_reach(&format!("{PACKAGE} cannot be installed by npm: {why}"));
            return None;
        }
    }
    std::fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oidc_provider.mjs"), dir.join("provider.mjs")).unwrap();
    Some(dir)
}

struct Provider(Child);

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `group` is ann's.
fn provider(dir: &Path, port: u16, redirect: &str, alg: &str, kid: &str, group: &str) -> Provider {
    let child = Command::new("node")
        .arg(dir.join("provider.mjs"))
        .args([&port.to_string(), redirect, alg, kid, group])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut provider = Provider(child);
    let mut lines = BufReader::new(provider.0.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"), "the provider ended");
    // Read on, so that it never blocks on a full pipe.
    std::thread::spawn(move || lines.for_each(drop));
    provider
}

/// A port of loopback, for one that sets SO_REUSEADDR as node does. Nobody else is given it while the socket is held, which does
/// not listen.
fn port() -> (socket2::Socket, u16) {
    let held = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    held.set_reuse_address(true).unwrap();
    held.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let port = held.local_addr().unwrap().as_socket().unwrap().port();
    (held, port)
}

/// The provider's cookies, and nothing else of a browser.
#[derive(Default)]
struct Browser(BTreeMap<String, String>);

impl Browser {
    async fn ask(&mut self, port: u16, method: &str, path: &str, form: Option<&str>) -> Answer {
        let cookies = self.0.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("; ");
        let host = format!("127.0.0.1:{port}");
        let stream = TcpStream::connect(&host).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = hyper::Request::builder().method(method).uri(path).header("host", host).header("cookie", cookies);
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let body = http_body_util::Full::new(hyper::body::Bytes::from(form.unwrap_or_default().to_owned()));
        let response = sender.send_request(request.body(body).unwrap()).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        for set in headers.get_all("set-cookie") {
            let pair = set.to_str().unwrap().split(';').next().unwrap();
            let (name, value) = pair.split_once('=').unwrap();
            self.0.insert(name.to_owned(), value.to_owned());
        }
        let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap().to_bytes().to_vec();
        Answer { status, headers, body }
    }

    /// From the provider's authorization endpoint to the address it sends the browser back to.
    async fn log_in(&mut self, port: u16, url: &str, who: &str) -> String {
        let base = format!("http://127.0.0.1:{port}");
        let mut at = url.to_owned();
        for _ in 0..12 {
            let Some(path) =
                at.strip_prefix(&base).map(str::to_owned).or_else(|| at.starts_with('/').then(|| at.clone()))
            else {
                return at;
            };
            let page = self.ask(port, "GET", &path, None).await;
            let answer = if page.status.is_redirection() {
                page
            } else {
                let prompt = if page.text().contains("name=\"login\"") {
                    format!("prompt=login&login={who}&password=x")
                } else {
                    "prompt=consent".into()
                };
                self.ask(port, "POST", &path, Some(&prompt)).await
            };
            assert!(answer.status.is_redirection(), "{path}: {} {}", answer.status, answer.text());
            answer.header("location").clone_into(&mut at);
        }
        panic!("it leads in circles: {at}");
    }
}

struct Begun {
    url: String,
    cookie: String,
}

async fn begin(server: &Server) -> Begun {
    let answer = server.https("GET", "/login/oidc", &[], Value::Null).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER, "{}", answer.text());
    let set = answer.header("set-cookie");
    assert!(set.starts_with("__Host-kiln-login=") && set.contains("HttpOnly") && set.contains("Secure"), "{set}");
    let cookie = set.split(';').next().unwrap().to_owned();
    Begun { url: answer.header("location").to_owned(), cookie }
}

/// The way back, as the browser takes it.
async fn back(server: &Server, url: &str, cookie: &str) -> Answer {
    let path = &url[url.find("/login/oidc/callback").unwrap_or_else(|| panic!("{url}"))..];
    server.https("GET", path, &[("cookie", cookie)], Value::Null).await
}

fn session(answer: &Answer) -> String {
    let all = answer.headers.get_all("set-cookie");
    let set = all.iter().map(|v| v.to_str().unwrap()).find(|v| v.starts_with("__Host-kiln=")).unwrap();
    set.split(';').next().unwrap().to_owned()
}

/// Asks for what needs a second person, from the page.
async fn ask_to_clear(server: &Server, cookie: &str) -> String {
    let known = server.https("GET", "/api/v1/session", &[("cookie", cookie)], Value::Null).await.json();
    let headers = [("cookie", cookie), ("x-kiln-csrf", known["csrf"].as_str().unwrap()), ("origin", "https://kiln")];
    let asked = server.https("POST", "/api/v1/machines/rack-1/clear", &headers, json!({})).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.text());
    asked.json()["pending"]["id"].as_str().unwrap().to_owned()
}

/// One that takes connections and says nothing, as a hanging one does, or a firewall.
#[tokio::test]
async fn while_the_provider_is_silent_nobody_queues_for_it() {
    let site = TestSite::new();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    site.configure(&format!(
        "[https]\nlisten = \"127.0.0.1:0\"\n[oidc]\nissuer = \"http://127.0.0.1:{port}\"\nclient_id = \"kiln\"\n\
         url = \"{URL}\"\n[oidc.roles]\n\"kiln-operators\" = \"operator\""
    ));
    let server = Server::start(&site).await;
    let begun = Instant::now();
    let log_ins = (0..40).map(|_| server.https("GET", "/login/oidc", &[], Value::Null));
    let answers = futures_util::future::join_all(log_ins).await;
    // One after the other they would take longer than this by far.
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    let mut busy = 0;
    for answer in answers {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{}", answer.text());
        assert_eq!(answer.header("retry-after"), "5");
        busy += usize::from(answer.text().contains("log-ins wait for the identity provider"));
    }
    assert_eq!(busy, 40 - 32, "so many wait at once, and no more");
    // What was found out is told at once; and it is nobody's failed log-in.
    let begun = Instant::now();
    let told = server.https("GET", "/login/oidc", &[], Value::Null).await;
    assert!(
        told.status == StatusCode::SERVICE_UNAVAILABLE && begun.elapsed() < Duration::from_secs(5),
        "{}",
        told.text()
    );
    assert!(told.text().contains("does not answer"), "{}", told.text());
    assert!(!server.audit().await.iter().any(|r| r.what.contains("identity provider")));
}

#[tokio::test]
async fn people_log_in_with_a_certified_provider() {
    let Some(dir) = installed() else { return };
    let site = TestSite::new();
    let (_held, port) = port();
    let secret = site.path().join("client-secret");
    std::fs::write(&secret, "a secret & more\n").unwrap();
    let configure = |role: &str| {
        format!(
            "[https]\nlisten = \"127.0.0.1:0\"\n[oidc]\nissuer = \"http://127.0.0.1:{port}\"\nclient_id = \"kiln\"\n\
             client_secret_file = \"{}\"\nurl = \"{URL}\"\n[oidc.roles]\n\"kiln-operators\" = \"{role}\"",
            secret.display()
        )
    };
    let plain = std::fs::read_to_string(site.path().join("kiln.toml")).unwrap();
    site.configure("[access]\nfour_eyes = [\"clear\"]");
    site.configure(&configure("operator"));
    let server = Server::start(&site).await;
    let down = server.https("GET", "/login/oidc", &[], Value::Null).await;
    assert_eq!(down.status, StatusCode::SERVICE_UNAVAILABLE, "the provider does not run yet: {}", down.text());
    assert!(down.header("retry-after") == "5" && down.text().contains("log in again in"), "{}", down.text());
    let redirect = format!("{URL}/login/oidc/callback");
    let running = provider(&dir, port, &redirect, "RS256", "first", "kiln-operators");
    let begun = Instant::now();
    // It is left alone for a while, as the answer said.
    while server.https("GET", "/login/oidc", &[], Value::Null).await.status == StatusCode::SERVICE_UNAVAILABLE {
        assert!(begun.elapsed() < PATIENCE, "the provider runs, and is not asked again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    // A person in a group that the configuration knows.
    let begun = begin(&server).await;
    for part in ["code_challenge_method=S256", "response_type=code", "state=", "nonce="] {
        assert!(begun.url.contains(part), "{}", begun.url);
    }
    let mut browser = Browser::default();
    let url = browser.log_in(port, &begun.url, "ann").await;
    let other = back(&server, &url, "__Host-kiln-login=another-browser").await;
    assert_eq!(other.status, StatusCode::FORBIDDEN, "another browser's: {}", other.text());
    let spent = back(&server, &url, &begun.cookie).await;
    assert_eq!(spent.status, StatusCode::FORBIDDEN, "each log-in takes one answer: {}", spent.text());
    let begun = begin(&server).await;
    let url = browser.log_in(port, &begun.url, "ann").await;
    let done = back(&server, &url, &begun.cookie).await;
    assert_eq!((done.status, done.header("location")), (StatusCode::SEE_OTHER, "/"), "{}", done.text());
    let cookie = session(&done);
    let known = server.https("GET", "/api/v1/session", &[("cookie", &cookie)], Value::Null).await.json();
    assert_eq!((&known["name"], &known["role"]), (&json!("oidc ann"), &json!("operator")));
    let orders = async |server: &Server, cookie: &str| {
        server.https("GET", "/api/v1/orders", &[("cookie", cookie)], Value::Null).await.status
    };
    assert_eq!(orders(&server, &cookie).await, StatusCode::OK);
    let replayed = back(&server, &url, &begun.cookie).await;
    assert_eq!(replayed.status, StatusCode::FORBIDDEN);

    // Another issuer's answer, an altered state, and a refusal.
    let begun = begin(&server).await;
    let url = browser.log_in(port, &begun.url, "ann").await;
    let mixed = url.replace("iss=http", "iss=https");
    assert_eq!(back(&server, &mixed, &begun.cookie).await.status, StatusCode::FORBIDDEN);
    let begun = begin(&server).await;
    let state = begun.url.split("state=").nth(1).unwrap().split('&').next().unwrap().to_owned();
    let refusal = format!("/login/oidc/callback?error=access_denied&state={state}");
    let refused = back(&server, &refusal, &begun.cookie).await;
    assert!(refused.status == StatusCode::FORBIDDEN && refused.text().contains("access_denied"), "{}", refused.text());

    // A person in no such group.
    let begun = begin(&server).await;
    let url = Browser::default().log_in(port, &begun.url, "eve").await;
    let nobody = back(&server, &url, &begun.cookie).await;
    assert!(
        nobody.status == StatusCode::FORBIDDEN && nobody.text().contains("eve is in no group"),
        "{}",
        nobody.text()
    );
    let audit = server.audit().await;
    let line = |actor: &str, done: bool| audit.iter().find(|r| r.actor == actor && (r.result == "done") == done);
    assert!(line("oidc ann", true).unwrap().what.contains("logged in with the identity provider"));
    assert!(line("oidc eve", false).unwrap().result.contains("no group") && line("nobody", false).is_some());

    // The provider's keys are others, and of another kind.
    drop(running);
    let running = provider(&dir, port, &redirect, "ES256", "second", "kiln-operators");
    let begun = begin(&server).await;
    let url = Browser::default().log_in(port, &begun.url, "ann").await;
    let answer = back(&server, &url, &begun.cookie).await;
    assert_eq!(answer.status, StatusCode::SEE_OTHER, "it waits until keys may be asked for again: {}", answer.text());

    // What a person asked for rests on the groups that the provider names last, whatever they were when it was asked.
    let cookie = session(&answer);
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let ben = server.token("ben", "operator").await;
    let (mine, taken) = (ask_to_clear(&server, &cookie).await, ask_to_clear(&server, &cookie).await);
    let confirm = async |id: &str| server.with(&ben, "POST", &format!("pending/{id}/confirm"), json!({})).await;
    assert_eq!(confirm(&mine).await.status, StatusCode::OK, "it may");
    drop(running);
    let running = provider(&dir, port, &redirect, "ES256", "third", "nothing");
    let begun = begin(&server).await;
    let url = Browser::default().log_in(port, &begun.url, "ann").await;
    let nobody = back(&server, &url, &begun.cookie).await;
    assert!(nobody.text().contains("ann is in no group"), "{}", nobody.text());
    assert_eq!(orders(&server, &cookie).await, StatusCode::UNAUTHORIZED, "nor does a session outlive them");
    let gone = confirm(&taken).await;
    assert!(gone.status == StatusCode::FORBIDDEN && gone.text().contains("its groups give it"), "{}", gone.text());

    // What groups may do is another: whoever logged in before logs in again.
    drop(running);
    let _running = provider(&dir, port, &redirect, "ES256", "fourth", "kiln-operators");
    let begun = begin(&server).await;
    let url = Browser::default().log_in(port, &begun.url, "ann").await;
    let cookie = session(&back(&server, &url, &begun.cookie).await);
    assert_eq!(orders(&server, &cookie).await, StatusCode::OK);
    drop(server);
    std::fs::write(site.path().join("kiln.toml"), &plain).unwrap();
    site.configure(&configure("admin"));
    let server = Server::start(&site).await;
    assert_eq!(orders(&server, &cookie).await, StatusCode::UNAUTHORIZED);
}
