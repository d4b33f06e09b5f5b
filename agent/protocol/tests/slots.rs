//! Every event in every state that a machine's disk can reach, with a power cut before, after and in the middle of
//! every commit, and systemd-boot's part played by its rules (UAPI.1, docs/AUTOMATIC_BOOT_ASSESSMENT.md): a machine
//! that ever had a good release always comes up on a good one again, by itself and without a network.

#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)] // a test; its steps read better as values

#[path = "slots/steps.rs"]
mod steps;

use kiln_protocol::slot::{
    Action, Content, Disk, EntryKind, EntryName, Event, Go, Label, SlotId, SlotState, Slots, TRIES, Tries,
};
use kiln_protocol::{ReleaseId, Via};
use std::collections::{BTreeSet, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::AssertUnwindSafe;
use std::rc::Rc;

/// Of an image of its own, whose numbers say nothing of the other's.
const OTHER: u64 = 6;

/// The floor of the first image.
fn floor(release: u64) -> ReleaseId {
    format!("minimal/{release}").parse().unwrap()
}

fn content(release: u64) -> Content {
    Content {
        release: if release == OTHER { "other/1".parse().unwrap() } else { floor(release) },
        root_hash: format!("{release:064x}").replacen('0', &format!("{release:x}"), 16).parse().unwrap(),
        uki: format!("{:064x}", 0xa0 + release).parse().unwrap(),
    }
}

/// 1, 2, 5 and [`OTHER`] are fine, 3 never gets healthy, 4 runs well after a kexec and no firmware starts it.
const RELEASES: [u64; 6] = [1, 2, 3, 4, 5, OTHER];

fn starts_cold(release: u64) -> bool {
    release != 4
}

fn gets_healthy(release: u64) -> bool {
    release != 3
}

fn release_of(label: Label) -> u64 {
    RELEASES.into_iter().find(|r| Label::of(&content(*r).root_hash) == label).unwrap()
}

fn number(content: &Content) -> u64 {
    release_of(Label::of(&content.root_hash))
}

/// A machine, on or off.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct World {
    disk: Disk,
    /// What really lies in the slots; none: half-written, or rotten.
    data: [Option<u64>; 2],
    /// The agent's state while it is on.
    on: Option<Slots>,
    /// Of the first image, where no EFI variable could be lost: survives everything.
    floor: u64,
    /// It was healthy once after a cold boot.
    had_good: bool,
    /// What it may be assigned.
    releases: [u64; 3],
    /// The last assignment there is.
    assignments: u64,
    /// So many roots may rot yet.
    rots: u8,
}

impl World {
    fn off(&self) -> Self {
        let mut off = Self { on: None, ..self.clone() };
        // What lies in a slot without a label is never looked at.
        for slot in SlotId::BOTH {
            off.data[slot.index()] = off.data[slot.index()].filter(|_| off.disk.labels[slot.index()].is_some());
        }
        off
    }

    /// Not below the floor of its image.
    fn may_run(&self, release: u64) -> bool {
        release == OTHER || release >= self.floor
    }

    /// As a start reads it.
    fn slots(&self) -> Slots {
        Slots::new(self.disk.clone(), vec![floor(self.floor)])
    }

    /// The data of a slot's label is there, whole.
    fn holds(&self, release: u64) -> bool {
        let slot = self.disk.slot_of(&content(release).root_hash);
        slot.is_some_and(|slot| self.data[slot.index()] == Some(release))
    }

    /// A good release lies in it, whole, and may still run.
    fn good_and_whole(&self, slot: SlotId) -> bool {
        let release = self.disk.labels[slot.index()].map(release_of);
        self.disk.is_good(slot) && self.data[slot.index()] == release && release.is_some_and(|r| self.may_run(r))
    }

    /// Nothing else here is good, and it may still run.
    fn is_only_good(&self, slot: SlotId) -> bool {
        let release = self.disk.labels[slot.index()].map(release_of);
        self.disk.is_good(slot) && release.is_some_and(|r| self.may_run(r)) && !self.disk.is_good(slot.other())
    }

    /// A good root has rotted, and nothing has read it since. What overwrites the other good one then leaves the machine
    /// with a rotten one alone, and that needs the network.
    fn rots_unseen(&self) -> bool {
        let label = |slot: SlotId| self.disk.labels[slot.index()].map(release_of);
        SlotId::BOTH.into_iter().any(|slot| self.disk.is_good(slot) && self.data[slot.index()] != label(slot))
    }

    /// What systemd-boot may start next, and the disk after it has counted. More than one where its order leaves it
    /// open.
    fn loader(&self) -> Vec<(u64, Self)> {
        let candidates = self.disk.entries.iter().filter(|e| {
            // An entry whose EFI file does not exist is not listed.
            matches!(e.name.kind, EntryKind::Good | EntryKind::Trial(_)) && self.disk.ukis.contains(&e.content.uki)
        });
        // No tries left: behind all others. Then the highest version.
        let key = |name: EntryName| (!matches!(name.kind, EntryKind::Trial(Tries { left: 0, .. })), name.sequence);
        let Some(best) = candidates.clone().map(|e| key(e.name)).max() else { return Vec::new() };
        let started = candidates.filter(|e| key(e.name) == best).map(|entry| {
            let mut after = self.off();
            if let EntryKind::Trial(Tries { left, done }) = entry.name.kind
                && left > 0
            {
                let kind = EntryKind::Trial(Tries { left: left - 1, done: done + 1 });
                let to = EntryName { kind, ..entry.name };
                after.disk.apply(&Action::RenameEntry { from: entry.name, to });
            }
            (number(&entry.content), after)
        });
        started.collect()
    }

    /// Power on, again and again, with the network dead: it must come up on a fine release at or above the floor.
    fn comes_back(&self) -> bool {
        let mut worlds = vec![self.off()];
        for _ in 0..4 * TRIES {
            let mut next = Vec::new();
            for world in &worlds {
                let choices = world.loader();
                if choices.is_empty() {
                    return false;
                }
                for (release, after) in choices {
                    let starts = starts_cold(release) && self.may_run(release);
                    if starts && gets_healthy(release) && world.holds(release) {
                        continue;
                    }
                    let noticed = after.after_rot(release).filter(|_| starts);
                    // Of a trial the loader's count does, also where only what is read later is rotten. A good release that does
                    // not come up is read back.
                    if noticed.is_none() || after != *world {
                        next.push(after);
                    }
                    next.extend(noticed);
                }
            }
            if next.is_empty() {
                return true;
            }
            next.sort();
            next.dedup();
            worlds = next;
        }
        false
    }

    /// What the agent in the initramfs makes of a rotten root, if this release's is.
    fn after_rot(&self, release: u64) -> Option<Self> {
        let mut cuts = Vec::new();
        let slot = self.disk.slot_of(&content(release).root_hash).filter(|_| !self.holds(release))?;
        self.finds_rot(release, slot, &mut cuts);
        cuts.pop()
    }

    /// The release was started, and its root does not verify: the boot ends with that. The last of `out` is what it left.
    fn finds_rot(&self, release: u64, slot: SlotId, out: &mut Vec<Self>) {
        let mut world = self.clone();
        for event in [Event::Started(content(release).root_hash, Via::Cold), Event::Spoilt(slot)] {
            let slots = world.on.clone().unwrap_or_else(|| self.slots());
            let (after, actions) = slots.event(event);
            world = world.perform(after, &actions, out);
        }
        out.push(world.off());
    }

    /// The release was started, and its root cannot be read in this boot, whatever lies there.
    fn cannot_read(&self, release: u64, out: &mut Vec<Self>) {
        let content = content(release);
        let Some(slot) = self.disk.slot_of(&content.root_hash) else { return };
        let mut world = self.clone();
        for event in [Event::Started(content.root_hash.clone(), Via::Cold), Event::Unread(slot)] {
            let slots = world.on.clone().unwrap_or_else(|| self.slots());
            let (after, actions) = slots.event(event);
            world = world.perform(after, &actions, out);
        }
        let good = self.disk.is_good(slot);
        assert!(!good || world.disk.labels == self.disk.labels, "what is good and cannot be read may be whole");
        out.push(world.off());
    }

    /// The only good root has rotted, and a start finds it: the network is needed, and it is enough.
    fn is_mended(&self, slot: SlotId) {
        let content = content(release_of(self.disk.labels[slot.index()].expect("what is good has its label")));
        let found = self.slots();
        let (found, _) = found.event(Event::Started(content.root_hash.clone(), Via::Cold));
        let (found, _) = found.event(Event::Spoilt(slot));
        assert_eq!(found.disk.slot_of(&content.root_hash), None, "it is never mounted again");
        let known = found.disk.listed(&content.root_hash).expect("its entry stays").name.sequence;
        let mut slots = Slots::new(found.disk, found.floors);
        let assign = Event::Assign(content.clone(), known, Go::Here(Via::Cold));
        for event in [assign, Event::Fetched, Event::Granted, Event::Healthy] {
            let (after, actions) = slots.event(event);
            assert!(!matches!(actions[..], [Action::Refuse(_)]), "{actions:?}: {}", line(self));
            slots = after;
        }
        let slot = slots.disk.slot_of(&content.root_hash).expect("it was fetched");
        assert!(slots.disk.is_good(slot), "{}", line(self));
    }

    /// It was started for the last time of too many, and no server answers. The other good root is read back first.
    fn loops(&self, release: u64, out: &mut Vec<Self>) {
        let slot = self.disk.slot_of(&content(release).root_hash).expect("it was started from its slot");
        let slots = self.slots();
        let rotten = self.disk.is_good(slot) && self.disk.is_good(slot.other()) && !self.good_and_whole(slot.other());
        let event = if rotten { Event::Spoilt(slot.other()) } else { Event::Loops(slot) };
        let (after, actions) = slots.event(event);
        let left = self.perform(after, &actions, out);
        out.push(left.off());
    }

    /// Does actions; `cuts` gets the machine as a power cut at any moment leaves it.
    fn perform(&self, slots: Slots, actions: &[Action], cuts: &mut Vec<Self>) -> Self {
        let mut world = Self { on: Some(slots.clone()), ..self.clone() };
        for action in actions {
            cuts.push(world.off());
            if let Action::Fetch(slot, content) = action {
                // The rule that protects the last release known to start: whatever is overwritten, another is good.
                let other_good = world.disk.is_good(slot.other());
                assert!(!world.had_good || other_good, "the only good slot is overwritten");
                assert_eq!(world.disk.labels[slot.index()], None, "written to under its label");
                world.data[slot.index()] = None;
                cuts.push(world.off());
                world.data[slot.index()] = Some(number(content));
            }
            if let Action::Leave(Via::Kexec) = action {
                let from = self.on.as_ref().and_then(|on| on.running.as_ref()).expect("it left what runs");
                assert!(world.disk.is_good(from.slot), "two kernels in a row that no firmware started");
            }
            world.disk.apply(action);
        }
        cuts.push(world.off());
        assert_eq!(world.disk, slots.disk, "the state and the disk say the same after {actions:#?}");
        world
    }

    /// All that can happen next.
    fn next(&self) -> Vec<Self> {
        let mut out = Vec::new();
        match &self.on {
            None => self.power_on(&mut out),
            Some(slots) => self.happens(slots, &mut out),
        }
        out
    }

    fn power_on(&self, out: &mut Vec<Self>) {
        for (release, after) in self.loader() {
            out.push(after.clone());
            if !starts_cold(release) || !self.may_run(release) {
                continue;
            }
            after.cannot_read(release, out);
            if self.holds(release) {
                after.start(release, Via::Cold, out);
                after.loops(release, out);
            } else if let Some(slot) = self.disk.slot_of(&content(release).root_hash) {
                after.finds_rot(release, slot, out);
            }
        }
        // Through the network: what holds its root is used, else it is installed.
        for release in self.releases.into_iter().filter(|r| starts_cold(*r) && self.may_run(*r)) {
            let content = content(release);
            let known = self.disk.entries.iter().any(|e| {
                e.content.root_hash == content.root_hash && matches!(e.name.kind, EntryKind::Good | EntryKind::Trial(_))
            });
            let slots = self.slots();
            if known && self.holds(release) {
                self.start(release, Via::Cold, out);
                continue;
            }
            // The loader knows it, and its root is gone: it comes back under the entry that it has.
            if let Some(entry) = self.disk.listed(&content.root_hash) {
                let event = Event::Assign(content.clone(), entry.name.sequence, Go::Here(Via::Cold));
                self.step(slots.clone(), event, out);
            }
            if let Some(sequence) = self.next_sequence().filter(|_| !self.rots_unseen()) {
                self.step(slots, Event::Assign(content, sequence, Go::Here(Via::Cold)), out);
            }
        }
    }

    fn next_sequence(&self) -> Option<u64> {
        let next = self.disk.highest_sequence() + 1;
        (next <= self.assignments).then_some(next)
    }

    fn start(&self, release: u64, via: Via, out: &mut Vec<Self>) {
        let slots = self.slots();
        self.step(slots, Event::Started(content(release).root_hash, via), out);
    }

    fn step(&self, slots: Slots, event: Event, out: &mut Vec<Self>) {
        let before = slots.clone();
        let (after, actions) = slots.event(event.clone());
        let mut world = self.perform(after, &actions, out);
        if event == Event::Healthy
            && let Some(running) = before.running.as_ref().filter(|running| running.via == Via::Cold)
            && self.may_run(release_of(before.disk.labels[running.slot.index()].unwrap()))
        {
            world.had_good = true;
            assert!(world.disk.is_good(running.slot), "healthy after a cold boot is good");
        }
        match actions.last() {
            Some(Action::Leave(Via::Cold)) => out.push(world.off()),
            Some(Action::Leave(Via::Kexec)) => {
                let install = before.install.expect("only what was installed is gone to");
                world.start(number(&install.content), Via::Kexec, out);
            }
            _ => out.push(world),
        }
    }

    fn happens(&self, slots: &Slots, out: &mut Vec<Self>) {
        out.push(self.off());
        let mut events = vec![Event::CalledOff, Event::Granted, Event::Late];
        let no_place = slots.running.is_none() && self.rots_unseen();
        if let Some(sequence) = self.next_sequence().filter(|_| !no_place) {
            for release in self.releases {
                for via in [Via::Kexec, Via::Cold] {
                    events.push(Event::Assign(content(release), sequence, Go::Leave(via)));
                }
                // An assignment that was there before comes again.
                events.push(Event::Assign(content(release), sequence - 1, Go::Leave(Via::Cold)));
            }
        }
        if let Some(install) = &slots.install
            && !install.ready
        {
            if self.data[install.slot.index()] == Some(number(&install.content)) {
                events.push(Event::Fetched);
            }
            // It cannot be read now.
            events.push(Event::Unread(install.slot));
            // Or it is fetched anew; of the only good root there is no other copy, and the network is asked for it.
            if !self.disk.is_good(install.slot) || self.good_and_whole(install.slot.other()) {
                events.push(Event::Spoilt(install.slot));
            }
        }
        if let Some(running) = &slots.running {
            let release = release_of(self.disk.labels[running.slot.index()].unwrap());
            if gets_healthy(release) {
                events.push(Event::Healthy);
            }
        }
        // A disk that rots: under what runs as well as beside it, under what is good only where another is good.
        for slot in SlotId::BOTH.into_iter().filter(|_| slots.running.is_some() && self.rots > 0) {
            let good = self.disk.state(slot) == SlotState::Good || self.disk.is_good(slot);
            if !good || self.good_and_whole(slot.other()) {
                let mut rotten = Self { rots: self.rots - 1, ..self.clone() };
                rotten.data[slot.index()] = None;
                rotten.step(slots.clone(), Event::Spoilt(slot), out);
                out.push(rotten.off());
            } else if self.is_only_good(slot) {
                self.is_mended(slot);
            }
        }
        // The floor never rises above the last-known-good release: `kiln` refuses it.
        let good = self.disk.entries.iter().filter(|e| e.name.kind == EntryKind::Good);
        let newest = good.max_by_key(|e| e.name.sequence).map(|e| number(&e.content));
        let whole = newest.filter(|release| self.holds(*release));
        // Where that is of another image, it is not asked of this one's.
        let rises = |release: &u64| *release != OTHER && *release > self.floor && Some(*release) <= whole;
        for release in self.releases.into_iter().filter(rises) {
            let raised = Self { floor: release, ..self.clone() };
            raised.step(slots.clone(), Event::Floor(floor(release)), out);
        }
        for event in events {
            self.step(slots.clone(), event, out);
        }
    }
}

fn key(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

fn line(world: &World) -> String {
    let entries: Vec<String> = world.disk.entries.iter().map(|e| format!("{}={}", e.name, e.content.release)).collect();
    let labels = world.disk.labels.map(|label| label.map(release_of));
    let on = world.on.as_ref().map(|on| (&on.running, on.install.as_ref().map(|i| (i.slot, i.go, i.ready))));
    let World { data, floor, had_good, .. } = world;
    format!("floor {floor} labels {labels:?} data {data:?} {entries:?} on {on:?} good {had_good}")
}

/// Everything that can come of a machine: the slot states that were seen.
fn explore(new: World) -> BTreeSet<SlotState> {
    let releases = new.releases;
    let mut seen = HashSet::from([key(&new)]);
    let mut queue = VecDeque::from([(new.clone(), Rc::new(new))]);
    let mut states = BTreeSet::new();
    let mut good_and_off = 0_u32;
    while let Some((world, before)) = queue.pop_front() {
        states.extend(SlotId::BOTH.map(|slot| world.disk.state(slot)));
        if world.had_good && world.on.is_none() {
            good_and_off += 1;
            assert!(world.comes_back(), "nothing good boots:\n{}\n{}", line(&before), line(&world));
        }
        let world = Rc::new(world);
        let next = std::panic::catch_unwind(AssertUnwindSafe(|| world.next()));
        for next in next.unwrap_or_else(|_| panic!("see above:\n{}\n{}", line(&before), line(&world))) {
            if seen.insert(key(&next)) {
                queue.push_back((next, Rc::clone(&world)));
            }
        }
    }
    println!("{releases:?}: {} situations, {good_and_off} of them switched off with a good release", seen.len());
    assert!(good_and_off > 1_000, "{good_and_off}");
    states
}

fn blank(releases: [u64; 3], assignments: u64, rots: u8) -> World {
    World { disk: Disk::default(), data: [None; 2], on: None, floor: 1, had_good: false, releases, assignments, rots }
}

/// Release 1, good under the first assignment: two more take it through kexec, proof and overwriting.
fn with_a_good_release(releases: [u64; 3], assignments: u64, rots: u8) -> World {
    let disk = good_machine(1).disk;
    World { disk, data: [Some(1), None], had_good: true, ..blank(releases, assignments, rots) }
}

#[test]
fn whatever_is_cut_a_machine_that_had_a_good_release_boots_a_good_one() {
    let mut states = explore(blank([1, 2, 3], 2, 0));
    states.extend(explore(blank([1, 2, 3], 1, 1)));
    states.extend(explore(with_a_good_release([1, 2, 3], 2, 1)));
    states.extend(explore(with_a_good_release([1, 2, 3], 3, 0)));
    assert_eq!(states.len(), 7, "every state is reached: {states:?}");
}

#[test]
fn neither_does_a_release_that_only_a_kexec_starts_leave_a_machine_stranded() {
    explore(blank([1, 2, 4], 1, 1));
    explore(with_a_good_release([1, 2, 4], 2, 1));
    explore(with_a_good_release([1, 2, 4], 3, 0));
}

#[test]
fn nor_does_a_floor_that_rises_twice() {
    explore(blank([1, 2, 5], 1, 1));
    explore(with_a_good_release([1, 2, 5], 2, 1));
    explore(with_a_good_release([1, 2, 5], 3, 0));
}

#[test]
fn nor_does_the_floor_of_one_of_two_images() {
    explore(blank([1, 2, OTHER], 1, 1));
    explore(with_a_good_release([1, 2, OTHER], 2, 1));
}

/// A machine with release 1 good in A.
fn good_machine(sequence: u64) -> Slots {
    let mut slots = Slots::new(Disk::default(), Vec::new());
    for event in
        [Event::Assign(content(1), sequence, Go::Here(Via::Cold)), Event::Fetched, Event::Granted, Event::Healthy]
    {
        slots = slots.event(event).0;
    }
    slots
}
