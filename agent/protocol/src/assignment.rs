//! The director's two statements, and the checks an agent makes of them after their signatures hold.
//!
//! Both travel in TUF's `{signed, signatures}` envelope over canonical JSON. What is here is the signed part.

use crate::SPEC_VERSION;
use crate::ids::{Architecture, ImageName, KeyId, MachineId, Nonce, ReleaseId, Sha256Hex};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Gives an error its stable words: `kind()`, and `KINDS`, which is all that it can give. One table makes both, so that
/// what the documents explain can be compared with what there is.
macro_rules! kinds {
    ($error:ident { $($pattern:pat => $kind:literal,)+ }) => {
        impl $error {
            /// Every word that [`Self::kind`] can give.
            pub const KINDS: &'static [&'static str] = &[$($kind),+];

            /// The stable kebab-case word of [`crate::Failure::kind`].
            pub fn kind(&self) -> &'static str {
                match self {
                    $($pattern => $kind,)+
                }
            }
        }
    };
}

/// `_type` of an assignment.
pub const ASSIGNMENT_TYPE: &str = "kiln-assignment";
/// `_type` of a freshness reply.
pub const FRESHNESS_TYPE: &str = "kiln-freshness";

/// The machine an assignment is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundMachine {
    /// SMBIOS UUID: for people.
    pub id: MachineId,
    /// Key id of the machine's identity key: what is checked.
    pub key: KeyId,
}

/// "This machine runs this release": signed by the director, reusable across reboots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// [`ASSIGNMENT_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// [`SPEC_VERSION`].
    pub spec_version: String,
    /// For whom.
    pub machine: BoundMachine,
    /// Which image.
    pub image: ImageName,
    /// Which release of it.
    pub release: u64,
    /// SHA-256 of the manifest's bytes, as the image's TUF delegation lists it.
    pub manifest_sha256: Sha256Hex,
    /// The machine's role.
    pub role: String,
    /// The release's architecture.
    pub arch: Architecture,
    /// Only ever grows for one machine; a higher one may name an older release at or above the floor.
    pub sequence: u64,
    /// Sequence from which on the release has to have been fetched and verified anew: a system that was put up under a lower
    /// one goes to the same release again. 0: none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rebuild: u64,
    /// What the role selects of what the release declares.
    #[serde(default, skip_serializing_if = "RoleSettings::is_default")]
    pub settings: RoleSettings,
    /// When the director signed it.
    pub issued: Timestamp,
    /// From then on it starts no *different* release; the one running may still be booted.
    pub expires: Timestamp,
}

/// What a role selects, signed with the assignment: whoever only answers for the server cannot change it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleSettings {
    /// In disk mode: what the firmware asks first.
    #[serde(default, skip_serializing_if = "is_same")]
    pub boot_first: BootFirst,
    /// What becomes of programs that are on no allow-list.
    #[serde(default, skip_serializing_if = "is_same")]
    pub exec: ExecChoice,
    /// Thresholds for health checks, by the check's name: `10%`, `64M`, `500ms`. Numbers for what the release declares, nothing
    /// else.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub thresholds: BTreeMap<String, String>,
}

/// What the firmware of a machine in disk mode asks first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootFirst {
    /// The disk; the network if that does not start.
    #[default]
    Disk,
    /// The network; the disk if that does not answer.
    Network,
}

/// What becomes of programs that are on no allow-list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecChoice {
    /// What the release says.
    #[default]
    Release,
    /// They start and are told, where the release permits a role to say so.
    Report,
}

impl RoleSettings {
    /// Nothing is selected.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

fn is_same<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Assignment {
    /// The release it names.
    pub fn release_id(&self) -> ReleaseId {
        ReleaseId { image: self.image.clone(), release: self.release }
    }
}

/// "The assignment with this hash is the current one, and the time is this": made per request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freshness {
    /// [`FRESHNESS_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// [`SPEC_VERSION`].
    pub spec_version: String,
    /// The agent's nonce, signed back.
    pub nonce: Nonce,
    /// SHA-256 of the assignment envelope's bytes as delivered.
    pub assignment_sha256: Sha256Hex,
    /// The director's clock.
    pub now: Timestamp,
}

/// What the machine that checks an assignment is and has seen.
#[derive(Debug, Clone, Copy)]
pub struct Running<'a> {
    /// Its own key id.
    pub key: &'a KeyId,
    /// Its architecture.
    pub arch: Architecture,
    /// The image its UKI embeds.
    pub image: &'a ImageName,
    /// Highest sequence seen so far; 0 where there is no memory.
    pub highest_sequence: u64,
    /// Lowest release of the assigned image that may run.
    pub floor: u64,
}

/// Why a validly signed assignment is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum AssignmentError {
    #[error("not an assignment: _type is {got:?}, expected {ASSIGNMENT_TYPE:?}")]
    WrongType { got: String },
    #[error("assignment has spec_version {got:?}; this agent reads {SPEC_VERSION}")]
    WrongSpecVersion { got: String },
    #[error("assignment is for another machine: it names key {got}, this machine's key is {expected}")]
    WrongMachine { expected: KeyId, got: KeyId },
    #[error("assignment is for architecture {got}, this machine is {expected}")]
    WrongArchitecture { expected: Architecture, got: Architecture },
    #[error("assignment names image {got}, but this machine booted image {expected}")]
    WrongImage { expected: ImageName, got: ImageName },
    #[error("assignment has sequence {got}, but {seen} was seen before: it is old, or the server lost its state")]
    OldSequence { seen: u64, got: u64 },
    #[error("assignment has sequence {got}; no honest director comes to {MAX_SEQUENCE}")]
    HighSequence { got: u64 },
    #[error("assignment names {image}/{got}, below the floor {floor} signed for it")]
    BelowFloor { image: ImageName, floor: u64, got: u64 },
}

kinds!(AssignmentError {
    Self::WrongType { .. } => "assignment-wrong-type",
    Self::WrongSpecVersion { .. } => "assignment-wrong-spec-version",
    Self::WrongMachine { .. } => "assignment-wrong-machine",
    Self::WrongArchitecture { .. } => "assignment-wrong-architecture",
    Self::WrongImage { .. } => "assignment-wrong-image",
    Self::OldSequence { .. } => "assignment-old-sequence",
    Self::HighSequence { .. } => "assignment-high-sequence",
    Self::BelowFloor { .. } => "assignment-below-floor",
});

/// Sequences end here: a stolen director's key cannot use them up for the director that comes after it.
pub const MAX_SEQUENCE: u64 = 1 << 48;

/// Checks what a signature cannot: that the assignment is for this machine and not an old one.
///
/// The sequence may equal the highest seen: an assignment is reusable across reboots.
/// Expiry is not judged here: it only stops a change, which the caller knows.
pub fn check_assignment(a: &Assignment, me: &Running<'_>) -> Result<(), AssignmentError> {
    if a.type_ != ASSIGNMENT_TYPE {
        return Err(AssignmentError::WrongType { got: a.type_.clone() });
    }
    if a.spec_version != SPEC_VERSION {
        return Err(AssignmentError::WrongSpecVersion { got: a.spec_version.clone() });
    }
    if a.machine.key != *me.key {
        return Err(AssignmentError::WrongMachine { expected: me.key.clone(), got: a.machine.key.clone() });
    }
    if a.arch != me.arch {
        return Err(AssignmentError::WrongArchitecture { expected: me.arch, got: a.arch });
    }
    if a.image != *me.image {
        return Err(AssignmentError::WrongImage { expected: me.image.clone(), got: a.image.clone() });
    }
    if a.sequence < me.highest_sequence {
        return Err(AssignmentError::OldSequence { seen: me.highest_sequence, got: a.sequence });
    }
    if a.sequence >= MAX_SEQUENCE {
        return Err(AssignmentError::HighSequence { got: a.sequence });
    }
    if a.release < me.floor {
        return Err(AssignmentError::BelowFloor { image: a.image.clone(), floor: me.floor, got: a.release });
    }
    Ok(())
}

/// Why a validly signed freshness reply is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum FreshnessError {
    #[error("not a freshness reply: _type {got_type:?}, spec_version {got_version:?}")]
    WrongType { got_type: String, got_version: String },
    #[error("freshness reply carries another nonce than this agent's: it is replayed")]
    WrongNonce,
    #[error("freshness reply speaks of assignment {got}, the one delivered is {expected}")]
    WrongAssignment { expected: Sha256Hex, got: Sha256Hex },
}

kinds!(FreshnessError {
    Self::WrongType { .. } => "freshness-wrong-type",
    Self::WrongNonce => "freshness-wrong-nonce",
    Self::WrongAssignment { .. } => "freshness-wrong-assignment",
});

/// Checks that a freshness reply answers this request and speaks of this assignment.
pub fn check_freshness(f: &Freshness, nonce: &Nonce, assignment: &Sha256Hex) -> Result<(), FreshnessError> {
    if f.type_ != FRESHNESS_TYPE || f.spec_version != SPEC_VERSION {
        return Err(FreshnessError::WrongType { got_type: f.type_.clone(), got_version: f.spec_version.clone() });
    }
    if f.nonce != *nonce {
        return Err(FreshnessError::WrongNonce);
    }
    if f.assignment_sha256 != *assignment {
        return Err(FreshnessError::WrongAssignment { expected: assignment.clone(), got: f.assignment_sha256.clone() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment() -> Assignment {
        Assignment {
            type_: ASSIGNMENT_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            machine: BoundMachine {
                id: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
                key: "aa".repeat(32).parse().unwrap(),
            },
            image: "minimal".parse().unwrap(),
            release: 2,
            manifest_sha256: "bb".repeat(32).parse().unwrap(),
            role: "lab".into(),
            arch: Architecture::X86_64,
            sequence: 7,
            rebuild: 0,
            settings: RoleSettings::default(),
            issued: "2026-01-01T00:00:00Z".parse().unwrap(),
            expires: "2026-02-01T00:00:00Z".parse().unwrap(),
        }
    }

    #[test]
    fn each_wrong_field_has_its_own_error() {
        let a = assignment();
        let key = a.machine.key.clone();
        let image = a.image.clone();
        let me = Running { key: &key, arch: Architecture::X86_64, image: &image, highest_sequence: 7, floor: 1 };
        assert_eq!(check_assignment(&a, &me), Ok(()), "the same sequence again is a reboot");
        let other_key: KeyId = "cc".repeat(32).parse().unwrap();
        let other_image: ImageName = "other".parse().unwrap();
        let kind = |a: &Assignment, me: &Running<'_>| check_assignment(a, me).unwrap_err().kind();
        assert_eq!(kind(&a, &Running { key: &other_key, ..me }), "assignment-wrong-machine");
        assert_eq!(kind(&a, &Running { arch: Architecture::Aarch64, ..me }), "assignment-wrong-architecture");
        assert_eq!(kind(&a, &Running { image: &other_image, ..me }), "assignment-wrong-image");
        assert_eq!(kind(&a, &Running { highest_sequence: 8, ..me }), "assignment-old-sequence");
        assert_eq!(kind(&a, &Running { floor: 3, ..me }), "assignment-below-floor");
        assert_eq!(kind(&Assignment { type_: "x".into(), ..a.clone() }, &me), "assignment-wrong-type");
        assert_eq!(kind(&Assignment { spec_version: "9".into(), ..a.clone() }, &me), "assignment-wrong-spec-version");
    }

    #[test]
    fn golden_bytes() {
        let golden = r#"{"_type":"kiln-assignment","spec_version":"1.0","machine":{"id":"00000000-0000-0000-0000-000000000001","key":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"},"image":"minimal","release":2,"manifest_sha256":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","role":"lab","arch":"x86_64","sequence":7,"issued":"2026-01-01T00:00:00Z","expires":"2026-02-01T00:00:00Z"}"#;
        assert_eq!(serde_json::to_string(&assignment()).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Assignment>(golden).unwrap(), assignment(), "of before there was `rebuild`");
        let rebuilt = golden.replace(r#""sequence":7,"#, r#""sequence":7,"rebuild":7,"#);
        let expected = Assignment { rebuild: 7, ..assignment() };
        assert_eq!(serde_json::to_string(&expected).unwrap(), rebuilt);
        assert_eq!(serde_json::from_str::<Assignment>(&rebuilt).unwrap(), expected);
    }

    #[test]
    fn what_a_role_selects_is_signed_and_costs_nothing_where_nothing_is_selected() {
        let plain = serde_json::to_string(&assignment()).unwrap();
        assert!(!plain.contains("settings"), "{plain}");
        let thresholds = BTreeMap::new();
        let settings = RoleSettings { boot_first: BootFirst::Network, exec: ExecChoice::Report, thresholds };
        let text = serde_json::to_string(&Assignment { settings: settings.clone(), ..assignment() }).unwrap();
        assert!(text.contains(r#""settings":{"boot_first":"network","exec":"report"}"#), "{text}");
        assert_eq!(serde_json::from_str::<Assignment>(&text).unwrap().settings, settings);
        assert_eq!(serde_json::from_str::<Assignment>(&plain).unwrap(), assignment());
        let newer = text.replace(r#""exec":"report""#, r#""added_later":1"#);
        let read = serde_json::from_str::<Assignment>(&newer).unwrap().settings;
        assert_eq!(read, RoleSettings { exec: ExecChoice::Release, ..settings.clone() });
        let set = RoleSettings { thresholds: [("disk./var".into(), "10%".into())].into(), ..settings };
        let with = text.replace(r#""exec":"report""#, r#""exec":"report","thresholds":{"disk./var":"10%"}"#);
        assert_eq!(serde_json::to_string(&Assignment { settings: set.clone(), ..assignment() }).unwrap(), with);
        assert_eq!(serde_json::from_str::<Assignment>(&with).unwrap().settings, set);
    }
}
