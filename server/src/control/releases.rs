//! Releases that machines need, and those that are about to be taken out of the repository: who prunes says so first, and from
//! then on nobody gives them to a machine.

use super::{Control, Inner, now_ms};
use crate::catalog::Catalog;
use crate::error::ControlError;
use kiln_fleet::Millis;
use kiln_protocol::{ImageName, ReleaseId};
use std::collections::{BTreeMap, BTreeSet};

/// A prune has so long from the question what machines need to its end; then what it named may be assigned again, if it is
/// still published.
const PRUNE_MS: Millis = 10 * 60_000;

/// Releases that are about to be taken out, and until when nobody gives them to a machine. At most what is published.
#[derive(Debug, Default)]
pub(super) struct Withheld(BTreeMap<ReleaseId, Millis>);

/// How many machines run a release, and how many need it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) running: u64,
    pub(crate) needed: u64,
}

impl Inner {
    /// That a release is not about to be taken out. Asked under the lock under which it is then given to a machine.
    pub(super) fn check_stays(&self, release: &ReleaseId, now: Millis) -> Result<(), ControlError> {
        match self.withheld.0.get(release) {
            Some(until) if now < *until => {
                let minutes = (until - now).div_ceil(60_000);
                Err(ControlError::BeingPruned { release: release.clone(), minutes })
            }
            Some(_) | None => Ok(()),
        }
    }
}

impl Control {
    /// Says which releases are given to nobody though they are higher than the one that is; what was said of the catalog
    /// before is not said again.
    pub(super) fn tell_passed_over(&self, catalog: &Catalog, before: Option<&Catalog>) {
        let roles = self.config.roles.values().map(|role| &role.image);
        let images: BTreeSet<&ImageName> = roles.chain([&self.config.boot.default_image]).collect();
        for image in images {
            let passed = catalog.passed_over(image);
            if !passed.is_empty() && before.is_none_or(|before| before.passed_over(image) != passed) {
                let newest = catalog.newest(image).map_or_else(|| "none".to_owned(), ToString::to_string);
                tracing::warn!("of {image}, machines that are approved from now on are given {newest}{passed}");
            }
        }
    }

    /// What machines run and need.
    pub(crate) fn uses(&self) -> BTreeMap<ReleaseId, Use> {
        let mut uses: BTreeMap<ReleaseId, Use> = BTreeMap::new();
        for machine in self.look().machines.values() {
            for release in machine.needs() {
                uses.entry(release).or_default().needed += 1;
            }
            if let Some(running) = machine.current() {
                let release = ReleaseId { image: running.image.clone(), release: running.release };
                uses.entry(release).or_default().running += 1;
            }
        }
        uses
    }

    /// Whether each of these is withheld by now, or needed: who asks for it once more, to prune, changes nothing.
    pub(super) fn is_withheld(&self, image: &ImageName, releases: &BTreeSet<u64>) -> bool {
        let now = now_ms();
        let inner = self.look();
        let needs: BTreeSet<ReleaseId> = inner.machines.values().flat_map(kiln_fleet::Machine::needs).collect();
        releases.iter().all(|number| {
            let release = ReleaseId { image: image.clone(), release: *number };
            needs.contains(&release) || inner.withheld.0.get(&release).is_some_and(|until| now < *until)
        })
    }

    /// Of releases that are to be taken out: which ones machines need. The others are given to nobody from now on.
    pub(crate) fn withhold(&self, image: &ImageName, releases: &BTreeSet<u64>) -> BTreeSet<u64> {
        let catalog = self.catalog();
        let now = now_ms();
        let mut inner = self.lock();
        let needs: BTreeSet<ReleaseId> = inner.machines.values().flat_map(kiln_fleet::Machine::needs).collect();
        let withheld = &mut inner.withheld.0;
        withheld.retain(|_, until| now < *until);
        let mut needed = BTreeSet::new();
        for number in releases {
            let release = ReleaseId { image: image.clone(), release: *number };
            if needs.contains(&release) {
                needed.insert(*number);
            } else if catalog.releases.contains_key(&release) {
                withheld.insert(release, now.saturating_add(PRUNE_MS));
            }
        }
        needed
    }
}
