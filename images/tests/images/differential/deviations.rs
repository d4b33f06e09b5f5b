//! What explains a difference of verdicts: each is named in docs/deviations.md.

use super::oracle::Oracle;
use super::repository::Case;
use super::{Difference, REFRESH, is_ok, is_same, only_root, verdict};
use kiln_release::tuf::matches_pattern;
use serde_json::Value;
use std::collections::BTreeMap;

/// A deviation of docs/deviations.md, or of the other implementation's own: which differences it explains.
pub struct Deviation {
    pub name: &'static str,
    explains: fn(&Case, &Difference) -> bool,
    kept: Kept,
}

/// Whether it is about what a client kept of an earlier update.
enum Kept {
    No,
    /// A judge that saw nothing before does not differ so.
    Theirs,
    /// Our client, if it saw nothing before, does not differ so.
    Ours,
    /// Our client, if of all it kept it lacked the timestamp, does not differ so.
    OurTimestamp,
}

impl Deviation {
    const fn new(name: &'static str, explains: fn(&Case, &Difference) -> bool) -> Self {
        Self { name, explains, kept: Kept::No }
    }

    pub fn holds(&self, oracle: &mut Oracle, known: &[Self], case: &Case, difference: &Difference) -> bool {
        if !(self.explains)(case, difference) {
            return false;
        }
        // What is left then, if anything, is for the other deviations to explain.
        let rest = match self.kept {
            Kept::No => return true,
            Kept::Theirs => Difference { theirs: fresh(oracle, case, difference), ..difference.clone() },
            Kept::Ours => {
                let ours = verdict(case, difference.state, &mut only_root(case), &difference.what);
                Difference { ours, ..difference.clone() }
            }
            Kept::OurTimestamp => Difference { ours: without_timestamp(case, difference), ..difference.clone() },
        };
        let explained = |other: &Self| matches!(other.kept, Kept::No) && (other.explains)(case, &rest);
        is_same(&rest.ours, &rest.theirs) || known.iter().any(explained)
    }
}

/// The judge's verdict on the update to the state of a difference, with nothing kept.
fn fresh(oracle: &mut Oracle, case: &Case, difference: &Difference) -> String {
    let alone = Case {
        seed: case.seed,
        now: case.now,
        root: case.root.clone(),
        states: vec![case.states[difference.state].clone()],
        targets: Vec::new(),
        defects: Vec::new(),
        delegations: Vec::new(),
    };
    oracle.judge(&alone).remove(0).refresh
}

/// Our verdict on the update to the state of a difference, when the kept timestamp was lost before it: then the new one is
/// read, whatever its version.
fn without_timestamp(case: &Case, difference: &Difference) -> String {
    let mut kept = only_root(case);
    for state in 0..difference.state {
        verdict(case, state, &mut kept, REFRESH);
    }
    kept.remove("timestamp");
    verdict(case, difference.state, &mut kept, &difference.what)
}

fn defect(case: &Case, name: &str) -> bool {
    case.defects.iter().any(|defect| defect.ends_with(name))
}

/// Kiln refuses, with these words, what the other takes.
fn stricter(d: &Difference, words: &str) -> bool {
    !is_ok(&d.ours) && d.ours.contains(words) && is_ok(&d.theirs)
}

/// Kiln takes what the other refuses with these words.
fn laxer(d: &Difference, words: &str) -> bool {
    is_ok(&d.ours) && !is_ok(&d.theirs) && d.theirs.contains(words)
}

fn is_rotation(word: &str) -> bool {
    matches!(word, "timestamp rotated" | "snapshot rotated")
}

/// The keys of timestamp or snapshot changed between the states.
fn rotated(case: &Case) -> bool {
    case.defects.iter().skip_while(|word| *word != "state 1:").any(|word| is_rotation(word))
}

/// They changed at some time since the root that the client was given.
fn ever_rotated(case: &Case) -> bool {
    case.defects.iter().any(|word| is_rotation(word))
}

/// Some pattern matches this path only if its `*` and `?` stand for slashes, too.
fn over_folders(case: &Case, path: &str) -> bool {
    let flat = |text: &str| text.replace('/', "|");
    let mut patterns = case.delegations.iter().flat_map(|(_, patterns)| patterns);
    patterns.any(|pattern| matches_pattern(&flat(pattern), &flat(path)) && !matches_pattern(pattern, path))
}

/// Two roles delegate to one.
fn is_diamond(case: &Case) -> bool {
    let names: Vec<&str> = case.delegations.iter().map(|(name, _)| *name).collect();
    names.iter().enumerate().any(|(number, name)| names[..number].contains(name))
}

/// What the file of timestamp or snapshot says in a state.
fn signed(case: &Case, state: usize, role: &str) -> Option<Value> {
    let end = format!("{role}.json");
    let mut files = case.states.get(state)?.iter();
    let (_, bytes) = files.find(|(path, _)| path.starts_with("metadata/") && path.ends_with(&end))?;
    serde_json::from_slice::<Value>(bytes).ok()?.get_mut("signed").map(Value::take)
}

/// The versions of snapshot and of every role that it lists, by file.
fn versions(case: &Case, state: usize) -> Option<BTreeMap<String, u64>> {
    let snapshot = signed(case, state, "snapshot")?;
    let listed = snapshot["meta"].as_object()?.iter();
    let mut versions: BTreeMap<_, _> =
        listed.map(|(file, meta)| (file.clone(), meta["version"].as_u64().unwrap_or(0))).collect();
    versions.insert("snapshot.json".to_owned(), snapshot["version"].as_u64()?);
    Some(versions)
}

/// The timestamp of the second state has the version of the first one's.
fn is_timestamp_again(case: &Case) -> bool {
    let version = |state| signed(case, state, "timestamp").and_then(|timestamp| timestamp["version"].as_u64());
    version(0).is_some_and(|first| version(1) == Some(first))
}

/// The snapshot of the second state has some version below that of the first one, or lacks a role that it listed.
fn takes_back(case: &Case) -> bool {
    let (Some(before), Some(after)) = (versions(case, 0), versions(case, 1)) else { return false };
    before.iter().any(|(file, version)| after.get(file).is_none_or(|now| now < version))
}

/// Timestamp and snapshot have, at the end of the second state's roots, the keys that the client's first root gave them.
fn have_first_keys(case: &Case) -> bool {
    let files = case.states.get(1).into_iter().flatten().filter(|(path, _)| path.ends_with(".root.json"));
    let roots = files.filter_map(|(_, bytes)| serde_json::from_slice::<Value>(bytes).ok());
    let newest = roots.max_by_key(|root| root["signed"]["version"].as_u64());
    let (Some(newest), Ok(first)) = (newest, serde_json::from_slice::<Value>(&case.root)) else { return false };
    let keys = |root: &Value, role: &str| root["signed"]["roles"][role]["keyids"].clone();
    ["timestamp", "snapshot"].into_iter().all(|role| keys(&newest, role) == keys(&first, role))
}

const KEY_ID_UNKNOWN: Deviation = Deviation::new("key-id-unknown", |case, d| {
    defect(case, "KeyIdUnknown") && stricter(d, "a role names a key that is not listed")
});
const EMPTY: &str = "Hashes must be a non empty dictionary";

pub const OF_PYTHON: &[Deviation] = &[
    Deviation::new("json-key-twice", |case, d| defect(case, "JsonKeyTwice") && stricter(d, "given twice")),
    KEY_ID_UNKNOWN,
    Deviation::new("keys-are-counted", |case, d| defect(case, "KeyUnderTwoNames") && stricter(d, "signed by 1 keys")),
    Deviation::new("unknown-hash-ignored", |case, d| {
        defect(case, "UnknownHash") && laxer(d, "Unsupported algorithm 'whirlpool-x'")
    }),
    Deviation::new("no-hashes-are-none", |case, d| defect(case, "ListedNoHashes") && laxer(d, EMPTY)),
    Deviation::new("target-without-hash-alone", |case, d| defect(case, "TargetWithoutHash") && laxer(d, EMPTY)),
    Deviation::new("hash-in-either-case", |case, d| {
        defect(case, "TargetHashUpperCase") && laxer(d, "does not match expected hash")
    }),
    // Python's: 5.3.11 has both kept files deleted when the keys of either were rotated, and it deletes none.
    Deviation {
        name: "rotation-forgets",
        explains: |case, d| d.state == 1 && d.what == REFRESH && rotated(case) && laxer(d, ""),
        kept: Kept::Theirs,
    },
];

const NO_SHA256: &str = "missing field `sha256`";
/// How tough says that snapshot lost a role, that a role went back, and that snapshot did.
const TAKEN_BACK: [&str; 3] = ["appears in snapshot version", "is greater than version", "is less than"];

/// Read in its source (0.24.0): each is a branch that is there, or is not.
pub const OF_TOUGH: &[Deviation] = &[
    Deviation::new("signature-over-parsed", |case, d| {
        (defect(case, "JsonKeyTwice") || defect(case, "FlippedByte")) && stricter(d, "")
    }),
    KEY_ID_UNKNOWN,
    Deviation::new("key-id-twice", |case, d| defect(case, "KeyIdTwice") && stricter(d, "a key id twice in one role")),
    Deviation::new("spec-version-unread", |case, d| {
        case.defects.iter().any(|defect| defect.contains("SpecVersion")) && stricter(d, "this client reads 1.x")
    }),
    Deviation::new("delegations-unchecked", |case, d| {
        let named = defect(case, "TopLevelDelegation") && stricter(d, "a delegation to a top-level role's name");
        named || defect(case, "DelegationTwice") && stricter(d, "two of the same name")
    }),
    Deviation::new("length-is-a-limit", |case, d| defect(case, "TargetLengthWrong") && stricter(d, "signed as")),
    Deviation::new("no-hashes-are-none", |case, d| defect(case, "ListedNoHashes") && laxer(d, NO_SHA256)),
    Deviation::new("target-without-hash-alone", |case, d| defect(case, "TargetWithoutHash") && laxer(d, NO_SHA256)),
    Deviation::new("key-ids-are-hashes", |case, d| defect(case, "KeyUnderTwoNames") && laxer(d, "Failed to parse")),
    Deviation::new("signatures-are-hex", |case, d| {
        (defect(case, "SignatureNotHex") || defect(case, "FlippedByte")) && laxer(d, "Failed to parse")
    }),
    Deviation::new("delegations-all-at-once", |_, d| laxer(d, "delegations: ")),
    Deviation::new("pattern-over-folders", |case, d| d.what != REFRESH && over_folders(case, &d.what)),
    Deviation::new("role-loaded-once", |case, d| d.what != REFRESH && is_diamond(case)),
    Deviation::new("unlisted-role-hides-others", |case, d| {
        (defect(case, "NotListed") || defect(case, "TopLevelDelegation")) && laxer(d, "not listed")
    }),
    Deviation::new("rotation-since-the-first-root", |case, d| {
        d.state == 1 && ever_rotated(case) && stricter(d, "was seen before")
    }),
    // A timestamp of the version that is kept is discarded, and with it all that it leads to (5.4.3.1 since 1.0.30 of the
    // specification). In tough, which has the check of before, it takes the kept one's place; then its snapshot is a rollback.
    Deviation {
        name: "timestamp-read-again",
        explains: |case, d| {
            let refused = d.state == 1 && d.what == REFRESH && TAKEN_BACK.iter().any(|words| laxer(d, words));
            refused && is_timestamp_again(case) && takes_back(case)
        },
        kept: Kept::OurTimestamp,
    },
    // tough compares the keys of its first root with those of the newest: keys that changed and came back were never rotated.
    Deviation {
        name: "rotation-forgets",
        explains: |case, d| {
            let refused = d.state == 1 && d.what == REFRESH && laxer(d, "");
            refused && ever_rotated(case) && have_first_keys(case)
        },
        kept: Kept::Theirs,
    },
    // A timestamp of the version that is kept, and any file of a version that is kept, is not taken anew (5.4.3.1, 5.5.2,
    // 5.6.2): tough keeps none that it uses.
    Deviation {
        name: "kept-files-are-used",
        explains: |_, d| d.state == 1 && !d.ours.contains("was seen before"),
        kept: Kept::Ours,
    },
];
