//! Putting a machine up anew: the same release under a new sequence, by cold boot. For its age ([`crate::age`]) or for
//! its drift ([`crate::drift`]); the grant lets so many go as it lets any.

use crate::Millis;
use crate::boots::Boot;
use crate::event::Action;
use crate::machine::Machine;
use crate::step::{save, wake};
use kiln_protocol::Via;

/// Of machines stored by a server that knew no other reason.
pub(crate) fn age() -> String {
    "its age".to_owned()
}

impl Machine {
    /// It runs what it should, by no operator's order, and nothing else is under way.
    pub(crate) fn is_settled(&self) -> bool {
        self.runs_assigned() && self.assigned.as_ref().is_some_and(|a| a.order.is_none())
    }

    /// Assigns what it runs once more, to be put up anew. `why` goes behind "for".
    pub(crate) fn put_up_anew(&mut self, why: String, text: &str, now: Millis, out: &mut Vec<Action>) {
        let boot = self.boots.iter().rev().find(|boot| !boot.is_unclaimed()).map(|boot: &Boot| boot.boot_id.clone());
        let (Some(assigned), Some(boot)) = (&mut self.assigned, boot) else { return };
        assigned.sequence += 1;
        assigned.rebuild = assigned.sequence;
        // Always: a kexec would carry what has run too long, or drifted, over, and firmware is to start it again now and then.
        (assigned.via, assigned.auto) = (Via::Cold, false);
        let text = format!("{text}: it is put up anew with {}", assigned.release);
        self.rebuilding = Some(boot);
        self.rebuild_for = why;
        self.granted = None;
        self.prefetch = None;
        out.push(Action::Say { warn: false, text });
        out.push(Action::Sign);
        wake(out);
        save(out);
        self.settle(false, now);
    }
}
