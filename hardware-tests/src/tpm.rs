//! A machine's TPM: swtpm, a process of its own that QEMU talks to. Its state outlives power cuts, as a chip's does.

use crate::command;
use crate::error::{AtPath, LabError};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// swtpm opens its socket within so long, on a loaded host too.
const PATIENCE: Duration = Duration::from_secs(30);

/// A TPM that is switched on.
#[derive(Debug)]
pub struct SoftwareTpm {
    child: Child,
    socket: PathBuf,
}

impl SoftwareTpm {
    /// Switches on the TPM whose state lies in `dir`; a new one is made there.
    pub fn start(dir: &Path) -> Result<Self, LabError> {
        std::fs::create_dir_all(dir).at(dir)?;
        let socket = dir.join("control");
        let _ = std::fs::remove_file(&socket);
        let mut swtpm = Command::new("swtpm");
        // QEMU's going ends it.
        swtpm.args(["socket", "--tpm2", "--terminate", "--tpmstate"]).arg(format!("dir={}", dir.display()));
        swtpm.arg("--ctrl").arg(format!("type=unixio,path={}", socket.display()));
        swtpm.arg("--log").arg(format!("file={}", dir.join("log").display()));
        swtpm.stdin(Stdio::null()).stdout(Stdio::null());
        let child = swtpm.spawn().map_err(|source| LabError::Spawn { command: command::shown(&swtpm), source })?;
        let mut this = Self { child, socket };
        let begun = Instant::now();
        // QEMU connects once and does not wait; the socket is the one sign that swtpm gives.
        while !this.socket.exists() {
            let ended = this.child.try_wait().ok().flatten();
            if ended.is_some() || begun.elapsed() > PATIENCE {
                let status = ended.map_or_else(|| "its socket did not come".to_owned(), |s| s.to_string());
                let last_words = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
                return Err(LabError::Died { program: "swtpm".into(), status, last_words });
            }
            std::thread::yield_now();
        }
        Ok(this)
    }

    /// QEMU's arguments for it.
    pub fn arguments(&self) -> [String; 6] {
        [
            "-chardev".into(),
            format!("socket,id=tpm,path={}", self.socket.display()),
            "-tpmdev".into(),
            "emulator,id=tpm0,chardev=tpm".into(),
            "-device".into(),
            "tpm-crb,tpmdev=tpm0".into(),
        ]
    }
}

impl Drop for SoftwareTpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
