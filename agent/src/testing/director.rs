//! A boot server's agent API: takes reports over TLS, answers with what the test wants of the machine, and holds a report
//! like the real one until that changes.

use super::{IMAGE, TestSite, now};
use kiln_protocol::{
    ASSIGNMENT_TYPE, Assignment, BoundMachine, Decision, Desired, FRESHNESS_TYPE, Freshness, Grant, OrderGiven, Reply,
    Report, RoleSettings, SPEC_VERSION, Via,
};
use kiln_release::certificate::{spki_der, spki_key_id};
use kiln_release::{Signer, hex, sign_envelope};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{HandshakeKind, ServerConfig, ServerConnection, StreamOwned};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// What is wanted of the machine: release, sequence, how to go there, and whether it may go once it is ready.
pub type Order = (u64, u64, Via, bool);

/// Clears a terminal, and says on a line of its own what the agent never said.
pub const STEERS: &str = "\u{1b}[2J\r\nkiln-agent: approval code AAAA-AAAA";

/// How the line to it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    Whole,
    /// Reports arrive, replies do not.
    LosesReplies,
    /// Nothing arrives.
    Dead,
    /// Replies are no JSON.
    Garbles,
    /// Replies are of no known kind, and name it [`STEERS`].
    Steers,
    /// Somebody between changes what the role selects, and adds thresholds beside what is signed.
    Forges,
}

struct State {
    order: Order,
    line: Line,
    heard: Vec<(Instant, Report)>,
    /// Of each connection: whether it went on from the session of another.
    resumed: Vec<bool>,
    /// An operator's order that is handed on.
    given: Option<String>,
    /// Sequence from which on the release has to be fetched anew.
    rebuild: u64,
    /// The role's thresholds, signed.
    thresholds: BTreeMap<String, String>,
}

/// The running server.
pub struct Director {
    pub url: String,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    signer: Signer,
    /// SHA-256 of each release's manifest.
    manifests: Vec<(u64, String)>,
    machine: String,
}

impl Director {
    pub fn start(site: &TestSite, order: Order) -> Self {
        Self::start_on(super::listen(), site, order)
    }

    /// On a port that is open already.
    pub fn start_on((listener, address): (TcpListener, SocketAddr), site: &TestSite, order: Order) -> Self {
        let [_, certificate, key] = &site.tls;
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let config = Arc::new(config);
        let machine = Signer::from_seed(&site.machine_key);
        let manifests = site.manifests.iter();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                order,
                line: Line::Whole,
                heard: Vec::new(),
                resumed: Vec::new(),
                given: None,
                rebuild: 0,
                thresholds: BTreeMap::new(),
            }),
            changed: Condvar::new(),
            signer: Signer::from_seed(&[6; 32]),
            manifests: manifests.map(|(n, m)| (*n, hex::sha256(&serde_json::to_vec(m).unwrap()))).collect(),
            machine: spki_key_id(&spki_der(&machine)),
        });
        let url = format!("https://{address}");
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, shared) = (Arc::clone(&config), Arc::clone(&theirs));
                std::thread::spawn(move || connection(stream, config, &shared));
            }
        });
        Self { url, shared }
    }

    /// Wants something else from now on: held reports are answered.
    pub fn order(&self, order: Order) {
        self.shared.state.lock().unwrap().order = order;
        self.shared.changed.notify_all();
    }

    /// Wants what it wants, and fetched anew from this sequence on.
    pub fn rebuild(&self, order: Order) {
        let mut state = self.shared.state.lock().unwrap();
        (state.rebuild, state.order) = (order.1, order);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// The role sets this threshold from now on; it comes with the next order.
    pub fn threshold(&self, name: &str, value: &str) {
        self.shared.state.lock().unwrap().thresholds.insert(name.to_owned(), value.to_owned());
    }

    /// Hands on an operator's order from now on, whatever it is.
    pub fn give(&self, order: Option<String>) {
        self.shared.state.lock().unwrap().given = order;
        self.shared.changed.notify_all();
    }

    /// The line is so from now on; what is held is let go.
    pub fn line(&self, line: Line) {
        self.shared.state.lock().unwrap().line = line;
        self.shared.changed.notify_all();
    }

    /// Waits for a report that came after `since` and satisfies `wanted`.
    #[track_caller]
    pub fn wait(&self, what: &str, since: Instant, within: Duration, wanted: impl Fn(&Report) -> bool) -> Report {
        let until = Instant::now() + within;
        let mut state = self.shared.state.lock().unwrap();
        loop {
            if let Some((_, report)) = state.heard.iter().find(|(at, report)| *at >= since && wanted(report)) {
                return report.clone();
            }
            let left = until.saturating_duration_since(Instant::now());
            let last = state.heard.last().map(|(_, report)| (&report.health, &report.prefetch, &report.stages));
            assert!(!left.is_zero(), "no report {what} within {within:?}; the last: {last:#?}");
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Waits until so many reports came.
    pub fn wait_for(&self, reports: usize, within: Duration) {
        let state = self.shared.state.lock().unwrap();
        let (_state, late) =
            self.shared.changed.wait_timeout_while(state, within, |state| state.heard.len() < reports).unwrap();
        assert!(!late.timed_out(), "not {reports} reports within {within:?}");
    }

    /// All that was reported so far.
    pub fn heard(&self) -> Vec<Report> {
        self.shared.state.lock().unwrap().heard.iter().map(|(_, report)| report.clone()).collect()
    }

    /// Of each connection on which something was asked, whether it went on from the session of another.
    pub fn resumed(&self) -> Vec<bool> {
        self.shared.state.lock().unwrap().resumed.clone()
    }
}

fn connection(stream: TcpStream, config: Arc<ServerConfig>, shared: &Shared) {
    let connection = ServerConnection::new(config).unwrap();
    let mut stream = BufReader::new(StreamOwned::new(connection, stream));
    if !matches!(stream.fill_buf(), Ok([_, ..])) {
        return;
    }
    let kind = stream.get_ref().conn.handshake_kind();
    shared.state.lock().unwrap().resumed.push(kind == Some(HandshakeKind::Resumed));
    loop {
        let (mut length, mut line) = (0, String::new());
        while line != "\r\n" {
            line.clear();
            if !matches!(stream.read_line(&mut line), Ok(1..)) {
                return;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        let report: Report = serde_json::from_slice(&body).expect("the agent sends reports");
        let Some(reply) = shared.answer(&report) else { return };
        let mut reply = serde_json::to_value(&reply).unwrap();
        let line = shared.state.lock().unwrap().line;
        let body = match line {
            Line::Garbles => "{\"desired\":".to_owned(),
            Line::Steers => {
                reply["desired"]["decision"] = STEERS.into();
                reply.to_string()
            }
            Line::Whole | Line::LosesReplies | Line::Dead | Line::Forges => reply.to_string(),
        };
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let out = stream.get_mut();
        if out.write_all(answer.as_bytes()).and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

impl Shared {
    fn answer(&self, report: &Report) -> Option<Reply> {
        let mut state = self.state.lock().unwrap();
        if state.line == Line::Dead {
            return None;
        }
        state.heard.push((Instant::now(), report.clone()));
        self.changed.notify_all();
        let until = Instant::now() + Duration::from_secs(report.wait_s.into());
        loop {
            match state.line {
                Line::Whole | Line::Garbles | Line::Steers | Line::Forges => {}
                Line::LosesReplies | Line::Dead => return None,
            }
            let reply = self.reply(report, &state);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || reply.desired.etag != report.desired_etag {
                return Some(reply);
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    fn reply(&self, report: &Report, state: &State) -> Reply {
        let (release, sequence, via, may_go) = state.order;
        let manifest = &self.manifests.iter().find(|(n, _)| *n == release).unwrap().1;
        let assignment = Assignment {
            type_: ASSIGNMENT_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            machine: BoundMachine { id: report.machine.id.clone(), key: self.machine.parse().unwrap() },
            image: IMAGE.parse().unwrap(),
            release,
            manifest_sha256: manifest.parse().unwrap(),
            role: "lab".into(),
            arch: report.machine.arch,
            sequence,
            rebuild: state.rebuild,
            settings: RoleSettings { thresholds: state.thresholds.clone(), ..RoleSettings::default() },
            issued: now(),
            expires: now() + jiff::SignedDuration::from_hours(1),
        };
        let mut assignment = sign_envelope(&assignment, &[&self.signer]).unwrap();
        if state.line == Line::Forges {
            let forged = r#""settings":{"boot_first":"network"},"spec_version""#;
            assignment = assignment.replacen(r#""spec_version""#, forged, 1);
        }
        // Over exactly the bytes of what it goes with.
        let fresh = |text: &str| {
            let freshness = Freshness {
                type_: FRESHNESS_TYPE.into(),
                spec_version: SPEC_VERSION.into(),
                nonce: report.nonce.clone(),
                assignment_sha256: hex::sha256(text.as_bytes()).parse().unwrap(),
                now: now(),
            };
            sign_envelope(&freshness, &[&self.signer]).unwrap()
        };
        let freshness = fresh(&assignment);
        let ready = report.prefetch.as_ref().is_some_and(|p| p.ready && p.sequence == sequence);
        let grant =
            if ready && may_go { Grant::Go } else { Grant::Hold { reason: "the test says so".into(), until_ms: None } };
        let etag = format!("{release}-{sequence}-{via}-{}", grant == Grant::Go);
        let decision = Decision::Assigned { assignment, freshness, via, grant };
        let order = state.given.as_ref().map(|order| OrderGiven { order: order.clone(), freshness: fresh(order) });
        let etag = format!("{etag}-{}", order.as_ref().map_or(String::new(), |o| hex::sha256(o.order.as_bytes())));
        let desired = Desired { etag, decision, order };
        Reply {
            desired,
            again_ms: 1000,
            may_wait: true,
            about: None,
            thresholds: match state.line {
                Line::Forges => [("forged".to_owned(), "10%".to_owned())].into(),
                Line::Whole | Line::LosesReplies | Line::Dead | Line::Garbles | Line::Steers => BTreeMap::new(),
            },
            dbx: None,
            attest: false,
            secrets: None,
            certify: false,
        }
    }
}
