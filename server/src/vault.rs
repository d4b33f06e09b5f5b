//! How secrets lie in the database: under a key that is not in it. AES-256-GCM by ring; the key is a file of the site,
//! `online/secrets.key`, made when the first secret is set. Each value is bound to its place, name and version: a row that was
//! put where another was opens nothing.

use crate::error::SecretError;
use kiln_release::hex;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes that sealing adds.
pub const OVERHEAD: usize = NONCE_LEN + 16;
/// Mode of a file that is its owner's alone.
pub const SECRET: u32 = 0o600;
/// 32 bytes in hex, and a line's end.
const MAX_FILE: u64 = 128;

/// The key.
pub struct Vault(LessSafeKey);

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Vault")
    }
}

fn key_of(mut bytes: Vec<u8>) -> Option<LessSafeKey> {
    let key = UnboundKey::new(&AES_256_GCM, &bytes).ok().map(LessSafeKey::new);
    forget(&mut bytes);
    key
}

/// Overwrites what was secret.
pub fn forget(bytes: &mut [u8]) {
    bytes.fill(0);
    // Otherwise nobody would read what was written, and the compiler could leave it out.
    std::hint::black_box(bytes);
}

/// Writes a file of the site: whole or not at all, and never over another.
pub fn write_new(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    // Under another name first: a cut leaves no half of it.
    let draft = path.with_extension("new");
    let _ = std::fs::remove_file(&draft);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    let linked = written.and_then(|()| std::fs::hard_link(&draft, path));
    std::fs::remove_file(&draft).and(linked)?;
    File::open(path.parent().unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all())
}

/// Seals with a key that seals nothing else, so that its nonce is zero. The tag comes behind.
pub fn seal_once(key: &[u8; 32], bound_to: &[u8], mut bytes: Vec<u8>) -> Result<Vec<u8>, SecretError> {
    let key = key_of(key.to_vec()).ok_or(SecretError::Sealing)?;
    let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
    key.seal_in_place_append_tag(nonce, Aad::from(bound_to), &mut bytes).map_err(|_| SecretError::Sealing)?;
    Ok(bytes)
}

impl Vault {
    /// Reads the key; none: there is no file yet.
    pub fn open(path: &Path) -> Result<Option<Self>, SecretError> {
        let failed = |source| SecretError::KeyFile { path: path.to_owned(), source };
        let mut text = String::new();
        match File::open(path) {
            Ok(file) => file.take(MAX_FILE).read_to_string(&mut text).map_err(failed)?,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let key = hex::decode(text.trim_end()).filter(|bytes| bytes.len() == 32).and_then(key_of);
        key.map(|key| Some(Self(key))).ok_or_else(|| SecretError::KeyForm(path.to_owned()))
    }

    /// Makes the key, where there is none.
    pub fn make(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::KeyFile { path: path.to_owned(), source };
        let mut bytes = vec![0; 32];
        SystemRandom::new().fill(&mut bytes).map_err(|_| SecretError::Sealing)?;
        let text = format!("{}\n", hex::encode(&bytes));
        // Never over another key: what that one sealed would be lost.
        write_new(path, &text, SECRET).map_err(failed)?;
        key_of(bytes).map(Self).ok_or(SecretError::Sealing)
    }

    /// Nonce, what is sealed, tag.
    pub fn seal(&self, bound_to: &[u8], value: &[u8]) -> Result<Vec<u8>, SecretError> {
        // Random: of 2³² values under one key, a site sets a few.
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| SecretError::Sealing)?;
        let mut sealed = Vec::with_capacity(value.len() + OVERHEAD);
        sealed.extend(value);
        let once = Nonce::assume_unique_for_key(nonce);
        self.0.seal_in_place_append_tag(once, Aad::from(bound_to), &mut sealed).map_err(|_| SecretError::Sealing)?;
        Ok([&nonce[..], &sealed].concat())
    }

    /// The value; none: another key sealed it, or it was altered or is another's.
    pub fn unseal(&self, bound_to: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let length = self.0.open_in_place(nonce, Aad::from(bound_to), &mut sealed).ok()?.len();
        sealed.truncate(length);
        Some(sealed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_key_is_made_once_and_is_its_owner_s() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secrets.key");
        assert!(Vault::open(&path).unwrap().is_none());
        let vault = Vault::make(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let sealed = vault.seal(b"here", b"value").unwrap();
        assert!(!sealed.windows(5).any(|piece| piece == b"value"));
        assert!(Vault::make(&path).is_err(), "it is not made anew");
        let again = Vault::open(&path).unwrap().unwrap();
        assert_eq!(again.unseal(b"here", &sealed).unwrap(), b"value");
        assert_eq!(again.unseal(b"elsewhere", &sealed), None);
        for at in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[at] ^= 1;
            assert_eq!(again.unseal(b"here", &altered), None, "byte {at}");
        }
        assert_eq!(again.unseal(b"here", &sealed[..5]), None);
        assert_ne!(vault.seal(b"here", b"value").unwrap(), sealed, "no nonce twice");
        let other = Vault::make(&dir.path().join("other.key")).unwrap();
        assert_eq!(other.unseal(b"here", &sealed), None);
        std::fs::write(&path, "00\n").unwrap();
        assert!(matches!(Vault::open(&path), Err(SecretError::KeyForm(_))));
    }
}
