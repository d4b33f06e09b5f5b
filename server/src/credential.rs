//! A TPM's credential: a secret wrapped so that only the TPM with this endorsement key gives it out, and only while it holds
//! the object with this name. Sources: TPM 2.0 part 1, §24 (credential protection), annex C.6.4 (ECDH), §11.4.10 (KDFa, KDFe).

use crate::error::AttestationError;
use aes::Aes128;
use aes::cipher::{BlockEncrypt, KeyInit};
use kiln_protocol::tpm::EccPoint;
use ring::agreement::{ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, agree_ephemeral};
use ring::digest::{Context, SHA256};
use ring::hmac;
use ring::rand::SystemRandom;

/// What the machine is given.
#[derive(Debug)]
pub struct Credential {
    /// `TPMS_ID_OBJECT`.
    pub id_object: Vec<u8>,
    /// `TPMS_ECC_POINT`: the public half of what the wrapping key was made with.
    pub encrypted_secret: Vec<u8>,
}

/// Wraps `secret` for the TPM with the key `endorsement`, and the object `name` in it.
pub fn wrap(secret: &[u8; 32], endorsement: &EccPoint, name: &[u8]) -> Result<Credential, AttestationError> {
    let random = SystemRandom::new();
    let private = EphemeralPrivateKey::generate(&ECDH_P256, &random).map_err(|_| AttestationError::Random)?;
    let public = private.compute_public_key().map_err(|_| AttestationError::Random)?;
    // Uncompressed: 4, x, y.
    let (x, y) = public.as_ref()[1..].split_at(32);
    let peer = UnparsedPublicKey::new(&ECDH_P256, endorsement.uncompressed());
    let seed = agree_ephemeral(private, &peer, |z| kdf_e(z, x, &endorsement.x)).map_err(|_| AttestationError::Point)?;

    let key = kdf_a(&seed, "STORAGE", name, 128);
    let mut identity = sized(secret);
    encrypt(&key[..16], &mut identity);
    let key = hmac::Key::new(hmac::HMAC_SHA256, &kdf_a(&seed, "INTEGRITY", &[], 256));
    let integrity = hmac::sign(&key, &[&identity[..], name].concat());
    Ok(Credential {
        id_object: [&sized(integrity.as_ref())[..], &identity].concat(),
        encrypted_secret: [sized(x), sized(y)].concat(),
    })
}

/// `TPM2B`.
fn sized(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).expect("32 bytes");
    [&length.to_be_bytes()[..], bytes].concat()
}

/// KDFe with SHA-256, 256 bits: one round.
fn kdf_e(z: &[u8], ephemeral_x: &[u8], endorsement_x: &[u8]) -> Vec<u8> {
    let mut context = Context::new(&SHA256);
    for part in [&1_u32.to_be_bytes()[..], z, b"IDENTITY\0", ephemeral_x, endorsement_x] {
        context.update(part);
    }
    context.finish().as_ref().to_vec()
}

/// KDFa with SHA-256, at most 256 bits: one round of the counter mode of SP 800-108.
fn kdf_a(key: &[u8], label: &str, context: &[u8], bits: u32) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let parts = [&1_u32.to_be_bytes()[..], label.as_bytes(), &[0], context, &bits.to_be_bytes()];
    hmac::sign(&key, &parts.concat()).as_ref().to_vec()
}

/// AES-128 in CFB mode with an initialisation vector of zeros.
fn encrypt(key: &[u8], bytes: &mut [u8]) {
    let cipher = Aes128::new_from_slice(key).expect("16 bytes of a key");
    let mut block = aes::Block::default();
    for chunk in bytes.chunks_mut(16) {
        cipher.encrypt_block(&mut block);
        for (byte, mask) in chunk.iter_mut().zip(&block) {
            *byte ^= mask;
        }
        block[..chunk.len()].copy_from_slice(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NIST SP 800-38A, F.3.13, whose vector is not zero: its first block is what is encrypted first.
    #[test]
    fn cfb_goes_on_from_the_text_before() {
        let key = [0x2b, 0x7e, 0x15, 0x16, 0x28, 0xae, 0xd2, 0xa6, 0xab, 0xf7, 0x15, 0x88, 0x09, 0xcf, 0x4f, 0x3c];
        let cipher = Aes128::new_from_slice(&key).unwrap();
        let mut expected = [0; 34];
        let mut block = aes::Block::default();
        for at in [0, 16, 32] {
            cipher.encrypt_block(&mut block);
            let end = expected.len().min(at + 16);
            expected[at..end].copy_from_slice(&block[..end - at]);
        }
        let mut bytes = [0; 34];
        encrypt(&key, &mut bytes);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_point_that_is_not_on_the_curve_is_refused() {
        let bad = EccPoint { x: [1; 32], y: [1; 32] };
        assert!(matches!(wrap(&[0; 32], &bad, b"name"), Err(AttestationError::Point)));
    }
}
