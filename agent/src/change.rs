//! Going to another release: its metadata, UKI and root are verified here, before this one is left.

use crate::error::{AgentError, Result};
use crate::fetch::Expected;
use crate::flow::{Flow, Verified};
use crate::plan::{self, Leave};
use crate::{facts, kexec};
use kiln_protocol::{Assignment, ReleaseId, Stage, Via};
use kiln_release::Artifact;
use std::io::{Sink, sink};
use std::path::{Path, PathBuf};

/// Where the next release's root waits for its turn.
pub const NEXT_ROOT: &str = "/run/kiln/next";
/// The largest UKI kept in memory: a manifest that names a longer one is refused.
const UKI_LIMIT: u64 = 256 << 20;

/// A release that is verified and ready to go to.
pub struct Ready {
    pub release: ReleaseId,
    verified: Verified,
    uki: Vec<u8>,
    /// For a kexec; none where it is fetched after the restart.
    root: Option<PathBuf>,
    pub via: Via,
    /// Why it is a cold boot although a kexec was asked for.
    pub note: Option<String>,
}

/// Verifies the metadata of `release` and fetches what it names. For a cold boot the root is read once too, so that a
/// release that cannot be fetched is noticed here and not after the restart.
/// `to` is where the root goes if the next step is a kexec.
pub async fn prefetch(
    flow: &mut Flow,
    assignment: &Assignment,
    release: &ReleaseId,
    via: Via,
    to: &Path,
) -> Result<Ready> {
    let verified = flow.verify_metadata(release).await?;
    if verified.manifest_sha256 != assignment.manifest_sha256.as_str() {
        return Err(AgentError::ManifestMismatch {
            expected: verified.manifest_sha256,
            got: assignment.manifest_sha256.to_string(),
        });
    }
    let manifest = verified.manifest.clone();
    if manifest.uki.length > UKI_LIMIT {
        return Err(AgentError::Uki(format!("{} bytes; at most {UKI_LIMIT} are read", manifest.uki.length)));
    }
    let mut uki = Vec::new();
    flow.fetch_into(Stage::Prefetch, expected("UKI", &manifest.uki), &mut uki).await?;
    kexec::split(&uki, &manifest)?;

    let boot = manifest.kernel.length + manifest.initramfs.length;
    let (need, free) = (manifest.root.length, facts::memory("MemAvailable:"));
    // The root must fit here, then once more in the loaded initrd.
    let leave = match via {
        Via::Cold => Leave::Cold,
        Via::Kexec => plan::may_kexec(free.saturating_sub(need), need, boot),
    };
    let root = expected("root artifact", &manifest.root);
    match leave {
        Leave::Kexec => {
            flow.fetch_to(Stage::Prefetch, root, to).await?;
            let root = Some(to.to_owned());
            Ok(Ready { release: release.clone(), verified, uki, root, via: Via::Kexec, note: None })
        }
        Leave::Cold => {
            let mut nowhere: Sink = sink();
            flow.fetch_into(Stage::Prefetch, root, &mut nowhere).await?;
            let note = (via == Via::Kexec)
                .then(|| format!("{free} bytes of memory are free: too few for a kexec, so it is a cold boot"));
            Ok(Ready { release: release.clone(), verified, uki, root: None, via: Via::Cold, note })
        }
    }
}

fn expected<'a>(what: &'static str, artifact: &'a Artifact) -> Expected<'a> {
    Expected { what, sha256: &artifact.sha256, length: artifact.length }
}

/// Loads the kernel for a kexec; a cold boot needs nothing.
pub fn load(ready: &Ready) -> Result<()> {
    if ready.via == Via::Cold {
        return Ok(());
    }
    let manifest = &ready.verified.manifest;
    let payload = kexec::split(&ready.uki, manifest)?;
    kexec::load(&payload, ready.root.as_deref().map(|path| (path, manifest.root.sha256.as_str())))
}

/// From the initramfs: fetches, tells the server, and goes. Comes back when the caller must restart the machine.
pub async fn now(flow: &mut Flow, assignment: &Assignment, release: &ReleaseId, via: Via) -> Result<()> {
    flow.journal.started(Stage::Prefetch);
    let mut attempt = 0;
    let ready = loop {
        attempt += 1;
        match prefetch(flow, assignment, release, via, Path::new(NEXT_ROOT)).await {
            Ok(ready) => break ready,
            Err(error) => flow.after_failure(Stage::Prefetch, error, attempt).await?,
        }
    };
    flow.journal.done(Stage::Prefetch);
    load(&ready)?;
    flow.journal.started(Stage::Going);
    flow.report().await;
    if ready.via == Via::Kexec {
        let error = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_KEXEC);
        return Err(AgentError::system("starting the loaded kernel")(std::io::Error::other(format!("{error:?}"))));
    }
    Ok(())
}
