//! How often in a row a good release was started from its slot without becoming healthy. It is counted on the state partition. A disk
//! that takes no writes starts what it holds all the same, so what it does not take is counted beside it, where the machine's memory is:
//! a release that loops there comes to its end as well. What stands there is newer than what the disk has, and goes once the disk takes
//! a count again.

use super::MachineDisk;
use crate::disk::DiskError;
use crate::disk::store::Starts;
use crate::error::Result;
use crate::memory::Place;
use kiln_protocol::Sha256Hex;
use kiln_protocol::slot::SlotState;

/// So many starts of a good release in a row without its being healthy, and the machine is in safe mode.
pub const STARTS: u32 = 5;
/// After so many its root is read back before the next.
pub const SUSPECT: u32 = 2;

impl MachineDisk {
    /// Counts in this place what the disk does not take.
    #[must_use]
    pub fn beside(self, place: Place) -> Self {
        Self { beside: Some(place), ..self }
    }

    /// The good release with this root hash starts once more: how many starts of it there were before, none of them healthy. One
    /// whose entries cannot be read is taken for good. This one counts from its hand-over on ([`Self::hands_over`]), or from the error
    /// that ends it before: a power cut burns no try.
    pub fn count_start(&mut self, root_hash: &Sha256Hex, sequence: u64) -> Starts {
        let (disk, lacks_esp) = (&self.slots.disk, self.store.lacks_esp());
        let good = disk.slot_of(root_hash).is_some_and(|slot| lacks_esp || disk.state(slot) == SlotState::Good);
        if !good {
            return Starts::default();
        }
        let known = self.counted_beside(root_hash).or_else(|| self.store.starts(root_hash).ok()).unwrap_or_default();
        let begun = if known.count == 0 { sequence } else { known.begun };
        if known.count >= STARTS {
            // After a safe mode the release has one start, not all of them. Nothing is handed over to in this one.
            self.count(root_hash, Starts { count: STARTS - 1, begun });
        } else {
            self.starts = Some((root_hash.clone(), Starts { count: known.count + 1, begun }));
        }
        known
    }

    /// The image's init is next, and from here on it is the release that has to become healthy; or nothing is, because this
    /// machine cannot start it. Counted once.
    pub fn hands_over(&mut self) {
        if let Some((root_hash, starts)) = self.starts.take() {
            self.count(&root_hash, starts);
        }
    }

    /// It was healthy, or a person wants it tried anew. Gives what is wrong with a disk that took no count.
    pub fn forget_starts(&mut self, root_hash: &Sha256Hex) -> Result<Option<DiskError>> {
        let is_beside = self.counted_beside(root_hash).is_some();
        self.keep_starts(root_hash, None)?;
        Ok(is_beside.then(|| DiskError::Io {
            disk: self.name().to_owned(),
            what: "counting its starts",
            reason: "it takes no writes: they are counted beside it".to_owned(),
        }))
    }

    /// A machine on which nothing takes it starts what the disk holds all the same.
    fn count(&mut self, root_hash: &Sha256Hex, starts: Starts) {
        if let Err(error) = self.keep_starts(root_hash, Some(starts)) {
            println!("kiln-agent: the start is not counted: {error}");
        }
    }

    fn counted_beside(&self, root_hash: &Sha256Hex) -> Option<Starts> {
        Starts::of(&self.beside.as_ref()?.starts(), root_hash)
    }

    fn keep_starts(&mut self, root_hash: &Sha256Hex, starts: Option<Starts>) -> Result<()> {
        let is_beside = self.counted_beside(root_hash).is_some();
        match (self.store.keep_starts(root_hash, starts), &self.beside) {
            (Ok(()), Some(place)) if is_beside => place.keep_starts(""),
            (Ok(()), Some(_) | None) => Ok(()),
            (Err(error), Some(place)) => {
                println!("kiln-agent: {error}: starts are counted beside the disk");
                place.keep_starts(&starts.unwrap_or_default().line(root_hash))
            }
            (Err(error), None) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::machine::content;
    use crate::testing::TestSite;
    use kiln_protocol::slot::Event;
    use std::path::Path;

    /// A machine's disk in a file, release 1 of the site good on it.
    fn opened(site: &TestSite, dir: &Path) -> MachineDisk {
        let (manifest, uki) = (&site.manifests[&1], dir.join("uki"));
        std::fs::write(&uki, &site.files[&site.paths(1)[0][1..]]).unwrap();
        let mut disk = MachineDisk::on_trial(&dir.join("disk"), manifest, &uki);
        disk.event(Event::Healthy, None).unwrap();
        disk
    }

    /// The count goes on where the disk left it, and comes to the same end. What was counted beside a disk is newer than what it has.
    #[test]
    fn starts_on_a_disk_that_takes_no_writes_are_counted_beside_it() {
        let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(1));
        let place = Place::Directory(dir.path().join("state"));
        let root_hash = content(&site.manifests[&1]).unwrap().root_hash;
        let starts = |disk: &mut MachineDisk, times: usize| -> Vec<u32> {
            let start = |disk: &mut MachineDisk| {
                let known = disk.count_start(&root_hash, 7);
                disk.hands_over();
                known.count
            };
            (0..times).map(|_| start(disk)).collect()
        };
        let mut disk = opened(&site, dir.path()).beside(place.clone());
        assert_eq!(starts(&mut disk, 2), [0, 1]);
        assert_eq!(place.starts(), "", "the disk counts");
        let mut disk = disk.reopened(false);
        // Safe mode, and once more after it.
        assert_eq!(starts(&mut disk, 6), [2, 3, 4, STARTS, STARTS - 1, STARTS]);
        assert_eq!(disk.forget_starts(&root_hash).unwrap().unwrap().kind(), "disk-io-error", "and that is told");
        assert_eq!(starts(&mut disk, 2), [0, 1], "what the disk still has is over");
        let mut disk = disk.reopened(true);
        assert_eq!(starts(&mut disk, 1), [2]);
        assert_eq!(place.starts(), "", "the disk counts again");
        assert_eq!(starts(&mut disk, 1), [3]);
        assert!(disk.forget_starts(&root_hash).unwrap().is_none());
        assert_eq!(starts(&mut disk.without_esp(), 2), [0, 1], "beside an ESP that cannot be read");
        // A machine whose memory takes it no more than the disk does starts all the same.
        let other = tempfile::tempdir().unwrap();
        let nowhere = opened(&site, other.path()).beside(Place::Directory("/proc/none".into()));
        assert_eq!(starts(&mut nowhere.reopened(false), 2), [0, 0]);
    }
}
