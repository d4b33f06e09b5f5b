//! How this system is left.

use super::Service;
use super::slots::DISK_DEADLINE;
use crate::change::{Otherwise, Ready, blocking};
use crate::error::AgentError;
use crate::{attest, log};
use kiln_protocol::{TpmPresence, Via};
use nix::sys::reboot::RebootMode;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// The image's init has so long to stop its services before the agent leaves without it.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// How this system is left. The seam at which a test stays in the room.
pub(super) struct Door {
    pub systemctl: PathBuf,
    /// Comes back only with an error.
    pub reboot: fn(RebootMode) -> std::io::Error,
}

impl Door {
    /// The image's init stops what runs; then this system is left. Comes back only with an error.
    pub(super) async fn go(&self, via: Via) -> AgentError {
        let (verb, mode) = match via {
            Via::Kexec => ("kexec", RebootMode::RB_KEXEC),
            Via::Cold => ("reboot", RebootMode::RB_AUTOBOOT),
        };
        let systemctl = self.systemctl.clone();
        let asked = blocking(move || {
            // Where a kernel is loaded, systemd's restart would be a kexec as well (its ENVIRONMENT.md).
            let status =
                Command::new(&systemctl).arg(verb).env("SYSTEMCTL_SKIP_AUTO_KEXEC", "1").stdin(Stdio::null()).status();
            status.map_err(AgentError::file(systemctl))
        });
        match timeout(STOP_DEADLINE, asked).await {
            // systemd stops this service too; still being here at the deadline means that something hangs.
            Ok(Ok(status)) if status.success() => sleep(STOP_DEADLINE).await,
            Ok(Ok(_) | Err(_)) | Err(_) => eprintln!("kiln-agent: systemctl {verb} failed; leaving without it"),
        }
        AgentError::system("leaving for the next release")((self.reboot)(mode))
    }
}

impl Service {
    /// How a kexec that is loaded becomes the next boot: if that would not be attested although this one is, the firmware starts it.
    async fn carried(&self) -> Via {
        if self.journal.machine.tpm != Some(TpmPresence::Ready) {
            return Via::Kexec;
        }
        // Over a connection of its own: whoever leaves waits for no lock.
        let mut api = self.prover.0.another();
        let carries = attest::may_carry(&mut api, &self.journal.machine.id, &self.journal.state.boot_id).await;
        let otherwise = self.ready.as_deref().map(|ready| ready.otherwise(self.has_disk()));
        match otherwise {
            Some(Otherwise::Cold) if !carries => Via::Cold,
            Some(Otherwise::Cold | Otherwise::Kexec) | None => Via::Kexec,
        }
    }

    /// Leaves. The server hears of it first; then the image's init stops what runs.
    pub(super) async fn leave(mut self, cold: bool) -> AgentError {
        let via = match self.ready.as_deref().map(Ready::via) {
            Some(Via::Kexec) if !cold => self.carried().await,
            Some(Via::Kexec | Via::Cold) | None => Via::Cold,
        };
        // From here there is no way back: a loaded kernel cannot be unloaded. A server that does not hear it hears the
        // next boot.
        if let Err(error) = self.report(0).await {
            eprintln!("kiln-agent: report not delivered: {error}");
        }
        log::sent().await;
        // The image's init could not execute its own end.
        if self.gone {
            let error = (self.door.reboot)(RebootMode::RB_AUTOBOOT);
            return AgentError::system("leaving a system whose disk is gone")(error);
        }
        // What that report did not bring to the server waits on the disk for the next boot.
        if let Some(kept) = self.watch.keeper.flush()
            && timeout(DISK_DEADLINE, kept).await.is_err()
        {
            eprintln!("kiln-agent: the disk gives no answer");
        }
        self.door.go(via).await
    }
}
