//! Keys: TUF key objects, Ed25519 signing from a seed, PKCS#8 (RFC 8410) in PEM.
//!
//! Kiln signs with Ed25519 only. ECDSA on P-256 and RSA-PSS are verified too, for repositories of other makers.
//!
//! A key id of TUF is the SHA-256 of the canonical JSON of the key object. A *machine's* key id is another thing:
//! the SHA-256 of its SPKI, see [`crate::certificate`]. No key is generated here: seeds are arguments.

use crate::canonical::canonical;
use crate::error::KeyError;
use crate::hex;
use crate::spki;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ED25519, Ed25519KeyPair, KeyPair as _, RSA_PSS_2048_8192_SHA256, UnparsedPublicKey,
    VerificationAlgorithm,
};
use serde_json::{Value, json};
use std::fmt;

/// PKCS#8 v1 of an Ed25519 seed, up to the seed (RFC 8410, section 7).
const PKCS8_V1: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// PKCS#8 v2, seed follows, then one of [`PKCS8_V2_PUBLIC`] and the public key.
const PKCS8_V2: [u8; 14] = [2, 1, 1, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
const PKCS8_V2_PUBLIC: [&[u8]; 2] = [&[0x81, 0x21, 0], &[0xa1, 0x23, 3, 0x21, 0]];
const PEM_LABEL: &str = "PRIVATE KEY";

/// Signature schemes this crate verifies. A key of any other scheme is kept out of every key set, so it never counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// Pure Ed25519 (RFC 8032).
    Ed25519,
    /// ECDSA on NIST P-256 with SHA-256, the signature in DER.
    EcdsaP256,
    /// RSASSA-PSS (RFC 8017) with SHA-256, a salt of 32 bytes, 2048 to 8192 bits.
    RsaPss,
}

impl Scheme {
    fn algorithm(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::Ed25519 => &ED25519,
            Self::EcdsaP256 => &ECDSA_P256_SHA256_ASN1,
            Self::RsaPss => &RSA_PSS_2048_8192_SHA256,
        }
    }
}

/// A key that verifies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey {
    scheme: Scheme,
    bytes: Vec<u8>,
}

impl PublicKey {
    /// From the 32 bytes of an Ed25519 public key.
    pub fn ed25519(bytes: [u8; 32]) -> Self {
        Self { scheme: Scheme::Ed25519, bytes: bytes.to_vec() }
    }

    /// From an uncompressed point of NIST P-256.
    pub fn p256(point: [u8; 65]) -> Self {
        Self { scheme: Scheme::EcdsaP256, bytes: point.to_vec() }
    }

    /// From a TUF key object.
    pub fn from_object(object: &Value) -> Result<Self, KeyError> {
        let field = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default();
        match (field("/keytype"), field("/scheme")) {
            ("ed25519", "ed25519") => {
                let public = field("/keyval/public");
                let bytes: [u8; 32] = hex::decode(public)
                    .and_then(|bytes| bytes.try_into().ok())
                    .ok_or_else(|| KeyError::NotEd25519 { got: public.to_owned() })?;
                Ok(Self::ed25519(bytes))
            }
            // The first name is the specification's, the second what securesystemslib wrote before 1.0.
            ("ecdsa" | "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256") => Self::from_pem(Scheme::EcdsaP256, object),
            ("rsa", "rsassa-pss-sha256") => Self::from_pem(Scheme::RsaPss, object),
            (keytype, scheme) => {
                Err(KeyError::UnsupportedScheme { keytype: keytype.to_owned(), scheme: scheme.to_owned() })
            }
        }
    }

    fn from_pem(scheme: Scheme, object: &Value) -> Result<Self, KeyError> {
        let public = object.pointer("/keyval/public").and_then(Value::as_str).unwrap_or_default();
        let bytes = spki::decode_pem(scheme, public).ok_or(KeyError::NotPublicPem { scheme })?;
        Ok(Self { scheme, bytes })
    }

    /// The TUF key object.
    pub fn to_object(&self) -> Value {
        let (keytype, scheme, public) = match self.scheme {
            Scheme::Ed25519 => ("ed25519", "ed25519", hex::encode(&self.bytes)),
            Scheme::EcdsaP256 => ("ecdsa", "ecdsa-sha2-nistp256", spki::encode_pem(self.scheme, &self.bytes)),
            Scheme::RsaPss => ("rsa", "rsassa-pss-sha256", spki::encode_pem(self.scheme, &self.bytes)),
        };
        json!({ "keytype": keytype, "scheme": scheme, "keyval": { "public": public } })
    }

    /// SPKI, DER.
    pub fn spki_der(&self) -> Vec<u8> {
        spki::encode(self.scheme, &self.bytes)
    }

    /// TUF key id.
    pub fn id(&self) -> String {
        object_id(&self.to_object())
    }

    /// Whether `signature` is this key's over `message`.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(self.scheme.algorithm(), &self.bytes).verify(message, signature).is_ok()
    }

    /// Its bytes in the scheme's own form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// TUF key id of a key object: SHA-256 of its canonical JSON.
pub fn object_id(object: &Value) -> String {
    // A float in a key object cannot come from `parse_strict`; should one come from elsewhere, the id matches nothing.
    canonical(object).map_or_else(|_| String::new(), |bytes| hex::sha256(&bytes))
}

/// An Ed25519 key that signs.
pub struct Signer {
    seed: [u8; 32],
    pair: Ed25519KeyPair,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("public", &hex::encode(&self.public_bytes())).finish_non_exhaustive()
    }
}

impl Signer {
    /// From 32 secret random bytes.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).expect("any 32 bytes are an Ed25519 seed");
        Self { seed: *seed, pair }
    }

    /// Signature of `message`, 64 bytes.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }

    /// The key that verifies what this one signs.
    pub fn public(&self) -> PublicKey {
        PublicKey::ed25519(self.public_bytes())
    }

    /// The 32 bytes of the public key.
    pub fn public_bytes(&self) -> [u8; 32] {
        self.pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes")
    }

    /// PKCS#8 v1 DER. Secret.
    pub fn pkcs8_der(&self) -> Vec<u8> {
        [&PKCS8_V1[..], &self.seed].concat()
    }

    /// PKCS#8 v1 PEM, as `openssl genpkey -algorithm ed25519` writes it. Secret.
    pub fn pkcs8_pem(&self) -> String {
        hex::pem_encode(PEM_LABEL, &self.pkcs8_der())
    }

    /// Reads PKCS#8 DER of version 1, or of version 2 if the public key in it is the seed's.
    pub fn from_pkcs8_der(der: &[u8]) -> Result<Self, KeyError> {
        if let Some(seed) = der.strip_prefix(&PKCS8_V1[..]) {
            let seed: &[u8; 32] = seed.try_into().map_err(|_| KeyError::NotPkcs8Ed25519)?;
            return Ok(Self::from_seed(seed));
        }
        let [0x30, length, rest @ ..] = der else { return Err(KeyError::NotPkcs8Ed25519) };
        let (seed, tail) = rest
            .strip_prefix(&PKCS8_V2[..])
            .and_then(<[u8]>::split_first_chunk::<32>)
            .filter(|_| usize::from(*length) == rest.len())
            .ok_or(KeyError::NotPkcs8Ed25519)?;
        let public =
            PKCS8_V2_PUBLIC.iter().find_map(|prefix| tail.strip_prefix(*prefix)).ok_or(KeyError::NotPkcs8Ed25519)?;
        let signer = Self::from_seed(seed);
        if signer.public_bytes() != *public {
            return Err(KeyError::PublicKeyOfAnotherSeed);
        }
        Ok(signer)
    }

    /// Reads PKCS#8 PEM.
    pub fn from_pkcs8_pem(pem: &str) -> Result<Self, KeyError> {
        let der = hex::pem_decode(PEM_LABEL, pem).ok_or(KeyError::NotPem)?;
        Self::from_pkcs8_der(&der)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8032, section 7.1, test 1.
    #[test]
    fn signs_as_rfc_8032_says() {
        let seed: [u8; 32] = hex::decode("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
            .unwrap()
            .try_into()
            .unwrap();
        let signer = Signer::from_seed(&seed);
        assert_eq!(
            hex::encode(signer.public().as_bytes()),
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
        );
        assert_eq!(
            hex::encode(&signer.sign(b"")),
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        );
        assert!(signer.public().verifies(b"", &signer.sign(b"")));
        assert!(!signer.public().verifies(b"x", &signer.sign(b"")));
    }

    /// RFC 8410, section 10.3: the same key as version 1.
    #[test]
    fn reads_and_writes_the_key_of_rfc_8410() {
        let pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
        let signer = Signer::from_pkcs8_pem(pem).unwrap();
        assert_eq!(
            hex::encode(&signer.public_bytes()),
            "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"
        );
        assert_eq!(signer.pkcs8_pem(), pem);
    }

    #[test]
    fn reads_version_2_and_refuses_a_foreign_public_key() {
        let signer = Signer::from_seed(&[7; 32]);
        for (length, marker) in [(0x51, PKCS8_V2_PUBLIC[0]), (0x53, PKCS8_V2_PUBLIC[1])] {
            let der = [&[0x30, length], &PKCS8_V2[..], &[7; 32], marker, &signer.public_bytes()].concat();
            assert_eq!(Signer::from_pkcs8_der(&der).unwrap().public(), signer.public());
            let mut foreign = der.clone();
            *foreign.last_mut().unwrap() ^= 1;
            assert!(matches!(Signer::from_pkcs8_der(&foreign), Err(KeyError::PublicKeyOfAnotherSeed)));
            assert!(matches!(Signer::from_pkcs8_der(&der[..der.len() - 1]), Err(KeyError::NotPkcs8Ed25519)));
        }
        assert!(Signer::from_pkcs8_der(b"").is_err());
        assert!(Signer::from_pkcs8_pem("no key").is_err());
    }

    #[test]
    fn key_object_round_trips_and_its_id_is_that_of_securesystemslib() {
        let key = PublicKey::ed25519([0xab; 32]);
        assert_eq!(PublicKey::from_object(&key.to_object()).unwrap(), key);
        let text = format!(r#"{{"keytype":"ed25519","keyval":{{"public":"{}"}},"scheme":"ed25519"}}"#, "ab".repeat(32));
        assert_eq!(key.id(), hex::sha256(text.as_bytes()));
    }

    /// Made once with securesystemslib 1.4.0 for this test: public key, key id, signature of `kiln`.
    const FOREIGN: [(&str, &str, &str, &str, &str); 2] = [
        (
            "rsa",
            "rsassa-pss-sha256",
            "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAovVRCWrKdwI4/CpSbOYG\nUJuOdYp1j7amSJ1yRs7ribyPDtOVzjl5IvEl69+IjDqP7v69RNSQFNSVpZa1M362\nVdez/EPy3v7uNo07V4pJ3WWXMSvOwo8Y/LFMcwLtKfQiOemyXecWZPkiatiuw6Vn\n8HzKR/xbjhf6P6zFi70iW7uFIc1RRSRZwyIva5SUvMO2E94s1arRi9TrL4VGO5vE\n2kKm86Xh7sUVCepQSIFtHP5DF88jmHRzgCRWIj3Rk9XXrM8sLOAjfts+aL2GjnTC\nNDT3S6ytw1b0nMWSkkQafptoKvQJh89UdrRd4kp3foVVbDAZW8BTLBkOnqXUF+qz\niwIDAQAB\n-----END PUBLIC KEY-----\n",
            "de79baf9dc21afb0fb95bd4791e892b8cd999cbb61d872702c0fc64be96f98c5",
            "07baad31f0b62b684c1a4e30a53cceff06b4745962aba731128aa6574a978c4ec7437fef6830d619167500d930e540f05e46822fdadb45f9524ff06ef47626e39efefdf3cfcf4fcb18fbfc7d7f17cf33e6c0f624b3bda403693b000556617ce22ed242f991b909a52b047c161dea8b144da01541dd00e8bde1d6836f1bfe643132ca4f8894d57b5d18fe2eb08b9101862dfbcec1adc4c941335b30e808893d3f5a6f1ad01696e1bacb35f23e4fd88f64bd32150a2c18f9901d0ba6640824111f621ddcb194cad1f03bfdead5a8b2b8c74f662ca5dd346c27b659f936dfee2dacb9e6194e47cb7a98a49e8ac007f6d752aa2b385780f31ecc8ee4dc04b1dbfb36",
        ),
        (
            "ecdsa",
            "ecdsa-sha2-nistp256",
            "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE5otrthweAptmNVi12vQ2VHsH5X9Y\noWfhr8V2/wwLlwtt4kpJbosvn8wE68yI8GK/u4iP147z5ac0X9DlWMt8mQ==\n-----END PUBLIC KEY-----\n",
            "912497b4fba9b10edeb96e63639d66bc87919a3833a22fe22ee3dc2cce0fb231",
            "3045022100bae63d2a56dab5bbe2aa5e7da9c1c6e10d5cd710bf38774bf16e867a510473e602201541202e281c160ff3bbb14c8f8e76fb268187c9380e5df654ddc2a9825d5d86",
        ),
    ];

    #[test]
    fn keys_of_other_makers_verify_and_keep_their_id() {
        for (keytype, scheme, public, id, signature) in FOREIGN {
            let object = json!({ "keytype": keytype, "scheme": scheme, "keyval": { "public": public } });
            let key = PublicKey::from_object(&object).unwrap();
            assert_eq!((key.to_object(), key.id().as_str()), (object, id), "{scheme}");
            let mut signature = hex::decode(signature).unwrap();
            assert!(key.verifies(b"kiln", &signature), "{scheme}");
            assert!(!key.verifies(b"kilm", &signature) && !key.verifies(b"kiln", b""), "{scheme}");
            signature[40] ^= 1;
            assert!(!key.verifies(b"kiln", &signature), "{scheme}");
        }
    }

    #[test]
    fn other_schemes_and_short_keys_are_refused() {
        let object = |keytype: &str, scheme: &str, public: &str| json!({ "keytype": keytype, "scheme": scheme, "keyval": { "public": public } });
        let refused = |object: &Value| PublicKey::from_object(object).unwrap_err();
        let pkcs1 = object("rsa", "rsa-pkcs1v15-sha256", FOREIGN[0].2);
        assert!(matches!(refused(&pkcs1), KeyError::UnsupportedScheme { .. }));
        // A key of one kind under another's name, and none at all.
        for public in [FOREIGN[1].2, "…"] {
            let error = refused(&object("rsa", "rsassa-pss-sha256", public));
            assert!(matches!(error, KeyError::NotPublicPem { scheme: Scheme::RsaPss }), "{error}");
        }
        let short = object("ed25519", "ed25519", "abcd");
        assert!(matches!(refused(&short), KeyError::NotEd25519 { .. }));
        assert!(PublicKey::from_object(&json!(null)).is_err());
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?}", Signer::from_seed(&[7; 32]));
        assert!(!shown.contains("0707") && !shown.contains("7, 7"), "{shown}");
    }
}
