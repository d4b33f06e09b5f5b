//! A firmware that says nothing more: what the server can tell of it by its own clock, as typed failures of its stages.
//!
//! They are the server's suspicion, not the machine's word: the state stays what it is, and whatever is heard next
//! takes them back.

use crate::boots::{Boot, StageAt};
use crate::event::Action;
use crate::grant::Limits;
use crate::machine::{Machine, words};
use crate::state::StateKind;
use crate::step::save;
use crate::{AGENT_PATIENCE, Millis, NO_AGENT, NO_DOWNLOAD, STALLED};
use kiln_protocol::{Failure, Stage, StageState};

/// A silence, and when it is one.
struct Silence {
    at: Millis,
    stage: Stage,
    kind: &'static str,
}

impl Boot {
    fn silence(&self, patience: Millis) -> Option<Silence> {
        let last = self.stages.last().filter(|_| self.is_unclaimed())?;
        let moved = self.moved.unwrap_or(last.at);
        let long = patience.saturating_mul(AGENT_PATIENCE);
        let silence = |at, stage, kind| Some(Silence { at, stage, kind });
        match (last.stage == Stage::Program, &last.state) {
            // A chain of loaders moves on without its program; one that goes in circles does not for ever.
            (false, StageState::Done) => {
                silence((moved + patience).min(last.at.saturating_add(long)), Stage::Program, NO_DOWNLOAD)
            }
            (true, StageState::Started) => silence(moved + patience, Stage::Program, STALLED),
            (true, StageState::Done) => silence(moved.saturating_add(long), Stage::Start, NO_AGENT),
            (_, StageState::Started | StageState::Failed(_) | StageState::Waiting { .. }) => None,
        }
    }

    /// Its boot program was asked for.
    pub(crate) fn downloads(&self) -> bool {
        self.stages.iter().any(|s| {
            s.stage == Stage::Program
                && match s.state {
                    StageState::Started | StageState::Done => true,
                    StageState::Failed(_) | StageState::Waiting { .. } => false,
                }
        })
    }

    /// The failure that the server saw last, if nothing came after it.
    fn suspicion(&self) -> Option<&StageAt> {
        let failed = |s: &&StageAt| match s.state {
            StageState::Failed(_) => s.agent_ms.is_none(),
            StageState::Started | StageState::Done | StageState::Waiting { .. } => false,
        };
        self.stages.last().filter(failed)
    }
}

impl Machine {
    /// When its firmware has been silent for too long.
    pub(crate) fn silent_at(&self, limits: Limits) -> Option<Millis> {
        self.silence(limits).map(|s| s.at)
    }

    fn silence(&self, limits: Limits) -> Option<Silence> {
        let boot = self.boots.back().filter(|_| self.state.kind != StateKind::Retired)?;
        boot.silence(limits.firmware_patience)
    }

    /// Says so, once.
    pub(crate) fn notice_silence(&mut self, limits: Limits, now: Millis, out: &mut Vec<Action>) {
        let Some(silence) = self.silence(limits).filter(|s| now >= s.at) else { return };
        let Some(boot) = self.boots.back_mut() else { return };
        let seconds = limits.firmware_patience / 1000;
        let message = match silence.kind {
            NO_DOWNLOAD => format!(
                "its firmware asked {} s ago and has not begun to download its boot program: did it get an address, \
                 does this server's log say why it gets no program, do UDP 69 (TFTP) and TCP 8080 (HTTP) of this \
                 server reach it?",
                now.saturating_sub(boot.started) / 1000
            ),
            STALLED => format!(
                "no more of its boot program has been taken for {seconds} s: is it switched off, are packets lost on \
                 the way (cable, switch port, MTU), does a firewall pass TFTP's data ports?"
            ),
            _ => format!(
                "it has had its boot program for {} s and no agent was heard: look at its console. Usual causes: \
                 Secure Boot refuses the program, its kernel does not start on this hardware or lacks the network \
                 card's driver, too little memory, TCP 8443 (agent API) of this server does not reach it",
                AGENT_PATIENCE * seconds
            ),
        };
        let failure = Failure { kind: silence.kind.to_owned(), message, attempt: 1, retry_in_ms: None };
        let state = StageState::Failed(failure);
        let said = words(silence.stage, &state).unwrap_or_default();
        out.push(boot.see(silence.stage, state, now));
        if self.is_on_its_way() {
            self.enter(self.state.kind, said.clone(), self.state.deadline, now);
        }
        self.last_words = said;
        save(out);
    }

    /// Something was heard of the firmware's boot: what was said of its silence is taken back.
    pub(crate) fn mend(&mut self, out: &mut Vec<Action>) {
        let Some(boot) = self.boots.back_mut() else { return };
        if boot.suspicion().is_none() {
            return;
        }
        let said = boot.stages.pop().and_then(|s| words(s.stage, &s.state)).unwrap_or_default();
        if self.last_words == said {
            self.last_words.clear();
        }
        if self.is_on_its_way() {
            self.enter(self.state.kind, self.where_it_is(), self.state.deadline, self.state.since);
        }
        save(out);
    }

    /// Bytes of the boot program, or of a loader before it, were taken.
    pub(crate) fn takes_bytes(&mut self, now: Millis, out: &mut Vec<Action>) {
        let Some(boot) = self.boots.back_mut().filter(|b| b.is_unclaimed()) else { return };
        self.last_seen = self.last_seen.max(now);
        boot.moved = Some(now);
        if boot.downloads() {
            self.mend(out);
        }
    }

    /// The server's suspicion, in words, while nothing else was heard.
    pub(crate) fn suspects(&self) -> Option<String> {
        self.boots.back().and_then(Boot::suspicion).and_then(|s| words(s.stage, &s.state))
    }

    fn is_on_its_way(&self) -> bool {
        matches!(self.state.kind, StateKind::Booting | StateKind::Reimaging)
    }
}
