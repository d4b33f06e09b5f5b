//! `kiln trust revoke`: a release's boot program is named in dbx, and firmware that has the new dbx refuses it.
//!
//! What is revoked is a line in `offline/secure-boot/revoked`: the Authenticode digest of the UKI, and which release it
//! is. `kiln trust secureboot enroll` makes dbx of them.

use crate::files::{PUBLIC, read_capped, write_atomic};
use crate::secure_boot::digest;
use crate::site::SiteDir;
use crate::site_error::SiteError;
use kiln_release::{Manifest, hex, is_image_name};
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
