//! How a machine proves what it booted and which TPM it has: two posts over mutual TLS, and one before it goes by kexec.
//!
//! The machine says which endorsement and attestation keys its TPM has. The server answers with a nonce, and with a
//! *credential*: a secret that only the TPM with that endorsement key gives out, and only while the attestation key lies in
//! it. The machine shows the secret and a quote over its PCRs; both are good once. TLS proves the machine's own key, the quote
//! names it ([`crate::tpm::qualifying_data`]), so that neither a copied key without the TPM nor a TPM lent to another key will do.

use crate::ids::{IdError, MachineId, Nonce, Sha256Hex, word_enum};
use crate::secrets::Delivered;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Where each step is posted.
pub const ATTESTATION_PATH: &str = "/agent/v1/attestation";
/// Longest step, bytes of JSON.
pub const ATTESTATION_LIMIT: usize = 512 << 10;
/// Longest event log that is sent, in bytes. One that is longer is not sent: a part of it replays to nothing.
pub const EVENT_LOG_LIMIT: usize = 128 << 10;
/// Longest list of what the kernel measured, in bytes: some five hundred modules. One that is longer is not sent, for the same reason.
pub const IMA_LIST_LIMIT: usize = 96 << 10;

word_enum! {
    /// What the agent found of a TPM.
    TpmPresence {
        /// It answers, and has a SHA-256 bank.
        Ready = "ready",
        /// There is none, or no driver for it in the boot image.
        Absent = "absent",
        /// There is one that the agent cannot use.
        Unusable = "unusable",
    }
}

word_enum! {
    /// What is known of what a machine booted, in this boot.
    AttestationState {
        /// Its TPM's quote says that it booted what its release says.
        Attested = "attested",
        /// Nothing was proven, and nothing was contradicted.
        Unattested = "unattested",
        /// What its TPM says contradicts its release, or the proof is false.
        Failed = "failed",
        /// It has none.
        NoTpm = "no-tpm",
    }
}

/// Bytes, on the wire as lower-case hex digits.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HexBytes(pub Vec<u8>);

impl HexBytes {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for HexBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl From<HexBytes> for String {
    fn from(bytes: HexBytes) -> Self {
        let digit = |four: u8| char::from_digit(u32::from(four), 16).expect("four bits");
        bytes.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
    }
}

impl TryFrom<String> for HexBytes {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
            return Err(IdError::new("bytes", "an even number of hex digits", "an odd one"));
        };
        let bytes = pairs.iter().map(|[high, low]| Some(value(*high)? << 4 | value(*low)?)).collect::<Option<_>>();
        bytes.map(Self).ok_or_else(|| IdError::new("bytes", "lower-case hex digits", "something else"))
    }
}

/// What the machine posts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "lowercase")]
pub enum Attestation {
    /// First: answered with a [`Challenge`].
    Hello {
        /// Who it is.
        machine: MachineId,
        /// Its kernel's boot id, as it reports it.
        boot_id: String,
        /// Public area of its endorsement key.
        endorsement: HexBytes,
        /// Public area of its attestation key.
        attestation: HexBytes,
    },
    /// Then: answered with a [`Judged`].
    Prove {
        /// Who it is.
        machine: MachineId,
        /// As before.
        boot_id: String,
        /// What the TPM took out of the credential.
        secret: Sha256Hex,
        /// Values of [`crate::tpm::QUOTED`], in that order.
        pcrs: Vec<Sha256Hex>,
        /// What the TPM signed.
        quoted: HexBytes,
        /// Its signature.
        signature: HexBytes,
        /// The firmware's event log; empty where the kernel has none.
        event_log: HexBytes,
        /// What the kernel that runs has measured (`binary_runtime_measurements`), with the agent's own word in it where it measures no
        /// kexec; empty: an agent that asks for no measuring.
        #[serde(default, skip_serializing_if = "HexBytes::is_empty")]
        measured: HexBytes,
        /// Public area of the key that its secrets shall be sealed to ([`crate::tpm::Template::Delivery`]); none: it asks for
        /// none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        delivery: Option<HexBytes>,
    },
    /// Before it goes by kexec, once the next kernel is loaded: answered with a [`Judged`] of the boot that comes. What the kernel that
    /// goes has measured is known to nobody afterwards, and PCR 10 goes on.
    Leave {
        /// Who it is.
        machine: MachineId,
        /// As before.
        boot_id: String,
        /// As in a proof.
        measured: HexBytes,
    },
}

/// The server's answer to the first step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// For the quote.
    pub nonce: Nonce,
    /// `TPMS_ID_OBJECT` of the credential.
    pub id_object: HexBytes,
    /// What the endorsement key opens it with.
    pub encrypted_secret: HexBytes,
}

/// The server's answer to the second.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// What came of it.
    pub state: AttestationState,
    /// Why, in a sentence.
    pub reason: String,
    /// What it asked for, if it may have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets: Option<Delivered>,
    /// Why it does not get what it asked for, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let machine: MachineId = "00000000-0000-0000-0000-000000000001".parse().unwrap();
        let hello = Attestation::Hello {
            machine: machine.clone(),
            boot_id: "b".into(),
            endorsement: HexBytes(vec![0, 0x1f]),
            attestation: HexBytes(vec![0xff]),
        };
        let golden = format!(
            r#"{{"step":"hello","machine":"{machine}","boot_id":"b","endorsement":"001f","attestation":"ff"}}"#
        );
        assert_eq!(serde_json::to_string(&hello).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Attestation>(&golden).unwrap(), hello);
        let prove = Attestation::Prove {
            machine: machine.clone(),
            boot_id: "b".into(),
            secret: "ab".repeat(32).parse().unwrap(),
            pcrs: vec!["cd".repeat(32).parse().unwrap()],
            quoted: HexBytes(vec![1]),
            signature: HexBytes(vec![2]),
            event_log: HexBytes::default(),
            measured: HexBytes::default(),
            delivery: None,
        };
        let golden = format!(
            r#"{{"step":"prove","machine":"{machine}","boot_id":"b","secret":"{}","pcrs":["{}"],"quoted":"01","signature":"02","event_log":""}}"#,
            "ab".repeat(32),
            "cd".repeat(32),
        );
        assert_eq!(serde_json::to_string(&prove).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Attestation>(&golden).unwrap(), prove);
        let leave = Attestation::Leave { machine: machine.clone(), boot_id: "b".into(), measured: HexBytes(vec![10]) };
        let golden = format!(r#"{{"step":"leave","machine":"{machine}","boot_id":"b","measured":"0a"}}"#);
        assert_eq!(serde_json::to_string(&leave).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Attestation>(&golden).unwrap(), leave);
        let judged = r#"{"state":"no-tpm","reason":"r"}"#;
        assert_eq!(serde_json::from_str::<Judged>(judged).unwrap().state, AttestationState::NoTpm);
    }

    #[test]
    fn bytes_are_an_even_number_of_lower_case_digits() {
        for bad in ["0", "0G", "AB", "a ", "é"] {
            assert!(HexBytes::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        let all: Vec<u8> = (0..=255).collect();
        let text = String::from(HexBytes(all.clone()));
        assert_eq!(HexBytes::try_from(text).unwrap().0, all);
        assert_eq!(format!("{:?}", HexBytes(all)), "256 bytes", "a secret is not shown");
    }
}
