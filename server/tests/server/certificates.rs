//! Certificates of machines against a running `kiln serve`: who gets one, what ends it, and what other people's programs make of
//! both (`openssl`, nginx, curl).

use crate::common::chip::boot_id;
use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::*;
use kiln_release::{CertificatePolicy, Manifest, WantedCertificate, hex};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

pub fn wanting(policy: CertificatePolicy) -> impl FnOnce(&mut Manifest) {
    let wanted = WantedCertificate { owner: None, required: true, units: vec![], policy };
    move |manifest| manifest.certificate = Some(wanted)
}

/// A site whose release 2 wants a certificate, a server, and a machine that runs it.
async fn rack(policy: CertificatePolicy) -> (TestSite, Server, Agent) {
    let site = TestSite::new();
    let manifest = site.publish_as(2, wanting(policy));
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &manifest);
    works(&server, &mut agent).await;
    (site, server, agent)
}

/// It reports that it runs, as it does at its first report and from then on.
pub async fn works(server: &Server, agent: &mut Agent) -> Reply {
    let first = agent.healthy();
    agent.send(server, &first).await;
    let next = agent.healthy();
    agent.send(server, &next).await
}

/// A new key, PEM, and the request for it.
pub fn request(agent: &Agent) -> (String, CertificateRequest) {
    let random = SystemRandom::new();
    let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, made.as_ref(), &random).unwrap();
    let (machine, boot_id) = (machine_id(agent.n), boot_id(agent));
    let public = pair.public_key().as_ref();
    let proof = pair.sign(&random, &possession(&machine, &agent.key_id(), &boot_id, public)).unwrap();
    let (public_key, proof) = (HexBytes(public.to_vec()), HexBytes(proof.as_ref().to_vec()));
    (hex::pem_encode("PRIVATE KEY", made.as_ref()), CertificateRequest { machine, boot_id, public_key, proof })
}

async fn post(server: &Server, agent: &Agent, request: &CertificateRequest) -> Answer {
    let body = serde_json::to_vec(request).unwrap();
    server.post_to(CERTIFICATE_PATH, server.tls(Some(agent.identity())), body).await.unwrap()
}

/// What the machine has in its file, and what was issued to it.
pub async fn issued(server: &Server, agent: &Agent) -> (String, IssuedCertificate) {
    let (key, request) = request(agent);
    let answer = post(server, agent, &request).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let answer: CertificateAnswer = serde_json::from_slice(&answer.body).unwrap();
    let issued = answer.issued.unwrap_or_else(|| panic!("{:?}", answer.refused));
    (format!("{key}{}", issued.certificate), issued)
}

async fn refused(server: &Server, agent: &Agent) -> String {
    let (_, request) = request(agent);
    let answer = post(server, agent, &request).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let answer: CertificateAnswer = serde_json::from_slice(&answer.body).unwrap();
    assert!(answer.issued.is_none());
    answer.refused.unwrap()
}

pub async fn revoke_key(server: &Server, machine: &str) {
    let answer = server.order("POST", &format!("machines/{machine}/revoke-key"), json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Another program: whether it succeeded, and all that it said; none: it is not installed.
fn run(program: &str, arguments: &[&str]) -> Option<(bool, String)> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    match Command::new(program).args(arguments).env("PATH", path).stdin(Stdio::null()).output() {
        Ok(output) => {
            let said = [output.stdout, output.stderr].concat();
            Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            oracle::skipped(&format!("{program} is not installed"));
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// What openssl says of a certificate by the CA and the list as the server gives them now.
async fn openssl(server: &Server, dir: &Path, certificate: &str) -> Option<(bool, String)> {
    let ca = write(dir, "ca.pem", &server.http("GET", "/site/machines.pem", &[]).await.body);
    let list = write(dir, "list.pem", &server.http("GET", "/site/machines.crl.pem", &[]).await.body);
    let certificate = write(dir, "certificate.pem", certificate.as_bytes());
    let [ca, list, certificate] = [&ca, &list, &certificate].map(|path| path.to_str().unwrap());
    let strict = ["verify", "-x509_strict", "-purpose", "sslclient", "-crl_check", "-CAfile", ca, "-CRLfile", list];
    run("openssl", &[&strict[..], &[certificate]].concat())
}

#[tokio::test]
async fn a_certificate_verifies_until_its_machine_s_key_is_revoked() {
    let (site, server, mut agent) = rack(CertificatePolicy::Approved).await;
    assert!(works(&server, &mut agent).await.certify, "there is one to be had");
    let dir = tempfile::tempdir().unwrap();
    let (_, first) = issued(&server, &agent).await;
    assert!(!works(&server, &mut agent).await.certify, "it has it");
    assert_eq!((first.serial.len(), first.lasts_s), (32, 24 * 3600));
    let Some((good, said)) = openssl(&server, dir.path(), &first.certificate).await else { return };
    assert!(good, "{said}");
    let shown = write(dir.path(), "shown.pem", first.certificate.as_bytes());
    let names = ["x509", "-noout", "-subject", "-ext", "subjectAltName,extendedKeyUsage", "-serial", "-in"];
    let (_, said) = run("openssl", &[&names[..], &[shown.to_str().unwrap()]].concat()).unwrap();
    let uri = format!("URI:kiln:machine:{}", machine_id(1));
    for piece in ["rack-1", uri.as_str(), "TLS Web Client Authentication"] {
        assert!(said.contains(piece), "{piece}: {said}");
    }
    assert!(!said.contains("Server Authentication") && said.contains(&first.serial.to_uppercase()), "{said}");
    // It is over when the machine was told: valid a minute before, not a minute after.
    for (seconds, holds) in [(first.lasts_s - 60, true), (first.lasts_s + 60, false)] {
        let seconds = seconds.to_string();
        let end = ["x509", "-noout", "-checkend", seconds.as_str(), "-in", shown.to_str().unwrap()];
        assert_eq!(run("openssl", &end).unwrap().0, holds, "{seconds}");
    }
    // The list is the CA's, whole, in both its forms.
    let list = server.http("GET", "/site/machines.crl", &[]).await;
    assert_eq!(list.header("content-type"), "application/pkix-crl");
    let (list, ca) = (write(dir.path(), "list", &list.body), dir.path().join("ca.pem"));
    let [list, ca] = [&list, &ca].map(|path| path.to_str().unwrap().to_owned());
    let (_, said) = run("openssl", &["crl", "-inform", "DER", "-in", &list, "-CAfile", &ca, "-noout"]).unwrap();
    assert!(said.contains("verify OK"), "{said}");

    // Renewed, both hold; with the next one the first is revoked, as no more than two do.
    let (_, second) = issued(&server, &agent).await;
    for certificate in [&first, &second] {
        assert!(openssl(&server, dir.path(), &certificate.certificate).await.unwrap().0);
    }
    let (_, third) = issued(&server, &agent).await;
    for (certificate, holds) in [(&first, false), (&second, true), (&third, true)] {
        let (good, said) = openssl(&server, dir.path(), &certificate.certificate).await.unwrap();
        assert_eq!(good, holds, "{said}");
        assert!(holds || said.contains("certificate revoked"), "{said}");
    }
    // The database knows them, and the CA is the same.
    let ca = server.http("GET", "/site/machines.pem", &[]).await.body;
    assert_eq!(site.online("machine-ca.pem"), ca);
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(server.http("GET", "/site/machines.pem", &[]).await.body, ca);
    assert!(!openssl(&server, dir.path(), &first.certificate).await.unwrap().0);
    assert!(openssl(&server, dir.path(), &third.certificate).await.unwrap().0);
    let show = ["machine", "show", "rack-1", "--site", site.path().to_str().unwrap()];
    let (_, said, _) = site.kiln(&show);
    assert!(said.contains(&format!("certificate  serial {}, over in 23 h", third.serial)), "{said}");

    revoke_key(&server, "rack-1").await;
    for certificate in [&second, &third] {
        let (good, said) = openssl(&server, dir.path(), &certificate.certificate).await.unwrap();
        assert!(!good && said.contains("certificate revoked"), "{said}");
    }
    let (_, next) = request(&agent);
    assert_eq!(post(&server, &agent, &next).await.status, StatusCode::FORBIDDEN, "and no other is issued");
    let (_, said, _) = site.kiln(&show);
    assert!(said.contains("revoked: its machine's identity key was revoked"), "{said}");
    let audit = server.audit().await;
    let has = |what: &str| audit.iter().any(|record| record.what.contains(what));
    assert!(has(&format!("was issued a certificate, serial {}", first.serial)));
    assert!(!has(&format!("was issued a certificate, serial {}", second.serial)), "a renewal is no news");
    assert!(has(&format!("revoked the certificate with serial {}", third.serial)));
    let mode = |name: &str| {
        let meta = std::fs::metadata(site.path().join("online").join(name)).unwrap();
        std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 0o777
    };
    assert_eq!(mode("machine-ca.key"), 0o600);
}

#[tokio::test]
async fn who_may_have_none_is_told_why() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    assert!(!works(&server, &mut agent).await.certify);
    assert!(refused(&server, &agent).await.ends_with("(not-declared)"));
    let answer = server.http("GET", "/site/machines.pem", &[]).await;
    assert!(answer.status == StatusCode::NOT_FOUND && answer.text().contains("no machine CA yet"), "{}", answer.text());
    assert_eq!(server.http("GET", "/site/machines.crl", &[]).await.status, StatusCode::NOT_FOUND);
    assert!(!site.path().join("online/machine-ca.key").exists(), "nobody needs one");
    drop(server);

    let manifest = site.publish_as(2, wanting(CertificatePolicy::Attested));
    let server = Server::start(&site).await;
    let pem = server.http("GET", "/site/machines.pem", &[]).await;
    assert_eq!(pem.status, StatusCode::OK, "{}", pem.text());
    // Machine 2 runs it, and has no TPM.
    let mut second = Agent::new(2, &manifest);
    assert!(!works(&server, &mut second).await.certify);
    let said = refused(&server, &second).await;
    assert!(said.contains("attested boots only") && said.ends_with("(not-attested)"), "{said}");

    let manifest = site.publish_as(3, wanting(CertificatePolicy::Approved));
    drop(server);
    let server = Server::start(&site).await;
    let mut third = Agent::new(3, &manifest);
    assert!(works(&server, &mut third).await.certify);
    // A machine that nobody approved, and one that says it is another.
    let mut unknown = Agent::new(9, &manifest);
    works(&server, &mut unknown).await;
    assert!(refused(&server, &unknown).await.ends_with("(not-in-service)"));
    let stranger = Agent { signer: unknown.signer.clone(), ..third.clone() };
    let (_, request) = request(&stranger);
    assert_eq!(post(&server, &stranger, &request).await.status, StatusCode::CONFLICT);
    // What the machine itself asks with must be its own, of this boot, and proven.
    let (_, good) = self::request(&third);
    let mut altered = good.clone();
    *altered.proof.0.last_mut().unwrap() ^= 1;
    let another_boot = CertificateRequest { boot_id: "boot-3-7".into(), ..good.clone() };
    let another_key = CertificateRequest { public_key: self::request(&third).1.public_key, ..good.clone() };
    let no_point = CertificateRequest { public_key: HexBytes(vec![4; 64]), ..good.clone() };
    for bad in [altered, another_boot, another_key, no_point] {
        assert_eq!(post(&server, &third, &bad).await.status, StatusCode::UNPROCESSABLE_ENTITY, "{bad:?}");
    }
    let older = Agent { boot: 7, ..third.clone() };
    let (_, older) = self::request(&older);
    assert_eq!(post(&server, &third, &older).await.status, StatusCode::CONFLICT, "a boot that it has not reported");
    assert_eq!(post(&server, &third, &good).await.status, StatusCode::OK);

    // Out of service it gets no other, and what it has is revoked at once.
    let dir = tempfile::tempdir().unwrap();
    let (_, one) = issued(&server, &third).await;
    let before = server.http("GET", "/site/machines.crl", &[]).await.body;
    let answer = server.order("POST", "machines/rack-3/retire", json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_ne!(server.http("GET", "/site/machines.crl", &[]).await.body, before);
    assert!(refused(&server, &third).await.ends_with("(not-in-service)"));
    let Some((good, said)) = openssl(&server, dir.path(), &one.certificate).await else { return };
    assert!(!good && said.contains("certificate revoked"), "{said}");
}

#[tokio::test]
async fn a_machine_that_asks_without_end_is_bounded() {
    let (_site, server, agent) = rack(CertificatePolicy::Approved).await;
    for _ in 0..32 {
        issued(&server, &agent).await;
    }
    let (_, request) = request(&agent);
    let answer = post(&server, &agent, &request).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(answer.text().contains("it asks too often"), "{}", answer.text());
}

#[tokio::test]
async fn another_name_ends_a_certificate() {
    let site = TestSite::new();
    let manifest = site.publish_as(2, wanting(CertificatePolicy::Approved));
    let server = Server::start(&site).await;
    let mut agent = Agent::new(9, &manifest);
    works(&server, &mut agent).await;
    let named = async |name: &str| {
        let path = format!("machines/{}/approve", machine_id(9));
        let answer = server.order("POST", &path, json!({ "name": name, "role": "lab" })).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    };
    named("db-1").await;
    assert!(works(&server, &mut agent).await.certify);
    let (_, one) = issued(&server, &agent).await;
    assert!(!works(&server, &mut agent).await.certify);
    named("old-1").await;
    assert!(works(&server, &mut agent).await.certify, "another machine may be db-1 now");
    let what = format!("revoked the certificate with serial {}: its machine has another name", one.serial);
    assert!(server.audit().await.iter().any(|record| record.what.contains(&what)));
    issued(&server, &agent).await;
    assert!(!works(&server, &mut agent).await.certify);
}

#[tokio::test]
async fn a_ca_that_is_begun_anew_gives_every_machine_another_certificate() {
    let (site, server, mut agent) = rack(CertificatePolicy::Approved).await;
    issued(&server, &agent).await;
    let ca = server.http("GET", "/site/machines.pem", &[]).await.body;
    drop(server);
    for name in ["machine-ca.key", "machine-ca.pem"] {
        std::fs::remove_file(site.path().join("online").join(name)).unwrap();
    }
    let server = Server::start(&site).await;
    assert_ne!(server.http("GET", "/site/machines.pem", &[]).await.body, ca);
    assert!(works(&server, &mut agent).await.certify, "what it has is of the CA before");
    issued(&server, &agent).await;
    assert!(!works(&server, &mut agent).await.certify);
}

/// Both CAs are told while programs go from one to the other, and each machine is let in at every step.
#[tokio::test]
async fn a_ca_that_is_rotated_locks_no_machine_out() {
    let (site, server, mut agent) = rack(CertificatePolicy::Approved).await;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (_, first) = issued(&server, &agent).await;
    if openssl(&server, dir, &first.certificate).await.is_none() {
        return;
    }
    let path = site.path().to_str().unwrap().to_owned();
    let restarted = async |server: Server, step: &str| {
        let (ok, said, error) = site.kiln(&["trust", "machine-ca", step, "--site", &path]);
        assert!(ok && said.contains("Restart `kiln serve`"), "{step}: {said}{error}");
        drop(server);
        Server::start(&site).await
    };
    // How many CAs are told, and how many lists.
    let told = async |server: &Server| {
        let cas = server.http("GET", "/site/machines.pem", &[]).await.text();
        let lists = server.http("GET", "/site/machines.crl.pem", &[]).await.text();
        (cas.matches("BEGIN CERTIFICATE").count(), lists.matches("BEGIN X509 CRL").count())
    };
    let holds = async |server: &Server, certificate: &IssuedCertificate, is: bool| {
        let (good, said) = openssl(server, dir, &certificate.certificate).await.unwrap();
        assert_eq!(good, is, "{said}");
    };
    assert_eq!(told(&server).await, (1, 1));

    // Announced: told, and nothing else.
    let server = restarted(server, "announce").await;
    assert_eq!(told(&server).await, (2, 1));
    let announced = server.http("GET", "/site/machines.pem", &[]).await.text();
    assert!(!works(&server, &mut agent).await.certify, "what it has holds");
    holds(&server, &first, true).await;
    let twice = site.kiln(&["trust", "machine-ca", "announce", "--site", &path]);
    assert!(!twice.0 && twice.2.contains("is announced"), "{twice:?}");

    // It signs: each machine is told to ask for another, and whoever fetched before knows its CA.
    let server = restarted(server, "switch").await;
    assert_eq!(told(&server).await, (2, 2));
    assert!(works(&server, &mut agent).await.certify);
    let (_, second) = issued(&server, &agent).await;
    assert!(second.ca != first.ca && announced.contains(second.ca.trim()), "{announced}");
    holds(&server, &first, true).await;
    holds(&server, &second, true).await;
    assert!(!works(&server, &mut agent).await.certify);

    // Revoked, it is so by either; and the one before is forgotten.
    revoke_key(&server, "rack-1").await;
    holds(&server, &first, false).await;
    holds(&server, &second, false).await;
    let server = restarted(server, "forget").await;
    assert_eq!(told(&server).await, (1, 1));
    let (_, said) = openssl(&server, dir, &first.certificate).await.unwrap();
    assert!(said.contains("unable to get local issuer certificate"), "{said}");
}

/// A disk that gives no answer: whoever asks for the CA waits, and nobody else. What is wrong with its files is said once.
#[tokio::test]
async fn a_file_of_the_ca_that_hangs_holds_up_only_who_asks_for_the_ca() {
    let (site, server, mut agent) = rack(CertificatePolicy::Approved).await;
    let pipe = site.path().join("online/machine-ca.pem");
    let begun = Instant::now();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let stream = TcpStream::connect(server.http).await.unwrap();
    let asks = tokio::spawn(call(stream, "GET", "/site/machines.pem", &[], vec![]));
    // Open for writing once somebody reads, who waits from then on.
    let path = pipe.clone();
    let writes = tokio::task::spawn_blocking(move || std::fs::File::options().write(true).open(path).unwrap());
    let writes = tokio::time::timeout(PATIENCE, writes).await.expect("nobody reads it").unwrap();
    let goes_on = async {
        assert!(works(&server, &mut agent).await.certify);
        server.machine("rack-1").await
    };
    let view = tokio::time::timeout(PATIENCE, goes_on).await.expect("the fleet waits for the CA");
    assert_eq!(view.state, "healthy");
    assert!(!asks.is_finished());

    drop(writes);
    let answer = asks.await.unwrap();
    assert!(answer.status.is_server_error() && answer.text().contains("gives no answer"), "{}", answer.text());
    // A file that is wrong as well, whenever it is looked at again.
    std::fs::remove_file(&pipe).unwrap();
    std::fs::write(&pipe, "nothing").unwrap();
    for path in ["/site/machines.pem", "/site/machines.crl", "/site/machines.crl.pem"] {
        assert!(server.http("GET", path, &[]).await.status.is_server_error());
    }
    let log = std::fs::read_to_string(site.path().join("log")).unwrap();
    // It is looked at, and said, once in ten seconds.
    let most = 1 + usize::try_from(begun.elapsed().as_secs() / 10).unwrap();
    assert!((1..=most).contains(&log.matches("no certificates are issued").count()), "{log}");
}

/// Debian's nginx, which asks each client for a certificate.
struct Nginx {
    child: Child,
    dir: PathBuf,
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // One process: it has no workers that would outlive it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(self.dir.join("socket"));
    }
}

impl Nginx {
    /// With the CA and the list that lie in the folder.
    fn start(dir: &Path) -> Self {
        let at = dir.display();
        let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|of| format!("{of}_temp_path {at}/{of};"));
        let config = format!(
            "daemon off; master_process off; pid {at}/pid; error_log {at}/error.log info;\nevents {{}}\nhttp {{ access_log off; \
             {}\nserver {{ listen unix:{at}/socket ssl; ssl_certificate {at}/server.pem; ssl_certificate_key {at}/server.key;\n\
             ssl_client_certificate {at}/ca.pem; ssl_crl {at}/list.pem; ssl_verify_client on;\n\
             location / {{ return 200 \"$ssl_client_verify $ssl_client_s_dn\"; }} }} }}\n",
            temp.join(" ")
        );
        let file = write(dir, "nginx.conf", config.as_bytes());
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let mut nginx = Command::new("nginx");
        nginx.args(["-p", dir.to_str().unwrap(), "-e", "error.log", "-c", file.to_str().unwrap()]).env("PATH", path);
        let child = nginx.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut this = Self { child, dir: dir.to_owned() };
        let log = || std::fs::read_to_string(dir.join("error.log")).unwrap_or_default();
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(dir.join("socket")).is_err() {
            assert!(this.child.try_wait().unwrap().is_none() && begun.elapsed() < PATIENCE, "{}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
        this
    }

    /// What curl is answered: status, body. `identity`: its file of key and certificate.
    fn get(&self, identity: Option<&Path>) -> (String, String) {
        let [socket, trusts] = ["socket", "server.pem"].map(|name| self.dir.join(name).display().to_string());
        let identity = identity.map(|path| path.display().to_string());
        let mut arguments =
            vec!["-sS", "--unix-socket", socket.as_str(), "--cacert", trusts.as_str(), "-w", " %{http_code}"];
        arguments.extend(identity.iter().flat_map(|path| ["--cert", path.as_str()]));
        arguments.push("https://localhost/");
        let (good, said) = run("curl", &arguments).unwrap();
        assert!(good, "{said}");
        let (body, status) = said.rsplit_once(' ').unwrap();
        (status.to_owned(), body.to_owned())
    }
}

#[tokio::test]
async fn nginx_lets_a_machine_in_by_its_certificate_until_that_is_revoked() {
    let tools = [("nginx", "-v"), ("openssl", "version"), ("curl", "--version")];
    if tools.iter().any(|(program, argument)| run(program, &[*argument]).is_none()) {
        return;
    }
    let (_site, server, agent) = rack(CertificatePolicy::Approved).await;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let [key, certificate] = ["server.key", "server.pem"].map(|name| dir.join(name).display().to_string());
    let own = ["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2", "-subj"];
    let names = ["/CN=localhost", "-addext", "subjectAltName=DNS:localhost"];
    let files = ["-keyout", key.as_str(), "-out", certificate.as_str()];
    let (good, said) = run("openssl", &[&own[..], &names[..], &files[..]].concat()).unwrap();
    assert!(good, "{said}");
    let (identity, _) = issued(&server, &agent).await;
    let identity = write(dir, "identity.pem", identity.as_bytes());
    let foreign = [std::fs::read(&key).unwrap(), std::fs::read(&certificate).unwrap()].concat();
    let foreign = write(dir, "foreign.pem", &foreign);
    write(dir, "ca.pem", &server.http("GET", "/site/machines.pem", &[]).await.body);
    write(dir, "list.pem", &server.http("GET", "/site/machines.crl.pem", &[]).await.body);

    let nginx = Nginx::start(dir);
    let (status, body) = nginx.get(Some(&identity));
    assert!(status == "200" && body.starts_with("SUCCESS ") && body.contains("CN=rack-1"), "{status} {body}");
    assert_eq!(nginx.get(None).0, "400", "without one");
    assert_eq!(nginx.get(Some(&foreign)).0, "400", "somebody else's");

    revoke_key(&server, "rack-1").await;
    assert_eq!(nginx.get(Some(&identity)).0, "200", "nginx knows the list that it was given");
    drop(nginx);
    write(dir, "list.pem", &server.http("GET", "/site/machines.crl.pem", &[]).await.body);
    let nginx = Nginx::start(dir);
    assert_eq!(nginx.get(Some(&identity)).0, "400");
    drop(nginx);
    let log = std::fs::read_to_string(dir.join("error.log")).unwrap();
    assert!(log.contains("certificate revoked"), "{log}");
}
