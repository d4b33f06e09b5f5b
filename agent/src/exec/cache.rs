//! Verdicts that need no second reading of the file: a file's hash, as long as the file is what it was.
//!
//! A file is known by file system, inode, size, and both times to the nanosecond. That alone is not enough (times tick
//! coarsely before Linux 6.13, and a mapping of a tmpfs file is written without any), so three more things hold:
//! nothing is kept of a file that changed within the last [`SETTLE`]; whoever asks holds a lease, so nobody has it
//! open for writing; and each file kept is marked, so that a writer's close, which the kernel queues before any later
//! execution, drops it.

use super::rules::Hash;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// Most files kept. A full cache is emptied: the marks of its files can only be taken away all at once.
pub const MOST: usize = 1024;
/// Longer than the kernel's coarsest clock tick.
const SETTLE: Duration = Duration::from_millis(20);

/// A file system and an inode of it.
pub type Place = (u64, u64);

/// What a file was when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pub place: Place,
    pub size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Look {
    pub fn at(file: &std::fs::File) -> std::io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            place: (found.dev(), found.ino()),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    /// Whether its last change is old enough to be told from another one. `now` is on the wall clock, since 1970.
    fn is_settled(&self, now: Duration) -> bool {
        let changed = u64::try_from(self.changed.0).ok().zip(u32::try_from(self.changed.1).ok());
        changed.is_some_and(|(s, ns)| now.checked_sub(Duration::new(s, ns)).is_some_and(|age| age >= SETTLE))
    }
}

#[derive(Debug, Default)]
pub struct Cache {
    known: BTreeMap<Place, (Look, Hash)>,
}

impl Cache {
    /// The hash of a file that is still what it was.
    pub fn get(&self, look: &Look) -> Option<Hash> {
        self.known.get(&look.place).filter(|(known, _)| known == look).map(|(_, hash)| *hash)
    }

    /// Keeps a hash, if the file is settled. True: it was full, and the marks of all files are to go.
    pub fn put(&mut self, look: Look, hash: Hash, now: Duration) -> bool {
        if !look.is_settled(now) {
            return false;
        }
        let full = self.known.len() >= MOST && !self.known.contains_key(&look.place);
        if full {
            self.known.clear();
            return true;
        }
        self.known.insert(look.place, (look, hash));
        false
    }

    /// Somebody wrote it.
    pub fn forget(&mut self, place: Place) {
        self.known.remove(&place);
    }

    /// The kernel could not say who wrote what.
    pub fn forget_all(&mut self) {
        self.known.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    fn look(inode: u64, changed: (i64, i64)) -> Look {
        Look { place: (1, inode), size: 5, modified: (3, 0), changed }
    }

    #[test]
    fn a_file_is_known_as_long_as_it_is_what_it_was() {
        let mut cache = Cache::default();
        let old = look(7, (3, 0));
        assert!(!cache.put(old, [1; 32], NOW));
        assert_eq!(cache.get(&old), Some([1; 32]));
        for other in [look(7, (3, 1)), look(8, (3, 0)), Look { size: 6, ..old }, Look { modified: (2, 0), ..old }] {
            assert_eq!(cache.get(&other), None, "{other:?}");
        }
        cache.forget(old.place);
        assert_eq!(cache.get(&old), None);
    }

    #[test]
    fn what_just_changed_is_not_kept() {
        let mut cache = Cache::default();
        for (changed, kept) in [((999, 979_000_000), true), ((999, 990_000_000), false), ((1001, 0), false)] {
            cache.put(look(7, changed), [1; 32], NOW);
            assert_eq!(cache.get(&look(7, changed)).is_some(), kept, "{changed:?}");
        }
    }

    #[test]
    fn it_has_a_bound() {
        let mut cache = Cache::default();
        let emptied = (0..3 * MOST as u64).filter(|inode| cache.put(look(*inode, (3, 0)), [1; 32], NOW)).count();
        assert!(emptied == 2 && cache.known.len() <= MOST);
    }
}
