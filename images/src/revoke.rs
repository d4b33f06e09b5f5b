//! `kiln trust revoke`: a release's boot program is named in dbx, and firmware that has the new dbx refuses it.
//!
//! What is revoked is a line in `offline/secure-boot/revoked`: the Authenticode digest of the UKI, and which release it
//! is. `kiln trust secureboot enroll` makes dbx of them, and where KEK is at hand `site.json` names a signed change of dbx
//! that machines put into their own firmware.

use crate::boot_keys::{SigningKey, Unlock};
use crate::files::{PUBLIC, read_capped, write_atomic};
use crate::secure_boot::{dbx_change, digest};
use crate::signing::{Changed, change_site};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::{Artifact, DbxUpdate, Manifest, RevokedProgram, hex, is_image_name};
use std::fmt::Write as _;

const FILE: &str = "revoked";
/// Ten thousand lines; firmware's own room for dbx is far less (32 KiB at OVMF: some 650 digests).
const MAX_FILE: u64 = 1 << 20;
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

/// Adds a built release to the list. False if it is there already.
pub fn revoke(site: &SiteDir, image: &str, release: u64) -> Result<bool, SiteError> {
    if !is_image_name(image) {
        return Err(SiteError::BadImageName { got: image.to_owned() });
    }
    let _lock = site.lock_offline()?;
    add(site, image, release)
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

fn add(site: &SiteDir, image: &str, release: u64) -> Result<bool, SiteError> {
    let folder = site.build(image, release);
    let path = folder.join("manifest.json");
    let bytes = read_capped(&path, 1 << 20)?.ok_or_else(|| SiteError::NotBuilt { path: path.clone() })?;
    let manifest = Manifest::read(&bytes, image, release).map_err(SiteError::format(path))?;
    let path = folder.join("kiln.efi");
    let uki = read_capped(&path, MAX_UKI)?.ok_or_else(|| SiteError::NotBuilt { path: path.clone() })?;
    let got = hex::sha256(&uki);
    if got != manifest.uki.sha256 {
        return Err(SiteError::ArtifactMismatch { path, expected: manifest.uki.sha256, got });
    }
    let digest = digest(&uki, &path)?;
    let mut all = revoked(site)?;
    if all.iter().any(|(known, _)| *known == digest) {
        return Ok(false);
    }
    all.push((digest, format!("{image}/{release}")));
    let mut text = String::new();
    for (digest, release) in all {
        let _ = writeln!(text, "{} {release}", hex::encode(&digest));
    }
    write_atomic(&site.secure_boot(FILE), text.as_bytes(), PUBLIC)?;
    Ok(true)
}
