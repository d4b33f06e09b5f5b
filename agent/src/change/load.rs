//! The point of no return: the loader on the disk is told, and the kernel of a kexec is loaded.

use super::{Files, Installed, Otherwise, Ready, blocking};
use crate::disk::DiskError;
use crate::disk::machine::{self, on_disk};
use crate::error::{AgentError, Result};
use crate::{kexec, watchdog};
use kiln_protocol::Via;
use kiln_protocol::slot::{Action, Entry, EntryKind, Event, Refusal};
use std::fs::File;
use std::sync::Arc;

/// In disk mode: tells the loader, and makes sure that it knows. Power that is cut from here on starts the same release through the
/// firmware. Without that no way but a kexec leads to it. Says how it is gone to: what was good when it was fetched may not be by now.
pub async fn tell_loader(ready: &Ready) -> Result<Via> {
    let Some(Installed { disk, order, .. }) = &ready.installed else { return Ok(ready.via()) };
    let (content, order) = (machine::content(&ready.manifest)?, *order);
    on_disk(disk, move |disk| {
        let rest = disk.event(Event::Granted, None)?;
        let starts = |kind| matches!(kind, EntryKind::Trial(_) | EntryKind::Good);
        let is_it = |e: &Entry| e.name.sequence == order && e.content == content && starts(e.name.kind);
        // A late answer is none, and the commit before it may have failed.
        if !disk.slots().disk.entries.iter().any(is_it) {
            let release = content.release.to_string();
            return Err(DiskError::NotTold { disk: disk.name().to_owned(), release }.into());
        }
        Ok(if rest.contains(&Action::Leave(Via::Kexec)) { Via::Kexec } else { Via::Cold })
    })
    .await
}

/// Loads the kernel for a kexec; a cold boot needs nothing. `told` is how [`tell_loader`] says that it is gone to. A kexec is refused
/// beside what `hung` and would hold it up, and, where a cold boot leads to the release as well, under a hardware watchdog that would
/// end it.
pub async fn load(ready: &Arc<Ready>, told: Via, otherwise: Otherwise, hung: Option<String>) -> Result<()> {
    match (ready.via(), told) {
        (Via::Cold, Via::Cold | Via::Kexec) => Ok(()),
        (Via::Kexec, Via::Cold) => Err(DiskError::Refused(Refusal::ProveFirst).into()),
        (Via::Kexec, Via::Kexec) => {
            let ready = Arc::clone(ready);
            blocking(move || load_kernel(&ready, otherwise, hung)).await
        }
    }
}

fn load_kernel(ready: &Ready, otherwise: Otherwise, hung: Option<String>) -> Result<()> {
    if let Some(what) = hung {
        return Err(AgentError::KexecHangs { what });
    }
    match otherwise {
        Otherwise::Cold => watchdog::covers_a_kexec()?,
        Otherwise::Kexec => {}
    }
    let (uki, root) = match (&ready.installed, &ready.kexec) {
        (Some(Installed { uki, .. }), _) => (uki, None),
        (None, Some(Files { uki, root })) => (uki, Some((root.path(), ready.manifest.root.sha256.as_str()))),
        (None, None) => return Ok(()),
    };
    let uki = File::open(uki.path()).map_err(AgentError::file(uki.path()))?;
    kexec::load(&uki, &ready.manifest, root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::machine::{MachineDisk, SharedDisk};
    use crate::fetch::{Download, Expected};
    use crate::testing::TestSite;
    use std::path::Path;

    /// A release that is said to lie in a slot, at this place in the loader's order; its UKI would be fetched to that path.
    fn ready(site: &TestSite, release: u64, disk: &SharedDisk, order: u64, path: &Path) -> Arc<Ready> {
        let manifest = site.manifests[&release].clone();
        let expected = Expected { what: "UKI", sha256: manifest.uki.sha256.clone(), length: manifest.uki.length };
        let uki = Download::new(expected, Some(path), &Arc::default()).unwrap().into_file().unwrap();
        let installed = Some(Installed { disk: disk.clone(), uki, via: Via::Kexec, order });
        Arc::new(Ready { manifest, kexec: None, installed, note: None })
    }

    #[test]
    fn nothing_is_left_for_a_release_that_the_loader_does_not_know() {
        let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(2));
        let uki = dir.path().join("uki");
        std::fs::write(&uki, &site.files[&site.paths(1)[0][1..]]).unwrap();
        // Its one entry is release 1's, at place 4.
        let disk = SharedDisk::new(MachineDisk::on_trial(&dir.path().join("disk"), &site.manifests[&1], &uki));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let next = dir.path().join("next");
        let told = |release, order| {
            let told = runtime.block_on(tell_loader(&ready(&site, release, &disk, order, &next)));
            told.map_err(|error| error.kind())
        };
        for (release, order) in [(2, 4), (2, 5), (1, 5)] {
            assert_eq!(told(release, order), Err("disk-loader-not-told"), "{release} at {order}");
        }
        assert_eq!(told(1, 4), Ok(Via::Cold), "it was told before, and what runs is not good");
    }

    #[test]
    fn beside_what_gives_no_answer_no_kernel_is_loaded() {
        let (dir, site) = (tempfile::tempdir().unwrap(), TestSite::new(1));
        let uki = dir.path().join("uki");
        std::fs::write(&uki, &site.files[&site.paths(1)[0][1..]]).unwrap();
        let disk = SharedDisk::new(MachineDisk::on_trial(&dir.path().join("disk"), &site.manifests[&1], &uki));
        let ready = ready(&site, 1, &disk, 4, &dir.path().join("next"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let loads = |told, otherwise, hung: Option<&str>| {
            let loaded = runtime.block_on(load(&ready, told, otherwise, hung.map(str::to_owned)));
            loaded.map_err(|error| error.kind())
        };
        for otherwise in [Otherwise::Cold, Otherwise::Kexec] {
            assert_eq!(loads(Via::Kexec, otherwise, Some("vdb")), Err("kexec-disk-hangs"));
            assert_eq!(loads(Via::Cold, otherwise, Some("vdb")), Err("slot-refused"), "it is a cold boot anyway");
            // Nothing hangs: it comes as far as the UKI, or this host's own reason. That file is empty, and no kernel.
            assert_ne!(loads(Via::Kexec, otherwise, None), Err("kexec-disk-hangs"));
        }
    }
}
