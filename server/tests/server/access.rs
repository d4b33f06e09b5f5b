//! Who may call what: access roles on every call, tokens, wrong credentials, second persons.

use crate::common::*;
use axum::body::{Body, to_bytes};
use axum::extract::Extension;
use axum::http::Request;
use hyper::StatusCode;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use kiln_fleet::access::AccessRole;
use kiln_server::access::calls::{CALLS, Kind};
use kiln_server::error::AccessError;
use kiln_server::http::{App, Peer, public_router};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The status alone: an event stream has no end.
async fn status(server: &Server, method: &str, path: &str, token: Option<&str>) -> u16 {
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let token = token.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    let head = format!("{method} {path} HTTP/1.1\r\nHost: kiln\r\nContent-Type: application/json\r\n{token}");
    stream.write_all(format!("{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}").as_bytes()).await.unwrap();
    let mut line = [0; 12];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut line)).await.unwrap().unwrap();
    std::str::from_utf8(&line[9..]).unwrap().parse().unwrap()
}

#[tokio::test]
async fn each_access_role_is_tried_on_each_call() {
    for anonymous in ["read", "none"] {
        let site = TestSite::new();
        site.configure(&format!("[access]\nanonymous = \"{anonymous}\""));
        let server = Server::start(&site).await;
        let mut callers = vec![(None, None)];
        for role in AccessRole::ALL {
            callers.push((Some(role), Some(server.token(&format!("t-{role}"), role.as_str()).await)));
        }
        for call in CALLS.iter().filter(|call| call.kind != Kind::LogIn) {
            let path = call.path.replace("{machine}", "nothing").replace("{name}", "nobody").replace("{id}", "none");
            let path = path.replace("{image}", "nothing");
            for (role, token) in &callers {
                let got = status(&server, call.method, &path, token.as_deref()).await;
                let open = call.kind == Kind::Open && anonymous == "read";
                let may = open || role.is_some_and(|role| role >= call.least);
                assert_ne!(got, 401, "{call:?} {role:?}");
                assert_eq!(got != 403, may, "{} {path} as {role:?} with anonymous = {anonymous}: {got}", call.method);
            }
        }
        // Machines have no tokens: what they boot is for all. So is the page, where people log in.
        let uki = format!("/b/{}/kiln.efi", site.manifest(1).uki.sha256);
        for path in ["/", "/app.js", "/boot.ipxe", "/metadata/1.root.json", &uki] {
            assert_eq!(status(&server, "GET", path, None).await, 200, "{path}");
        }
        // What was refused to somebody known is in the audit log; whoever is unknown fills nothing.
        let audit = server.audit().await;
        let refused = |who: &str| audit.iter().filter(|r| r.actor == who && r.result != "done").count();
        assert!(refused("token t-viewer") > 5 && refused("nobody") == 0, "{audit:?}");
    }
}

#[tokio::test]
async fn a_call_without_an_entry_is_served_to_nobody() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let admin = server.token("root", "admin").await;
    for path in ["/api/v1/nothing", "/api/v2/machines", "/api/v1/machines/x/y/z"] {
        assert_eq!(status(&server, "GET", path, Some(&admin)).await, 404, "{path}");
        assert!([404, 405].contains(&status(&server, "POST", path, Some(&admin)).await), "{path}");
    }
    assert_eq!(status(&server, "DELETE", "/api/v1/machines", Some(&admin)).await, 403, "a route, but no such call");
}

#[tokio::test]
async fn a_token_is_made_used_listed_and_revoked() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let dir = site.path().to_str().unwrap().to_owned();

    let (ok, text, told) =
        site.kiln(&["token", "create", "ann", "--role", "operator", "--expires", "7d", "--site", &dir]);
    assert!(ok && told.contains("shown only now") && !told.contains(text.trim()), "{told}");
    let file = site.path().join("ann.token");
    std::fs::write(&file, &text).unwrap();
    let (url, file) = (format!("http://{}", server.http), file.to_str().unwrap().to_owned());
    let there = ["--server", &url, "--token-file", &file];
    let (ok, out, error) = site.kiln(&[&["assign", "rack-1", "minimal/1"][..], &there].concat());
    assert!(ok && out.contains("sequence 2"), "{out}{error}");
    let (ok, _, error) = site.kiln(&[&["token", "list"][..], &there].concat());
    assert!(!ok && error.contains("token ann has the access role operator, and this call needs admin"), "{error}");
    let (ok, _, error) = site.kiln(&["machine", "clear", "rack-1", "--server", &url]);
    assert!(!ok && error.contains("needs the access role operator") && error.contains("kiln.sock"), "{error}");

    let (_, list, _) = site.kiln(&["token", "list", "--site", &dir]);
    let row = list.lines().find(|l| l.starts_with("ann")).unwrap();
    assert!(
        row.contains("operator") && row.contains("holds") && row.contains("s ago") && row.contains("in 6 d"),
        "{list}"
    );
    assert!(!list.contains(text.trim().rsplit('_').next().unwrap()), "the secret is shown once");
    for (name, role, lifetime, expected) in [
        ("ann", "viewer", json!(null), "still holds"),
        ("a b", "viewer", json!(null), "no name"),
        ("ben", "root", json!(null), "unknown variant"),
        ("ben", "viewer", json!(400_u64 * 86_400_000), "365 days"),
        ("ben", "viewer", json!(1000), "from 5 minutes"),
    ] {
        let answer =
            server.order("POST", "tokens", json!({ "name": name, "role": role, "lifetime_ms": lifetime })).await;
        assert!(answer.status.is_client_error() && answer.text().contains(expected), "{}", answer.text());
    }

    // It survives the server, and not its revocation.
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(server.with(text.trim(), "GET", "orders", Value::Null).await.status, StatusCode::OK);
    let (ok, out, _) = site.kiln(&["token", "revoke", "ann", "--site", &dir]);
    assert!(ok && out.contains("revoked by uid"), "{out}");
    let refused = server.with(text.trim(), "GET", "machines", Value::Null).await;
    assert_eq!((refused.status, refused.text().contains("was revoked")), (StatusCode::UNAUTHORIZED, true));
    let audit = server.audit().await;
    let said = |who: &str, what: &str| audit.iter().any(|r| r.actor.starts_with(who) && r.what.contains(what));
    assert!(said("uid ", "made token ann with the access role operator, for 7 days"), "{audit:?}");
    assert!(said("token ann", "assigned minimal/1 via kexec") && said("uid ", "revoked token ann"));
    let used = audit.iter().find(|r| r.what.contains("showed token ann")).unwrap();
    assert_eq!((used.actor.as_str(), used.origin.as_str()), ("nobody", "127.0.0.1"));
}

#[tokio::test]
async fn what_the_database_holds_opens_nothing() {
    let site = TestSite::new();
    site.configure("[https]\nlisten = \"127.0.0.1:0\"");
    let server = Server::start(&site).await;
    let token = server.token("ann", "admin").await;
    let login = server.https("POST", "/api/v1/session", &[], json!({ "token": token })).await;
    assert_eq!(login.status, StatusCode::OK, "{}", login.text());
    let cookie = login.header("set-cookie").split(';').next().unwrap().to_owned();
    let session = cookie.split_once('=').unwrap().1;
    drop(server);

    let mut stolen = Vec::new();
    for entry in std::fs::read_dir(site.path().join("state")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            stolen.extend(std::fs::read(path).unwrap());
        }
    }
    let stolen = String::from_utf8_lossy(&stolen).into_owned();
    let (id, secret) = token.strip_prefix("kiln_").unwrap().split_once('_').unwrap();
    assert!(stolen.contains(id), "the record is there");
    assert!(!stolen.contains(secret) && !stolen.contains(session), "a secret lies in the database");
    // Whatever looks like a secret is tried as one, each from another address, so that no limit hides the answer.
    let mut tried = std::collections::BTreeSet::new();
    let (control, _stop) = control(&site).await;
    for piece in stolen.split(|c: char| !c.is_ascii_hexdigit()).filter(|piece| piece.len() == 64) {
        if tried.insert(piece) && tried.len() < 200 {
            let from = format!("10.1.{}.{}", tried.len() / 200, tried.len() % 200).parse().unwrap();
            for id in [id, "000000000000"] {
                let opened = control.token_of(&format!("kiln_{id}_{piece}"), from, true);
                assert!(matches!(opened, Err(AccessError::WrongToken | AccessError::TooOften { .. })), "{piece}");
            }
            let cookie = format!("__Host-kiln={piece}");
            let answer = from_afar(&control, true, "GET", "/api/v1/audit", &[("cookie", &cookie)]).await;
            assert!(answer.0.is_client_error(), "{piece}");
        }
    }
    assert!(tried.len() >= 2, "the hashes of token and session were tried: {tried:?}");
}

/// A call that comes from another host, over TLS or not, as the listener would hand it on.
async fn from_afar(
    control: &Arc<kiln_server::control::Control>,
    tls: bool,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> (StatusCode, String) {
    let app = App { control: control.clone(), net: None, listening: Arc::default() };
    let (from, to) = ("10.9.9.9:4000".parse().unwrap(), "10.0.0.1:8080".parse().unwrap());
    let router = public_router(app).layer(Extension(Peer::Tcp { from, to, tls }));
    let request = headers.iter().fold(Request::builder().method(method).uri(path), |r, (n, v)| r.header(*n, *v));
    let Ok(answer) = TowerToHyperService::new(router).call(request.body(Body::empty()).unwrap()).await;
    let status = answer.status();
    (status, String::from_utf8(to_bytes(answer.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap())
}

#[tokio::test]
async fn a_token_is_not_taken_over_an_unencrypted_connection_from_elsewhere() {
    let site = TestSite::new();
    let (control, _stop) = control(&site).await;
    let by = kiln_server::access::Caller::local(0);
    let (_, text) = control.token_create("ann", AccessRole::Admin, None, &by).await.unwrap();
    let bearer = format!("Bearer {text}");
    let headers = [("authorization", bearer.as_str())];
    let (status, words) = from_afar(&control, false, "GET", "/api/v1/machines", &headers).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(words.contains("unencrypted") && words.contains("revoke this token"), "{words}");
    assert_eq!(from_afar(&control, true, "GET", "/api/v1/tokens", &headers).await.0, StatusCode::OK);
    assert_eq!(
        from_afar(&control, false, "GET", "/api/v1/machines", &[]).await.0,
        StatusCode::OK,
        "reading needs none"
    );
    let (status, words) = from_afar(&control, false, "POST", "/api/v1/session", &[]).await;
    assert!(status == StatusCode::FORBIDDEN && words.contains("https only"), "{words}");
    let audit = control.store.audit_tail(10).await.unwrap();
    let found = audit.iter().find(|r| r.what.contains("showed token ann over an unencrypted connection")).unwrap();
    assert_eq!(found.origin, "10.9.9.9");
}

#[tokio::test]
async fn wrong_credentials_are_slowed_down_for_their_address_alone() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let good = server.token("ann", "viewer").await;
    let wrong = format!("kiln_{}_{}", "0".repeat(12), "0".repeat(64));
    for n in 0..10 {
        assert_eq!(server.with(&wrong, "GET", "machines", Value::Null).await.status, StatusCode::UNAUTHORIZED, "{n}");
    }
    let slowed = server.with(&wrong, "GET", "machines", Value::Null).await;
    assert_eq!(slowed.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(slowed.text().contains("try again in"), "{}", slowed.text());
    assert_eq!(server.with(&good, "GET", "machines", Value::Null).await.status, StatusCode::TOO_MANY_REQUESTS);
    // From another address a good one is taken.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let stream = socket.connect(server.http).await.unwrap();
    let bearer = format!("Bearer {good}");
    let answer = call(stream, "GET", "/api/v1/machines", &[("authorization", &bearer)], vec![]).await;
    assert_eq!(answer.status, StatusCode::OK);
    let audit = server.audit().await;
    assert_eq!(
        audit.iter().filter(|r| r.what.contains("wrong secret")).count(),
        10,
        "what is not looked at is not recorded"
    );
}

#[tokio::test]
async fn a_second_person_confirms_and_it_is_done_once() {
    let site = TestSite::new();
    site.configure("[access]\nfour_eyes = [\"assign\", \"admin-token\"]");
    let server = Server::start(&site).await;
    site.publish(2);
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let (ann, ben, tech) = (
        server.token("ann", "operator").await,
        server.token("ben", "operator").await,
        server.token("tec", "technician").await,
    );
    let body = json!({ "image": "minimal", "release": 2, "via": "kexec" });

    let asked = server.with(&ann, "PUT", "machines/rack-1/assignment", body.clone()).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.text());
    let id = asked.json()["pending"]["id"].as_str().unwrap().to_owned();
    assert_eq!(server.machine("rack-1").await.assigned.unwrap().release, 1, "not yet");
    let path = format!("/api/v1/machines/{}/assignment", machine_id(1));
    assert_eq!(asked.json()["pending"]["path"], path, "a name may be another's when it is done");
    let unknown = server.with(&ann, "PUT", "machines/rack-9/assignment", body.clone()).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND, "nobody confirms what cannot be done");
    let confirm = format!("pending/{id}/confirm");
    let refused = async |token: &str, status: StatusCode, words: &str| {
        let answer = server.with(token, "POST", &confirm, json!({})).await;
        assert!(answer.status == status && answer.text().contains(words), "{}", answer.text());
    };
    refused(&ann, StatusCode::CONFLICT, "another person").await;
    refused(&tech, StatusCode::FORBIDDEN, "needs operator").await;
    // Whoever made ann's token could have used it.
    let by_maker = server.order("POST", &confirm, json!({})).await;
    assert_eq!(by_maker.status, StatusCode::CONFLICT, "{}", by_maker.text());

    // It waits through a crash, too.
    server.signal("-KILL");
    drop(server);
    let server = Server::start(&site).await;
    let dir = site.path().to_str().unwrap().to_owned();
    let (_, list, _) = site.kiln(&["pending", "list", "--site", &dir]);
    assert!(list.contains(&id) && list.contains("token ann") && list.contains("waits for another person"), "{list}");
    let done = server.with(&ben, "POST", &confirm, json!({})).await;
    assert_eq!(done.status, StatusCode::OK, "{}", done.text());
    let assigned = server.machine("rack-1").await.assigned.unwrap();
    assert_eq!((assigned.release, assigned.sequence), (2, 2));
    let again = server.with(&ben, "POST", &confirm, json!({})).await;
    assert_eq!((again.status, server.machine("rack-1").await.assigned.unwrap().sequence), (StatusCode::CONFLICT, 2));
    let audit = server.audit().await;
    let actor = &audit.iter().find(|r| r.what == "assigned minimal/2 via kexec").unwrap().actor;
    assert_eq!(actor, "token ann, confirmed by token ben");

    // Refused, taken back, asked for by somebody who may not any more.
    let ask = async || {
        let answer = server.with(&ann, "PUT", "machines/rack-1/assignment", body.clone()).await;
        answer.json()["pending"]["id"].as_str().unwrap().to_owned()
    };
    let id = ask().await;
    assert_eq!(server.with(&ben, "POST", &format!("pending/{id}/refuse"), json!({})).await.status, StatusCode::OK);
    assert_eq!(
        server.with(&ben, "POST", &format!("pending/{id}/confirm"), json!({})).await.status,
        StatusCode::CONFLICT
    );
    let id = ask().await;
    server.order("POST", "tokens/ann/revoke", json!({})).await;
    let gone = server.with(&ben, "POST", &format!("pending/{id}/confirm"), json!({})).await;
    assert!(gone.status == StatusCode::FORBIDDEN && gone.text().contains("was revoked"), "{}", gone.text());

    // A token with the role admin is made by two; others by one.
    let asked = server.order("POST", "tokens", json!({ "name": "eve", "role": "admin" })).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED);
    let id = asked.json()["pending"]["id"].as_str().unwrap().to_owned();
    let answer = server.with(&ben, "POST", &format!("pending/{id}/confirm"), json!({})).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN, "an operator is no second admin");
    server.token("dan", "viewer").await;
}

/// What takes a machine's key away, and what makes other hardware that machine's own.
#[tokio::test]
async fn a_key_is_revoked_and_hardware_accepted_by_two() {
    let site = TestSite::new();
    site.configure("[access]\nfour_eyes = [\"revoke-key\", \"accept\"]");
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let (ann, ben) = (server.token("ann", "operator").await, server.token("ben", "operator").await);
    for (call, what) in [("accept", "accepted: its TPM and firmware"), ("revoke-key", "revoked the identity key")] {
        let asked = server.with(&ann, "POST", &format!("machines/rack-1/{call}"), json!({})).await;
        assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.text());
        let done = async || {
            let audit = server.audit().await;
            audit.iter().filter(|r| r.what.starts_with(what)).map(|r| r.actor.clone()).collect::<Vec<_>>()
        };
        // Asked, and not done: the machine is heard as before.
        assert!(done().await.is_empty(), "{call}");
        let report = agent.healthy();
        assigned(&agent.send(&server, &report).await);
        let confirm = format!("pending/{}/confirm", asked.json()["pending"]["id"].as_str().unwrap());
        assert_eq!(server.with(&ann, "POST", &confirm, json!({})).await.status, StatusCode::CONFLICT);
        let confirmed = server.with(&ben, "POST", &confirm, json!({})).await;
        assert_eq!(confirmed.status, StatusCode::OK, "{}", confirmed.text());
        assert_eq!(done().await, ["token ann, confirmed by token ben"], "{call}");
    }
    let body = serde_json::to_vec(&agent.healthy()).unwrap();
    let answer = server.post(server.tls(Some(agent.identity())), body).await.unwrap();
    assert!(answer.status == StatusCode::FORBIDDEN && answer.text().contains("revoked"), "{}", answer.text());
}

#[tokio::test]
async fn an_admin_who_makes_two_tokens_alone_is_one_person() {
    let site = TestSite::new();
    site.configure("[access]\nfour_eyes = [\"clear\"]");
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let (ann, ben) = (server.token("ann", "admin").await, server.token("ben", "operator").await);
    let make = async |name: &str| {
        let body = json!({ "name": name, "role": "operator" });
        server.with(&ann, "POST", "tokens", body).await.json()["text"].as_str().unwrap().to_owned()
    };
    let (one, two) = (make("one").await, make("two").await);
    let asked = server.with(&one, "POST", "machines/rack-1/clear", json!({})).await;
    let id = asked.json()["pending"]["id"].as_str().unwrap().to_owned();
    let confirm = async |token: &str| server.with(token, "POST", &format!("pending/{id}/confirm"), json!({})).await;
    for other in [&two, &ann] {
        let refused = confirm(other).await;
        assert_eq!(refused.status, StatusCode::CONFLICT, "{}", refused.text());
    }
    assert!(confirm(&two).await.text().contains("token ann could be both"));
    // The boot server's owner made ann's token and ben's: people need a first one.
    assert_eq!(confirm(&ben).await.status, StatusCode::OK);
}

/// Another key may begin as the one that was meant when the second person comes.
#[tokio::test]
async fn a_key_that_waits_for_a_second_person_is_named_whole() {
    let site = TestSite::new();
    site.configure("[access]\nfour_eyes = [\"clear\"]");
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let signer = Arc::new(kiln_release::Signer::from_seed(&[77; 32]));
    let mut other = Agent { signer, boot: 50, ..agent.clone() };
    let (ann, ben) = (server.token("ann", "operator").await, server.token("ben", "operator").await);
    let meant = other.key_id();
    let body = json!({ "key": &meant.as_str()[..16] });
    let early = server.with(&ann, "POST", "machines/rack-1/clear", body.clone()).await;
    assert_eq!(early.status, StatusCode::CONFLICT, "nobody confirms what cannot be: {}", early.text());
    let report = other.healthy();
    other.send(&server, &report).await;
    let asked = server.with(&ann, "POST", "machines/rack-1/clear", body).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.text());
    let pending = asked.json()["pending"].clone();
    assert_eq!(pending["body"], json!({ "key": meant }).to_string());
    assert!(pending["what"].as_str().unwrap().contains(meant.as_str()), "{pending}");
    let confirm = format!("pending/{}/confirm", pending["id"].as_str().unwrap());
    assert_eq!(server.with(&ben, "POST", &confirm, json!({})).await.status, StatusCode::OK);
    assert_eq!(server.machine("rack-1").await.key, Some(meant));
}

/// A name can be another machine's when the second person comes, also one in the body or the query of a call.
#[tokio::test]
async fn what_is_confirmed_is_done_to_the_machines_that_were_meant() {
    let site = TestSite::new();
    site.configure("[access]\nfour_eyes = [\"replace\", \"secret-remove\"]");
    let server = Server::start(&site).await;
    for n in [1, 2] {
        let mut agent = Agent::new(n, &site.manifest(1));
        let report = agent.healthy();
        agent.send(&server, &report).await;
    }
    let (ann, ben) = (server.token("ann", "operator").await, server.token("ben", "operator").await);
    let in_service = server.with(&ann, "POST", "machines/rack-1/replace", json!({ "with": "rack-2" })).await;
    assert!(in_service.text().contains("rack-2 is in service"), "nobody confirms it: {}", in_service.text());
    server.order("POST", "machines/rack-2/retire", json!({})).await;
    let asked = server.with(&ann, "POST", "machines/rack-1/replace", json!({ "with": "rack-2" })).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.text());
    let pending = asked.json()["pending"].clone();
    let (id, meant) = (pending["id"].as_str().unwrap().to_owned(), machine_id(2).to_string());
    assert_eq!(pending["body"], json!({ "with": meant }).to_string());
    assert!(pending["what"].as_str().unwrap().contains(&format!("rack-2 is machine {meant}")), "{pending}");
    let query = "secrets/db?machine=rack-2";
    let removal = server.with(&ann, "DELETE", query, Value::Null).await;
    let pinned = format!("/api/v1/secrets/db?machine={meant}");
    assert_eq!(removal.json()["pending"]["path"], pinned, "{}", removal.text());
    // However it is written: the call reads the same of it.
    for encoded in ["m%61chine=rack-2", "%6Dachine=r%61ck%2D2", "&machine=rack-2&"] {
        let removal = server.with(&ann, "DELETE", &format!("secrets/db?{encoded}"), Value::Null).await;
        assert_eq!(removal.json()["pending"]["path"], pinned, "{encoded}: {}", removal.text());
        let what = removal.json()["pending"]["what"].as_str().unwrap().to_owned();
        assert!(what.contains(&pinned) && what.contains(&format!("rack-2 is machine {meant}")), "{what}");
    }
    let nobody = server.with(&ann, "DELETE", "secrets/db?m%61chine=rack-7", Value::Null).await;
    assert_eq!(nobody.status, StatusCode::NOT_FOUND, "{}", nobody.text());

    // Somebody gives the name to another; and nobody gives a machine's id as a name.
    let mut other = Agent::new(9, &site.manifest(1));
    let report = other.report();
    other.send(&server, &report).await;
    let approve = async |name: &str| {
        let body = json!({ "name": name, "role": "lab" });
        server.order("POST", &format!("machines/{}/approve", machine_id(9)), body).await
    };
    let refused = approve(&meant).await;
    assert!(refused.status.is_client_error() && refused.text().contains("and no UUID"), "{}", refused.text());
    assert_eq!(approve("rack-2").await.status, StatusCode::OK);
    let done = server.with(&ben, "POST", &format!("pending/{id}/confirm"), json!({})).await;
    assert_eq!(done.status, StatusCode::OK, "{}", done.text());
    assert_eq!(server.machine("rack-1").await.id, machine_id(2));
    assert_eq!(server.machine("rack-2").await.id, machine_id(9));

    // What cannot be done any more when it is confirmed is not done.
    let asked = server.with(&ann, "POST", "machines/rack-1/replace", json!({ "with": machine_id(1) })).await;
    let id = asked.json()["pending"]["id"].as_str().unwrap().to_owned();
    server.order("POST", &format!("machines/{}/approve", machine_id(1)), json!({ "name": "old", "role": "lab" })).await;
    let late = server.with(&ben, "POST", &format!("pending/{id}/confirm"), json!({})).await;
    assert!(late.text().contains("old is in service"), "{}", late.text());
    assert_eq!(server.machine("rack-1").await.id, machine_id(2));
}

#[tokio::test]
async fn a_person_changes_few_machines_alone() {
    let site = TestSite::new();
    site.configure("[access]\nassign_alone = 2");
    let server = Server::start(&site).await;
    for n in 1..=3 {
        let mut agent = Agent::new(n, &site.manifest(1));
        let report = agent.healthy();
        agent.send(&server, &report).await;
    }
    let ann = server.token("ann", "operator").await;
    let body = json!({ "image": "minimal", "release": 1, "via": "kexec" });
    let assign =
        async |n: u8| server.with(&ann, "PUT", &format!("machines/rack-{n}/assignment"), body.clone()).await.status;
    assert_eq!((assign(1).await, assign(2).await, assign(1).await), (StatusCode::OK, StatusCode::OK, StatusCode::OK));
    assert_eq!(assign(3).await, StatusCode::ACCEPTED);
    let ben = server.token("ben", "operator").await;
    let other = server.with(&ben, "PUT", "machines/rack-3/assignment", body.clone()).await;
    assert_eq!(other.status, StatusCode::OK);
}
