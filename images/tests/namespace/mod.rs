//! Namespaces of the test's own: file systems are mounted and links made in them without changing the host. The crates
//! that need it share this file.
#![allow(dead_code, clippy::unwrap_used)]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Set inside.
pub const INSIDE: &str = "KILN_TEST_NAMESPACE";

/// A command in a mount namespace of its own, as root there; none with the reason where that is not allowed.
pub fn as_root(program: &Path) -> Result<Command, String> {
    let root = std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    // All subordinate ids, so that files may have many owners.
    let how: &[&str] = if root { &["-m"] } else { &["-m", "--map-root-user", "--map-auto"] };
    let usable = Command::new("unshare").args(how).arg("true").output();
    match usable {
        Ok(output) if output.status.success() => {
            let mut command = Command::new("unshare");
            command.args(how).arg(program);
            Ok(command)
        }
        Ok(output) => Err(format!("`unshare {}`: {}", how.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("unshare: {error}")),
    }
}

/// Runs the test of this name again in new namespaces, by unshare(1)'s options `how`; true there, where the test itself
/// then runs.
pub fn enter(test: &str, how: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let usable = Command::new("unshare").args([how, "true"]).stderr(Stdio::null()).status();
    if !usable.is_ok_and(|status| status.success()) {
        println!("skipped: `unshare {how} true` fails here, user namespaces are off or util-linux is missing");
        return false;
    }
    let status = Command::new("unshare")
        .arg(how)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed in its namespace: its output is above");
    false
}

/// The same in new user and mount namespaces.
pub fn inside(test: &str) -> bool {
    enter(test, "-rm")
}

fn mount(arguments: &[&str], options: &str, place: &Path) {
    let status = Command::new("mount").args(arguments).args(["-o", options]).arg(place).status().unwrap();
    assert!(status.success(), "mount {arguments:?} {options} {}", place.display());
}

/// Mounts a tmpfs.
pub fn tmpfs(place: &Path, options: &str) {
    mount(&["-t", "tmpfs", "tmpfs"], options, place);
}

/// Changes its size.
pub fn resize(place: &Path, options: &str) {
    mount(&[], &format!("remount,{options}"), place);
}
