//! What a machine shall be made of, as a purchase order says it: `2 x EPYC 9754`, `16 x 32 GiB`,
//! `2 x 960 GB nvme + 8 x 8 TB sata`, `2 x 25 Gb/s`. Read once, kept as it was written.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest text of one kind of part, bytes.
pub const PARTS_TEXT: usize = 256;
/// Most groups in it.
const GROUPS: usize = 8;
/// Most parts of a kind in a machine.
const MOST: u32 = 512;

/// So many equal parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// How many.
    pub count: u32,
    /// What each is, as it was written; empty: anything.
    pub text: String,
    /// Bytes of a module or disk, Mbit/s of a link; 0: not said.
    pub size: u64,
    /// Words that must be in a part's description, in lower case.
    pub words: Vec<String>,
    /// Memory slots by name; empty: any.
    pub slots: Vec<String>,
}

impl Group {
    /// `4 × 32 GiB`; `2` where anything will do.
    pub fn name(&self) -> String {
        if self.text.is_empty() { self.count.to_string() } else { format!("{} × {}", self.count, self.text) }
    }
}

/// Which kind of part a text is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Processors: `2 x EPYC 9754`, `2`.
    Cpus,
    /// Memory: `16 x 32 GiB`, `4 x 32 GiB in A1 A2 B1 B2`, or all of it, `512 GiB`.
    Memory,
    /// Disks: `2 x 960 GB nvme`.
    Disks,
    /// Network cards: `2 x 25 Gb/s`, `1 x 1 Gb/s igb`.
    Nics,
}

/// A text that says no parts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum PartsError {
    #[error("{got:?}: expected COUNT x WHAT, as {example:?}")]
    Form { got: String, example: &'static str },
    #[error("{got:?}: a count from 1 to {MOST}")]
    Count { got: String },
    #[error("{got:?} is no size: expected a number with its unit, as \"32 GiB\" or \"960 GB\"")]
    Size { got: String },
    #[error("{got:?} is no speed: expected a number with its unit, as \"25 Gb/s\" or \"100 Mb/s\"")]
    Speed { got: String },
    #[error("{got:?} names {slots} slots for {count} modules")]
    Slots { got: String, slots: usize, count: u32 },
    #[error("more than {GROUPS} kinds of part, or more than {PARTS_TEXT} bytes")]
    TooMany,
}

/// Parts of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    text: String,
    /// In the order in which they were written.
    pub groups: Vec<Group>,
    /// Memory as a whole, bytes; without groups.
    pub total: Option<u64>,
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Parts {
    /// Reads what a person wrote.
    pub fn parse(kind: Kind, text: &str) -> Result<Self, PartsError> {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if text.len() > PARTS_TEXT || text.split('+').count() > GROUPS {
            return Err(PartsError::TooMany);
        }
        let counted = text.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
        if kind == Kind::Memory && !counted.is_empty() && !counted.starts_with(TIMES) {
            let total = size(&text, true).ok_or_else(|| PartsError::Size { got: text.clone() })?;
            return Ok(Self { text, groups: Vec::new(), total: Some(total) });
        }
        let groups = text.split('+').map(|part| group(kind, part.trim())).collect::<Result<_, _>>()?;
        Ok(Self { text, groups, total: None })
    }

    /// How many parts in all.
    pub fn count(&self) -> u32 {
        self.groups.iter().fold(0, |sum, group| sum.saturating_add(group.count))
    }
}

/// What stands between a count and a part.
const TIMES: [char; 4] = ['x', 'X', '×', '*'];

fn group(kind: Kind, part: &str) -> Result<Group, PartsError> {
    let example = match kind {
        Kind::Cpus => "2 x EPYC 9754",
        Kind::Memory => "16 x 32 GiB",
        Kind::Disks => "2 x 960 GB nvme",
        Kind::Nics => "2 x 25 Gb/s",
    };
    let form = || PartsError::Form { got: part.to_owned(), example };
    let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
    let digits = &part[..part.len() - rest.len()];
    if digits.is_empty() {
        return Err(form());
    }
    let count = digits.parse().ok().filter(|n| (1..=MOST).contains(n));
    let count = count.ok_or_else(|| PartsError::Count { got: part.to_owned() })?;
    let mut group = Group { count, text: String::new(), size: 0, words: Vec::new(), slots: Vec::new() };
    let rest = rest.trim_start();
    if rest.is_empty() {
        // A number of modules or disks without a size says too little to be meant.
        return if matches!(kind, Kind::Cpus | Kind::Nics) { Ok(group) } else { Err(form()) };
    }
    let what = rest.strip_prefix(TIMES).map(str::trim).filter(|what| !what.is_empty()).ok_or_else(form)?;
    let lower = |words: &str| words.split_whitespace().map(str::to_ascii_lowercase).collect::<Vec<_>>();
    match kind {
        Kind::Cpus => group.words = lower(what),
        Kind::Memory => {
            let (module, slots) = what.split_once(" in ").unwrap_or((what, ""));
            group.size = size(module, true).ok_or_else(|| PartsError::Size { got: module.to_owned() })?;
            group.slots = slots.split_whitespace().map(str::to_owned).collect();
            if !group.slots.is_empty() && group.slots.len() != count as usize {
                let (got, slots) = (part.to_owned(), group.slots.len());
                return Err(PartsError::Slots { got, slots, count });
            }
            module.clone_into(&mut group.text);
            return Ok(group);
        }
        Kind::Disks => {
            let (bytes, words) = quantity(what);
            group.size = size(bytes, false).ok_or_else(|| PartsError::Size { got: what.to_owned() })?;
            group.words = lower(words);
        }
        Kind::Nics => {
            let (speed, words) = quantity(what);
            group.size = mbps(speed).ok_or_else(|| PartsError::Speed { got: what.to_owned() })?;
            group.words = lower(words);
        }
    }
    what.clone_into(&mut group.text);
    Ok(group)
}

/// `960 GB nvme` is `960 GB` and `nvme`; so is `960GB nvme`.
fn quantity(what: &str) -> (&str, &str) {
    let number = what.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let unit = number.trim_start();
    let end = unit.find(char::is_whitespace).unwrap_or(unit.len());
    what.split_at(what.len() - unit.len() + end)
}

/// A number with at most three decimals, in thousandths, and what follows it.
fn thousandths(text: &str) -> Option<(u64, &str)> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let number = &text[..text.len() - unit.len()];
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() > 9 || decimals.len() > 3 {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let part: u64 = format!("{decimals:0<3}").parse().ok()?;
    Some((whole * 1000 + part, unit.trim()))
}

/// Bytes. Modules are sold in `GB` and mean GiB; disks mean what they say.
fn size(text: &str, memory: bool) -> Option<u64> {
    let (number, unit) = thousandths(text)?;
    let lower = unit.to_ascii_lowercase();
    let power = match lower.chars().next()? {
        'k' => 1,
        'm' => 2,
        'g' => 3,
        't' => 4,
        'p' => 5,
        _ => return None,
    };
    let step = match &lower[1..] {
        "ib" => 1024_u64,
        "b" | "" if memory => 1024,
        "b" | "" => 1000,
        _ => return None,
    };
    let bytes = u128::from(number) * u128::from(step.pow(power)) / 1000;
    u64::try_from(bytes).ok().filter(|bytes| *bytes > 0)
}

/// Mbit/s of `25 Gb/s`, `25G`, `25GbE`, `2.5 Gbit/s`, `100 Mb/s`.
fn mbps(text: &str) -> Option<u64> {
    let (number, unit) = thousandths(text)?;
    let lower = unit.to_ascii_lowercase();
    let step = match lower.chars().next()? {
        'm' => 1,
        'g' => 1000,
        't' => 1_000_000,
        _ => return None,
    };
    let known = matches!(&lower[1..], "" | "b" | "b/s" | "bit/s" | "bps" | "be" | "bit");
    Some(number * step / 1000).filter(|speed| known && *speed > 0)
}

/// What a machine shall be made of; what is not named is not compared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Build {
    /// Words of manufacturer and product name.
    pub model: String,
    /// Processors.
    pub cpus: Option<Parts>,
    /// Memory modules.
    pub memory: Option<Parts>,
    /// Disks.
    pub disks: Option<Parts>,
    /// Network cards.
    pub nics: Option<Parts>,
}

/// A [`Build`] as it is stored and shown: as it was written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Written {
    #[serde(skip_serializing_if = "String::is_empty")]
    model: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    cpus: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    memory: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    disks: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    nics: String,
}

impl TryFrom<Written> for Build {
    type Error = PartsError;
    fn try_from(w: Written) -> Result<Self, PartsError> {
        let parts = |kind, text: &str| (!text.is_empty()).then(|| Parts::parse(kind, text)).transpose();
        Ok(Self {
            cpus: parts(Kind::Cpus, &w.cpus)?,
            memory: parts(Kind::Memory, &w.memory)?,
            disks: parts(Kind::Disks, &w.disks)?,
            nics: parts(Kind::Nics, &w.nics)?,
            model: w.model,
        })
    }
}

impl From<Build> for Written {
    fn from(build: Build) -> Self {
        let text = |parts: Option<Parts>| parts.map_or_else(String::new, |parts| parts.text);
        Self {
            model: build.model,
            cpus: text(build.cpus),
            memory: text(build.memory),
            disks: text(build.disks),
            nics: text(build.nics),
        }
    }
}

impl Build {
    /// What this one says, and of the rest what the other says.
    #[must_use]
    pub fn over(&self, other: &Self) -> Self {
        let or = |a: &Option<Parts>, b: &Option<Parts>| a.clone().or_else(|| b.clone());
        Self {
            model: if self.model.is_empty() { other.model.clone() } else { self.model.clone() },
            cpus: or(&self.cpus, &other.cpus),
            memory: or(&self.memory, &other.memory),
            disks: or(&self.disks, &other.disks),
            nics: or(&self.nics, &other.nics),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_purchase_order_is_read() {
        let memory = Parts::parse(Kind::Memory, "4 x 32 GiB in A1 A2 B1 B2 + 2x64GB").unwrap();
        assert_eq!(
            (memory.groups[0].size, memory.groups[0].slots.len(), memory.groups[1].size),
            (32 << 30, 4, 64 << 30)
        );
        assert_eq!(memory.groups[0].name(), "4 × 32 GiB");
        assert_eq!(Parts::parse(Kind::Memory, "512 GB").unwrap().total, Some(512 << 30));
        let disks = Parts::parse(Kind::Disks, "2 × 1.92 TB nvme PM9A3 + 8x8TB").unwrap();
        assert_eq!((disks.groups[0].size, disks.groups[1].size), (1_920_000_000_000, 8_000_000_000_000));
        assert_eq!(disks.groups[0].words, ["nvme", "pm9a3"]);
        let nics = Parts::parse(Kind::Nics, "2 x 25 Gb/s mlx5_core + 1x1GbE").unwrap();
        assert_eq!((nics.groups[0].size, nics.groups[1].size, nics.count()), (25_000, 1_000, 3));
        assert_eq!(Parts::parse(Kind::Cpus, "2").unwrap().groups[0].name(), "2");
    }

    #[test]
    fn what_says_nothing_is_refused_with_an_example() {
        let say = |kind, text: &str| Parts::parse(kind, text).unwrap_err().to_string();
        assert!(say(Kind::Cpus, "EPYC").contains("as \"2 x EPYC 9754\""));
        assert!(say(Kind::Disks, "4").contains("as \"2 x 960 GB nvme\""));
        assert!(say(Kind::Disks, "2 x nvme").contains("is no size"));
        assert!(say(Kind::Memory, "4 x 32 GiB in A1").contains("names 1 slots for 4 modules"));
        assert!(say(Kind::Memory, "lots").contains("is no size"));
        assert!(say(Kind::Nics, "2 x fast").contains("is no speed"));
        assert!(say(Kind::Cpus, "0 x a").contains("from 1 to 512"));
        assert!(say(Kind::Nics, &"1+".repeat(9)).contains("more than 8"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,300}") {
            for kind in [Kind::Cpus, Kind::Memory, Kind::Disks, Kind::Nics] {
                if let Ok(parts) = Parts::parse(kind, &text) {
                    prop_assert_eq!(Parts::parse(kind, &parts.to_string()).unwrap(), parts);
                }
            }
        }

        #[test]
        fn sizes_are_exact(whole in 0_u64..1_000_000, tenth in 0_u64..10) {
            let bytes = size(&format!("{whole}.{tenth} GB"), false).unwrap_or(0);
            prop_assert_eq!(bytes, whole * 1_000_000_000 + tenth * 100_000_000);
        }
    }
}
