//! A good release whose kernel dies before its agent speaks. Only the network's side sees such a start: a DISCOVER, the boot
//! program sent whole, and then the next DISCOVER without a word of the agent. Any word ends the count.
//!
//! Packets are nobody's proof, so they change only what the firmware is given. The way back becomes the machine's
//! assignment, and the pair is quarantined, when its agent reports from there, with its key. The firmware is always given
//! something: one that gets no answer may go to its setup and stay there.

use crate::event::Action;
use crate::held::HeldBoot;
use crate::machine::{Machine, words};
use crate::state::StateKind;
use crate::step::{save, wake};
use crate::{BOOT_LOOP, Millis};
use kiln_protocol::{Failure, ReleaseId, Stage, StageState};

/// So many starts in a row without a word of the agent are a boot loop.
pub const MUTE_STARTS: u32 = 5;
/// First pause of a client that can be told to wait, in seconds; each further start doubles it.
const FIRST_PAUSE_S: u64 = 5;
/// And the longest: shorter than what is taken for the firmware's silence ([`crate::FIRMWARE_PATIENCE_MS`]).
pub const LONGEST_PAUSE_S: u64 = 40;

impl Machine {
    /// A good release is assigned, by no operator's order. A trial's boots are counted otherwise.
    fn counts_mute(&self) -> bool {
        let in_service = self.state.kind.in_fleet() && self.state.kind != StateKind::Quarantined;
        in_service && !self.is_trial() && self.assigned.as_ref().is_some_and(|a| a.order.is_none())
    }

    /// A start of this release is one that is counted: it is what is assigned, or what is given in its place.
    pub(crate) fn is_good_start(&self, release: &ReleaseId) -> bool {
        let assigned = self.assigned.as_ref().map(|a| &a.release);
        self.counts_mute() && (assigned == Some(release) || self.way_back() == Some(release))
    }

    /// A boot that no agent spoke in has ended, as its firmware asks anew; `loaded`: with its whole boot program.
    pub(crate) fn count_mute(&mut self, loaded: bool, now: Millis, out: &mut Vec<Action>) {
        let fetched = std::mem::take(&mut self.boot_loop.fetches);
        if !(loaded && fetched && self.counts_mute()) {
            return;
        }
        self.boot_loop.mute = self.boot_loop.mute.saturating_add(1);
        save(out);
        let Some(message) = self.mute_loop() else { return };
        let attempt = self.boot_loop.mute;
        let failure = Failure { kind: BOOT_LOOP.to_owned(), message, attempt, retry_in_ms: None };
        let state = StageState::Failed(failure);
        self.last_words = words(Stage::Start, &state).unwrap_or_default();
        // It stands before the stages of the boot that begins: it tells of those before it.
        if let Some(boot) = self.boots.back_mut() {
            out.push(boot.see(Stage::Start, state, now));
        }
    }

    /// Such starts in a row, with those that the next DISCOVER will count, and those that are kept ([`crate::held`]).
    fn mute_if_believed(&self) -> u32 {
        if !self.counts_mute() {
            return 0;
        }
        let goes_on = self.boots.back().is_some_and(|boot| boot.is_unclaimed() && boot.is_loaded());
        let whole = |held: &&HeldBoot| match (&held.downloads, held.downloaded) {
            (Some((_, release)), Some(_)) => !held.superseded && self.is_good_start(release),
            (None, _) | (_, None) => false,
        };
        let kept = u32::try_from(self.held_packets.iter().filter(whole).count()).unwrap_or(u32::MAX);
        let goes_on = u32::from(goes_on && self.boot_loop.fetches);
        self.boot_loop.mute.saturating_add(goes_on).saturating_add(kept)
    }

    /// What its firmware is given in place of what is assigned: the last-known-good release, and if that is as mute, both in
    /// turn.
    pub(crate) fn in_its_place(&self) -> Option<&ReleaseId> {
        let turned = (self.mute_if_believed() / MUTE_STARTS) % 2 == 1;
        self.way_back().filter(|_| turned)
    }

    /// That it is in such a loop, and what is done about it.
    pub(crate) fn mute_loop(&self) -> Option<String> {
        let mute = self.boot_loop.mute;
        if mute < MUTE_STARTS || !self.counts_mute() {
            return None;
        }
        let (release, title) = (&self.assigned.as_ref()?.release, self.title());
        let act = format!("look at its console, or give it another with `kiln assign {title} NAME/N`");
        Some(match self.way_back() {
            Some(back) if mute < 2 * MUTE_STARTS => format!(
                "boot loop: {release} was started {MUTE_STARTS} times in a row and its agent never spoke: its firmware is \
                 given {back}, which was good here"
            ),
            Some(back) => format!(
                "boot loop: {mute} starts in a row in which no agent spoke, of {release} and {back} in turn: {act}"
            ),
            None => format!(
                "boot loop: {release} was started {mute} times in a row and its agent never spoke, and no other release \
                 is known to be good here: its firmware is given it again; {act}"
            ),
        })
    }

    /// How long a client that can be told so waits before it starts what it is given, in seconds, and why: no other release
    /// is left to try.
    pub fn pause_s(&self) -> Option<(u64, String)> {
        let least = if self.way_back().is_some() { 2 * MUTE_STARTS } else { MUTE_STARTS };
        let more = self.boot_loop.mute.checked_sub(least)?;
        let seconds = FIRST_PAUSE_S.saturating_mul(1 << more.min(8)).min(LONGEST_PAUSE_S);
        Some((seconds, self.mute_loop()?))
    }

    /// A new boot's agent speaks. If it is that of the release that was given in place of the assigned one, that is where
    /// the machine is now.
    pub(crate) fn end_mute(&mut self, came_up: &ReleaseId, now: Millis, out: &mut Vec<Action>) {
        let looped = self.boot_loop.mute >= MUTE_STARTS && self.counts_mute();
        let is_back = looped && self.way_back() == Some(came_up);
        self.forget_mute();
        if is_back {
            self.last_words.clear(); // of the loop itself
            let failed = format!("was started {MUTE_STARTS} times in a row and its agent never spoke");
            self.fall_back(&failed, now, out);
            wake(out);
            save(out);
        }
    }

    /// Its agent was heard.
    pub(crate) fn forget_mute(&mut self) {
        (self.boot_loop.mute, self.boot_loop.fetches) = (0, false);
    }
}
