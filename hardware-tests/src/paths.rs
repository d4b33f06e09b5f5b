//! Where the lab's things lie: all of them in the one target folder.

use crate::error::LabError;
use std::path::{Path, PathBuf};

/// The places, derived from where this program lies (`target/debug/…`).
#[derive(Debug, Clone)]
pub struct Paths {
    /// The repository.
    pub repository: PathBuf,
    /// `target/lab`.
    pub lab: PathBuf,
    /// The boot server and operator CLI.
    pub kiln: PathBuf,
    /// The agent, as the images carry it.
    pub agent: PathBuf,
    /// This lab's own program.
    pub program: PathBuf,
    /// The site that `prepare` makes.
    pub site: PathBuf,
    /// Serial consoles.
    pub consoles: PathBuf,
    /// Where the lab mounts its own memory; outside always an empty directory.
    pub scratch: PathBuf,
}

impl Paths {
    /// From the running program.
    pub fn find() -> Result<Self, LabError> {
        let exe = std::env::current_exe().map_err(|source| LabError::File { path: "/proc/self/exe".into(), source })?;
        let target = exe
            .ancestors()
            .find(|p| p.file_name().is_some_and(|name| name == "debug"))
            .and_then(Path::parent)
            .ok_or_else(|| LabError::MissingProgram { path: exe.clone() })?;
        let lab = target.join("lab");
        Ok(Self {
            repository: target.parent().unwrap_or(Path::new("/")).to_owned(),
            kiln: target.join("debug/kiln"),
            agent: target.join("x86_64-unknown-linux-musl/agent/kiln-agent"),
            program: target.join("debug/kiln-lab"),
            site: lab.join("site"),
            consoles: lab.join("console"),
            scratch: lab.join("scratch"),
            lab,
        })
    }
}
