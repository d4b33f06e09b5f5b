//! Sessions of the web page: server-side records under random ids, of which only the hash is kept, with an idle and an
//! absolute end; and log-ins with the identity provider that are under way.

use kiln_fleet::Millis;
use kiln_release::hex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Sessions at once; the one that was idle for longest gives way.
pub(crate) const MAX_SESSIONS: usize = 1_000;
/// And of one person or program, so that none pushes all others out.
pub(crate) const MAX_OWN_SESSIONS: usize = 20;
/// Log-ins that are under way at once, and how long each may take.
const MAX_LOGINS: usize = 1_000;
const LOGIN_MS: Millis = 10 * 60_000;
/// And of one address.
const PLACE_LOGINS: usize = 20;
/// When a session was last used is stored at most so often.
const USED_MS: Millis = 60_000;

/// SHA-256 of a session's id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionKey(String);

impl SessionKey {
    /// Of the id that the browser shows.
    pub fn of(id: &str) -> Self {
        Self(hex::sha256(id.as_bytes()))
    }

    pub(crate) fn note(&self) -> String {
        format!("session/{}", self.0)
    }
}

/// What the page shows with every change, so that no other site's page can make one. Whoever can read it here can read
/// the page, too; from the cookie, which no script reads, it is made by the server.
pub fn csrf_of(id: &str) -> String {
    hex::sha256(format!("kiln-csrf {id}").as_bytes())
}

/// How somebody logged in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionOf {
    /// With a token: its id. The session ends with it.
    Token(String),
    /// With the identity provider.
    Oidc {
        /// Whom the provider names: its subject.
        subject: String,
        /// Its groups that the configuration knew at log-in.
        groups: Vec<String>,
        /// What the configuration made of groups then: a session does not outlive a change of that.
        mapping: String,
    },
}

/// A session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Who.
    pub name: String,
    /// How.
    pub of: SessionOf,
    /// When it began.
    pub began: Millis,
    /// When it was last used.
    pub used: Millis,
}

impl Session {
    /// It is neither too old nor unused for too long. A clock that went back ends it: its age is not known.
    pub fn holds(&self, now: Millis, idle: Millis, most: Millis) -> bool {
        now >= self.began && now < self.end(idle, most)
    }

    /// When it ends, if it is not used any more.
    pub fn end(&self, idle: Millis, most: Millis) -> Millis {
        self.began.saturating_add(most).min(self.used.saturating_add(idle))
    }

    /// Notes that it was used; whether that is to be stored.
    pub(crate) fn use_now(&mut self, now: Millis) -> bool {
        let store = self.used.saturating_add(USED_MS) <= now;
        if store {
            self.used = now;
        }
        store
    }
}

/// A log-in that waits for the provider's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// Sent along, and comes back in the ID token.
    pub nonce: String,
    /// PKCE's secret (RFC 7636).
    pub verifier: String,
    /// SHA-256 of the cookie that the browser got: another browser's answer is not taken.
    pub browser: String,
    place: String,
    began: Millis,
}

/// Log-ins that are under way, by the SHA-256 of `state`.
#[derive(Debug, Default)]
pub(crate) struct Logins(BTreeMap<String, Login>);

impl Logins {
    /// One begins. Without room the oldest gives way, of the same place first.
    pub(crate) fn begin(
        &mut self,
        state: &str,
        (nonce, verifier): (String, String),
        browser: &str,
        place: &str,
        now: Millis,
    ) {
        self.0.retain(|_, login| now < login.began.saturating_add(LOGIN_MS));
        let here = |login: &Login| login.place == place;
        let crowded = self.0.values().filter(|login| here(login)).count() >= PLACE_LOGINS;
        if crowded || self.0.len() >= MAX_LOGINS {
            let all = self.0.iter().filter(|(_, login)| !crowded || here(login));
            if let Some(oldest) = all.min_by_key(|(_, login)| login.began).map(|(key, _)| key.clone()) {
                self.0.remove(&oldest);
            }
        }
        let browser = hex::sha256(browser.as_bytes());
        let login = Login { nonce, verifier, browser, place: place.to_owned(), began: now };
        self.0.insert(hex::sha256(state.as_bytes()), login);
    }

    /// The provider answered: each is good for one answer, from the browser that began it.
    pub(crate) fn end(&mut self, state: &str, browser: &str, now: Millis) -> Option<Login> {
        let login = self.0.remove(&hex::sha256(state.as_bytes()))?;
        let same = login.browser == hex::sha256(browser.as_bytes());
        (same && now < login.began.saturating_add(LOGIN_MS)).then_some(login)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_ends_by_age_and_by_idleness() {
        let of = SessionOf::Token("x".into());
        let session = Session { name: "token ann".into(), of, began: 1_000, used: 5_000 };
        assert!(session.holds(5_999, 1_000, 10_000) && !session.holds(6_000, 1_000, 10_000));
        assert!(session.holds(10_999, 100_000, 10_000) && !session.holds(11_000, 100_000, 10_000));
        assert!(!session.holds(999, 100_000, 100_000), "the clock went back");
        assert_eq!((session.end(1_000, 10_000), session.end(100_000, 10_000)), (6_000, 11_000));
    }

    #[test]
    fn an_answer_is_taken_once_from_the_browser_that_began_it_and_in_time() {
        let begin = || {
            let mut logins = Logins::default();
            logins.begin("state", ("nonce".into(), "verifier".into()), "browser", "here", 1_000);
            logins
        };
        assert!(begin().end("other", "browser", 2_000).is_none());
        assert!(begin().end("state", "another's", 2_000).is_none());
        assert!(begin().end("state", "browser", 1_000 + LOGIN_MS).is_none());
        let mut logins = begin();
        assert_eq!(logins.end("state", "browser", 2_000).unwrap().nonce, "nonce");
        assert!(logins.end("state", "browser", 2_000).is_none(), "once");
        let none = || (String::new(), String::new());
        logins.begin("mine", none(), "b", "home", 0);
        for n in 0..5_000 {
            logins.begin(&format!("{n}"), none(), "b", "here", n);
        }
        assert_eq!(logins.0.len(), PLACE_LOGINS + 1);
        assert!(logins.end("mine", "b", 5_000).is_some(), "one address pushes nobody else out");
        for n in 0..5_000 {
            logins.begin(&format!("place {n}"), none(), "b", &format!("{n}"), n);
        }
        assert_eq!(logins.0.len(), MAX_LOGINS);
    }
}
