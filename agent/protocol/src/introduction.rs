//! The short approval code: eight characters that a machine shows on its screen and the server shows to its operators.
//! They are the same exactly when nobody stands between the two.
//!
//! The code is made of both keys and a nonce of each side. Forty bits are few, so nobody may choose: the machine commits
//! itself to its nonce before it hears the server's, and shows it after (as ZRTP does, RFC 6189 §4.4.1.1). Whoever stands
//! between has one try in 2^40 for each introduction, and the server takes few of them. What proves the keys is TLS;
//! nothing here is secret.

use crate::ids::{IdError, KeyId, MachineId, Nonce, Sha256Hex};
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Where both steps are posted.
pub const INTRODUCTION_PATH: &str = "/agent/v1/introduction";
/// Longest step, bytes of JSON.
pub const INTRODUCTION_LIMIT: usize = 4 << 10;

const COMMITMENT: &[u8] = b"kiln-introduction-commitment-1\0";
const CODE: &[u8] = b"kiln-approval-code-1\0";
/// RFC 4648 §6: no 0, 1 and 8, which look like letters.
const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// What the machine posts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "lowercase")]
pub enum Introduction {
    /// First: answered with the server's nonce.
    Commit {
        /// Who it is.
        machine: MachineId,
        /// [`commitment`] of its nonce.
        commitment: Sha256Hex,
    },
    /// Then.
    Reveal {
        /// Who it is.
        machine: MachineId,
        /// Its nonce.
        nonce: Nonce,
    },
}

/// The server's answer to both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntroductionReply {
    /// Its nonce.
    pub nonce: Nonce,
}

/// Eight characters, written `ABCD-EFGH`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ApprovalCode(String);

impl fmt::Display for ApprovalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (left, right) = self.0.split_at(4);
        write!(f, "{left}-{right}")
    }
}

impl FromStr for ApprovalCode {
    type Err = IdError;

    /// As a person types it: in either case, with hyphens and spaces anywhere.
    fn from_str(text: &str) -> Result<Self, IdError> {
        let code: String =
            text.chars().filter(|c| !matches!(c, '-' | ' ')).take(9).map(|c| c.to_ascii_uppercase()).collect();
        if code.len() == 8 && code.bytes().all(|b| BASE32.contains(&b)) {
            Ok(Self(code))
        } else {
            Err(IdError::new("approval code", "eight of A-Z and 2-7, as ABCD-EFGH", text))
        }
    }
}

impl TryFrom<String> for ApprovalCode {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<ApprovalCode> for String {
    fn from(code: ApprovalCode) -> Self {
        code.to_string()
    }
}

fn hash(domain: &[u8], parts: &[&str]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(domain);
    // Each is 64 hex digits: no length is needed between them.
    for part in parts {
        context.update(part.as_bytes());
    }
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// What a machine says first of the nonce that it will show.
pub fn commitment(nonce: &Nonce) -> Sha256Hex {
    let hash = hash(COMMITMENT, &[nonce.as_str()]);
    let digit = |four: u8| char::from_digit(u32::from(four), 16).expect("four bits");
    let hex: String = hash.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
    hex.parse().expect("32 bytes are 64 hex digits")
}

/// The code of two keys and two nonces. `server` is the SHA-256 of the SPKI of the certificate that the machine saw.
pub fn approval_code(machine: &KeyId, server: &KeyId, machine_nonce: &Nonce, server_nonce: &Nonce) -> ApprovalCode {
    let hash = hash(CODE, &[machine.as_str(), server.as_str(), machine_nonce.as_str(), server_nonce.as_str()]);
    let bits = hash[..5].iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
    let letter = |n: u32| {
        let five = usize::try_from(bits >> (35 - 5 * n) & 31).expect("five bits");
        char::from(BASE32[five])
    };
    ApprovalCode((0..8).map(letter).collect())
}

/// The server's side of one introduction, after the commitment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The key that TLS proved.
    pub key: KeyId,
    /// What it committed itself to.
    pub commitment: Sha256Hex,
    /// What it was answered.
    pub nonce: Nonce,
}

/// A nonce was shown that is not the one committed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IntroductionError {
    /// Another key than the one that committed itself.
    #[error("the nonce comes from another key than its commitment")]
    OtherKey,
    /// Another nonce.
    #[error("the nonce is not the one that was committed to")]
    OtherNonce,
}

impl Committed {
    /// The machine shows its nonce; `server` is this server's key.
    pub fn revealed(&self, key: &KeyId, nonce: &Nonce, server: &KeyId) -> Result<ApprovalCode, IntroductionError> {
        if *key != self.key {
            return Err(IntroductionError::OtherKey);
        }
        if commitment(nonce) != self.commitment {
            return Err(IntroductionError::OtherNonce);
        }
        Ok(approval_code(key, server, nonce, &self.nonce))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> KeyId {
        format!("{n:02x}").repeat(32).parse().unwrap()
    }

    fn nonce(n: u8) -> Nonce {
        format!("{n:02x}").repeat(32).parse().unwrap()
    }

    fn introduced(key: &KeyId, mine: &Nonce, theirs: Nonce, server: &KeyId) -> ApprovalCode {
        let committed = Committed { key: key.clone(), commitment: commitment(mine), nonce: theirs };
        committed.revealed(key, mine, server).unwrap()
    }

    #[test]
    fn golden_bytes_and_the_golden_code() {
        let machine: MachineId = "00000000-0000-0000-0000-000000000001".parse().unwrap();
        let commit = Introduction::Commit { machine: machine.clone(), commitment: commitment(&nonce(3)) };
        let golden = format!(
            r#"{{"step":"commit","machine":"{machine}","commitment":"{}"}}"#,
            "4f6240ca5ecd678c259593d6fb6a6092c8bb07810dd9829f5358ce34da54b1f5"
        );
        let text = serde_json::to_string(&commit).unwrap();
        assert_eq!(text, golden);
        assert_eq!(serde_json::from_str::<Introduction>(&text).unwrap(), commit);
        let reveal = Introduction::Reveal { machine, nonce: nonce(3) };
        let text = serde_json::to_string(&reveal).unwrap();
        assert!(text.starts_with(r#"{"step":"reveal","machine":"00000000-"#), "{text}");
        assert_eq!(serde_json::from_str::<Introduction>(&text).unwrap(), reveal);
    }

    #[test]
    fn both_sides_have_one_code_and_a_person_may_type_it_as_they_like() {
        let code = introduced(&key(1), &nonce(3), nonce(4), &key(2));
        // By Python's hashlib and base64.
        assert_eq!(code.to_string(), "HIPJ-XNBD");
        assert_eq!(code, approval_code(&key(1), &key(2), &nonce(3), &nonce(4)));
        let text = code.to_string();
        assert_eq!((text.len(), text.as_bytes()[4]), (9, b'-'));
        for typed in [text.clone(), text.replace('-', ""), text.to_lowercase(), format!(" {text} ")] {
            assert_eq!(typed.parse::<ApprovalCode>().unwrap(), code, "{typed:?}");
        }
        for bad in ["", "ABCD-EFG", "ABCD-EFGHI", "ABCD-EFG1", "ABCDÉFGH"] {
            assert!(bad.parse::<ApprovalCode>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_machine_in_the_middle_gives_other_codes() {
        // Toward the machine it is a server with its own key, toward the server a machine with its own key; it hands on
        // both nonces as they are.
        let (machine, middle, server) = (key(1), key(9), key(2));
        let (mine, theirs) = (nonce(3), nonce(4));
        let on_the_screen = approval_code(&machine, &middle, &mine, &theirs);
        let at_the_server = introduced(&middle, &mine, theirs.clone(), &server);
        assert_ne!(on_the_screen, at_the_server);
        // Only one of the two replaced is seen as well.
        assert_ne!(approval_code(&machine, &server, &mine, &theirs), at_the_server);
        assert_ne!(approval_code(&machine, &server, &mine, &theirs), on_the_screen);
        // It cannot search for a nonce that makes the codes equal: it is bound before it hears the server's.
        let committed = Committed { key: middle.clone(), commitment: commitment(&mine), nonce: theirs };
        assert_eq!(committed.revealed(&middle, &nonce(5), &server), Err(IntroductionError::OtherNonce));
        assert_eq!(committed.revealed(&machine, &mine, &server), Err(IntroductionError::OtherKey));
    }
}
