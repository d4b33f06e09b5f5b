//! QEMU's monitor: the rack's hand on power and reset (QEMU Machine Protocol, docs/interop/qmp-spec).

use crate::error::LabError;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const ANSWER: Duration = Duration::from_secs(20);

/// A connection to one machine's monitor.
#[derive(Debug)]
pub struct Qmp {
    machine: String,
    stream: UnixStream,
    inbox: Arc<(Mutex<Inbox>, Condvar)>,
}

/// What the monitor tells by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The machine goes through reset.
    Reset,
    /// Its hardware watchdog was not petted in time. A reset follows.
    Watchdog,
}

impl Event {
    /// QEMU's name for it.
    fn name(self) -> &'static str {
        match self {
            Self::Reset => "RESET",
            Self::Watchdog => "WATCHDOG",
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Reset => "a reset through firmware",
            Self::Watchdog => "the end of its hardware watchdog's time",
        }
    }
}

#[derive(Debug, Default)]
struct Inbox {
    answers: Vec<Value>,
    events: Vec<String>,
    closed: bool,
}

impl Inbox {
    fn count(&self, event: Event) -> usize {
        self.events.iter().filter(|name| *name == event.name()).count()
    }
}

impl Qmp {
    /// Connects to the socket at `path` as soon as QEMU listens there.
    pub fn connect(machine: &str, path: &Path) -> Result<Self, LabError> {
        let fail = |reason: String| LabError::Qmp { machine: machine.to_owned(), reason };
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                // QEMU makes the socket before it runs the machine, but after it was started: ask again.
                Err(e) if begun.elapsed() > ANSWER => return Err(fail(format!("{}: {e}", path.display()))),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let inbox = Arc::new((Mutex::new(Inbox::default()), Condvar::new()));
        let reader = BufReader::new(stream.try_clone().map_err(|e| fail(e.to_string()))?);
        let theirs = Arc::clone(&inbox);
        std::thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
                let mut inbox = theirs.0.lock().expect("no holder of this lock panics");
                if let Some(event) = value["event"].as_str() {
                    inbox.events.push(event.to_owned());
                } else if value.get("return").is_some() || value.get("error").is_some() {
                    inbox.answers.push(value);
                }
                drop(inbox);
                theirs.1.notify_all();
            }
            theirs.0.lock().expect("no holder of this lock panics").closed = true;
            theirs.1.notify_all();
        });
        let qmp = Self { machine: machine.to_owned(), stream, inbox };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a monitor command.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value, LabError> {
        let fail =
            |reason: String| LabError::Qmp { machine: self.machine.clone(), reason: format!("{command}: {reason}") };
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        (&self.stream).write_all(line.as_bytes()).map_err(|e| fail(e.to_string()))?;
        let mut answers =
            self.wait(ANSWER, |inbox| !inbox.answers.is_empty()).map_err(|()| fail("no answer".into()))?;
        let answer = answers.answers.remove(0);
        drop(answers);
        match answer.get("error") {
            Some(error) => Err(fail(error.to_string())),
            None => Ok(answer["return"].clone()),
        }
    }

    /// How often this happened since the machine was switched on.
    pub fn count(&self, event: Event) -> usize {
        self.inbox.0.lock().expect("no holder of this lock panics").count(event)
    }

    /// Waits until it has happened more than `before` times.
    pub fn wait_more(&self, event: Event, before: usize, limit: Duration) -> Result<(), LabError> {
        self.wait(limit, |inbox| inbox.count(event) > before).map(drop).map_err(|()| LabError::TooLong {
            who: self.machine.clone(),
            what: event.what().into(),
            limit,
        })
    }

    fn wait(&self, limit: Duration, until: impl Fn(&Inbox) -> bool) -> Result<std::sync::MutexGuard<'_, Inbox>, ()> {
        let deadline = Instant::now() + limit;
        let mut inbox = self.inbox.0.lock().expect("no holder of this lock panics");
        loop {
            if until(&inbox) {
                return Ok(inbox);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || inbox.closed {
                return Err(());
            }
            inbox = self.inbox.1.wait_timeout(inbox, left).expect("no holder of this lock panics").0;
        }
    }
}
