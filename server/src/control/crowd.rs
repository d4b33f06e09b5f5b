//! Machines that nobody knows. Whoever can send on the machines' network can make them up, so there is room for a
//! number of them, they come in at a bounded rate, and whose agent was never heard gives way.

use super::{Control, Inner, Pending};
use crate::error::ControlError;
use kiln_fleet::{LIVE_MS, Machine, Millis, StateKind};
use kiln_protocol::MachineId;

/// Machines that nobody approved.
pub const MAX_DISCOVERED: usize = 4096;
/// After a burst of [`MAX_DISCOVERED`], so many of them may change the store in a second: packets and reports each.
const RATE: u64 = 50;
/// That some were passed over is said at most so often.
const SAY_AGAIN_MS: Millis = 60_000;

/// A token for each change, in thousandths, so that a millisecond counts.
#[derive(Debug)]
struct Bucket {
    tokens: u64,
    at: Millis,
}

const FULL: u64 = MAX_DISCOVERED as u64 * 1000;

impl Bucket {
    fn new(now: Millis) -> Self {
        Self { tokens: FULL, at: now }
    }

    fn take(&mut self, now: Millis) -> bool {
        self.tokens = FULL.min(self.tokens.saturating_add(now.saturating_sub(self.at).saturating_mul(RATE)));
        self.at = self.at.max(now);
        let some = self.tokens >= 1000;
        self.tokens -= if some { 1000 } else { 0 };
        some
    }
}

/// What unknown machines may still change.
#[derive(Debug)]
pub(super) struct Crowd {
    packets: Bucket,
    reports: Bucket,
    passed_over: u64,
    said: Option<Millis>,
}

impl Crowd {
    pub(super) fn new(now: Millis) -> Self {
        Self { packets: Bucket::new(now), reports: Bucket::new(now), passed_over: 0, said: None }
    }
}

impl Control {
    /// Whether a packet of this machine, with this Ethernet address, may change anything.
    pub(super) fn admit_packet(
        &self,
        inner: &mut Inner,
        id: &MachineId,
        mac: &str,
        now: Millis,
        pending: &mut Pending,
    ) -> bool {
        let stranger = inner.machines.get(id).map_or_else(|| !self.is_listed(id), |machine| self.is_stranger(machine));
        if !stranger && inner.macs.owner(mac).is_some() {
            return true;
        }
        let room =
            inner.crowd.packets.take(now) && (inner.machines.contains_key(id) || self.room(inner, None, pending));
        if !room {
            inner.crowd.passed_over += 1;
            if inner.crowd.said.is_none_or(|said| now >= said + SAY_AGAIN_MS) {
                inner.crowd.said = Some(now);
                let packets = std::mem::take(&mut inner.crowd.passed_over);
                tracing::warn!(
                    "more unknown machines ask than are kept ({MAX_DISCOVERED}, then {RATE} a second): {packets} \
                     packets passed over. Who sends them? A real machine is shown as soon as its agent reports"
                );
            }
        }
        room
    }

    /// Lets the first report of a machine in.
    pub(super) fn admit_report(
        &self,
        inner: &mut Inner,
        id: &MachineId,
        now: Millis,
        pending: &mut Pending,
    ) -> Result<(), ControlError> {
        if inner.machines.contains_key(id) || self.is_listed(id) {
            return Ok(());
        }
        let room = inner.crowd.reports.take(now) && self.room(inner, Some(now), pending);
        if room { Ok(()) } else { Err(ControlError::TooManyUnknown) }
    }

    fn is_listed(&self, id: &MachineId) -> bool {
        self.config.machines.contains_key(id)
    }

    /// Neither approved nor listed: it may be made up.
    fn is_stranger(&self, machine: &Machine) -> bool {
        machine.state.kind == StateKind::Discovered && !self.is_listed(&machine.id)
    }

    /// Room for one more: the unknown machine that is silent for longest goes, of those whose agent was never heard;
    /// for one that reports (at this time) also of those whose agent fell silent.
    fn room(&self, inner: &mut Inner, reports: Option<Millis>, pending: &mut Pending) -> bool {
        let strangers = || inner.machines.values().filter(|machine| self.is_stranger(machine));
        if strangers().take(MAX_DISCOVERED).count() < MAX_DISCOVERED {
            return true;
        }
        let unheard = |m: &&Machine| m.key.is_none() && m.facts.is_none();
        let silent = |m: &&Machine| reports.is_some_and(|now| m.last_seen.saturating_add(LIVE_MS) <= now);
        let oldest = |m: &&Machine| m.last_seen;
        let out =
            strangers().filter(unheard).min_by_key(oldest).or_else(|| strangers().filter(silent).min_by_key(oldest));
        let Some(out) = out.map(|m| m.id.clone()) else { return false };
        self.forget(inner, &out, pending);
        true
    }

    /// Drops all that is known of a machine.
    pub(super) fn forget(&self, inner: &mut Inner, id: &MachineId, pending: &mut Pending) {
        inner.drop_machine(id);
        pending.commits.push(self.store.forget(id));
        pending.gone.push(id.clone());
        pending.wake |= inner.tell_classes();
    }
}

impl Inner {
    /// Drops all that memory has of a machine.
    pub(super) fn drop_machine(&mut self, id: &MachineId) {
        self.machines.remove(id);
        self.envelopes.remove(id);
        self.macs.forget(id);
        self.names.forget(id);
        self.keys.forget(id);
        self.missing.forget(id);
        self.classes.forget(id);
        self.attestations.forget(id);
        self.introductions.forget(id);
        self.seen.remove(id);
        self.comparing.drop(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_emptied_at_once_and_filled_slowly() {
        let mut bucket = Bucket::new(1_000);
        assert_eq!((0..10_000).filter(|_| bucket.take(1_000)).count(), MAX_DISCOVERED);
        assert!(!bucket.take(1_019) && bucket.take(1_020) && !bucket.take(1_020));
        assert_eq!((0..10_000).filter(|_| bucket.take(3_020)).count(), 100);
        assert!(!bucket.take(0), "a clock that goes back gives nothing");
        assert_eq!((0..10_000).filter(|_| bucket.take(u64::MAX)).count(), MAX_DISCOVERED);
    }
}
