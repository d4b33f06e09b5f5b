//! What the site's Secure Boot keys sign of others', and the files that make firmware trust them. Everything is done here,
//! without a program of others: see docs/adr/0005. The keys themselves are in `boot_keys.rs`.

use crate::boot_keys::{SigningKey, Unlock};
use crate::files::{PUBLIC, make_dir, read_capped, write_atomic};
use crate::ovmf;
use crate::revoke;
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use kiln_release::efi::{self, APPEND, AUTHENTICATED, DATABASE, GLOBAL};
use kiln_release::{authenticode, pe};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const MAX_STORE: u64 = 4 << 20;

/// What `enroll` wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolment {
    /// Every file.
    pub files: Vec<PathBuf>,
    /// Of how many releases dbx names programs.
    pub revoked: usize,
    /// How many images db names besides.
    pub allowed: usize,
}

/// Writes what firmware takes: for each variable the certificate (`.cer`), the signature list (`.esl`) and the
/// authenticated change (`.auth`); with `ovmf`, a copy of that variable store that has them enrolled. `allow`: Authenticode
/// digests of images that db names, as a machine's own option ROMs.
pub fn enroll(
    site: &SiteDir,
    out: &Path,
    ovmf: Option<&Path>,
    allow: &BTreeSet<[u8; 32]>,
    now: Timestamp,
    unlock: &mut Unlock<'_>,
) -> Result<Enrolment, SiteError> {
    let mut open = |name| SigningKey::open(site, name, unlock);
    let (pk, kek, db) = (open("PK")?, open("KEK")?, open("db")?);
    make_dir(out, 0o755)?;
    let mut files = Vec::new();
    let mut write = |name: String, bytes: &[u8]| {
        let path = out.join(name);
        write_atomic(&path, bytes, PUBLIC)?;
        files.push(path);
        Ok::<_, SiteError>(())
    };
    let mut values = Vec::new();
    for (name, vendor, key, signer) in
        [("PK", GLOBAL, &pk, &pk), ("KEK", GLOBAL, &kek, &pk), ("db", DATABASE, &db, &kek)]
    {
        let mut list = efi::certificate_list(&key.certificate);
        if name == "db" && !allow.is_empty() {
            let allow: Vec<[u8; 32]> = allow.iter().copied().collect();
            list.extend(efi::digest_list(&allow));
        }
        write(format!("{name}.cer"), &key.certificate)?;
        write(format!("{name}.esl"), &list)?;
        write(format!("{name}.auth"), &signer.variable((name, vendor, AUTHENTICATED), now, &list))?;
        values.push((name, vendor, list));
    }
    let revoked = revoke::revoked(site)?;
    if !revoked.is_empty() {
        let digests: Vec<[u8; 32]> = revoked.iter().map(|(digest, _)| *digest).collect();
        let list = efi::digest_list(&digests);
        write("dbx.esl".into(), &list)?;
        write("dbx.auth".into(), &dbx_change(&kek, &digests, now))?;
        values.push(("dbx", DATABASE, list));
    }
    if let Some(template) = ovmf {
        let wrong = |reason| SiteError::VariableStore { path: template.into(), reason };
        let store = read_capped(template, MAX_STORE)?.ok_or_else(|| wrong("it is not there"))?;
        let time = efi::time(TimeZone::UTC.to_datetime(now));
        let store = ovmf::enroll(store, &values, time).map_err(wrong)?;
        write("OVMF_VARS.fd".into(), &store)?;
    }
    let releases: BTreeSet<&str> = revoked.iter().map(|(_, release)| release.as_str()).collect();
    Ok(Enrolment { files, revoked: releases.len(), allowed: allow.len() })
}

/// The signed change of dbx that names these digests. It adds to what is there: a vendor's own entries stay, and firmware
/// leaves out what it has already.
pub(crate) fn dbx_change(kek: &SigningKey, digests: &[[u8; 32]], now: Timestamp) -> Vec<u8> {
    kek.variable(("dbx", DATABASE, APPEND), now, &efi::digest_list(digests))
}

/// An image without the signatures that it came with.
pub(crate) fn bare(file: &[u8], path: &Path) -> Result<Vec<u8>, SiteError> {
    authenticode::strip(file).map_err(|source| SiteError::Image { path: path.into(), source })
}

/// Most that a boot program of others has.
const MAX_PROGRAM: u64 = 64 << 20;

/// A boot program of others, iPXE say, with no signature but the site's, written to `out`. Gives back whether shim would
/// start it too: that needs a `.sbat` section.
pub fn sign_program(site: &SiteDir, program: &Path, out: &Path, unlock: &mut Unlock<'_>) -> Result<bool, SiteError> {
    let key = SigningKey::open(site, "db", unlock)?;
    let missing = || SiteError::io("read", program)(ErrorKind::NotFound.into());
    let file = read_capped(program, MAX_PROGRAM)?.ok_or_else(missing)?;
    let signed = key.image(&bare(&file, program)?, program)?;
    write_atomic(out, &signed, PUBLIC)?;
    let pe = pe::Pe::parse(&signed).map_err(|source| SiteError::Image { path: program.into(), source })?;
    Ok(pe.sections.iter().any(|section| section.name == ".sbat"))
}

/// The Authenticode digest of a file: what dbx names.
pub(crate) fn digest(file: &[u8], path: &Path) -> Result<[u8; 32], SiteError> {
    authenticode::digest(file).map_err(|source: pe::PeError| SiteError::Image { path: path.into(), source })
}
