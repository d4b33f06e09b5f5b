//! What can be wrong with a file of a repository.

/// A defect of one role's file. All but the first group are of how it lies in the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    Expired,
    WrongType,
    SpecVersion(&'static str),
    NoVersion,
    VersionZero,
    NegativeVersion,
    NoExpires,
    ExpiresWithFraction,
    ExpiresWithOffset,
    UnknownField,
    ThresholdZero,
    KeyIdTwice,
    KeyIdUnknown,
    KeyUnderTwoNames,
    TopLevelDelegation,
    DelegationTwice,
    PathsAndPrefixes,
    NeitherPathsNorPrefixes,
    NoTerminating,
    TargetWithoutHash,
    TargetUnknownHash,
    TargetHashUpperCase,
    TargetHashWrong,
    TargetLengthWrong,
    TargetNegativeLength,
    NotListed,
    ListedHashWrong,
    ListedLengthWrong,
    ListedVersionWrong,
    ListedNoHashes,
    ListedUnknownHash,
    TooFewSignatures,
    ForeignSignature,
    SignatureTwice,
    SignatureEmpty,
    SignatureUnknown,
    SignatureUpperCase,
    SignatureNotHex,
    Pretty,
    Missing,
    Truncated,
    FlippedByte,
    JsonKeyTwice,
    TrailingBytes,
    OtherRolesFile,
}

use Defect::*;

pub const OF_DOCUMENT: [Defect; 12] = [
    Expired,
    WrongType,
    SpecVersion("2.0.0"),
    SpecVersion("1.99"),
    SpecVersion("1"),
    SpecVersion("1.0.x"),
    NoVersion,
    VersionZero,
    NegativeVersion,
    NoExpires,
    ExpiresWithFraction,
    UnknownField,
];
pub const OF_KEYS: [Defect; 4] = [ThresholdZero, KeyIdTwice, KeyIdUnknown, KeyUnderTwoNames];
pub const OF_DELEGATIONS: [Defect; 5] =
    [TopLevelDelegation, DelegationTwice, PathsAndPrefixes, NeitherPathsNorPrefixes, NoTerminating];
pub const OF_TARGETS: [Defect; 6] = [
    TargetWithoutHash,
    TargetUnknownHash,
    TargetHashUpperCase,
    TargetHashWrong,
    TargetLengthWrong,
    TargetNegativeLength,
];
pub const OF_LISTING: [Defect; 6] =
    [NotListed, ListedHashWrong, ListedLengthWrong, ListedVersionWrong, ListedNoHashes, ListedUnknownHash];
pub const OF_FILE: [Defect; 15] = [
    TooFewSignatures,
    ForeignSignature,
    SignatureTwice,
    SignatureEmpty,
    SignatureUnknown,
    SignatureUpperCase,
    SignatureNotHex,
    Pretty,
    Missing,
    Truncated,
    FlippedByte,
    JsonKeyTwice,
    TrailingBytes,
    OtherRolesFile,
    ExpiresWithOffset,
];
