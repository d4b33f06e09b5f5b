//! A disk's two slots: what lies in them, what the boot loader is told, and how a machine goes from one release to the
//! next without ever being left with nothing that boots. docs/state-machines.md has the table of states and file names.
//!
//! [`Slots::event`] decides, its [`Action`]s are single commits, and [`Disk::apply`] says what each makes of a disk.
//! Whoever performs them writes in their order, each durable before the next. After a power cut everything is read from
//! the disk again: nothing here is remembered anywhere else.

mod names;
mod step;

pub use names::{Content, EntryKind, EntryName, Tries};
pub use step::{Action, Event, Fallback, FallbackReason, Refusal};

use crate::{ReleaseId, Sha256Hex, Via};

/// Starts that a trial has before the loader falls back.
pub const TRIES: u32 = 3;

/// A slot. The letters are places on the disk; which release lies in one is told by its label alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotId {
    /// The first.
    A,
    /// The second.
    B,
}

impl SlotId {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its place in arrays of two.
    pub fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// First half of a root hash: the partition's unique GUID, as the Discoverable Partitions Specification (UAPI.2) has
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(pub [u8; 16]);

impl Label {
    /// Of the release with this root hash.
    pub fn of(root_hash: &Sha256Hex) -> Self {
        let mut label = [0; 16];
        for (byte, digits) in label.iter_mut().zip(root_hash.as_str().as_bytes().chunks(2)) {
            let digit = |d: u8| char::from(d).to_digit(16).and_then(|d| u8::try_from(d).ok()).unwrap_or(0);
            *byte = digit(digits[0]) << 4 | digit(digits[1]);
        }
        Self(label)
    }
}

/// A file in `loader/entries`, and what it names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// Its name.
    pub name: EntryName,
    /// From its text.
    pub content: Content,
}

/// What a disk holds, as far as it decides what boots.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Disk {
    /// Whose whole, verified root lies in A and B.
    pub labels: [Option<Label>; 2],
    /// `loader/entries`, sorted by name.
    pub entries: Vec<Entry>,
    /// `EFI/kiln/*.efi`, sorted.
    pub ukis: Vec<Sha256Hex>,
}

/// A slot's state, for people, reports and the table in docs/state-machines.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotState {
    /// No release in it. While one is being written it is the same on the disk.
    Empty,
    /// A whole release, read back and recomputed. The loader does not know it.
    Written,
    /// Its UKI is in place, its entry is ready under a name the loader passes over.
    Allowed,
    /// The loader starts it next, and has not yet.
    Preferred,
    /// The loader has started it.
    Trial,
    /// Healthy after a cold boot; not counted.
    Good,
    /// Its tries are used up.
    Failed,
}

impl Disk {
    /// The slot that holds a release.
    pub fn slot_of(&self, root_hash: &Sha256Hex) -> Option<SlotId> {
        let label = Label::of(root_hash);
        SlotId::BOTH.into_iter().find(|slot| self.labels[slot.index()] == Some(label))
    }

    /// Entries of the release in a slot.
    pub fn entries_of(&self, slot: SlotId) -> impl Iterator<Item = &Entry> {
        let label = self.labels[slot.index()];
        self.entries.iter().filter(move |entry| label == Some(Label::of(&entry.content.root_hash)))
    }

    /// Whether a slot has a good entry with its UKI: a release that was healthy here after a cold boot.
    pub fn is_good(&self, slot: SlotId) -> bool {
        self.entries_of(slot).any(|e| e.name.kind == EntryKind::Good && self.ukis.contains(&e.content.uki))
    }

    /// The newest release that was healthy here after a cold boot.
    pub fn newest_good(&self) -> Option<ReleaseId> {
        let good = self.entries.iter().filter(|e| e.name.kind == EntryKind::Good && self.ukis.contains(&e.content.uki));
        good.max_by_key(|entry| entry.name.sequence).map(|entry| entry.content.release.clone())
    }

    /// Highest sequence that an entry of any kind names.
    pub fn highest_sequence(&self) -> u64 {
        self.entries.iter().map(|entry| entry.name.sequence).max().unwrap_or(0)
    }

    /// Highest sequence whose trial failed here.
    pub fn failed_sequence(&self) -> Option<u64> {
        self.entries.iter().filter(|entry| entry.name.has_failed()).map(|entry| entry.name.sequence).max()
    }

    /// The newest trial that failed here, if nothing newer is known.
    pub fn fallback(&self) -> Option<Fallback> {
        let newest = self.entries.iter().max_by_key(|entry| entry.name.sequence)?;
        match newest.name.kind {
            EntryKind::Failed(reason) => {
                Some(Fallback { release: newest.content.release.clone(), sequence: newest.name.sequence, reason })
            }
            EntryKind::Next(_) | EntryKind::Trial(_) | EntryKind::Good => None,
        }
    }

    /// The newest entry of the release with this root hash that the loader knows: it started it, or would.
    pub fn listed(&self, root_hash: &Sha256Hex) -> Option<&Entry> {
        let listed = |e: &&Entry| e.content.root_hash == *root_hash && e.name.is_listed();
        self.entries.iter().filter(listed).max_by_key(|e| e.name.sequence)
    }

    /// A slot's state. One that is good and on trial anew under a later assignment is what its newest entry says.
    pub fn state(&self, slot: SlotId) -> SlotState {
        let Some(_) = self.labels[slot.index()] else { return SlotState::Empty };
        let Some(newest) = self.entries_of(slot).max_by_key(|entry| (entry.name.sequence, entry.name.kind)) else {
            return SlotState::Written;
        };
        match newest.name.kind {
            EntryKind::Next(_) => SlotState::Allowed,
            EntryKind::Trial(Tries { left: 0, .. }) | EntryKind::Failed(_) => SlotState::Failed,
            EntryKind::Trial(Tries { done: 0, .. }) => SlotState::Preferred,
            EntryKind::Trial(_) => SlotState::Trial,
            EntryKind::Good => SlotState::Good,
        }
    }

    /// What a commit makes of it. Actions that are none change nothing.
    pub fn apply(&mut self, action: &Action) {
        match action {
            Action::PutUki(content) => self.ukis.push(content.uki.clone()),
            Action::RemoveUki(uki) => self.ukis.retain(|known| known != uki),
            Action::PutEntry(name, content) => {
                self.entries.retain(|entry| entry.name != *name);
                self.entries.push(Entry { name: *name, content: content.clone() });
            }
            Action::RenameEntry { from, to } => {
                self.entries.iter_mut().filter(|entry| entry.name == *from).for_each(|entry| entry.name = *to);
            }
            Action::RemoveEntry(name) => self.entries.retain(|entry| entry.name != *name),
            Action::Unlabel(slot) => self.labels[slot.index()] = None,
            Action::Label(slot, content) => self.labels[slot.index()] = Some(Label::of(&content.root_hash)),
            Action::Fetch(..) | Action::Verify(..) | Action::Leave(_) | Action::Tell(_) | Action::Refuse(_) => {}
        }
        self.entries.sort();
        self.ukis.sort();
        self.ukis.dedup();
    }
}

/// What runs from the disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Running {
    /// From which slot.
    pub slot: SlotId,
    /// How it was started; through the network's boot program is through firmware, cold.
    pub via: Via,
    /// Its checks have held for the soak time.
    pub healthy: bool,
}

/// How an installed release is gone to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Go {
    /// It is what has come over the network and been started in this way: it goes on from the slot.
    Here(Via),
    /// By leaving what runs.
    Leave(Via),
}

/// A release on its way into a slot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Install {
    /// Where it goes.
    pub slot: SlotId,
    /// What.
    pub content: Content,
    /// By which assignment.
    pub sequence: u64,
    /// And then.
    pub go: Go,
    /// It is whole, and allowed.
    pub ready: bool,
}

/// A disk-mode machine's slots.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slots {
    /// What the disk holds.
    pub disk: Disk,
    /// What runs from it; none while only the initramfs does.
    pub running: Option<Running>,
    /// What is being installed.
    pub install: Option<Install>,
    /// Lowest releases that may run, one for each image that has a floor.
    pub floors: Vec<ReleaseId>,
}
