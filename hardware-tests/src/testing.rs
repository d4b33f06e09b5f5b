//! Lets an ordinary `#[test]` run inside the lab's namespaces.
//!
//! libtest has threads before a test begins, and a user namespace can be taken only by a single-threaded process. So
//! the test starts itself again: `kiln-lab inside -- THIS-TEST-BINARY --exact NAME`, and its verdict is that one's.

use crate::error::LabError;
use crate::paths::Paths;
use crate::{checks, command, enclosure};
use std::process::{Command, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};

/// Racks at a time: a booting machine takes a core, and small hosts have two.
const AT_ONCE: usize = 2;
static FREE: (Mutex<usize>, Condvar) = (Mutex::new(AT_ONCE), Condvar::new());

/// One of the places, given back when dropped.
struct Turn;

impl Turn {
    fn take() -> Self {
        let free = FREE.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = FREE.1.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *FREE.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        FREE.1.notify_one();
    }
}

/// Runs `body` inside fresh namespaces. `test` is the test's full name as libtest knows it.
///
/// Where the host cannot hold a rack the test says why and does nothing; with `CI` set that is a failure.
pub fn inside(test: &str, body: impl FnOnce(&Paths)) {
    let paths = Paths::find().expect("tests lie in the target folder");
    if enclosure::is_inside() {
        body(&paths);
        return;
    }
    if let Err(why) = checks::host() {
        assert!(std::env::var_os("CI").is_none(), "{test} needs a rack: {why}");
        eprintln!("{test} cannot run here: {why}");
        return;
    }
    let _turn = Turn::take();
    let me = std::env::current_exe().expect("this test binary exists");
    let mut again = Command::new(&paths.program);
    again.args(["inside", "--"]).arg(me).args([
        "--exact",
        test,
        "--include-ignored",
        "--nocapture",
        "--test-threads=1",
    ]);
    again.stdin(Stdio::null()).stderr(Stdio::inherit());
    let out = again
        .output()
        .map_err(|source| LabError::Spawn { command: command::shown(&again), source })
        .unwrap_or_else(|e| panic!("{e}: `make build` builds it"));
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{test} failed inside the rack ({}):\n{said}", out.status);
    assert!(said.contains("1 passed"), "no test named {test} ran inside the rack:\n{said}");
}
