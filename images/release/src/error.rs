//! Errors of this crate. Variants are named for the attack or the failed step; `kind()` is a stable word for
//! reports and tests.

use jiff::Timestamp;

/// Gives an error its stable words: `kind()`, and `KINDS`, which is all that it can give. One table makes both, so that
/// what the documents explain can be compared with what there is.
macro_rules! kinds {
    ($error:ident { $($pattern:pat => $kind:literal,)+ }) => {
        impl $error {
            /// Every word that [`Self::kind`] can give.
            pub const KINDS: &'static [&'static str] = &[$($kind),+];

            /// A stable kebab-case word.
            pub fn kind(&self) -> &'static str {
                match self {
                    $($pattern => $kind,)+
                }
            }
        }
    };
}

/// Why a value has no canonical form, or a text is not strict JSON.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum CanonicalError {
    #[error("canonical JSON has no floating-point numbers, got {got}")]
    Float { got: String },
    #[error("not strict JSON: {reason}")]
    NotJson { reason: String },
}

/// Why bytes are not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum KeyError {
    #[error("an Ed25519 public key is 64 hex digits, got {got:?}")]
    NotEd25519 { got: String },
    #[error("keys of type {keytype:?} with scheme {scheme:?} are not supported; use ed25519")]
    UnsupportedScheme { keytype: String, scheme: String },
    #[error("not a {scheme:?} public key in PEM (\"PUBLIC KEY\")")]
    NotPublicPem { scheme: crate::key::Scheme },
    #[error("no PEM block \"PRIVATE KEY\"")]
    NotPem,
    #[error("not an unencrypted PKCS#8 Ed25519 private key")]
    NotPkcs8Ed25519,
    #[error("the PKCS#8 file holds a public key that is not its private key's")]
    PublicKeyOfAnotherSeed,
    #[error("not a self-signed Ed25519 X.509 v3 certificate: {reason}")]
    Certificate { reason: &'static str },
    #[error("the certificate is not signed by its own key")]
    CertificateSignature,
}

/// Why a signed object is refused, before its document could be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum EnvelopeError {
    #[error("{got} bytes or more, at most {limit} are allowed")]
    TooLong { limit: u64, got: u64 },
    #[error("malformed: {reason}")]
    Malformed { reason: String },
    #[error("signed by {got} trusted keys, {expected} are needed")]
    BadSignature { expected: u32, got: u32 },
    #[error("_type is {got:?}, expected {expected:?}")]
    WrongType { expected: &'static str, got: String },
}

/// Why a statement of the director is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("statement of the director refused: {0}")]
pub struct DirectorError(#[from] pub EnvelopeError);

kinds!(DirectorError {
    Self(EnvelopeError::TooLong { .. }) => "director-too-long",
    Self(EnvelopeError::Malformed { .. }) => "director-malformed",
    Self(EnvelopeError::BadSignature { .. }) => "director-bad-signature",
    Self(EnvelopeError::WrongType { .. }) => "director-wrong-type",
});

/// Why an operator's order is refused before it could be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum OperatorError {
    #[error("order refused: the site names no operator keys (`kiln trust operators` does)")]
    NoOperators,
    #[error("order refused: it is not of this site's operators: {0}")]
    Envelope(#[from] EnvelopeError),
}

kinds!(OperatorError {
    Self::NoOperators => "order-no-operators",
    Self::Envelope(EnvelopeError::TooLong { .. }) => "order-too-long",
    Self::Envelope(EnvelopeError::Malformed { .. }) => "order-malformed",
    Self::Envelope(EnvelopeError::BadSignature { .. }) => "order-bad-signature",
    Self::Envelope(EnvelopeError::WrongType { .. }) => "order-not-an-order",
});

/// Why the client refuses what the repository served. `file` is the path under the repository's base URL, and
/// `trusted root` for the root the client started from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TufError {
    #[error(
        "{file}: signed by {got} keys of its TUF role, {expected} are needed: not from this site, or altered on the way"
    )]
    BadSignature { file: String, expected: u32, got: u32 },
    #[error("{file}: malformed: {reason}")]
    Malformed { file: String, reason: String },
    #[error("{file}: _type is {got:?}, expected {expected:?}: one TUF role's file was served as another's")]
    WrongType { file: String, expected: &'static str, got: String },
    #[error("{file}: spec_version {got:?}; this client reads 1.x")]
    UnsupportedSpecVersion { file: String, got: String },
    #[error("{file}: {got} bytes or more, at most {limit} are allowed")]
    TooLong { file: String, limit: u64, got: u64 },
    #[error("{file}: names {role} version {got}, but {seen} was seen before: an old repository is served")]
    Rollback { file: String, role: String, seen: u64, got: u64 },
    #[error("{file}: no longer lists {role}, which was seen before in version {seen}")]
    RoleRemoved { file: String, role: String, seen: u64 },
    #[error("{file}: version is {got}, expected {expected}: files of different repository states are mixed")]
    VersionMismatch { file: String, expected: u64, got: u64 },
    #[error("{file}: expired at {expires}, it is {now}: renew it, or the repository is frozen")]
    Expired { file: String, expires: Timestamp, now: Timestamp },
    #[error("{file}: {algorithm} is {got}, expected {expected}")]
    HashMismatch { file: String, algorithm: &'static str, expected: String, got: String },
    #[error("{file}: {got} bytes, signed as {expected}")]
    LengthMismatch { file: String, expected: u64, got: u64 },
    #[error("{file}: lists {role} with no hash of a known algorithm (sha256, sha512)")]
    NoKnownHash { file: String, role: String },
    #[error("the repository has no {file}")]
    Missing { file: String },
    #[error("the root chain goes on after {limit} new roots: endless, or this root is far too old")]
    EndlessRootChain { limit: u32 },
    #[error("{file}: does not list TUF role {role}, which is delegated to")]
    RoleNotListed { file: String, role: String },
    #[error("more than {limit} TUF roles were visited in search of {path}")]
    TooManyRoles { path: String, limit: u32 },
    #[error("no TUF role lists target {path}")]
    TargetNotListed { path: String },
    #[error("target path {path:?} is refused: {reason}")]
    BadTargetPath { path: String, reason: &'static str },
    #[error("the client asked for nothing, yet was fed")]
    NotAsked,
    #[error("the update did not end: {file} is still to be fetched")]
    Unfinished { file: String },
}

kinds!(TufError {
    Self::BadSignature { .. } => "metadata-bad-signature",
    Self::Malformed { .. } => "metadata-malformed",
    Self::WrongType { .. } => "metadata-wrong-type",
    Self::UnsupportedSpecVersion { .. } => "metadata-unsupported-spec-version",
    Self::TooLong { .. } => "metadata-too-long",
    Self::Rollback { .. } => "metadata-rollback",
    Self::RoleRemoved { .. } => "metadata-role-removed",
    Self::VersionMismatch { .. } => "metadata-version-mismatch",
    Self::Expired { .. } => "metadata-expired",
    Self::HashMismatch { .. } => "metadata-hash-mismatch",
    Self::LengthMismatch { .. } => "metadata-length-mismatch",
    Self::NoKnownHash { .. } => "metadata-no-known-hash",
    Self::Missing { .. } => "metadata-missing",
    Self::EndlessRootChain { .. } => "metadata-endless-root-chain",
    Self::RoleNotListed { .. } => "metadata-role-not-listed",
    Self::TooManyRoles { .. } => "metadata-too-many-roles",
    Self::TargetNotListed { .. } => "target-not-listed",
    Self::BadTargetPath { .. } => "target-bad-path",
    Self::NotAsked => "client-not-asked",
    Self::Unfinished { .. } => "client-unfinished",
});

impl TufError {
    pub(crate) fn of_envelope(file: &str, error: EnvelopeError) -> Self {
        let file = file.to_owned();
        match error {
            EnvelopeError::TooLong { limit, got } => Self::TooLong { file, limit, got },
            EnvelopeError::Malformed { reason } => Self::Malformed { file, reason },
            EnvelopeError::BadSignature { expected, got } => Self::BadSignature { file, expected, got },
            EnvelopeError::WrongType { expected, got } => Self::WrongType { file, expected, got },
        }
    }
}

/// Why a validly signed document of Kiln's own is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum FormatError {
    #[error("{what}: not JSON of its format: {reason}")]
    Malformed { what: &'static str, reason: String },
    #[error("{what}: _type is {got:?}, expected {expected:?}")]
    WrongType { what: &'static str, expected: &'static str, got: String },
    #[error("{what}: spec_version {got:?}; this version of kiln reads 1.x")]
    WrongSpecVersion { what: &'static str, got: String },
    #[error("{what}: {field} is {got:?}: {reason}")]
    BadField { what: &'static str, field: &'static str, got: String, reason: &'static str },
    #[error("manifest is of {got}, expected {expected}")]
    WrongRelease { expected: String, got: String },
    #[error(
        "{field} is {got:?} in the verified manifest, but this boot program was built with {expected:?}: it may boot only what it embeds"
    )]
    ForeignBoot { field: &'static str, expected: String, got: String },
}

kinds!(FormatError {
    Self::Malformed { .. } => "format-malformed",
    Self::WrongType { .. } => "format-wrong-type",
    Self::WrongSpecVersion { .. } => "format-wrong-spec-version",
    Self::BadField { .. } => "format-bad-field",
    Self::WrongRelease { .. } => "manifest-wrong-release",
    Self::ForeignBoot { .. } => "manifest-not-of-this-boot",
});

/// Why a verity tree or superblock is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum VerityError {
    #[error("a verity tree needs at least one data block")]
    NoData,
    #[error("a salt has at most 256 bytes, got {got}")]
    SaltTooLong { got: usize },
    #[error("verity parameter {field} is {got:?}: {reason}")]
    BadParameter { field: &'static str, got: String, reason: &'static str },
    #[error("verity superblock: {field} is {got}, expected {expected}")]
    Superblock { field: &'static str, expected: String, got: String },
    #[error("the data's root hash is {got}, expected {expected}")]
    RootMismatch { expected: String, got: String },
    #[error("the verity tree or its superblock is not that of the data, from byte {offset} of the hash area")]
    TreeMismatch { offset: u64 },
}

kinds!(VerityError {
    Self::NoData => "verity-no-data",
    Self::SaltTooLong { .. } => "verity-salt-too-long",
    Self::BadParameter { .. } => "verity-bad-parameter",
    Self::Superblock { .. } => "verity-superblock",
    Self::RootMismatch { .. } => "verity-root-mismatch",
    Self::TreeMismatch { .. } => "verity-tree-mismatch",
});

/// An error's text with those of its causes: of many an HTTP error the outermost says little.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
