//! What can go wrong around a rack, each with what to do about it.

use std::path::PathBuf;
use std::time::Duration;

/// The lab's errors.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error(
        "this machine does not allow user namespaces ({source}): as root, `sysctl user.max_user_namespaces=10000`, and on some kernels `sysctl kernel.unprivileged_userns_clone=1`"
    )]
    NoUserNamespaces { source: nix::Error },
    #[error("cannot {step} in the lab's namespaces: {source}")]
    Enclosure { step: &'static str, source: std::io::Error },
    #[error("not inside the lab's namespaces: start through `kiln-lab`, which encloses itself")]
    NotEnclosed,
    #[error("/dev/net/tun cannot be opened ({source}): `modprobe tun`, and give this user read and write on it")]
    NoTun { source: std::io::Error },
    #[error("{user} has no range in {}: as root, `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`", file.display())]
    NoSubordinateIds { user: String, file: PathBuf },
    #[error("{} is missing: `make setup` installs the package {package}", path.display())]
    MissingFile { path: PathBuf, package: &'static str },
    #[error("{} is missing: `make build` builds it", path.display())]
    MissingProgram { path: PathBuf },
    #[error("`{command}` could not be started: {source}")]
    Spawn { command: String, source: std::io::Error },
    #[error("`{command}` failed ({status}): {output}")]
    Command { command: String, status: std::process::ExitStatus, output: String },
    #[error("{program} ended by itself ({status}); its last words: {last_words}")]
    Died { program: String, status: String, last_words: String },
    #[error("{who}: {what} did not come: nothing happened for {} s (stage and console above say where it stands)", idle.as_secs())]
    Stalled { who: String, what: String, idle: Duration },
    #[error("{who}: {what} did not come within {} s, though the machine goes on", limit.as_secs())]
    TooLong { who: String, what: String, limit: Duration },
    #[error("QMP of {machine}: {reason}")]
    Qmp { machine: String, reason: String },
    #[error("boot server API: {method} {path}: {reason}")]
    Api { method: &'static str, path: String, reason: String },
    #[error("variable store {}: {reason}", path.display())]
    VariableStore { path: PathBuf, reason: &'static str },
    #[error(
        "the web page's port 127.0.0.1:{port} cannot be opened ({source}): choose another with --port, or 0 for any"
    )]
    WebPort { port: u16, source: std::io::Error },
}

/// Adds the path to an I/O error.
pub(crate) trait AtPath<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, LabError>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, LabError> {
        self.map_err(|source| LabError::File { path: path.into(), source })
    }
}
