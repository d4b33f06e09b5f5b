//! People and programs: who calls, by which credential, and what that allows. Secrets are kept as SHA-256 only: each is
//! 256 random bits, so that there is nothing to guess and nothing for a slow hash to slow down.

pub mod calls;
mod foureyes;
mod sessions;
mod tokens;

pub use foureyes::{Asker, Kept};
pub(crate) use foureyes::{MAX_OPEN, alone, behind, surplus};
pub use sessions::{Login, Session, SessionKey, SessionOf, csrf_of};
pub(crate) use sessions::{MAX_OWN_SESSIONS, MAX_SESSIONS};
pub(crate) use tokens::MAX_TOKENS;
pub use tokens::Token;

use crate::error::{AccessError, StoreError};
use crate::store::Store;
use kiln_fleet::Millis;
use kiln_fleet::access::{AccessRole, Attempts, Refusals, Spree};
use kiln_protocol::KeyId;
use kiln_release::hex;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};
use tokio::sync::watch;

/// By what somebody is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// By nothing.
    None,
    /// By the kernel's word, on the Unix socket.
    Local,
    /// By a token: its id.
    Token(String),
    /// By a session of the web page.
    Session(SessionKey),
}

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// `uid 0`, `token ann`, `oidc ann@example.org`, `nobody`.
    pub name: String,
    /// What it may do; none: nothing but what is open to all.
    pub role: Option<AccessRole>,
    /// From which address; empty on this host's socket.
    pub origin: String,
    /// By what it is known.
    pub credential: Credential,
    /// Who confirmed it, of something that needs two.
    pub second: Option<String>,
}

impl Caller {
    /// A user of this host: it could read the database anyway.
    pub fn local(uid: u32) -> Self {
        let (name, role) = (format!("{}{uid}", foureyes::LOCAL), Some(AccessRole::Admin));
        Self { name, role, origin: String::new(), credential: Credential::Local, second: None }
    }

    /// Somebody without a credential.
    pub fn nobody(from: IpAddr) -> Self {
        let origin = from.to_canonical().to_string();
        Self { name: "nobody".to_owned(), role: None, origin, credential: Credential::None, second: None }
    }

    /// It is known by a session of the web page.
    pub fn is_session(&self) -> bool {
        matches!(self.credential, Credential::Session(_))
    }

    /// For the audit log: `token ann from 10.0.0.7`, `token ann, confirmed by token ben from 10.0.0.8`.
    pub fn who(&self) -> String {
        let second = self.second.as_ref().map_or_else(String::new, |second| format!(", confirmed by {second}"));
        let origin = if self.origin.is_empty() { String::new() } else { format!(" from {}", self.origin) };
        format!("{}{second}{origin}", self.name)
    }
}

/// An identity key that a person took away from its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokedKey {
    /// SHA-256 of its SPKI.
    pub key: KeyId,
    /// Whose it was.
    pub machine: String,
    /// When.
    pub at: Millis,
    /// By whom.
    pub by: String,
}

/// Failures of one address, or one account: 10 at once, then one in 30 s; 4096 of them are remembered.
fn attempts() -> Attempts {
    Attempts::new(10, 30_000, 4096)
}

#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) tokens: BTreeMap<String, Token>,
    pub(crate) sessions: BTreeMap<SessionKey, Session>,
    pub(crate) logins: sessions::Logins,
    pub(crate) proposals: BTreeMap<String, Kept>,
    pub(crate) revoked: BTreeMap<KeyId, RevokedKey>,
    pub(crate) by_address: Attempts,
    pub(crate) by_account: Attempts,
    pub(crate) spree: Spree,
    pub(crate) refusals: Refusals,
}

/// Everything that is known of people and programs. Bounded in every part.
#[derive(Debug)]
pub struct Access {
    known: Mutex<Known>,
    /// Counts what ended before its time: tokens that were revoked, sessions that were left.
    ends: watch::Sender<u64>,
}

impl Access {
    /// From what the store holds.
    pub async fn load(store: &Store) -> Result<Self, StoreError> {
        let tokens: Vec<Token> = read(store, "token/").await?;
        let sessions: Vec<(SessionKey, Session)> = read(store, "session/").await?;
        let proposals: Vec<Kept> = read(store, "pending/").await?;
        let revoked: Vec<RevokedKey> = read(store, "revoked-key/").await?;
        let known = Mutex::new(Known {
            tokens: tokens.into_iter().map(|token| (token.id.clone(), token)).collect(),
            sessions: sessions.into_iter().collect(),
            logins: sessions::Logins::default(),
            proposals: proposals.into_iter().map(|kept| (kept.proposal.id.clone(), kept)).collect(),
            revoked: revoked.into_iter().map(|revoked| (revoked.key.clone(), revoked)).collect(),
            by_address: attempts(),
            by_account: attempts(),
            spree: Spree::default(),
            refusals: Refusals::default(),
        });
        Ok(Self { known, ends: watch::channel(0).0 })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no code panics under this lock")
    }

    /// Told when a token or session ends before its time.
    pub(crate) fn ends(&self) -> watch::Receiver<u64> {
        self.ends.subscribe()
    }

    /// One did.
    pub(crate) fn tell_end(&self) {
        self.ends.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// A person took this key away from its machine: nobody who holds it is heard.
    pub fn is_revoked(&self, key: &KeyId) -> bool {
        self.lock().revoked.contains_key(key)
    }
}

async fn read<T: for<'de> Deserialize<'de>>(store: &Store, prefix: &str) -> Result<Vec<T>, StoreError> {
    let notes = store.notes(prefix).await?;
    // What cannot be read gives nobody anything; but a revoked key that is not read would be let in again.
    let bad = |e: serde_json::Error| StoreError::Row { id: prefix.to_owned(), reason: e.to_string() };
    notes.iter().map(|note| serde_json::from_str(note).map_err(bad)).collect()
}

/// Random bytes as lower-case hex.
pub(crate) fn random<const N: usize>() -> Result<String, AccessError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| AccessError::Random)?;
    Ok(hex::encode(&bytes))
}

/// Who counts as one when wrong credentials are counted: an IPv4 address, or an IPv6 network of 64 bits.
pub(crate) fn place(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            format!("{a:x}:{b:x}:{c:x}:{d:x}::/64")
        }
    }
}
