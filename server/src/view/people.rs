//! Tokens, and what waits for a second person.

use crate::access::{Kept, Token};
use kiln_fleet::Millis;
use kiln_fleet::access::{AccessRole, ProposalState};
use serde::{Deserialize, Serialize};

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    /// Its name.
    pub name: String,
    /// The public part of its text.
    pub id: String,
    /// What it may do.
    pub role: AccessRole,
    /// When it was made.
    pub made_ms: i64,
    /// By whom.
    pub by: String,
    /// When it ends.
    pub expires_ms: i64,
    /// When it was last used, within a minute.
    pub used_ms: Option<i64>,
    /// `holds`, `expired`, `revoked by …`.
    pub state: String,
}

fn signed(ms: Millis) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

impl TokenView {
    /// Of a token.
    pub fn of(token: &Token, now: Millis) -> Self {
        let state = match &token.revoked {
            Some((_, by)) => format!("revoked by {by}"),
            None if token.holds(now).is_err() => "expired".to_owned(),
            None => "holds".to_owned(),
        };
        Self {
            name: token.name.clone(),
            id: token.id.clone(),
            role: token.role,
            made_ms: signed(token.made),
            by: token.by.clone(),
            expires_ms: signed(token.expires),
            used_ms: token.used.map(signed),
            state,
        }
    }
}

/// What waits for a second person, or did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingView {
    /// Its id.
    pub id: String,
    /// Which kind of action.
    pub action: String,
    /// In a line.
    pub what: String,
    /// The call's path.
    pub path: String,
    /// The call's body, whole.
    pub body: String,
    /// Who asked.
    pub by: String,
    /// The least access role of both.
    pub least: AccessRole,
    /// When it was asked for.
    pub at_ms: i64,
    /// Until when it can be confirmed.
    pub deadline_ms: i64,
    /// `waits for another person`, `confirmed by …: …`, `refused by …`, `expired`.
    pub state: String,
    /// It can still be confirmed.
    pub open: bool,
}

impl PendingView {
    /// Of a proposal.
    pub fn of(kept: &Kept, now: Millis) -> Self {
        let proposal = &kept.proposal;
        let open = proposal.is_open(now);
        let state = match &proposal.state {
            ProposalState::Open if open => "waits for another person".to_owned(),
            ProposalState::Open | ProposalState::Expired => "expired".to_owned(),
            ProposalState::Confirmed { by, outcome: Some(outcome), .. } => format!("confirmed by {by}: {outcome}"),
            ProposalState::Confirmed { by, outcome: None, .. } => {
                format!(
                    "confirmed by {by}; the server stopped before it was known what came of it: look, and ask again"
                )
            }
            ProposalState::Refused { by, .. } => format!("refused by {by}"),
        };
        Self {
            id: proposal.id.clone(),
            action: proposal.action.clone(),
            what: proposal.what.clone(),
            path: kept.path.clone(),
            body: kept.body.clone(),
            by: proposal.by.clone(),
            least: kept.least,
            at_ms: signed(proposal.at),
            deadline_ms: signed(proposal.deadline),
            state,
            open,
        }
    }
}
