//! The agent API's client: reports over TLS 1.3 with both sides proven. The server's certificate must come from the
//! CA in the initramfs, whatever address it was reached by; times of certificates are judged by the time floor, never
//! by the machine's clock.

use crate::error::{AgentError, Result};
use crate::fetch::{Open, PATIENCE, authority, client, connect};
use crate::log::said;
use crate::tls;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use kiln_protocol::{
    ATTESTATION_PATH, Attestation, CERTIFICATE_PATH, CertificateAnswer, CertificateRequest, INTRODUCTION_PATH,
    INVENTORY_PATH, Introduction, IntroductionReply, InventoryReport, KeyId, LOG_PATH, LogBatch, LogReply,
    RECEIPT_PATH, REPORT_PATH, Reply, Report,
};
use kiln_release::certificate::{certificate_spki, self_signed_certificate, spki_key_id};
use kiln_release::{AGENT_API_NAME, Signer, with_causes};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// Handshake, and an answer that is not held.
const ANSWER: Duration = Duration::from_secs(15);
/// The longest reply read.
const REPLY_LIMIT: usize = 256 * 1024;

/// The time floor as rustls' clock, seconds since the epoch; its clones are the same clock.
#[derive(Debug, Clone)]
pub struct Clock(Arc<AtomicI64>);

impl Clock {
    pub fn at(now: Timestamp) -> Self {
        Self(Arc::new(AtomicI64::new(now.as_second())))
    }

    /// Moves it; never back.
    pub fn set(&self, now: Timestamp) {
        self.0.fetch_max(now.as_second(), Ordering::Relaxed);
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.0.load(Ordering::Relaxed)).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

/// Keys of the agent API that count, as the newest verified `site.json` names them (SHA-256 of their SPKI); its clones are the
/// same list. Empty: every one that the CA has signed.
#[derive(Debug, Clone, Default)]
pub struct Pins(Arc<Mutex<Vec<String>>>);

impl Pins {
    pub fn set(&self, keys: &[String]) {
        *self.lock() = keys.to_vec();
    }

    pub fn keys(&self) -> Vec<String> {
        self.lock().clone()
    }

    fn allow(&self, key: Option<&KeyId>) -> bool {
        let named = self.lock();
        named.is_empty() || key.is_some_and(|key| named.iter().any(|named| named == key.as_str()))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client of the agent API; keeps its connection, and turns to the next server after a report that was not answered.
pub struct Api {
    /// Base URLs of the servers; the first is asked.
    urls: VecDeque<String>,
    tls: TlsConnector,
    connection: Option<(SendRequest<Full<Bytes>>, Open)>,
    /// SHA-256 of the SPKI of the certificate that the newest connection's server showed.
    pub server_key: Option<KeyId>,
    /// Which of them count.
    pins: Pins,
}

impl Api {
    pub fn new(urls: &[String], ca_pem: &str, key: &Signer, clock: &Clock) -> Result<Self> {
        let bad = |reason: String| AgentError::Format { path: "agent API credentials".into(), reason };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
            let certificate = certificate.map_err(|e| bad(format!("CA: {e}")))?;
            roots.add(certificate).map_err(|e| bad(format!("CA: {e}")))?;
        }
        let chain = vec![CertificateDer::from(self_signed_certificate(key))];
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.pkcs8_der()));
        let clock: Arc<dyn TimeProvider> = Arc::new(clock.clone());
        let provider = Arc::new(tls::provider());
        let config = ClientConfig::builder_with_details(provider, clock)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| b.with_root_certificates(roots).with_client_auth_cert(chain, private))
            .map_err(|e| bad(e.to_string()))?;
        Ok(Self {
            urls: urls.iter().cloned().collect(),
            tls: TlsConnector::from(Arc::new(config)),
            connection: None,
            server_key: None,
            pins: Pins::default(),
        })
    }

    /// Of the servers' keys only these count, and what they become.
    #[must_use]
    pub fn pinned(self, pins: &Pins) -> Self {
        Self { pins: pins.clone(), ..self }
    }

    /// Another connection of the same machine to the same servers.
    pub fn another(&self) -> Self {
        let pins = self.pins.clone();
        Self { urls: self.urls.clone(), tls: self.tls.clone(), connection: None, server_key: None, pins }
    }

    /// The same to these servers, from the one that is asked now.
    pub fn another_of(&self, urls: &[String]) -> Self {
        let mut urls: VecDeque<String> = urls.iter().cloned().collect();
        if let Some(now) = urls.iter().position(|url| url == self.server()) {
            urls.rotate_left(now);
        }
        Self { urls, ..self.another() }
    }

    /// Posts a report. The connection is reused; a stale one is replaced once.
    pub async fn report(&mut self, report: &Report) -> Result<Reply> {
        let deadline = ANSWER + Duration::from_secs(u64::from(report.wait_s));
        self.exchange(REPORT_PATH, report, deadline, "the reply").await
    }

    /// Posts the receipt of a wipe.
    pub async fn receipt(&mut self, text: &str) -> Result<()> {
        self.ask(RECEIPT_PATH, text.as_bytes(), ANSWER).await.map(drop)
    }

    /// Posts a step of the introduction.
    pub async fn introduce(&mut self, step: &Introduction) -> Result<IntroductionReply> {
        self.exchange(INTRODUCTION_PATH, step, ANSWER, "the answer to an introduction").await
    }

    /// Posts a step of a proof.
    pub async fn attest<T: DeserializeOwned>(&mut self, step: &Attestation) -> Result<T> {
        self.exchange(ATTESTATION_PATH, step, 2 * ANSWER, "the answer to a proof").await
    }

    /// Asks for a certificate.
    pub async fn certify(&mut self, request: &CertificateRequest) -> Result<CertificateAnswer> {
        self.exchange(CERTIFICATE_PATH, request, ANSWER, "the answer about a certificate").await
    }

    /// Posts lines of the log.
    pub async fn log(&mut self, batch: &LogBatch) -> Result<LogReply> {
        self.exchange(LOG_PATH, batch, 2 * ANSWER, "the answer to log lines").await
    }

    /// The server that is asked.
    pub fn server(&self) -> &str {
        self.url().unwrap_or_default()
    }

    /// Whether one of the servers shows a certificate of the site's CA now. Nothing is said to it.
    pub async fn reaches(&mut self) -> Result<()> {
        let mut last = AgentError::NoServer;
        for url in self.urls.clone() {
            let (_, host, port) = authority(&url, 443)?;
            let opened = timeout(ANSWER, self.open(&url, &host, port)).await;
            match opened {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => last = error,
                Err(_) => {
                    let reason = format!("no handshake within {} s", ANSWER.as_secs());
                    last = AgentError::Unreachable { url, reason };
                }
            }
        }
        Err(last)
    }

    /// Lets the connection go; the next call makes another.
    pub fn hang_up(&mut self) {
        self.connection = None;
    }

    /// Posts what the machine is made of.
    pub async fn inventory(&mut self, report: &InventoryReport) -> Result<()> {
        let body = serde_json::to_vec(report).expect("wire types always become JSON");
        self.ask(INVENTORY_PATH, &body, 4 * ANSWER).await.map(drop)
    }

    /// Posts a document and reads the answer. One that cannot be read is like none: the next server is asked.
    async fn exchange<T: DeserializeOwned>(
        &mut self,
        path: &str,
        document: &impl Serialize,
        deadline: Duration,
        what: &str,
    ) -> Result<T> {
        let body = serde_json::to_vec(document).expect("wire types always become JSON");
        let answer = self.ask(path, &body, deadline).await?;
        serde_json::from_slice(&answer).map_err(|e| {
            // It quotes what was sent.
            let reason = format!("{what} is not of version 1: {}", said(&e.to_string()));
            let error = AgentError::Unreachable { url: self.server().to_owned(), reason };
            self.turn_away();
            error
        })
    }

    fn turn_away(&mut self) {
        self.connection = None;
        self.urls.rotate_left(1.min(self.urls.len()));
    }

    async fn ask(&mut self, path: &str, body: &[u8], deadline: Duration) -> Result<Bytes> {
        let attempt = async {
            let reused = self.connection.is_some();
            match self.post(path, body).await {
                Err(AgentError::Unreachable { .. }) if reused => self.post(path, body).await,
                other => other,
            }
        };
        let answer = timeout(deadline, attempt).await.unwrap_or_else(|_| {
            let reason = format!("no answer to a report within {} s", deadline.as_secs());
            Err(AgentError::Unreachable { url: self.url()?.to_owned(), reason })
        });
        if answer.is_err() {
            self.turn_away();
        }
        answer
    }

    fn url(&self) -> Result<&str> {
        self.urls.front().map(String::as_str).ok_or(AgentError::NoServer)
    }

    async fn post(&mut self, path: &str, body: &[u8]) -> Result<Bytes> {
        let url = self.url()?.to_owned();
        let unreachable = |reason: String| AgentError::Unreachable { url: url.clone(), reason };
        let (_, host, port) = authority(&url, 443)?;
        let kept = self.connection.take().filter(|(sender, _)| !sender.is_closed());
        let (mut sender, open) = if let Some(kept) = kept { kept } else { self.open(&url, &host, port).await? };
        // Also of a connection that was made before the site named its keys: dropped here, it is closed.
        if !self.pins.allow(self.server_key.as_ref()) {
            return Err(AgentError::AgentApiKey { url: url.clone() });
        }
        let request = Request::post(path)
            .header(HOST, AGENT_API_NAME)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::copy_from_slice(body)))
            .map_err(|e| unreachable(e.to_string()))?;
        let response = sender.send_request(request).await.map_err(|e| unreachable(with_causes(&e)))?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), REPLY_LIMIT).collect().await;
        let answer = answer.map_err(|e| unreachable(format!("reading the reply: {e}")))?.to_bytes();
        if status != StatusCode::OK {
            return Err(AgentError::HttpStatus { url: format!("{url}{path}"), status: status.as_u16() });
        }
        self.connection = Some((sender, open));
        Ok(answer)
    }

    async fn open(&mut self, url: &str, host: &str, port: u16) -> Result<(SendRequest<Full<Bytes>>, Open)> {
        let unreachable = |reason: String| AgentError::Unreachable { url: url.to_owned(), reason };
        let tcp = connect(&PATIENCE, url, host, port).await?;
        let name = ServerName::try_from(AGENT_API_NAME).expect("a constant DNS name");
        let tls = self.tls.connect(name, tcp).await.map_err(|e| unreachable(format!("TLS: {e}")))?;
        let shown = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let spki = shown.and_then(|certificate| certificate_spki(certificate).ok());
        self.server_key = spki.and_then(|spki| spki_key_id(spki).parse().ok());
        let (sender, connection) =
            client().handshake(TokioIo::new(tls)).await.map_err(|e| unreachable(with_causes(&e)))?;
        Ok((sender, Open::drive(connection)))
    }
}
