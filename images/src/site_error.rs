//! Errors of the site directory: making it, publishing into it, reading it.

use crate::site::SiteDir;
use kiln_release::pe::PeError;
use kiln_release::{EnvelopeError, FormatError, KeyError, TufError, VerityError};
use std::io;
use std::path::{Path, PathBuf};

/// What failed, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum SiteError {
    #[error("{} holds a site already ({found} is there): choose another directory, or remove the old site by hand", dir.display())]
    SiteExists { dir: PathBuf, found: &'static str },
    #[error("{} holds no site: make one with `kiln trust init --lab {}`", dir.display(), dir.display())]
    NotASite { dir: PathBuf },
    #[error("site name {got:?}: 1 to 64 printable ASCII characters without space are needed")]
    BadName { got: String },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "no space is left for {}: what machines are served has not changed. Free some on its file system, where old \
         folders of DIR/build and DIR/cache are the first to go, and do the same again",
        path.display()
    )]
    DiskFull { path: PathBuf },
    #[error("the operating system gives no random bytes")]
    NoRandomness,
    #[error("cannot make the agent API's certificates: {reason}")]
    Certificate { reason: String },
    #[error("key {}: {source}", path.display())]
    Key { path: PathBuf, source: KeyError },
    #[error("key {} is not here: it is needed to {purpose}", path.display())]
    NoKey { path: PathBuf, purpose: &'static str },
    #[error("{}: {source}", repo.display())]
    Metadata { repo: PathBuf, source: Box<TufError> },
    #[error("no snapshot in {} verifies; the newest, {file}: {source}", dir.display())]
    NoSnapshot { dir: PathBuf, file: String, source: Box<SiteError> },
    #[error("{}: {source}", path.display())]
    Format { path: PathBuf, source: Box<FormatError> },
    #[error("{} is there already: a key or a request is not written over", path.display())]
    FileExists { path: PathBuf },
    #[error(
        "a passphrase of {got} characters is too short: it needs {least}, for example six words that have nothing to do with each other"
    )]
    ShortPassphrase { got: usize, least: usize },
    #[error("{}: the passphrase is wrong, or the file is damaged", path.display())]
    WrongPassphrase { path: PathBuf },
    #[error("{} is encrypted, and nobody is there to ask for its passphrase", path.display())]
    Encrypted { path: PathBuf },
    #[error("the passphrase of {}: {reason}", path.display())]
    NoPassphrase { path: PathBuf, reason: String },
    #[error("{}: {reason}: not a file that this kiln reads", path.display())]
    KeyFile { path: PathBuf, reason: String },
    #[error("{} is no public key of 64 hex digits, as `kiln trust key FILE` leaves it in FILE.pub", path.display())]
    NoPublicKey { path: PathBuf },
    #[error(
        "{role}: {threshold} of {keys} distinct keys cannot be: the threshold is from 1 to the number of keys, which are at most 32, each given once"
    )]
    Quorum { role: String, threshold: u32, keys: usize },
    #[error("the key {name} is of {first} and of {second}: no two TUF roles share a key")]
    SharedKey { name: String, first: String, second: String },
    #[error("{got} days: what is signed offline holds from 1 to {limit} days")]
    Days { got: u32, limit: u32 },
    #[error("{} is not there", path.display())]
    NoRequest { path: PathBuf },
    #[error("not a signing request that can be signed: {reason}")]
    Request { reason: String },
    #[error(
        "{name} waits for signatures in {}, and a site has one open request: `kiln trust status` says what it lacks, \
         `kiln trust apply` brings signatures, `kiln trust drop` gives it up",
        file.display()
    )]
    RequestOpen { name: String, file: PathBuf },
    #[error("no request is open in {}", dir.display())]
    NoOpenRequest { dir: PathBuf },
    #[error(
        "the signatures are of {got:?}, the open request is {open:?} with other documents: carry the open one to the signers"
    )]
    OtherRequest { open: String, got: String },
    #[error("the site's first metadata is not signed yet: {} goes to the signers, `kiln trust apply` brings it back", request.display())]
    Unfinished { request: PathBuf },
    #[error("the key {} ({keyid}) signs nothing in this request", key.display())]
    NotASigner { key: PathBuf, keyid: String },
    #[error(
        "the request does not go on from the root that this key has signed for (SHA-256 {sha256}): it is another site's, or an old one"
    )]
    OtherRoot { sha256: String },
    #[error(
        "{role} version {version}: this key has signed version {last} of it already, so that the request is an old one"
    )]
    SignedNewer { role: String, version: u64, last: u64 },
    #[error(
        "this key has signed another {role} version {version} before. If that request was given up, say so with \
         --instead; two of one version that both reach the threshold could be exchanged for each other"
    )]
    SignedOther { role: String, version: u64 },
    #[error("{role}: whose keys? Say --keys N:FILE.pub,FILE.pub")]
    WhoseKeys { role: String },
    #[error(
        "there is no TUF role {role:?} here: root, targets, snapshot, timestamp, director, or image-NAME of a published image"
    )]
    NoSuchRole { role: String },
    #[error("no role of this site has a key {key}")]
    NoSuchKey { key: String },
    #[error(
        "without the key {key} {role} has {left} keys, and {threshold} must sign: `kiln trust rotate {role} --keys N:FILE.pub,…` names others"
    )]
    TooFewLeft { key: String, role: String, left: usize, threshold: u32 },
    #[error("the floor of {image} is {floor} already: it never goes down")]
    FloorGoesDown { image: String, floor: u64 },
    #[error("{image}/{floor} is not published: with this floor no release of {image} could run")]
    FloorAboveAll { image: String, floor: u64 },
    #[error("no key in {} is the one that the root names for timestamp.json", dir.display())]
    NotTheTimestamp { dir: PathBuf },
    #[error("{programs} revoked boot programs make a dbx of {bytes} bytes, and firmware takes at most {limit}")]
    DbxFull { programs: usize, bytes: u64, limit: u64 },
    #[error("cannot sign {what}: {source}")]
    Sign { what: String, source: EnvelopeError },
    #[error("network configuration {new}: version {old} is signed already, a changed one needs a higher number")]
    NetworkVersion { old: u64, new: u64 },
    #[error(
        "site.json would have {bytes} bytes, and machines read at most {limit}: give machines their addresses by DHCP \
         rather than one by one"
    )]
    SiteTooLong { bytes: u64, limit: u64 },
    #[error("image name {got:?}: 1 to 32 of a-z, 0-9 and `-`, beginning with a letter")]
    BadImageName { got: String },
    #[error("{} is missing: build the release first, `kiln image build RECIPE --site DIR`", path.display())]
    NotBuilt { path: PathBuf },
    #[error("{}: {got}, but the manifest says {expected}: build the release again", path.display())]
    ArtifactMismatch { path: PathBuf, expected: String, got: String },
    #[error("{}: {source}: build the release again", path.display())]
    Verity { path: PathBuf, source: VerityError },
    #[error(
        "{release} is published with manifest {published}, this build's is {built}: a release never changes, give it a new number"
    )]
    PublishedDiffers { release: String, published: String, built: String },
    #[error(
        "the list of releases of {image} would have {bytes} bytes, and machines read at most {limit}: take old \
         releases out with `kiln release prune {image} --keep N`"
    )]
    ListFull { image: String, bytes: u64, limit: u64 },
    #[error(
        "{image}/{release} is not above {image}/{highest}, which was pruned: a release number is never used again, \
         build it with a higher one"
    )]
    NumberUsed { image: String, release: u64, highest: u64 },
    #[error("no release of {image:?} is published: `kiln release list` shows what is")]
    NoSuchImage { image: String },
    #[error(
        "{}: {reason}: it was written by prunes before; restore it from a backup, or remove it and what it lists stays",
        path.display()
    )]
    PruneRecord { path: PathBuf, reason: String },
    #[error("another `kiln serve` runs on {} (it holds {}): stop it first", dir.display(), lock.display())]
    Served { dir: PathBuf, lock: PathBuf },
    #[error(
        "the director's key {} ({keyid}) is not one that site.json names: its assignments would be refused by every \
         machine",
        path.display()
    )]
    NotTheDirector { path: PathBuf, keyid: String },
    #[error("{} is there already: a Secure Boot key is not replaced by another under its name", path.display())]
    SecureBootKeyExists { path: PathBuf },
    #[error("cannot run openssl, which makes RSA keys: {source}; install it with `apt-get install openssl`")]
    NoOpenssl { source: io::Error },
    #[error("openssl cannot make an RSA key ({status}): {last_words}")]
    Openssl { status: String, last_words: String },
    #[error("{}: {reason}", path.display())]
    RsaKey { path: PathBuf, reason: String },
    #[error(
        "{} is not here: it signs boot programs and kernels. `kiln trust secureboot init` makes one for a site that has \
         none; `kiln image build --unsigned` goes without, for machines without Secure Boot",
        path.display()
    )]
    NoSecureBootKey { path: PathBuf },
    #[error("{} cannot be signed: {source}", path.display())]
    Image { path: PathBuf, source: PeError },
    #[error("{}: {reason}: it must be OVMF's variable store as its package brings it, with 4 MiB firmware: OVMF_VARS_4M.fd", path.display())]
    VariableStore { path: PathBuf, reason: &'static str },
    #[error("{}, line {line}: expected a digest and IMAGE/NUMBER", path.display())]
    Revoked { path: PathBuf, line: usize },
}

impl SiteError {
    /// For `map_err` on what the TUF client says of the repository.
    pub(crate) fn metadata(site: &SiteDir) -> impl FnOnce(TufError) -> Self {
        let repo = site.repo();
        move |source| Self::Metadata { repo, source: Box::new(source) }
    }

    /// For `map_err` on a check of a document.
    pub(crate) fn format(path: PathBuf) -> impl FnOnce(FormatError) -> Self {
        move |source| Self::Format { path, source: Box::new(source) }
    }

    /// For `map_err` on reading what the builder leaves.
    pub(crate) fn not_built<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| {
            if source.kind() == io::ErrorKind::NotFound {
                Self::NotBuilt { path: path.to_owned() }
            } else {
                Self::io(action, path)(source)
            }
        }
    }

    /// For `map_err` on an I/O result.
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| {
            let path = path.to_owned();
            if is_full(&source) { Self::DiskFull { path } } else { Self::Io { action, path, source } }
        }
    }
}

/// Whether a write failed for want of space, by the disk's or the user's limit.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
