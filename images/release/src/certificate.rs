//! A machine's TLS client certificate: a self-signed X.509 v3 certificate around its Ed25519 key, and the machine's
//! key id, which is the SHA-256 of the key's SPKI (RFC 5280, RFC 8410).
//!
//! The certificate says nothing but the key: name and validity are the same for every machine, so that it is a pure
//! function of the key. TLS shows possession of the key; who may do what is decided by key id.

use crate::error::KeyError;
use crate::hex;
use crate::key::{PublicKey, Signer};

/// SPKI of an Ed25519 key, up to the 32 bytes of the key (RFC 8410, section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];
/// `AlgorithmIdentifier` of Ed25519.
const ED25519: [u8; 7] = [0x30, 5, 6, 3, 0x2b, 0x65, 0x70];
/// Common name of every machine certificate.
const COMMON_NAME: &[u8] = b"kiln-machine";
/// RFC 5280, 4.1.2.5: dates before 2050 are UTCTime, later ones GeneralizedTime; the last is "no well-defined end".
const NOT_BEFORE: &[u8] = b"200101000000Z";
const NOT_AFTER: &[u8] = b"99991231235959Z";
/// Far more than [`self_signed_certificate`] makes.
const MAX_CERTIFICATE: usize = 4096;

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const SEQUENCE: u8 = 0x30;

/// SPKI DER of a signer's public key.
pub fn spki_der(signer: &Signer) -> Vec<u8> {
    [&SPKI_PREFIX[..], &signer.public_bytes()].concat()
}

/// The same of a public key alone.
pub fn public_spki_der(key: &PublicKey) -> Vec<u8> {
    key.spki_der()
}

/// A machine's key id: SHA-256 of its SPKI DER, lower-case hex.
pub fn spki_key_id(spki_der: &[u8]) -> String {
    hex::sha256(spki_der)
}

/// One DER element.
pub(crate) fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut out = vec![tag];
    match content.len() {
        length @ 0..=0x7f => out.push(u8::try_from(length).expect("at most 127")),
        length @ 0x80..=0xff => out.extend([0x81, u8::try_from(length).expect("at most 255")]),
        length @ 0x100..=0xffff => {
            out.push(0x82);
            out.extend(u16::try_from(length).expect("at most 65535").to_be_bytes());
        }
        length @ 0x1_0000..=0xff_ffff => {
            out.push(0x83);
            out.extend(&u32::try_from(length).expect("at most 16777215").to_be_bytes()[1..]);
        }
        length => {
            out.push(0x84);
            out.extend(
                u32::try_from(length).expect("nothing here is longer than a list of all machines").to_be_bytes(),
            );
        }
    }
    out.extend(content);
    out
}

/// The certificate of a machine's key, DER. The same key always gives the same bytes.
pub fn self_signed_certificate(signer: &Signer) -> Vec<u8> {
    let oid = |bytes: &[u8]| der(0x06, &[bytes]);
    let name = der(SEQUENCE, &[&der(0x31, &[&der(SEQUENCE, &[&oid(&[0x55, 4, 3]), &der(0x0c, &[COMMON_NAME])])])]);
    // Positive and not zero whatever the key is.
    let mut serial = signer.public_bytes()[..16].to_vec();
    serial[0] = serial[0] & 0x3f | 0x40;
    let extension = |id: &[u8], critical: bool, value: &[u8]| {
        let flag: &[u8] = if critical { &[0x01, 0x01, 0xff] } else { &[] };
        der(SEQUENCE, &[&oid(id), flag, &der(0x04, &[value])])
    };
    let extensions = der(
        SEQUENCE,
        &[
            // basicConstraints: no CA.
            &extension(&[0x55, 0x1d, 0x13], true, &der(SEQUENCE, &[])),
            // keyUsage: digitalSignature.
            &extension(&[0x55, 0x1d, 0x0f], true, &[BIT_STRING, 2, 7, 0x80]),
            // extKeyUsage: id-kp-clientAuth.
            &extension(&[0x55, 0x1d, 0x25], false, &der(SEQUENCE, &[&oid(&[0x2b, 6, 1, 5, 5, 7, 3, 2])])),
        ],
    );
    let tbs = der(
        SEQUENCE,
        &[
            &der(0xa0, &[&[INTEGER, 1, 2]]), // v3
            &der(INTEGER, &[&serial]),
            &ED25519,
            &name,
            &der(SEQUENCE, &[&der(0x17, &[NOT_BEFORE]), &der(0x18, &[NOT_AFTER])]),
            &name,
            &spki_der(signer),
            &der(0xa3, &[&extensions]),
        ],
    );
    let signature = signer.sign(&tbs);
    der(SEQUENCE, &[&tbs, &ED25519, &der(BIT_STRING, &[&[0], &signature])])
}

/// Takes one element with this tag off the front: (the whole element, its content).
pub(crate) fn take<'a>(input: &mut &'a [u8], tag: u8) -> Option<(&'a [u8], &'a [u8])> {
    let whole = *input;
    let (&[got, first], rest) = whole.split_first_chunk::<2>()?;
    let (length, header) = match first {
        0..=0x7f => (usize::from(first), 2),
        // DER: the shortest form only.
        0x81 => (usize::from(*rest.first()?), 3),
        0x82 => (usize::from(u16::from_be_bytes(*rest.first_chunk::<2>()?)), 4),
        0x80 | 0x83..=0xff => return None,
    };
    let shortest = match header {
        3 => length > 0x7f,
        4 => length > 0xff,
        _ => true,
    };
    if got != tag || !shortest {
        return None;
    }
    let element = whole.get(..header + length)?;
    *input = &whole[header + length..];
    Some((element, &element[header..]))
}

/// The SubjectPublicKeyInfo of any X.509 v3 certificate (RFC 5280 §4.1), as it stands there. Nothing is verified.
pub fn certificate_spki(certificate: &[u8]) -> Result<&[u8], KeyError> {
    let wrong = |reason| KeyError::Certificate { reason };
    let mut input = certificate;
    let (_, mut outer) = take(&mut input, SEQUENCE).ok_or(wrong("no outer sequence"))?;
    let (_, mut body) = take(&mut outer, SEQUENCE).ok_or(wrong("no TBSCertificate"))?;
    // version, serialNumber, signature, issuer, validity, subject
    for tag in [0xa0, INTEGER, SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE] {
        take(&mut body, tag).ok_or(wrong("not the fields of version 3"))?;
    }
    take(&mut body, SEQUENCE).map(|(spki, _)| spki).ok_or(wrong("no SPKI"))
}

/// Key id of a well-formed self-signed Ed25519 certificate. The dates are not looked at: a machine's clock and
/// certificate prove nothing, its key does.
pub fn certificate_key_id(certificate: &[u8]) -> Result<String, KeyError> {
    let wrong = |reason| KeyError::Certificate { reason };
    if certificate.len() > MAX_CERTIFICATE {
        return Err(wrong("it is longer than 4096 bytes"));
    }
    let mut input = certificate;
    let (_, mut outer) = take(&mut input, SEQUENCE).ok_or(wrong("no outer sequence"))?;
    let (tbs, mut body) = take(&mut outer, SEQUENCE).ok_or(wrong("no TBSCertificate"))?;
    let (algorithm, _) = take(&mut outer, SEQUENCE).ok_or(wrong("no signature algorithm"))?;
    let (_, signature) = take(&mut outer, BIT_STRING).ok_or(wrong("no signature"))?;
    if !input.is_empty() || !outer.is_empty() {
        return Err(wrong("bytes after its end"));
    }
    let (version, _) = take(&mut body, 0xa0).ok_or(wrong("no version"))?;
    if version != [0xa0, 3, INTEGER, 1, 2] {
        return Err(wrong("not version 3"));
    }
    take(&mut body, INTEGER).ok_or(wrong("no serial number"))?;
    let (inner_algorithm, _) = take(&mut body, SEQUENCE).ok_or(wrong("no inner signature algorithm"))?;
    if algorithm != ED25519 || inner_algorithm != ED25519 {
        return Err(wrong("not signed with Ed25519"));
    }
    let (issuer, _) = take(&mut body, SEQUENCE).ok_or(wrong("no issuer"))?;
    take(&mut body, SEQUENCE).ok_or(wrong("no validity"))?;
    let (subject, _) = take(&mut body, SEQUENCE).ok_or(wrong("no subject"))?;
    if issuer != subject {
        return Err(wrong("issuer and subject differ"));
    }
    let (spki, _) = take(&mut body, SEQUENCE).ok_or(wrong("no public key"))?;
    let key: [u8; 32] = spki
        .strip_prefix(&SPKI_PREFIX[..])
        .and_then(|key| key.try_into().ok())
        .ok_or(wrong("the public key is not Ed25519"))?;
    if !body.is_empty() && (take(&mut body, 0xa3).is_none() || !body.is_empty()) {
        return Err(wrong("something else than extensions after the public key"));
    }
    match signature.strip_prefix(&[0]) {
        Some(signature) if PublicKey::ed25519(key).verifies(tbs, signature) => Ok(spki_key_id(spki)),
        Some(_) | None => Err(KeyError::CertificateSignature),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn its_key_id_is_read_back() {
        let signer = Signer::from_seed(&[3; 32]);
        let certificate = self_signed_certificate(&signer);
        assert_eq!(certificate, self_signed_certificate(&signer));
        assert_eq!(certificate_key_id(&certificate).unwrap(), spki_key_id(&spki_der(&signer)));
    }

    #[test]
    fn any_flipped_bit_is_refused_or_harmless() {
        let certificate = self_signed_certificate(&Signer::from_seed(&[3; 32]));
        let expected = certificate_key_id(&certificate).unwrap();
        for i in 0..certificate.len() {
            for bit in 0..8 {
                let mut altered = certificate.clone();
                altered[i] ^= 1 << bit;
                assert_ne!(certificate_key_id(&altered).ok(), Some(expected.clone()), "byte {i} bit {bit}");
            }
        }
    }

    #[test]
    fn truncated_and_extended_ones_are_refused() {
        let certificate = self_signed_certificate(&Signer::from_seed(&[3; 32]));
        for length in 0..certificate.len() {
            assert!(certificate_key_id(&certificate[..length]).is_err(), "{length}");
        }
        assert!(certificate_key_id(&[&certificate[..], &[0]].concat()).is_err());
        assert!(certificate_key_id(&vec![0x30; MAX_CERTIFICATE + 1]).is_err());
    }

    proptest! {
        #[test]
        fn every_seed_gives_a_readable_certificate(seed in any::<[u8; 32]>()) {
            let signer = Signer::from_seed(&seed);
            prop_assert_eq!(certificate_key_id(&self_signed_certificate(&signer)).unwrap(), spki_key_id(&spki_der(&signer)));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(certificate_key_id(&bytes).is_err());
        }
    }
}
