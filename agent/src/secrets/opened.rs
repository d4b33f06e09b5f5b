//! A sealed set, opened: by this machine's TPM, and only as long as its PCRs are as they were quoted.

use crate::error::{AgentError, Result};
use kiln_protocol::{MachineId, Nonce, SecretSet, bound_to};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce as Once, UnboundKey};

/// The bytes of a set; overwritten when they are dropped.
pub struct Opened(Vec<u8>);

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opened")
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        forget(&mut self.0);
    }
}

impl Opened {
    /// Names, versions, values.
    pub fn set(&self) -> Result<SecretSet<'_>> {
        SecretSet::decode(&self.0).map_err(|error| AgentError::Secrets { reason: error.to_string() })
    }
}

/// Overwrites what was secret.
pub(super) fn forget(bytes: &mut [u8]) {
    bytes.fill(0);
    // Otherwise nobody would read what was written, and the compiler could leave it out.
    std::hint::black_box(bytes);
}

/// Opens what came with the answer to a proof, by the key that the TPM took out of its credential.
pub fn open(
    mut key: Vec<u8>,
    mut sealed: Vec<u8>,
    machine: &MachineId,
    boot_id: &str,
    nonce: &Nonce,
) -> Result<Opened> {
    let bad = || AgentError::Secrets { reason: "what came is not sealed for this machine, boot and proof".into() };
    let aead = UnboundKey::new(&AES_256_GCM, &key).map(LessSafeKey::new);
    forget(&mut key);
    // The key is of this set alone, so its nonce is.
    let once = Once::assume_unique_for_key([0; NONCE_LEN]);
    let bound = bound_to(machine, boot_id, nonce);
    let length = aead.map_err(|_| bad())?.open_in_place(once, Aad::from(bound), &mut sealed).map_err(|_| bad())?.len();
    sealed.truncate(length);
    Ok(Opened(sealed))
}
