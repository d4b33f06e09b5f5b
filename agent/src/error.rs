//! Everything that can go wrong, by the step that failed. Each has a stable kebab-case kind for the server, a class
//! that decides between retry and restart, and a message that names what, where and what to do.

use crate::disk::DiskError;
use kiln_protocol::slot::FallbackReason;
use kiln_protocol::{AssignmentError, FreshnessError, OrderError};
use std::path::PathBuf;

/// What is said of the root artifact in an error.
pub const ROOT: &str = "root artifact";
/// What is said of a UKI.
pub const UKI: &str = "UKI";

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
    #[error(
        "{path} holds no identity key of this machine any more: {reason}. It has a new one, and is a stranger to its server \
         until a person says that it is the same machine"
    )]
    LostIdentity { path: PathBuf, reason: String },
    #[error("{what}: {source}")]
    System { what: String, source: std::io::Error },
    #[error("{what}: no answer from the hardware within {seconds} s: the boot goes on without it")]
    DriverSilent { what: String, seconds: u64 },
    #[error("secrets: {reason}")]
    Secrets { reason: String },
    #[error("no network interface found: is the driver in the image's module list?")]
    NoInterface,
    #[error(
        "no DHCP offer on {interfaces} within {seconds} s: check the cable, the switch port and the site's DHCP server"
    )]
    NoOffer { interfaces: String, seconds: u64 },
    #[error("link {link} of the network configuration: no card of this machine is {wanted}")]
    NoCard { link: String, wanted: String },
    #[error(
        "network configuration {version} was left again, and the one before is used: {reason}. It is not tried again: \
         sign one with a higher version"
    )]
    NetworkReverted { version: u64, reason: String },
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
    #[error("{0}")]
    Operator(#[from] kiln_release::OperatorError),
    #[error("{0}")]
    Order(#[from] OrderError),
    #[error(
        "an order is not followed: it could be given again, as it cannot be remembered that it was taken: {reason}"
    )]
    OrderUnkept { reason: String },
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
    #[error("the root on {place} is not as it was signed any more: {reason}. It is fetched anew")]
    RootRotten { place: String, reason: String },
    #[error(
        "the root on {place} cannot be read: {reason}. It may be whole: its slot stays as it is, unless a boot server was there \
         or another release is good"
    )]
    RootUnread { place: String, reason: String },
    #[error("another assignment came while this one's release was fetched")]
    Superseded,
    #[error("the agent API's CA in this boot image is not the one that the site signs now: build a release anew")]
    AgentApiCa,
    #[error(
        "{url} shows a key of the agent API that the site does not name: the boot server's before this one, or a thief's"
    )]
    AgentApiKey { url: String },
    #[error(
        "what is kept of {release} on the disk is not what this machine wrote there last: an older copy, put back? Without a \
         boot server nothing starts by it"
    )]
    OtherRecord { release: String },
    #[error("{release} is of class {class}; from a disk only class normal starts")]
    Class { release: String, class: String },
    #[error(
        "the kernel runs with the command line {got:?}, signed is {expected:?}, and the release's policy refuses others"
    )]
    CommandLine { expected: String, got: String },
    #[error("{release} failed on this machine ({reason}); it came back on the release before")]
    FellBack { release: String, reason: FallbackReason },
    #[error(
        "{release} was started {starts} times in a row and never became healthy: safe mode, which starts nothing and \
         reports. A new assignment ends it; without one the release is tried once more every {minutes} min"
    )]
    BootLoop { release: String, starts: u32, minutes: u64 },
    #[error(
        "no kernel is loaded for a kexec in this boot any more: a boot has one load, and it was used, or kexec is switched \
         off. The next release comes through firmware"
    )]
    KexecSpent,
    #[error(
        "the hardware watchdog takes no more than {seconds} s, and a kexec without a petting may last {least} s: it is a \
         cold boot"
    )]
    ShortWatchdog { seconds: i32, least: i32 },
    #[error("{what} gives no answer, and a kexec may wait for it without end: only a cold boot leaves this system")]
    KexecHangs { what: String },
    #[error("the next release does not fit into memory beside this one, and nothing but a kexec leads from here to it")]
    NoWayOut,
    #[error("{0}")]
    Disk(#[from] DiskError),
    #[error("the TPM: {0}")]
    Tpm(#[from] crate::tpm::TpmFault),
    #[error("there is no TPM")]
    NoTpm,
    #[error("the TPM gave no answer within {seconds} s")]
    SilentTpm { seconds: u64 },
    #[error("hook {hook} holds the machine: {reason}")]
    DrainHook { hook: String, reason: String },
    #[error("{0}")]
    Usage(String),
}

impl AgentError {
    /// Puts the path to an I/O error.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    /// What gave no answer, if this is about that.
    pub fn hung(&self) -> Option<&str> {
        let (Self::Disk(DiskError::Late { disk: what, .. } | DiskError::LeftOut { disk: what })
        | Self::DriverSilent { what, .. }) = self
        else {
            return None;
        };
        Some(what)
    }

    /// Of a slot that was whole when it was written: what it gives back else was altered since.
    #[must_use]
    pub fn of_whole_slot(self) -> Self {
        if let Self::Disk(DiskError::ReadBack { disk, reason }) = self {
            Self::RootRotten { place: disk, reason }
        } else {
            self
        }
    }

    /// Of a system call that reads the root at `place`: the kernel's words for what is not as it was signed, or cannot be read. An
    /// I/O error may be either; `is_corrupted`: dm-verity says that it met the former.
    #[must_use]
    pub fn of_root(self, place: &str, is_corrupted: bool) -> Self {
        let Self::System { source, .. } = &self else { return self };
        let (place, reason) = (place.to_owned(), self.to_string());
        match source.raw_os_error() {
            Some(libc::EIO) if !is_corrupted => Self::RootUnread { place, reason },
            Some(libc::EIO | libc::EINVAL | libc::EUCLEAN | libc::EBADMSG) => Self::RootRotten { place, reason },
            Some(_) | None => self,
        }
    }

    /// Says what was tried, to a system call's error.
    pub fn system<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::System { what, source: source.into() }
    }
}

/// The one list of kinds: what each variant is called, and its class. `kind()`, `class()` and the list that the documents
/// are compared with are made of it.
macro_rules! kinds {
    ({ $($pattern:pat => $kind:literal, $class:ident;)+ } of { $($variant:ident($error:ty), $of_class:ident;)+ }) => {
        impl AgentError {
            /// The stable kebab-case word of `Failure::kind`.
            pub fn kind(&self) -> &'static str {
                match self {
                    $($pattern => $kind,)+
                    $(Self::$variant(error) => error.kind(),)+
                }
            }

            /// Retry, restart or neither.
            pub fn class(&self) -> FailureClass {
                match self {
                    $($pattern => FailureClass::$class,)+
                    $(Self::$variant(_) => FailureClass::$of_class,)+
                }
            }

            /// Every kind there is.
            #[cfg(test)]
            fn kinds() -> Vec<(&'static str, FailureClass)> {
                let own = [$(($kind, FailureClass::$class)),+];
                let of_others = [$((<$error>::KINDS, FailureClass::$of_class)),+];
                let of_others = of_others.iter().flat_map(|(kinds, class)| kinds.iter().map(|kind| (*kind, *class)));
                own.into_iter().chain(of_others).collect()
            }
        }
    };
}

kinds!({
    Self::File { .. } => "machine-file", Machine;
    Self::Format { .. } => "machine-format", Machine;
    Self::LostIdentity { .. } => "identity-lost", Machine;
    Self::System { .. } => "machine-system-call", Machine;
    Self::NoInterface => "network-no-interface", Machine;
    Self::NoOffer { .. } => "network-no-offer", Unreachable;
    Self::NoCard { .. } => "network-no-card", Unreachable;
    Self::NetworkReverted { .. } => "network-config-reverted", Machine;
    Self::BadLease { .. } => "network-bad-lease", Unreachable;
    Self::NoServer => "server-not-found", Unreachable;
    Self::Unreachable { .. } => "server-unreachable", Unreachable;
    Self::HttpStatus { .. } => "server-bad-status", Unreachable;
    Self::TooSlow { .. } => "transfer-too-slow", Unreachable;
    Self::Stalled { .. } => "transfer-stalled", Unreachable;
    Self::NoProgress { .. } => "transfer-no-progress", Unreachable;
    Self::Superseded => "assignment-superseded", Unreachable;
    Self::TooLong { .. } => "transfer-too-long", Verification;
    Self::HashMismatch { what: ROOT, .. } => "root-hash-mismatch", Verification;
    Self::HashMismatch { what: UKI, .. } => "uki-hash-mismatch", Verification;
    Self::HashMismatch { .. } => "artifact-hash-mismatch", Verification;
    Self::LengthMismatch { what: ROOT, .. } => "root-length-mismatch", Verification;
    Self::LengthMismatch { .. } => "uki-length-mismatch", Verification;
    Self::ManifestMismatch { .. } => "assignment-manifest-mismatch", Verification;
    Self::AssignmentExpired { .. } => "assignment-expired", Verification;
    Self::StaleMetadata { .. } => "metadata-stale", Verification;
    Self::BelowFloor { .. } => "release-below-floor", Verification;
    Self::Uki(_) => "uki-malformed", Verification;
    Self::RunningRoot { .. } => "running-root-mismatch", Verification;
    Self::AgentApiCa => "agent-api-ca-mismatch", Verification;
    // Another server may show one that counts, or newer metadata name this one.
    Self::AgentApiKey { .. } => "agent-api-key-revoked", Unreachable;
    Self::OrderUnkept { .. } => "order-not-remembered", Verification;
    Self::OtherRecord { .. } => "disk-other-record", Verification;
    Self::Class { .. } => "release-wrong-class", Verification;
    Self::CommandLine { .. } => "command-line-mismatch", Verification;
    Self::DriverSilent { .. } => "machine-driver-silent", Machine;
    Self::FellBack { .. } => "trial-fell-back", Machine;
    Self::BootLoop { .. } => "boot-loop", Machine;
    Self::KexecSpent => "kexec-spent", Machine;
    Self::ShortWatchdog { .. } => "kexec-short-watchdog", Machine;
    Self::KexecHangs { .. } => "kexec-disk-hangs", Machine;
    Self::NoWayOut => "safe-mode-no-memory", Machine;
    Self::DrainHook { .. } => "drain-hook", Machine;
    Self::Tpm(_) | Self::NoTpm | Self::SilentTpm { .. } => "machine-tpm", Machine;
    Self::Secrets { .. } => "machine-secrets", Machine;
    Self::RootRotten { .. } => "root-rotten", Machine;
    Self::RootUnread { .. } => "root-unreadable", Machine;
    Self::Usage(_) => "usage", Usage;
} of {
    Metadata(kiln_release::TufError), Verification;
    Document(kiln_release::FormatError), Verification;
    Director(kiln_release::DirectorError), Verification;
    Assignment(AssignmentError), Verification;
    Freshness(FreshnessError), Verification;
    Operator(kiln_release::OperatorError), Verification;
    Order(OrderError), Verification;
    Disk(DiskError), Machine;
});

pub type Result<T> = std::result::Result<T, AgentError>;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// The words of the first column under each class's heading.
    fn documented() -> Vec<(String, FailureClass)> {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md")).unwrap();
        let section = page.split("\n## ").find(|s| s.starts_with("Every reason an agent gives\n")).unwrap();
        let mut class = None;
        let mut found = Vec::new();
        for line in section.lines() {
            let headings = [
                ("**Unreachable.**", FailureClass::Unreachable),
                ("**Verification.**", FailureClass::Verification),
                ("**Machine.**", FailureClass::Machine),
                ("**Usage.**", FailureClass::Usage),
            ];
            class = headings.into_iter().find(|(text, _)| line.starts_with(text)).map(|(_, class)| class).or(class);
            if let Some(row) = line.strip_prefix("| `") {
                let cells: Vec<&str> = row.split('|').map(str::trim).collect();
                assert!(cells.len() == 4 && !cells[1].is_empty() && !cells[2].is_empty(), "{line}");
                let kinds = cells[0].split('`').filter(|text| !matches!(text.trim(), "" | ","));
                found.extend(kinds.map(|kind| (kind.to_owned(), class.expect("a heading comes first"))));
            }
        }
        found
    }

    #[test]
    fn operators_find_every_reason_in_the_documents_and_no_other() {
        let found = documented();
        let once: BTreeMap<&str, FailureClass> = found.iter().map(|(kind, class)| (kind.as_str(), *class)).collect();
        assert_eq!(once.len(), found.len(), "a reason is explained twice");
        let known = AgentError::kinds();
        let expected: BTreeMap<&str, FailureClass> = known.iter().copied().collect();
        assert_eq!(expected.len(), known.len(), "two failures share a word");
        for (kind, class) in &expected {
            assert_eq!(once.get(kind), Some(class), "docs/operations.md is to explain `{kind}` under {class:?}");
        }
        for kind in once.keys() {
            assert!(expected.contains_key(kind), "docs/operations.md explains `{kind}`, which no agent says");
        }
    }

    #[test]
    fn the_list_is_what_errors_say_of_themselves() {
        let hash = |what| AgentError::HashMismatch { what, expected: String::new(), got: String::new() };
        let length = |what| AgentError::LengthMismatch { what, expected: 1, got: 2 };
        let tuf = kiln_release::TufError::Missing { file: String::new() };
        for (error, kind) in [
            (hash(ROOT), "root-hash-mismatch"),
            (hash(UKI), "uki-hash-mismatch"),
            (hash("UKI's kernel"), "artifact-hash-mismatch"),
            (length(ROOT), "root-length-mismatch"),
            (length(UKI), "uki-length-mismatch"),
            (tuf.into(), "metadata-missing"),
        ] {
            assert_eq!((error.kind(), error.class()), (kind, FailureClass::Verification));
            assert!(AgentError::kinds().contains(&(kind, FailureClass::Verification)));
        }
        let read_back = || DiskError::ReadBack { disk: "vda".into(), reason: "another root hash".into() };
        let (written, whole) = (AgentError::from(read_back()), AgentError::from(read_back()).of_whole_slot());
        assert_eq!((written.kind(), whole.kind()), ("disk-read-back", "root-rotten"));
        assert!(whole.to_string().contains("vda is not as it was signed any more: another root hash"), "{whole}");
        assert_eq!(AgentError::from(DiskError::NoDisk).of_whole_slot().kind(), "disk-none");
        let read = |code| AgentError::system("mounting /dev/dm-0")(std::io::Error::from_raw_os_error(code));
        assert_eq!(read(libc::EIO).kind(), "machine-system-call", "of what reads no root it says nothing");
        for (code, is_corrupted, kind) in [
            (libc::EIO, true, "root-rotten"),
            (libc::EIO, false, "root-unreadable"),
            (libc::EUCLEAN, false, "root-rotten"),
            (libc::ENOENT, true, "machine-system-call"),
        ] {
            assert_eq!(read(code).of_root("/dev/vda2", is_corrupted).kind(), kind);
        }
        let kebab = |kind: &str| kind.bytes().all(|b| b == b'-' || b.is_ascii_lowercase());
        assert!(AgentError::kinds().iter().all(|(kind, _)| kebab(kind)));
    }
}
