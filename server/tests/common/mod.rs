//! A real `kiln serve` on loopback with small releases in place of built ones, and machines that report to it.
#![allow(dead_code)]

pub mod chip;
#[path = "../../../images/tests/oracle/mod.rs"]
pub mod oracle;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use kiln_images::{Memory, SiteDir, init_lab};
use kiln_protocol::*;
use kiln_release::certificate::self_signed_certificate;
use kiln_release::verity::{BLOCK, TreeBuilder};
use kiln_release::{
    Artifact, FilePolicy, HealthCheck, HealthKind, MANIFEST_TYPE, Manifest, Measured, Signer, VerityParams,
    WantedSecret, hex,
};
use kiln_server::catalog::Catalog;
use kiln_server::config::Config;
use kiln_server::control::Control;
use kiln_server::store::Store;
use kiln_server::view::MachineView;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Nothing here takes so long unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What `kiln image build` leaves.
pub fn build(site: &SiteDir, release: u64) -> Manifest {
    build_wanting(site, release, vec![])
}

/// A release that wants these secrets.
pub fn build_wanting(site: &SiteDir, release: u64, secrets: Vec<WantedSecret>) -> Manifest {
    let folder = site.build("minimal", release);
    fs::create_dir_all(&folder).unwrap();
    let mut tree = TreeBuilder::new(b"salt", [1; 16]).unwrap();
    let blocks = [[u8::try_from(release).unwrap(); BLOCK]; 3];
    for block in &blocks {
        tree.push_block(block);
    }
    let tree = tree.finish().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        fs::write(folder.join(name), bytes).unwrap();
        Artifact { sha256: hex::sha256(bytes), length: bytes.len() as u64 }
    };
    let text = |what: &str| format!("{what} of minimal/{release}").into_bytes();
    let manifest = Manifest {
        type_: MANIFEST_TYPE.into(),
        spec_version: "1.0".into(),
        image: "minimal".into(),
        release,
        class: "normal".into(),
        architecture: "x86_64".into(),
        product: "generic".into(),
        built: "2026-01-01T00:00:00Z".parse().unwrap(),
        uki: file("kiln.efi", &text("uki")),
        kernel: file("kernel", &text("kernel")),
        kexec_kernel: None,
        initramfs: file("initramfs", &text("initramfs")),
        extra: None,
        root: file("root", &[blocks.concat(), tree.hash_area].concat()),
        verity: VerityParams {
            root_hash: hex::encode(&tree.root_hash),
            salt: hex::encode(b"salt"),
            data_blocks: 3,
            hash_offset: (3 * BLOCK) as u64,
        },
        command_line: "console=ttyS0".into(),
        policy: FilePolicy::default(),
        hooks: BTreeMap::new(),
        health: vec![HealthCheck::of(HealthKind::Systemd, 5)],
        writable: vec![],
        sbom: None,
        secrets,
        measured: Some(measured(release)),
        role_may_report: Some(false),
    };
    fs::write(folder.join("manifest.json"), serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    manifest
}

/// What a TPM measures of such a release.
pub fn measured(release: u64) -> Measured {
    let parts: [u8; 32] = hex::decode(&hex::sha256(format!("parts {release}").as_bytes())).unwrap().try_into().unwrap();
    let pcr11 = hex::encode(&kiln_release::measured::extend(&[0; 32], &parts));
    let [uki, kernel] = ["uki", "kernel"].map(|what| hex::sha256(format!("{what} {release}").as_bytes()));
    Measured { pcr11, uki, kernel, loader: None, certificate: Some(hex::sha256(b"site")), kexec: None }
}

pub struct TestSite {
    pub dir: tempfile::TempDir,
    pub site: SiteDir,
}

impl TestSite {
    /// With release 1 published, and machines 1 to 3 on the pre-loaded list.
    pub fn new() -> Self {
        let this = Self::made_by(|dir| init_lab(dir, "test", Timestamp::now()).unwrap());
        this.publish(1);
        this
    }

    /// With those machines, and as `init` makes it in an empty folder.
    pub fn made_by(init: impl FnOnce(&Path) -> SiteDir) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let site = init(dir.path());
        let this = Self { dir, site };
        let mut config = String::from(
            "[http]\nlisten = \"127.0.0.1:0\"\n[agent_api]\nlisten = \"127.0.0.1:0\"\n[dhcp]\nmode = \"off\"\n\
             [tftp]\nlisten = \"127.0.0.1:0\"\n[[role]]\nname = \"lab\"\nimage = \"minimal\"\n",
        );
        for n in 1..=3 {
            let _ = writeln!(config, "[[machine]]\nid = \"{}\"\nname = \"rack-{n}\"\nrole = \"lab\"", machine_id(n));
        }
        fs::write(this.path().join("kiln.toml"), config).unwrap();
        this
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// More of kiln.toml.
    pub fn configure(&self, more: &str) {
        let file = self.path().join("kiln.toml");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(file, format!("{text}{more}\n")).unwrap();
    }

    /// The program on this site, or elsewhere: exit code, standard output, standard error.
    pub fn kiln(&self, arguments: &[&str]) -> (bool, String, String) {
        let mut kiln = Command::new(env!("CARGO_BIN_EXE_kiln"));
        let output = kiln.args(arguments).current_dir(self.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    }

    pub fn publish(&self, release: u64) -> Manifest {
        let manifest = build(&self.site, release);
        kiln_images::publish(self.path(), "minimal", release, Timestamp::now()).unwrap();
        manifest
    }

    pub fn publish_wanting(&self, release: u64, secrets: &[&str]) -> Manifest {
        let want = |name: &&str| WantedSecret { name: (*name).into(), owner: None, required: true, units: vec![] };
        let manifest = build_wanting(&self.site, release, secrets.iter().map(want).collect());
        kiln_images::publish(self.path(), "minimal", release, Timestamp::now()).unwrap();
        manifest
    }

    /// The same, with another manifest.
    pub fn publish_as(&self, release: u64, change: impl FnOnce(&mut Manifest)) -> Manifest {
        let mut manifest = build(&self.site, release);
        change(&mut manifest);
        let path = self.site.build("minimal", release).join("manifest.json");
        fs::write(path, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
        kiln_images::publish(self.path(), "minimal", release, Timestamp::now()).unwrap();
        manifest
    }

    pub fn manifest(&self, release: u64) -> Manifest {
        let path = self.site.build("minimal", release).join("manifest.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    pub fn signed_site(&self) -> kiln_release::Site {
        kiln_images::Repository::newest(&self.site, Timestamp::now()).unwrap().site
    }

    /// Version of the newest snapshot.
    pub fn snapshot(&self) -> u64 {
        kiln_images::Repository::newest(&self.site, Timestamp::now()).unwrap().snapshot
    }

    pub fn online(&self, name: &str) -> Vec<u8> {
        fs::read(self.path().join("online").join(name)).unwrap()
    }
}

pub fn machine_id(n: u8) -> MachineId {
    format!("00000000-0000-0000-0000-0000000000{n:02x}").parse().unwrap()
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }
}

pub async fn call<S>(stream: S, method: &str, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    try_call(stream, method, path, headers, body).await.unwrap()
}

pub async fn try_call<S>(
    stream: S,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> Result<Answer, hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut request = Request::builder().method(Method::from_bytes(method.as_bytes()).unwrap()).uri(path);
    request = request.header("host", "kiln").header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap()).await?;
    let (status, headers) = (response.status(), response.headers().clone());
    let body = response.into_body().collect().await?.to_bytes().to_vec();
    Ok(Answer { status, headers, body })
}

pub struct Server {
    pub child: Child,
    pub http: SocketAddr,
    pub agent: SocketAddr,
    pub socket: PathBuf,
    /// Where people and programs are served over TLS, if they are.
    pub https: Option<SocketAddr>,
    ca: Vec<u8>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts the program and waits until it answers.
    pub async fn start(site: &TestSite) -> Self {
        let log = fs::File::options().create(true).append(true).open(site.path().join("log")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["serve", "--log", "text", "--site"])
            .arg(site.path())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let socket = site.path().join("state/kiln.sock");
        let begun = Instant::now();
        let status = loop {
            if let Ok(stream) = UnixStream::connect(&socket).await
                && let Ok(answer) = try_call(stream, "GET", "/api/v1/status", &[], vec![]).await
            {
                break answer.json();
            }
            let log = || fs::read_to_string(site.path().join("log")).unwrap();
            assert!(child.try_wait().unwrap().is_none(), "it ended: {}", log());
            assert!(begun.elapsed() < PATIENCE, "it does not answer: {}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let address = |what: &str| -> SocketAddr {
            let lines = status["listening"].as_array().unwrap();
            let line = lines.iter().find(|l| l["what"] == what).unwrap();
            line["address"].as_str().unwrap().parse().unwrap()
        };
        let lines = status["listening"].as_array().unwrap();
        let https =
            lines.iter().find(|l| l["what"] == "HTTPS").map(|l| l["address"].as_str().unwrap().parse().unwrap());
        let (http, agent, ca) = (address("HTTP"), address("agent API"), site.online("agent-ca.pem"));
        Self { child, http, agent, socket, https, ca }
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    pub async fn http(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        call(TcpStream::connect(self.http).await.unwrap(), method, path, headers, vec![]).await
    }

    pub async fn order(&self, method: &str, path: &str, body: Value) -> Answer {
        let stream = UnixStream::connect(&self.socket).await.unwrap();
        call(stream, method, &format!("/api/v1/{path}"), &[], body.to_string().into_bytes()).await
    }

    /// With a token, over this host's plain HTTP.
    pub async fn with(&self, token: &str, method: &str, path: &str, body: Value) -> Answer {
        let stream = TcpStream::connect(self.http).await.unwrap();
        let bearer = format!("Bearer {token}");
        let body = body.to_string().into_bytes();
        call(stream, method, &format!("/api/v1/{path}"), &[("authorization", &bearer)], body).await
    }

    /// A new token's text.
    pub async fn token(&self, name: &str, role: &str) -> String {
        let answer = self.order("POST", "tokens", json!({ "name": name, "role": role })).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        answer.json()["text"].as_str().unwrap().to_owned()
    }

    /// Over TLS, as a browser or program that trusts the site's CA.
    pub async fn https(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Value) -> Answer {
        let stream = TcpStream::connect(self.https.unwrap()).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.tls(None)));
        let stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
        call(stream, method, path, headers, body.to_string().into_bytes()).await
    }

    /// What the audit log says, oldest first.
    pub async fn audit(&self) -> Vec<kiln_server::audit::Record> {
        let answer = self.order("GET", "audit/records", Value::Null).await;
        serde_json::from_slice(&answer.body).unwrap()
    }

    pub async fn machine(&self, name: &str) -> MachineView {
        let answer = self.http("GET", &format!("/api/v1/machines/{name}"), &[]).await;
        serde_json::from_value(answer.json()).unwrap()
    }

    pub async fn assign(&self, name: &str, release: u64) {
        let answer = self.try_assign(name, release).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }

    pub async fn try_assign(&self, name: &str, release: u64) -> Answer {
        let body = json!({ "image": "minimal", "release": release, "via": "kexec" });
        self.order("PUT", &format!("machines/{name}/assignment"), body).await
    }

    /// A TLS client as the agent's; with `identity` as its certificate and key.
    pub fn tls(&self, identity: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&self.ca).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        match identity {
            Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
            None => builder.with_no_client_auth(),
        }
    }

    pub async fn post(&self, config: ClientConfig, body: Vec<u8>) -> Result<Answer, Box<dyn std::error::Error>> {
        self.post_to(REPORT_PATH, config, body).await
    }

    pub async fn post_to(
        &self,
        path: &str,
        config: ClientConfig,
        body: Vec<u8>,
    ) -> Result<Answer, Box<dyn std::error::Error>> {
        let stream = TcpStream::connect(self.agent).await?;
        let name = ServerName::try_from(kiln_release::AGENT_API_NAME)?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        Ok(try_call(stream, "POST", path, &[], body).await?)
    }
}

/// Waits until the server's status is so.
pub async fn until(server: &Server, done: impl Fn(&Value) -> bool) {
    let begun = Instant::now();
    while !done(&server.http("GET", "/api/v1/status", &[]).await.json()) {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A machine's agent, as far as the server can tell.
#[derive(Clone)]
pub struct Agent {
    pub n: u8,
    pub signer: Arc<Signer>,
    pub boot: u32,
    pub seq: u64,
    pub embedded: RunningRelease,
    pub storage: KeyStorage,
}

impl Agent {
    pub fn new(n: u8, manifest: &Manifest) -> Self {
        let embedded = running(manifest);
        let signer = Arc::new(Signer::from_seed(&[n; 32]));
        Self { n, signer, boot: 1, seq: 0, embedded, storage: KeyStorage::EfiVariable }
    }

    pub fn identity(&self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = PrivateKeyDer::Pkcs8(self.signer.pkcs8_der().into());
        (self_signed_certificate(&self.signer).into(), key)
    }

    pub fn key_id(&self) -> KeyId {
        kiln_release::certificate::certificate_key_id(&self_signed_certificate(&self.signer)).unwrap().parse().unwrap()
    }

    pub fn restart(&mut self, manifest: &Manifest) {
        self.boot += 1;
        self.seq = 0;
        self.embedded = running(manifest);
    }

    pub fn report(&mut self) -> Report {
        self.seq += 1;
        Report {
            boot_id: format!("boot-{}-{}", self.n, self.boot),
            seq: self.seq,
            machine: MachineFacts {
                id: machine_id(self.n),
                macs: vec![format!("52:54:00:00:00:{:02x}", self.n)],
                product: "Test".into(),
                serial: "1".into(),
                firmware: Firmware::Uefi,
                arch: Architecture::X86_64,
                key_storage: self.storage,
                rollback_memory: RollbackMemory::EfiVariable,
                protection: ProtectionClass::Unprotected,
                memory_bytes: 1 << 30,
                tpm: None,
            },
            nonce: format!("{:062x}{:02x}", self.seq, self.n).parse().unwrap(),
            embedded: self.embedded.clone(),
            running: None,
            stages: vec![StageRecord { stage: Stage::Start, state: StageState::Done, at_ms: 1 }],
            at_ms: self.seq * 10,
            health: None,
            prefetch: None,
            fallback: None,
            agent_memory: None,
            exec: None,
            dbx: None,
            condition: None,
            acceptance: None,
            secrets: None,
            stale: None,
            wait_s: 0,
            desired_etag: String::new(),
        }
    }

    pub fn healthy(&mut self) -> Report {
        let health = Some(Health { healthy: true, detail: String::new() });
        Report { running: Some(self.embedded.clone()), health, ..self.report() }
    }

    /// Healthy, and ready for the assignment of this sequence.
    pub fn ready(&mut self, release: u64, sequence: u64) -> Report {
        let image = self.embedded.image.clone();
        Report { prefetch: Some(Prefetch { image, release, sequence, ready: true, progress: None }), ..self.healthy() }
    }

    pub async fn send(&self, server: &Server, report: &Report) -> Reply {
        let body = serde_json::to_vec(report).unwrap();
        let answer = server.post(server.tls(Some(self.identity())), body).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }
}

pub fn running(m: &Manifest) -> RunningRelease {
    RunningRelease {
        image: m.image.parse().unwrap(),
        release: m.release,
        root_hash: m.verity.root_hash.parse().unwrap(),
    }
}

/// What an assigned reply carries.
pub fn assigned(reply: &Reply) -> (&str, &str, &Grant) {
    match &reply.desired.decision {
        Decision::Assigned { assignment, freshness, via: _, grant } => (assignment, freshness, grant),
        Decision::Wait { reason } => panic!("must be assigned, but: {reason}"),
    }
}

pub fn waits(reply: &Reply) -> &str {
    match &reply.desired.decision {
        Decision::Wait { reason } => reason,
        Decision::Assigned { .. } => panic!("must wait"),
    }
}

/// The fleet's control without sockets and without a clock, on the site's real store and repository.
pub async fn control(test: &TestSite) -> (Arc<Control>, tokio::sync::watch::Sender<bool>) {
    let site = SiteDir::open(test.path()).unwrap();
    let (config, _) = Config::load(test.path(), None).unwrap();
    let _ = site.lock_state().unwrap();
    let (store, _writer) = Store::open(&site.database()).await.unwrap();
    let keys = site.timestamp_keys().unwrap();
    let catalog = Catalog::adopt(&site, &keys, &Memory::default(), Timestamp::now()).unwrap();
    let director = site.director_key(&catalog.site).unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let control = Control::load(store, site, config, director, catalog, stopped).await.unwrap();
    tokio::spawn(kiln_server::looks::looks(control.clone()));
    (control, stop)
}
