//! Tokens: `kiln_ID_SECRET`, 12 and 64 hex digits. The id finds the record, the secret's SHA-256 is compared; the secret
//! itself is shown once, when it is made.

use super::random;
use crate::error::AccessError;
use kiln_fleet::Millis;
use kiln_fleet::access::AccessRole;
use kiln_release::hex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Tokens that are kept, those that ended included.
pub(crate) const MAX_TOKENS: usize = 1_000;
/// When a token was last used is stored at most so often.
const USED_MS: Millis = 60_000;

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Its public part.
    pub id: String,
    /// Whose it is.
    pub name: String,
    /// SHA-256 of its secret, lower-case hex.
    pub sha256: String,
    /// What it may do.
    pub role: AccessRole,
    /// When it was made.
    pub made: Millis,
    /// By whom.
    pub by: String,
    /// Who confirmed that, where two were needed.
    #[serde(default)]
    pub second: Option<String>,
    /// All who could act as its makers then: their own tokens may be forgotten before this one.
    #[serde(default)]
    pub behind: BTreeSet<String>,
    /// Of these, who needed nobody's help for it.
    #[serde(default)]
    pub alone: BTreeSet<String>,
    /// When it ends.
    pub expires: Millis,
    /// When it was last used.
    pub used: Option<Millis>,
    /// When it was revoked, and by whom.
    pub revoked: Option<(Millis, String)>,
}

impl Token {
    /// A new one, and its text.
    pub fn make(
        name: &str,
        role: AccessRole,
        by: &str,
        now: Millis,
        lifetime: Millis,
    ) -> Result<(Self, String), AccessError> {
        let (id, secret) = (random::<6>()?, random::<32>()?);
        let text = format!("kiln_{id}_{secret}");
        let token = Self {
            id,
            name: name.to_owned(),
            sha256: hex::sha256(secret.as_bytes()),
            role,
            made: now,
            by: by.to_owned(),
            second: None,
            behind: BTreeSet::new(),
            alone: BTreeSet::new(),
            expires: now.saturating_add(lifetime),
            used: None,
            revoked: None,
        };
        Ok((token, text))
    }

    /// Id and secret of a token's text, if it has the form of one.
    pub fn parts(text: &str) -> Option<(&str, &str)> {
        let (id, secret) = text.strip_prefix("kiln_")?.split_once('_')?;
        let fits = |part: &str, length| part.len() == length && part.bytes().all(|b| b.is_ascii_hexdigit());
        (fits(id, 12) && fits(secret, 64)).then_some((id, secret))
    }

    /// It is this secret's. Two hashes are compared: the time that takes says nothing of the secret.
    pub fn is(&self, secret: &str) -> bool {
        self.sha256 == hex::sha256(secret.as_bytes())
    }

    /// Whether it still holds.
    pub fn holds(&self, now: Millis) -> Result<(), AccessError> {
        match &self.revoked {
            Some(_) => Err(AccessError::Revoked { name: self.name.clone() }),
            None if now >= self.expires => Err(AccessError::Expired { name: self.name.clone() }),
            None => Ok(()),
        }
    }

    /// Notes that it was used; whether that is to be stored.
    pub(crate) fn use_now(&mut self, now: Millis) -> bool {
        let store = self.used.is_none_or(|used| used.saturating_add(USED_MS) <= now);
        if store {
            self.used = Some(now);
        }
        store
    }

    /// Who its holder is in the audit log.
    pub fn actor(&self) -> String {
        format!("token {}", self.name)
    }

    pub(crate) fn note(&self) -> String {
        format!("token/{}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_by_its_secret_and_only_until_it_ends() {
        let (mut token, text) = Token::make("ann", AccessRole::Operator, "uid 0", 1_000, 9_000).unwrap();
        let (id, secret) = Token::parts(&text).unwrap();
        assert_eq!((id, token.is(secret)), (token.id.as_str(), true));
        let stored = serde_json::to_string(&token).unwrap();
        assert!(!stored.contains(secret), "{stored}");
        assert!(!token.is(&token.sha256), "what the database holds opens nothing");
        let other = Token::make("ann", AccessRole::Operator, "uid 0", 1_000, 9_000).unwrap().1;
        assert!(!token.is(Token::parts(&other).unwrap().1));
        assert!(token.holds(9_999).is_ok());
        assert!(matches!(token.holds(10_000), Err(AccessError::Expired { .. })));
        token.revoked = Some((2_000, "uid 0".into()));
        assert!(matches!(token.holds(3_000), Err(AccessError::Revoked { .. })));
        for bad in
            ["", "kiln_", "kiln_00_00", &text[..text.len() - 1], &text.replace("kiln", "klin"), &format!("{text}0")]
        {
            assert!(Token::parts(bad).is_none(), "{bad}");
        }
    }
}
