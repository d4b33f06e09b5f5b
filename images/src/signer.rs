//! A signer's side: what the machine with the key remembers (KEY.seen, beside the key), so that a request cannot start
//! from another site's root, and two different documents are not signed under one version.

use crate::files::{PUBLIC, read_capped, write_atomic};
use crate::request::{Request, wrong};
use crate::sealed::{KeyFile, Passphrase};
use crate::site_error::SiteError;
use kiln_release::hex;
use kiln_release::tuf::Root;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const MAX_FILE: u64 = 4 << 20;

/// What was signed of a TUF role last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SignedLast {
    version: u64,
    sha256: String,
}

/// KEY.seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignerMemory {
    /// The newest root that was believed, byte for byte.
    root: Option<String>,
    /// By TUF role.
    #[serde(default)]
    signed: BTreeMap<String, SignedLast>,
}

impl SignerMemory {
    fn path(key: &Path) -> PathBuf {
        let mut name = OsString::from(key);
        name.push(".seen");
        name.into()
    }

    /// Beside this key.
    pub fn read(key: &Path) -> Result<Self, SiteError> {
        let path = Self::path(key);
        let Some(bytes) = read_capped(&path, MAX_FILE)? else { return Ok(Self::default()) };
        serde_json::from_slice(&bytes).map_err(|error| SiteError::KeyFile { path, reason: error.to_string() })
    }

    fn write(&self, key: &Path) -> Result<(), SiteError> {
        let text = serde_json::to_vec_pretty(self).expect("strings and numbers have a JSON form");
        write_atomic(&Self::path(key), &text, PUBLIC)
    }

    /// Whether nothing was signed with this key yet: then a person must compare the root's keys with what is on paper.
    pub fn is_new(&self) -> bool {
        self.root.is_none() && self.signed.is_empty()
    }

    /// That the request goes on from what was believed, and says nothing else of a version that was signed. With
    /// `instead` the latter is allowed: an earlier request was dropped.
    pub fn check(&self, request: &Request, instead: bool) -> Result<(), SiteError> {
        request.check_bases()?;
        let chain = request.root_chain()?;
        if let Some(pinned) = &self.root {
            let known = request.roots.iter().any(|text| text == pinned);
            if !known {
                return Err(SiteError::OtherRoot { sha256: hex::sha256(pinned.as_bytes()) });
            }
        }
        for document in &request.documents {
            let version = document.envelope["signed"]["version"].as_u64().unwrap_or(0);
            let (role, sha256) = (document.role.clone(), document.digest()?);
            if document.role == Root::TYPE && version != chain.len() as u64 + 1 {
                return Err(wrong(format!("root version {version} does not follow version {}", chain.len())));
            }
            match self.signed.get(&role) {
                Some(last) if version < last.version => {
                    return Err(SiteError::SignedNewer { role, version, last: last.version });
                }
                Some(last) if version == last.version && sha256 != last.sha256 && !instead => {
                    return Err(SiteError::SignedOther { role, version });
                }
                Some(_) | None => {}
            }
        }
        Ok(())
    }

    fn remember(&mut self, request: &Request, roles: &[String]) -> Result<(), SiteError> {
        self.root = request.roots.last().cloned().or(self.root.take());
        for document in request.documents.iter().filter(|document| roles.contains(&document.role)) {
            let version = document.envelope["signed"]["version"].as_u64().unwrap_or(0);
            let last = SignedLast { version, sha256: document.digest()? };
            self.signed.insert(document.role.clone(), last);
        }
        Ok(())
    }
}

/// Signs a request's documents with a key, after its memory was asked, and writes the file. The passphrase is asked for
/// only then. Gives the TUF roles that it signed. The file is not read again: what is signed is what was shown, whatever
/// the stick would answer now.
pub fn sign_request<E: From<SiteError>>(
    request: &mut Request,
    file: &Path,
    key: &Path,
    instead: bool,
    passphrase: impl FnOnce() -> Result<Passphrase, E>,
) -> Result<Vec<String>, E> {
    let opened = KeyFile::read(key)?;
    let public = opened.public()?;
    if request.roles_of(&public)?.is_empty() {
        return Err(SiteError::NotASigner { key: key.into(), keyid: public.id() }.into());
    }
    let mut memory = SignerMemory::read(key)?;
    memory.check(request, instead)?;
    let signer = match opened {
        KeyFile::Plain(signer) => signer,
        KeyFile::Sealed(sealed) => sealed.open(&passphrase()?)?,
    };
    let roles = request.sign(&signer)?;
    // First it is remembered: what is signed and not remembered could be signed again, otherwise.
    memory.remember(request, &roles)?;
    memory.write(key)?;
    request.write(file)?;
    Ok(roles)
}
