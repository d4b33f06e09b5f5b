//! A boot server in an attacker's hands: it has the agent API's TLS key, answers every report with what a test gives
//! it, and writes down what it hears. Its answers are signed by whichever key the test chooses.

use super::door::Door;
use kiln_protocol::{
    ASSIGNMENT_TYPE, Architecture, Assignment, BoundMachine, Decision, Desired, FRESHNESS_TYPE, Freshness, Grant,
    ORDER_TYPE, Order, OrderAction, OrderGiven, OrderedMachine, REPORT_PATH, Reply, Report, SPEC_VERSION, StageState,
    Via, WipeMethod,
};
use kiln_release::certificate::certificate_key_id;
use kiln_release::{Signer, sign_envelope};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, ServerConnection, SignatureScheme, StreamOwned};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// What the attacker answers: made of the report and of the client's key id.
type Answer = Box<dyn FnMut(&Report, &str) -> Reply + Send>;

/// The running server.
pub struct Hostile {
    pub url: String,
    pub heard: Arc<Mutex<Vec<Report>>>,
    /// Told at each report.
    came: Arc<Condvar>,
    answer: Arc<Mutex<Answer>>,
    /// What stands in each answer besides: an object's members, in the answer and in what it says is desired.
    besides: Arc<Mutex<Value>>,
    _door: Door,
}

impl Hostile {
    /// Serves on a free loopback port with the site's stolen TLS key.
    pub fn start(site: &Path, answer: impl FnMut(&Report, &str) -> Reply + Send + 'static) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), site, answer)
    }

    /// The same in the place of the boot server itself, until it is dropped.
    pub fn start_at(at: SocketAddr, site: &Path, answer: impl FnMut(&Report, &str) -> Reply + Send + 'static) -> Self {
        let config = Arc::new(tls(site));
        let heard = Arc::new(Mutex::new(Vec::new()));
        let came = Arc::new(Condvar::new());
        let answer: Arc<Mutex<Answer>> = Arc::new(Mutex::new(Box::new(answer)));
        let besides = Arc::new(Mutex::new(Value::Null));
        let (reports, told, how) = (Arc::clone(&heard), Arc::clone(&came), Arc::clone(&answer));
        let more = Arc::clone(&besides);
        let door = Door::open(at, move |stream| serve(stream, Arc::clone(&config), (&reports, &told), &how, &more));
        Self { url: format!("https://{}", door.address), heard, came, answer, besides, _door: door }
    }

    /// Waits until a failure of this kind was reported, also one of before.
    #[track_caller]
    pub fn wait_failure(&self, kind: &str, at_most: Duration) {
        let end = Instant::now() + at_most;
        while !self.failures().iter().any(|known| known == kind) {
            let left = end.checked_duration_since(Instant::now());
            let left = left.unwrap_or_else(|| panic!("{kind} was not reported: {:?}", self.failures()));
            let heard = self.heard.lock().unwrap();
            // It may have come between the look and the lock: no wait is longer than a moment.
            drop(self.came.wait_timeout(heard, left.min(Duration::from_millis(500))).unwrap());
        }
    }

    /// The machine's last boot must have told it of this failure. What was heard is forgotten: the next boot says its own.
    #[track_caller]
    pub fn told(&self, kind: &str) {
        let failures = self.failures();
        assert!(failures.iter().any(|known| known == kind), "{kind} was not reported: {failures:?}");
        self.heard.lock().unwrap().clear();
    }

    /// Answers differently from now on.
    pub fn answer(&self, answer: impl FnMut(&Report, &str) -> Reply + Send + 'static) {
        *self.answer.lock().unwrap() = Box::new(answer);
    }

    /// Says this besides from now on; null: nothing.
    pub fn besides(&self, members: Value) {
        *self.besides.lock().unwrap() = members;
    }

    /// Kinds of all failures heard so far.
    pub fn failures(&self) -> Vec<String> {
        let heard = self.heard.lock().unwrap();
        let stages = heard.iter().flat_map(|r| &r.stages);
        stages
            .filter_map(|s| match &s.state {
                StageState::Failed(f) => Some(f.kind.clone()),
                StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
            })
            .collect()
    }
}

fn serve(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    (heard, came): (&Mutex<Vec<Report>>, &Condvar),
    answer: &Mutex<Answer>,
    besides: &Mutex<Value>,
) {
    let Ok(connection) = ServerConnection::new(config) else { return };
    let mut stream = BufReader::new(StreamOwned::new(connection, stream));
    loop {
        let (mut length, mut to) = (0, None);
        loop {
            let mut line = String::new();
            if !matches!(stream.read_line(&mut line), Ok(1..)) {
                return;
            }
            to.get_or_insert_with(|| line.split(' ').nth(1).unwrap_or_default().to_owned());
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        if to.as_deref() != Some(REPORT_PATH) {
            // Log lines, an introduction: this server knows only reports.
            let out = stream.get_mut();
            if out.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").and_then(|()| out.flush()).is_err()
            {
                return;
            }
            continue;
        }
        let report: Report = serde_json::from_slice(&body).expect("the agent sends reports");
        let certificates = stream.get_ref().conn.peer_certificates().expect("the client must prove its key");
        let key = certificate_key_id(&certificates[0]).unwrap();
        let mut reply = serde_json::to_value(answer.lock().unwrap()(&report, &key)).unwrap();
        for (name, value) in besides.lock().unwrap().as_object().into_iter().flatten() {
            reply[name.as_str()] = value.clone();
            reply["desired"][name.as_str()] = value.clone();
        }
        let reply = reply.to_string();
        heard.lock().unwrap().push(report);
        came.notify_all();
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", reply.len());
        let out = stream.get_mut();
        if out.write_all(format!("{head}{reply}").as_bytes()).and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

fn tls(site: &Path) -> ServerConfig {
    let chain =
        CertificateDer::pem_file_iter(site.join("online/agent-server.pem")).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(site.join("online/agent-server.key")).unwrap();
    let provider = Arc::new(ring::default_provider());
    ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(AnyClient(provider)))
        .with_single_cert(chain, key)
        .unwrap()
}

/// Any certificate, as long as the client holds its key.
#[derive(Debug)]
struct AnyClient(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The director's key of a site: stolen together with the boot server.
pub fn director_key(site: &Path) -> Signer {
    Signer::from_pkcs8_pem(&std::fs::read_to_string(site.join("online/director.key")).unwrap()).unwrap()
}

/// What a director's answer is made of; tests change one part.
pub struct Forgery {
    pub assignment: Assignment,
    pub signer: Signer,
    /// Applied to the text of the assignment's envelope before it is hashed.
    pub damage: fn(String) -> String,
    /// Applied to the freshness statement before it is signed.
    pub freshness: fn(&mut Freshness),
    pub via: Via,
}

impl Forgery {
    /// The honest answer: this machine, `release` of the image, in force.
    pub fn honest(site: &Path, report: &Report, key: &str, release: u64) -> Self {
        let manifest = std::fs::read(site.join(format!("build/minimal/{release}/manifest.json"))).unwrap();
        Self {
            assignment: Assignment {
                type_: ASSIGNMENT_TYPE.into(),
                spec_version: SPEC_VERSION.into(),
                machine: BoundMachine { id: report.machine.id.clone(), key: key.parse().unwrap() },
                image: "minimal".parse().unwrap(),
                release,
                manifest_sha256: sha256(&manifest).parse().unwrap(),
                role: "lab".into(),
                arch: Architecture::X86_64,
                sequence: 5,
                rebuild: 0,
                settings: kiln_protocol::RoleSettings::default(),
                issued: now(),
                expires: now() + jiff::SignedDuration::from_hours(24),
            },
            signer: director_key(site),
            damage: |text| text,
            freshness: |_| {},
            via: Via::Cold,
        }
    }

    /// Signs and packs it as a reply to `report`.
    pub fn reply(self, report: &Report) -> Reply {
        let assignment = (self.damage)(envelope(&self.assignment, &self.signer));
        let mut freshness = freshness(report, &assignment);
        (self.freshness)(&mut freshness);
        let decision = Decision::Assigned {
            assignment,
            freshness: envelope(&freshness, &self.signer),
            via: self.via,
            grant: Grant::Go,
        };
        bare(decision)
    }
}

/// A reply that says this and nothing else.
pub fn bare(decision: Decision) -> Reply {
    Reply {
        desired: Desired { etag: "1".into(), decision, order: None },
        again_ms: 1000,
        may_wait: false,
        about: None,
        thresholds: std::collections::BTreeMap::new(),
        dbx: None,
        attest: false,
        secrets: None,
        certify: false,
    }
}

/// An order to wipe every disk of whoever asks, signed by `signer`, who is no operator.
pub fn wipe_order(report: &Report, key: &str, signer: &Signer) -> OrderGiven {
    let action = OrderAction::Wipe { disks: Vec::new(), method: WipeMethod::Best };
    ordered(report, key, action, signer, signer)
}

/// An order to whoever asks, signed by `operator`, and handed on by `director`.
pub fn ordered(report: &Report, key: &str, action: OrderAction, operator: &Signer, director: &Signer) -> OrderGiven {
    let order = Order {
        type_: ORDER_TYPE.into(),
        spec_version: SPEC_VERSION.into(),
        id: "ab".repeat(16).parse().unwrap(),
        machines: vec![OrderedMachine { id: report.machine.id.clone(), key: Some(key.parse().unwrap()) }],
        action,
        issued: now(),
        expires: now() + jiff::SignedDuration::from_hours(24),
    };
    let order = envelope(&order, operator);
    let freshness = envelope(&freshness(report, &order), director);
    OrderGiven { order, freshness }
}

/// What the director says of this document now.
fn freshness(report: &Report, document: &str) -> Freshness {
    Freshness {
        type_: FRESHNESS_TYPE.into(),
        spec_version: SPEC_VERSION.into(),
        nonce: report.nonce.clone(),
        assignment_sha256: sha256(document.as_bytes()).parse().unwrap(),
        now: now(),
    }
}

fn envelope<T: serde::Serialize>(document: &T, signer: &Signer) -> String {
    sign_envelope(document, &[signer]).unwrap()
}

fn now() -> jiff::Timestamp {
    jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap()
}

/// By coreutils: these bytes decide what a test means, so another implementation counts them.
pub fn sha256(bytes: &[u8]) -> String {
    use std::process::{Command, Stdio};
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let out = child.wait_with_output().unwrap();
    String::from_utf8(out.stdout).unwrap()[..64].to_owned()
}
