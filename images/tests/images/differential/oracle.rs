//! Other implementations as judges: a process each, one case a line.

use super::repository::Case;
use kiln_release::hex;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// What came of one state of a repository: each text is `ok`, `ok SHA256`, or why not.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Verdict {
    pub refresh: String,
    /// By path; empty if the refresh failed.
    pub targets: BTreeMap<String, String>,
}

pub struct Oracle {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Oracle {
    pub fn start(program: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        let (to, from) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, to, from }
    }

    pub fn judge(&mut self, case: &Case) -> Vec<Verdict> {
        let files = |state: &BTreeMap<String, Vec<u8>>| -> BTreeMap<String, String> {
            state.iter().map(|(path, bytes)| (path.clone(), hex::encode(bytes))).collect()
        };
        let states: Vec<_> = case.states.iter().map(files).collect();
        let question = json!({ "root": hex::encode(&case.root), "states": states, "targets": case.targets });
        writeln!(self.to.as_mut().unwrap(), "{question}").unwrap();
        let mut answer = String::new();
        self.from.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("seed {}: the oracle says {answer:?}: {e}", case.seed))
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // The end of its input is the end of its work.
        self.to = None;
        let _ = self.child.wait();
    }
}
