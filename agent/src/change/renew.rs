//! What runs is put up anew, and what the disk starts from put right.

use super::{Meter, Ready, expected, files, prefetch_rate};
use crate::disk::DiskError;
use crate::disk::machine::{self, SharedDisk, on_disk, read_slot};
use crate::error::{self, AgentError, Result};
use crate::fetch::Download;
use crate::kexec;
use crate::verifier::Verifier;
use kiln_protocol::Assignment;
use kiln_release::Manifest;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// In disk mode: puts up anew what runs. Its metadata is fetched and verified anew, its root and UKI are read back from the
/// disk itself and compared with it; a UKI that is not as it was signed is fetched anew, a root that is not by the next
/// boot. One that cannot be read is left as it lies: what cannot may be what nothing needs, and what is needed the next boot
/// meets. The cold boot that follows begins with fresh memory, which is all that a running system can have written to.
pub async fn renew(renewal: Renewal, disk: &SharedDisk, next: &Path, meter: &Meter) -> Result<Ready> {
    let Renewal { manifest, servers, rate, order } = renewal;
    let signed = manifest.clone();
    let ready = |note| Ready { manifest: manifest.clone(), kexec: None, installed: None, note };
    let (whole, unread) = match read_slot(disk, manifest.root.length, move |disk| disk.look_whole(&signed)).await {
        Ok(whole) => (whole, None),
        Err(AgentError::Disk(error @ DiskError::ReadBack { .. })) => {
            return Ok(ready(Some(format!("{error}; the next boot fetches it anew"))));
        }
        Err(AgentError::Disk(error @ DiskError::Io { .. })) => (true, Some(error)),
        Err(error) => return Err(error),
    };
    if !whole {
        let [path, _] = files(next);
        mend_uki(disk, &manifest, (servers.as_slice(), rate), &path, &meter.uki).await?;
    }
    let root_hash = machine::content(&manifest)?.root_hash;
    on_disk(disk, move |disk| disk.keep_put_up(&root_hash, order)).await?;
    let mended = (!whole).then(|| "its UKI on the disk was not as it was signed: it was fetched anew".to_owned());
    Ok(ready(
        unread.map(|error| format!("{error}; its root was not read back whole, and starts as it lies")).or(mended),
    ))
}

/// What [`renew`] takes of the verifier.
pub struct Renewal {
    manifest: Manifest,
    servers: Vec<String>,
    rate: Option<u64>,
    order: u64,
}

/// The short part of it: all that needs the verifier, which others wait for.
pub async fn prepare_renewal(verifier: &mut Verifier, assignment: &Assignment) -> Result<Renewal> {
    let verified = verifier.verify_metadata(&assignment.release_id()).await?;
    if verified.manifest_sha256 != assignment.manifest_sha256.as_str() {
        let (expected, got) = (verified.manifest_sha256, assignment.manifest_sha256.to_string());
        return Err(AgentError::ManifestMismatch { expected, got });
    }
    let manifest = verified.manifest;
    verifier.may_run(&manifest)?;
    let (servers, rate) = (verifier.servers.http.clone(), prefetch_rate(&verifier.boot));
    Ok(Renewal { manifest, servers, rate, order: verifier.memory.order(assignment.sequence) })
}

/// Fetches a release's UKI from these servers, at this rate, to `path`, and puts it in place of the one on the disk, which is
/// not as it was signed.
pub async fn mend_uki(
    disk: &SharedDisk,
    manifest: &Manifest,
    (servers, rate): (&[String], Option<u64>),
    path: &Path,
    meter: &Arc<AtomicU64>,
) -> Result<()> {
    let uki = Download::new(expected(error::UKI, &manifest.uki), Some(path), meter)?;
    // Its file goes with it: it is kept until the disk has it.
    let mut uki = uki.capped(rate);
    uki.run_any(servers).await?;
    let (signed, path) = (manifest.clone(), path.to_owned());
    on_disk(disk, move |disk| {
        kexec::verify(&File::open(&path).map_err(AgentError::file(&path))?, &signed)?;
        disk.mend_uki(&signed, &path)
    })
    .await
}
