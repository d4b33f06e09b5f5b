//! SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7) of the three kinds of key that TUF repositories use, and the PEM
//! form in which key objects hold two of them.
//!
//! Kiln's own keys are Ed25519 and stand in key objects as hex; NIST P-256 and RSA keys are read so that repositories of
//! other makers can be verified.

use crate::certificate::{der, take};
use crate::hex;
use crate::key::Scheme;

/// `AlgorithmIdentifier` of Ed25519 (RFC 8410, section 3).
const ED25519: [u8; 7] = [0x30, 5, 6, 3, 0x2b, 0x65, 0x70];
/// id-ecPublicKey on prime256v1 (RFC 5480, section 2.1.1).
const P256: [u8; 21] =
    [0x30, 19, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
/// rsaEncryption with its NULL (RFC 3279, section 2.3.1).
const RSA: [u8; 15] = [0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];
/// An uncompressed point: 4, x, y.
const P256_POINT: usize = 65;
/// Room for a key of 8192 bits, which is the longest that is verified.
const MAX_SPKI: usize = 1200;
const PEM_LABEL: &str = "PUBLIC KEY";
const BIT_STRING: u8 = 3;
const SEQUENCE: u8 = 0x30;

fn algorithm(scheme: Scheme) -> &'static [u8] {
    match scheme {
        Scheme::Ed25519 => &ED25519,
        Scheme::EcdsaP256 => &P256,
        Scheme::RsaPss => &RSA,
    }
}

/// DER of a key of this kind; `key` is its own form: 32 bytes, an uncompressed point, an `RSAPublicKey`.
pub(crate) fn encode(scheme: Scheme, key: &[u8]) -> Vec<u8> {
    der(SEQUENCE, &[algorithm(scheme), &der(BIT_STRING, &[&[0], key])])
}

/// The same as PEM.
pub(crate) fn encode_pem(scheme: Scheme, key: &[u8]) -> String {
    hex::pem_encode(PEM_LABEL, &encode(scheme, key))
}

/// The key in PEM text, if it is one of this kind and nothing else; its own form.
pub(crate) fn decode_pem(scheme: Scheme, pem: &str) -> Option<Vec<u8>> {
    let spki = hex::pem_decode(PEM_LABEL, pem)?;
    let mut rest = spki.as_slice();
    let (_, mut info) = take(&mut rest, SEQUENCE)?;
    let (named, _) = take(&mut info, SEQUENCE)?;
    let (_, bits) = take(&mut info, BIT_STRING)?;
    let (unused, key) = bits.split_first()?;
    let right_form = match scheme {
        Scheme::Ed25519 => key.len() == 32,
        // A compressed point would be the same key in another form, and be counted as another.
        Scheme::EcdsaP256 => key.len() == P256_POINT && key[0] == 4,
        Scheme::RsaPss => key.len() <= MAX_SPKI,
    };
    let whole = rest.is_empty() && info.is_empty() && *unused == 0 && named == algorithm(scheme);
    (whole && right_form).then(|| key.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_key_of_the_named_kind_is_read() {
        for (scheme, key) in [
            (Scheme::Ed25519, vec![7; 32]),
            (Scheme::EcdsaP256, [&[4][..], &[7; 64]].concat()),
            (Scheme::RsaPss, vec![7; 270]),
        ] {
            let pem = encode_pem(scheme, &key);
            assert_eq!(decode_pem(scheme, &pem).as_deref(), Some(key.as_slice()));
            for other in [Scheme::Ed25519, Scheme::EcdsaP256, Scheme::RsaPss] {
                assert_eq!(decode_pem(other, &pem).is_some(), other == scheme);
            }
            let spki = encode(scheme, &key);
            for length in 0..spki.len() {
                assert_eq!(decode_pem(scheme, &hex::pem_encode(PEM_LABEL, &spki[..length])), None);
            }
            assert_eq!(decode_pem(scheme, &hex::pem_encode(PEM_LABEL, &[&spki[..], &[0]].concat())), None);
        }
        let compressed = encode_pem(Scheme::EcdsaP256, &[&[2][..], &[7; 32]].concat());
        assert_eq!(decode_pem(Scheme::EcdsaP256, &compressed), None);
    }
}
