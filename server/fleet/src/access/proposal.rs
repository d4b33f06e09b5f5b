//! Four eyes: what one person asked for is kept until another confirms it, refuses it, or its time is over. It is done
//! at most once: whoever confirms it closes it before anything is done.

use crate::Millis;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What one person asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// Its id, which people type.
    pub id: String,
    /// Which kind of action, as `[access] four_eyes` names it.
    pub action: String,
    /// In a sentence.
    pub what: String,
    /// Who asked.
    pub by: String,
    /// Who can act as the one who asked: itself, and those by whose hand it has its token.
    pub behind: BTreeSet<String>,
    /// Of these, each who needed nobody's help for it.
    #[serde(default)]
    pub alone: BTreeSet<String>,
    /// When.
    pub at: Millis,
    /// Until when it can be confirmed.
    pub deadline: Millis,
    /// Where it stands.
    pub state: ProposalState,
}

/// Where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum ProposalState {
    /// It waits for another person.
    Open,
    /// Another person confirmed it, and it was begun.
    Confirmed {
        /// Who.
        by: String,
        /// When.
        at: Millis,
        /// What came of it; none: the server stopped before it was known.
        outcome: Option<String>,
    },
    /// Somebody refused it.
    Refused {
        /// Who.
        by: String,
        /// When.
        at: Millis,
    },
    /// Nobody confirmed it in time.
    Expired,
}

/// What can happen to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProposalEvent {
    /// Somebody confirms it.
    Confirm {
        /// Who.
        by: String,
        /// Who can act as this one.
        behind: BTreeSet<String>,
        /// And who can without help.
        alone: BTreeSet<String>,
    },
    /// What was confirmed was done, or failed.
    Done {
        /// What came of it.
        outcome: String,
    },
    /// Somebody refuses it; whoever asked may, too.
    Refuse {
        /// Who.
        by: String,
    },
    /// Time passed.
    Tick,
}

/// It was not confirmed or refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ProposalRefusal {
    #[error("{by} asked for it, or could have: another person confirms it")]
    SamePerson { by: String },
    #[error(
        "{maker} could be both who asked for it and who confirms it: their credentials are of that one's making alone. Tokens that \
         were made by different people, by two together (`token` in four_eyes) or on the boot server are different persons"
    )]
    SameMaker { maker: String },
    #[error("nobody confirmed it in time: ask for it again")]
    Expired,
    #[error("it was confirmed before: it is done once")]
    Confirmed,
    #[error("it was refused: ask for it again")]
    Refused,
}

impl Proposal {
    /// One step. `Confirm` that succeeds: the caller commits it and then does, once, what was asked for.
    pub fn event(self, event: ProposalEvent, now: Millis) -> Result<Self, ProposalRefusal> {
        let over = now >= self.deadline;
        let state = match (&self.state, event) {
            (ProposalState::Open, ProposalEvent::Confirm { .. } | ProposalEvent::Refuse { .. }) if over => {
                return Err(ProposalRefusal::Expired);
            }
            (ProposalState::Open, ProposalEvent::Confirm { by, behind, alone }) => {
                if self.behind.contains(&by) || behind.contains(&self.by) {
                    return Err(ProposalRefusal::SamePerson { by: self.by });
                }
                // One person with two tokens is one person.
                if let Some(maker) = self.alone.intersection(&alone).next() {
                    return Err(ProposalRefusal::SameMaker { maker: maker.clone() });
                }
                ProposalState::Confirmed { by, at: now, outcome: None }
            }
            (ProposalState::Open, ProposalEvent::Refuse { by }) => ProposalState::Refused { by, at: now },
            (ProposalState::Open, ProposalEvent::Tick) if over => ProposalState::Expired,
            (ProposalState::Open, ProposalEvent::Tick | ProposalEvent::Done { .. }) => ProposalState::Open,
            (ProposalState::Confirmed { by, at, outcome: None }, ProposalEvent::Done { outcome }) => {
                ProposalState::Confirmed { by: by.clone(), at: *at, outcome: Some(outcome) }
            }
            (ProposalState::Confirmed { .. }, ProposalEvent::Confirm { .. } | ProposalEvent::Refuse { .. }) => {
                return Err(ProposalRefusal::Confirmed);
            }
            (ProposalState::Refused { .. }, ProposalEvent::Confirm { .. } | ProposalEvent::Refuse { .. }) => {
                return Err(ProposalRefusal::Refused);
            }
            (ProposalState::Expired, ProposalEvent::Confirm { .. } | ProposalEvent::Refuse { .. }) => {
                return Err(ProposalRefusal::Expired);
            }
            (state @ ProposalState::Confirmed { .. }, ProposalEvent::Done { .. } | ProposalEvent::Tick)
            | (
                state @ (ProposalState::Refused { .. } | ProposalState::Expired),
                ProposalEvent::Done { .. } | ProposalEvent::Tick,
            ) => state.clone(),
        };
        Ok(Self { state, ..self })
    }

    /// It can still be confirmed.
    pub fn is_open(&self, now: Millis) -> bool {
        self.state == ProposalState::Open && now < self.deadline
    }
}
