//! What a machine says of the programs that its allow-list did not let start, or would not have: part of a report.

use crate::ids::{IdError, Sha256Hex, word_enum};
use crate::log::printable;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Most violations in a report; the oldest make room.
pub const EXEC_VIOLATIONS: usize = 16;
/// Most ancestors of a violation.
pub const EXEC_ANCESTORS: usize = 8;
/// Longest path, in bytes, of a program in a violation; longer ones lose their beginning.
pub const EXEC_PATH_LIMIT: usize = 512;

word_enum! {
    /// What became of a program that is not on the list, or could not be judged.
    ExecVerdict {
        /// Not on the list, and not started.
        Denied = "denied",
        /// Not on the list, and started: the rule only reports.
        Reported = "reported",
        /// Not judged in time, and not started: the rule fails closed.
        LateDenied = "late-denied",
        /// Not judged in time, and started: the rule fails open.
        LateAllowed = "late-allowed",
    }
}

/// A process, from itself towards the first one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecAncestor {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// The program it runs; empty if it cannot be read.
    pub exe: String,
}

/// A program that is not on the list. The same program and verdict again is counted, not listed again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecViolation {
    /// Its path, as the kernel names it.
    pub path: String,
    /// SHA-256 of its bytes; none if it could not be read whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256Hex>,
    /// What became of it.
    pub verdict: ExecVerdict,
    /// The process that was to become it, and those that started that one; read while it was held.
    pub ancestry: Vec<ExecAncestor>,
    /// When it was last seen, on the clock of [`crate::Report::at_ms`].
    pub at_ms: u64,
    /// How often.
    pub count: u64,
}

impl ExecViolation {
    /// Whether the other is this one again.
    pub fn is_same(&self, other: &Self) -> bool {
        (&self.path, &self.sha256, self.verdict) == (&other.path, &other.sha256, other.verdict)
    }

    /// In a sentence.
    pub fn describe(&self) -> String {
        let hash = self.sha256.as_ref().map_or("not read whole", |hash| hash.as_str());
        let by: Vec<String> = self.ancestry.iter().map(|a| format!("{}[{}]", a.comm, a.pid)).collect();
        format!("{} {} ({hash}) by {}", self.verdict, self.path, by.join(" < "))
    }
}

/// Allow-listing on one machine, since its boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecState {
    /// The listener runs.
    pub running: bool,
    /// How often it was replaced.
    pub restarts: u64,
    /// What was last wrong with it; none if nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// Starts denied because of the list.
    pub denied: u64,
    /// Starts that were only reported.
    pub reported: u64,
    /// Starts that no verdict came for in time.
    pub late: u64,
    /// The newest violations, oldest first; at most [`EXEC_VIOLATIONS`].
    #[serde(default)]
    pub violations: Vec<ExecViolation>,
}

impl ExecState {
    /// Cuts what a machine can make long.
    pub fn tame(&mut self) {
        let words = |text: &mut String, most: usize| {
            *text = printable(&text.chars().filter(|c| !c.is_control()).take(most).collect::<String>());
        };
        self.alarm.iter_mut().for_each(|alarm| words(alarm, 300));
        let surplus = self.violations.len().saturating_sub(EXEC_VIOLATIONS);
        self.violations.drain(..surplus);
        for violation in &mut self.violations {
            words(&mut violation.path, EXEC_PATH_LIMIT);
            violation.ancestry.truncate(EXEC_ANCESTORS);
            for ancestor in &mut violation.ancestry {
                words(&mut ancestor.comm, 64);
                words(&mut ancestor.exe, EXEC_PATH_LIMIT);
            }
        }
    }

    /// What is said here and was not said there: violations that are new, and an alarm that is another.
    pub fn news_since(&self, before: Option<&Self>) -> Vec<String> {
        let known = |v: &ExecViolation| before.is_some_and(|b| b.violations.iter().any(|old| old.is_same(v)));
        let mut news: Vec<String> =
            self.violations.iter().filter(|v| !known(v)).map(|v| format!("allow-list: {}", v.describe())).collect();
        let old = before.and_then(|b| b.alarm.as_ref());
        news.extend(self.alarm.iter().filter(|alarm| Some(*alarm) != old).map(|alarm| format!("exec guard: {alarm}")));
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation(path: &str) -> ExecViolation {
        let ancestor = |pid, comm: &str| ExecAncestor { pid, comm: comm.into(), exe: format!("/usr/bin/{comm}") };
        ExecViolation {
            path: path.into(),
            sha256: Some("ab".repeat(32).parse().unwrap()),
            verdict: ExecVerdict::Denied,
            ancestry: vec![ancestor(7, "sh"), ancestor(1, "systemd")],
            at_ms: 5,
            count: 2,
        }
    }

    #[test]
    fn golden_bytes_and_words() {
        let state = ExecState {
            running: true,
            restarts: 1,
            alarm: Some("killed".into()),
            denied: 2,
            reported: 3,
            late: 4,
            violations: vec![violation("/srv/x")],
        };
        let golden = r#"{"running":true,"restarts":1,"alarm":"killed","denied":2,"reported":3,"late":4,"violations":[{"path":"/srv/x","sha256":"HASH","verdict":"denied","ancestry":[{"pid":7,"comm":"sh","exe":"/usr/bin/sh"},{"pid":1,"comm":"systemd","exe":"/usr/bin/systemd"}],"at_ms":5,"count":2}]}"#;
        let golden = golden.replace("HASH", &"ab".repeat(32));
        assert_eq!(serde_json::to_string(&state).unwrap(), golden);
        assert_eq!(serde_json::from_str::<ExecState>(&golden).unwrap(), state);
        let words = format!("denied /srv/x ({}) by sh[7] < systemd[1]", "ab".repeat(32));
        assert_eq!(violation("/srv/x").describe(), words);
        assert_eq!(state.news_since(None), [format!("allow-list: {words}"), "exec guard: killed".into()]);
        let again = ExecState { violations: vec![ExecViolation { count: 9, ..violation("/srv/x") }], ..state.clone() };
        assert!(again.news_since(Some(&state)).is_empty(), "the same again is no news");
    }

    #[test]
    fn what_a_machine_makes_long_is_cut() {
        let mut state = ExecState {
            alarm: Some("x\n".repeat(400)),
            violations: (0..40).map(|n| violation(&format!("/{n}{}", "a".repeat(2000)))).collect(),
            ..ExecState::default()
        };
        let ancestry = vec![state.violations[39].ancestry[0].clone(); 20];
        state.violations[39].ancestry = ancestry;
        state.tame();
        assert_eq!(state.alarm.unwrap(), "x".repeat(300));
        assert_eq!((state.violations.len(), state.violations[15].ancestry.len()), (EXEC_VIOLATIONS, EXEC_ANCESTORS));
        assert!(state.violations[15].path.starts_with("/39a") && state.violations[15].path.len() == EXEC_PATH_LIMIT);
    }
}
