//! What is published, as the boot server asks for it. Read and verified by `kiln-images`, which the builder and the
//! publisher use as well.

use crate::error::CatalogError;
use jiff::Timestamp;
use kiln_images::{Memory, Repository, SiteDir};
use kiln_protocol::{Class, ImageName, ReleaseId, Sha256Hex};
use kiln_release::tuf::{Expiry, Seen};
use kiln_release::{Manifest, Signer};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

/// Releases that are passed over are named so many times.
const PASSED_SHOWN: usize = 3;

/// One published release.
#[derive(Debug, Clone)]
pub struct Release {
    /// Its verified manifest.
    pub manifest: Manifest,
    /// SHA-256 of the manifest's bytes.
    pub manifest_sha256: Sha256Hex,
}

/// Everything published, as one verified state of the repository.
#[derive(Debug, Clone)]
pub struct Catalog {
    /// All releases.
    pub releases: BTreeMap<ReleaseId, Release>,
    /// The site's own object.
    pub site: kiln_release::Site,
    /// Releases of which it revoked a boot program.
    pub revoked: BTreeSet<ReleaseId>,
    /// Its floors, for whoever keeps them.
    pub floors: Arc<BTreeMap<String, u64>>,
    /// What it holds and has not revoked, for whoever keeps that: what a machine can go back to.
    pub fit: Arc<BTreeSet<ReleaseId>>,
    /// Version of the snapshot.
    pub snapshot: u64,
    /// What to remember.
    pub seen: Seen,
    /// The newest root's text: what is trusted next time.
    pub root: String,
    /// When the metadata expires.
    pub expiries: Vec<Expiry>,
    /// Why a newer snapshot in the repository was passed over.
    pub refused: Option<String>,
}

impl Catalog {
    /// Reads the repository, verifies all of it, and writes timestamp.json where it has to be newer. Blocking.
    pub fn adopt(site: &SiteDir, keys: &[Signer], memory: &Memory, now: Timestamp) -> Result<Self, CatalogError> {
        let Repository { site, releases, trust_root, seen, expiries, snapshot, refused } =
            Repository::adopt(site, keys, memory, now)?;
        let mut by_id = BTreeMap::new();
        for kiln_images::Release { image, release, manifest_sha256, manifest } in releases {
            let id = ReleaseId { image: image.parse()?, release };
            by_id.insert(id, Release { manifest, manifest_sha256: manifest_sha256.parse()? });
        }
        // A release has several programs, and one that was pruned is named still.
        let programs = site.dbx.iter().flat_map(|dbx| &dbx.revoked);
        let revoked: BTreeSet<ReleaseId> = programs.filter_map(|program| program.release.parse().ok()).collect();
        let floors = Arc::new(site.floors.clone());
        let fit = Arc::new(by_id.keys().filter(|id| !revoked.contains(*id)).cloned().collect());
        Ok(Self { releases: by_id, site, revoked, floors, fit, snapshot, seen, root: trust_root, expiries, refused })
    }

    /// The highest release of an image that machines may have without an operator's order: of class `normal`, not below the
    /// floor, and with no boot program that the site revoked.
    pub fn newest(&self, image: &ImageName) -> Option<&ReleaseId> {
        self.normal(image).rfind(|id| self.unfit(id).is_none())
    }

    /// Higher ones, which no machine is given, and why; it goes behind what is said of the newest. Empty: there are none.
    pub fn passed_over(&self, image: &ImageName) -> String {
        let unfit: Vec<String> = self.normal(image).rev().map_while(|id| self.unfit(id)).collect();
        if unfit.is_empty() {
            return String::new();
        }
        let shown = unfit.len().min(PASSED_SHOWN);
        let more = unfit.len() - shown;
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("; passed over: {}{more}", unfit[..shown].join(", "))
    }

    fn normal<'a>(&'a self, image: &ImageName) -> impl DoubleEndedIterator<Item = &'a ReleaseId> {
        let normal = |release: &Release| release.manifest.class == Class::Normal.as_str();
        self.releases.iter().filter(move |(id, release)| id.image == *image && normal(release)).map(|(id, _)| id)
    }

    /// Why no machine is given this release; none: it may be.
    fn unfit(&self, id: &ReleaseId) -> Option<String> {
        let floor = self.site.floor(id.image.as_str());
        if self.revoked.contains(id) {
            Some(format!("{id} is revoked"))
        } else if id.release < floor {
            Some(format!("{id} is below the floor {floor}"))
        } else {
            None
        }
    }

    /// The release that boots with this UKI, kernel or initramfs.
    pub fn booted_by(&self, sha256: &str) -> Option<(&ReleaseId, &Release)> {
        self.releases.iter().find(|(_, r)| {
            let m = &r.manifest;
            m.uki.sha256 == sha256 || m.kernel.sha256 == sha256 || m.initramfs.sha256 == sha256
        })
    }
}

/// What tells that a look is worth it: names in the metadata directory, and the timestamp's age.
pub fn fingerprint(site: &SiteDir) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(site.repo().join("metadata"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "timestamp.json" {
            // Its version may have been set back by a publisher that began before the last signing here.
            names.push(format!("{name} {:?}", entry.metadata()?.modified()?));
        } else if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
