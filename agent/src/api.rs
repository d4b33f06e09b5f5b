//! The agent API's client: reports over TLS 1.3 with both sides proven. The server's certificate must come from the
//! CA in the initramfs, whatever address it was reached by; times of certificates are judged by the time floor, never
//! by the machine's clock.

use crate::error::{AgentError, Result};
use crate::fetch::{authority, connect};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use kiln_protocol::{REPORT_PATH, Reply, Report};
use kiln_release::certificate::self_signed_certificate;
use kiln_release::{AGENT_API_NAME, Signer, with_causes};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// Handshake, and an answer that is not held.
const ANSWER: Duration = Duration::from_secs(15);
/// The longest reply read.
const REPLY_LIMIT: usize = 256 * 1024;

/// The time floor as rustls' clock, seconds since the epoch.
#[derive(Debug)]
struct Floor(AtomicI64);

impl TimeProvider for Floor {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.0.load(Ordering::Relaxed)).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

/// A client of one server's agent API; keeps its connection.
pub struct Api {
    url: String,
    tls: TlsConnector,
    floor: Arc<Floor>,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Api {
    pub fn new(url: &str, ca_pem: &str, key: &Signer, time_floor: Timestamp) -> Result<Self> {
        let bad = |reason: String| AgentError::Format { path: "agent API credentials".into(), reason };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
            let certificate = certificate.map_err(|e| bad(format!("CA: {e}")))?;
            roots.add(certificate).map_err(|e| bad(format!("CA: {e}")))?;
        }
        let chain = vec![CertificateDer::from(self_signed_certificate(key))];
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.pkcs8_der()));
        let floor = Arc::new(Floor(AtomicI64::new(time_floor.as_second())));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_details(provider, Arc::clone(&floor) as Arc<dyn TimeProvider>)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|b| b.with_root_certificates(roots).with_client_auth_cert(chain, private))
            .map_err(|e| bad(e.to_string()))?;
        Ok(Self { url: url.to_owned(), tls: TlsConnector::from(Arc::new(config)), floor, connection: None })
    }

    /// Moves the clock that certificates are judged by.
    pub fn set_time(&self, now: Timestamp) {
        self.floor.0.fetch_max(now.as_second(), Ordering::Relaxed);
    }

    /// Posts a report. The connection is reused; a stale one is replaced once.
    pub async fn report(&mut self, report: &Report) -> Result<Reply> {
        let body = serde_json::to_vec(report).expect("wire types always become JSON");
        let deadline = ANSWER + Duration::from_secs(u64::from(report.wait_s));
        let attempt = async {
            let reused = self.connection.is_some();
            match self.post(&body).await {
                Err(AgentError::Unreachable { .. }) if reused => self.post(&body).await,
                other => other,
            }
        };
        let answer = timeout(deadline, attempt).await;
        answer.unwrap_or_else(|_| {
            self.connection = None;
            let reason = format!("no answer to a report within {} s", deadline.as_secs());
            Err(AgentError::Unreachable { url: self.url.clone(), reason })
        })
    }

    async fn post(&mut self, body: &[u8]) -> Result<Reply> {
        let url = self.url.clone();
        let unreachable = |reason: String| AgentError::Unreachable { url: url.clone(), reason };
        let (_, host, port) = authority(&url, 443)?;
        let kept = self.connection.take().filter(|sender| !sender.is_closed());
        let mut sender = if let Some(sender) = kept { sender } else { self.open(&host, port).await? };
        let request = Request::post(REPORT_PATH)
            .header(HOST, AGENT_API_NAME)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::copy_from_slice(body)))
            .map_err(|e| unreachable(e.to_string()))?;
        let response = sender.send_request(request).await.map_err(|e| unreachable(with_causes(&e)))?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), REPLY_LIMIT).collect().await;
        let answer = answer.map_err(|e| unreachable(format!("reading the reply: {e}")))?.to_bytes();
        if status != StatusCode::OK {
            return Err(AgentError::HttpStatus { url: format!("{url}{REPORT_PATH}"), status: status.as_u16() });
        }
        self.connection = Some(sender);
        serde_json::from_slice(&answer).map_err(|e| unreachable(format!("reply is not of version 1: {e}")))
    }

    async fn open(&self, host: &str, port: u16) -> Result<SendRequest<Full<Bytes>>> {
        let unreachable = |reason: String| AgentError::Unreachable { url: self.url.clone(), reason };
        let tcp = connect(&self.url, host, port).await?;
        let name = ServerName::try_from(AGENT_API_NAME).expect("a constant DNS name");
        let tls = self.tls.connect(name, tcp).await.map_err(|e| unreachable(format!("TLS: {e}")))?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|e| unreachable(with_causes(&e)))?;
        tokio::spawn(connection);
        Ok(sender)
    }
}
