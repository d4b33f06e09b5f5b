//! What goes into the audit log of what a machine's boots can promise: changes of the verdict on them, and of the protection
//! class that they show. Whoever looks a year later sees from when on a machine was not what it had been.

use crate::Millis;
use crate::event::Action;
use crate::machine::Machine;
use crate::step::save;
use kiln_protocol::{AttestationState, ProtectionClass, TpmPresence};
use serde::{Deserialize, Serialize};

/// A boot that could prove something has so long, before it counts as one that did not.
const PROOF_MS: Millis = 10 * 60_000;
/// So many changes of one machine are recorded in an hour: whoever holds its key can make up any number. What a change came
/// to is recorded once the hour is over.
const CHANGES: u32 = 10;
const HOUR_MS: Millis = 3_600_000;

/// What was recorded last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// The verdict.
    pub state: AttestationState,
    /// The class.
    pub class: ProtectionClass,
    /// When the hour began that is counted.
    pub since: Millis,
    /// Changes in that hour.
    pub changes: u32,
}

impl Machine {
    /// The verdict that stands, and why; none while this boot may still prove something.
    fn verdict(&self, now: Millis) -> Option<(AttestationState, String)> {
        let waits = self.proof().is_none() && self.facts.as_ref()?.tpm == Some(TpmPresence::Ready);
        let young = self.boots.back().is_none_or(|boot| now < boot.started.saturating_add(PROOF_MS));
        (!(waits && young)).then(|| self.attestation())
    }

    /// Records what changed, of machines that a person approved: others can be made up.
    pub(crate) fn record_protection(&mut self, now: Millis, out: &mut Vec<Action>) {
        if !self.state.kind.in_fleet() {
            return;
        }
        let (Some((state, reason)), Some(class)) = (self.verdict(now), self.protection()) else { return };
        let first = Recorded { state, class, since: now, changes: 0 };
        let Some(before) = self.attestations.recorded.clone() else {
            match state {
                AttestationState::Attested | AttestationState::Failed => {
                    out.push(Action::Record(format!("boots are {state} ({class}): {reason}")));
                }
                // Nothing was promised, and nothing is.
                AttestationState::Unattested | AttestationState::NoTpm => {}
            }
            self.attestations.recorded = Some(first);
            save(out);
            return;
        };
        if (before.state, before.class) == (state, class) {
            return;
        }
        let over = now >= before.since.saturating_add(HOUR_MS);
        let (since, changes) = if over { (now, 0) } else { (before.since, before.changes) };
        if changes >= CHANGES {
            return;
        }
        let was = format!("boots were {} ({})", before.state, before.class);
        out.push(Action::Record(format!("{was} and are {state} ({class}): {reason}")));
        self.attestations.recorded = Some(Recorded { since, changes: changes + 1, ..first });
        save(out);
    }
}
