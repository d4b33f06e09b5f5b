//! The Python reference implementation of TUF, installed once into a virtual environment under the target folder.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A Python that has it. `None`, and a line that says why, where it cannot be had.
pub fn python() -> Option<PathBuf> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-tuf");
    let python = venv.join("bin/python");
    // Two tests that need it begin at the same time: one installs, the other waits.
    let lock = File::create(Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-tuf.lock")).unwrap();
    lock.lock().unwrap();
    let works = || {
        let import = "import tuf.ngclient, securesystemslib, cryptography";
        Command::new(&python).args(["-c", import]).output().is_ok_and(|output| output.status.success())
    };
    if !works() {
        let _ = std::fs::remove_dir_all(&venv);
        let make = Command::new("python3").args(["-m", "venv"]).arg(&venv).output();
        let pip = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--retries=0",
            "--timeout=20",
            "tuf==7.0.1",
            "cryptography",
        ];
        let install = Command::new(&python).args(pip).output();
        if !works() {
            let why = |output: &std::io::Result<Output>| match output {
                Ok(output) => String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("").to_owned(),
                Err(error) => error.to_string(),
            };
            let (make, install) = (why(&make), why(&install));
            crate::oracle::out_of_reach(&format!("there is no python-tuf: venv: {make}; pip: {install}"));
            return None;
        }
    }
    Some(python)
}
