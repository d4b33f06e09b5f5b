//! The machine CA of a running server: opened, or made, by the first who needs it. Its files are read and written on a thread for
//! that, under no lock but this one: a disk that gives no answer holds up those who ask for the CA, and nobody else.

use crate::error::CertificateError;
use crate::machine_ca::{Ca, Which};
use kiln_fleet::Millis;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use tokio::sync::Mutex;

/// One that cannot be opened is tried again after so long, whoever asks: anybody may ask for the list.
const FAILED_MS: Millis = 10_000;

/// Why it could not be opened or made, and when.
type Failed = Option<(Millis, Arc<CertificateError>)>;

/// The CA, once it is open.
#[derive(Debug)]
pub(super) struct OpenCa {
    ca: OnceLock<Arc<Ca>>,
    /// The one before it, whose certificates are not over.
    before: Option<Arc<Ca>>,
    /// The certificates, PEM, that are told beside its own: of the next one and of the one before.
    beside: String,
    failed: Arc<Mutex<Failed>>,
    online: PathBuf,
    site: String,
}

impl OpenCa {
    /// At the server's start, of what lies in the site's `online/`. A key that is missing or cannot be read keeps the server from
    /// nothing but certificates.
    pub(super) fn at_start(online: PathBuf, site: &str) -> Self {
        let opened = Ca::open(&online, Which::Now, site).unwrap_or_else(|error| {
            say(&error);
            None
        });
        let ca = opened.map_or_else(OnceLock::new, |ca| OnceLock::from(Arc::new(ca)));
        let other = |which| {
            Ca::open(&online, which, site).unwrap_or_else(|error| {
                tracing::error!(%error, "of the machine CA's rotation nothing is told (`kiln trust machine-ca`)");
                None
            })
        };
        let (next, before) = (other(Which::Next), other(Which::Before));
        let beside = [&next, &before].into_iter().flatten().map(|ca| ca.pem.as_str()).collect();
        Self { ca, before: before.map(Arc::new), beside, failed: Arc::default(), online, site: site.to_owned() }
    }

    /// The one before, if its list is signed still.
    pub(super) fn before(&self) -> Option<&Arc<Ca>> {
        self.before.as_ref()
    }

    /// What is told beside its own certificate, PEM.
    pub(super) fn beside(&self) -> &str {
        &self.beside
    }

    /// If it is open.
    pub(super) fn now(&self) -> Option<&Arc<Ca>> {
        self.ca.get()
    }

    /// Opened now where it is not, and made where `wanted` and there is none. What failed is said once, and answered with for a
    /// while.
    pub(super) async fn get(&self, wanted: bool, now: Millis) -> Result<Arc<Ca>, CertificateError> {
        if let Some(ca) = self.now() {
            return Ok(Arc::clone(ca));
        }
        let failed = Arc::clone(&self.failed).lock_owned().await;
        // Somebody else did it meanwhile.
        if let Some(ca) = self.now() {
            return Ok(Arc::clone(ca));
        }
        if let Some((at, error)) = &*failed
            && (*at..at.saturating_add(FAILED_MS)).contains(&now)
        {
            return Err(CertificateError::Ca(Arc::clone(error)));
        }
        let (online, site) = (self.online.clone(), self.site.clone());
        // Whoever asked may hang up: the lock goes along, so that nobody reads a file that is being written.
        let work = tokio::task::spawn_blocking(move || {
            let opened = match Ca::open(&online, Which::Now, &site) {
                Ok(None) if wanted => Ca::make(&online, Which::Now, &site).map(Some),
                opened => opened,
            };
            (failed, opened)
        });
        let (mut failed, opened) = work.await.map_err(|_| CertificateError::Signing)?;
        match opened {
            Ok(Some(ca)) => {
                *failed = None;
                Ok(Arc::clone(self.ca.get_or_init(|| Arc::new(ca))))
            }
            Ok(None) => Err(CertificateError::NoneWanted),
            Err(error) => {
                say(&error);
                let error = Arc::new(error);
                *failed = Some((now, Arc::clone(&error)));
                Err(CertificateError::Ca(error))
            }
        }
    }
}

fn say(error: &CertificateError) {
    tracing::error!(%error, "no certificates are issued, and no list of revoked ones is signed");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The failure itself, by which it is told from another of the same words.
    fn failure(opened: Result<Arc<Ca>, CertificateError>) -> Arc<CertificateError> {
        match opened {
            Err(CertificateError::Ca(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn what_failed_is_tried_again_after_a_while_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("machine-ca.key");
        let open = OpenCa::at_start(dir.path().to_owned(), "lab");
        assert!(matches!(open.get(false, 0).await, Err(CertificateError::NoneWanted)));
        std::fs::write(&key, "nothing").unwrap();
        let first = failure(open.get(true, 1_000).await);
        assert!(matches!(&*first, CertificateError::Form(path) if *path == key), "{first}");
        // Whatever lies there now.
        std::fs::remove_file(&key).unwrap();
        for now in [1_000, 1_000 + FAILED_MS - 1] {
            assert!(Arc::ptr_eq(&failure(open.get(true, now).await), &first), "{now}");
        }
        assert!(!key.exists() && open.now().is_none());
        let made = open.get(true, 1_000 + FAILED_MS).await.unwrap();
        // From then on it is in memory, and the same for all.
        std::fs::remove_file(&key).unwrap();
        assert!(Arc::ptr_eq(&open.get(false, 0).await.unwrap(), &made));
    }

    #[tokio::test]
    async fn of_many_who_ask_at_once_one_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        let open = OpenCa::at_start(dir.path().to_owned(), "lab");
        let (first, second, third) = tokio::join!(open.get(true, 0), open.get(true, 0), open.get(true, 0));
        let [first, second, third] = [first, second, third].map(Result::unwrap);
        assert!(Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&second, &third));
    }
}
