//! The release's secrets in a running system: when the server is asked for them, and who hears of new ones.

use crate::change::blocking;
use crate::error::AgentError;
use crate::log;
use crate::secrets::{Keeper, Opened, lock};
use kiln_protocol::{SecretVersions, SecretsWord};
use kiln_release::{WantedCertificate, WantedSecret};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::process::Command;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Between two times of asking: a TPM takes seconds for a proof, and the server takes eight in a minute.
const PAUSE: Duration = Duration::from_secs(10);
/// systemd takes an order within so long; what it starts may take longer.
const ORDER_DEADLINE: Duration = Duration::from_secs(30);

/// What the service knows of them.
pub(super) struct Secrets {
    pub(super) keeper: Arc<Mutex<Keeper>>,
    changed: Arc<Notify>,
    asked: Option<Instant>,
    /// When a certificate was asked for, and who asks.
    pub(super) certifying: Option<(Instant, JoinHandle<()>)>,
}

impl Default for Secrets {
    fn default() -> Self {
        Self::of(&[], None)
    }
}

impl Secrets {
    pub(super) fn of(wanted: &[WantedSecret], certificate: Option<&WantedCertificate>) -> Self {
        let keeper = Arc::new(Mutex::new(Keeper::of(wanted, certificate)));
        Self { keeper, changed: Arc::default(), asked: None, certifying: None }
    }

    pub(super) fn keeper(&self) -> Arc<Mutex<Keeper>> {
        Arc::clone(&self.keeper)
    }

    /// Told when what is held has changed.
    pub(super) fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.changed)
    }

    /// For the report.
    pub(super) fn held(&self) -> Option<SecretVersions> {
        lock(&self.keeper).held()
    }

    /// What a reply says of them. Whether the server is to be asked now.
    pub(super) fn heard(&mut self, word: Option<SecretsWord>) -> bool {
        match word {
            None => false,
            Some(SecretsWord::Drop) => {
                match lock(&self.keeper).drop_all() {
                    Ok(true) => {
                        eprintln!(
                            "kiln-agent: the server has no secrets for this machine any more: they are forgotten"
                        );
                        self.changed.notify_one();
                    }
                    Ok(false) => {}
                    Err(error) => eprintln!("kiln-agent: secrets are not forgotten: {error}"),
                }
                false
            }
            // One that wants none would only be given none.
            Some(SecretsWord::Ask) if self.held().is_none() => false,
            Some(SecretsWord::Ask) => {
                let now = self.asked.is_none_or(|asked| asked.elapsed() >= PAUSE);
                if now {
                    self.asked = Some(Instant::now());
                }
                now
            }
        }
    }

    /// For the answer to a proof with which they were asked for, or not.
    pub(super) fn taker(&self, asked: bool, systemctl: &Path) -> Taker {
        let (keeper, changed) = (self.keeper(), self.changed());
        Taker { asked, keeper, changed, systemctl: systemctl.to_owned() }
    }
}

/// Puts what came in its place.
pub(super) struct Taker {
    asked: bool,
    pub(super) keeper: Arc<Mutex<Keeper>>,
    pub(super) changed: Arc<Notify>,
    systemctl: PathBuf,
}

impl Taker {
    pub(super) async fn take(self, refused: Option<String>, opened: Option<Opened>) {
        if !self.asked {
            return;
        }
        let Some(opened) = opened else {
            let reason = refused.unwrap_or_else(|| "the server gave none, and says not why: it is too old".into());
            eprintln!("kiln-agent: no secrets: {}", log::said(&reason));
            lock(&self.keeper).refuse(reason);
            return;
        };
        let keeper = Arc::clone(&self.keeper);
        let put = blocking(move || {
            let set = opened.set()?;
            let names: Vec<String> = set.0.iter().map(|(name, (n, _))| format!("{name} (version {n})")).collect();
            let units = lock(&keeper).put(&set)?;
            Ok((names, units))
        });
        match put.await {
            Ok((names, units)) => {
                eprintln!("kiln-agent: holds the secrets {}", names.join(", "));
                self.changed.notify_one();
                self.order(&units).await;
            }
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&self, error: &AgentError) {
        eprintln!("kiln-agent: no secrets: {error} ({})", error.kind());
        lock(&self.keeper).refuse(error.to_string());
        // Some may be held, and some not any more.
        self.changed.notify_one();
    }

    /// Units that are not running are started, others take the new values up as they can.
    pub(super) async fn order(&self, units: &[String]) {
        if units.is_empty() {
            return;
        }
        let mut command = Command::new(&self.systemctl);
        command.args(["--no-block", "reload-or-restart"]).args(units).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let said = tokio::time::timeout(ORDER_DEADLINE, command.status()).await;
        let trouble = match said {
            Ok(Ok(status)) if status.success() => return,
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", ORDER_DEADLINE.as_secs()),
        };
        eprintln!("kiln-agent: {} did not hear of new secrets: systemctl: {trouble}", units.join(", "));
    }
}
