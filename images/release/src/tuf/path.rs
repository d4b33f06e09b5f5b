//! Target paths and the patterns of delegations.

use crate::error::TufError;
use crate::hex;
use crate::tuf::model::DelegatedRole;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A target's path: relative, `/`-separated, without control characters, and it can leave no folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TargetPath(String);

impl TargetPath {
    /// Checks a path.
    pub fn new(path: impl Into<String>) -> Result<Self, TufError> {
        let path = path.into();
        let reason = if path.is_empty() || path.len() > 1024 {
            "a path has 1 to 1024 bytes"
        } else if path.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
            "empty, `.` and `..` segments are not allowed"
        } else if path.chars().any(|c| c.is_control() || c == '\\') {
            "control characters and `\\` are not allowed"
        } else {
            return Ok(Self(path));
        };
        Err(TufError::BadTargetPath { path, reason })
    }

    /// `site.json`.
    pub fn site() -> Self {
        Self("site.json".to_owned())
    }

    /// `IMAGE/RELEASE/manifest.json`.
    pub fn manifest(image: &str, release: u64) -> Result<Self, TufError> {
        Self::new(format!("{image}/{release}/manifest.json"))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where a repository keeps it, as in a URL: with consistent snapshots the hash stands before the file's name.
    pub(crate) fn file(&self, hash: Option<&str>) -> String {
        let (folder, name) = match self.0.rsplit_once('/') {
            Some((folder, name)) => (format!("{}/", quote(folder, IN_PATH)), quote(name, IN_PATH)),
            None => (String::new(), quote(&self.0, IN_PATH)),
        };
        match hash {
            Some(hash) => format!("{folder}{hash}.{name}"),
            None => format!("{folder}{name}"),
        }
    }
}

/// What a URL's path may hold beside RFC 3986's unreserved characters.
const IN_PATH: &[u8] = b"/!$&'()*+,;=:@";

/// A name as part of a URL's path: all but RFC 3986's unreserved characters and those of `also` is escaped.
pub(crate) fn quote(name: &str, also: &[u8]) -> String {
    name.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') || also.contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push_str(&hex::encode(&[byte]).to_uppercase());
        }
        out
    })
}

impl fmt::Display for TargetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for TargetPath {
    type Error = TufError;
    fn try_from(path: String) -> Result<Self, TufError> {
        Self::new(path)
    }
}

impl From<TargetPath> for String {
    fn from(path: TargetPath) -> Self {
        path.0
    }
}

/// Whether a delegation's path pattern covers a path: `*` is any run of characters within one segment, `?` is one.
pub fn matches_pattern(pattern: &str, path: &str) -> bool {
    let (mut patterns, mut segments) = (pattern.split('/'), path.split('/'));
    loop {
        match (patterns.next(), segments.next()) {
            (None, None) => return true,
            (Some(pattern), Some(segment)) if matches_segment(pattern.as_bytes(), segment.as_bytes()) => {}
            (Some(_) | None, Some(_) | None) => return false,
        }
    }
}

/// Linear in practice, quadratic at worst: only the last `*` is ever tried again.
fn matches_segment(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            Some(_) | None => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// Whether a delegation covers a path, by patterns or by hash prefixes.
pub(crate) fn delegates(role: &DelegatedRole, path: &str) -> bool {
    let by_pattern = role.paths.iter().flatten().any(|pattern| matches_pattern(pattern, path));
    by_pattern || {
        let mut prefixes = role.path_hash_prefixes.iter().flatten().peekable();
        prefixes.peek().is_some() && {
            let hash = hex::sha256(path.as_bytes());
            prefixes.any(|prefix| !prefix.is_empty() && hash.starts_with(prefix.as_str()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_stay_within_a_segment() {
        for (pattern, path, expected) in [
            ("minimal/*/manifest.json", "minimal/7/manifest.json", true),
            ("minimal/*/manifest.json", "minimal/7/x/manifest.json", false),
            ("minimal/*/manifest.json", "minimal/manifest.json", false),
            ("minimal/*/manifest.json", "minimal//manifest.json", true),
            ("minimal/*/manifest.json", "other/7/manifest.json", false),
            ("*", "a/b", false),
            ("*.tgz", "a.tgz", true),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("*a*b*", "xxaxxaxxbxx", true),
            ("*a*b", "xxaxxaxxbxx", false),
            ("", "", true),
            ("a", "ab", false),
            ("ab", "a", false),
        ] {
            assert_eq!(matches_pattern(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn unsafe_paths_are_refused() {
        for path in ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\\b", "a\n", "a\0", "a\u{85}"] {
            assert!(matches!(TargetPath::new(path), Err(TufError::BadTargetPath { .. })), "{path:?}");
        }
    }

    #[test]
    fn what_a_url_cannot_hold_is_escaped() {
        assert_eq!(TargetPath::manifest("minimal", 2).unwrap().file(Some("ff")), "minimal/2/ff.manifest.json");
        assert_eq!(TargetPath::site().file(Some("ff")), "ff.site.json");
        for (path, expected) in
            [("a b/c?d", "a%20b/c%3Fd"), ("..%2fx#y", "..%252fx%23y"), ("ü", "%C3%BC"), ("a+b,c@d:e", "a+b,c@d:e")]
        {
            assert_eq!(TargetPath::new(path).unwrap().file(None), expected);
        }
    }

    /// The slow, obvious definition.
    fn oracle(pattern: &[char], text: &[char]) -> bool {
        match (pattern.split_first(), text.split_first()) {
            (None, None) => true,
            (Some(('*', rest)), _) => {
                oracle(rest, text)
                    || matches!(text.split_first(), Some((c, tail)) if *c != '/' && oracle(pattern, tail))
            }
            (Some((p, rest)), Some((c, tail))) => (p == c || (*p == '?' && *c != '/')) && oracle(rest, tail),
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_obvious_definition(pattern in "[ab*?/]{0,8}", text in "[ab/]{0,10}") {
            let (p, t): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
            prop_assert_eq!(matches_pattern(&pattern, &text), oracle(&p, &t));
        }
    }
}
