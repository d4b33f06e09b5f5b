//! The rules as the listener uses them: by file system, hashes as bytes.

use crate::error::{AgentError, Result};
use kiln_protocol::{ExecChoice, ExecVerdict};
use kiln_release::{ExecFail, ExecMode, ExecPolicy, ExecRule, hex};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// SHA-256.
pub type Hash = [u8; 32];

#[derive(Debug)]
pub struct Rule {
    /// `st_dev` of its file system.
    pub device: u64,
    mode: ExecMode,
    fail: ExecFail,
    /// Sorted.
    allow: Vec<Hash>,
}

/// Whether it starts, and what is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub allow: bool,
    pub tell: Option<ExecVerdict>,
}

const ALLOWED: Verdict = Verdict { allow: true, tell: None };

impl Rule {
    /// Of a rule and where its file system is.
    pub fn new(rule: &ExecRule, device: u64) -> Self {
        let mut allow: Vec<Hash> = rule.allow.iter().filter_map(|text| hex::decode(text)?.try_into().ok()).collect();
        allow.sort_unstable();
        Self { device, mode: rule.mode, fail: rule.fail, allow }
    }

    /// Of a program whose content is known.
    pub fn judge(&self, hash: &Hash) -> Verdict {
        if self.allow.binary_search(hash).is_ok() {
            return ALLOWED;
        }
        match self.mode {
            ExecMode::Enforce => Verdict { allow: false, tell: Some(ExecVerdict::Denied) },
            ExecMode::Report => Verdict { allow: true, tell: Some(ExecVerdict::Reported) },
        }
    }

    /// Of one that could not be judged in time.
    pub fn late(&self) -> Verdict {
        match (self.mode, self.fail) {
            (ExecMode::Enforce, ExecFail::Closed) => Verdict { allow: false, tell: Some(ExecVerdict::LateDenied) },
            (ExecMode::Enforce, ExecFail::Open) | (ExecMode::Report, ExecFail::Open | ExecFail::Closed) => {
                Verdict { allow: true, tell: Some(ExecVerdict::LateAllowed) }
            }
        }
    }

    /// Of one that somebody has open for writing: what would start cannot be known.
    pub fn being_written(&self) -> Verdict {
        match self.mode {
            ExecMode::Enforce => Verdict { allow: false, tell: Some(ExecVerdict::LateDenied) },
            ExecMode::Report => Verdict { allow: true, tell: Some(ExecVerdict::LateAllowed) },
        }
    }
}

/// The rule of a file system. A file that says it is on another one (a part of btrfs, an overlay) came from one that is
/// marked all the same: the strictest rule holds for it.
pub fn rule_of(rules: &[Rule], device: u64) -> Option<&Rule> {
    let by_device = rules.iter().find(|rule| rule.device == device);
    by_device.or_else(|| rules.iter().min_by_key(|rule| rule.late().allow))
}

/// Reads the policy as the role chooses; none if this root has none.
pub fn read(path: &Path, choice: ExecChoice) -> Result<Option<ExecPolicy>> {
    match std::fs::read(path) {
        Ok(bytes) => {
            let policy = ExecPolicy::read(&bytes)?;
            Ok(Some(match choice {
                ExecChoice::Release => policy,
                ExecChoice::Report => policy.reported(),
            }))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(AgentError::file(path)(error)),
    }
}

/// The file system of a rule: a mount of its own, not the root's.
pub fn device(rule: &ExecRule) -> Result<u64> {
    let path = Path::new(&rule.path);
    let device = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).map_err(AgentError::file(path));
    let own = device(path)?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    if own == device(parent)? {
        let reason = "nothing is mounted there: a rule is for a whole file system, and this one is its parent's".into();
        return Err(AgentError::Format { path: path.into(), reason });
    }
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(mode: ExecMode, fail: ExecFail) -> Rule {
        let allow = vec!["cd".repeat(32), "ab".repeat(32)];
        Rule::new(&ExecRule { path: "/srv".into(), mode, fail, may_report: false, allow }, 7)
    }

    #[test]
    fn what_every_mode_makes_of_a_program() {
        use ExecVerdict::{Denied, LateAllowed, LateDenied, Reported};
        let told = |verdict: Verdict| (verdict.allow, verdict.tell);
        for (mode, fail, foreign, late, written) in [
            (ExecMode::Enforce, ExecFail::Closed, (false, Denied), (false, LateDenied), (false, LateDenied)),
            (ExecMode::Enforce, ExecFail::Open, (false, Denied), (true, LateAllowed), (false, LateDenied)),
            (ExecMode::Report, ExecFail::Closed, (true, Reported), (true, LateAllowed), (true, LateAllowed)),
            (ExecMode::Report, ExecFail::Open, (true, Reported), (true, LateAllowed), (true, LateAllowed)),
        ] {
            let rule = rule(mode, fail);
            assert_eq!(told(rule.judge(&[0xab; 32])), (true, None));
            assert_eq!(told(rule.judge(&[0xcd; 32])), (true, None));
            assert_eq!(told(rule.judge(&[0xac; 32])), (foreign.0, Some(foreign.1)));
            assert_eq!(told(rule.late()), (late.0, Some(late.1)));
            assert_eq!(told(rule.being_written()), (written.0, Some(written.1)));
        }
    }

    #[test]
    fn an_unknown_file_system_has_the_strictest_rule() {
        let rules = [rule(ExecMode::Report, ExecFail::Open), rule(ExecMode::Enforce, ExecFail::Closed)];
        assert!(!rule_of(&rules, 9).unwrap().late().allow);
        assert!(rule_of(&rules, 7).unwrap().late().allow);
        assert!(rule_of(&[], 7).is_none());
    }
}
