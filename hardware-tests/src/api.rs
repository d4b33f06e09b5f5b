//! The boot server's operator API as the rack sees it: a machine's view, and its changes by server-sent events.
//!
//! Requests are HTTP/1.0 on purpose: the answer then ends with the connection, also a stream of events.

use crate::error::LabError;
use kiln_protocol::{AgentMemory, DbxState, Difference, ExecState, Stage, Stale};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// One machine, as far as the rack looks at it. Unknown fields are ignored.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct MachineView {
    pub id: String,
    #[serde(default)]
    pub name: Option<String>,
    pub state: String,
    #[serde(default)]
    pub reason: Option<String>,
    #[serde(default)]
    pub stage: Option<Stage>,
    #[serde(default)]
    pub image: Option<String>,
    #[serde(default)]
    pub release: Option<u64>,
    #[serde(default)]
    pub root_hash: Option<String>,
    #[serde(default)]
    pub macs: Vec<String>,
    #[serde(default)]
    pub key_storage: Option<String>,
    #[serde(default)]
    pub rollback_memory: Option<String>,
    #[serde(default)]
    pub protection: Option<String>,
    #[serde(default)]
    pub other_key: Option<String>,
    /// Its approval code, as the server has it.
    #[serde(default)]
    pub code: Option<String>,
    #[serde(default)]
    pub attestation: Option<AttestationView>,
    #[serde(default)]
    pub agent_memory: Option<AgentMemory>,
    #[serde(default)]
    pub exec: Option<ExecState>,
    pub dbx: Option<DbxState>,
    #[serde(default)]
    pub condition: ConditionView,
    #[serde(default)]
    pub last_words: Option<Value>,
    /// Its metadata has expired.
    #[serde(default)]
    pub stale: Option<Stale>,
    #[serde(default)]
    pub boots: Vec<Boot>,
}

/// What a running machine says of itself besides its health.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct ConditionView {
    #[serde(default)]
    pub drift: Vec<Difference>,
    #[serde(default)]
    pub events: Vec<ConditionEvent>,
}

/// Something that happened on it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ConditionEvent {
    pub kind: String,
    pub alarm: bool,
    pub text: String,
}

/// What a machine's TPM proved of its boot.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct AttestationView {
    pub state: String,
    pub reason: String,
    #[serde(default)]
    pub carried: bool,
    #[serde(default)]
    pub endorsement: Option<String>,
    #[serde(default)]
    pub option_roms: Option<Vec<String>>,
}

/// One boot of a machine.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Boot {
    pub boot_id: String,
    #[serde(default)]
    pub via: Option<String>,
    #[serde(default)]
    pub release: Option<Value>,
    #[serde(default)]
    pub started_ms: Option<u64>,
    #[serde(default)]
    pub stages: Vec<StageView>,
}

/// One stage record of a boot.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct StageView {
    pub stage: Stage,
    pub state: String,
    /// Server's clock, Unix milliseconds.
    pub at_ms: u64,
    #[serde(default)]
    pub agent_ms: Option<u64>,
    #[serde(default)]
    pub kind: Option<String>,
    #[serde(default)]
    pub message: Option<String>,
}

impl MachineView {
    /// The newest boot: they come oldest first.
    pub fn boot(&self) -> Option<&Boot> {
        self.boots.last()
    }

    /// Every failure kind of the newest boot.
    pub fn failures(&self) -> Vec<&str> {
        self.boot().map(|b| b.stages.iter().filter_map(|s| s.kind.as_deref()).collect()).unwrap_or_default()
    }

    /// Whether it is healthy on this release.
    pub fn is_healthy_on(&self, release: u64) -> bool {
        self.state == "healthy" && self.release == Some(release)
    }
}

impl Boot {
    /// The first record of a stage in a state, server's clock.
    pub fn at(&self, stage: Stage, state: &str) -> Option<u64> {
        self.stages.iter().find(|s| s.stage == stage && s.state == state).map(|s| s.at_ms)
    }
}

/// Asks over the site's Unix socket. Returns status and body.
pub fn request(socket: &Path, method: &'static str, path: &str, body: &str) -> Result<(u16, String), LabError> {
    let fail = |reason: String| LabError::Api { method, path: path.to_owned(), reason };
    let mut stream = send(socket, method, path, body).map_err(|e| fail(e.to_string()))?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|e| fail(e.to_string()))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(|e| fail(e.to_string()))?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| fail("no complete answer".into()))?;
    let status = head.split_whitespace().nth(1).and_then(|s| s.parse().ok());
    Ok((status.ok_or_else(|| fail(format!("not HTTP: {head:?}")))?, body.to_owned()))
}

/// A GET that must succeed, as JSON.
pub fn get(socket: &Path, path: &str) -> Result<Value, LabError> {
    let fail = |reason: String| LabError::Api { method: "GET", path: path.to_owned(), reason };
    let (status, body) = request(socket, "GET", path, "")?;
    if status != 200 {
        return Err(fail(format!("status {status}: {body}")));
    }
    serde_json::from_str(&body).map_err(|e| fail(format!("{e} in {body:.200}")))
}

fn send(socket: &Path, method: &str, path: &str, body: &str) -> std::io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    let length = body.len();
    let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: kiln\r\n{kind}Content-Length: {length}\r\n\r\n{body}")?;
    Ok(stream)
}

/// The machines as last heard, kept current by a thread that follows the event stream and reconnects.
#[derive(Debug)]
pub struct Watch {
    state: Mutex<Seen>,
    changed: Condvar,
    stop: AtomicBool,
}

#[derive(Debug)]
struct Seen {
    machines: BTreeMap<String, MachineView>,
    last_change: Instant,
    /// The event stream's last fault: a view that cannot be read is a finding, not silence.
    fault: Option<String>,
}

impl Watch {
    /// Follows the server behind `socket`, through its restarts.
    pub fn start(socket: PathBuf) -> Arc<Self> {
        let seen = Seen { machines: BTreeMap::new(), last_change: Instant::now(), fault: None };
        let watch = Arc::new(Self { state: Mutex::new(seen), changed: Condvar::new(), stop: AtomicBool::new(false) });
        let theirs = Arc::clone(&watch);
        std::thread::spawn(move || {
            while !theirs.stop.load(Ordering::SeqCst) {
                if let Ok(stream) = send(&socket, "GET", "/api/v1/events", "") {
                    theirs.follow(stream);
                }
                // The server is not there; it may come back.
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        watch
    }

    fn follow(&self, stream: UnixStream) {
        let mut event = String::new();
        let mut data = String::new();
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let line = line.trim_end_matches('\r');
            if let Some(rest) = line.strip_prefix("event:") {
                rest.trim().clone_into(&mut event);
            } else if let Some(rest) = line.strip_prefix("data:") {
                data.push_str(rest.strip_prefix(' ').unwrap_or(rest));
                data.push('\n');
            } else if line.is_empty() {
                self.take(&event, &data);
                event.clear();
                data.clear();
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
        }
    }

    fn take(&self, event: &str, data: &str) {
        let views = match event {
            "machine" => serde_json::from_str::<MachineView>(data).map(|v| vec![v]),
            "hello" => serde_json::from_str::<Vec<MachineView>>(data).or_else(|_| {
                #[derive(Deserialize)]
                struct Hello {
                    machines: Vec<MachineView>,
                }
                serde_json::from_str::<Hello>(data).map(|h| h.machines)
            }),
            _ => return,
        };
        let mut state = self.lock();
        match views {
            Ok(views) => {
                for view in views {
                    state.machines.insert(view.id.clone(), view);
                }
                state.last_change = Instant::now();
            }
            Err(error) => state.fault = Some(format!("event {event}: {error} in {data:.300}")),
        }
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// All machines now, by id.
    pub fn machines(&self) -> BTreeMap<String, MachineView> {
        self.lock().machines.clone()
    }

    /// One machine now.
    pub fn machine(&self, id: &str) -> Option<MachineView> {
        self.lock().machines.get(id).cloned()
    }

    /// When something last changed.
    pub fn last_change(&self) -> Instant {
        self.lock().last_change
    }

    /// What could not be read, if anything.
    pub fn fault(&self) -> Option<String> {
        self.lock().fault.clone()
    }

    /// Waits for any change, at most so long.
    pub fn wait_change(&self, at_most: Duration) {
        let state = self.lock();
        drop(self.changed.wait_timeout(state, at_most).expect("no holder of this lock panics"));
    }

    /// Ends the following thread at its next event.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}
