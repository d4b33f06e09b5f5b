//! Allow-listing of programs in writable places, by fanotify(7): the kernel asks before a file of a marked file system
//! is executed, and the SHA-256 of its content decides. docs/exec-policy.md says what that covers and what not.
//!
//! Two processes. The *guard* (`kiln-agent exec-guard`) answers: it is locked in memory, and after its start opens and
//! executes nothing, which a seccomp filter holds it to. The *supervisor*, a thread of the service, owns the fanotify
//! group, starts the guard, asks it for a sign of life, replaces it, reads who wanted to execute what, and tells.

mod ancestry;
mod cache;
mod due;
pub mod guard;
mod hasher;
mod ledger;
mod lost;
mod post;
mod rules;
mod supervisor;
mod systemd;
mod watch;

pub use post::{Post, news};
pub use supervisor::serve;
use supervisor::start;

use crate::error::{AgentError, Result as AgentResult};
use kiln_protocol::{ExecChoice, ExecVerdict};
use lost::Lost;
use serde::{Deserialize, Serialize};
use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

/// What the supervisor tells the guard of the role's choice, behind the policy's path.
pub const REPORT: &str = "report";
/// Longest time from the guard's reading of an event to its answer, milliseconds.
pub const ANSWER_MS: u64 = 100;
/// Programs that are hashed or told of at once. What comes beyond is answered by the rule's `fail` at once.
const MOST_WAITING: usize = 64;
/// The guard's descriptors are below this: two for each that waits, a batch of 32, and a few of its own.
const GUARD_FILES: i32 = 256;
/// Longest message between the two.
const MESSAGE: usize = 8192;

/// `kiln-agent exec POLICY [report]`: guards what the policy names until it is killed, and prints what there is to tell, a JSON
/// document a line. For trying a list, and for tests; on a machine the service does it.
pub fn watch_here(policy: &Path, choice: ExecChoice) -> AgentResult<()> {
    let program = std::env::current_exe().map_err(AgentError::file("/proc/self/exe"))?;
    let post = start(policy, &program, choice, 0)?;
    let post = post.ok_or_else(|| AgentError::Usage(format!("{}: no such file", policy.display())))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.map_err(AgentError::system("starting the runtime"))?.block_on(async {
        loop {
            let line = serde_json::to_string(&post.state()).expect("what is told always becomes JSON");
            std::println!("{line}");
            post.news().await;
        }
    })
}

/// The role's choice, as a word behind the policy's path.
pub fn choice(word: Option<&str>) -> AgentResult<ExecChoice> {
    match word {
        None => Ok(ExecChoice::Release),
        Some(REPORT) => Ok(ExecChoice::Report),
        Some(other) => Err(AgentError::Usage(format!("{other}: behind the policy there is `{REPORT}` or nothing"))),
    }
}

/// From the guard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Said {
    /// It has its rules, is locked and sealed, and answers from now on.
    Ready,
    /// The answer to [`Order::Ping`].
    Pong(u32),
    /// This program is not on the list, or was not judged in time. It is held until [`Order::Noted`], or its 100 ms
    /// end.
    Judged { id: u32, pid: i32, path: String, sha256: Option<String>, verdict: ExecVerdict },
    /// So many more were judged, and could not be told.
    Lost(Lost),
}

/// To the guard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Order {
    Ping(u32),
    Noted(u32),
}

/// Sends one message; a peer that reads none is not waited for.
fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T) -> Result<()> {
    use nix::sys::socket::{MsgFlags, send};
    let bytes = serde_json::to_vec(message)?;
    send(socket.as_raw_fd(), &bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

/// Takes one message; none if there is none, an error if there will be none.
fn receive<T: for<'a> Deserialize<'a>>(socket: BorrowedFd<'_>) -> Result<Option<T>> {
    use nix::errno::Errno;
    use nix::sys::socket::{MsgFlags, recv};
    let mut buffer = [0; MESSAGE];
    match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Err(Error::from(std::io::ErrorKind::UnexpectedEof)),
        Ok(length) => Ok(Some(serde_json::from_slice(&buffer[..length])?)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Answers a permission event (fanotify(7), `struct fanotify_response`). The kernel knows events by the number that
/// their descriptor had in whoever read them, so the supervisor can answer for a guard that is gone. False: there is
/// no such event.
fn answer(group: BorrowedFd<'_>, number: i32, allow: bool) -> bool {
    let verdict: u32 = if allow { libc::FAN_ALLOW } else { libc::FAN_DENY };
    let mut response = [0; 8];
    response[..4].copy_from_slice(&number.to_ne_bytes());
    response[4..].copy_from_slice(&verdict.to_ne_bytes());
    nix::unistd::write(group, &response).is_ok()
}

/// Waits until one of them can be read or is closed, or so many milliseconds are over. Which can.
fn wait<const N: usize>(of: [Option<BorrowedFd<'_>>; N], ms: u64) -> [bool; N] {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let here: Vec<usize> = (0..N).filter(|at| of[*at].is_some()).collect();
    let mut polled: Vec<PollFd<'_>> =
        of.iter().flatten().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(i32::try_from(ms).unwrap_or(i32::MAX)).unwrap_or(PollTimeout::MAX);
    let mut ready = [false; N];
    if poll(&mut polled, timeout).is_ok_and(|count| count > 0) {
        for (at, polled) in here.into_iter().zip(&polled) {
            ready[at] = polled.any().unwrap_or(true);
        }
    }
    ready
}
