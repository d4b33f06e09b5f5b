//! Second persons: a call that needs two is kept as it came, and done as it came when another confirms it.

use super::people::json;
use super::pin::Pinned;
use super::{Control, now_ms};
use crate::access::calls::Call;
use crate::access::{Asker, Caller, Credential, Kept, Known, SessionOf, alone, behind, random, surplus};
use crate::audit::Line;
use crate::error::{AccessError, ControlError};
use crate::http::releases::Numbers;
use crate::view::PendingView;
use kiln_fleet::Millis;
use kiln_fleet::access::{AccessRole, Proposal, ProposalEvent, ProposalState};
use kiln_protocol::{ImageName, cut_at, printable};
use std::fmt::Write;

/// Where the calls about one machine are.
pub(crate) const MACHINES: &str = "/api/v1/machines/";
/// And those about the releases of one image.
const RELEASES: &str = "/api/v1/releases/";
/// And those about what waits for a second person.
const PENDING: &str = "/api/v1/pending/";
/// Of what somebody asks for, so much is shown.
const SHOWN: usize = 600;
/// Longest call that waits for a second person.
pub(crate) const MAX_PENDING_BODY: usize = 128 << 10;

/// How the names of people begin whom the identity provider names.
pub(super) const OIDC: &str = "oidc ";

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
    /// Whether a call of this kind may need a second person, so that its body has to be looked at.
    pub(crate) fn may_need_second(&self, action: &str) -> bool {
        let access = &self.config.access;
        access.four_eyes.contains(action)
            || (action == "token" && access.four_eyes.contains("admin-token"))
            || (matches!(action, "assign" | "approve") && access.assign_alone.is_some())
    }

    /// Whether a call needs a second person: its kind does, or so many machines in an hour.
    pub(crate) fn needs_second(&self, caller: &Caller, asked: &Asked<'_>) -> bool {
        let access = &self.config.access;
        let action = asked.call.action;
        if access.four_eyes.contains(action) {
            return action != "prune" || !self.prune_was_confirmed(asked);
        }
        if action == "token" && access.four_eyes.contains("admin-token") {
            // What cannot be read is refused by the call itself.
            let body: Option<serde_json::Value> = serde_json::from_str(asked.body).ok();
            return body.is_some_and(|body| body["role"] == AccessRole::Admin.as_str());
        }
        match (action, access.assign_alone, asked.machine) {
            ("assign" | "approve", Some(limit), Some(machine)) => {
                let (id, least) = {
                    let inner = self.look();
                    let id = inner.resolve(machine).ok();
                    let least = id.as_ref().map_or(asked.call.least, |id| inner.least(asked.call, id));
                    (id.map_or_else(|| machine.to_owned(), |id| id.to_string()), least)
                };
                // Placing new machines is a technician's work, any number of them; and what the call refuses spends nobody's share.
                if least < AccessRole::Operator || caller.role.is_none_or(|has| has < least) {
                    return false;
                }
                let mut known = self.access.lock();
                let who = alone(&caller.name, &known.tokens);
                !known.spree.take(&caller.name, &who, &id, limit, now_ms())
            }
            _ => false,
        }
    }

    /// What a prune asks for was done when another confirmed it. Whoever prunes asks once more, and goes on with the answer.
    fn prune_was_confirmed(&self, asked: &Asked<'_>) -> bool {
        let rest = asked.path.strip_prefix(RELEASES);
        let image: Option<ImageName> = rest.and_then(|rest| rest.split('/').next()?.parse().ok());
        let numbers: Option<Numbers> = serde_json::from_str(asked.body).ok();
        image.zip(numbers).is_some_and(|(image, numbers)| self.is_withheld(&image, &numbers.releases))
    }

    /// Keeps a call until a second person confirms it.
    pub(crate) async fn propose(&self, caller: &Caller, asked: &Asked<'_>) -> Result<PendingView, ControlError> {
        let now = now_ms();
        let Asked { call, machine, content_type, body, .. } = asked;
        let Pinned { path, body: pinned, named, key, least } = self.pinned(caller, asked)?;
        let title = machine.map_or_else(String::new, |m| format!(" {m}"));
        let mut what = format!("{}{title}: {}", call.action, printable(cut_at(body, SHOWN)));
        if path.contains('?') {
            let _ = write!(what, " ({})", printable(cut_at(&path, SHOWN)));
        }
        for (name, id) in named {
            let _ = write!(what, " ({} is machine {id})", printable(cut_at(&name, SHOWN)));
        }
        if let Some(key) = key {
            let _ = write!(what, " (the key {key})");
        }
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
                alone: alone(&caller.name, &known.tokens),
                at: now,
                deadline: now.saturating_add(self.config.access.pending),
                state: ProposalState::Open,
            };
            let (token, asker) = match &caller.credential {
                Credential::Token(id) => (Some(id.clone()), None),
                Credential::Session(key) => match known.sessions.get(key).map(|session| &session.of) {
                    Some(SessionOf::Token(id)) => (Some(id.clone()), None),
                    Some(SessionOf::Oidc { groups, mapping, .. }) => {
                        (None, Some(Asker { groups: groups.clone(), mapping: mapping.clone() }))
                    }
                    None => return Err(AccessError::SessionOver.into()),
                },
                Credential::None | Credential::Local => (None, None),
            };
            let kept = Kept {
                proposal,
                least,
                token,
                asker,
                method: call.method.to_owned(),
                path,
                content_type: (*content_type).to_owned(),
                body: pinned,
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

    /// What a call with this path is about, to be put behind it in the audit log: what somebody asked for. Empty for calls that are
    /// not about that, and where nothing of that id is known.
    pub(crate) fn about_pending(&self, path: &str) -> String {
        let Some(id) = path.strip_prefix(PENDING).and_then(|rest| rest.split('/').next()) else { return String::new() };
        let known = self.access.lock();
        let kept = known.proposals.get(id);
        kept.map_or_else(String::new, |Kept { proposal, .. }| format!(" ({} asked for {})", proposal.by, proposal.what))
    }

    /// A second person's word. `Ok`: the call is closed, and the one who gets it does it, once.
    pub(crate) async fn confirm(&self, id: &str, by: &Caller) -> Result<(Kept, Caller), ControlError> {
        let now = now_ms();
        let (kept, role, commits) = {
            let mut known = self.access.lock();
            let known = &mut *known;
            let kept = known.proposals.get(id).ok_or_else(|| AccessError::NoSuchProposal(cut_at(id, 64).to_owned()))?;
            let has = by.role.unwrap_or(AccessRole::Viewer);
            if has < kept.least {
                return Err(AccessError::TooLow { who: by.name.clone(), has, needs: kept.least }.into());
            }
            let asks = self.asks_as(kept, known, now).map_err(|reason| AccessError::ProposerGone { reason })?;
            let event = ProposalEvent::Confirm {
                by: by.name.clone(),
                behind: behind(&by.name, &known.tokens),
                alone: alone(&by.name, &known.tokens),
            };
            let proposal = kept.proposal.clone().event(event, now).map_err(AccessError::from)?;
            let kept = Kept { proposal, ..kept.clone() };
            let what = format!("confirmed what {} asked for ({id}): {}", kept.proposal.by, kept.proposal.what);
            let commits = [
                self.store.remember(kept.note(), json(&kept)?),
                self.store.audit(Line::done(now, &by.who(), "", what)),
            ];
            known.proposals.insert(id.to_owned(), kept.clone());
            (kept, has.min(asks), commits)
        };
        // Closed on the disk before anything is done: after a crash it is not done a second time.
        for commit in commits {
            commit.wait().await?;
        }
        let caller = Caller {
            name: kept.proposal.by.clone(),
            // What the call itself looks at, both must have.
            role: Some(role),
            origin: by.origin.clone(),
            credential: Credential::None,
            second: Some(by.name.clone()),
        };
        Ok((kept, caller))
    }

    /// As what whoever asked for it asks, by what is known of that one now; or why it may not any more.
    fn asks_as(&self, kept: &Kept, known: &Known, now: Millis) -> Result<AccessRole, String> {
        let role = if let Some(token) = &kept.token {
            let token = known.tokens.get(token).ok_or_else(|| "its token is gone".to_owned())?;
            token.holds(now).map_err(|e| e.to_string())?;
            token.role
        } else if kept.proposal.by.starts_with(OIDC) {
            let role = kept.asker.as_ref().and_then(|asker| self.oidc_role(&asker.groups, &asker.mapping));
            role.ok_or_else(|| "its groups give it no access role any more".to_owned())?
        } else {
            AccessRole::Admin // a user of this host
        };
        if role < kept.least { Err(format!("its access role is {role} now")) } else { Ok(role) }
    }

    /// The identity provider says anew in which groups somebody is: what that one asked for rests on these from now on, and
    /// sessions that rest on others end.
    pub(super) fn named(&self, known: &mut Known, name: &str, asker: &Asker, now: Millis) {
        let sessions = known.sessions.len();
        known.sessions.retain(|key, session| {
            let keep = session.name != name
                || match &session.of {
                    SessionOf::Oidc { groups, mapping, .. } => (groups, mapping) == (&asker.groups, &asker.mapping),
                    SessionOf::Token(_) => true,
                };
            if !keep {
                drop(self.store.erase(key.note()));
            }
            keep
        });
        if known.sessions.len() < sessions {
            self.access.tell_end();
        }
        for kept in known.proposals.values_mut() {
            let open = kept.proposal.by == name && kept.proposal.is_open(now);
            if !open || kept.asker.as_ref() == Some(asker) {
                continue;
            }
            kept.asker = Some(asker.clone());
            match json(kept) {
                Ok(doc) => drop(self.store.remember(kept.note(), doc)),
                Err(error) => tracing::error!(%error, "what waits for a second person was not stored"),
            }
        }
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
}
