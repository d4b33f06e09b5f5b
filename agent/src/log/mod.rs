//! The log of this boot on its way to the server: what the kernel says, from its first line on, and what the agent says.
//!
//! There is one spool in the process. Stages are not in it: they travel with the reports, and the server puts both in
//! order. Nothing here may hold up a boot: what cannot be sent waits, and goes when there is no more room.

mod kmsg;
mod out;
mod pstore;
mod spool;

pub use out::{begin, flush, show};

use crate::api::Api;
use crate::console;
use crate::error::{AgentError, FailureClass, Result};
use crate::memory::random;
use crate::retry::{self, Next};
use crate::sys;
use kiln_protocol::{LogBatch, LogLine, LogSource, MachineId, cut_at, printable};
use kmsg::{Kmsg, Read1};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use spool::Spool;
use std::fmt::Arguments;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

/// So many bytes of a line are shown, and of what a server says as a part of one.
const SAID: usize = 1000;
/// Where the spool crosses the hand-over.
const CARRIED: &str = "/run/kiln/log.json";
/// Where the kernel shows what one before it left.
const PSTORE: &str = "/sys/fs/pstore";
/// Lines are collected for so long before they are sent.
const COLLECT: Duration = Duration::from_secs(1);
/// A connection without lines is let go after this.
const CALM: Duration = Duration::from_secs(10);
/// What ends a boot, or the system, waits so long at most for the last lines to arrive.
const LAST: Duration = Duration::from_secs(3);

static LOG: Mutex<State> = Mutex::new(State { spool: Spool::new(), kernel: 0 });
/// There are lines to be sent.
static NEWS: Notify = Notify::const_new();
/// Everything was confirmed.
static SENT: Notify = Notify::const_new();
/// This is the service: a later start of it shall know how far this one came.
static SERVICE: AtomicBool = AtomicBool::new(false);
/// What an earlier kernel left is in the spool, and not erased yet.
static EARLIER: AtomicBool = AtomicBool::new(false);
/// Somebody sends.
static SHIPPING: AtomicBool = AtomicBool::new(false);

struct State {
    spool: Spool,
    /// Number of the kernel's next record.
    kernel: u64,
}

/// What crosses the hand-over, and what a start of the service after one that was killed finds.
#[derive(Serialize, Deserialize)]
struct Carried {
    spool: Spool,
    kernel: u64,
    /// [`EARLIER`].
    #[serde(default)]
    earlier: bool,
}

fn lock() -> MutexGuard<'static, State> {
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

fn push(line: LogLine) {
    lock().spool.push(line);
    NEWS.notify_one();
}

/// What somebody else said, as a part of one line: it can neither begin another, nor steer the terminal, nor fill it.
pub fn said(text: &str) -> String {
    printable(cut_at(text, SAID))
}

/// What `println!` does in this program: the words go to the console and into the spool, as one line. What a server or a disk has said
/// may be a part of any error.
pub fn say(words: Arguments<'_>) {
    let line = said(&words.to_string());
    show(false, &line);
    note(6, &line);
}

/// The same for `eprintln!`.
pub fn warn(words: Arguments<'_>) {
    let line = said(&words.to_string());
    show(true, &line);
    note(4, &line);
}

fn note(level: u8, line: &str) {
    let text = line.strip_prefix("kiln-agent: ").unwrap_or(line).to_owned();
    push(LogLine { source: LogSource::Agent, level, at_us: now_us(), text });
}

/// Takes in what a kernel before this one left. It is erased when the server has all that was said.
pub fn earlier() {
    let left = pstore::read(Path::new(PSTORE));
    if left.is_empty() {
        return;
    }
    EARLIER.store(true, Ordering::Relaxed);
    let count = left.len();
    left.into_iter().for_each(push);
    println!("kiln-agent: a kernel before this one left {count} lines; they are erased when the server has them");
}

fn erase_earlier() {
    if EARLIER.swap(false, Ordering::Relaxed) {
        // In a thread: erasing EFI variables is slow.
        tokio::task::spawn_blocking(|| {
            if let Err(error) = pstore::erase(Path::new(PSTORE)) {
                println!("kiln-agent: what a kernel before this one left cannot be erased: {error}");
            }
        });
    }
}

/// Reads the kernel's log for as long as this process runs. Without /dev/kmsg that is said, and there is none.
pub async fn follow() {
    let opened = Kmsg::open(lock().kernel).and_then(|kmsg| {
        let watched = kmsg.file.try_clone().and_then(sys::watched)?;
        Ok((kmsg, watched))
    });
    let (mut kmsg, watched) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            println!("kiln-agent: the kernel's log cannot be read: {error}");
            return;
        }
    };
    loop {
        // Such lines are on the screen (console_loglevel of the images is 5).
        let mut said = false;
        loop {
            match kmsg.read() {
                Read1::Line(line) => {
                    said |= line.level < 5;
                    push(line);
                }
                Read1::Lost(lines) => println!("kiln-agent: {lines} of the kernel's lines were overwritten unread"),
                Read1::End => break,
            }
            lock().kernel = kmsg.next;
        }
        if said {
            console::repaint();
        }
        match watched.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => return,
        }
        // The kernel writes many lines at a time; they need not be fetched one by one.
        sleep(Duration::from_millis(100)).await;
    }
}

/// Sends what is in the spool for as long as this process runs, over a connection of its own; the first call counts.
pub fn ship(api: Api, boot_id: &str, machine: &MachineId) {
    if !SHIPPING.swap(true, Ordering::Relaxed) {
        tokio::spawn(send_all(api, boot_id.to_owned(), machine.clone()));
    }
}

async fn send_all(mut api: Api, boot_id: String, machine: MachineId) {
    let (mut joined, mut failed, mut told) = (false, 0, false);
    loop {
        if joined && lock().spool.is_empty() {
            erase_earlier();
            if SERVICE.load(Ordering::Relaxed) {
                let kernel = lock().kernel;
                // What it costs when it fails: kernel lines twice, should the service be killed and started again.
                let _ = write(&Carried { spool: Spool::new(), kernel, earlier: false });
            }
            SENT.notify_waiters();
            if timeout(CALM, NEWS.notified()).await.is_err() {
                api.hang_up();
                NEWS.notified().await;
            }
            sleep(COLLECT).await;
        }
        // The first asks which number is next: an agent before this one may have sent some.
        let (first, lines) = if joined { lock().spool.batch() } else { (0, Vec::new()) };
        let batch = LogBatch { boot_id: boot_id.clone(), machine: machine.clone(), first, at_us: now_us(), lines };
        match api.log(&batch).await {
            Ok(reply) => {
                let mut log = lock();
                if joined {
                    log.spool.confirmed(reply.next);
                } else {
                    log.spool.joined(reply.next);
                }
                drop(log);
                (joined, failed, told) = (true, 0, false);
            }
            Err(error) => {
                failed += 1;
                // Once, and not as a line of the log: it would be one more to send.
                if !std::mem::replace(&mut told, true) {
                    show(false, &format!("kiln-agent: log lines wait for the server: {}", said(&error.to_string())));
                }
                let jitter = random().map_or(0, |bytes| bytes[0]);
                let Next::After(pause) = retry::next(FailureClass::Unreachable, failed, jitter) else { return };
                sleep(pause).await;
            }
        }
    }
}

/// Waits, for a moment, until the server has all that was said.
pub async fn sent() {
    if SHIPPING.load(Ordering::Relaxed) {
        let all = async {
            loop {
                let sent = SENT.notified();
                if lock().spool.is_empty() {
                    return;
                }
                sent.await;
            }
        };
        // The next boot has other things to do than to say what this one could not.
        let _ = timeout(LAST, all).await;
    }
}

/// Leaves what is not confirmed for the agent in the running system.
pub fn hand_over() -> Result<()> {
    let log = std::mem::replace(&mut *lock(), State { spool: Spool::new(), kernel: 0 });
    write(&Carried { spool: log.spool.handed_over(), kernel: log.kernel, earlier: EARLIER.load(Ordering::Relaxed) })
}

fn write(carried: &Carried) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let bytes = serde_json::to_vec(carried).expect("the spool always becomes JSON");
    let mut options = std::fs::OpenOptions::new();
    let mut file =
        options.write(true).create(true).truncate(true).mode(0o600).open(CARRIED).map_err(AgentError::file(CARRIED))?;
    file.write_all(&bytes).map_err(AgentError::file(CARRIED))
}

/// Goes on with what the agent before left. What it left is taken once: a later start of the service goes on behind the
/// kernel's lines that this one has taken over.
pub fn take_over() {
    let read = || {
        let bytes = std::fs::read(Path::new(CARRIED)).map_err(AgentError::file(CARRIED))?;
        serde_json::from_slice::<Carried>(&bytes)
            .map_err(|e| AgentError::Format { path: CARRIED.into(), reason: e.to_string() })
    };
    let taken = read().and_then(|carried| {
        write(&Carried { spool: Spool::new(), kernel: carried.kernel, earlier: carried.earlier })?;
        Ok(carried)
    });
    SERVICE.store(true, Ordering::Relaxed);
    match taken {
        Ok(carried) => {
            let mut log = lock();
            log.kernel = carried.kernel;
            let again = carried.earlier && carried.spool.is_empty();
            EARLIER.store(carried.earlier, Ordering::Relaxed);
            log.spool.follow(carried.spool);
            drop(log);
            if again {
                // A start of the service that was killed had them.
                earlier();
            }
        }
        Err(error) => println!("kiln-agent: the log of the initramfs is lost: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::director::{Director, Line, STEERS};
    use crate::testing::{TestSite, journal};
    use kiln_protocol::Via;

    /// What the agent says goes into the spool as it goes to the console.
    #[test]
    fn what_a_server_says_in_an_error_begins_no_line_and_steers_no_terminal() {
        let (site, dir) = (TestSite::new(1), tempfile::tempdir().unwrap());
        let director = Director::start(&site, (1, 1, Via::Cold, false));
        director.line(Line::Steers);
        let verifier = site.verifier(1, &[], std::slice::from_ref(&director.url), dir.path());
        let mut journal = journal(&verifier);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(async {
            let ca = &verifier.boot.site.agent_api_ca_pem;
            let mut api = Api::new(&verifier.servers.agent, ca, &verifier.key, &verifier.clock).unwrap();
            journal.send(&mut api, 0).await.unwrap_err()
        });
        println!("kiln-agent: report not delivered yet: {error}");
        println!("kiln-agent: not in time: {STEERS}{}", "x".repeat(1 << 20));
        eprintln!("kiln-agent: report not delivered: {STEERS}");
        // Other tests of this process may say something, too.
        let spool = serde_json::to_value(&lock().spool).unwrap();
        let texts = spool["lines"].as_array().unwrap().iter().filter_map(|line| line["text"].as_str());
        let ours: Vec<&str> = texts.filter(|text| text.contains("approval code AAAA-AAAA")).collect();
        assert_eq!(ours.len(), 3, "{ours:?}");
        let shown = error.to_string();
        for line in ours.into_iter().chain([shown.as_str()]) {
            assert!(!line.chars().any(char::is_control), "{line:?}");
        }
    }
}
