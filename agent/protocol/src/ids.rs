//! Identifiers as types, so that a root hash cannot be passed where a key id is meant.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An identifier that does not have its form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: expected {expected}, got {got:?}")]
pub struct IdError {
    /// Which kind of identifier.
    pub what: &'static str,
    /// What it must look like.
    pub expected: &'static str,
    /// What was given, cut to 80 characters.
    pub got: String,
}

impl IdError {
    pub(crate) fn new(what: &'static str, expected: &'static str, got: &str) -> Self {
        Self { what, expected, got: got.chars().take(80).collect() }
    }
}

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $expected:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text of it.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                let check: fn(&str) -> bool = $check;
                if check(&text) { Ok(Self(text)) } else { Err(IdError::new($what, $expected, &text)) }
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::try_from(text.to_owned())
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

fn lower_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

string_id! {
    /// SHA-256 as 64 lower-case hex digits: an artifact, a root hash, an assignment.
    Sha256Hex, "SHA-256", "64 lower-case hex digits", |t| lower_hex(t, 64)
}
string_id! {
    /// SHA-256 of a public key's SubjectPublicKeyInfo (RFC 5280 §4.1), 64 lower-case hex digits.
    KeyId, "key id", "64 lower-case hex digits", |t| lower_hex(t, 64)
}
string_id! {
    /// 32 random bytes chosen by the agent for one freshness request, as 64 lower-case hex digits.
    Nonce, "nonce", "64 lower-case hex digits", |t| lower_hex(t, 64)
}
string_id! {
    /// 16 random bytes that tell an operator's orders apart, as 32 lower-case hex digits.
    OrderId, "order id", "32 lower-case hex digits", |t| lower_hex(t, 32)
}
string_id! {
    /// SMBIOS system UUID in RFC 9562 text form, lower case. A name for people and lists; it proves nothing.
    MachineId, "machine id", "a UUID in lower case", |t| {
        t.len() == 36 && t.bytes().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => matches!(b, b'0'..=b'9' | b'a'..=b'f'),
        })
    }
}
string_id! {
    /// A secret's name: it becomes a file name.
    SecretName, "secret's name", "1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit", |t| {
        (1..=63).contains(&t.len())
            && t.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && t.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
    }
}
string_id! {
    /// An image's name: it becomes a TUF role (`image-NAME`), a path and a file name.
    ImageName, "image name", "1 to 32 of a-z, 0-9 and '-', beginning with a letter", |t| {
        (1..=32).contains(&t.len())
            && t.starts_with(|c: char| c.is_ascii_lowercase())
            && t.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    }
}

/// One numbered release of an image, written `minimal/2`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReleaseId {
    /// The image.
    pub image: ImageName,
    /// The release number, from 1.
    pub release: u64,
}

impl fmt::Display for ReleaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.image, self.release)
    }
}

impl FromStr for ReleaseId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let bad = || IdError::new("release", "IMAGE/NUMBER, as minimal/2", text);
        let (image, number) = text.split_once('/').ok_or_else(bad)?;
        let release = number.parse().ok().filter(|n| *n > 0).ok_or_else(bad)?;
        Ok(Self { image: image.parse()?, release })
    }
}

macro_rules! word_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $word)] $variant),+
        }
        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
            /// The word used on the wire and before people.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::ALL.iter().copied().find(|v| v.as_str() == text).ok_or_else(|| {
                    IdError::new(stringify!($name), concat!("one of", $(" ", $word),+), text)
                })
            }
        }
    };
}
pub(crate) use word_enum;

word_enum! {
    /// A release's signed class. The director alone can assign only `normal`.
    Class {
        /// Everyday releases.
        Normal = "normal",
        /// A release with a shell, for those who need it.
        Rescue = "rescue",
        /// Tests new hardware.
        Acceptance = "acceptance",
        /// Erases disks.
        Wipe = "wipe",
    }
}

word_enum! {
    /// Machine architecture, by the kernel's `uname -m` names.
    Architecture {
        /// 64-bit x86.
        X86_64 = "x86_64",
        /// 64-bit Arm.
        Aarch64 = "aarch64",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_refuse_what_they_must() {
        assert!("minimal/2".parse::<ReleaseId>().is_ok());
        for bad in ["minimal", "minimal/0", "minimal/-1", "Minimal/1", "../1", "minimal/1/2", "/1", "9a/1"] {
            assert!(bad.parse::<ReleaseId>().is_err(), "{bad}");
        }
        assert!("AA".repeat(32).parse::<Sha256Hex>().is_err());
        assert!("ab".repeat(32).parse::<Sha256Hex>().is_ok());
        assert!("4c4c4544-0042-3510-8052-b4c04f4b3332".parse::<MachineId>().is_ok());
        assert!("4C4C4544-0042-3510-8052-B4C04F4B3332".parse::<MachineId>().is_err());
        assert_eq!("rescue".parse::<Class>(), Ok(Class::Rescue));
        assert!("shell".parse::<Class>().unwrap_err().to_string().contains("one of normal rescue"));
    }
}
