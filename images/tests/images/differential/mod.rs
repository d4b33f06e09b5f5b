//! Random repositories with random defects: Kiln's client's verdict against those of other implementations.
//!
//! The Python reference and tough judge. Where verdicts differ, one of the named deviations must explain it, and
//! docs/deviations.md must have it.
#![allow(clippy::enum_glob_use)] // forty defects are words of their own

mod defects;
mod deviations;
#[path = "../../../../fuzz/src/targets/mutate.rs"]
#[allow(dead_code, unreachable_pub)] // of its mutations only the numbers are needed here
mod mutate;
mod oracle;
mod repository;

use crate::{python, tough};
use deviations::{Deviation, OF_PYTHON, OF_TOUGH};
use jiff::Timestamp;
use kiln_release::tuf::{Client, ExpiryPolicy, Fetched, Limits, Request, Seen, TargetPath, TufError};
use oracle::{Oracle, Verdict};
use repository::Case;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// What a difference is about, if not about a target.
const REFRESH: &str = "refresh";
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

/// Our verdict on the update, or on a target of it.
fn verdict(case: &Case, state: usize, kept: &mut BTreeMap<String, Vec<u8>>, what: &str) -> String {
    let wanted = if what == REFRESH { Vec::new() } else { vec![TargetPath::new(what).unwrap()] };
    text(update(&case.states[state], kept, case.now, wanted))
}

fn only_root(case: &Case) -> BTreeMap<String, Vec<u8>> {
    BTreeMap::from([("root".to_owned(), case.root.clone())])
}

fn ours(case: &Case) -> Vec<Verdict> {
    let mut kept = only_root(case);
    let states = (0..case.states.len()).map(|state| {
        let refresh = verdict(case, state, &mut kept, REFRESH);
        let mut targets = BTreeMap::new();
        for path in case.targets.iter().filter(|_| refresh == "ok") {
            targets.insert(path.clone(), verdict(case, state, &mut kept, path));
        }
        Verdict { refresh, targets }
    });
    states.collect()
}

/// A difference of verdicts: about what, ours, theirs.
#[derive(Debug, Clone)]
pub struct Difference {
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
        compare(REFRESH.to_owned(), &ours.refresh, &theirs.refresh);
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

/// The deviation that explains a difference, if one does.
fn reason(oracle: &mut Oracle, known: &[Deviation], case: &Case, difference: &Difference) -> Option<&'static str> {
    known.iter().find(|deviation| deviation.holds(oracle, known, case, difference)).map(|deviation| deviation.name)
}

/// Compares so many cases, and returns how often each deviation was the reason.
fn compare(
    oracle: &mut Oracle,
    known: &[Deviation],
    seeds: Range<u64>,
    make: fn(u64, Timestamp) -> Case,
) -> BTreeMap<&'static str, usize> {
    let now = Timestamp::now();
    let mut counts = BTreeMap::new();
    let (mut unexplained, mut accepted, mut agreed) = (Vec::new(), 0, 0);
    for seed in seeds.clone() {
        let case = make(seed, now);
        let (ours, theirs) = (ours(&case), oracle.judge(&case));
        accepted += usize::from(ours.iter().all(|verdict| verdict.refresh == "ok"));
        agreed += ours.iter().zip(&theirs).map(|(ours, theirs)| both_have(ours, theirs)).sum::<usize>();
        for difference in differences(&ours, &theirs) {
            match reason(oracle, known, &case, &difference) {
                Some(name) => *counts.entry(name).or_insert(0) += 1,
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
    println!("{seeds:?}: {accepted} repositories taken whole, {agreed} targets by both; explained: {counts:?}");
    let all = usize::try_from(seeds.end - seeds.start).unwrap();
    assert!(accepted * 10 > all && accepted * 10 < all * 9, "{accepted} of {all} are taken: that tests little");
    assert!(agreed * 2 > all, "{agreed} targets of {all} repositories are given by both: that tests little");
    counts
}

/// One that explains nothing is no deviation.
fn all_occur(known: &[Deviation], counts: &BTreeMap<&'static str, usize>) {
    for deviation in known {
        assert!(counts.contains_key(deviation.name), "{} explains nothing any more", deviation.name);
    }
}

/// Targets that both give, with the same bytes.
fn both_have(ours: &Verdict, theirs: &Verdict) -> usize {
    ours.targets.iter().filter(|(path, text)| is_ok(text) && theirs.targets.get(*path) == Some(*text)).count()
}

fn python() -> Option<Oracle> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/images/differential/oracle.py");
    python::python().map(|python| Oracle::start(&python, &["-B", script]))
}

fn tough() -> Option<Oracle> {
    tough::tough().map(|program| Oracle::start(&program, &["judge"]))
}

/// tough refuses a repository as a whole for what is wrong with any role: every other one gives it less reason to.
fn for_tough(seed: u64, now: Timestamp) -> Case {
    if seed.is_multiple_of(2) { repository::tidy_case(seed, now) } else { repository::case(seed, now) }
}

#[test]
fn verdicts_are_those_of_the_reference_implementation() {
    let Some(mut oracle) = python() else { return };
    compare(&mut oracle, OF_PYTHON, 0..SHORT, repository::case);
}

#[test]
#[ignore = "takes minutes; make test-slow runs it"]
fn verdicts_are_those_of_the_reference_implementation_thousands_of_times() {
    let Some(mut oracle) = python() else { return };
    let counts = compare(&mut oracle, OF_PYTHON, SHORT..LONG, repository::case);
    all_occur(OF_PYTHON, &counts);
}

#[test]
fn verdicts_are_those_of_tough() {
    let Some(mut oracle) = tough() else { return };
    compare(&mut oracle, OF_TOUGH, 0..SHORT, for_tough);
}

#[test]
#[ignore = "takes minutes; make test-slow runs it"]
fn verdicts_are_those_of_tough_thousands_of_times() {
    let Some(mut oracle) = tough() else { return };
    let counts = compare(&mut oracle, OF_TOUGH, SHORT..LONG, for_tough);
    all_occur(OF_TOUGH, &counts);
}

/// A timestamp keeps its version, and the snapshot under it lists one role less (416), or an older one (1286): to Kiln
/// nothing has changed, and tough refuses it.
#[test]
fn a_timestamp_of_the_kept_version_is_discarded_and_tough_reads_it() {
    let Some(mut oracle) = tough() else { return };
    for (seed, words) in [(416, "appears in snapshot version"), (1286, "is greater than version")] {
        let case = for_tough(seed, Timestamp::now());
        let differences = differences(&ours(&case), &oracle.judge(&case));
        let [difference] = differences.as_slice() else { panic!("seed {seed}: {differences:?}") };
        assert_eq!((difference.state, difference.what.as_str(), difference.ours.as_str()), (1, REFRESH, "ok"));
        assert!(difference.theirs.contains(words), "seed {seed}: {}", difference.theirs);
        assert_eq!(reason(&mut oracle, OF_TOUGH, &case, difference), Some("timestamp-read-again"), "seed {seed}");
    }
}

/// A deviation that is not written down is a bug.
#[test]
fn every_deviation_is_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/deviations.md");
    let page = std::fs::read_to_string(path).unwrap();
    for deviation in OF_PYTHON.iter().chain(OF_TOUGH) {
        assert!(page.contains(&format!("`{}`", deviation.name)), "docs/deviations.md lacks {}", deviation.name);
    }
}
