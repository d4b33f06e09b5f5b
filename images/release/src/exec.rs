//! Which programs may start from the places of a root that can be written: a document in the root itself, so that the
//! root hash covers it. The builder writes it, the agent reads it from the mounted root.

use crate::canonical::parse_strict;
use crate::error::FormatError;
use crate::hex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Where [`ExecPolicy`] lies in the root.
pub const EXEC_PATH: &str = "/usr/lib/kiln/exec.json";
/// `_type` of an [`ExecPolicy`].
pub const EXEC_TYPE: &str = "kiln-exec";
/// Most rules.
pub const MAX_EXEC_RULES: usize = 16;
/// Most hashes over all rules: the listener holds them in locked memory.
pub const MAX_EXEC_HASHES: usize = 8192;

const WHAT: &str = "exec.json";

/// What becomes of a program that is not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecMode {
    /// It does not start, and is reported.
    Enforce,
    /// It starts, and is reported.
    Report,
}

/// What becomes of a program that is not judged in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecFail {
    /// It starts, with an alarm.
    Open,
    /// It does not start, with an alarm.
    Closed,
}

/// One place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRule {
    /// Where its file system is mounted. The rule is for all of that file system, wherever else it is seen.
    pub path: String,
    /// What becomes of others.
    pub mode: ExecMode,
    /// And of those that could not be judged.
    pub fail: ExecFail,
    /// A role may say that others start as well, and are reported.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub may_report: bool,
    /// SHA-256 of the programs that may start, sorted.
    pub allow: Vec<String>,
}

/// [`EXEC_PATH`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecPolicy {
    /// [`EXEC_TYPE`].
    #[serde(rename = "_type")]
    pub type_: String,
    /// `1.0`.
    pub spec_version: String,
    /// The places; none is named twice.
    pub rules: Vec<ExecRule>,
}

impl ExecPolicy {
    /// Of these rules.
    pub fn new(rules: Vec<ExecRule>) -> Self {
        Self { type_: EXEC_TYPE.to_owned(), spec_version: "1.0".to_owned(), rules }
    }

    /// With every rule that a role may relax in [`ExecMode::Report`].
    #[must_use]
    pub fn reported(mut self) -> Self {
        self.rules.iter_mut().filter(|rule| rule.may_report).for_each(|rule| rule.mode = ExecMode::Report);
        self
    }

    /// Reads it and checks every field.
    pub fn read(bytes: &[u8]) -> Result<Self, FormatError> {
        let malformed = |reason: String| FormatError::Malformed { what: WHAT, reason };
        let value = parse_strict(bytes).map_err(|e| malformed(e.to_string()))?;
        let policy: Self = serde_json::from_value(value).map_err(|e| malformed(e.to_string()))?;
        policy.check()?;
        Ok(policy)
    }

    /// Checks every field.
    pub fn check(&self) -> Result<(), FormatError> {
        if self.type_ != EXEC_TYPE {
            return Err(FormatError::WrongType { what: WHAT, expected: EXEC_TYPE, got: self.type_.clone() });
        }
        if self.spec_version != "1.0" {
            return Err(FormatError::WrongSpecVersion { what: WHAT, got: self.spec_version.clone() });
        }
        let field = |field, holds, got: &str, reason| {
            if holds { Ok(()) } else { Err(FormatError::BadField { what: WHAT, field, got: got.to_owned(), reason }) }
        };
        let (rules, hashes) = (self.rules.len(), self.rules.iter().map(|rule| rule.allow.len()).sum::<usize>());
        field("rules", (1..=MAX_EXEC_RULES).contains(&rules), &rules.to_string(), "1 to 16 rules")?;
        field("allow", hashes <= MAX_EXEC_HASHES, &hashes.to_string(), "at most 8192 hashes over all rules")?;
        let mut seen = BTreeSet::new();
        for rule in &self.rules {
            let parts = rule.path.strip_prefix('/').filter(|rest| !rest.is_empty() && !rest.contains('\0'));
            let clean = parts.is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")));
            field("path", clean, &rule.path, "an absolute path without `.`, `..` and empty segments")?;
            field("path", seen.insert(&rule.path), &rule.path, "listed twice")?;
            for hash in &rule.allow {
                field("allow", hex::is_sha256(hash), hash, "64 lower-case hex digits")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> ExecPolicy {
        let (mode, fail) = (ExecMode::Enforce, ExecFail::Closed);
        ExecPolicy::new(vec![ExecRule {
            path: "/var/opt/app".into(),
            mode,
            fail,
            may_report: false,
            allow: vec!["ab".repeat(32)],
        }])
    }

    #[test]
    fn golden_bytes() {
        let golden = format!(
            r#"{{"_type":"kiln-exec","spec_version":"1.0","rules":[{{"path":"/var/opt/app","mode":"enforce","fail":"closed","allow":["{}"]}}]}}"#,
            "ab".repeat(32)
        );
        assert_eq!(serde_json::to_string(&policy()).unwrap(), golden);
        assert_eq!(ExecPolicy::read(golden.as_bytes()).unwrap(), policy());
    }

    #[test]
    fn a_role_relaxes_only_what_the_release_permits() {
        let mut policy = policy();
        policy.rules.push(ExecRule { path: "/srv".into(), may_report: true, ..policy.rules[0].clone() });
        let text = serde_json::to_string(&policy).unwrap();
        assert_eq!(text.matches(r#""may_report":true"#).count(), 1, "{text}");
        assert_eq!(ExecPolicy::read(text.as_bytes()).unwrap(), policy);
        let modes: Vec<ExecMode> = policy.reported().rules.iter().map(|rule| rule.mode).collect();
        assert_eq!(modes, [ExecMode::Enforce, ExecMode::Report]);
    }

    #[test]
    fn what_does_not_hold_is_named() {
        let refused = |change: fn(&mut ExecPolicy)| {
            let mut policy = policy();
            change(&mut policy);
            policy.check().unwrap_err().to_string()
        };
        for (change, part) in [
            ((|p| p.rules.clear()) as fn(&mut ExecPolicy), "1 to 16 rules"),
            (|p| p.rules[0].path = "/var/../x".into(), "without `.`"),
            (|p| p.rules[0].path = "/".into(), "without `.`"),
            (|p| p.rules.push(p.rules[0].clone()), "listed twice"),
            (|p| p.rules[0].allow[0].make_ascii_uppercase(), "64 lower-case hex digits"),
            (|p| p.rules[0].allow = vec!["ab".repeat(32); MAX_EXEC_HASHES + 1], "at most 8192"),
            (|p| p.spec_version = "2.0".into(), "2.0"),
            (|p| p.type_ = "kiln-site".into(), "kiln-site"),
        ] {
            let text = refused(change);
            assert!(text.contains(part), "{text}");
        }
        assert!(ExecPolicy::read(b"{}").is_err());
    }
}
