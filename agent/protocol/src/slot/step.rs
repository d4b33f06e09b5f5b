//! The steps between slot states.

use super::{Content, Entry, EntryKind, EntryName, Go, Install, Running, SlotId, Slots, TRIES, Tries};
use crate::ids::{IdError, word_enum};
use crate::{ReleaseId, Sha256Hex, Via};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The release with this root hash runs from the slot that holds it, started in this way.
    Started(Sha256Hex, Via),
    /// A verified assignment with this sequence wants this release.
    Assign(Content, u64, Go),
    /// [`Action::Fetch`] or [`Action::Verify`] is done: the slot was read back, and its root recomputed.
    Fetched,
    /// The release is no longer wanted, or cannot be had.
    CalledOff,
    /// It may go: the machine's turn has come.
    Granted,
    /// Health checks have held for the soak time.
    Healthy,
    /// A trial that was not healthy by its deadline.
    Late,
    /// The root in this slot was read and does not verify; or it cannot be read, and a server is there that has it.
    Spoilt(SlotId),
    /// The root in this slot could not be read. It may be whole, and another time it may be read.
    Unread(SlotId),
    /// The good release in this slot was started again and again and never became healthy.
    Loops(SlotId),
    /// This is the lowest release of its image now.
    Floor(ReleaseId),
}

/// One commit, or one thing to do. Each is durable before the next begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write a UKI that was verified to `EFI/kiln`.
    PutUki(Content),
    /// Remove a UKI that no entry names.
    RemoveUki(Sha256Hex),
    /// Write a file in `loader/entries`: all of it or nothing.
    PutEntry(EntryName, Content),
    /// Give one another name of the same length: one sector.
    RenameEntry {
        /// Its name.
        from: EntryName,
        /// The one it gets.
        to: EntryName,
    },
    /// Remove one.
    RemoveEntry(EntryName),
    /// Take a slot's label away, before it is written to.
    Unlabel(SlotId),
    /// Say that this release's root lies in the slot, whole.
    Label(SlotId, Content),
    /// Write the release's root to the slot, flush, read back, recompute. Then [`Event::Fetched`].
    Fetch(SlotId, Content),
    /// The slot holds the release already: read it back and recompute its root. Then [`Event::Fetched`] or
    /// [`Event::Spoilt`].
    Verify(SlotId, Content),
    /// Leave what runs.
    Leave(Via),
    /// A release failed: tell the server.
    Tell(Fallback),
    /// What was asked for is not done.
    Refuse(Refusal),
}

word_enum! {
    /// Why a machine came back on the release before.
    FallbackReason {
        /// The loader started it as often as it may, and it never became healthy.
        TriesUsedUp = "trial-tries-used-up",
        /// Its root in the slot does not verify, or cannot be read.
        RootSpoilt = "trial-root-spoilt",
        /// It had been good, and was started again and again without becoming healthy.
        BootLoop = "good-boot-loop",
    }
}

/// A release that failed: a trial, or one that had been good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fallback {
    /// The release that is not tried again under this assignment.
    pub release: ReleaseId,
    /// The assignment's sequence; on the disk, where it stands in the loader's order.
    pub sequence: u64,
    /// Why.
    pub reason: FallbackReason,
}

/// Why a release is not installed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Below the floor.
    #[error("{release} is below the floor {floor}")]
    BelowFloor {
        /// Which.
        release: ReleaseId,
        /// The floor.
        floor: u64,
    },
    /// It failed here under this assignment or a later one.
    #[error("{release} failed on this machine (assignment {sequence}); a person clears it by assigning it anew")]
    Quarantined {
        /// Which.
        release: ReleaseId,
        /// The assignment.
        sequence: u64,
    },
    /// The only release here that firmware is known to start would be overwritten.
    #[error("what runs has not cold-booted here, and the other slot is the only one that has: a cold boot comes first")]
    ProveFirst,
    /// The loader knows a later assignment, or another release under this one.
    #[error("assignment {sequence} is not newer than what the boot loader has ({known})")]
    Stale {
        /// The assignment's.
        sequence: u64,
        /// The loader's highest.
        known: u64,
    },
    /// It is what runs.
    #[error("{0} runs already")]
    Runs(ReleaseId),
    /// Another release is on its way in.
    #[error("another release is being installed")]
    Busy,
}

impl Slots {
    /// Takes what was read from a disk, and the lowest release of each image that a floor is known of.
    pub fn new(disk: super::Disk, floors: Vec<ReleaseId>) -> Self {
        Self { disk, running: None, install: None, floors }
    }

    /// Whether a release is below the floor of its image. No other image's binds it.
    pub fn is_below(&self, release: &ReleaseId) -> bool {
        is_below(&self.floors, release)
    }

    /// One step. The state that comes back is that after all its actions.
    pub fn event(mut self, event: Event) -> (Self, Vec<Action>) {
        let mut out = Vec::new();
        match event {
            Event::Started(root_hash, via) => self.started(&root_hash, via, &mut out),
            Event::Assign(content, sequence, go) => self.assign(content, sequence, go, &mut out),
            Event::Fetched => self.fetched(&mut out),
            Event::CalledOff => self.called_off(&mut out),
            Event::Granted => self.granted(&mut out),
            Event::Healthy => self.healthy(&mut out),
            Event::Late => self.late(&mut out),
            Event::Spoilt(slot) => self.spoilt(slot, &mut out),
            Event::Unread(slot) => self.unread(slot, &mut out),
            Event::Loops(slot) => self.loops(slot, &mut out),
            Event::Floor(floor) => self.raise_floor(floor, &mut out),
        }
        (self, out)
    }

    /// Whether a slot holds a release that was healthy after a cold boot, and may still run.
    fn is_good(&self, slot: SlotId) -> bool {
        self.disk.is_good(slot) && self.disk.entries_of(slot).any(|e| !self.is_below(&e.content.release))
    }

    /// Records a commit.
    fn act(&mut self, action: Action, out: &mut Vec<Action>) {
        self.disk.apply(&action);
        out.push(action);
    }

    fn remove_entries(&mut self, which: impl Fn(&Entry) -> bool, out: &mut Vec<Action>) {
        let gone: Vec<EntryName> = self.disk.entries.iter().filter(|e| which(e)).map(|e| e.name).collect();
        for name in gone {
            self.act(Action::RemoveEntry(name), out);
        }
    }

    /// Removes UKIs that no entry names but those that only remember a failure.
    fn sweep(&mut self, out: &mut Vec<Action>) {
        let named = |uki: &Sha256Hex| self.disk.entries.iter().any(|e| e.content.uki == *uki && !e.name.has_failed());
        let gone: Vec<Sha256Hex> = self.disk.ukis.iter().filter(|uki| !named(uki)).cloned().collect();
        for uki in gone {
            self.act(Action::RemoveUki(uki), out);
        }
    }

    fn started(&mut self, root_hash: &Sha256Hex, via: Via, out: &mut Vec<Action>) {
        self.running = self.disk.slot_of(root_hash).map(|slot| Running { slot, via, healthy: false });
        let used_up = |e: &&Entry| matches!(e.name.kind, EntryKind::Trial(Tries { left: 0, .. }));
        let here = |e: &&Entry| e.content.root_hash == *root_hash;
        // The last of its starts counts as well: what was started is on trial, not failed.
        let listed = |e: &&Entry| matches!(e.name.kind, EntryKind::Trial(_) | EntryKind::Good);
        let newest = self.disk.entries.iter().filter(here).filter(listed).map(|e| e.name.sequence).max();
        let failed: Vec<Entry> = self.disk.entries.iter().filter(used_up).cloned().collect();
        for entry in failed {
            let runs = entry.content.root_hash == *root_hash && newest == Some(entry.name.sequence);
            let others_good = self.disk.entries.iter().any(|e| e.name.kind == EntryKind::Good && here(&e));
            if !runs || others_good {
                self.fail(&entry, FallbackReason::TriesUsedUp, out);
            }
        }
    }

    /// A release's entry becomes a memory, the only one of its kind, and the server is told.
    fn fail(&mut self, entry: &Entry, reason: FallbackReason, out: &mut Vec<Action>) {
        let sequence = entry.name.sequence;
        let memory = EntryName { sequence, kind: EntryKind::Failed(reason) };
        self.act(Action::PutEntry(memory, entry.content.clone()), out);
        self.act(Action::RemoveEntry(entry.name), out);
        self.remove_entries(|e| e.name.has_failed() && e.name != memory, out);
        self.sweep(out);
        out.push(Action::Tell(Fallback { release: entry.content.release.clone(), sequence, reason }));
    }

    fn assign(&mut self, content: Content, sequence: u64, go: Go, out: &mut Vec<Action>) {
        let slot = match self.target(&content, sequence, go) {
            Ok(slot) => slot,
            Err(refusal) => return out.push(Action::Refuse(refusal)),
        };
        let go = self.proven(go);
        // What was allowed or preferred before, for either slot, is not wanted any more.
        let running = self.running.as_ref().map(|running| self.disk.labels[running.slot.index()]);
        let keep = |e: &Entry| running == Some(Some(super::Label::of(&e.content.root_hash)));
        self.remove_entries(|e| matches!(e.name.kind, EntryKind::Next(_)), out);
        self.remove_entries(|e| matches!(e.name.kind, EntryKind::Trial(_)) && !keep(e), out);
        let install = Install { slot, content: content.clone(), sequence, go, ready: false };
        if self.disk.slot_of(&content.root_hash) == Some(slot) {
            self.sweep(out);
            self.install = Some(install);
            out.push(Action::Verify(slot, content));
            return;
        }
        let label = self.disk.labels[slot.index()];
        let old = |e: &Entry| label == Some(super::Label::of(&e.content.root_hash)) && !e.name.has_failed();
        self.remove_entries(old, out);
        self.sweep(out);
        if label.is_some() {
            self.act(Action::Unlabel(slot), out);
        }
        out.push(Action::Fetch(slot, content));
        self.install = Some(install);
    }

    /// Two kernels in a row that no firmware has started are never stacked: a kexec begins at what is good.
    fn proven(&self, go: Go) -> Go {
        let from_good = self.running.as_ref().is_some_and(|running| self.is_good(running.slot));
        if go == Go::Leave(Via::Kexec) && !from_good { Go::Leave(Via::Cold) } else { go }
    }

    /// Which slot a release goes to: the one that holds it already, else one that may be overwritten.
    fn target(&self, content: &Content, sequence: u64, go: Go) -> Result<SlotId, Refusal> {
        let release = content.release.clone();
        if self.install.is_some() {
            return Err(Refusal::Busy);
        }
        let binds = |floor: &&ReleaseId| floor.image == release.image && release.release < floor.release;
        if let Some(floor) = self.floors.iter().find(binds) {
            return Err(Refusal::BelowFloor { release, floor: floor.release });
        }
        // What the firmware has just started over the network was chosen again by the server, whatever failed before.
        if let Some(failed) =
            self.disk.failed_sequence().filter(|failed| sequence <= *failed && !matches!(go, Go::Here(_)))
        {
            return Err(Refusal::Quarantined { release, sequence: failed });
        }
        let newer = |e: &&Entry| {
            let EntryName { sequence: known, .. } = e.name;
            known > sequence || (known == sequence && e.content != *content)
        };
        // What the loader has started and whose root is gone comes back under the entry that it has.
        let comes_back = matches!(go, Go::Here(_))
            && self
                .disk
                .listed(&content.root_hash)
                .is_some_and(|e| e.name.sequence == sequence && e.content == *content);
        if let Some(entry) =
            self.disk.entries.iter().filter(newer).filter(|_| !comes_back).max_by_key(|e| e.name.sequence)
        {
            return Err(Refusal::Stale { sequence, known: entry.name.sequence });
        }
        let holds = self.disk.slot_of(&content.root_hash);
        let Some(running) = &self.running else {
            let [a, b] = SlotId::BOTH.map(|slot| self.is_good(slot));
            let good = |e: &&Entry| e.name.kind == EntryKind::Good;
            let newest = |slot| self.disk.entries_of(slot).filter(good).map(|e| e.name.sequence).max();
            let empty = SlotId::BOTH.into_iter().find(|slot| self.disk.labels[slot.index()].is_none());
            return Ok(holds.or(empty).unwrap_or(match (a, b) {
                (false, true) => SlotId::A,
                (true, true) | (false, false) if newest(SlotId::A) <= newest(SlotId::B) => SlotId::A,
                (true, true | false) | (false, false) => SlotId::B,
            }));
        };
        if holds == Some(running.slot) {
            return Err(Refusal::Runs(release));
        }
        let slot = running.slot.other();
        if holds.is_none() && self.is_good(slot) && !self.is_good(running.slot) {
            return Err(Refusal::ProveFirst);
        }
        Ok(slot)
    }

    fn fetched(&mut self, out: &mut Vec<Action>) {
        if let Some(install) = self.install.clone().filter(|install| !install.ready) {
            if self.disk.slot_of(&install.content.root_hash) != Some(install.slot) {
                self.act(Action::Label(install.slot, install.content), out);
            }
            self.allow(out);
        }
    }

    fn allow(&mut self, out: &mut Vec<Action>) {
        let Some(install) = &mut self.install else { return };
        install.ready = true;
        let Install { content, sequence, .. } = install.clone();
        if !self.disk.ukis.contains(&content.uki) {
            self.act(Action::PutUki(content.clone()), out);
        }
        let name = EntryName { sequence, kind: EntryKind::Next(TRIES) };
        self.act(Action::PutEntry(name, content), out);
    }

    /// The root, if it is whole, stays: it may be wanted again.
    fn called_off(&mut self, out: &mut Vec<Action>) {
        if self.install.take().is_some() {
            self.remove_entries(|e| matches!(e.name.kind, EntryKind::Next(_)), out);
            self.sweep(out);
        }
    }

    fn granted(&mut self, out: &mut Vec<Action>) {
        if !self.install.as_ref().is_some_and(|install| install.ready) {
            return;
        }
        let Some(Install { slot, sequence, go, .. }) = self.install.take() else { return };
        let from = EntryName { sequence, kind: EntryKind::Next(TRIES) };
        let to = EntryName { sequence, kind: EntryKind::Trial(Tries { left: TRIES, done: 0 }) };
        self.act(Action::RenameEntry { from, to }, out);
        // What was good when it was assigned may be below the floor by now.
        match self.proven(go) {
            Go::Here(via) => self.running = Some(Running { slot, via, healthy: false }),
            Go::Leave(via) => out.push(Action::Leave(via)),
        }
    }

    fn healthy(&mut self, out: &mut Vec<Action>) {
        let Some(running) = &mut self.running else { return };
        running.healthy = true;
        let Running { slot, via, .. } = running.clone();
        let trials: Vec<Entry> =
            self.disk.entries_of(slot).filter(|e| matches!(e.name.kind, EntryKind::Trial(_))).cloned().collect();
        // What a kexec started keeps its counter until firmware has started it too.
        let Some(newest) = trials.iter().max_by_key(|e| e.name.sequence).filter(|_| via == Via::Cold).cloned() else {
            return;
        };
        let good = EntryName { sequence: newest.name.sequence, kind: EntryKind::Good };
        self.act(Action::PutEntry(good, newest.content.clone()), out);
        let old = |e: &Entry| {
            let counted = matches!(e.name.kind, EntryKind::Trial(_) | EntryKind::Good);
            e.content.root_hash == newest.content.root_hash && counted && e.name != good
        };
        self.remove_entries(old, out);
    }

    fn late(&mut self, out: &mut Vec<Action>) {
        let Some(Running { slot, healthy: false, .. }) = self.running else { return };
        let on_trial = self.disk.entries_of(slot).any(|e| matches!(e.name.kind, EntryKind::Trial(_)));
        if on_trial && self.is_good(slot.other()) {
            out.push(Action::Leave(Via::Cold));
        }
    }

    /// With a good release to go back to, its entries go first; without one they stay for the root that is fetched
    /// anew.
    fn spoilt(&mut self, slot: SlotId, out: &mut Vec<Action>) {
        if self.install.as_ref().is_some_and(|install| install.slot == slot) {
            self.install = None;
        }
        let entries: Vec<Entry> = self.disk.entries_of(slot).filter(|e| !e.name.has_failed()).cloned().collect();
        if self.is_good(slot.other()) {
            for entry in entries {
                match entry.name.kind {
                    EntryKind::Trial(_) => self.fail(&entry, FallbackReason::RootSpoilt, out),
                    EntryKind::Next(_) | EntryKind::Good | EntryKind::Failed(_) => {
                        self.act(Action::RemoveEntry(entry.name), out);
                    }
                }
            }
            self.sweep(out);
        }
        if self.disk.labels[slot.index()].is_some() {
            self.act(Action::Unlabel(slot), out);
        }
        self.running = self.running.take().filter(|running| running.slot != slot);
    }

    /// A trial is left for a release that is good, as one that is spoilt. What is good stays as it is: it may be all there is, and its
    /// starts are counted.
    fn unread(&mut self, slot: SlotId, out: &mut Vec<Action>) {
        if !self.disk.is_good(slot) && self.is_good(slot.other()) {
            return self.spoilt(slot, out);
        }
        self.install = self.install.take().filter(|install| install.slot != slot);
        self.running = self.running.take().filter(|running| running.slot != slot);
    }

    /// With another good release to start its entries go, the newest into a memory; its root is whole, and stays. Without
    /// one it is better than nothing.
    fn loops(&mut self, slot: SlotId, out: &mut Vec<Action>) {
        if !self.is_good(slot) || !self.is_good(slot.other()) {
            return;
        }
        let mut listed: Vec<Entry> = self.disk.entries_of(slot).filter(|e| e.name.is_listed()).cloned().collect();
        listed.sort();
        let newest = listed.pop();
        self.remove_entries(|e| listed.iter().any(|old| old.name == e.name), out);
        if let Some(newest) = newest {
            self.fail(&newest, FallbackReason::BootLoop, out);
        }
    }

    /// Entries below the floor of their image go, if a good one stays that is not.
    fn raise_floor(&mut self, floor: ReleaseId, out: &mut Vec<Action>) {
        match self.floors.iter_mut().find(|known| known.image == floor.image) {
            Some(known) => known.release = known.release.max(floor.release),
            None => self.floors.push(floor),
        }
        let floors = self.floors.clone();
        let below = |e: &Entry| is_below(&floors, &e.content.release);
        if self.disk.entries.iter().any(|e| e.name.kind == EntryKind::Good && !below(e)) {
            self.install = self.install.take().filter(|install| !is_below(&floors, &install.content.release));
            self.remove_entries(below, out);
            self.sweep(out);
        }
    }
}

fn is_below(floors: &[ReleaseId], release: &ReleaseId) -> bool {
    floors.iter().any(|floor| floor.image == release.image && release.release < floor.release)
}
