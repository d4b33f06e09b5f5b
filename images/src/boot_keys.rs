//! The site's Secure Boot keys: three RSA-2048 keys in `offline/secure-boot/`, each with a self-signed certificate: PK (who
//! owns the machine), KEK (who may change db and dbx), db (what may run). RSA, because that is all that firmware must know;
//! made by openssl, because ring makes none. Encrypted as signers' keys are (`sealed.rs`), but in a lab.

use crate::files::{PUBLIC, SECRET, make_dir, read_capped, write_atomic};
use crate::sealed::{Passphrase, SealedText, seal_text};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use kiln_release::authenticode::{self, SignError};
use kiln_release::efi::{self, Guid};
use kiln_release::pkcs7::{self, Certificate, Content};
use kiln_release::{hex, kexec};
use rcgen::{CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The keys, by the variables that hold their certificates.
pub const KEYS: [&str; 3] = ["PK", "KEK", "db"];

const MAX_FILE: u64 = 64 << 10;
/// Of an encrypted file. Its `public` is the SHA-256 of the certificate.
const TYPE: &str = "kiln-secure-boot-key";

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
    pub fn open(site: &SiteDir, name: &str, unlock: &mut Unlock<'_>) -> Result<Self, SiteError> {
        let Found { path, text, certificate } = Found::read(site, name)?;
        let pem = match SealedText::read(&path, &text, TYPE)? {
            Some(sealed) if sealed.public() != hex::sha256(&certificate) => {
                return Err(SiteError::KeyFile { path, reason: "its certificate is another key's".into() });
            }
            Some(sealed) => unlock.open(&path, &sealed)?,
            None => {
                unlock.plain.push(path.clone());
                text
            }
        };
        Ok(Self { certificate, key: rsa_key(&path, &pem)? })
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

    /// The copy of a kernel that is kexec'd, and its signature as it lies in the UKI. The kernel itself is not signed: firmware
    /// would start it, with any initramfs.
    pub fn kexec(&self, kernel: &[u8], path: &Path) -> Result<KexecCopy, SiteError> {
        let fail = |source| SiteError::Image { path: path.into(), source };
        let signed = self.image(&kexec::copy(kernel, &[]).map_err(fail)?, path)?;
        let signature = authenticode::signatures(&signed).map_err(fail)?.to_vec();
        let copy = kexec::copy(kernel, &signature).map_err(fail)?;
        Ok(KexecCopy { copy, signature })
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

    pub(crate) fn variable(&self, variable: (&str, Guid, u32), now: Timestamp, value: &[u8]) -> Vec<u8> {
        let at = TimeZone::UTC.to_datetime(now);
        match efi::authenticated(variable, at, value, &self.parsed(), self.never()) {
            Ok(bytes) => bytes,
            Err(never) => match never {},
        }
    }
}

/// A key's files, as they lie there.
struct Found {
    path: PathBuf,
    /// PEM, or encrypted.
    text: String,
    certificate: Vec<u8>,
}

impl Found {
    fn read(site: &SiteDir, name: &str) -> Result<Self, SiteError> {
        let path = site.secure_boot(&format!("{name}.key"));
        let bytes = read_capped(&path, MAX_FILE)?.ok_or_else(|| SiteError::NoSecureBootKey { path: path.clone() })?;
        let beside = site.secure_boot(&format!("{name}.cer"));
        let certificate = read_capped(&beside, MAX_FILE)?;
        let certificate = certificate.ok_or_else(|| SiteError::NoSecureBootKey { path: beside.clone() })?;
        Certificate::parse(&certificate).map_err(|source| SiteError::Key { path: beside, source })?;
        Ok(Self { path, text: String::from_utf8_lossy(&bytes).into_owned(), certificate })
    }
}

/// A kernel as `kexec_file_load` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KexecCopy {
    /// Its bytes, signed.
    pub copy: Vec<u8>,
    /// The signature alone.
    pub signature: Vec<u8>,
}

/// Gives the passphrase of the key at a path.
type Ask<'a> = dyn FnMut(&Path) -> Result<Passphrase, SiteError> + 'a;

/// Who is asked for the passphrases of encrypted keys. One is asked for once: keys that were made together have the same.
pub struct Unlock<'a> {
    ask: Box<Ask<'a>>,
    known: Option<Passphrase>,
    plain: Vec<PathBuf>,
}

impl<'a> Unlock<'a> {
    /// Asked with the key's file.
    pub fn by(ask: impl FnMut(&Path) -> Result<Passphrase, SiteError> + 'a) -> Self {
        Self { ask: Box::new(ask), known: None, plain: Vec::new() }
    }

    /// Nobody is: what is encrypted stays closed.
    pub fn nobody() -> Self {
        Self::by(|path| Err(SiteError::Encrypted { path: path.to_owned() }))
    }

    /// Keys that were read and are not encrypted.
    pub fn plain(&self) -> &[PathBuf] {
        &self.plain
    }

    fn open(&mut self, path: &Path, sealed: &SealedText) -> Result<String, SiteError> {
        if let Some(Ok(text)) = self.known.as_ref().map(|known| sealed.open(known)) {
            return Ok(text);
        }
        let passphrase = (self.ask)(path)?;
        let text = sealed.open(&passphrase)?;
        self.known = Some(passphrase);
        Ok(text)
    }
}

fn rsa_key(path: &Path, pem: &str) -> Result<RsaKeyPair, SiteError> {
    let bad = |reason: String| SiteError::RsaKey { path: path.into(), reason };
    let der = hex::pem_decode("PRIVATE KEY", pem)
        .ok_or_else(|| bad("neither an encrypted key of this site nor a PKCS #8 private key in PEM".into()))?;
    let key = RsaKeyPair::from_pkcs8(&der).map_err(|error| bad(format!("not a usable RSA key: {error}")))?;
    let bits = key.public().modulus_len() * 8;
    if bits == 2048 {
        return Ok(key);
    }
    Err(bad(format!("an RSA key of {bits} bits: UEFI firmware need not know any but 2048")))
}

fn encrypted(certificate: &[u8], pem: String, passphrase: &Passphrase, rounds: u32) -> Result<String, SiteError> {
    seal_text(TYPE, hex::sha256(certificate), pem, passphrase, rounds)
}

/// Makes the keys of a site that has none, encrypted unless there is no passphrase; `rounds` as for
/// [`crate::sealed::make_key`].
pub fn init_secure_boot(site: &SiteDir, passphrase: Option<&Passphrase>, rounds: u32) -> Result<(), SiteError> {
    let folder = site.secure_boot("");
    if let Some(path) = KEYS.iter().map(|name| site.secure_boot(&format!("{name}.key"))).find(|path| path.exists()) {
        return Err(SiteError::SecureBootKeyExists { path });
    }
    make_dir(&folder, 0o700)?;
    for name in KEYS {
        let pem = new_rsa_key()?;
        let path = site.secure_boot(&format!("{name}.key"));
        rsa_key(&path, &pem)?;
        let certificate = certificate(&format!("Kiln Secure Boot {name} of {}", site.name), &pem)?;
        let text = match passphrase {
            Some(passphrase) => encrypted(&certificate, pem, passphrase, rounds)?,
            None => pem,
        };
        write_atomic(&path, text.as_bytes(), SECRET)?;
        write_atomic(&site.secure_boot(&format!("{name}.cer")), &certificate, PUBLIC)?;
    }
    Ok(())
}

/// Encrypts those of the keys that are here and are not encrypted yet; gives their files. What lay there before may still
/// be read from the disk's free space.
pub fn encrypt_secure_boot(site: &SiteDir, passphrase: &Passphrase, rounds: u32) -> Result<Vec<PathBuf>, SiteError> {
    let here = KEYS.into_iter().filter(|name| site.secure_boot(&format!("{name}.key")).exists());
    let here: Vec<&str> = here.collect();
    if here.is_empty() {
        return Err(SiteError::NoSecureBootKey { path: site.secure_boot("db.key") });
    }
    let mut done = Vec::new();
    for name in here {
        let Found { path, text, certificate } = Found::read(site, name)?;
        if SealedText::read(&path, &text, TYPE)?.is_some() {
            continue;
        }
        rsa_key(&path, &text)?;
        write_atomic(&path, encrypted(&certificate, text, passphrase, rounds)?.as_bytes(), SECRET)?;
        done.push(path);
    }
    Ok(done)
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
