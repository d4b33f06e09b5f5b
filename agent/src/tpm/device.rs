//! The TPM as a file: one command is written, one answer is read. The kernel's resource manager (`/dev/tpmrm0`) keeps what a
//! caller loads apart from others', and forgets it when the file is closed. Source: Linux
//! Documentation/security/tpm/tpm_tis.rst; tpm(4).

use kiln_protocol::tpm::command::{ANSWER_LIMIT, HEADER, answer_length};
use kiln_protocol::tpm::{Command, TpmError};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// The resource manager of the first TPM.
const DEVICE: &str = "/dev/tpmrm0";

/// Why the TPM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TpmFault {
    #[error("{DEVICE}: {0}")]
    Device(#[from] io::Error),
    #[error(transparent)]
    Answer(#[from] TpmError),
    #[error("it was written to, and none of its places holds what the agent wrote")]
    Spoilt,
}

impl TpmFault {
    /// It is said of what it was given: a parameter, a handle or a session (a code of format 1, part 2, §6.6.2). Not that it is
    /// busy, short of room for the moment, or in failure mode (format 0), nor that the device fails.
    pub fn is_refusal(&self) -> bool {
        self.code().is_some_and(|code| code & 0x80 != 0)
    }

    /// The code with which it refused.
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Answer(TpmError::Refused { code, .. }) => Some(*code),
            Self::Answer(_) | Self::Device(_) | Self::Spoilt => None,
        }
    }
}

/// What a TPM is reached by: the kernel's file, or a software TPM's socket.
trait Device: Read + Write + Send {}
impl<T: Read + Write + Send> Device for T {}

/// An open TPM. Its calls block, on some machines for a second.
pub struct Tpm(Box<dyn Device>);

impl Tpm {
    /// This machine's; none where there is none.
    pub fn open() -> Result<Option<Self>, TpmFault> {
        match File::options().read(true).write(true).open(Path::new(DEVICE)) {
            Ok(file) => Ok(Some(Self(Box::new(file)))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    #[cfg(test)]
    pub fn over(device: impl Read + Write + Send + 'static) -> Self {
        Self(Box::new(device))
    }

    /// Has a command done.
    pub fn run<T>(&mut self, command: &Command<T>) -> Result<T, TpmFault> {
        self.0.write_all(command.bytes())?;
        let mut answer = vec![0; ANSWER_LIMIT];
        let mut have = 0;
        let length = loop {
            let got = self.0.read(&mut answer[have..])?;
            have += got;
            let length = answer[..have].first_chunk::<HEADER>().map(|header| answer_length(*header));
            match length {
                Some(length) if length <= have => break length,
                Some(_) | None if got == 0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Some(_) | None => {}
            }
        };
        if length != have {
            return Err(TpmError::Surplus(have.saturating_sub(length)).into());
        }
        Ok(command.answer(&answer[..length])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_tpm_refuses_nothing() {
        let fault = |code| TpmFault::from(TpmError::Refused { command: "TPM2_Load", code });
        // TPM_RC_INTEGRITY of the first parameter, TPM_RC_HANDLE.
        assert!(fault(0x1df).is_refusal() && fault(0x18b).is_refusal());
        // Failure mode; out of memory for objects, lockout, being tested, retry; the kernel's resource manager out of room.
        for code in [0x101, 0x902, 0x921, 0x90a, 0x922, 0x904] {
            assert!(!fault(code).is_refusal(), "{code:#x}");
        }
        assert!(!TpmFault::from(io::Error::from(io::ErrorKind::TimedOut)).is_refusal());
    }
}
