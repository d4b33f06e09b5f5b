//! The age of a whole machine: how long ago it was put up, and when it is put up anew. A role's `max_age` is the most; each
//! machine's turn comes in the last quarter before it, by its id, so that machines that were racked on one day are not
//! rebuilt on one day.

use crate::Millis;
use crate::event::Action;
use crate::machine::Machine;
use crate::rebuild;
use crate::state::StateKind;

impl Machine {
    /// When what runs was put up: the beginning of its boot; in disk mode, when its disk was last verified whole.
    pub fn put_up(&self) -> Option<Millis> {
        if let Some((_, since)) = self.condition.put_up {
            return Some(since);
        }
        self.boots.iter().rev().find(|boot| !boot.is_unclaimed()).map(|boot| boot.started)
    }

    /// When it is to be rebuilt, if its role has an age and it runs what it should.
    pub fn rebuild_due(&self) -> Option<Millis> {
        let (max_age, since) = (self.max_age?, self.put_up()?);
        let settled = self.state.kind == StateKind::Healthy && self.is_settled();
        settled.then(|| since + max_age - share(self.id.as_str(), max_age / 4))
    }

    pub(crate) fn rebuild_if_due(&mut self, now: Millis, out: &mut Vec<Action>) {
        if self.rebuild_due().is_some_and(|due| now >= due) {
            self.put_up_anew(rebuild::age(), "is older than its role allows", now, out);
        }
    }
}

/// This machine's share of a span, the same each time and evenly spread over machines (FNV-1a, 64 bit).
fn share(id: &str, span: Millis) -> Millis {
    let hash =
        id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    // Ids that differ in their last digit differ in the low bits most.
    let mixed = (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = mixed ^ (mixed >> 32);
    u64::try_from((u128::from(mixed) * u128::from(span)) >> 64).unwrap_or(0)
}
