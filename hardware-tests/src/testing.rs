//! Lets an ordinary `#[test]` run inside the lab's namespaces.
//!
//! libtest has threads before a test begins, and a user namespace can be taken only by a single-threaded process. So
//! the test starts itself again: `kiln-lab inside -- THIS-TEST-BINARY --exact NAME`, and its verdict is that one's.

use crate::error::LabError;
use crate::paths::Paths;
use crate::{checks, command, enclosure};
use std::process::{Command, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// So many tests of one kind at a time, in the order in which they came: the long ones are not left for the end.
struct Places {
    line: Mutex<Line>,
    moved: Condvar,
}

struct Line {
    free: usize,
    next: u64,
    served: u64,
}

impl Places {
    const fn new(free: usize) -> Self {
        Self { line: Mutex::new(Line { free, next: 0, served: 0 }), moved: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A booting machine takes a core, and small hosts have two.
static RACKS: Places = Places::new(2);
/// These mostly wait.
static PROCESSES: Places = Places::new(4);

/// One of the places, given back when dropped.
#[must_use]
pub struct Turn(&'static Places);

impl Turn {
    /// Waits for a place among the racks.
    pub fn of_a_rack() -> Self {
        Self::take(&RACKS)
    }

    fn take(places: &'static Places) -> Self {
        let mut line = places.lock();
        let mine = line.next;
        line.next += 1;
        let waiting = |line: &mut Line| line.free == 0 || line.served != mine;
        let mut line = places.moved.wait_while(line, waiting).unwrap_or_else(PoisonError::into_inner);
        line.free -= 1;
        line.served += 1;
        places.moved.notify_all();
        Self(places)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.lock().free += 1;
        self.0.moved.notify_all();
    }
}

/// Runs a test that boots machines inside fresh namespaces.
///
/// `body` must be the closure of the test itself: its type names the test.
/// Where the host cannot hold a rack the test says why and does nothing; with `CI` set that is a failure.
pub fn rack<F: FnOnce(&Paths)>(body: F) {
    inside(&RACKS, body);
}

/// The same for a test with processes only.
pub fn processes<F: FnOnce(&Paths)>(body: F) {
    inside(&PROCESSES, body);
}

/// Whether the host can hold a rack; says why not.
pub fn possible(test: &str) -> bool {
    let Err(why) = checks::host() else { return true };
    assert!(std::env::var_os("CI").is_none(), "{test} needs a rack: {why}");
    eprintln!("{test} cannot run here: {why}");
    false
}

fn inside<F: FnOnce(&Paths)>(places: &'static Places, body: F) {
    let paths = Paths::find().expect("tests lie in the target folder");
    if enclosure::is_inside() {
        body(&paths);
        return;
    }
    // crate::module::test::{{closure}}, of which libtest knows the middle.
    let name = std::any::type_name::<F>();
    let test = name.split_once("::").map_or(name, |(_, rest)| rest).trim_end_matches("::{{closure}}");
    if !possible(test) {
        return;
    }
    let _turn = Turn::take(places);
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
    // Its figures: libtest shows them with --show-output.
    print!("{said}");
}
