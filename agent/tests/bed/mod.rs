//! A guarded file system of a test's own: the real agent as supervisor and guard, the real kernel. Each test starts itself
//! again in a mount namespace. It needs root, and a kernel that asks (fanotify(7)); elsewhere it says so and does nothing, or
//! fails where all must run (`KILN_ORACLES`).
#![allow(dead_code)]

#[path = "../../../images/tests/oracle/mod.rs"]
mod oracle;

use kiln_protocol::ExecState;
use kiln_release::hex::sha256;
use nix::unistd::Pid;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Nothing here takes longer on any host.
pub const PATIENCE: Duration = Duration::from_secs(20);
const INSIDE: &str = "KILN_EXEC_TEST_INSIDE";
/// One at a time: a guard that others' work keeps from running for 100 ms is late, or replaced, as it should be.
static ALONE: Mutex<()> = Mutex::new(());

/// Whether this is the test itself, in its own mount namespace. If not, it has been run there.
pub fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if !nix::unistd::geteuid().is_root() {
        oracle::unprivileged(&format!("{test} is not run as root, which fanotify's permission events and mounts need"));
        return false;
    }
    // One that failed keeps no other from its turn.
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut again = Command::new("unshare");
    again.args(["--mount", "--propagation", "private", "--"]).arg(std::env::current_exe().unwrap());
    again.args(["--exact", test, "--include-ignored", "--nocapture"]).env(INSIDE, "1");
    let done = again.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
    eprintln!("{said}");
    false
}

/// A guarded tmpfs.
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub place: PathBuf,
    agent: Child,
    pub told: Receiver<ExecState>,
    pub last: ExecState,
}

impl Bed {
    /// With `allowed` in it, which the list names; none where the kernel does not ask.
    pub fn start(mode: &str, fail: &str, allowed: &[(&str, Vec<u8>)]) -> Option<Self> {
        Self::start_by_role(mode, fail, allowed, None, false)
    }

    /// The same where a role chooses, and the release permits it or not.
    pub fn start_by_role(
        mode: &str,
        fail: &str,
        allowed: &[(&str, Vec<u8>)],
        choice: Option<&str>,
        may_report: bool,
    ) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("place");
        std::fs::create_dir(&place).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "noexec,nosuid,nodev,size=600M", "test"]).arg(&place);
        assert!(mount.status().unwrap().success());
        for (name, bytes) in allowed {
            put(&place.join(name), bytes);
        }
        let hashes: Vec<String> = allowed.iter().map(|(_, bytes)| sha256(bytes)).collect();
        let policy = serde_json::json!({ "_type": "kiln-exec", "spec_version": "1.0",
            "rules": [{ "path": place, "mode": mode, "fail": fail, "may_report": may_report, "allow": hashes }] });
        let file = dir.path().join("exec.json");
        std::fs::write(&file, policy.to_string()).unwrap();
        if let Some((name, _)) = allowed.first() {
            let refused = Command::new(place.join(name)).output().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(13), "before it is guarded the place is noexec");
        }
        let program = std::env::var_os("KILN_AGENT").unwrap_or(env!("CARGO_BIN_EXE_kiln-agent").into());
        let mut agent = Command::new(program);
        agent
            .arg("exec")
            .arg(&file)
            .args(choice)
            .stdout(Stdio::piped())
            .stderr(File::create(dir.path().join("said")).unwrap());
        let mut agent = agent.spawn().unwrap();
        let (tell, told) = channel();
        let lines = BufReader::new(agent.stdout.take().unwrap()).lines();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = tell.send(serde_json::from_str(&line).unwrap());
            }
        });
        let mut bed = Self { dir, place, agent, told, last: ExecState::default() };
        match bed.until(|state| state.running) {
            Ok(_) => Some(bed),
            Err(said) if said.contains("CONFIG_FANOTIFY_ACCESS_PERMISSIONS") => {
                oracle::skipped(&said);
                None
            }
            Err(said) => panic!("{said}"),
        }
    }

    pub fn until(&mut self, so: impl Fn(&ExecState) -> bool) -> Result<ExecState, String> {
        let deadline = Instant::now() + PATIENCE;
        while !so(&self.last) {
            let Ok(state) = self.told.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                let said = std::fs::read_to_string(self.dir.path().join("said")).unwrap_or_default();
                return Err(format!("{:#?}\n{said}", self.last));
            };
            self.last = state;
        }
        Ok(self.last.clone())
    }

    #[track_caller]
    pub fn wait(&mut self, so: impl Fn(&ExecState) -> bool) -> ExecState {
        self.until(so).unwrap_or_else(|said| panic!("{said}"))
    }

    pub fn run(&self, name: &str) -> std::io::Result<Output> {
        Command::new(self.place.join(name)).output()
    }

    #[track_caller]
    pub fn runs(&self, name: &str) {
        let done = self.run(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(done.status.success(), "{name}: {done:?}");
    }

    #[track_caller]
    pub fn is_denied(&self, name: &str) {
        let refused = self.run(name).expect_err("it started");
        assert_eq!(refused.raw_os_error(), Some(1), "{name}: {refused}");
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        put(&self.place.join(name), bytes);
    }

    /// The guard's process, once there is one: its state may be told before it is seen.
    pub fn guard(&self) -> Pid {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            match self.seen_guard() {
                Some(guard) => break guard,
                None => assert!(Instant::now() < until, "a guard runs"),
            }
            std::thread::yield_now();
        }
    }

    fn seen_guard(&self) -> Option<Pid> {
        let parent = format!(" {} ", self.agent.id());
        let of = |entry: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let (_, rest) = stat.rsplit_once(')')?;
            // " S PPID …"; one that was just killed is a zombie still.
            let alive = !rest.starts_with(" Z");
            (alive && rest[2..].starts_with(&parent)).then(|| entry.file_name().to_str()?.parse().ok()).flatten()
        };
        std::fs::read_dir("/proc").unwrap().flatten().find_map(of).map(Pid::from_raw)
    }

    pub fn guard_status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.guard())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let _ = nix::mount::umount2(&self.place, nix::mount::MntFlags::MNT_DETACH);
    }
}

pub fn put(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

pub fn program(name: &str) -> Vec<u8> {
    std::fs::read(Path::new("/usr/bin").join(name)).unwrap()
}

/// The same program with other bytes behind it, which the kernel never looks at.
pub fn longer(mut bytes: Vec<u8>, by: usize) -> Vec<u8> {
    bytes.resize(bytes.len() + by, 0);
    bytes
}

pub fn list() -> Vec<(&'static str, Vec<u8>)> {
    vec![("true", program("true")), ("sleep", program("sleep"))]
}
