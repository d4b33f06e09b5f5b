//! A mount namespace of the test's own, so that a small file system can be mounted without changing the host.
#![allow(dead_code)]

use std::path::Path;
use std::process::{Command, Stdio};

/// Set inside.
const INSIDE: &str = "KILN_TEST_NAMESPACE";

/// Runs the test of this name again in new user and mount namespaces; true there, where the test itself then runs.
pub fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let usable = Command::new("unshare").args(["-rm", "true"]).stderr(Stdio::null()).status();
    if !usable.is_ok_and(|status| status.success()) {
        eprintln!("skipped: `unshare -rm true` fails here, user namespaces are off or util-linux is missing");
        return false;
    }
    let status = Command::new("unshare")
        .arg("-rm")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed in its namespace: its output is above");
    false
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
