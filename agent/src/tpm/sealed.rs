//! A secret that only this machine's TPM gives back: what it is sealed in is of no use anywhere else. It is bound to no PCR, so
//! that it outlives releases and firmware; who has root's rights on the machine can have it unsealed.

use super::{Result, Tpm, TpmFault};
use kiln_protocol::tpm::command;
use kiln_protocol::tpm::{Auth, OWNER, Template, TpmError};

/// Longer than both parts come to, for the largest secret that is sealed. A kernel hands no longer command to a TPM.
const LIMIT: usize = 2048;

/// Whether it can be what [`Tpm::seal`] gave. What was cut, or never was one, is not asked of the TPM.
pub fn is_whole(sealed: &[u8]) -> bool {
    parts(sealed).is_some()
}

/// The private part and the public one.
fn parts(sealed: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = sealed.split_first_chunk::<2>().filter(|_| sealed.len() <= LIMIT)?;
    let (private, public) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    (!private.is_empty() && !public.is_empty()).then_some((private, public))
}

impl Tpm {
    /// Seals up to 128 bytes.
    pub fn seal(&mut self, secret: &[u8]) -> Result<Vec<u8>> {
        let (parent, _) = self.run(&command::create_primary(OWNER, Template::Storage))?;
        let sealed = self.run(&command::seal(parent, secret, &[]));
        self.run(&command::flush(parent))?;
        let (private, public) = sealed?;
        let length = u16::try_from(private.len()).expect("it came with a length of 16 bits");
        Ok([&length.to_be_bytes()[..], &private, &public].concat())
    }

    /// Gives it back. A refusal ([`TpmFault::code`]) says that another TPM sealed it, or that this one was cleared since.
    pub fn unseal(&mut self, sealed: &[u8]) -> Result<Vec<u8>> {
        let (private, public) =
            parts(sealed).ok_or_else(|| TpmFault::from(TpmError::Short { what: "what was sealed" }))?;
        let (parent, _) = self.run(&command::create_primary(OWNER, Template::Storage))?;
        let loaded = self.run(&command::load(parent, private, public));
        self.run(&command::flush(parent))?;
        let item = loaded?;
        let secret = self.run(&command::unseal(item, Auth::Password));
        self.run(&command::flush(item))?;
        secret
    }
}
