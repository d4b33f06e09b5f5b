//! The acceptance run of new hardware: what each test found, part by part, and the numbers that a site wants at least.
//!
//! A machine measures itself here and may lie. An acceptance run finds broken parts, not hostile machines.

use crate::ids::{IdError, word_enum};
use crate::inventory::clean;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Most results of a run.
pub const RESULTS_LIMIT: usize = 160;
/// Most measures of a result.
const MEASURES: usize = 8;
/// Longest sentence, bytes.
const SENTENCE: usize = 200;
/// Longest name of a part, bytes.
const PART: usize = 160;

word_enum! {
    /// What is tested.
    TestKind {
        /// Patterns written to most of the free memory, and read back.
        Memory = "memory",
        /// All processors under load, each checked by the others.
        Cpu = "cpu",
        /// Disks read, and read again; their own word on their health.
        Disk = "disk",
        /// Downloads from the boot server.
        Network = "network",
    }
}

word_enum! {
    /// What a test says of a part.
    Outcome {
        /// Nothing is wrong with it.
        Passed = "passed",
        /// It is broken, or does not do what is asked at least.
        Failed = "failed",
        /// It was not tested, and says nothing.
        Skipped = "skipped",
    }
}

/// What one test found about one part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestResult {
    /// Which test.
    pub test: TestKind,
    /// The part: `disk nvme0n1 (PM9A3, serial number S1)`, `CPU 3`, `eth0`.
    pub part: String,
    /// What it says.
    pub outcome: Outcome,
    /// In a sentence.
    pub detail: String,
    /// What was measured, by name and unit: `read_mib_s`, `mib_s`, `link_mbit_s`, `tested_mib`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measures: BTreeMap<String, u64>,
}

/// A run, as far as it is; a field of [`crate::Report`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Acceptance {
    /// All tests are done.
    pub done: bool,
    /// What runs now, and how long it may take; for people.
    pub doing: String,
    /// What was found so far.
    pub results: Vec<TestResult>,
}

/// What is asked at least. A release declares it in its recipe, and a role may ask for more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Least {
    /// MiB/s that each disk must be read with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_read_mib_s: Option<u64>,
    /// MiB/s from the boot server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_mib_s: Option<u64>,
    /// Mbit/s that the link to the boot server must have been negotiated to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_mbit_s: Option<u64>,
}

impl Acceptance {
    /// Cuts everything to its bounds.
    pub fn tame(&mut self) {
        self.keep(RESULTS_LIMIT);
        self.doing = clean(&self.doing, SENTENCE);
        for result in &mut self.results {
            result.part = clean(&result.part, PART);
            result.detail = clean(&result.detail, SENTENCE);
            let known = std::mem::take(&mut result.measures);
            let plain = |name: &String| name.len() <= 32 && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            result.measures = known.into_iter().filter(|(name, _)| plain(name)).take(MEASURES).collect();
        }
    }

    /// Keeps so many results: those that failed, and of the rest the first.
    pub fn keep(&mut self, most: usize) {
        let failed = self.results.iter().filter(|result| result.outcome == Outcome::Failed).count();
        let mut room = most.saturating_sub(failed);
        self.results.retain(|result| {
            let counted = result.outcome != Outcome::Failed;
            let stays = !counted || room > 0;
            room -= usize::from(counted && stays);
            stays
        });
        self.results.truncate(most);
    }

    /// Why a finished run is no pass, a sentence for each part; empty: it passed. Each kind of test must have found at
    /// least one part in order, and no part out of order or below what is asked at least.
    pub fn failures(&self, least: Least) -> Vec<String> {
        let mut out: Vec<String> = self
            .results
            .iter()
            .filter(|result| result.outcome == Outcome::Failed)
            .map(|result| format!("{}: {}", result.part, result.detail))
            .collect();
        for kind in [TestKind::Memory, TestKind::Cpu, TestKind::Network] {
            if !self.results.iter().any(|result| result.test == kind && result.outcome != Outcome::Skipped) {
                out.push(format!("{kind}: nothing was tested"));
            }
        }
        for (kind, name, asked, unit) in [
            (TestKind::Disk, "read_mib_s", least.disk_read_mib_s, "MiB/s"),
            (TestKind::Network, "mib_s", least.network_mib_s, "MiB/s"),
            (TestKind::Network, "link_mbit_s", least.link_mbit_s, "Mbit/s"),
        ] {
            let Some(asked) = asked else { continue };
            for result in self.results.iter().filter(|r| r.test == kind && r.outcome == Outcome::Passed) {
                // What is not known is not enough.
                let got = result.measures.get(name).copied().unwrap_or(0);
                if got < asked {
                    let what = if name == "link_mbit_s" { "its link has" } else { "it gave" };
                    out.push(format!("{}: {what} {got} {unit}, at least {asked} are asked for", result.part));
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn result(test: TestKind, outcome: Outcome, measures: &[(&str, u64)]) -> TestResult {
        let measures = measures.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        TestResult { test, part: format!("{test} 1"), outcome, detail: "it hums".into(), measures }
    }

    fn good() -> Acceptance {
        let results = vec![
            result(TestKind::Memory, Outcome::Passed, &[("tested_mib", 100)]),
            result(TestKind::Cpu, Outcome::Passed, &[]),
            result(TestKind::Disk, Outcome::Passed, &[("read_mib_s", 200)]),
            result(TestKind::Network, Outcome::Passed, &[("mib_s", 90), ("link_mbit_s", 1000)]),
        ];
        Acceptance { done: true, doing: String::new(), results }
    }

    #[test]
    fn golden_bytes_of_version_1() {
        let run = Acceptance { results: vec![result(TestKind::Disk, Outcome::Failed, &[("read_mib_s", 7)])], ..good() };
        let golden = r#"{"done":true,"doing":"","results":[{"test":"disk","part":"disk 1","outcome":"failed","detail":"it hums","measures":{"read_mib_s":7}}]}"#;
        assert_eq!(serde_json::to_string(&run).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Acceptance>(golden).unwrap(), run);
        let newer = golden.replace(r#""done""#, r#""later":1,"done""#);
        assert_eq!(serde_json::from_str::<Acceptance>(&newer).unwrap(), run, "unknown fields are ignored");
    }

    #[test]
    fn a_pass_has_every_test_and_every_number() {
        assert_eq!(good().failures(Least::default()), Vec::<String>::new());
        let least = |n| Least { disk_read_mib_s: Some(n), network_mib_s: Some(n), link_mbit_s: Some(10 * n) };
        assert_eq!(good().failures(least(90)), Vec::<String>::new());
        assert_eq!(
            good().failures(least(101)),
            [
                "network 1: it gave 90 MiB/s, at least 101 are asked for",
                "network 1: its link has 1000 Mbit/s, at least 1010 are asked for",
            ]
        );
        assert_eq!(good().failures(least(201))[0], "disk 1: it gave 200 MiB/s, at least 201 are asked for");
        let mut unknown = good();
        unknown.results[3].measures.clear();
        assert_eq!(unknown.failures(least(1)).len(), 2, "what was not measured is not enough");
        for (n, kind) in [(0, "memory"), (1, "cpu"), (3, "network")] {
            let mut run = good();
            run.results[n].outcome = Outcome::Skipped;
            assert_eq!(run.failures(Least::default()), [format!("{kind}: nothing was tested")]);
            run.results[n].outcome = Outcome::Failed;
            assert_eq!(run.failures(Least::default()), [format!("{kind} 1: it hums")]);
        }
        let mut diskless = good();
        diskless.results.remove(2);
        assert_eq!(diskless.failures(Least::default()), Vec::<String>::new(), "not every machine has a disk");
    }

    proptest! {
        #[test]
        fn whatever_comes_is_bounded(part in ".{300,400}", name in ".{0,40}", n in 0_usize..700) {
            let mut one = result(TestKind::Disk, Outcome::Passed, &[]);
            (one.detail, one.measures) = (part.clone(), [(name, u64::MAX)].into());
            one.measures.extend((b'a'..=b'z').map(|c| (char::from(c).to_string().repeat(32), u64::MAX)));
            one.part = part;
            let mut run = Acceptance { results: vec![one; n], ..good() };
            run.tame();
            prop_assert!(run.results.len() <= RESULTS_LIMIT);
            prop_assert!(run.results.iter().all(|r| r.part.len() <= PART && r.part.chars().all(|c| !c.is_control())));
            prop_assert!(serde_json::to_vec(&run).unwrap().len() <= 240 << 10, "it fits a report");
        }
    }
}
