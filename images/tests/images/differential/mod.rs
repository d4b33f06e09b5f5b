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
use std::collections::{BTreeMap, BTreeSet};
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

/// How often each deviation was the reason, and the seeds of which a second judge had to say so.
struct Explained {
    counts: BTreeMap<&'static str, usize>,
    alone: BTreeSet<u64>,
}

/// Compares so many cases, and counts how often each deviation was the reason. What none of them explains is looked at by a
/// second judge, if there is one: where it says what Kiln says, the first one stands alone.
fn compare(
    oracle: &mut Oracle,
    mut second: Option<Oracle>,
    known: &[Deviation],
    seeds: Range<u64>,
    make: fn(u64, Timestamp) -> Case,
) -> Explained {
    let now = Timestamp::now();
    let (mut counts, mut alone) = (BTreeMap::new(), BTreeSet::new());
    let (mut unexplained, mut accepted, mut agreed) = (Vec::new(), 0, 0);
    for seed in seeds.clone() {
        let case = make(seed, now);
        let (ours, theirs) = (ours(&case), oracle.judge(&case));
        accepted += usize::from(ours.iter().all(|verdict| verdict.refresh == "ok"));
        agreed += ours.iter().zip(&theirs).map(|(ours, theirs)| both_have(ours, theirs)).sum::<usize>();
        for difference in differences(&ours, &theirs) {
            match known.iter().find(|deviation| deviation.holds(oracle, known, &case, &difference)) {
                Some(deviation) => *counts.entry(deviation.name).or_insert(0) += 1,
                None if second.as_mut().is_some_and(|second| sides_with_us(second, &case, &difference)) => {
                    alone.insert(seed);
                }
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
    println!(
        "{seeds:?}: {accepted} repositories taken whole, {agreed} targets by both; explained: {counts:?}; {ALONE}: {alone:?}"
    );
    let all = usize::try_from(seeds.end - seeds.start).unwrap();
    assert!(accepted * 10 > all && accepted * 10 < all * 9, "{accepted} of {all} are taken: that tests little");
    assert!(agreed * 2 > all, "{agreed} targets of {all} repositories are given by both: that tests little");
    Explained { counts, alone }
}

/// Differences in which the reference implementation says what Kiln says, and whose cause in tough nobody has found yet.
const ALONE: &str = "tough-alone";
/// So many of the [`LONG`] seeds have one. One more is a new difference, of tough's or of Kiln's, and somebody must look.
const MOST_ALONE: usize = 11;

/// Whether this judge, too, takes what Kiln takes, and refuses what Kiln refuses.
fn sides_with_us(second: &mut Oracle, case: &Case, difference: &Difference) -> bool {
    let verdicts = second.judge(case);
    let verdict = &verdicts[difference.state];
    let said =
        if difference.what == "refresh" { Some(&verdict.refresh) } else { verdict.targets.get(&difference.what) };
    said.is_some_and(|said| is_ok(said) == is_ok(&difference.ours))
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
    compare(&mut oracle, None, OF_PYTHON, 0..SHORT, repository::case);
}

#[test]
#[ignore = "takes minutes; make test-slow runs it"]
fn verdicts_are_those_of_the_reference_implementation_thousands_of_times() {
    let Some(mut oracle) = python() else { return };
    let Explained { counts, .. } = compare(&mut oracle, None, OF_PYTHON, SHORT..LONG, repository::case);
    for deviation in OF_PYTHON {
        assert!(counts.contains_key(deviation.name), "{} explains nothing any more", deviation.name);
    }
}

#[test]
fn verdicts_are_those_of_tough() {
    let Some(mut oracle) = tough() else { return };
    compare(&mut oracle, None, OF_TOUGH, 0..SHORT, for_tough);
}

#[test]
#[ignore = "takes minutes; make test-slow runs it"]
fn verdicts_are_those_of_tough_thousands_of_times() {
    let Some(mut oracle) = tough() else { return };
    let Explained { alone, .. } = compare(&mut oracle, python(), OF_TOUGH, SHORT..LONG, for_tough);
    assert!(
        alone.len() <= MOST_ALONE,
        "more than the {MOST_ALONE} known seeds have a difference without a cause: {alone:?}"
    );
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
