//! Key files of signers, and of Secure Boot: encrypted with a passphrase, or plain PKCS #8 in a lab.
//!
//! PBKDF2-HMAC-SHA256 (RFC 8018) makes a key of the passphrase, ChaCha20-Poly1305 (RFC 8439) encrypts with it. The file
//! is JSON and says how often PBKDF2 went round, so that the number can grow. Beside a key FILE lies FILE.pub, which
//! is for everybody. See docs/adr/0014 for why not another format.

use crate::files::{PUBLIC, SECRET, read_capped, write_new};
use crate::site::new_key;
use crate::site_error::SiteError;
use kiln_release::{PublicKey, Signer, hex};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::pbkdf2;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

/// Rounds of PBKDF2 for a new key: some seconds for whoever signs, and as much for each guess.
pub const ROUNDS: u32 = 4_000_000;
/// More than this is not a key file but a way to keep a signer waiting.
const MAX_ROUNDS: u32 = 100_000_000;
/// Shortest passphrase, in characters: PBKDF2 is cheap on graphics cards, so the passphrase must bear the weight.
pub const LEAST_PASSPHRASE: usize = 16;
const MAX_FILE: u64 = 16 << 10;
const TYPE: &str = "kiln-key";
const KDF: &str = "pbkdf2-hmac-sha256";
const CIPHER: &str = "chacha20-poly1305";

#[derive(Serialize, Deserialize)]
struct Sealed {
    #[serde(rename = "_type")]
    type_: String,
    /// Hex of the public key; bound to the encrypted one.
    public: String,
    kdf: String,
    rounds: u32,
    /// 16 random bytes, hex.
    salt: String,
    cipher: String,
    /// PKCS #8 PEM encrypted, and the tag; hex.
    encrypted: String,
}

/// A secret in words. It is not shown by `Debug`.
pub struct Passphrase(String);

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

impl Passphrase {
    /// Of a line that a person typed or a file holds; the line's end is no part of it.
    pub fn of_line(line: &str) -> Self {
        Self(line.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// For a new key: one that is long enough.
    pub fn check_new(self) -> Result<Self, SiteError> {
        let got = self.0.chars().count();
        if got < LEAST_PASSPHRASE { Err(SiteError::ShortPassphrase { got, least: LEAST_PASSPHRASE }) } else { Ok(self) }
    }
}

/// A key as people compare it: the key id in groups of four digits.
pub fn fingerprint(keyid: &str) -> String {
    let groups: Vec<String> = keyid.as_bytes().chunks(4).map(|group| String::from_utf8_lossy(group).into()).collect();
    groups.join(" ")
}

/// FILE.pub of a key FILE.
pub fn public_file(file: &Path) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(".pub");
    name.into()
}

/// Makes a key: FILE, encrypted unless there is no passphrase, and FILE.pub. Neither may exist.
pub fn make_key(file: &Path, passphrase: Option<&Passphrase>, rounds: u32) -> Result<PublicKey, SiteError> {
    let key = new_key()?;
    let text = match passphrase {
        Some(passphrase) => seal(&key, passphrase, rounds)?,
        None => key.pkcs8_pem(),
    };
    let public = public_file(file);
    if public.exists() {
        return Err(SiteError::FileExists { path: public });
    }
    write_new(file, text.as_bytes(), SECRET)?;
    write_new(&public, format!("{}\n", hex::encode(&key.public_bytes())).as_bytes(), PUBLIC)?;
    Ok(key.public())
}

/// The public key in a FILE.pub.
pub fn read_public(path: &Path) -> Result<PublicKey, SiteError> {
    let bytes = read_capped(path, MAX_FILE)?.ok_or_else(|| SiteError::NoPublicKey { path: path.into() })?;
    let key = hex::decode(String::from_utf8_lossy(&bytes).trim()).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    key.map(PublicKey::ed25519).ok_or_else(|| SiteError::NoPublicKey { path: path.into() })
}

/// A signer's key file, to be opened.
pub enum KeyFile {
    /// Not encrypted.
    Plain(Signer),
    /// Encrypted.
    Sealed(SealedKey),
}

/// An encrypted key.
pub struct SealedKey(SealedText);

/// What an encrypted file holds: a text, and beside it what the text belongs to.
pub(crate) struct SealedText {
    path: PathBuf,
    sealed: Sealed,
}

impl KeyFile {
    /// Reads the file; nothing is decrypted yet.
    pub fn read(path: &Path) -> Result<Self, SiteError> {
        let purpose = "sign";
        let bytes = read_capped(path, MAX_FILE)?.ok_or_else(|| SiteError::NoKey { path: path.into(), purpose })?;
        let text = String::from_utf8_lossy(&bytes);
        if let Some(sealed) = SealedText::read(path, &text, TYPE)? {
            return Ok(Self::Sealed(SealedKey(sealed)));
        }
        Signer::from_pkcs8_pem(&text).map(Self::Plain).map_err(|source| SiteError::Key { path: path.into(), source })
    }

    /// The key that verifies what this one signs, as the file says.
    pub fn public(&self) -> Result<PublicKey, SiteError> {
        match self {
            Self::Plain(signer) => Ok(signer.public()),
            Self::Sealed(SealedKey(SealedText { path, sealed })) => {
                let bytes = hex::decode(&sealed.public).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
                let reason = || "its public key is not 64 hex digits".to_owned();
                bytes.map(PublicKey::ed25519).ok_or_else(|| SiteError::KeyFile { path: path.clone(), reason: reason() })
            }
        }
    }
}

impl SealedKey {
    /// Decrypts it.
    pub fn open(&self, passphrase: &Passphrase) -> Result<Signer, SiteError> {
        let Self(sealed) = self;
        let path = &sealed.path;
        let signer = Signer::from_pkcs8_pem(&sealed.open(passphrase)?)
            .map_err(|source| SiteError::Key { path: path.clone(), source })?;
        if hex::encode(&signer.public_bytes()) != sealed.public() {
            let reason = "its public key is another key's".to_owned();
            return Err(SiteError::KeyFile { path: path.clone(), reason });
        }
        Ok(signer)
    }
}

impl SealedText {
    /// None: the text is not encrypted.
    pub(crate) fn read(path: &Path, text: &str, type_: &str) -> Result<Option<Self>, SiteError> {
        if !text.trim_start().starts_with('{') {
            return Ok(None);
        }
        let wrong = |reason: String| SiteError::KeyFile { path: path.into(), reason };
        let sealed: Sealed = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        if (sealed.type_.as_str(), sealed.kdf.as_str(), sealed.cipher.as_str()) != (type_, KDF, CIPHER) {
            return Err(wrong(format!("{} with {} and {}", sealed.type_, sealed.kdf, sealed.cipher)));
        }
        Ok(Some(Self { path: path.into(), sealed }))
    }

    /// What it belongs to, which its encryption binds it to.
    pub(crate) fn public(&self) -> &str {
        &self.sealed.public
    }

    /// Decrypts it.
    pub(crate) fn open(&self, passphrase: &Passphrase) -> Result<String, SiteError> {
        let Self { path, sealed } = self;
        let wrong = |reason: &str| SiteError::KeyFile { path: path.clone(), reason: reason.to_owned() };
        let rounds = Some(sealed.rounds).filter(|rounds| *rounds <= MAX_ROUNDS).and_then(NonZeroU32::new);
        let rounds = rounds.ok_or_else(|| wrong("rounds are from 1 to 100000000"))?;
        let salt = hex::decode(&sealed.salt).ok_or_else(|| wrong("its salt is not hex"))?;
        let mut bytes = hex::decode(&sealed.encrypted).ok_or_else(|| wrong("what is encrypted is not hex"))?;
        let key = derive(passphrase, &salt, rounds);
        let aad = Aad::from(sealed.public.as_bytes());
        let opened = key.open_in_place(nonce(), aad, &mut bytes);
        let text = opened.map_err(|_| SiteError::WrongPassphrase { path: path.clone() })?;
        Ok(String::from_utf8_lossy(text).into_owned())
    }
}

fn seal(key: &Signer, passphrase: &Passphrase, rounds: u32) -> Result<String, SiteError> {
    seal_text(TYPE, hex::encode(&key.public_bytes()), key.pkcs8_pem(), passphrase, rounds)
}

/// Encrypts a text that belongs to what `public` names.
pub(crate) fn seal_text(
    type_: &str,
    public: String,
    text: String,
    passphrase: &Passphrase,
    rounds: u32,
) -> Result<String, SiteError> {
    let mut salt = [0; 16];
    SystemRandom::new().fill(&mut salt).map_err(|_| SiteError::NoRandomness)?;
    let mut bytes = text.into_bytes();
    let derived = derive(passphrase, &salt, NonZeroU32::new(rounds).unwrap_or(NonZeroU32::MIN));
    derived
        .seal_in_place_append_tag(nonce(), Aad::from(public.as_bytes()), &mut bytes)
        .expect("a key file is far shorter than the cipher's limit");
    let sealed = Sealed {
        type_: type_.into(),
        public,
        kdf: KDF.into(),
        rounds,
        salt: hex::encode(&salt),
        cipher: CIPHER.into(),
        encrypted: hex::encode(&bytes),
    };
    Ok(serde_json::to_string_pretty(&sealed).expect("strings and a number have a JSON form") + "\n")
}

fn derive(passphrase: &Passphrase, salt: &[u8], rounds: NonZeroU32) -> LessSafeKey {
    let mut key = [0; 32];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, salt, passphrase.0.as_bytes(), &mut key);
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &key).expect("the cipher's keys have 32 bytes"))
}

/// Each salt makes a key of its own, which encrypts once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passphrase(text: &str) -> Passphrase {
        Passphrase::of_line(text).check_new().unwrap()
    }

    #[test]
    fn an_encrypted_key_opens_with_its_passphrase_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ann.key");
        let public = make_key(&file, Some(&passphrase("correct horse battery\n")), 10).unwrap();
        assert_eq!(read_public(&public_file(&file)).unwrap(), public);
        let text = std::fs::read_to_string(&file).unwrap();
        let KeyFile::Sealed(sealed) = KeyFile::read(&file).unwrap() else { panic!("{text}") };
        assert_eq!(sealed.open(&passphrase("correct horse battery")).unwrap().public(), public);
        let wrong = sealed.open(&passphrase("correct horse batterz")).unwrap_err();
        assert!(matches!(wrong, SiteError::WrongPassphrase { .. }), "{wrong}");
        // What is written beside the encrypted key is bound to it.
        let other = make_key(&dir.path().join("bob.key"), None, 10).unwrap();
        let swapped = text.replace(&hex::encode(public.as_bytes()), &hex::encode(other.as_bytes()));
        std::fs::write(&file, swapped).unwrap();
        let KeyFile::Sealed(sealed) = KeyFile::read(&file).unwrap() else { panic!("it is encrypted") };
        assert!(sealed.open(&passphrase("correct horse battery")).is_err());
        std::fs::write(&file, text.replace("\"rounds\": 10", "\"rounds\": 4000000000")).unwrap();
        let KeyFile::Sealed(sealed) = KeyFile::read(&file).unwrap() else { panic!("it is encrypted") };
        assert!(matches!(sealed.open(&passphrase("correct horse battery")), Err(SiteError::KeyFile { .. })));
    }

    /// The vector of RFC 7914, section 11, for PBKDF2-HMAC-SHA256: other programs can open a key file too.
    #[test]
    fn the_derivation_is_the_well_known_one() {
        let mut key = [0; 32];
        let rounds = NonZeroU32::new(80_000).unwrap();
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, b"NaCl", b"Password", &mut key);
        assert_eq!(hex::encode(&key), "4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56");
    }

    #[test]
    fn a_key_is_never_written_over_and_a_short_passphrase_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ann.key");
        make_key(&file, None, 1).unwrap();
        let before = std::fs::read(&file).unwrap();
        assert!(matches!(make_key(&file, None, 1), Err(SiteError::FileExists { .. })));
        std::fs::remove_file(public_file(&file)).unwrap();
        assert!(matches!(make_key(&file, None, 1), Err(SiteError::FileExists { .. })));
        assert_eq!(std::fs::read(&file).unwrap(), before);
        let short = Passphrase::of_line("fifteen letters").check_new().unwrap_err();
        assert!(matches!(short, SiteError::ShortPassphrase { got: 15, least: 16 }), "{short}");
        assert!(!format!("{:?}", passphrase("a secret passphrase")).contains("secret"));
    }

    #[test]
    fn fingerprints_are_for_reading_aloud() {
        assert_eq!(fingerprint("00112233445566"), "0011 2233 4455 66");
    }
}
