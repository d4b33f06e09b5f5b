//! A machine between memory, the database, and the list that was read at the server's start.

use crate::Millis;
use crate::event::Action;
use crate::machine::Machine;
use crate::state::StateKind;
use crate::step::save;

impl Machine {
    /// What the pre-loaded list gave a machine that nobody approved, its name and the reason why it waits, goes with its line.
    pub(crate) fn not_listed(&mut self, now: Millis, out: &mut Vec<Action>) {
        if !self.has_words_of_a_list() {
            return;
        }
        self.name = None;
        let reason = Self::discovered(self.id.clone(), now).state.reason;
        out.push(Action::Say { warn: false, text: format!("kiln.toml does not list it any more: {reason}") });
        self.enter(StateKind::Discovered, reason, self.state.deadline, now);
        save(out);
    }

    /// Nobody approved it, and it has a name, or waits for another reason than that: both are a list's, as a person who names
    /// a machine approves it.
    pub fn has_words_of_a_list(&self) -> bool {
        let waits = self.state.kind == StateKind::Discovered && self.role.is_none();
        waits && (self.name.is_some() || self.state.reason != Self::discovered(self.id.clone(), 0).state.reason)
    }

    /// As it was stored, with what is never stored of it: `held` is it as it was known, and could not be stored. What the
    /// caller keeps of it (the configuration's word, its key's revocation) is the caller's to put in again. That it was heard
    /// stays: it was, and is not silent because a disk was full.
    #[must_use]
    pub fn put_back(self, held: Self) -> Self {
        let newest = |machine: &Self| machine.boots.back().map(|boot| boot.boot_id.clone());
        // By the key and in the boot that are its own still.
        let heard = self.key == held.key && newest(&self) == newest(&held);
        let Self { unsigned, heard_at, code, past, last_seen, agent_seen, reported, .. } = held;
        let last_seen = self.last_seen.max(last_seen);
        let (agent_seen, reported) = if heard {
            (self.agent_seen.max(agent_seen), self.reported.max(reported))
        } else {
            (self.agent_seen, self.reported)
        };
        Self { unsigned, heard_at, code, last_seen, agent_seen, reported, past, ..self }
    }
}
