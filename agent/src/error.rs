//! Everything that can go wrong, by the step that failed. Each has a stable kebab-case kind for the server, a class
//! that decides between retry and restart, and a message that names what, where and what to do.

use kiln_protocol::{AssignmentError, FreshnessError};
use std::path::PathBuf;

/// What a failure means for the way on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureClass {
    /// The world may get better by itself: try again for ever.
    Unreachable,
    /// What was served is not what was signed: n tries, then restart the machine.
    Verification,
    /// This machine cannot do it: n tries, then restart.
    Machine,
    /// The call was wrong (`kiln-agent stage` only).
    Usage,
}

impl FailureClass {
    /// Exit status of `kiln-agent stage`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Unreachable => 10,
            Self::Verification => 20,
            Self::Machine => 30,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{path}: not what the agent reads: {reason}")]
    Format { path: PathBuf, reason: String },
    #[error("{what}: {source}")]
    System { what: String, source: std::io::Error },
    #[error("no network interface found: is the driver in the image's module list?")]
    NoInterface,
    #[error(
        "no DHCP offer on {interfaces} within {seconds} s: check the cable, the switch port and the site's DHCP server"
    )]
    NoOffer { interfaces: String, seconds: u64 },
    #[error("the lease on {interface} cannot be used: {reason}")]
    BadLease { interface: String, reason: String },
    #[error("no boot server: the image's settings name none, and none answered the agent's DHCP request")]
    NoServer,
    #[error("{url}: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("{url}: the server answered {status}; expected 200 or 206")]
    HttpStatus { url: String, status: u16 },
    #[error("{url}: longer than the {limit} bytes allowed for it")]
    TooLong { url: String, limit: u64 },
    #[error("{url}: slower than {minimum} bytes/s over {seconds} s")]
    TooSlow { url: String, minimum: u64, seconds: u64 },
    #[error("{url}: nothing came for {seconds} s")]
    Stalled { url: String, seconds: u64 },
    #[error("{url}: {tries} tries brought less than {minimum} bytes together: it breaks off again and again")]
    NoProgress { url: String, tries: u32, minimum: u64 },
    #[error("{what}: SHA-256 is {got}, signed is {expected}")]
    HashMismatch { what: &'static str, expected: String, got: String },
    #[error("{what}: {got} bytes, signed are {expected}")]
    LengthMismatch { what: &'static str, expected: u64, got: u64 },
    #[error("{0}")]
    Metadata(#[from] kiln_release::TufError),
    #[error("{0}")]
    Document(#[from] kiln_release::FormatError),
    #[error("{0}")]
    Director(#[from] kiln_release::DirectorError),
    #[error("{0}")]
    Assignment(#[from] AssignmentError),
    #[error("{0}")]
    Freshness(#[from] FreshnessError),
    #[error("assignment names manifest {got}, signed metadata lists {expected} for that release")]
    ManifestMismatch { expected: String, got: String },
    #[error("assignment for {release} expired at {expires}; a different release is started only by one in force")]
    AssignmentExpired { release: String, expires: String },
    #[error("metadata is stale ({what} expired at {expires}); only the release that runs may be booted")]
    StaleMetadata { what: String, expires: String },
    #[error("this image is release {release}, below the floor {floor} signed for {image}: assign a newer one")]
    BelowFloor { image: String, release: u64, floor: u64 },
    #[error("UKI: {0}")]
    Uki(String),
    #[error("kernel's table for the root names root hash {got}, this image embeds {expected}")]
    RunningRoot { expected: String, got: String },
    #[error("another assignment came while this one's release was fetched")]
    Superseded,
    #[error("the agent API's CA in this boot image is not the one that the site signs now: build a release anew")]
    AgentApiCa,
    #[error("{release} is of class {class}; this agent goes only to class normal")]
    Class { release: String, class: String },
    #[error(
        "the kernel runs with the command line {got:?}, signed is {expected:?}, and the release's policy refuses others"
    )]
    CommandLine { expected: String, got: String },
    #[error("{0}")]
    Usage(String),
}

impl AgentError {
    /// Puts the path to an I/O error.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    /// Says what was tried, to a system call's error.
    pub fn system<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::System { what, source: source.into() }
    }

    /// The stable kebab-case word of `Failure::kind`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::File { .. } => "machine-file",
            Self::Format { .. } => "machine-format",
            Self::System { .. } => "machine-system-call",
            Self::NoInterface => "network-no-interface",
            Self::NoOffer { .. } => "network-no-offer",
            Self::BadLease { .. } => "network-bad-lease",
            Self::NoServer => "server-not-found",
            Self::Unreachable { .. } => "server-unreachable",
            Self::HttpStatus { .. } => "server-bad-status",
            Self::TooLong { .. } => "transfer-too-long",
            Self::TooSlow { .. } => "transfer-too-slow",
            Self::Stalled { .. } => "transfer-stalled",
            Self::NoProgress { .. } => "transfer-no-progress",
            Self::HashMismatch { what, .. } => match *what {
                "root artifact" => "root-hash-mismatch",
                "UKI" => "uki-hash-mismatch",
                _ => "artifact-hash-mismatch",
            },
            Self::LengthMismatch { what, .. } => match *what {
                "root artifact" => "root-length-mismatch",
                "UKI" => "uki-length-mismatch",
                _ => "artifact-length-mismatch",
            },
            Self::Metadata(e) => e.kind(),
            Self::Document(e) => e.kind(),
            Self::Director(e) => e.kind(),
            Self::Assignment(e) => e.kind(),
            Self::Freshness(e) => e.kind(),
            Self::ManifestMismatch { .. } => "assignment-manifest-mismatch",
            Self::AssignmentExpired { .. } => "assignment-expired",
            Self::StaleMetadata { .. } => "metadata-stale",
            Self::BelowFloor { .. } => "release-below-floor",
            Self::Uki(_) => "uki-malformed",
            Self::RunningRoot { .. } => "running-root-mismatch",
            Self::Superseded => "assignment-superseded",
            Self::AgentApiCa => "agent-api-ca-mismatch",
            Self::Class { .. } => "release-wrong-class",
            Self::CommandLine { .. } => "command-line-mismatch",
            Self::Usage(_) => "usage",
        }
    }

    /// Retry, restart or neither.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::NoOffer { .. }
            | Self::BadLease { .. }
            | Self::NoServer
            | Self::Unreachable { .. }
            | Self::HttpStatus { .. }
            | Self::TooSlow { .. }
            | Self::Stalled { .. }
            | Self::NoProgress { .. }
            | Self::Superseded => FailureClass::Unreachable,
            Self::TooLong { .. }
            | Self::HashMismatch { .. }
            | Self::LengthMismatch { .. }
            | Self::Metadata(_)
            | Self::Document(_)
            | Self::Director(_)
            | Self::Assignment(_)
            | Self::Freshness(_)
            | Self::ManifestMismatch { .. }
            | Self::AssignmentExpired { .. }
            | Self::StaleMetadata { .. }
            | Self::BelowFloor { .. }
            | Self::Uki(_)
            | Self::RunningRoot { .. }
            | Self::AgentApiCa
            | Self::Class { .. }
            | Self::CommandLine { .. } => FailureClass::Verification,
            Self::File { .. } | Self::Format { .. } | Self::System { .. } | Self::NoInterface => FailureClass::Machine,
            Self::Usage(_) => FailureClass::Usage,
        }
    }
}

pub type Result<T> = std::result::Result<T, AgentError>;
