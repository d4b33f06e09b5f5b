//! Log-ins of people, and the audit log's head that is handed out.

use super::second::OIDC;
use super::{Control, now_ms};
use crate::access::{Asker, Caller, Credential, Session, SessionKey, SessionOf};
use crate::access::{MAX_OWN_SESSIONS, MAX_SESSIONS, place, random};
use crate::audit::{HEAD_TYPE, Head, Line};
use crate::error::{AccessError, ControlError, OidcError, StoreError};
use crate::oidc::Answer;
use kiln_release::hex;
use std::net::IpAddr;
use std::time::Duration;

/// A head is handed out so often: at start, and then daily.
const HEAD_EVERY: u64 = 24 * 3_600_000;
/// Second persons' deadlines, and the head, are looked at so often.
const LOOK: Duration = Duration::from_secs(5);

impl Control {
    /// A session of whoever showed a token. Gives its id, which nothing keeps.
    pub(crate) async fn session_with_token(&self, caller: &Caller) -> Result<String, ControlError> {
        let Credential::Token(id) = &caller.credential else { return Err(AccessError::WrongToken.into()) };
        self.session_begin(caller.name.clone(), SessionOf::Token(id.clone()), &caller.origin, "with a token").await
    }

    async fn session_begin(
        &self,
        name: String,
        of: SessionOf,
        origin: &str,
        how: &str,
    ) -> Result<String, ControlError> {
        let (now, id) = (now_ms(), random::<32>()?);
        let key = SessionKey::of(&id);
        let session = Session { name: name.clone(), of, began: now, used: now };
        let doc = serde_json::to_string(&(&key, &session)).map_err(StoreError::from)?;
        let ended;
        let commit = {
            let mut known = self.access.lock();
            let access = &self.config.access;
            let over = |s: &Session| !s.holds(now, access.session_idle, access.session_max);
            let mut gone: Vec<SessionKey> =
                known.sessions.iter().filter(|(_, s)| over(s)).map(|(key, _)| key.clone()).collect();
            let stays = |s: &Session| !over(s);
            let own = |s: &Session| stays(s) && s.name == name;
            let crowded = known.sessions.values().filter(|s| own(s)).count() >= MAX_OWN_SESSIONS;
            if crowded || known.sessions.len() - gone.len() >= MAX_SESSIONS {
                let all = known.sessions.iter().filter(|(_, s)| if crowded { own(s) } else { stays(s) });
                gone.extend(all.min_by_key(|(_, s)| s.used).map(|(key, _)| key.clone()));
            }
            ended = !gone.is_empty();
            for key in &gone {
                known.sessions.remove(key);
            }
            let gone = gone.iter().map(SessionKey::note).collect();
            let put = vec![(key.note(), doc)];
            known.sessions.insert(key, session);
            let by = format!("{name} from {origin}");
            self.store.change_told(put, gone, Line::done(now, &by, "", format!("logged in {how}")))
        };
        if ended {
            self.access.tell_end();
        }
        commit.wait().await?;
        Ok(id)
    }

    /// Logs out. Whoever is not logged in is, after that, not logged in.
    pub(crate) async fn session_end(&self, caller: &Caller) -> Result<(), ControlError> {
        let Credential::Session(key) = &caller.credential else { return Ok(()) };
        self.access.lock().sessions.remove(key);
        self.access.tell_end();
        self.store.erase_told(key.note(), Line::done(now_ms(), &caller.who(), "", "logged out")).wait().await?;
        Ok(())
    }

    /// Where the provider is asked, and what the browser keeps meanwhile.
    pub(crate) async fn oidc_begin(&self, from: IpAddr) -> Result<(String, String), ControlError> {
        let provider = self.oidc.as_ref().ok_or(OidcError::None).map_err(AccessError::from)?;
        self.may_log_in(from)?;
        let (state, nonce, verifier, browser) = (random::<32>()?, random::<32>()?, random::<32>()?, random::<32>()?);
        let url = provider.begin(&state, &nonce, &verifier).await.map_err(AccessError::from)?;
        let pair = (nonce, verifier);
        self.access.lock().logins.begin(&state, pair, &browser, &place(from), now_ms());
        Ok((url, browser))
    }

    /// The provider's answer: the id of a session, if it names somebody who may do something.
    pub(crate) async fn oidc_end(&self, from: IpAddr, browser: &str, answer: &Answer) -> Result<String, ControlError> {
        let origin = from.to_canonical().to_string();
        self.may_log_in(from)?;
        let mut account = String::new();
        match self.oidc_person(browser, answer, &mut account).await {
            Ok((name, of)) => self.session_begin(name, of, &origin, "with the identity provider").await,
            // Nobody's fault who logs in, and nobody was known: it counts against no one, and fills no log.
            Err(error @ AccessError::Oidc(OidcError::Away { .. } | OidcError::Busy { .. })) => Err(error.into()),
            Err(error) => {
                let now = now_ms();
                let mut known = self.access.lock();
                known.by_address.failed(&place(from), now);
                if !account.is_empty() {
                    known.by_account.failed(&account, now);
                }
                drop(known);
                let who = if account.is_empty() { "nobody" } else { &account };
                let line = Line::done(now, &format!("{who} from {origin}"), "", "log-in with the identity provider");
                self.note_down(line.but(error.to_string()));
                Err(error.into())
            }
        }
    }

    fn may_log_in(&self, from: IpAddr) -> Result<(), AccessError> {
        let wait = self.access.lock().by_address.wait(&place(from), now_ms());
        wait.map_or(Ok(()), |wait| Err(AccessError::TooOften { seconds: wait.div_ceil(1000) }))
    }

    async fn oidc_person(
        &self,
        browser: &str,
        answer: &Answer,
        account: &mut String,
    ) -> Result<(String, SessionOf), AccessError> {
        let (Some(provider), Some(config)) = (&self.oidc, &self.config.oidc) else {
            return Err(OidcError::None.into());
        };
        let state = answer.state.as_deref().unwrap_or_default();
        let login = self.access.lock().logins.end(state, browser, now_ms()).ok_or(OidcError::State)?;
        let person = provider.end(&login, answer, jiff::Timestamp::now().as_second()).await?;
        let subject = person.subject;
        let name = format!("{OIDC}{subject}");
        if let Some(wait) = self.access.lock().by_account.wait(&name, now_ms()) {
            return Err(AccessError::TooOften { seconds: wait.div_ceil(1000) });
        }
        account.clone_from(&name);
        let groups: Vec<String> = person.groups.into_iter().filter(|group| config.roles.contains_key(group)).collect();
        let asker = Asker { groups, mapping: config.mapping() };
        self.named(&mut self.access.lock(), &name, &asker, now_ms());
        let Asker { groups, mapping } = asker;
        if groups.is_empty() {
            return Err(OidcError::NoGroup { subject }.into());
        }
        Ok((name, SessionOf::Oidc { subject, groups, mapping }))
    }

    /// Number and hash of the newest record, signed by the director.
    pub async fn audit_head(&self) -> Result<String, ControlError> {
        Ok(self.signed_head().await?.1)
    }

    async fn signed_head(&self) -> Result<(Head, String), ControlError> {
        let newest = self.store.audit_tail(1).await?.pop();
        let at = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or_default();
        let head = Head {
            type_: HEAD_TYPE.to_owned(),
            spec_version: "1.0".to_owned(),
            site: self.site.name.clone(),
            number: newest.as_ref().map_or(0, |record| record.number),
            hash: newest.map(|record| record.hash).unwrap_or_default(),
            at,
        };
        let signed = self.sign(&head)?;
        Ok((head, signed))
    }

    /// Lets time pass for people: deadlines of second persons, refusals that were counted, and the daily head, in the log and beside
    /// the database. For ever.
    pub(crate) async fn watch_people(&self) {
        let mut said = 0;
        loop {
            if let Err(error) = self.expire_pending().await {
                tracing::warn!(%error, "what waits for a second person was not looked at");
            }
            let now = now_ms();
            self.note_more_refused(Some(now));
            if now >= said + HEAD_EVERY {
                match self.signed_head().await {
                    Ok((head, signed)) => {
                        said = now;
                        let sha256 = hex::sha256(signed.as_bytes());
                        tracing::info!(
                            "audit log: head {} {} (statement {sha256} signed by the director; `kiln audit head` prints it: \
                             keep it elsewhere)",
                            head.number,
                            if head.hash.is_empty() { "-" } else { &head.hash }
                        );
                    }
                    Err(error) => tracing::warn!(%error, "the audit log's head was not signed"),
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
