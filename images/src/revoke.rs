//! `kiln trust revoke`: a release's boot programs are named in dbx, and firmware that has the new dbx refuses them.
//!
//! What is revoked is a line in `offline/secure-boot/revoked`: the Authenticode digest of a program, and of which release it
//! is: its UKI, and what else it has that the site signed, as far as no release that stays needs it. `kiln trust secureboot
//! enroll` makes dbx of them, and where KEK is at hand `site.json` names a signed change of dbx that machines put into their
//! own firmware.

use crate::boot_keys::{SigningKey, Unlock};
use crate::files::{PUBLIC, read_capped, write_atomic};
use crate::repository::Repository;
use crate::secure_boot::{dbx_change, digest};
use crate::signing::{Changed, change_site};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::pe::{Pe, PeError};
use kiln_release::{Artifact, DbxUpdate, Manifest, RevokedProgram, hex, is_image_name, kexec};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::Path;

const FILE: &str = "revoked";
/// Ten thousand lines; firmware's own room for dbx is far less (32 KiB at OVMF: some 650 digests).
const MAX_FILE: u64 = 1 << 20;
/// Far more than any manifest.
const MAX_MANIFEST: u64 = 1 << 20;
/// Far more than any UKI.
const MAX_UKI: u64 = 1 << 30;

/// Every revoked boot program: digest, and its release.
pub(crate) fn revoked(site: &SiteDir) -> Result<Vec<([u8; 32], String)>, SiteError> {
    let path = site.secure_boot(FILE);
    let text = read_capped(&path, MAX_FILE)?.unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let parsed = line.split_once(' ').and_then(|(digest, release)| {
            let digest: [u8; 32] = hex::decode(digest)?.try_into().ok()?;
            Some((digest, release.to_owned()))
        });
        all.push(parsed.ok_or_else(|| SiteError::Revoked { path: path.clone(), line: number + 1 })?);
    }
    Ok(all)
}

/// Adds what a built release starts from to the list. False if all of it is there already.
pub fn revoke(site: &SiteDir, image: &str, release: u64, now: Timestamp) -> Result<bool, SiteError> {
    if !is_image_name(image) {
        return Err(SiteError::BadImageName { got: image.to_owned() });
    }
    let _lock = site.lock_offline()?;
    add(site, image, release, now)
}

/// Signs the change of dbx for all that is revoked, and names it in `site.json`. Machines take it up as far as they need
/// nothing of what it names.
pub fn publish_dbx(site: &SiteDir, now: Timestamp, unlock: &mut Unlock<'_>) -> Result<Changed, SiteError> {
    let all = revoked(site)?;
    let revoked =
        all.iter().map(|(digest, release)| RevokedProgram { digest: hex::encode(digest), release: release.clone() });
    let revoked: Vec<RevokedProgram> = revoked.collect();
    let kek = SigningKey::open(site, "KEK", unlock)?;
    let bytes = dbx_change(&kek, &all.iter().map(|(digest, _)| *digest).collect::<Vec<_>>(), now);
    let update = Artifact { sha256: hex::sha256(&bytes), length: bytes.len() as u64 };
    if update.length > DbxUpdate::LIMIT {
        return Err(SiteError::DbxFull { programs: revoked.len(), bytes: update.length, limit: DbxUpdate::LIMIT });
    }
    let name = format!("{} revoked boot programs", revoked.len());
    change_site(&site.path, now, name, |document| {
        if document.dbx.as_ref().is_some_and(|dbx| dbx.revoked == revoked) {
            return Ok(false);
        }
        // Nobody asks for it until the signed site.json names it.
        write_atomic(&site.artifact(&update.sha256), &bytes, PUBLIC)?;
        document.dbx = Some(DbxUpdate { update, revoked });
        Ok(true)
    })
}

fn add(site: &SiteDir, image: &str, release: u64, now: Timestamp) -> Result<bool, SiteError> {
    let folder = site.build(image, release);
    let path = folder.join("manifest.json");
    let bytes = read_capped(&path, MAX_MANIFEST)?.ok_or_else(|| SiteError::NotBuilt { path: path.clone() })?;
    let manifest = Manifest::read(&bytes, image, release).map_err(SiteError::format(path))?;
    let path = folder.join("kiln.efi");
    let uki = read_capped(&path, MAX_UKI)?.ok_or_else(|| SiteError::NotBuilt { path: path.clone() })?;
    let got = hex::sha256(&uki);
    if got != manifest.uki.sha256 {
        return Err(SiteError::ArtifactMismatch { path, expected: manifest.uki.sha256, got });
    }
    let name = format!("{image}/{release}");
    let mut all = revoked(site)?;
    let mut staying = staying(site, now)?;
    staying.retain(|release, _| *release != name && all.iter().all(|(_, revoked)| revoked != release));
    let mut programs = vec![digest(&uki, &path)?];
    if !staying.values().any(|staying| signed_kernel(staying) == signed_kernel(&manifest)) {
        programs.extend(signed_kernel_digest(&uki, &path)?);
    }
    programs.extend(superseded_loader(&manifest, &staying));
    let before = all.len();
    for program in programs {
        if all.iter().all(|(known, _)| *known != program) {
            all.push((program, name.clone()));
        }
    }
    if all.len() == before {
        return Ok(false);
    }
    let mut text = String::new();
    for (digest, release) in all {
        let _ = writeln!(text, "{} {release}", hex::encode(&digest));
    }
    write_atomic(&site.secure_boot(FILE), text.as_bytes(), PUBLIC)?;
    Ok(true)
}

/// Every release that is published or built.
fn staying(site: &SiteDir, now: Timestamp) -> Result<BTreeMap<String, Manifest>, SiteError> {
    let published = Repository::newest(site, now)?.releases;
    let name = |manifest: &Manifest| format!("{}/{}", manifest.image, manifest.release);
    let mut all: BTreeMap<String, Manifest> =
        published.into_iter().map(|release| (name(&release.manifest), release.manifest)).collect();
    let folder = site.path.join("build");
    for image in names(&folder)? {
        for number in names(&folder.join(&image))? {
            let Ok(release) = number.parse::<u64>() else { continue }; // what a build that was killed left
            let path = site.build(&image, release).join("manifest.json");
            let Some(bytes) = read_capped(&path, MAX_MANIFEST)? else { continue };
            let manifest = Manifest::read(&bytes, &image, release).map_err(SiteError::format(path))?;
            all.insert(name(&manifest), manifest);
        }
    }
    Ok(all)
}

fn names(folder: &Path) -> Result<Vec<String>, SiteError> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        entries => entries.map_err(SiteError::io("list", folder))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(SiteError::io("list", folder))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Which kernel a release has that the site signed, as its manifest tells it: releases with the same one have the same here.
/// None: it is not signed for Secure Boot.
fn signed_kernel(manifest: &Manifest) -> Option<(bool, &str)> {
    let digest = match &manifest.measured {
        Some(measured) => measured.certificate.as_ref().map(|_| measured.kernel.as_str())?,
        None => manifest.kernel.sha256.as_str(),
    };
    Some((manifest.kexec_kernel.is_some(), digest))
}

/// The digest of that kernel: of the copy for a kexec, or of the one in the UKI where that one was signed. Firmware starts the
/// latter with any initramfs. The former it refuses with or without dbx; shim does not look at what tells it to, and looks
/// here.
fn signed_kernel_digest(uki: &[u8], path: &Path) -> Result<Option<[u8; 32]>, SiteError> {
    let fail = |source| SiteError::Image { path: path.into(), source };
    let pe = Pe::parse(uki).map_err(fail)?;
    let kernel = pe.content(uki, ".linux").map_err(fail)?;
    match pe.content(uki, kexec::SIGNATURE_SECTION) {
        Err(PeError::NoSection { .. }) => {
            let signed = Pe::parse(kernel).is_ok_and(|kernel| kernel.certificates != (0, 0));
            signed.then(|| digest(kernel, path)).transpose()
        }
        signature => {
            let copy = kexec::copy(kernel, signature.map_err(fail)?).map_err(fail)?;
            digest(&copy, path).map(Some)
        }
    }
}

/// The release's boot loader, if releases that stay have loaders and none has this one. While none stays nothing is said of it:
/// the next build may have the same, and would never start.
fn superseded_loader(manifest: &Manifest, staying: &BTreeMap<String, Manifest>) -> Option<[u8; 32]> {
    let loader = |manifest: &Manifest| manifest.measured.as_ref().and_then(|measured| measured.loader.clone());
    let mine = loader(manifest)?;
    let others: Vec<String> = staying.values().filter_map(loader).collect();
    if others.is_empty() || others.contains(&mine) {
        return None;
    }
    hex::decode(&mine)?.try_into().ok()
}
