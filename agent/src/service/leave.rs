//! How this system is left.

use super::Service;
use super::slots::DISK_DEADLINE;
use crate::change::{Ready, blocking};
use crate::error::AgentError;
use crate::log;
use kiln_protocol::Via;
use nix::sys::reboot::{RebootMode, reboot};
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

pub(super) fn restart(mode: RebootMode) -> std::io::Error {
    nix::unistd::sync();
    match reboot(mode) {
        Err(errno) => errno.into(),
        Ok(never) => match never {},
    }
}

impl Service {
    /// Leaves. The server hears of it first; then the image's init stops what runs.
    pub(super) async fn leave(mut self, cold: bool) -> AgentError {
        let via = match self.ready.as_deref().map(Ready::via) {
            Some(Via::Kexec) if !cold => Via::Kexec,
            Some(Via::Kexec | Via::Cold) | None => Via::Cold,
        };
        // From here there is no way back: a loaded kernel cannot be unloaded. A server that does not hear it hears the
        // next boot.
        if let Err(error) = self.report(0).await {
            eprintln!("kiln-agent: report not delivered: {error}");
        }
        log::sent().await;
        // What that report did not bring to the server waits on the disk for the next boot.
        if let Some(kept) = self.watch.keeper.flush()
            && timeout(DISK_DEADLINE, kept).await.is_err()
        {
            eprintln!("kiln-agent: the disk gives no answer");
        }
        let (verb, mode) = match via {
            Via::Kexec => ("kexec", RebootMode::RB_KEXEC),
            Via::Cold => ("reboot", RebootMode::RB_AUTOBOOT),
        };
        let systemctl = self.door.systemctl.clone();
        let asked = blocking(move || {
            let status = Command::new(&systemctl).arg(verb).stdin(Stdio::null()).status();
            status.map_err(AgentError::file(systemctl))
        });
        match timeout(STOP_DEADLINE, asked).await {
            // systemd stops this service too; still being here at the deadline means that something hangs.
            Ok(Ok(status)) if status.success() => sleep(STOP_DEADLINE).await,
            Ok(Ok(_) | Err(_)) | Err(_) => eprintln!("kiln-agent: systemctl {verb} failed; leaving without it"),
        }
        AgentError::system("leaving for the next release")((self.door.reboot)(mode))
    }
}
