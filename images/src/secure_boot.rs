//! The site's Secure Boot keys, what they sign, and the files that make firmware trust them.
//!
//! Three RSA-2048 keys in `offline/secure-boot/`, each with a self-signed certificate: PK (who owns the machine), KEK
//! (who may change db and dbx), db (what may run). RSA, because that is all that firmware must know; made by openssl,
//! because ring makes none. Everything else is done here, without a program of others: see docs/adr/0005.

use crate::files::{PUBLIC, SECRET, make_dir, read_capped, write_atomic};
use crate::ovmf;
use crate::revoke;
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use kiln_release::authenticode::{self, SignError};
use kiln_release::efi::{self, APPEND, AUTHENTICATED, DATABASE, GLOBAL, Guid};
use kiln_release::pkcs7::{self, Certificate, Content};
use kiln_release::{hex, pe};
use rcgen::{CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The keys, by the variables that hold their certificates.
pub const KEYS: [&str; 3] = ["PK", "KEK", "db"];

const MAX_FILE: u64 = 64 << 10;
const MAX_STORE: u64 = 4 << 20;

impl SiteDir {
    /// Where the Secure Boot keys and the list of what is revoked are.
    pub fn secure_boot(&self, file: &str) -> PathBuf {
        self.path.join("offline/secure-boot").join(file)
    }
}

/// A key with its certificate.
#[derive(Debug)]
pub struct SigningKey {
    /// X.509, DER.
    pub certificate: Vec<u8>,
    key: RsaKeyPair,
}

impl SigningKey {
    /// One of [`KEYS`].
    pub fn open(site: &SiteDir, name: &str) -> Result<Self, SiteError> {
        let path = site.secure_boot(&format!("{name}.key"));
        let pem = read_capped(&path, MAX_FILE)?.ok_or_else(|| SiteError::NoSecureBootKey { path: path.clone() })?;
        let key = rsa_key(&path, &pem)?;
        let beside = site.secure_boot(&format!("{name}.cer"));
        let certificate = read_capped(&beside, MAX_FILE)?;
        let certificate = certificate.ok_or_else(|| SiteError::NoSecureBootKey { path: beside.clone() })?;
        Certificate::parse(&certificate).map_err(|source| SiteError::Key { path: beside, source })?;
        Ok(Self { certificate, key })
    }

    /// SHA-256 of the certificate: how a machine knows it in its db.
    pub fn fingerprint(&self) -> String {
        hex::sha256(&self.certificate)
    }

    fn parsed(&self) -> Certificate<'_> {
        Certificate::parse(&self.certificate).expect("it was parsed when it was read")
    }

    /// RSASSA-PKCS1-v1_5 with SHA-256. It takes no randomness: ring asks for a source that it does not use.
    fn raw(&self, message: &[u8]) -> Vec<u8> {
        let mut signature = vec![0; self.key.public().modulus_len()];
        self.key
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature)
            .expect("the signature has the length of the modulus");
        signature
    }

    fn never(&self) -> impl FnOnce(&[u8]) -> Result<Vec<u8>, Infallible> {
        |message| Ok(self.raw(message))
    }

    /// A PE image with its signature; `path` says in an error which one.
    pub fn image(&self, file: &[u8], path: &Path) -> Result<Vec<u8>, SiteError> {
        authenticode::sign(file, &self.parsed(), self.never()).map_err(|error| match error {
            SignError::Image(source) => SiteError::Image { path: path.into(), source },
            SignError::Key(never) => match never {},
        })
    }

    /// A detached signature of bytes, as dm-verity takes it of a root hash: without the certificate, which the kernel
    /// has from db.
    pub fn detached(&self, bytes: &[u8]) -> Vec<u8> {
        self.plain(Content::Detached(bytes))
    }

    /// A signature that encloses the bytes, as IPE takes a policy.
    pub fn enclosing(&self, bytes: &[u8]) -> Vec<u8> {
        self.plain(Content::Enclosed(bytes))
    }

    fn plain(&self, content: Content<'_>) -> Vec<u8> {
        match pkcs7::signed_data(content, &self.parsed(), false, self.never()) {
            Ok(data) => pkcs7::enveloped(&data),
            Err(never) => match never {},
        }
    }

    fn variable(&self, variable: (&str, Guid, u32), now: Timestamp, value: &[u8]) -> Vec<u8> {
        let at = TimeZone::UTC.to_datetime(now);
        match efi::authenticated(variable, at, value, &self.parsed(), self.never()) {
            Ok(bytes) => bytes,
            Err(never) => match never {},
        }
    }
}

fn rsa_key(path: &Path, pem: &[u8]) -> Result<RsaKeyPair, SiteError> {
    let bad = |reason: String| SiteError::RsaKey { path: path.into(), reason };
    let der = hex::pem_decode("PRIVATE KEY", &String::from_utf8_lossy(pem))
        .ok_or_else(|| bad("not an unencrypted PKCS #8 private key in PEM".into()))?;
    let key = RsaKeyPair::from_pkcs8(&der).map_err(|error| bad(format!("not a usable RSA key: {error}")))?;
    let bits = key.public().modulus_len() * 8;
    if bits == 2048 {
        return Ok(key);
    }
    Err(bad(format!("an RSA key of {bits} bits: UEFI firmware need not know any but 2048")))
}

/// Makes the keys of a site that has none.
pub fn init_secure_boot(site: &SiteDir) -> Result<(), SiteError> {
    let folder = site.secure_boot("");
    if let Some(path) = KEYS.iter().map(|name| site.secure_boot(&format!("{name}.key"))).find(|path| path.exists()) {
        return Err(SiteError::SecureBootKeyExists { path });
    }
    make_dir(&folder, 0o700)?;
    for name in KEYS {
        let pem = new_rsa_key()?;
        let path = site.secure_boot(&format!("{name}.key"));
        rsa_key(&path, pem.as_bytes())?;
        let certificate = certificate(&format!("Kiln Secure Boot {name} of {}", site.name), &pem)?;
        write_atomic(&path, pem.as_bytes(), SECRET)?;
        write_atomic(&site.secure_boot(&format!("{name}.cer")), &certificate, PUBLIC)?;
    }
    Ok(())
}

fn new_rsa_key() -> Result<String, SiteError> {
    let mut command = Command::new("openssl");
    command.args(["genpkey", "-quiet", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]);
    // An ordinary user's settings are not asked.
    command.env("OPENSSL_CONF", "/dev/null").stdin(Stdio::null());
    let output = command.output().map_err(|source| SiteError::NoOpenssl { source })?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let last_words = words.lines().last().unwrap_or_default().to_owned();
        return Err(SiteError::Openssl { status: output.status.to_string(), last_words });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Self-signed. Firmware looks at no date, and other readers take the ones here: a machine whose clock is wrong must
/// boot.
fn certificate(common_name: &str, pem: &str) -> Result<Vec<u8>, SiteError> {
    let fail = |error: rcgen::Error| SiteError::Certificate { reason: error.to_string() };
    let key = KeyPair::from_pkcs8_pem_and_sign_algo(pem, &rcgen::PKCS_RSA_SHA256).map_err(fail)?;
    let mut params = CertificateParams::new(Vec::new()).map_err(fail)?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2049, 12, 31);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    Ok(params.self_signed(&key).map_err(fail)?.der().to_vec())
}

/// What `enroll` wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolment {
    /// Every file.
    pub files: Vec<PathBuf>,
    /// How many releases dbx names.
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
) -> Result<Enrolment, SiteError> {
    let keys = KEYS.map(|name| SigningKey::open(site, name));
    let [pk, kek, db] = keys;
    let (pk, kek, db) = (pk?, kek?, db?);
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
    Ok(Enrolment { files, revoked: revoked.len(), allowed: allow.len() })
}

/// The signed change of dbx that names these digests. It adds to what is there: a vendor's own entries stay, and firmware
/// leaves out what it has already.
pub(crate) fn dbx_change(kek: &SigningKey, digests: &[[u8; 32]], now: Timestamp) -> Vec<u8> {
    kek.variable(("dbx", DATABASE, APPEND), now, &efi::digest_list(digests))
}

/// A kernel as it lies in a UKI: with no signature but the site's, if there is a key.
pub(crate) fn kernel(file: &[u8], key: Option<&SigningKey>, path: &Path) -> Result<Vec<u8>, SiteError> {
    let bare = authenticode::strip(file).map_err(|source| SiteError::Image { path: path.into(), source })?;
    key.map_or(Ok(bare.clone()), |key| key.image(&bare, path))
}

/// Most that a boot program of others has.
const MAX_PROGRAM: u64 = 64 << 20;

/// A boot program of others, iPXE say, with no signature but the site's, written to `out`. Gives back whether shim would
/// start it too: that needs a `.sbat` section.
pub fn sign_program(site: &SiteDir, program: &Path, out: &Path) -> Result<bool, SiteError> {
    let key = SigningKey::open(site, "db")?;
    let missing = || SiteError::io("read", program)(ErrorKind::NotFound.into());
    let file = read_capped(program, MAX_PROGRAM)?.ok_or_else(missing)?;
    let signed = kernel(&file, Some(&key), program)?;
    write_atomic(out, &signed, PUBLIC)?;
    let pe = pe::Pe::parse(&signed).map_err(|source| SiteError::Image { path: program.into(), source })?;
    Ok(pe.sections.iter().any(|section| section.name == ".sbat"))
}

/// The Authenticode digest of a file: what dbx names.
pub(crate) fn digest(file: &[u8], path: &Path) -> Result<[u8; 32], SiteError> {
    authenticode::digest(file).map_err(|source: pe::PeError| SiteError::Image { path: path.into(), source })
}
