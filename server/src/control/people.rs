//! People and programs: who a caller is, for how long, tokens, and identity keys that are taken away. What is decided here is
//! in the audit log, wrong credentials included.

use super::{Control, now_ms};
use crate::access::{
    Caller, Credential, Known, RevokedKey, Session, SessionKey, SessionOf, Token, alone, behind, place,
};
use crate::audit::Line;
use crate::config::is_name;
use crate::error::{AccessError, ControlError, StoreError};
use crate::view::TokenView;
use kiln_fleet::Millis;
use kiln_fleet::access::AccessRole;
use kiln_protocol::{KeyId, MachineId};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// Whether a credential still holds is looked at so often, besides when one ends: clocks are set.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

pub(super) fn json(value: &impl serde::Serialize) -> Result<String, ControlError> {
    Ok(serde_json::to_string(value).map_err(StoreError::from)?)
}

fn revoked_note(key: &KeyId) -> String {
    format!("revoked-key/{key}")
}

impl Control {
    /// Writes a record that nothing waits for.
    pub(crate) fn note_down(&self, line: Line) {
        drop(self.store.audit(line));
    }

    /// Writes what somebody who is known was refused, or counts it where that one's refusals come too thick.
    pub(crate) fn note_refused(&self, caller: &Caller, line: Line) {
        let written = self.access.lock().refusals.take(&caller.name, line.at);
        if written {
            self.note_down(line);
        }
    }

    /// Writes how many were not written, of those whose minute is over; at the server's end (`now` is none) of all.
    pub(crate) fn note_more_refused(&self, now: Option<Millis>) {
        let more = self.access.lock().refusals.over(now);
        for (who, count) in more {
            let line =
                Line::done(now.unwrap_or_else(now_ms), &who, "", format!("and {count} more calls within a minute"));
            self.note_down(line.but("refused, or failed"));
        }
    }

    /// Whose token this is. A wrong one counts against the address and, where it names a token, against that.
    pub fn token_of(&self, text: &str, from: IpAddr, secure: bool) -> Result<Caller, AccessError> {
        let now = now_ms();
        let origin = from.to_canonical().to_string();
        let place = place(from);
        let mut known = self.access.lock();
        let known = &mut *known;
        let parts = Token::parts(text);
        // Only of tokens that there are: whoever makes ids up takes no room from others.
        let account = parts.map_or("", |(id, _)| id);
        let account = if known.tokens.contains_key(account) { account } else { "" };
        let owner = known.tokens.get(account).map_or_else(|| "a token".to_owned(), Token::actor);
        let line = |what: String| Line::done(now, &format!("nobody from {origin}"), "", what);
        let wait = known.by_address.wait(&place, now).max(known.by_account.wait(account, now));
        if let Some(wait) = wait {
            return Err(AccessError::TooOften { seconds: wait.div_ceil(1000) });
        }
        // One that came unencrypted is not looked at.
        let found = parts.filter(|_| secure).and_then(|(id, secret)| {
            let token = known.tokens.get_mut(id)?;
            token.is(secret).then_some(token)
        });
        let (error, what) = match found.map(|token| (token.holds(now), token)) {
            Some((Ok(()), token)) => {
                if token.use_now(now)
                    && let Ok(doc) = serde_json::to_string(token)
                {
                    drop(self.store.remember(token.note(), doc));
                }
                let credential = Credential::Token(token.id.clone());
                return Ok(Caller { name: token.actor(), role: Some(token.role), origin, credential, second: None });
            }
            Some((Err(error), token)) => (error, format!("showed {}, which does not hold any more", token.actor())),
            None if secure => (AccessError::WrongToken, format!("showed a wrong secret for {owner}")),
            None => {
                tracing::warn!("{origin} showed {owner} over an unencrypted connection: revoke it");
                (AccessError::InTheClear, format!("showed {owner} over an unencrypted connection"))
            }
        };
        known.by_address.failed(&place, now);
        if !account.is_empty() {
            known.by_account.failed(account, now);
        }
        self.note_down(line(what).but(error.to_string()));
        Err(error)
    }

    /// Whose session this is.
    pub(crate) fn session_of(&self, id: &str, from: IpAddr) -> Result<Caller, AccessError> {
        let (now, key) = (now_ms(), SessionKey::of(id));
        let mut known = self.access.lock();
        let known = &mut *known;
        let session = known.sessions.get_mut(&key).ok_or(AccessError::SessionOver)?;
        let Some(role) = self.session_role(session, &known.tokens, now) else {
            known.sessions.remove(&key);
            drop(self.store.erase(key.note()));
            return Err(AccessError::SessionOver);
        };
        if session.use_now(now)
            && let Ok(doc) = serde_json::to_string(&(&key, &*session))
        {
            drop(self.store.remember(key.note(), doc));
        }
        let origin = from.to_canonical().to_string();
        let credential = Credential::Session(key);
        Ok(Caller { name: session.name.clone(), role: Some(role), origin, credential, second: None })
    }

    /// What a session still allows; none: it is over.
    fn session_role(&self, session: &Session, tokens: &BTreeMap<String, Token>, now: Millis) -> Option<AccessRole> {
        let access = &self.config.access;
        if !session.holds(now, access.session_idle, access.session_max) {
            return None;
        }
        match &session.of {
            SessionOf::Token(token) => tokens.get(token).filter(|t| t.holds(now).is_ok()).map(|t| t.role),
            SessionOf::Oidc { groups, mapping, .. } => self.oidc_role(groups, mapping),
        }
    }

    /// What these groups may do, if the configuration still makes of groups what it made of them then.
    pub(super) fn oidc_role(&self, groups: &[String], mapping: &str) -> Option<AccessRole> {
        self.config.oidc.as_ref().filter(|oidc| oidc.mapping() == mapping)?.role_of(groups)
    }

    /// Resolves when what this caller was let in by holds no longer: its token was revoked or has expired, it logged out, or
    /// its session is over. Whoever needed none is let in for ever.
    pub(crate) async fn lapsed(&self, caller: &Caller) {
        let mut ends = self.access.ends();
        loop {
            // Before the look: what ends from here on ends the wait below.
            ends.mark_unchanged();
            let now = now_ms();
            let holds = self.holds(&self.access.lock(), caller, now);
            let Some(until) = holds else { return };
            let wait = Duration::from_millis(until.saturating_sub(now).saturating_add(1)).min(LOOK_AGAIN);
            // A time-out is the passing of time.
            let _ = tokio::time::timeout(wait, ends.changed()).await;
        }
    }

    /// Until when it holds, if nothing happens; a session that is used holds for longer.
    fn holds(&self, known: &Known, caller: &Caller, now: Millis) -> Option<Millis> {
        let token_end = |id: &String| known.tokens.get(id).filter(|t| t.holds(now).is_ok()).map(|t| t.expires);
        match &caller.credential {
            Credential::None | Credential::Local => Some(Millis::MAX),
            Credential::Token(id) => token_end(id),
            Credential::Session(key) => {
                let session = known.sessions.get(key)?;
                self.session_role(session, &known.tokens, now)?;
                let access = &self.config.access;
                let own = session.end(access.session_idle, access.session_max);
                match &session.of {
                    SessionOf::Token(id) => Some(own.min(token_end(id)?)),
                    SessionOf::Oidc { .. } => Some(own),
                }
            }
        }
    }

    /// Makes a token. Its text is in the answer and nowhere else.
    pub async fn token_create(
        &self,
        name: &str,
        role: AccessRole,
        lifetime: Option<Millis>,
        by: &Caller,
    ) -> Result<(TokenView, String), ControlError> {
        if !is_name(name) {
            return Err(AccessError::TokenName(name.to_owned()).into());
        }
        let access = &self.config.access;
        let lifetime = lifetime.unwrap_or(access.token_default);
        if !(5 * 60_000..=access.token_max).contains(&lifetime) {
            return Err(AccessError::Lifetime { days: access.token_max / (24 * 3_600_000) }.into());
        }
        let now = now_ms();
        let (mut token, text) = Token::make(name, role, &by.name, now, lifetime)?;
        token.second.clone_from(&by.second);
        let (commit, forgotten) = {
            let mut known = self.access.lock();
            token.behind = behind(&by.name, &known.tokens);
            match &by.second {
                Some(second) => token.behind.append(&mut behind(second, &known.tokens)),
                None => token.alone = alone(&by.name, &known.tokens),
            }
            if known.tokens.values().any(|t| t.name == name && t.holds(now).is_ok()) {
                return Err(AccessError::TokenTaken(name.to_owned()).into());
            }
            let put = vec![(token.note(), json(&token)?)];
            let mut forgotten = None;
            if known.tokens.len() >= crate::access::MAX_TOKENS {
                let over = known.tokens.values().filter(|t| t.holds(now).is_err()).min_by_key(|t| t.made);
                let over = over.ok_or(AccessError::TooManyTokens { limit: crate::access::MAX_TOKENS })?.id.clone();
                forgotten = known.tokens.remove(&over);
            }
            let gone = forgotten.iter().map(Token::note).collect();
            let days = lifetime / (24 * 3_600_000);
            let what = format!("made token {name} with the access role {role}, for {days} days");
            known.tokens.insert(token.id.clone(), token.clone());
            (self.store.change_told(put, gone, Line::done(now, &by.who(), "", what)), forgotten)
        };
        if let Err(error) = commit.wait().await {
            // Neither is it made, nor is the one that made room for it forgotten.
            for token in [&token].into_iter().chain(&forgotten) {
                self.token_as_stored(token).await;
            }
            return Err(error.into());
        }
        Ok((TokenView::of(&token, now), text))
    }

    /// All tokens, those that ended included.
    pub fn tokens(&self) -> Vec<TokenView> {
        let now = now_ms();
        let mut views: Vec<_> = self.access.lock().tokens.values().map(|t| TokenView::of(t, now)).collect();
        views.sort_by(|a, b| (&a.name, a.made_ms).cmp(&(&b.name, b.made_ms)));
        views
    }

    /// Ends a token now, and the sessions that rest on it.
    pub async fn token_revoke(&self, name: &str, by: &Caller) -> Result<TokenView, ControlError> {
        let now = now_ms();
        let (token, commit) = {
            let mut known = self.access.lock();
            let known = &mut *known;
            let token = known.tokens.values_mut().find(|t| t.name == name && t.holds(now).is_ok());
            let token = token.ok_or_else(|| AccessError::NoSuchToken(name.to_owned()))?;
            token.revoked = Some((now, by.name.clone()));
            let put = vec![(token.note(), json(token)?)];
            let mut gone = Vec::new();
            let rests = SessionOf::Token(token.id.clone());
            known.sessions.retain(|key, session| {
                let keep = session.of != rests;
                if !keep {
                    gone.push(key.note());
                }
                keep
            });
            let line = Line::done(now, &by.who(), "", format!("revoked token {name}"));
            (token.clone(), self.store.change_told(put, gone, line))
        };
        self.access.tell_end();
        if let Err(error) = commit.wait().await {
            self.token_as_stored(&token).await;
            return Err(error.into());
        }
        Ok(TokenView::of(&token, now))
    }

    /// After a commit that failed: what the database holds of a token is what holds. Else whoever revokes it again, with room,
    /// would hear that it is revoked already, and the next start would know nothing of it.
    async fn token_as_stored(&self, token: &Token) {
        let stored = match self.store.note(&token.note()).await {
            Ok(text) => text.and_then(|text| serde_json::from_str::<Token>(&text).ok()),
            Err(error) => {
                tracing::error!(%error, "what the database holds of {} cannot be read", token.actor());
                return;
            }
        };
        let tokens = &mut self.access.lock().tokens;
        match stored {
            Some(stored) => drop(tokens.insert(token.id.clone(), stored)),
            None => drop(tokens.remove(&token.id)),
        }
    }

    /// Takes an identity key away from its machine: whoever holds it is not heard any more. The machine needs another key,
    /// and a person who says that it is the machine's (`kiln machine clear --key`).
    pub async fn revoke_key(&self, machine: &str, by: &str) -> Result<KeyId, ControlError> {
        let pending = {
            let mut inner = self.lock();
            let id = inner.resolve(machine)?;
            let title = inner.machines.get(&id).map_or_else(|| id.to_string(), |m| m.title().to_owned());
            let key = inner.machines.get(&id).and_then(|m| m.key.clone());
            let key = key.ok_or_else(|| AccessError::NoKey(title.clone()))?;
            let mut known = self.access.lock();
            if known.revoked.contains_key(&key) {
                return Err(AccessError::RevokedBefore(key).into());
            }
            let revoked = RevokedKey { key: key.clone(), machine: title, at: now_ms(), by: by.to_owned() };
            let mut pending = super::Pending { wake: true, ..super::Pending::default() };
            pending.commits.push(self.store.remember(revoked_note(&key), json(&revoked)?));
            known.revoked.insert(key.clone(), revoked);
            drop(known);
            if let Some(machine) = inner.machines.get_mut(&id) {
                machine.key_revoked = true;
                machine.code = None;
            }
            // What was signed for this key is not handed out again.
            inner.envelopes.remove(&id);
            self.save(&inner, &id, &mut pending)?;
            if let Some(machine) = inner.machines.get(&id) {
                self.end_certificates(machine, now_ms(), &mut pending);
                self.audit(&mut pending, machine, by, format!("revoked the identity key {key}"));
            }
            (pending, id, key)
        };
        let (pending, id, key) = pending;
        if let Err(error) = self.finish(pending).await {
            self.revoked_as_stored(&id, &key).await;
            return Err(error);
        }
        Ok(key)
    }

    /// After a commit that failed: only what the database knows of is revoked, so that it can be revoked again.
    async fn revoked_as_stored(&self, id: &MachineId, key: &KeyId) {
        if self.store.note(&revoked_note(key)).await.is_ok_and(|note| note.is_none()) {
            let mut inner = self.lock();
            self.access.lock().revoked.remove(key);
            if let Some(machine) = inner.machines.get_mut(id).filter(|m| m.key.as_ref() == Some(key)) {
                machine.key_revoked = false;
            }
        }
    }
}
