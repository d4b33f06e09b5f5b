//! `offline/signers.json`: at a site whose keys people hold, who signs the lists of new images, how long what is signed
//! holds, and what the keys are called. No secret, and no trust either: which keys count is in the signed metadata.

use crate::files::{PUBLIC, read_capped, write_atomic};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::SignedDuration;
use kiln_release::{PublicKey, Signer};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

const MAX_FILE: u64 = 1 << 20;

/// Keys and how many of them must sign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quorum {
    /// So many must sign.
    pub threshold: u32,
    /// TUF key objects.
    pub keys: Vec<Value>,
}

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signers {
    /// Who signs the list of a new image.
    pub images: Quorum,
    /// So many days what they sign holds.
    pub days: u32,
    /// What keys are called, by key id.
    pub names: BTreeMap<String, String>,
}

impl SiteDir {
    /// Its keys lie in `offline/`: nobody holds them.
    pub fn is_lab(&self) -> Result<bool, SiteError> {
        Ok(Signers::read(self)?.is_none())
    }
}

impl Signers {
    fn path(site: &SiteDir) -> PathBuf {
        site.path.join("offline/signers.json")
    }

    /// None in a lab.
    pub fn read(site: &SiteDir) -> Result<Option<Self>, SiteError> {
        let path = Self::path(site);
        let Some(bytes) = read_capped(&path, MAX_FILE)? else { return Ok(None) };
        let wrong = |error: serde_json::Error| SiteError::KeyFile { path, reason: error.to_string() };
        serde_json::from_slice(&bytes).map(Some).map_err(wrong)
    }

    pub(crate) fn write(&self, site: &SiteDir) -> Result<(), SiteError> {
        let text = serde_json::to_vec_pretty(self).expect("plain structs have a JSON form");
        write_atomic(&Self::path(site), &text, PUBLIC)
    }

    pub(crate) fn lifetime(&self) -> SignedDuration {
        SignedDuration::from_hours(i64::from(self.days) * 24)
    }

    pub(crate) fn image_keys(&self) -> Result<Vec<PublicKey>, SiteError> {
        let key = |object: &Value| {
            PublicKey::from_object(object).map_err(|source| SiteError::Key { path: "signers.json".into(), source })
        };
        self.images.keys.iter().map(key).collect()
    }
}

impl SiteDir {
    /// The unencrypted keys in `offline/`: a lab's, and those that a rotation is making (`.key.next`). None where people
    /// hold them.
    pub(crate) fn plain_keys(&self) -> Result<Vec<Signer>, SiteError> {
        let folder = self.path.join("offline");
        let mut keys = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(SiteError::io("list", &folder))? {
            let path = entry.map_err(SiteError::io("list", &folder))?.path();
            let name = path.to_string_lossy();
            if name.ends_with(".key") || name.ends_with(".key.next") {
                let text = read_capped(&path, MAX_FILE)?.unwrap_or_default();
                keys.extend(Signer::from_pkcs8_pem(&String::from_utf8_lossy(&text)).ok());
            }
        }
        Ok(keys)
    }
}
