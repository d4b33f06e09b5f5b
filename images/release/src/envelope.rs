//! TUF's envelope `{"signatures":[{"keyid","sig"}],"signed":{…}}` and the step from [`Unverified`] to [`Verified`].
//!
//! Order: the byte cap, then the envelope's outline, then a threshold of *distinct keys* over the canonical bytes of
//! `signed`; only then are those bytes read as a document. One key listed under two key ids counts once.

use crate::canonical::{canonical, canonical_of, parse_strict};
use crate::error::EnvelopeError;
use crate::hex;
use crate::key::{PublicKey, Signer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::ops::Deref;

/// The keys of a role and how many of them must sign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySet {
    keys: BTreeMap<String, PublicKey>,
    threshold: u32,
}

impl KeySet {
    /// From keys by key id. A threshold of 0 would accept anything, so it is raised to 1.
    pub fn new(keys: BTreeMap<String, PublicKey>, threshold: u32) -> Self {
        Self { keys, threshold: threshold.max(1) }
    }

    /// The key objects of `listed` that `keyids` names. Keys of schemes this crate cannot verify are left out: they
    /// can then not help to reach the threshold.
    pub fn of_role<'a>(
        listed: &BTreeMap<String, Value>,
        keyids: impl IntoIterator<Item = &'a String>,
        threshold: u32,
    ) -> Self {
        let keys = keyids
            .into_iter()
            .filter_map(|id| Some((id.clone(), PublicKey::from_object(listed.get(id)?).ok()?)))
            .collect();
        Self::new(keys, threshold)
    }

    /// How many distinct keys must sign.
    pub fn threshold(&self) -> u32 {
        self.threshold
    }

    /// The same keys, of which one is enough: to see who has signed so far.
    #[must_use]
    pub fn any(&self) -> Self {
        Self { keys: self.keys.clone(), threshold: 1 }
    }

    /// Whether this key id is one of them.
    pub fn contains(&self, keyid: &str) -> bool {
        self.keys.contains_key(keyid)
    }
}

#[derive(Debug, Clone)]
struct Signature {
    keyid: String,
    sig: Vec<u8>,
}

/// An envelope whose signatures were not checked; nothing of its document can be read yet.
#[derive(Debug, Clone)]
pub struct Unverified<T> {
    signed: Value,
    canonical: Vec<u8>,
    signatures: Vec<Signature>,
    sha256: String,
    length: u64,
    document: PhantomData<fn() -> T>,
}

/// A document that a threshold of trusted keys signed.
#[derive(Debug, Clone)]
pub struct Verified<T> {
    document: T,
    /// Key ids whose signatures were counted.
    pub signers: Vec<String>,
    /// SHA-256 of the envelope's bytes.
    pub sha256: String,
    /// Length of the envelope's bytes.
    pub length: u64,
}

impl<T> Verified<T> {
    /// The document alone.
    pub fn into_inner(self) -> T {
        self.document
    }
}

impl<T> Deref for Verified<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.document
    }
}

impl<T: DeserializeOwned> Unverified<T> {
    /// Reads the outline of an envelope of at most `max_bytes`.
    pub fn parse(bytes: &[u8], max_bytes: u64) -> Result<Self, EnvelopeError> {
        let length = bytes.len() as u64;
        if length > max_bytes {
            return Err(EnvelopeError::TooLong { limit: max_bytes, got: length });
        }
        let malformed = |reason: &str| EnvelopeError::Malformed { reason: reason.to_owned() };
        let mut envelope = match parse_strict(bytes).map_err(|e| malformed(&e.to_string()))? {
            Value::Object(map) => map,
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                return Err(malformed("not a JSON object"));
            }
        };
        let signed =
            envelope.remove("signed").filter(Value::is_object).ok_or_else(|| malformed("no object `signed`"))?;
        let listed =
            envelope.get("signatures").and_then(Value::as_array).ok_or_else(|| malformed("no `signatures`"))?;
        let mut signatures = Vec::with_capacity(listed.len());
        let mut ids = BTreeSet::new();
        for entry in listed {
            let text = |name: &str| entry.get(name).and_then(Value::as_str);
            let (Some(keyid), Some(sig)) = (text("keyid"), text("sig")) else {
                return Err(malformed("a signature without `keyid` or `sig`"));
            };
            if !ids.insert(keyid) {
                return Err(malformed("two signatures under the same key id"));
            }
            // A signature that is not hex is one that does not verify; an empty one stands for "not signed yet".
            signatures.push(Signature { keyid: keyid.to_owned(), sig: hex::decode(sig).unwrap_or_default() });
        }
        let canonical = canonical(&signed).map_err(|e| malformed(&e.to_string()))?;
        Ok(Self { signed, canonical, signatures, sha256: hex::sha256(bytes), length, document: PhantomData })
    }

    /// Key ids of the distinct keys that signed, if they reach the threshold.
    pub fn check(&self, keys: &KeySet) -> Result<Vec<String>, EnvelopeError> {
        let mut counted: BTreeMap<&PublicKey, &str> = BTreeMap::new();
        for signature in &self.signatures {
            if let Some(key) = keys.keys.get(&signature.keyid)
                && !counted.contains_key(key)
                && key.verifies(&self.canonical, &signature.sig)
            {
                counted.insert(key, &signature.keyid);
            }
        }
        let got = u32::try_from(counted.len()).unwrap_or(u32::MAX);
        if got < keys.threshold {
            return Err(EnvelopeError::BadSignature { expected: keys.threshold, got });
        }
        Ok(counted.into_values().map(str::to_owned).collect())
    }

    /// Checks the signatures, then reads the document.
    pub fn verify(self, keys: &KeySet) -> Result<Verified<T>, EnvelopeError> {
        let signers = self.check(keys)?;
        self.read(signers)
    }

    /// As [`Self::verify`], and `_type` must be `expected`.
    pub fn verify_type(self, keys: &KeySet, expected: &'static str) -> Result<Verified<T>, EnvelopeError> {
        let signers = self.check(keys)?;
        self.read_type(signers, expected)
    }

    /// Reads a document whose signatures the caller has checked.
    pub(crate) fn read_type(self, signers: Vec<String>, expected: &'static str) -> Result<Verified<T>, EnvelopeError> {
        let got = self.signed.get("_type").and_then(Value::as_str).unwrap_or_default();
        if got != expected {
            return Err(EnvelopeError::WrongType { expected, got: got.to_owned() });
        }
        self.read(signers)
    }

    fn read(self, signers: Vec<String>) -> Result<Verified<T>, EnvelopeError> {
        let document =
            serde_json::from_value(self.signed).map_err(|e| EnvelopeError::Malformed { reason: e.to_string() })?;
        Ok(Verified { document, signers, sha256: self.sha256, length: self.length })
    }
}

/// Signs a document: the text of its envelope, one line and a line break.
pub fn sign_envelope<T: Serialize>(document: &T, signers: &[&Signer]) -> Result<String, EnvelopeError> {
    let malformed = |reason: String| EnvelopeError::Malformed { reason };
    let message = canonical_of(document).map_err(|e| malformed(e.to_string()))?;
    let signatures: Vec<Value> = signers
        .iter()
        .map(|signer| json!({ "keyid": signer.public().id(), "sig": hex::encode(&signer.sign(&message)) }))
        .collect();
    let signed = serde_json::to_value(document).map_err(|e| malformed(e.to_string()))?;
    Ok(format!("{}\n", json!({ "signatures": signatures, "signed": signed })))
}
