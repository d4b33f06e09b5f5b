//! The site's list of revoked boot programs goes into this machine's firmware: a change of dbx that the site's KEK has
//! signed, named by `site.json`. The server offers it, and what the server says is only a hint: the list is verified, and
//! this machine looks by itself whether it needs what the list names.
//! Sources: UEFI 2.10 §8.2.2 (authenticated append), Linux Documentation/filesystems/efivarfs.rst.

use crate::change::blocking;
use crate::disk::DiskError;
use crate::disk::data::{self, Carried};
use crate::disk::loader::LoaderHold;
use crate::disk::machine::{SharedDisk, on_disk};
use crate::error::{AgentError, Result};
use crate::verifier::{Verified, Verifier};
use crate::{fetch, init, sys, tpm};
use kiln_protocol::{DbxOffer, DbxOutcome, DbxState, ReleaseId, dbx_hold};
use kiln_release::efi::{APPEND, Entry, entries};
use kiln_release::{DbxUpdate, Mode, hex};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use tokio::time::timeout;

const DBX: &str = "/sys/firmware/efi/efivars/dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f";
/// A list that did not go in is tried again after so long.
pub const AGAIN: Duration = Duration::from_secs(10 * 60);
/// Another list is looked at after so long at the earliest.
pub const ANOTHER: Duration = Duration::from_secs(60);
/// Longest wait for the disk.
const DISK_DEADLINE: Duration = Duration::from_secs(20);

/// Does what is offered. `good` is the newest release that was proven good here, where this machine knows it; `disk` the one that
/// it runs from.
pub async fn install(
    verifier: &mut Verifier,
    here: &ReleaseId,
    good: Option<&ReleaseId>,
    disk: Option<&SharedDisk>,
    offer: &DbxOffer,
) -> DbxState {
    let outcome = match tried(verifier, here, good, disk, offer).await {
        Ok(outcome) => outcome,
        Err(error) => DbxOutcome::Failed { reason: format!("{error} ({})", error.kind()) },
    };
    eprintln!("kiln-agent: dbx: {outcome:?}");
    DbxState { update: offer.update.clone(), outcome }
}

async fn tried(
    verifier: &mut Verifier,
    here: &ReleaseId,
    good: Option<&ReleaseId>,
    disk: Option<&SharedDisk>,
    offer: &DbxOffer,
) -> Result<DbxOutcome> {
    let verified = verifier.verify_metadata(here).await?;
    let list = named(&verified, offer)?;
    let revoked: Vec<ReleaseId> = list.revoked.iter().filter_map(|program| program.release.parse().ok()).collect();
    if let Some(reason) = dbx_hold(&revoked, Some(here), None, good) {
        return Ok(DbxOutcome::Held { reason });
    }
    if !init::secure_boot(&verifier.boot).vouches() {
        let reason = "its firmware does not check boot programs against the site's keys".to_owned();
        return Ok(DbxOutcome::Held { reason });
    }
    // Also where the list is in already: until the next boot such a disk can still be mended.
    let hold = match (disk, &verifier.boot.site.mode) {
        (Some(disk), _) => {
            let revoked = list.revoked.iter().map(|program| program.digest.clone()).collect();
            loader_hold(disk, revoked, good == Some(here)).await?
        }
        (None, Mode::Disk) => Some(LoaderHold::NoDisk),
        (None, Mode::Ram) => None,
    };
    let path = Path::new(DBX);
    if lacks(path, list)? == 0 {
        return Ok(DbxOutcome::Installed);
    }
    if let Some(hold) = hold {
        return Ok(DbxOutcome::Held { reason: hold.to_string() });
    }
    let change = download(verifier, list).await?;
    let before = value(path)?;
    // The data's key is bound to what changes here. Behind it this machine's data would be locked for ever.
    let carried = blocking(|| data::carry_key(None)).await?;
    if let Carried::Not(reason) = &carried {
        return Ok(DbxOutcome::Held { reason: format!("the key of its data would be lost: {reason}") });
    }
    let appended = append(path, &change).map_err(AgentError::file(path));
    if carried == Carried::Over {
        narrow(before, value(path)?, appended.is_ok()).await;
    }
    appended?;
    match lacks(path, list)? {
        0 => Ok(DbxOutcome::Installed),
        missing => {
            Ok(DbxOutcome::Failed { reason: format!("the firmware took it, and lacks {missing} entries of it") })
        }
    }
}

/// Where the firmware's dbx names the loader on the disk already, whoever put either there, the firmware starts nothing of that
/// disk, and no list is offered any more: the release that runs puts its own there, once it is good.
pub async fn mend_loader(disk: &SharedDisk, here: &ReleaseId) -> Result<()> {
    let revoked = revoked()?;
    if revoked.is_empty() {
        return Ok(());
    }
    let good = disk.slots().disk.newest_good().as_ref() == Some(here);
    if let Some(hold) = loader_hold(disk, revoked, good).await? {
        eprintln!("kiln-agent: dbx: {hold}");
    }
    Ok(())
}

/// Whether the disk starts through a loader that is revoked, once this release has put its own there where it may.
async fn loader_hold(disk: &SharedDisk, revoked: BTreeSet<String>, good: bool) -> Result<Option<LoaderHold>> {
    let renewed = on_disk(disk, move |disk| disk.renew_loader(&revoked, good));
    match timeout(DISK_DEADLINE, renewed).await {
        Err(_) | Ok(Err(AgentError::Disk(DiskError::Late { .. }))) => Ok(Some(LoaderHold::NoDisk)),
        Ok(renewed) => renewed,
    }
}

fn named<'a>(verified: &'a Verified, offer: &DbxOffer) -> Result<&'a DbxUpdate> {
    let list = verified.site.dbx.as_ref().filter(|list| list.update.sha256 == offer.update.as_str());
    list.ok_or_else(|| AgentError::Format {
        path: "site.json".into(),
        reason: format!("it does not name the list {} that the server offers", offer.update),
    })
}

/// The copy that outlives the change is one that any system is given which starts here before the next boot of this one. It is
/// bound to the new state where that can be told, and taken away where nothing changed.
async fn narrow(before: Vec<u8>, after: Vec<u8>, appended: bool) {
    let narrowed = blocking(move || {
        if !appended && before == after {
            return data::drop_copy().map(|()| Carried::NoKey);
        }
        match tpm::pcr7_with_dbx(&before, &after) {
            Some(pcr7) => data::carry_key(Some(pcr7)),
            None => Ok(Carried::Not("firmware's event log does not tell what PCR 7 will be".into())),
        }
    })
    .await;
    let why = match narrowed {
        Ok(Carried::Over | Carried::NoKey) => return,
        Ok(Carried::Not(reason)) => reason,
        Err(error) => error.to_string(),
    };
    eprintln!("kiln-agent: dbx: until the next boot the key of the data is bound to no Secure Boot state: {why}");
}

/// The variable as the firmware has it; empty where there is none.
fn value(path: &Path) -> Result<Vec<u8>> {
    match std::fs::read(path) {
        // Four bytes of attributes go before the value.
        Ok(bytes) => Ok(bytes.get(4..).unwrap_or_default().to_vec()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(AgentError::file(path)(error)),
    }
}

/// The programs that the firmware does not start any more.
pub fn revoked() -> Result<BTreeSet<String>> {
    digests(Path::new(DBX))
}

/// The programs that the firmware's variable names.
fn digests(path: &Path) -> Result<BTreeSet<String>> {
    let value = value(path)?;
    let digest = |entry: Entry<'_>| match entry {
        Entry::Sha256(digest) => Some(hex::encode(digest)),
        Entry::X509(_) | Entry::Other => None,
    };
    Ok(entries(&value).unwrap_or_default().into_iter().filter_map(digest).collect())
}

/// How many of the list's entries the firmware does not have.
fn lacks(path: &Path, list: &DbxUpdate) -> Result<usize> {
    let known = digests(path)?;
    Ok(list.revoked.iter().filter(|program| !known.contains(&program.digest)).count())
}

async fn download(verifier: &Verifier, list: &DbxUpdate) -> Result<Vec<u8>> {
    let path = format!("a/{}", list.update.sha256);
    let mut last = AgentError::NoServer;
    for base in &verifier.servers.http {
        match fetch::document(base, &path, list.update.length).await {
            Ok(Some(bytes)) if hex::sha256(&bytes) == list.update.sha256 => return Ok(bytes),
            Ok(Some(bytes)) => {
                let (expected, got) = (list.update.sha256.clone(), hex::sha256(&bytes));
                let reason = format!("SHA-256 is {got}, and site.json names {expected}");
                last = AgentError::Format { path: path.clone().into(), reason };
            }
            Ok(None) => last = AgentError::HttpStatus { url: format!("{base}/{path}"), status: 404 },
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// One write(2) of attributes, authentication and value, as efivarfs demands.
fn append(path: &Path, change: &[u8]) -> std::io::Result<()> {
    if let Ok(file) = File::open(path) {
        sys::clear_immutable(&file)?;
    }
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    file.write_all(&[&APPEND.to_le_bytes(), change].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_release::efi::digest_list;
    use kiln_release::{Artifact, RevokedProgram};

    #[test]
    fn entries_are_counted_as_the_firmware_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dbx");
        let digests = [[1; 32], [2; 32]];
        let revoked =
            digests.iter().map(|digest| RevokedProgram { digest: hex::encode(digest), release: "minimal/1".into() });
        let list = DbxUpdate { update: Artifact { sha256: String::new(), length: 1 }, revoked: revoked.collect() };
        assert_eq!(lacks(&path, &list).unwrap(), 2, "no variable");
        let value = |lists: Vec<u8>| [vec![0x27, 0, 0, 0], lists].concat();
        std::fs::write(&path, value(digest_list(&digests[..1]))).unwrap();
        assert_eq!(lacks(&path, &list).unwrap(), 1);
        std::fs::write(&path, value([digest_list(&[[9; 32]]), digest_list(&digests)].concat())).unwrap();
        assert_eq!(lacks(&path, &list).unwrap(), 0);
        std::fs::write(&path, value(digest_list(&digests)[..40].to_vec())).unwrap();
        assert_eq!(lacks(&path, &list).unwrap(), 2, "a variable that cannot be read has nothing");
    }
}
