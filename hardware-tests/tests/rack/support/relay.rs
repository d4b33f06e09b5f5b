//! Hands a machine's word before a kexec on to the boot server: root there has the machine's key and what its kernel has measured, and
//! no client that shows a certificate. What is sent is what the agent sends, of the same parts, over the same TLS.

use super::door::Door;
use kiln_lab::net;
use kiln_protocol::{ATTESTATION_PATH, Attestation, HexBytes, Judged, MachineId};
use kiln_release::certificate::self_signed_certificate;
use kiln_release::{AGENT_API_NAME, Signer};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// The agent API of the rack's boot server.
const PORT: u16 = 8443;

/// Where root of a machine posts three lines: the kernel's boot id, its list of measurements, the variable with its identity key.
pub struct Relay {
    /// For plain HTTP, on the machines' network.
    pub url: String,
    answers: Arc<Mutex<Vec<Judged>>>,
    _door: Door,
}

impl Relay {
    /// For this machine. One that `takes_back` says after each true word that the kernel has measured nothing.
    pub fn start(site: &Path, machine: &MachineId, takes_back: bool) -> Self {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let (site, machine, heard) = (site.to_owned(), machine.clone(), Arc::clone(&answers));
        let door = Door::open((net::SERVER, 0).into(), move |mut stream: TcpStream| {
            let posted = body(&mut BufReader::new(&stream));
            let mut lines = posted.lines();
            let mut line = || lines.next().expect("three lines are posted").to_owned();
            let (boot_id, list, variable) = (line(), bytes(line()), bytes(line()));
            // Attributes, and the seed.
            let key = Signer::from_seed(variable[4..].try_into().unwrap());
            let mut words = vec![HexBytes(list)];
            words.extend(takes_back.then(|| HexBytes(Vec::new())));
            for measured in words {
                let step = Attestation::Leave { machine: machine.clone(), boot_id: boot_id.clone(), measured };
                let judged = told(&site, &key, &step);
                println!("the server to root: {judged:?}");
                heard.lock().unwrap().push(judged);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\ntold\n").unwrap();
        });
        Self { url: format!("http://{}/", door.address), answers, _door: door }
    }

    /// What the boot server has answered so far.
    pub fn answers(&self) -> Vec<Judged> {
        self.answers.lock().unwrap().clone()
    }
}

fn bytes(digits: String) -> Vec<u8> {
    HexBytes::try_from(digits).unwrap().0
}

/// Reads what comes before a body; how long that is.
fn head(reader: &mut impl BufRead) -> usize {
    let mut length = 0;
    loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "cut in its head");
        if line.trim().is_empty() {
            return length;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
}

fn body(reader: &mut impl BufRead) -> String {
    let mut body = vec![0; head(reader)];
    reader.read_exact(&mut body).unwrap();
    String::from_utf8(body).unwrap()
}

/// One step, under the machine's key.
fn told(site: &Path, key: &Signer, step: &Attestation) -> Judged {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(site.join("online/agent-ca.pem")).unwrap() {
        roots.add(certificate.unwrap()).unwrap();
    }
    let chain = vec![CertificateDer::from(self_signed_certificate(key))];
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.pkcs8_der()));
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, private)
        .unwrap();
    let name = ServerName::try_from(AGENT_API_NAME).unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = StreamOwned::new(connection, TcpStream::connect((net::SERVER, PORT)).unwrap());
    let json = serde_json::to_string(step).unwrap();
    let length = json.len();
    let request = format!(
        "POST {ATTESTATION_PATH} HTTP/1.1\r\nHost: {AGENT_API_NAME}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{json}"
    );
    stream.write_all(request.as_bytes()).and_then(|()| stream.flush()).unwrap();
    let answer = body(&mut BufReader::new(stream));
    serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer}"))
}
