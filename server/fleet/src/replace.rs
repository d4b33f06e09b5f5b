//! New hardware in the place of old: it gets the old one's name, role and release; the old one is retired and keeps its
//! history. Nothing here looks at what either holds: wiping the old one is an operator's order of its own.

use crate::error::Refusal;
use crate::machine::Machine;
use crate::state::StateKind;
use kiln_protocol::ReleaseId;

/// What the new machine takes over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// Its name.
    pub name: String,
    /// Its role.
    pub role: String,
    /// What it shall run.
    pub release: ReleaseId,
}

impl Machine {
    /// What `new` takes over from this one, if it can.
    pub fn replaced_by(&self, new: &Self) -> Result<Replacement, Refusal> {
        let (old, machine) = (self.title().to_owned(), new.title().to_owned());
        if self.id == new.id {
            return Err(Refusal::ItsOwnReplacement { machine: old });
        }
        let name = self.name.clone().or(self.former_name.clone());
        let (Some(name), Some(role)) = (name, self.role.clone()) else {
            return Err(Refusal::NotApproved { machine: old });
        };
        // What it ran by an operator's order is not what its place is for.
        let assigned = self.assigned.as_ref().filter(|a| a.order.is_none()).map(|a| a.release.clone());
        let Some(release) = assigned.or_else(|| self.last_good().cloned()) else {
            return Err(Refusal::NothingToTakeOver { machine: old });
        };
        match new.state.kind {
            StateKind::Discovered | StateKind::Retired => {}
            StateKind::Quarantined => {
                let (state, reason) = (new.state.kind, new.state.reason.clone());
                return Err(Refusal::Held { machine, state, reason });
            }
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack => return Err(Refusal::InService { machine }),
        }
        let (Some(facts), Some(_)) = (&new.facts, &new.key) else {
            return Err(Refusal::NeverReported { machine });
        };
        if let Some(before) = self.facts.as_ref().filter(|before| before.arch != facts.arch) {
            let (expected, got) = (before.arch, facts.arch);
            return Err(Refusal::OtherArchitecture { machine, old, expected, got });
        }
        if new.is_refused(&release) {
            let reason = new.refused.iter().find(|r| r.release == release).map(|r| r.reason.clone());
            return Err(Refusal::PairQuarantined { machine, release, reason: reason.unwrap_or_default() });
        }
        Ok(Replacement { name, role, release })
    }
}
