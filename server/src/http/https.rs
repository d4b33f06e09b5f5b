//! TLS for people and programs: a certificate from files that somebody else renews (an ACME client, a CA of the
//! company), or one that the site's own CA makes at each start. A renewed file is taken without ending a connection: each
//! handshake asks for the certificate of now.

use super::tls::provider;
use axum::Router;
use axum::http::HeaderValue;
use axum::http::header::STRICT_TRANSPORT_SECURITY;
use axum::middleware::map_response;
use axum::response::Response;
use kiln_images::{SiteDir, SiteError};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

/// RFC 6797: a browser that was here once over TLS comes over TLS for a year, whatever it is told to type. It is for this name
/// alone, and for all its ports.
const STRICT: &str = "max-age=31536000";

/// What is served over TLS says that it is not to be had otherwise.
pub fn strict(router: Router) -> Router {
    router.layer(map_response(say_strict))
}

async fn say_strict(mut answer: Response) -> Response {
    answer.headers_mut().insert(STRICT_TRANSPORT_SECURITY, HeaderValue::from_static(STRICT));
    answer
}

/// Files are looked at so often.
const LOOK: Duration = Duration::from_secs(2);
/// A certificate that is made here is made anew after so long; it holds for 397 days.
const ANEW: Duration = Duration::from_secs(300 * 24 * 3600);

/// There is no certificate that could be shown.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum HttpsError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {reason}", path.display())]
    Pem { path: PathBuf, reason: String },
    #[error("{} and {} do not belong together: {reason}", certificate.display(), key.display())]
    Pair { certificate: PathBuf, key: PathBuf, reason: String },
    #[error("the site's CA makes no certificate: {0}")]
    Make(#[from] SiteError),
    #[error("TLS: {0}")]
    Tls(rustls::Error),
}

/// Where it comes from.
#[derive(Debug, Clone)]
enum Source {
    Files { certificate: PathBuf, key: PathBuf },
    Made { site: SiteDir, names: Vec<String> },
}

/// What tells one state of the files from another.
type Mark = Vec<Option<(SystemTime, u64, u64)>>;

/// The certificate that is shown now.
#[derive(Debug)]
pub struct Certificates {
    source: Source,
    now: RwLock<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now.read().expect("no code panics under this lock").clone())
    }
}

fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, rustls::Error> {
    // Fails unless the key is the certificate's.
    CertifiedKey::from_der(chain, key, &provider()).map(Arc::new)
}

impl Source {
    fn read(&self) -> Result<Arc<CertifiedKey>, HttpsError> {
        match self {
            Self::Files { certificate, key } => {
                let read = |path: &Path| {
                    std::fs::read(path).map_err(|source| HttpsError::Read { path: path.to_owned(), source })
                };
                let pem = |path: &Path, reason: String| HttpsError::Pem { path: path.to_owned(), reason };
                let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(certificate)?)
                    .collect::<Result<_, _>>()
                    .map_err(|e| pem(certificate, e.to_string()))?;
                if chain.is_empty() {
                    return Err(pem(certificate, "there is no certificate in it".into()));
                }
                let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|e| pem(key, e.to_string()))?;
                certified(chain, private).map_err(|e| HttpsError::Pair {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    reason: e.to_string(),
                })
            }
            Self::Made { site, names } => {
                let (chain, key) = kiln_images::https_certificate(site, names, jiff::Timestamp::now())?;
                let chain = chain.into_iter().map(CertificateDer::from).collect();
                let key = PrivateKeyDer::Pkcs8(key.into());
                certified(chain, key).map_err(HttpsError::Tls)
            }
        }
    }

    fn mark(&self) -> Mark {
        use std::os::unix::fs::MetadataExt;
        match self {
            Self::Files { certificate, key } => [certificate, key]
                .map(|path| {
                    let metadata = std::fs::metadata(path).ok()?;
                    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
                })
                .to_vec(),
            Self::Made { .. } => Vec::new(),
        }
    }
}

impl Certificates {
    /// From files, or made by the site's CA for these names.
    pub fn open(
        site: &SiteDir,
        files: Option<&(PathBuf, PathBuf)>,
        names: Vec<String>,
    ) -> Result<Arc<Self>, HttpsError> {
        let source = match files {
            Some((certificate, key)) => Source::Files { certificate: certificate.clone(), key: key.clone() },
            None => Source::Made { site: site.clone(), names },
        };
        let now = RwLock::new(source.read()?);
        Ok(Arc::new(Self { source, now }))
    }

    /// The configuration of a listener that shows it.
    pub fn server_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, HttpsError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(HttpsError::Tls)?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// Takes renewed files, or makes a new certificate in time; for ever. What cannot be used is said once and not taken.
    pub async fn renew(self: Arc<Self>) {
        let mut seen = self.source.mark();
        let mut made = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(LOOK).await;
            let mark = self.source.mark();
            let old = matches!(self.source, Source::Made { .. }) && made.elapsed() >= ANEW;
            if mark == seen && !old {
                continue;
            }
            match self.source.read() {
                Ok(certificate) => {
                    *self.now.write().expect("no code panics under this lock") = certificate;
                    tracing::info!("https: the renewed certificate is shown from now on");
                }
                // An ACME client writes one file after the other: the second change is looked at again.
                Err(error) => tracing::warn!("https: the certificate stays as it was: {error}"),
            }
            (seen, made) = (mark, tokio::time::Instant::now());
        }
    }
}
