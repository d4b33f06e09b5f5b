//! The boot loader on the disk, against the site's list of revoked boot programs.
//!
//! A reimage leaves the loader as it is, so that a release of today may start through the loader of one from long ago. With that
//! one in dbx, firmware starts nothing of the disk any more. So the release that runs puts its own in its place first.

use super::DiskError;
use super::block::Block;
use super::store::Store;
use kiln_release::{authenticode, hex};
use std::collections::BTreeSet;
use std::path::Path;

/// The loader in the initramfs: the UKI's signature covers it.
pub const LOADER: &str = "/kiln/systemd-boot.efi";
/// Where the initramfs leaves it for the running system, in a tmpfs that moves with it.
pub const KEPT: &str = "/run/kiln/loader.efi";

/// Why a list of revoked boot programs waits for the loader on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LoaderHold {
    #[error(
        "its disk starts through a boot loader that the list revokes, or that cannot be read ({0}): the \
         release that runs replaces it once it was healthy after a cold boot"
    )]
    NotGood(&'static str),
    #[error(
        "its disk starts through a boot loader that the list revokes, or that cannot be read ({0}), and \
         there is no other at hand: restart it"
    )]
    NoneKept(&'static str),
    #[error(
        "its disk starts through a boot loader that the list revokes, or that cannot be read ({0}), and the \
         list revokes the release's own: assign it a release with another"
    )]
    OwnRevoked(&'static str),
    #[error("its disk does not answer: whether the list revokes the boot loader on it is not known")]
    NoDisk,
}

/// Leaves the initramfs's loader for the running system. Without it a list may have to wait; the boot goes on.
pub fn keep() {
    let folder = Path::new(KEPT).parent().expect("a constant with a folder");
    let kept = std::fs::create_dir_all(folder).and_then(|()| std::fs::copy(LOADER, KEPT));
    if let Err(error) = kept {
        println!("kiln-agent: the boot loader is not kept for the running system: {error}");
    }
}

/// Makes the loader's two files the same again where they are not, from `own`, of the release that runs and is good; and its
/// settings. Says which were wrong. Two that are the same stay, whichever release brought them, but for two that are
/// `revoked`, where `own` is not; one that is takes no other's place, as the firmware would not start it.
pub fn put_right<B: Block>(
    store: &mut Store<B>,
    own: Option<&[u8]>,
    revoked: &BTreeSet<String>,
) -> Result<Vec<&'static str>, DiskError> {
    let own = own.filter(|own| !is_named(revoked, own));
    let bad = |disk: &str, reason: String| DiskError::ReadBack { disk: disk.to_owned(), reason };
    store.disk().forget();
    let right = match (store.loaders().unwrap_or_default().as_slice(), own) {
        // Of two that the firmware starts neither of, neither is right where there is another.
        ([(_, first), (_, second)], own)
            if first == second && !first.is_empty() && (own.is_none() || !is_named(revoked, first)) =>
        {
            first.clone()
        }
        (_, Some(own)) => own.to_vec(),
        (_, None) => {
            let reason = "the two copies of its boot loader differ, and only a good release has another at hand, if the \
                          firmware does not revoke it";
            return Err(bad(store.name(), reason.to_owned()));
        }
    };
    let wrong = store.wrong_loader_files(&right)?;
    if !wrong.is_empty() {
        store.install_loader(&right)?;
        if let Some(path) = store.wrong_loader_files(&right)?.first() {
            return Err(bad(store.name(), format!("{path} stays as it is")));
        }
    }
    Ok(wrong)
}

/// A file that has no Authenticode digest cannot be named.
fn is_named(revoked: &BTreeSet<String>, file: &[u8]) -> bool {
    authenticode::digest(file).is_ok_and(|digest| revoked.contains(&hex::encode(&digest)))
}

/// Replaces a loader that the list revokes, or that cannot be read and may be one, by `own`, of the release that runs, where that one
/// is `good`. Each file is the old one or the new one whenever power is cut. Says why the list must wait, if it must. `revoked` are Authenticode digests in hex, as the
/// list has them.
pub fn renew<B: Block>(
    store: &mut Store<B>,
    revoked: &BTreeSet<String>,
    good: bool,
    own: Option<&[u8]>,
) -> Result<Option<LoaderHold>, DiskError> {
    let named = |file: &[u8]| is_named(revoked, file);
    let loaders = store.loaders()?;
    let found = loaders.iter().find(|(_, file)| file.is_empty() || named(file));
    let Some(&(path, _)) = found else { return Ok(None) };
    let own = match own {
        _ if !good => return Ok(Some(LoaderHold::NotGood(path))),
        None => return Ok(Some(LoaderHold::NoneKept(path))),
        Some(own) if named(own) => return Ok(Some(LoaderHold::OwnRevoked(path))),
        Some(own) => own,
    };
    store.install_loader(own)?;
    store.disk().forget();
    let other = store.loaders()?.into_iter().find(|(_, file)| file != own);
    other.map_or(Ok(None), |(path, _)| {
        Err(DiskError::ReadBack { disk: store.name().to_owned(), reason: format!("another boot loader in {path}") })
    })
}
