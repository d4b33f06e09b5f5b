//! File names on the EFI system partition. systemd-boot reads `loader/entries/*.conf` (UAPI.1 Boot Loader
//! Specification, Type #1 entries) and counts in a file's name: `kiln-5+3.conf` becomes `kiln-5+2-1.conf` at its first
//! start and `kiln-5+0-3.conf` at its third (systemd's docs/AUTOMATIC_BOOT_ASSESSMENT.md). What does not end in `.conf`
//! it passes over.

use super::FallbackReason;
use crate::ids::IdError;
use crate::{ReleaseId, Sha256Hex};
use std::fmt;
use std::str::FromStr;

/// Starts left, and starts made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tries {
    /// How often systemd-boot will still start it before all others.
    pub left: u32,
    /// How often it has.
    pub done: u32,
}

/// What a file in `loader/entries` is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EntryKind {
    /// `kiln-SEQ+n.next`: ready, and not yet seen by the loader.
    Next(u32),
    /// `kiln-SEQ+n.conf`, `kiln-SEQ+n-m.conf`: a trial, counted by the loader.
    Trial(Tries),
    /// `kiln-SEQ.conf`: good, not counted.
    Good,
    /// `kiln-SEQ.failed`, `kiln-SEQ.spoilt`, `kiln-SEQ.looped`: its tries were used up, its root is not what was written, it
    /// was good and never became healthy any more. For the agent's memory; the loader does not see it.
    Failed(FallbackReason),
}

/// Name of a file in `loader/entries`. `SEQ` is the assignment's sequence number, so that a downgrade sorts first too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryName {
    /// Sequence of the assignment that asked for it.
    pub sequence: u64,
    /// What it is for.
    pub kind: EntryKind,
}

impl EntryName {
    /// It only remembers a failure.
    pub fn has_failed(self) -> bool {
        match self.kind {
            EntryKind::Failed(_) => true,
            EntryKind::Next(_) | EntryKind::Trial(_) | EntryKind::Good => false,
        }
    }

    /// The loader knows it.
    pub fn is_listed(self) -> bool {
        match self.kind {
            EntryKind::Trial(_) | EntryKind::Good => true,
            EntryKind::Next(_) | EntryKind::Failed(_) => false,
        }
    }
}

impl fmt::Display for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sequence = self.sequence;
        match self.kind {
            EntryKind::Next(tries) => write!(f, "kiln-{sequence}+{tries}.next"),
            EntryKind::Trial(Tries { left, done: 0 }) => write!(f, "kiln-{sequence}+{left}.conf"),
            EntryKind::Trial(Tries { left, done }) => write!(f, "kiln-{sequence}+{left}-{done}.conf"),
            EntryKind::Good => write!(f, "kiln-{sequence}.conf"),
            EntryKind::Failed(FallbackReason::TriesUsedUp) => write!(f, "kiln-{sequence}.failed"),
            EntryKind::Failed(FallbackReason::RootSpoilt) => write!(f, "kiln-{sequence}.spoilt"),
            EntryKind::Failed(FallbackReason::BootLoop) => write!(f, "kiln-{sequence}.looped"),
        }
    }
}

impl FromStr for EntryName {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        parse(text).filter(|name| name.to_string() == text).ok_or_else(|| {
            IdError::new("boot entry", "kiln-SEQ[+LEFT[-DONE]].conf, .next, .failed, .spoilt or .looped", text)
        })
    }
}

fn parse(text: &str) -> Option<EntryName> {
    let (stem, suffix) = text.strip_prefix("kiln-")?.rsplit_once('.')?;
    let (sequence, tries) = stem.split_once('+').map_or((stem, None), |(sequence, tries)| (sequence, Some(tries)));
    let (left, done) = match tries.map(|tries| tries.split_once('-').unwrap_or((tries, "0"))) {
        Some((left, done)) => (Some(left.parse().ok()?), done.parse().ok()?),
        None => (None, 0),
    };
    let kind = match (suffix, left, done) {
        ("conf", Some(left), done) => EntryKind::Trial(Tries { left, done }),
        ("conf", None, _) => EntryKind::Good,
        ("next", Some(left), 0) => EntryKind::Next(left),
        ("failed", None, _) => EntryKind::Failed(FallbackReason::TriesUsedUp),
        ("spoilt", None, _) => EntryKind::Failed(FallbackReason::RootSpoilt),
        ("looped", None, _) => EntryKind::Failed(FallbackReason::BootLoop),
        _ => return None,
    };
    Some(EntryName { sequence: sequence.parse().ok()?, kind })
}

/// One release, as disk and loader know it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Content {
    /// Image and number.
    pub release: ReleaseId,
    /// dm-verity root hash: what a slot is found by.
    pub root_hash: Sha256Hex,
    /// SHA-256 of the UKI: the name of its file.
    pub uki: Sha256Hex,
}

impl Content {
    /// Name of the UKI's file in `EFI/kiln`.
    pub fn uki_name(&self) -> String {
        format!("{}.efi", self.uki)
    }

    /// The entry's text. It names the UKI and nothing else that is acted on: no `options`, which would change what the
    /// signed UKI runs with. The last two lines are comments to the loader, and how the agent finds the slot again.
    pub fn entry_text(&self, sequence: u64) -> String {
        let Self { release, root_hash, uki } = self;
        format!(
            "title Kiln {release}\nsort-key kiln\nversion {sequence}\nefi /EFI/kiln/{uki}.efi\n\
             # release {release}\n# root {root_hash}\n"
        )
    }

    /// Reads an entry's text back; nothing that it says is trusted, it only chooses among UKIs.
    pub fn of_entry_text(text: &str) -> Option<Self> {
        let after = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        Some(Self {
            release: after("# release ")?.parse().ok()?,
            root_hash: after("# root ")?.parse().ok()?,
            uki: after("efi /EFI/kiln/")?.strip_suffix(".efi")?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for (text, kind) in [
            ("kiln-5+3.conf", EntryKind::Trial(Tries { left: 3, done: 0 })),
            ("kiln-5+2-1.conf", EntryKind::Trial(Tries { left: 2, done: 1 })),
            ("kiln-5+0-3.conf", EntryKind::Trial(Tries { left: 0, done: 3 })),
            ("kiln-5.conf", EntryKind::Good),
            ("kiln-5+3.next", EntryKind::Next(3)),
            ("kiln-5.failed", EntryKind::Failed(FallbackReason::TriesUsedUp)),
            ("kiln-5.spoilt", EntryKind::Failed(FallbackReason::RootSpoilt)),
            ("kiln-5.looped", EntryKind::Failed(FallbackReason::BootLoop)),
        ] {
            let name = EntryName { sequence: 5, kind };
            assert_eq!(text.parse(), Ok(name));
            assert_eq!(name.to_string(), text);
        }
        for bad in
            ["kiln-.conf", "kiln-5+.conf", "kiln-05.conf", "kiln-5+3-0.conf", "kiln-5.next", "other.conf", "kiln-5"]
        {
            assert!(bad.parse::<EntryName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_entry_names_its_uki_and_no_options() {
        let content = Content {
            release: "minimal/2".parse().unwrap(),
            root_hash: "ab".repeat(32).parse().unwrap(),
            uki: "cd".repeat(32).parse().unwrap(),
        };
        let text = content.entry_text(5);
        assert!(text.contains(&format!("\nefi /EFI/kiln/{}.efi\n", "cd".repeat(32))), "{text}");
        assert!(text.contains("\nversion 5\n") && !text.contains("options"), "{text}");
        assert_eq!(Content::of_entry_text(&text), Some(content));
        assert_eq!(Content::of_entry_text("efi /EFI/kiln/x.efi\n"), None);
    }
}
