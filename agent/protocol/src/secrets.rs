//! Secrets of an image's programs: their names, what a machine holds of them, and how a set of them travels.
//!
//! The set comes with the answer to a proof ([`crate::Judged`]), sealed twice over: a credential that only the machine's TPM
//! opens, and only while its PCRs are as that proof quoted them ([`crate::tpm::delivery_policy`]), holds a key; the key opens
//! the set. Everything here is bytes in, bytes out.

use crate::ids::{IdError, MachineId, Nonce, word_enum};
use crate::{HexBytes, SecretName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Longest value of a secret, bytes.
pub const SECRET_LIMIT: usize = 16 << 10;
/// Most secrets of one release.
pub const SECRETS_OF_A_RELEASE: usize = 32;
/// All values of one machine together, bytes.
pub const SECRETS_OF_A_MACHINE: usize = 64 << 10;
const MAGIC: &[u8; 4] = b"KSB1";
const BOUND_TO: &[u8] = b"kiln-secrets-1\0";

/// What a machine holds, by the versions that the server gave.
pub type SecretVersions = BTreeMap<SecretName, u64>;

word_enum! {
    /// What the server says of a machine's secrets.
    SecretsWord {
        /// There are others for it than it holds: they come with the answer to a proof.
        Ask = "ask",
        /// There are none for it any more: what it holds is to be forgotten.
        Drop = "drop",
    }
}

/// A machine's secrets, sealed to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivered {
    /// `TPMS_ID_OBJECT` of the credential that holds the key.
    pub id_object: HexBytes,
    /// What the endorsement key opens it with.
    pub encrypted_secret: HexBytes,
    /// [`SecretSet::encode`], under AES-256-GCM with that key, which seals nothing else, and a nonce of zeros; the tag is behind
    /// it, and [`bound_to`] is authenticated.
    pub sealed: HexBytes,
}

/// What a sealed set is good for: this machine's proof by this nonce in this boot.
pub fn bound_to(machine: &MachineId, boot_id: &str, nonce: &Nonce) -> Vec<u8> {
    // Two of fixed length, then the rest.
    [BOUND_TO, machine.as_str().as_bytes(), nonce.as_str().as_bytes(), boot_id.as_bytes()].concat()
}

/// Not a set of secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("what was sealed is no set of secrets: {0}")]
pub struct SecretSetError(&'static str);

/// Names, versions and values. It is never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretSet<'a>(pub BTreeMap<SecretName, (u64, &'a [u8])>);

impl fmt::Debug for SecretSet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} secrets", self.0.len())
    }
}

impl<'a> SecretSet<'a> {
    /// As bytes: magic, then for each name (length in one byte), version (8 bytes), value (length in 4 bytes).
    pub fn encode(&self) -> Vec<u8> {
        let room = self.0.iter().map(|(name, (_, value))| 13 + name.as_str().len() + value.len()).sum::<usize>();
        // Grown once: no copy of a value stays behind in memory that was given back.
        let mut out = Vec::with_capacity(MAGIC.len() + room + 16);
        out.extend(MAGIC);
        for (name, (version, value)) in &self.0 {
            out.push(u8::try_from(name.as_str().len()).expect("a secret's name has at most 63 bytes"));
            out.extend(name.as_str().as_bytes());
            out.extend(version.to_be_bytes());
            out.extend(u32::try_from(value.len()).expect("at most 16 KiB").to_be_bytes());
            out.extend(*value);
        }
        out
    }

    /// Reads it where it lies.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, SecretSetError> {
        let mut rest = bytes.strip_prefix(MAGIC).ok_or(SecretSetError("another format"))?;
        let mut set = BTreeMap::new();
        let (mut total, cut) = (0, SecretSetError("cut short"));
        while let Some((length, behind)) = rest.split_first() {
            let (name, behind) = behind.split_at_checked(usize::from(*length)).ok_or(cut)?;
            let (version, behind) = behind.split_first_chunk::<8>().ok_or(cut)?;
            let (length, behind) = behind.split_first_chunk::<4>().ok_or(cut)?;
            let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
            let (value, behind) = behind.split_at_checked(length).ok_or(cut)?;
            let name = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
            let name: SecretName = name.ok_or(SecretSetError("a name is none"))?;
            total += length;
            if length > SECRET_LIMIT || total > SECRETS_OF_A_MACHINE {
                return Err(SecretSetError("too long"));
            }
            if set.insert(name, (u64::from_be_bytes(*version), value)).is_some() || set.len() > SECRETS_OF_A_RELEASE {
                return Err(SecretSetError("a name is there twice, or there are too many"));
            }
            rest = behind;
        }
        Ok(Self(set))
    }

    /// Versions alone.
    pub fn versions(&self) -> SecretVersions {
        self.0.iter().map(|(name, (version, _))| (name.clone(), *version)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> SecretName {
        text.parse().unwrap()
    }

    #[test]
    fn golden_bytes() {
        let set = SecretSet([(name("a"), (7, &b"xy"[..])), (name("b.key"), (1, &[][..]))].into());
        let bytes = set.encode();
        assert_eq!(bytes, b"KSB1\x01a\0\0\0\0\0\0\0\x07\0\0\0\x02xy\x05b.key\0\0\0\0\0\0\0\x01\0\0\0\0");
        assert_eq!(SecretSet::decode(&bytes).unwrap(), set);
        assert_eq!(format!("{set:?}"), "2 secrets");
        assert!(bytes.capacity() <= bytes.len() + 16);
        assert_eq!(serde_json::to_string(&SecretsWord::Ask).unwrap(), r#""ask""#);
        for bad in [&b""[..], b"KSB2", b"KSB1\x01", &bytes[..bytes.len() - 1], b"KSB1\x01/\0\0\0\0\0\0\0\x07\0\0\0\0"] {
            assert!(SecretSet::decode(bad).is_err(), "{bad:?}");
        }
        let twice = [&bytes[..], &bytes[4..]].concat();
        assert!(SecretSet::decode(&twice).is_err());
    }

    #[test]
    fn names_are_file_names_without_surprises() {
        for good in ["a", "db-password", "tls.key", "0_1", &"x".repeat(63)] {
            assert!(good.parse::<SecretName>().is_ok(), "{good}");
        }
        for bad in ["", ".a", "-a", "..", "a/b", "A", "a b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<SecretName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn each_part_of_what_it_is_bound_to_counts() {
        let id = |n: u8| -> MachineId { format!("00000000-0000-0000-0000-0000000000{n:02x}").parse().unwrap() };
        let nonce = |n: u8| -> Nonce { format!("{n:064x}").parse().unwrap() };
        let all = [
            bound_to(&id(1), "b", &nonce(1)),
            bound_to(&id(2), "b", &nonce(1)),
            bound_to(&id(1), "c", &nonce(1)),
            bound_to(&id(1), "b", &nonce(2)),
        ];
        for (n, one) in all.iter().enumerate() {
            assert!(all.iter().skip(n + 1).all(|other| other != one));
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..120), sane in any::<bool>()) {
            let bytes = if sane { [&MAGIC[..], &bytes].concat() } else { bytes };
            if let Ok(set) = SecretSet::decode(&bytes) {
                let again = set.encode();
                prop_assert_eq!(SecretSet::decode(&again).unwrap(), set);
            }
        }
    }
}
