//! The machine's own key and certificate, for other programs: made and kept as a secret is. Key and certificate are one file,
//! which takes the place of the one before at once, so that no program ever reads a half of one and a half of another.

use super::Keeper;
use super::opened::forget;
use crate::error::{AgentError, Result};
use kiln_protocol::{CertificateRequest, HexBytes, IssuedCertificate, KeyId, Life, MachineId, Standing, possession};
use kiln_release::{IDENTITY_NAME, MACHINE_CA_NAME, hex};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use std::path::Path;

/// When it came and when it ends, on the kernel's clock since the start: the service may start again in the same boot.
const LIFE: &str = ".life";

/// A private key, PEM; overwritten when it is dropped.
pub struct NewKey(Vec<u8>);

impl Drop for NewKey {
    fn drop(&mut self) {
        forget(&mut self.0);
    }
}

/// Makes a key, and what the server is asked with.
pub fn request(machine: &MachineId, identity: &KeyId, boot_id: &str) -> Result<(NewKey, CertificateRequest)> {
    let random = SystemRandom::new();
    let bad = || AgentError::Secrets { reason: "no key can be made".into() };
    let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).map_err(|_| bad())?;
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, made.as_ref(), &random).map_err(|_| bad())?;
    let key = NewKey(hex::pem_encode("PRIVATE KEY", made.as_ref()).into_bytes());
    let public = pair.public_key().as_ref();
    let proof = pair.sign(&random, &possession(machine, identity, boot_id, public)).map_err(|_| bad())?;
    let request = CertificateRequest {
        machine: machine.clone(),
        boot_id: boot_id.to_owned(),
        public_key: HexBytes(public.to_vec()),
        proof: HexBytes(proof.as_ref().to_vec()),
    };
    Ok((key, request))
}

/// What an earlier start of the service wrote down, if the certificate is still there.
pub(super) fn kept(place: &Path) -> Option<Life> {
    let text = std::fs::read_to_string(place.join(LIFE)).ok()?;
    let mut numbers = text.split(' ');
    let mut next = || numbers.next()?.parse::<u64>().ok();
    let life = Life { issued: next()?, expires: next()?, jitter: u8::try_from(next()?).ok()? };
    place.join(IDENTITY_NAME).exists().then_some(life)
}

impl Keeper {
    /// How its certificate stands; none: the release wants none.
    pub fn standing(&self, now: u64) -> Option<Standing> {
        self.certificate.as_ref()?;
        Some(self.life.map_or(Standing::Over, |life| life.standing(now)))
    }

    /// Puts key and certificate in the place of those before. Gives the units that are to hear of them.
    pub fn certify(&mut self, key: &NewKey, issued: &IssuedCertificate, life: Life) -> Result<Vec<String>> {
        let Some(wanted) = self.certificate.clone() else { return Ok(Vec::new()) };
        self.in_memory()?;
        let was_whole = self.missing().is_none();
        // It is public, and the same for years.
        self.write(MACHINE_CA_NAME, None, 0o444, issued.ca.as_bytes())?;
        let mut both = [&key.0[..], issued.certificate.as_bytes()].concat();
        let written = self.write(IDENTITY_NAME, wanted.owner.as_deref(), 0o400, &both);
        forget(&mut both);
        written?;
        (self.life, self.uncertified) = (Some(life), None);
        let text = format!("{} {} {}", life.issued, life.expires, life.jitter);
        self.write(LIFE, None, 0o600, text.as_bytes())?;
        Ok(self.units(was_whole, &[], true))
    }

    /// The server was asked, and issued none.
    pub fn uncertified(&mut self, reason: String) {
        self.uncertified = Some(reason);
    }

    /// Removes the certificate that is over. Whether there was one.
    pub fn expire(&mut self, now: u64) -> Result<bool> {
        if self.life.is_none_or(|life| life.standing(now) != Standing::Over) {
            return Ok(false);
        }
        self.remove(IDENTITY_NAME)?;
        self.life = None;
        Ok(true)
    }
}
