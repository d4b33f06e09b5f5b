//! The real `kiln serve` as a child, and the configuration a rack gives it.

use crate::api;
use crate::command;
use crate::console::Console;
use crate::error::{AtPath, LabError};
use crate::machine::MachineSpec;
use crate::net;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Who gives out addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DhcpMode {
    /// The site's own server; Kiln answers beside it.
    Proxy,
    /// Kiln.
    Full,
    /// Nobody: no machine boots here.
    Off,
}

/// The role whose machines ask the network before their disk.
pub const NETWORK_FIRST: &str = "network-first";

/// kiln.toml for a rack: who is known, what they run, and where it answers; more lines for its `[boot]`, and for its end.
pub fn config(mode: DhcpMode, image: &str, known: &[&MachineSpec], boot: &str, extra: &str) -> String {
    let mut text = String::from("# Made by kiln-lab.\n");
    let _ = match mode {
        DhcpMode::Proxy => writeln!(text, "[dhcp]\nmode = \"proxy\"\ninterface = \"{}\"", net::BRIDGE),
        DhcpMode::Full => writeln!(
            text,
            "[dhcp]\nmode = \"full\"\ninterface = \"{}\"\n[dhcp.full]\nrange = \"10.77.0.100-10.77.0.199\"",
            net::BRIDGE
        ),
        DhcpMode::Off => writeln!(text, "[dhcp]\nmode = \"off\""),
    };
    text.push_str("[boot]\n");
    if mode != DhcpMode::Off {
        let _ = writeln!(text, "address = \"{}\"", net::SERVER);
    }
    let _ = writeln!(text, "default_image = \"{image}\"\n{boot}");
    for (role, first) in [("lab", "disk"), (NETWORK_FIRST, "network")] {
        let _ = writeln!(text, "[[role]]\nname = \"{role}\"\nimage = \"{image}\"\nboot_first = \"{first}\"");
    }
    for spec in known {
        let _ = writeln!(text, "[[machine]]\nid = \"{}\"\nname = \"{}\"\nrole = \"lab\"", spec.uuid(), spec.name);
    }
    text.push_str(extra);
    text
}

/// Boot servers that run now. A lab that is told to stop ends them gracefully first.
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Asks every running boot server to stop, and waits a little.
pub fn stop_all() {
    let pids = RUNNING.lock().map(|r| r.clone()).unwrap_or_default();
    for pid in &pids {
        let _ = kill(as_pid(*pid), Signal::SIGTERM);
    }
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) && pids.iter().any(|p| alive(*p)) {
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).expect("a PID fits i32"))
}

/// Neither gone nor a zombie.
fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|s| s != "Z" && s != "X")
}

/// A running boot server.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Its log.
    pub log: Arc<Console>,
    /// Its site.
    pub site: PathBuf,
}

impl Server {
    /// Starts it and waits until its operator API answers.
    pub fn start(kiln: &Path, site: &Path, config: &Path, log: &Path, again: bool) -> Result<Self, LabError> {
        if !kiln.exists() {
            return Err(LabError::MissingProgram { path: kiln.to_owned() });
        }
        let mut command = Command::new(kiln);
        command.args(["serve", "--log", "text", "--site"]).arg(site).arg("--config").arg(config);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().map_err(|source| LabError::Spawn { command: command::shown(&command), source })?;
        let stdout = child.stdout.take().expect("asked for above");
        let stderr = child.stderr.take().expect("asked for above");
        let log = Console::follow("kiln serve", log, again, vec![Box::new(stdout), Box::new(stderr)])?;
        RUNNING.lock().expect("no holder of this lock panics").push(child.id());
        let mut server = Self { child, log, site: site.to_owned() };
        let begun = Instant::now();
        loop {
            if api::get(&server.socket(), "/api/v1/status").is_ok() {
                return Ok(server);
            }
            server.check_running()?;
            if begun.elapsed() > Duration::from_secs(30) {
                let (who, idle) = ("kiln serve".to_owned(), Duration::from_secs(30));
                return Err(LabError::Stalled { who, what: "an answer on its Unix socket".into(), idle });
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Where operators ask.
    pub fn socket(&self) -> PathBuf {
        self.site.join("state/kiln.sock")
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails with its last words if it has ended by itself.
    pub fn check_running(&mut self) -> Result<(), LabError> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(LabError::Died {
                program: "kiln serve".into(),
                status: status.to_string(),
                last_words: self.log.last_words(8),
            }),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// Kills it as a power cut would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        self.gone();
    }

    /// Asks it to stop and waits for its end; returns whether it ended with status 0.
    pub fn stop(mut self) -> Result<bool, LabError> {
        let _ = kill(as_pid(self.child.id()), Signal::SIGTERM);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(10) {
            if let Some(status) = self.child.try_wait().at("kiln serve")? {
                self.gone();
                return Ok(status.success());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let limit = Duration::from_secs(10);
        Err(LabError::TooLong { who: "kiln serve".into(), what: "its end after SIGTERM".into(), limit })
    }

    fn gone(&mut self) {
        let _ = self.child.wait();
        let id = self.child.id();
        RUNNING.lock().expect("no holder of this lock panics").retain(|pid| *pid != id);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.gone();
    }
}
