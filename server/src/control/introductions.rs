//! Introductions of machines that nobody approved: the short code that a person compares, and how often it may be tried.

use super::views::words_of;
use super::{Control, Inner, Pending, now_ms};
use crate::error::{CodeError, ControlError};
use kiln_fleet::{Millis, StateKind};
use kiln_protocol::{About, ApprovalCode, Committed, Introduction, IntroductionReply, KeyId, MachineId, Nonce};
use kiln_release::hex;
use ring::rand::{SecureRandom, SystemRandom};
use std::collections::BTreeMap;

/// A machine may introduce itself so often: each time is one try in 2^40 for whoever stands between.
const PAUSE_MS: Millis = 2_000;
/// Wrong codes that a person may type, and the time after which they are forgotten.
const WRONG: u32 = 5;
const FORGIVE_MS: Millis = 10 * 60_000;

/// What is under way, of machines that are known and not approved.
#[derive(Debug, Default)]
pub(crate) struct Introductions {
    machines: BTreeMap<MachineId, Known>,
}

impl Introductions {
    /// A machine was forgotten.
    pub(super) fn forget(&mut self, id: &MachineId) {
        self.machines.remove(id);
    }
}

#[derive(Debug)]
struct Known {
    committed: Option<Committed>,
    at: Millis,
}

/// Wrong codes typed for one machine.
#[derive(Debug, Default)]
pub(crate) struct Wrong(BTreeMap<MachineId, (u32, Millis)>);

fn nonce() -> Result<Nonce, CodeError> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).map_err(|_| CodeError::Random)?;
    Ok(hex::encode(&bytes).parse().expect("32 bytes are 64 hex digits"))
}

impl Control {
    /// One step of a machine that has proved this key. Nothing is stored: a server that starts again asks for another
    /// introduction.
    pub fn introduce(&self, key: &KeyId, step: &Introduction) -> Result<IntroductionReply, ControlError> {
        let mut pending = Pending::default();
        let reply = self.introduction(key, step, now_ms(), &mut pending);
        self.tell(pending);
        reply
    }

    fn introduction(
        &self,
        key: &KeyId,
        step: &Introduction,
        now: Millis,
        pending: &mut Pending,
    ) -> Result<IntroductionReply, ControlError> {
        let (Introduction::Commit { machine: id, .. } | Introduction::Reveal { machine: id, .. }) = step;
        let mut inner = self.lock();
        let inner = &mut *inner;
        let mine = |inner: &Inner| inner.machines.get(id).is_some_and(|m| m.key.as_ref() == Some(key));
        if !mine(inner) {
            return Err(CodeError::NotReported.into());
        }
        match step {
            Introduction::Commit { commitment, .. } => {
                let known = &mut inner.introductions.machines;
                if known.get(id).is_some_and(|known| now < known.at.saturating_add(PAUSE_MS)) {
                    return Err(CodeError::TooOften.into());
                }
                let nonce = nonce()?;
                let committed =
                    Some(Committed { key: key.clone(), commitment: commitment.clone(), nonce: nonce.clone() });
                known.insert(id.clone(), Known { committed, at: now });
                Ok(IntroductionReply { nonce })
            }
            Introduction::Reveal { nonce, .. } => {
                let known = inner.introductions.machines.get_mut(id).ok_or(CodeError::NotCommitted)?;
                // Each commitment is good for one try.
                let committed = known.committed.take().ok_or(CodeError::NotCommitted)?;
                let code = committed.revealed(key, nonce, &self.server_key);
                let Some(machine) = inner.machines.get_mut(id) else { return Err(CodeError::NotReported.into()) };
                machine.code = None;
                let code = code.map_err(CodeError::Introduction)?;
                tracing::info!(machine = machine.title(), "its approval code is {code}");
                machine.code = Some((key.clone(), code));
                pending.touched.push(id.clone());
                Ok(IntroductionReply { nonce: committed.nonce })
            }
        }
    }

    /// What the screen of the machine with this key shows, but for its page.
    pub(crate) fn about(&self, id: &MachineId, key: &KeyId) -> Option<About> {
        let inner = self.lock();
        let machine = inner.machines.get(id).filter(|m| m.key.as_ref() == Some(key))?;
        let waits = machine.state.kind == StateKind::Discovered;
        Some(About {
            name: machine.title().to_owned(),
            page: None,
            approved: !waits,
            introduce: waits && machine.code.as_ref().is_none_or(|(of, _)| of != key),
            protection: words_of(machine),
        })
    }
}

impl Inner {
    /// Compares what a person read from the machine's screen. `Ok`: it is the code of the key that is about to be approved.
    pub(crate) fn check_code(&mut self, id: &MachineId, typed: &str, now: Millis) -> Result<(), CodeError> {
        let Some(machine) = self.machines.get(id) else { return Err(CodeError::NotReported) };
        let title = machine.title().to_owned();
        let typed: ApprovalCode = typed.parse().map_err(CodeError::Form)?;
        self.wrong.0.retain(|_, (_, since)| now < since.saturating_add(FORGIVE_MS));
        if let Some((WRONG.., since)) = self.wrong.0.get(id) {
            let minutes = (since.saturating_add(FORGIVE_MS).saturating_sub(now)).div_ceil(60_000);
            return Err(CodeError::TooManyWrong { machine: title, minutes });
        }
        let code = machine.code.as_ref().filter(|(of, _)| machine.key.as_ref() == Some(of)).map(|(_, code)| code);
        match code {
            None => Err(CodeError::None { machine: title }),
            Some(code) if *code == typed => {
                self.wrong.0.remove(id);
                Ok(())
            }
            Some(_) => {
                let (count, _) = self.wrong.0.entry(id.clone()).or_insert((0, now));
                *count += 1;
                let left = WRONG.saturating_sub(*count);
                tracing::warn!(machine = title, "a wrong approval code was typed; {left} tries left");
                Err(CodeError::Wrong { machine: title, left })
            }
        }
    }
}
