//! A copy of the memory in /run, for this boot. The service of the running system may be started again at any time, and what
//! is stored may have been spoilt since the initramfs read it: a variable that was cut or deleted, a TPM that does not
//! answer. It goes on with what this machine remembered last, so that nothing that was seen is forgotten; in the initramfs,
//! where there is no such copy yet, a person decides ([`crate::safe`]).
//!
//! Each place has a copy of its own. An initramfs of an earlier release that met a busy TPM went on with what EFI variables remember,
//! which may be older: that must not take the place of what the TPM remembers. Where the TPM gives no answer later, its copy counts as
//! before.

use super::place::{BOOT_PLACE, write_file};
use super::{Memory, Place};
use crate::error::{AgentError, Result};
use std::path::{Path, PathBuf};

const COPY: &str = "remembered.json";
/// The same of what a TPM remembers, and of what EFI variables do.
const COPY_OF_TPM: &str = "remembered-tpm.json";
const COPY_OF_EFI: &str = "remembered-efi.json";

/// What a start of the service goes on with.
#[derive(Debug)]
pub struct Resumed {
    pub memory: Memory,
    /// What is stored is not that: why.
    pub spoilt: Option<AgentError>,
}

impl Place {
    fn copy(&self) -> PathBuf {
        match self {
            Self::Efi => Path::new(BOOT_PLACE).join(COPY_OF_EFI),
            Self::Directory(dir) | Self::Boot(dir) => dir.join(COPY),
            Self::Tpm(place) => place.copy().with_file_name(COPY_OF_TPM),
        }
    }

    /// The copy; without one of its own, the TPM's, where this boot had that before.
    fn copied(&self) -> Option<Memory> {
        let own = self.copy();
        let read =
            |path: &Path| std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Memory>(&bytes).ok());
        read(&own).or_else(|| read(&own.with_file_name(COPY_OF_TPM)))
    }

    /// Before it is stored, so that the copy is never the older one.
    pub(super) fn keep_copy(&self, bytes: &[u8]) {
        let path = self.copy();
        if std::fs::read(&path).is_ok_and(|kept| kept == bytes) {
            return;
        }
        let dir = path.parent().unwrap_or(Path::new("/"));
        if let Err(error) = write_file(dir, &path, bytes) {
            println!("kiln-agent: {}: no copy of what this machine remembers: {error}", path.display());
            // None is better than an old one.
            let _ = std::fs::remove_file(&path);
        }
    }

    /// What this machine remembered last in this boot: the copy; without one what is stored, unless that is gone; else what
    /// the initramfs handed over.
    pub fn resume(&self, handed_over: Option<&Memory>) -> Result<Resumed> {
        let stored = self.memory();
        let copy = self.copied();
        let gone = stored.as_ref().is_ok_and(|stored| *stored == Memory::default());
        let other = if stored.is_err() || gone { copy.or_else(|| handed_over.cloned()) } else { copy };
        match (other, stored) {
            (Some(memory), Ok(stored)) if memory == stored => Ok(Resumed { memory, spoilt: None }),
            (Some(memory), Ok(_)) => {
                let reason = "it is not what this machine remembered last in this boot".to_owned();
                let spoilt = Some(AgentError::Format { path: self.path("Seen"), reason });
                Ok(Resumed { memory, spoilt })
            }
            (Some(memory), Err(error)) => Ok(Resumed { memory, spoilt: Some(error) }),
            (None, stored) => Ok(Resumed { memory: stored?, spoilt: None }),
        }
    }
}
