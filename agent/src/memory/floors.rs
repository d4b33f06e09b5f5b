//! Floors, as far as this machine has a use for them: a site may sign one for hundreds of images, and what remembers has room for
//! few. A floor is asked for before the network (of the boot image) and without one (of what lies in the slots); of any other
//! image it is in the metadata that leads there.

use super::Memory;
use kiln_protocol::ReleaseId;
use std::collections::BTreeMap;

/// Images whose floors are remembered: what booted, what it is sent to, and what else lies in a slot.
pub(super) const FLOORS: usize = 3;

impl Memory {
    /// The floor of `image`; 1 where none was signed.
    pub fn floor(&self, image: &str) -> u64 {
        self.floors.get(image).copied().unwrap_or(1)
    }

    /// The lowest release of each image that a floor is remembered of.
    pub fn lowest(&self) -> Vec<ReleaseId> {
        let lowest = |(image, floor): (&String, &u64)| Some(ReleaseId { image: image.parse().ok()?, release: *floor });
        self.floors.iter().filter_map(lowest).collect()
    }

    /// The site signs these floors now. Remembered are those of the `wanted` images, of what is `held` on the disk and, while there is
    /// room, of what this machine was before. None goes down.
    pub fn hear_floors(&mut self, signed: &BTreeMap<String, u64>, wanted: [&str; 2], held: &[String]) {
        let own = |image: &str| wanted.contains(&image) || held.iter().any(|held| held == image);
        for (image, floor) in signed {
            if own(image) || self.floors.contains_key(image) {
                let known = self.floors.entry(image.clone()).or_insert(1);
                *known = (*known).max(*floor);
            }
        }
        while self.floors.len() > FLOORS {
            // What lies in two slots beside what booted from neither: one of them is about to be overwritten.
            let others = |image: &&String| !wanted.contains(&image.as_str());
            let mut others = self.floors.keys().filter(others);
            let Some(gone) = others.clone().find(|image| !own(image)).or(others.next()).cloned() else { return };
            self.floors.remove(&gone);
        }
    }
}
