//! The machine's certificate in a running system: when the server is asked for another, and what becomes of the one that is over.

use super::Service;
use super::secrets::{Secrets, Taker};
use crate::api::Api;
use crate::change::blocking;
use crate::error::AgentError;
use crate::journal::monotonic_ms;
use crate::log;
use crate::memory::random;
use crate::secrets::{lock, request};
use kiln_protocol::{KeyId, Life, MachineId, Standing};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two times of asking, where the last one brought none.
const AGAIN: Duration = Duration::from_secs(60);
/// The same where the server says that there is one to be had.
const TOLD: Duration = Duration::from_secs(10);

impl Secrets {
    /// Whether the server is to be asked for a certificate now. `told`: it says that none that this machine has holds.
    pub(super) fn certificate_due(&self, told: bool) -> bool {
        let due = match lock(&self.keeper()).standing(monotonic_ms()) {
            None => return false,
            Some(Standing::Fresh) => told,
            Some(Standing::Renew | Standing::Over) => true,
        };
        let pause = if told { TOLD } else { AGAIN };
        due && self.certifying.as_ref().is_none_or(|(asked, task)| asked.elapsed() >= pause && task.is_finished())
    }

    /// Removes the certificate that is over.
    pub(super) fn end_certificate(&self) {
        match lock(&self.keeper()).expire(monotonic_ms()) {
            Ok(false) => {}
            Ok(true) => {
                eprintln!("kiln-agent: this machine's certificate is over, and no other came: it is removed");
                self.changed().notify_one();
            }
            Err(error) => eprintln!("kiln-agent: the certificate that is over is not removed: {error}"),
        }
    }
}

impl Service {
    /// Asks for a certificate.
    pub(super) fn certify(&mut self) {
        let (api, key) = (self.prover.0.another(), self.prover.1.clone());
        let (machine, boot_id) = (self.journal.machine.id.clone(), self.journal.state.boot_id.clone());
        let taker = self.secrets.taker(true, &self.door.systemctl);
        let task = tokio::spawn(async move { taker.certify(api, &machine, &key, &boot_id).await });
        self.secrets.certifying = Some((Instant::now(), task));
    }
}

impl Taker {
    async fn certify(self, mut api: Api, machine: &MachineId, identity: &KeyId, boot_id: &str) {
        match self.certified(&mut api, machine, identity, boot_id).await {
            Ok((serial, units)) => {
                eprintln!("kiln-agent: holds a certificate, serial {}", log::said(&serial));
                self.changed.notify_one();
                self.order(&units).await;
            }
            Err(reason) => {
                eprintln!("kiln-agent: no certificate: {}", log::said(&reason));
                lock(&self.keeper).uncertified(reason);
            }
        }
    }

    /// Its serial number, and the units that are to hear of it; else why there is none.
    async fn certified(
        &self,
        api: &mut Api,
        machine: &MachineId,
        identity: &KeyId,
        boot_id: &str,
    ) -> Result<(String, Vec<String>), String> {
        let said = |error: AgentError| format!("{error} ({})", error.kind());
        let (key, request) = request(machine, identity, boot_id).map_err(said)?;
        let answer = api.certify(&request).await.map_err(said)?;
        let refused = || answer.refused.unwrap_or_else(|| "the server says not why".into());
        let issued = answer.issued.ok_or_else(refused)?;
        let (now, serial) = (monotonic_ms(), issued.serial.clone());
        let expires = now.saturating_add(issued.lasts_s.saturating_mul(1000));
        let life = Life { issued: now, expires, jitter: random().map_err(said)?[0] };
        let keeper = Arc::clone(&self.keeper);
        let units = blocking(move || lock(&keeper).certify(&key, &issued, life)).await.map_err(said)?;
        Ok((serial, units))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::Keeper;
    use crate::secrets::tests::{asked, issued, place};
    use kiln_release::{CertificatePolicy, WantedCertificate};
    use std::path::Path;
    use std::sync::Mutex;

    #[tokio::test]
    async fn another_certificate_is_asked_for_in_time_and_before_that_at_the_servers_word_alone() {
        let (dir, users) = (place(), Path::new("/etc/passwd"));
        let wanted =
            WantedCertificate { owner: None, required: true, units: Vec::new(), policy: CertificatePolicy::Approved };
        let keeper = |wanted| Arc::new(Mutex::new(Keeper::at(dir.path(), users, &[], wanted)));
        let secrets = |keeper| {
            let mut secrets = Secrets::of(&[], None);
            secrets.keeper = keeper;
            secrets
        };
        let none = secrets(keeper(None));
        assert!(!none.certificate_due(false) && !none.certificate_due(true), "its release wants none");
        let mut some = secrets(keeper(Some(&wanted)));
        assert!(some.certificate_due(false), "there is none yet");
        let now = monotonic_ms();
        let fresh = Life { issued: now, expires: now + 1_000_000_000, jitter: 0 };
        // Past its middle, whenever this host started.
        let renews = Life { issued: 0, expires: now + now / 4, jitter: u8::MAX };
        for (life, by_itself) in [(fresh, false), (renews, true), (Life { expires: now, ..renews }, true)] {
            lock(&some.keeper()).certify(&asked().0, &issued("CERTIFICATE\n"), life).unwrap();
            assert_eq!((some.certificate_due(false), some.certificate_due(true)), (by_itself, true), "{life:?}");
        }
        // One that is being asked for, or was just now.
        let asks = tokio::spawn(std::future::pending());
        some.certifying = Some((Instant::now().checked_sub(AGAIN).unwrap(), asks));
        assert!(!some.certificate_due(true), "it is still asked for");
        let asked = tokio::spawn(std::future::ready(()));
        while !asked.is_finished() {
            tokio::task::yield_now().await;
        }
        some.certifying = Some((Instant::now(), asked));
        assert!(!some.certificate_due(false) && !some.certificate_due(true), "not at once again");
    }
}
