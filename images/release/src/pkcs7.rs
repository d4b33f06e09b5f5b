//! PKCS #7 signed data (RFC 2315; RFC 5652 §5 for the attributes' order) with one RSA signer and SHA-256: what UEFI,
//! Authenticode, dm-verity and IPE read. DER, and without a time in it: the same key and bytes give the same signature.
//!
//! The key itself is elsewhere: whoever calls brings a function that makes an RSASSA-PKCS1-v1_5 signature with SHA-256.
//! Verifying is the firmware's and the kernel's part, so nothing here verifies.

use crate::certificate::{der, take};
use crate::error::KeyError;
use ring::digest::{SHA256, digest};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OCTETS: u8 = 0x04;
const EXPLICIT_0: u8 = 0xa0;
/// Version 1, as an INTEGER.
const VERSION_1: [u8; 3] = [0x02, 1, 1];
/// id-data, id-signedData, rsaEncryption; contentType and messageDigest of PKCS #9.
const DATA: [u8; 11] = [0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 1];
const SIGNED_DATA: [u8; 11] = [0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 2];
const RSA: [u8; 11] = [0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1];
const CONTENT_TYPE: [u8; 11] = [0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 3];
const MESSAGE_DIGEST: [u8; 11] = [0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 4];
/// `AlgorithmIdentifier` of SHA-256, with the NULL that firmware compares byte for byte.
pub(crate) const SHA_256: [u8; 15] = [0x30, 13, 0x06, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1, 0x05, 0];

/// The signer's certificate, and what of it a signature names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Certificate<'a> {
    /// All of it, DER.
    pub der: &'a [u8],
    issuer: &'a [u8],
    serial: &'a [u8],
}

impl<'a> Certificate<'a> {
    /// Finds serial number and issuer (RFC 5280 §4.1). Nothing else is looked at.
    pub fn parse(der: &'a [u8]) -> Result<Self, KeyError> {
        let found = || {
            let mut rest = der;
            let (_, mut certificate) = take(&mut rest, SEQUENCE)?;
            let (_, mut tbs) = take(&mut certificate, SEQUENCE)?;
            // The version; absent in version 1.
            let _ = take(&mut tbs, EXPLICIT_0);
            let (serial, _) = take(&mut tbs, 0x02)?;
            let _algorithm = take(&mut tbs, SEQUENCE)?;
            let (issuer, _) = take(&mut tbs, SEQUENCE)?;
            rest.is_empty().then_some(Self { der, issuer, serial })
        };
        found().ok_or(KeyError::Certificate { reason: "not an X.509 certificate in DER" })
    }
}

/// What is signed, and how it lies in the signature.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// Bytes that lie elsewhere.
    Detached(&'a [u8]),
    /// Bytes that the signature carries.
    Enclosed(&'a [u8]),
    /// A structure of another type than data, that the signature carries: the type's OID and the structure, both DER.
    /// Its digest goes into signed attributes, beside the type.
    Typed(&'a [u8], &'a [u8]),
}

/// The `SignedData` alone. With `enclose` the certificate lies in it; else whoever verifies must have it.
pub fn signed_data<E>(
    content: Content<'_>,
    certificate: &Certificate<'_>,
    enclose: bool,
    sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    let (info, attributes, message) = match content {
        Content::Detached(bytes) => (der(SEQUENCE, &[&DATA]), None, bytes.to_vec()),
        Content::Enclosed(bytes) => {
            let inner = der(EXPLICIT_0, &[&der(OCTETS, &[bytes])]);
            (der(SEQUENCE, &[&DATA, &inner]), None, bytes.to_vec())
        }
        Content::Typed(oid, structure) => {
            let mut rest = structure;
            // RFC 2315 §9.3: the digest is over the contents' octets, not tag and length.
            let inner = take(&mut rest, SEQUENCE).map_or(structure, |(_, inner)| inner);
            let hash = digest(&SHA256, inner);
            let attribute = |id: &[u8], value: &[u8]| der(SEQUENCE, &[id, &der(SET, &[value])]);
            let mut attributes =
                [attribute(&CONTENT_TYPE, oid), attribute(&MESSAGE_DIGEST, &der(OCTETS, &[hash.as_ref()]))];
            // DER orders a SET OF by its elements' bytes.
            attributes.sort();
            let attributes = attributes.concat();
            // What is signed is the SET, not the tagged form in which it lies in the signature.
            let message = der(SET, &[&attributes]);
            (der(SEQUENCE, &[oid, &der(EXPLICIT_0, &[structure])]), Some(der(EXPLICIT_0, &[&attributes])), message)
        }
    };
    let signature = sign(&message)?;
    let signer = der(
        SEQUENCE,
        &[
            &VERSION_1,
            &der(SEQUENCE, &[certificate.issuer, certificate.serial]),
            &SHA_256,
            &attributes.unwrap_or_default(),
            &der(SEQUENCE, &[&RSA, &[0x05, 0]]),
            &der(OCTETS, &[&signature]),
        ],
    );
    let certificates = if enclose { der(EXPLICIT_0, &[certificate.der]) } else { Vec::new() };
    let algorithms = der(SET, &[&SHA_256]);
    Ok(der(SEQUENCE, &[&VERSION_1, &algorithms, &info, &certificates, &der(SET, &[&signer])]))
}

/// `SignedData` in its envelope, as all but UEFI variables want it.
pub fn enveloped(signed_data: &[u8]) -> Vec<u8> {
    der(SEQUENCE, &[&SIGNED_DATA, &der(EXPLICIT_0, &[signed_data])])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::self_signed_certificate;
    use crate::key::Signer;
    use std::convert::Infallible;

    #[test]
    fn issuer_and_serial_are_the_certificates() {
        let certificate = self_signed_certificate(&Signer::from_seed(&[5; 32]));
        let parsed = Certificate::parse(&certificate).unwrap();
        assert_eq!(parsed.serial[..2], [2, 16]);
        assert!(parsed.issuer.ends_with(b"kiln-machine"));
        for bad in [&certificate[1..], &certificate[..certificate.len() - 1], &[certificate.as_slice(), &[0]].concat()]
        {
            assert!(Certificate::parse(bad).is_err());
        }
    }

    #[test]
    fn what_is_signed_is_the_content_or_the_set_of_attributes() {
        let certificate = self_signed_certificate(&Signer::from_seed(&[5; 32]));
        let certificate = Certificate::parse(&certificate).unwrap();
        let asked = |content| {
            let mut asked = Vec::new();
            let made = signed_data(content, &certificate, false, |message| {
                asked = message.to_vec();
                Ok::<_, Infallible>(vec![9; 256])
            });
            (asked, made.unwrap())
        };
        let (message, detached) = asked(Content::Detached(b"root hash"));
        assert_eq!(message, b"root hash");
        assert!(!detached.windows(9).any(|w| w == b"root hash"));
        let (_, enclosed) = asked(Content::Enclosed(b"policy"));
        assert!(enclosed.windows(6).any(|w| w == b"policy"));
        let (message, typed) = asked(Content::Typed(&DATA, &der(SEQUENCE, &[b"abc"])));
        assert_eq!(message[0], SET);
        assert!(message.ends_with(digest(&SHA256, b"abc").as_ref()), "over the contents without tag and length");
        // The same attributes lie in it under another tag.
        assert!(typed.windows(message.len() - 1).any(|w| w == &message[1..]));
    }
}
