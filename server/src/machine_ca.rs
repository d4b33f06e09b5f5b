//! The key of the site's machine CA, which signs machines' certificates and the list of those that are revoked: ECDSA on P-256, by
//! ring. Key and certificate are files of the site, `online/machine-ca.key` and `online/machine-ca.pem`, made when the first
//! machine is to have a certificate, and never replaced by themselves: other programs trust them. How a person
//! replaces them is in `ca_rotation`.

use crate::error::CertificateError;
use crate::vault::{SECRET, write_new};
use jiff::Timestamp;
use kiln_protocol::KeyId;
use kiln_release::certificate::{certificate_spki, spki_key_id};
use kiln_release::machine_ca::{MachineCa, MachineCertificate, POINT, Revoked};
use kiln_release::{PublicKey, hex};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Which CA of the site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The one that signs.
    Now,
    /// One that was announced and signs nothing yet.
    Next,
    /// The one that signed before, whose certificates are not over.
    Before,
}

impl Which {
    /// Its key and its certificate, in the site's `online/`.
    pub fn files(self, online: &Path) -> (PathBuf, PathBuf) {
        let stem = match self {
            Self::Now => "machine-ca",
            Self::Next => "machine-ca-next",
            Self::Before => "machine-ca-before",
        };
        (online.join(format!("{stem}.key")), online.join(format!("{stem}.pem")))
    }
}

/// Of a file that everybody may read.
const PUBLIC: u32 = 0o644;

/// The CA.
#[derive(Debug)]
pub struct Ca {
    pair: EcdsaKeyPair,
    random: SystemRandom,
    point: [u8; POINT],
    site: String,
    /// Its certificate, PEM.
    pub pem: String,
}

fn read(path: &Path) -> Result<Option<String>, CertificateError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CertificateError::File { path: path.to_owned(), source }),
    }
}

impl Ca {
    /// From the site's `online/`; none: it was not made yet.
    pub fn open(online: &Path, which: Which, site: &str) -> Result<Option<Self>, CertificateError> {
        let (key, certificate) = which.files(online);
        let pem = read(&certificate)?;
        match (read(&key)?, pem) {
            (None, None) => Ok(None),
            // Another key under its name would look like it to people, and not to programs.
            (None, Some(_)) => Err(CertificateError::KeyMissing(key)),
            (Some(text), Some(pem)) => {
                let der = hex::pem_decode("PRIVATE KEY", &text).ok_or_else(|| CertificateError::Form(key.clone()))?;
                let ca = Self::of(&der, site, pem).ok_or(CertificateError::Form(key))?;
                let own = PublicKey::p256(ca.point).spki_der();
                let shown = hex::pem_decode("CERTIFICATE", &ca.pem);
                let fits = shown.is_some_and(|der| certificate_spki(&der).is_ok_and(|spki| spki == own));
                if fits { Ok(Some(ca)) } else { Err(CertificateError::Form(certificate)) }
            }
            // Cut short when it was made.
            (Some(text), None) => {
                let der = hex::pem_decode("PRIVATE KEY", &text).ok_or_else(|| CertificateError::Form(key.clone()))?;
                let ca = Self::of(&der, site, String::new()).ok_or(CertificateError::Form(key))?;
                ca.certified(certificate).map(Some)
            }
        }
    }

    /// Makes key and certificate, where there are none.
    pub fn make(online: &Path, which: Which, site: &str) -> Result<Self, CertificateError> {
        let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new());
        let made = made.map_err(|_| CertificateError::Signing)?;
        let ca = Self::of(made.as_ref(), site, String::new()).ok_or(CertificateError::Signing)?;
        let (key, certificate) = which.files(online);
        write_new(&key, &hex::pem_encode("PRIVATE KEY", made.as_ref()), SECRET)
            .map_err(|source| CertificateError::File { path: key, source })?;
        ca.certified(certificate)
    }

    fn of(pkcs8: &[u8], site: &str, pem: String) -> Option<Self> {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8, &random).ok()?;
        let point = pair.public_key().as_ref().try_into().ok()?;
        Some(Self { pair, random, point, site: site.to_owned(), pem })
    }

    /// Which CA it is: SHA-256 of its key's SPKI.
    pub fn id(&self) -> KeyId {
        spki_key_id(&PublicKey::p256(self.point).spki_der()).parse().expect("a SHA-256 in hex is a key id")
    }

    fn certified(mut self, path: PathBuf) -> Result<Self, CertificateError> {
        let der = self.name().certificate(|message| self.sign(message))?;
        let pem = hex::pem_encode("CERTIFICATE", &der);
        write_new(&path, &pem, PUBLIC).map_err(|source| CertificateError::File { path, source })?;
        self.pem = pem;
        Ok(self)
    }

    fn name(&self) -> MachineCa<'_> {
        MachineCa { site: &self.site, point: &self.point }
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, CertificateError> {
        let signature = self.pair.sign(&self.random, message).map_err(|_| CertificateError::Signing)?;
        Ok(signature.as_ref().to_vec())
    }

    /// A machine's certificate, PEM.
    pub fn issue(&self, machine: &MachineCertificate<'_>) -> Result<String, CertificateError> {
        let der = self.name().issue(machine, |message| self.sign(message))?;
        Ok(hex::pem_encode("CERTIFICATE", &der))
    }

    /// The list of those that are revoked, DER.
    pub fn list(
        &self,
        number: u64,
        made: Timestamp,
        next: Timestamp,
        revoked: &[Revoked],
    ) -> Result<Vec<u8>, CertificateError> {
        self.name().list(number, made, next, revoked, |message| self.sign(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const KEY: &str = "machine-ca.key";
    const CERTIFICATE: &str = "machine-ca.pem";

    #[test]
    fn it_is_made_once_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let online = dir.path();
        assert!(Ca::open(online, Which::Now, "lab").unwrap().is_none());
        let made = Ca::make(online, Which::Now, "lab").unwrap();
        assert_eq!(std::fs::metadata(online.join(KEY)).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Ca::make(online, Which::Now, "lab").is_err(), "there is one");
        let again = Ca::open(online, Which::Now, "lab").unwrap().unwrap();
        assert_eq!((again.point, &again.pem), (made.point, &made.pem));
        // Cut between its two files: the same CA again, whatever trusted it.
        std::fs::remove_file(online.join(CERTIFICATE)).unwrap();
        let again = Ca::open(online, Which::Now, "lab").unwrap().unwrap();
        assert_eq!((again.point, read(&online.join(CERTIFICATE)).unwrap()), (made.point, Some(again.pem)));
        // Without its key nothing is made in its place; nor does it take a key that is not the certificate's.
        let (key, kept) = (online.join(KEY), online.join("kept"));
        std::fs::rename(&key, &kept).unwrap();
        let error = Ca::open(online, Which::Now, "lab").unwrap_err();
        assert!(matches!(&error, CertificateError::KeyMissing(_)) && error.to_string().contains("restore"), "{error}");
        let other = dir.path().join("other");
        std::fs::create_dir(&other).unwrap();
        Ca::make(&other, Which::Now, "lab").unwrap();
        std::fs::copy(other.join(KEY), &key).unwrap();
        assert!(
            matches!(Ca::open(online, Which::Now, "lab"), Err(CertificateError::Form(path)) if path.ends_with(CERTIFICATE))
        );
        std::fs::write(&key, "nothing").unwrap();
        assert!(
            matches!(Ca::open(online, Which::Now, "lab"), Err(CertificateError::Form(path)) if path.ends_with(KEY))
        );
    }
}
