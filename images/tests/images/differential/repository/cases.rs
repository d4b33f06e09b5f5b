//! The making of a case: which roles there are, who delegates what to whom, and what happens between two states.

use super::{Case, Delegation, Maker, TOP};
use crate::differential::mutate::Random;
use jiff::Timestamp;
use serde_json::json;
use std::collections::BTreeMap;

const DELEGATED: [&str; 4] = ["image-a", "b", "odd role/ü", "deep"];
const PATHS: [&str; 6] = ["site.json", "a/1/manifest.json", "a/2/manifest.json", "b/x.txt", "b/y.txt", "c/d/e"];
const PATTERNS: [&str; 7] = ["a/*/manifest.json", "a/?/*", "b/*.txt", "b/?.txt", "*", "c/*/*", "*/*"];
/// Those that mean the same to a judge whose `*` does not stop at a slash.
const TIDY_PATTERNS: [&str; 5] = ["a/*/manifest.json", "a/?/*", "b/*.txt", "b/?.txt", "c/*/*"];

/// The repository of a seed.
pub fn case(seed: u64, now: Timestamp) -> Case {
    make(seed, now, false)
}

/// One whose roles list only what is delegated to them, each by one role: some judges take nothing else.
pub fn tidy_case(seed: u64, now: Timestamp) -> Case {
    make(seed, now, true)
}

fn make(seed: u64, now: Timestamp, tidy: bool) -> Case {
    let patterns: &[&str] = if tidy { &TIDY_PATTERNS } else { &PATTERNS };
    let mut maker = Maker {
        random: Random::new(seed),
        now,
        roles: BTreeMap::new(),
        delegations: Vec::new(),
        listed: Vec::new(),
        consistent: true,
        with_hashes: true,
        with_length: true,
        defects: Vec::new(),
        noted: Vec::new(),
    };
    let m = &mut maker;
    m.consistent = !m.random.once_in(4);
    (m.with_hashes, m.with_length) = (!m.random.once_in(3), m.random.once_in(2));
    for role in TOP {
        let of = m.role();
        m.roles.insert(role, of);
    }
    m.roles.get_mut("root").unwrap().version = 1 + m.random.below(3) as u64;
    let mut parents = vec!["targets"];
    for name in DELEGATED.iter().take(m.random.below(5)) {
        let of = m.role();
        m.roles.insert(name, of);
        let parent = parents[m.random.below(parents.len())];
        let paths = if m.random.once_in(4) {
            let digits: Vec<String> = (0..6).map(|_| format!("{:x}", m.random.below(16))).collect();
            json!(digits)
        } else {
            let many = 1 + m.random.below(2);
            json!((0..many).map(|_| patterns[m.random.below(patterns.len())]).collect::<Vec<_>>())
        };
        let terminating = m.random.once_in(3);
        m.delegations.push(Delegation { parent, name, paths, terminating });
        parents.push(name);
        // Sometimes another role delegates to it as well: a diamond, or a cycle.
        if m.random.once_in(5) && !tidy {
            let parent = parents[m.random.below(parents.len())];
            let paths = json!([patterns[m.random.below(patterns.len())]]);
            if m.delegations.iter().all(|d| (d.parent, d.name) != (parent, *name)) {
                m.delegations.push(Delegation { parent, name, paths, terminating: false });
            }
        }
    }
    for path in PATHS {
        for _ in 0..=usize::from(m.random.once_in(4)) {
            let role = parents[m.random.below(parents.len())];
            if !m.random.once_in(8) && !m.listed.contains(&(role, path)) {
                m.listed.push((role, path));
            }
        }
    }
    if tidy {
        let kept: Vec<_> = m.listed.iter().filter(|(role, path)| m.reaches(role, path)).copied().collect();
        m.listed = kept;
    }
    let delegations = m.delegations.iter().map(|d| (d.name, d.words())).collect();

    let root = m.sign("root", &m.root(), &m.own_signers("root"));
    let mut states = Vec::new();
    let mut roots = BTreeMap::new();
    for state in 0..=usize::from(!m.random.once_in(3)) {
        m.noted.push(format!("state {state}:"));
        m.choose_defects();
        for _ in 0..m.random.below(3) {
            m.next_root(&mut roots);
        }
        let mut files = roots.clone();
        m.write(&mut files);
        states.push(files);
        // Another time: versions go up, sometimes down.
        let names: Vec<&'static str> = m.roles.keys().copied().filter(|role| *role != "root").collect();
        for role in names {
            let step = [0, 1, 1, 1, 2][m.random.below(5)];
            let back = m.random.once_in(16);
            let of = m.roles.get_mut(role).unwrap();
            // A snapshot always says something new, so its version is a new one.
            let step = if role == "snapshot" { step.max(1) } else { step };
            of.version = if back && of.version > 1 { of.version - 1 } else { of.version + step };
        }
        if m.random.once_in(12) && m.delegations.len() > 1 {
            let gone = m.delegations.pop().unwrap().name;
            if m.delegations.iter().all(|d| d.name != gone && d.parent != gone) {
                m.roles.remove(gone);
                m.listed.retain(|(role, _)| *role != gone);
                m.noted.push(format!("{gone} is gone"));
            }
        }
    }
    let targets = PATHS.map(str::to_owned).to_vec();
    Case { seed, now, root, states, targets, defects: maker.noted, delegations }
}
