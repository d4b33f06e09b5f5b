//! People and programs: who a caller is, tokens, second persons, and identity keys that are taken away. What is decided
//! here is in the audit log, wrong credentials included.

use super::{Control, now_ms};
use crate::access::calls::Call;
use crate::access::{Caller, Credential, Kept, RevokedKey, SessionKey, SessionOf, Token, place};
use crate::access::{behind, random, surplus};
use crate::audit::Line;
use crate::config::is_name;
use crate::error::{AccessError, ControlError, StoreError};
use crate::view::{PendingView, TokenView};
use kiln_fleet::Millis;
use kiln_fleet::access::{AccessRole, Proposal, ProposalEvent, ProposalState};
use kiln_protocol::{KeyId, cut_at, printable};
use std::net::IpAddr;

/// Of what somebody asks for, so much is shown.
const SHOWN: usize = 600;
/// Longest call that waits for a second person.
pub(crate) const MAX_PENDING_BODY: usize = 128 << 10;

fn json(value: &impl serde::Serialize) -> Result<String, ControlError> {
    Ok(serde_json::to_string(value).map_err(StoreError::from)?)
}

/// A call as it came.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) call: &'static Call,
    /// The machine of its path, if it names one.
    pub(crate) machine: Option<&'a str>,
    pub(crate) path: &'a str,
    pub(crate) content_type: &'a str,
    pub(crate) body: &'a str,
}

impl Control {
    /// Writes a record that nothing waits for.
    pub(crate) fn note_down(&self, line: Line) {
        drop(self.store.audit(line));
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
        let access = &self.config.access;
        let mut known = self.access.lock();
        let known = &mut *known;
        let session = known.sessions.get_mut(&key).ok_or(AccessError::SessionOver)?;
        let role = if session.holds(now, access.session_idle, access.session_max) {
            match &session.of {
                SessionOf::Token(token) => known.tokens.get(token).filter(|t| t.holds(now).is_ok()).map(|t| t.role),
                SessionOf::Oidc { groups, mapping, .. } => {
                    let oidc = self.config.oidc.as_ref().filter(|oidc| oidc.mapping() == *mapping);
                    oidc.and_then(|oidc| oidc.role_of(groups))
                }
            }
        } else {
            None
        };
        let Some(role) = role else {
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
        let commits = {
            let mut known = self.access.lock();
            if known.tokens.values().any(|t| t.name == name && t.holds(now).is_ok()) {
                return Err(AccessError::TokenTaken(name.to_owned()).into());
            }
            let mut commits = Vec::new();
            if known.tokens.len() >= crate::access::MAX_TOKENS {
                let over = known.tokens.values().filter(|t| t.holds(now).is_err()).min_by_key(|t| t.made);
                let over = over.ok_or(AccessError::TooManyTokens { limit: crate::access::MAX_TOKENS })?;
                let (id, note) = (over.id.clone(), over.note());
                known.tokens.remove(&id);
                commits.push(self.store.erase(note));
            }
            commits.push(self.store.remember(token.note(), json(&token)?));
            let days = lifetime / (24 * 3_600_000);
            let what = format!("made token {name} with the access role {role}, for {days} days");
            commits.push(self.store.audit(Line::done(now, &by.who(), "", what)));
            known.tokens.insert(token.id.clone(), token.clone());
            commits
        };
        for commit in commits {
            commit.wait().await?;
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
        let (view, commits) = {
            let mut known = self.access.lock();
            let known = &mut *known;
            let token = known.tokens.values_mut().find(|t| t.name == name && t.holds(now).is_ok());
            let token = token.ok_or_else(|| AccessError::NoSuchToken(name.to_owned()))?;
            token.revoked = Some((now, by.name.clone()));
            let mut commits = vec![self.store.remember(token.note(), json(token)?)];
            let rests = SessionOf::Token(token.id.clone());
            known.sessions.retain(|key, session| {
                let keep = session.of != rests;
                if !keep {
                    commits.push(self.store.erase(key.note()));
                }
                keep
            });
            commits.push(self.store.audit(Line::done(now, &by.who(), "", format!("revoked token {name}"))));
            (TokenView::of(token, now), commits)
        };
        for commit in commits {
            commit.wait().await?;
        }
        Ok(view)
    }

    /// Whether a call of this kind may need a second person, so that its body has to be looked at.
    pub(crate) fn may_need_second(&self, action: &str) -> bool {
        let access = &self.config.access;
        access.four_eyes.contains(action)
            || (action == "token" && access.four_eyes.contains("admin-token"))
            || (action == "assign" && access.assign_alone.is_some())
    }

    /// Whether a call needs a second person: its kind does, or so many machines in an hour.
    pub(crate) fn needs_second(&self, caller: &Caller, asked: &Asked<'_>) -> bool {
        let access = &self.config.access;
        let action = asked.call.action;
        if access.four_eyes.contains(action) {
            return true;
        }
        if action == "token" && access.four_eyes.contains("admin-token") {
            // What cannot be read is refused by the call itself.
            let body: Option<serde_json::Value> = serde_json::from_str(asked.body).ok();
            return body.is_some_and(|body| body["role"] == AccessRole::Admin.as_str());
        }
        match (action, access.assign_alone, asked.machine) {
            ("assign", Some(alone), Some(machine)) => {
                let id = self.lock().resolve(machine).map_or_else(|_| machine.to_owned(), |id| id.to_string());
                !self.access.lock().spree.take(&caller.name, &id, alone, now_ms())
            }
            _ => false,
        }
    }

    /// Keeps a call until a second person confirms it.
    pub(crate) async fn propose(&self, caller: &Caller, asked: &Asked<'_>) -> Result<PendingView, ControlError> {
        let now = now_ms();
        let Asked { call, machine, path, content_type, body } = asked;
        let title = machine.map_or_else(String::new, |m| format!(" {m}"));
        let what = format!("{}{title}: {}", call.action, printable(cut_at(body, SHOWN)));
        let (kept, commits) = {
            let mut known = self.access.lock();
            let limit = crate::access::MAX_OPEN;
            if known.proposals.values().filter(|kept| kept.proposal.is_open(now)).count() >= limit {
                return Err(AccessError::TooManyProposals { limit }.into());
            }
            let proposal = Proposal {
                id: random::<4>()?,
                action: call.action.to_owned(),
                what: what.clone(),
                by: caller.name.clone(),
                behind: behind(&caller.name, &known.tokens),
                at: now,
                deadline: now.saturating_add(self.config.access.pending),
                state: ProposalState::Open,
            };
            let token = match &caller.credential {
                Credential::Token(id) => Some(id.clone()),
                Credential::Session(key) => known.sessions.get(key).and_then(|session| match &session.of {
                    SessionOf::Token(id) => Some(id.clone()),
                    SessionOf::Oidc { .. } => None,
                }),
                Credential::None | Credential::Local => None,
            };
            let kept = Kept {
                proposal,
                least: call.least,
                token,
                method: call.method.to_owned(),
                path: (*path).to_owned(),
                content_type: (*content_type).to_owned(),
                body: (*body).to_owned(),
            };
            let mut commits = vec![self.store.remember(kept.note(), json(&kept)?)];
            known.proposals.insert(kept.proposal.id.clone(), kept.clone());
            for id in surplus(&known.proposals, now) {
                if let Some(old) = known.proposals.remove(&id) {
                    commits.push(self.store.erase(old.note()));
                }
            }
            let line =
                Line::done(now, &caller.who(), "", format!("asked for a second person ({}): {what}", kept.proposal.id));
            commits.push(self.store.audit(line));
            (kept, commits)
        };
        for commit in commits {
            commit.wait().await?;
        }
        tracing::info!(
            "{} asks for a second person: {what} (`kiln pending confirm {}`)",
            caller.name,
            kept.proposal.id
        );
        Ok(PendingView::of(&kept, now))
    }

    /// What waits for a second person, or did; the newest first.
    pub fn pending(&self) -> Vec<PendingView> {
        let now = now_ms();
        let mut views: Vec<_> = self.access.lock().proposals.values().map(|kept| PendingView::of(kept, now)).collect();
        views.sort_by_key(|view| std::cmp::Reverse(view.at_ms));
        views
    }

    /// A second person's word. `Ok`: the call is closed, and the one who gets it does it, once.
    pub(crate) async fn confirm(&self, id: &str, by: &Caller) -> Result<(Kept, Caller), ControlError> {
        let now = now_ms();
        let (kept, commits) = {
            let mut known = self.access.lock();
            let known = &mut *known;
            let kept = known.proposals.get(id).ok_or_else(|| AccessError::NoSuchProposal(cut_at(id, 64).to_owned()))?;
            let has = by.role.unwrap_or(AccessRole::Viewer);
            if has < kept.least {
                return Err(AccessError::TooLow { who: by.name.clone(), has, needs: kept.least }.into());
            }
            if let Some(token) = &kept.token {
                let gone = match known.tokens.get(token) {
                    Some(token) if token.role < kept.least => Some("its access role is too low".to_owned()),
                    Some(token) => token.holds(now).err().map(|e| e.to_string()),
                    None => Some("its token is gone".to_owned()),
                };
                if let Some(reason) = gone {
                    return Err(AccessError::ProposerGone { reason }.into());
                }
            }
            let event = ProposalEvent::Confirm { by: by.name.clone(), behind: behind(&by.name, &known.tokens) };
            let proposal = kept.proposal.clone().event(event, now).map_err(AccessError::from)?;
            let kept = Kept { proposal, ..kept.clone() };
            let what = format!("confirmed what {} asked for ({id}): {}", kept.proposal.by, kept.proposal.what);
            let commits = [
                self.store.remember(kept.note(), json(&kept)?),
                self.store.audit(Line::done(now, &by.who(), "", what)),
            ];
            known.proposals.insert(id.to_owned(), kept.clone());
            (kept, commits)
        };
        // Closed on the disk before anything is done: after a crash it is not done a second time.
        for commit in commits {
            commit.wait().await?;
        }
        let caller = Caller {
            name: kept.proposal.by.clone(),
            role: by.role,
            origin: by.origin.clone(),
            credential: Credential::None,
            second: Some(by.name.clone()),
        };
        Ok((kept, caller))
    }

    /// What came of what was confirmed.
    pub(crate) async fn confirmed(&self, id: &str, outcome: String) -> Result<PendingView, ControlError> {
        self.proposal_step(id, ProposalEvent::Done { outcome }, None).await
    }

    /// A person says no, or takes back what it asked for.
    pub async fn refuse(&self, id: &str, by: &Caller) -> Result<PendingView, ControlError> {
        self.proposal_step(id, ProposalEvent::Refuse { by: by.name.clone() }, Some(by)).await
    }

    async fn proposal_step(
        &self,
        id: &str,
        event: ProposalEvent,
        by: Option<&Caller>,
    ) -> Result<PendingView, ControlError> {
        let now = now_ms();
        let (view, commits) = {
            let mut known = self.access.lock();
            let kept = known.proposals.get(id).ok_or_else(|| AccessError::NoSuchProposal(cut_at(id, 64).to_owned()))?;
            let proposal = kept.proposal.clone().event(event, now).map_err(AccessError::from)?;
            let kept = Kept { proposal, ..kept.clone() };
            let mut commits = vec![self.store.remember(kept.note(), json(&kept)?)];
            if let Some(by) = by {
                let what = format!("refused what {} asked for ({id}): {}", kept.proposal.by, kept.proposal.what);
                commits.push(self.store.audit(Line::done(now, &by.who(), "", what)));
            }
            let view = PendingView::of(&kept, now);
            known.proposals.insert(id.to_owned(), kept);
            (view, commits)
        };
        for commit in commits {
            commit.wait().await?;
        }
        Ok(view)
    }

    /// Lets time pass for what waits for a second person.
    pub(crate) async fn expire_pending(&self) -> Result<(), ControlError> {
        let now = now_ms();
        let commits = {
            let mut known = self.access.lock();
            let mut commits = Vec::new();
            for kept in known.proposals.values_mut() {
                let Ok(proposal) = kept.proposal.clone().event(ProposalEvent::Tick, now) else { continue };
                if proposal != kept.proposal {
                    kept.proposal = proposal;
                    commits.push(self.store.remember(kept.note(), json(kept)?));
                    let what = format!("nobody confirmed in time ({}): {}", kept.proposal.id, kept.proposal.what);
                    commits.push(self.store.audit(Line::done(now, "kiln", "", what)));
                }
            }
            commits
        };
        for commit in commits {
            commit.wait().await?;
        }
        Ok(())
    }

    /// Takes an identity key away from its machine: whoever holds it is not heard any more. The machine needs another key,
    /// and a person who says that it is the machine's (`kiln machine clear`).
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
            pending.commits.push(self.store.remember(format!("revoked-key/{key}"), json(&revoked)?));
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
                self.audit(&mut pending, machine, by, format!("revoked the identity key {key}"));
            }
            (pending, key)
        };
        let (pending, key) = pending;
        self.finish(pending).await?;
        Ok(key)
    }
}
