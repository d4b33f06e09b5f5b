//! Random repositories with random defects: Kiln's client's verdict against those of other implementations.
//!
//! The Python reference judges. Where verdicts differ, one of the deviations named here must explain it, and
//! docs/deviations.md must have it.
#![allow(clippy::enum_glob_use)] // forty defects are words of their own

mod defects;
#[path = "../../../../fuzz/src/targets/mutate.rs"]
#[allow(dead_code, unreachable_pub)] // of its mutations only the numbers are needed here
mod mutate;
mod oracle;
mod repository;

use crate::python;
use jiff::Timestamp;
use kiln_release::tuf::{Client, ExpiryPolicy, Fetched, Limits, Request, Seen, TargetPath, TufError};
use oracle::{Oracle, Verdict};
use repository::Case;
use std::collections::BTreeMap;
use std::path::Path;

const SHORT: u64 = 40;
const LONG: u64 = 5000;

/// One update of a client that keeps files. What it accepted before an error is kept, too.
fn update(
    state: &BTreeMap<String, Vec<u8>>,
    kept: &mut BTreeMap<String, Vec<u8>>,
    now: Timestamp,
    wanted: Vec<TargetPath>,
) -> Result<Option<String>, TufError> {
    let limits = Limits { targets: 10 << 20, delegation: 10 << 20, target: 64 << 20, ..Limits::default() };
    let mut files = kept.clone();
    let root = files.remove("root").unwrap();
    let mut client = Client::new(&root, Seen::default(), now, limits, ExpiryPolicy::Refuse, wanted)?.with_kept(files);
    while let Request::Fetch { path, .. } = client.next() {
        let fed = client.feed(state.get(&path).map_or(Fetched::Absent, |bytes| Fetched::Bytes(bytes.clone())));
        for change in client.take_changes() {
            match change.bytes {
                Some(bytes) => drop(kept.insert(change.role, bytes)),
                None => drop(kept.remove(&change.role)),
            }
        }
        fed?;
    }
    let targets = client.finish()?.targets;
    Ok(targets.into_values().next().map(|target| target.sha256))
}

fn text(result: Result<Option<String>, TufError>) -> String {
    match result {
        Ok(Some(sha256)) => format!("ok {sha256}"),
        Ok(None) => "ok".to_owned(),
        Err(error) => format!("{}: {error}", error.kind()),
    }
}

fn ours(case: &Case, now: Timestamp) -> Vec<Verdict> {
    let mut kept = BTreeMap::from([("root".to_owned(), case.root.clone())]);
    let states = case.states.iter().map(|state| {
        let refresh = text(update(state, &mut kept, now, Vec::new()));
        let mut targets = BTreeMap::new();
        for path in case.targets.iter().filter(|_| refresh == "ok") {
            let wanted = vec![TargetPath::new(path.clone()).unwrap()];
            targets.insert(path.clone(), text(update(state, &mut kept, now, wanted)));
        }
        Verdict { refresh, targets }
    });
    states.collect()
}

/// A difference of verdicts: about what, ours, theirs.
#[derive(Debug, Clone)]
struct Difference {
    state: usize,
    what: String,
    ours: String,
    theirs: String,
}

fn is_same(ours: &str, theirs: &str) -> bool {
    (ours == theirs) || (!is_ok(ours) && !is_ok(theirs))
}

fn is_ok(text: &str) -> bool {
    text == "ok" || text.starts_with("ok ")
}

/// The differences of the first state that has any: what comes after it starts from different files.
fn differences(ours: &[Verdict], theirs: &[Verdict]) -> Vec<Difference> {
    for (number, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        let mut found = Vec::new();
        let mut compare = |what: String, ours: &str, theirs: &str| {
            if !is_same(ours, theirs) {
                found.push(Difference { state: number, what, ours: ours.to_owned(), theirs: theirs.to_owned() });
            }
        };
        compare("refresh".to_owned(), &ours.refresh, &theirs.refresh);
        for (path, verdict) in &ours.targets {
            if let Some(other) = theirs.targets.get(path) {
                compare(path.clone(), verdict, other);
            }
        }
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

/// A deviation of docs/deviations.md, or of the other implementation's own: which differences it explains.
struct Deviation {
    name: &'static str,
    explains: fn(&Case, &Difference) -> bool,
    /// It is about what a client kept: a judge that saw nothing before does not differ so.
    kept: bool,
}

impl Deviation {
    const fn new(name: &'static str, explains: fn(&Case, &Difference) -> bool) -> Self {
        Self { name, explains, kept: false }
    }

    fn holds(&self, oracle: &mut Oracle, known: &[Self], case: &Case, difference: &Difference) -> bool {
        if !(self.explains)(case, difference) {
            return false;
        }
        if !self.kept {
            return true;
        }
        // What is left then, if anything, is for the other deviations to explain.
        let rest = Difference { theirs: fresh(oracle, case, difference), ..difference.clone() };
        is_same(&rest.ours, &rest.theirs) || known.iter().any(|other| !other.kept && (other.explains)(case, &rest))
    }
}

/// The judge's verdict on the update to the state of a difference, with nothing kept.
fn fresh(oracle: &mut Oracle, case: &Case, difference: &Difference) -> String {
    let alone = Case {
        seed: case.seed,
        root: case.root.clone(),
        states: vec![case.states[difference.state].clone()],
        targets: Vec::new(),
        defects: Vec::new(),
    };
    oracle.judge(&alone).remove(0).refresh
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

/// The keys of timestamp or snapshot changed between the states.
fn rotated(case: &Case) -> bool {
    let later = case.defects.iter().skip_while(|word| *word != "state 1:");
    later.into_iter().any(|word| matches!(word.as_str(), "timestamp rotated" | "snapshot rotated"))
}

const EMPTY: &str = "Hashes must be a non empty dictionary";

const OF_PYTHON: &[Deviation] = &[
    Deviation::new("json-key-twice", |case, d| defect(case, "JsonKeyTwice") && stricter(d, "given twice")),
    Deviation::new("key-id-unknown", |case, d| {
        defect(case, "KeyIdUnknown") && stricter(d, "a role names a key that is not listed")
    }),
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
        explains: |case, d| d.state == 1 && d.what == "refresh" && rotated(case) && laxer(d, ""),
        kept: true,
    },
];

/// Compares so many cases, and counts how often each deviation was the reason.
fn compare(oracle: &mut Oracle, known: &[Deviation], seeds: std::ops::Range<u64>) -> BTreeMap<&'static str, usize> {
    let now = Timestamp::now();
    let (mut counts, mut unexplained, mut accepted) = (BTreeMap::new(), Vec::new(), 0);
    for seed in seeds.clone() {
        let case = repository::case(seed, now);
        let (ours, theirs) = (ours(&case, now), oracle.judge(&case));
        accepted += usize::from(ours.iter().all(|verdict| verdict.refresh == "ok"));
        for difference in differences(&ours, &theirs) {
            match known.iter().find(|deviation| deviation.holds(oracle, known, &case, &difference)) {
                Some(deviation) => *counts.entry(deviation.name).or_insert(0) += 1,
                None => unexplained.push(format!(
                    "seed {seed}, state {}, {}: {}\n    ours: {}\n    theirs: {}",
                    difference.state,
                    difference.what,
                    case.defects.join("; "),
                    difference.ours,
                    difference.theirs
                )),
            }
        }
    }
    assert!(
        unexplained.is_empty(),
        "{} differences that nothing explains:\n{}",
        unexplained.len(),
        unexplained.join("\n")
    );
    println!("{seeds:?}: {accepted} repositories taken whole; explained: {counts:?}");
    let all = usize::try_from(seeds.end - seeds.start).unwrap();
    assert!(accepted * 10 > all && accepted * 10 < all * 9, "{accepted} of {all} are taken: that tests little");
    counts
}

fn python() -> Option<Oracle> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/images/differential/oracle.py");
    python::python().map(|python| Oracle::start(&python, &["-B", script]))
}

#[test]
fn verdicts_are_those_of_the_reference_implementation() {
    let Some(mut oracle) = python() else { return };
    compare(&mut oracle, OF_PYTHON, 0..SHORT);
}

#[test]
#[ignore = "takes minutes; make test-slow runs it"]
fn verdicts_are_those_of_the_reference_implementation_thousands_of_times() {
    let Some(mut oracle) = python() else { return };
    let counts = compare(&mut oracle, OF_PYTHON, SHORT..LONG);
    for deviation in OF_PYTHON {
        assert!(counts.contains_key(deviation.name), "{} explains nothing any more", deviation.name);
    }
}

/// A deviation that is not written down is a bug.
#[test]
fn every_deviation_is_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/deviations.md");
    let page = std::fs::read_to_string(path).unwrap();
    for deviation in OF_PYTHON {
        assert!(page.contains(&format!("`{}`", deviation.name)), "docs/deviations.md lacks {}", deviation.name);
    }
}
