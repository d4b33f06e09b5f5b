//! Other programs, run to their end or kept as children of the rack.

use crate::error::LabError;
use std::ffi::OsStr;
use std::process::{Command, Stdio};

/// Runs a program to its end; its output is in the error if it fails, and returned if not.
pub fn run<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = S>) -> Result<String, LabError> {
    let mut command = Command::new(program);
    command.args(args);
    run_command(&mut command)
}

/// The same for a prepared command.
pub fn run_command(command: &mut Command) -> Result<String, LabError> {
    let shown = shown(command);
    let out =
        command.stdin(Stdio::null()).output().map_err(|source| LabError::Spawn { command: shown.clone(), source })?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if out.status.success() {
        Ok(text)
    } else {
        Err(LabError::Command { command: shown, status: out.status, output: text.trim().to_owned() })
    }
}

/// A command as a person would type it.
pub fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}
