//! Nothing outlives the lab: not its processes, namespaces, mounts or temporary files, however it ends.
use kiln_lab::paths::Paths;
use kiln_lab::testing::{self, Turn};
use kiln_protocol::Stage;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Printing lines or not, a lab that does nothing for so long is stuck.
const IDLE: Duration = Duration::from_secs(180);
/// From a signal to the last trace gone.
const ENDING: Duration = Duration::from_secs(60);
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A program whose every descendant is known by a variable in its environment.
struct Marked {
    child: Child,
    mark: String,
    lines: Receiver<String>,
    temp: tempfile::TempDir,
    mounts: String,
}

impl Marked {
    fn start(paths: &Paths, args: &[&str]) -> Self {
        let mark = format!("KILN_LAB_MARK={:x}", std::collections::hash_map::RandomState::new().hash_one(args));
        let (name, value) = mark.split_once('=').unwrap();
        let temp = tempfile::tempdir().unwrap();
        let mut command = Command::new(&paths.program);
        command.args(args).env(name, value).env("TMPDIR", temp.path());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { child, mark, lines, temp, mounts }
    }

    fn wait_for(&self, text: &str) {
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(IDLE) {
                Ok(line) if line.contains(text) => return,
                Ok(line) => seen.push(line),
                Err(RecvTimeoutError::Timeout) => panic!("no {text:?} and no other line for {IDLE:?}: {seen:#?}"),
                Err(RecvTimeoutError::Disconnected) => panic!("it ended without {text:?}: {seen:#?}"),
            }
        }
    }

    /// Its living processes: PID and command line.
    fn processes(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for entry in Path::new("/proc").read_dir().unwrap().flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            if environ.split(|b| *b == 0).any(|v| v == self.mark.as_bytes()) {
                let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                found.push((pid, String::from_utf8_lossy(&line).replace('\0', " ")));
            }
        }
        found
    }

    /// The namespaces its processes are in, but not this test.
    fn namespaces(&self) -> BTreeSet<PathBuf> {
        let of = |pid: &str| {
            ["user", "net", "mnt", "pid"]
                .iter()
                .filter_map(|kind| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok())
                .collect::<BTreeSet<_>>()
        };
        let mine = of("self");
        self.processes().iter().flat_map(|(pid, _)| of(pid)).filter(|ns| !mine.contains(ns)).collect()
    }

    /// Sends a signal to the process outside and checks that every trace goes.
    fn ends_without_trace(mut self, paths: &Paths, signal: Signal) -> ExitStatus {
        let mut namespaces = self.namespaces();
        assert!(namespaces.len() >= 4, "it was not enclosed: {namespaces:?}");
        assert!(self.processes().len() >= 3, "{:?}", self.processes());
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
        let status = self.child.wait().unwrap();
        let begun = Instant::now();
        loop {
            let left = self.processes();
            // The kernel gives the number of one that is gone to the next, which is another test's.
            let everyones = everyones_namespaces();
            namespaces.retain(|namespace| everyones.contains(namespace));
            if left.is_empty() && namespaces.is_empty() {
                break;
            }
            assert!(begun.elapsed() < ENDING, "after {signal} and {ENDING:?} still there: {left:?}, {namespaces:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap(), self.mounts, "mounts differ");
        let files = |dir: &Path| dir.read_dir().unwrap().flatten().map(|e| e.path()).collect::<Vec<_>>();
        assert_eq!(files(self.temp.path()), Vec::<PathBuf>::new(), "temporary files stay behind");
        assert_eq!(files(&paths.scratch), Vec::<PathBuf>::new(), "scratch files stay behind");
        status
    }
}

use std::hash::BuildHasher;

fn everyones_namespaces() -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in Path::new("/proc").read_dir().unwrap().flatten() {
        for kind in ["user", "net", "mnt", "pid"] {
            all.extend(std::fs::read_link(entry.path().join("ns").join(kind)).ok());
        }
    }
    all
}

fn lab(test: &str, body: impl FnOnce(&Paths)) {
    let _lab = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if testing::possible(test) {
        let _turn = Turn::of_a_rack();
        body(&Paths::find().unwrap());
    }
}

/// Orphans, a tap and a further namespace: the hardest case that needs no machine.
#[test]
fn sigkill_takes_orphans_and_nested_namespaces_along() {
    lab("sigkill_takes_orphans_and_nested_namespaces_along", |paths| {
        let script = "ip tuntap add dev t0 mode tap; (setsid unshare --net sleep 1000 &) ; \
                      mount -t tmpfs x /mnt; echo ready; sleep 1000; true";
        let marked = Marked::start(paths, &["inside", "--", "bash", "-c", script]);
        marked.wait_for("ready");
        marked.ends_without_trace(paths, Signal::SIGKILL);
    });
}

/// Ctrl-C before any machine runs.
#[test]
fn sigint_while_the_rack_is_built() {
    lab("sigint_while_the_rack_is_built", |paths| {
        let marked = run(paths);
        marked.wait_for("boot server on");
        let status = marked.ends_without_trace(paths, Signal::SIGINT);
        assert_eq!(status.code(), Some(130));
    });
}

/// Ctrl-C as the firmware speaks, and a kill while the boot program downloads.
#[test]
fn sigint_and_sigkill_while_a_machine_boots() {
    lab("sigint_and_sigkill_while_a_machine_boots", |paths| {
        for (stage, signal) in [(Stage::Dhcp, Signal::SIGINT), (Stage::Program, Signal::SIGKILL)] {
            let marked = run(paths);
            marked.wait_for(stage.label());
            marked.ends_without_trace(paths, signal);
        }
    });
}

/// Ctrl-C after the story is told: the usual end, and a success.
#[test]
#[ignore = "slow: a whole boot for its end alone; make test-slow"]
fn sigint_when_the_rack_is_up() {
    lab("sigint_when_the_rack_is_up", |paths| {
        let marked = run(paths);
        marked.wait_for("the rack stays up until Ctrl-C");
        let status = marked.ends_without_trace(paths, Signal::SIGINT);
        assert_eq!(status.code(), Some(0));
    });
}

fn run(paths: &Paths) -> Marked {
    Marked::start(paths, &["run", "--machines", "1", "--boot-only", "--port", "0"])
}
