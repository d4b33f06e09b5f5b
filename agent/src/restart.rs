//! Leaving a kernel, whatever its disks do. A disk that never answers holds the kernel up for ever in two places: `sync(2)`
//! waits for whoever has the disk open for the first time, and reboot(2), also into a kexec, asks every device to shut
//! down, also one that its driver still looks at (`device_shutdown`). So each has its time; then the machine is reset
//! without asking any device (Documentation/admin-guide/sysrq.rst, `b`), and its firmware starts what is assigned.

use crate::error::{AgentError, Result};
use crate::log;
use nix::sys::reboot::{RebootMode, reboot};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// So long what was written has to reach the disks.
const SYNC: Duration = Duration::from_secs(10);
/// So long the kernel has to leave: the caches of large disks are written in it. Less than what the hardware watchdog gives,
/// which nobody pets meanwhile ([`crate::watchdog`]).
const LEAVES: Duration = Duration::from_secs(60);
const SYSRQ: &str = "/proc/sysrq-trigger";
/// What systemd calls last of all, with the way it leaves (systemd-shutdown(8)). The image has a link to the agent there.
pub const HOOKS: &str = "/usr/lib/systemd/system-shutdown";
/// The command by which that goes on beside systemd.
pub const LAST_RESORT: &str = "last-resort";

/// Leaves. Comes back only with an error.
pub fn leave(mode: RebootMode) -> std::io::Error {
    let (tell, synced) = channel();
    // Without a thread it is not synced: what must last was flushed when it was written.
    let begun = std::thread::Builder::new().spawn(move || {
        nix::unistd::sync();
        let _ = tell.send(());
    });
    if begun.is_err() || synced.recv_timeout(SYNC).is_err() {
        println!("kiln-agent: a disk gives no answer within {} s: the machine leaves without it", SYNC.as_secs());
    }
    let (stays, gone) = channel::<()>();
    let watches = std::thread::Builder::new().spawn(move || {
        if gone.recv_timeout(LEAVES) == Err(RecvTimeoutError::Timeout) {
            reset();
        }
    });
    if let Err(error) = watches {
        println!("kiln-agent: nothing watches over this restart: {error}");
    }
    log::flush();
    let error = match reboot(mode) {
        Err(errno) => errno.into(),
        Ok(never) => match never {},
    };
    drop(stays);
    error
}

/// The firmware is next, at once.
fn reset() {
    println!("kiln-agent: the kernel does not leave within {} s: the machine is reset", LEAVES.as_secs());
    log::flush();
    if let Err(error) = std::fs::write(SYSRQ, "b") {
        println!("kiln-agent: {SYSRQ}: {error}");
    }
}

/// Called by systemd before it leaves: a process of its own watches over that, as systemd waits for this one.
#[allow(clippy::zombie_processes)] // it outlives this one
pub fn hook(way: Option<&str>) -> Result<()> {
    // Who switches a machine off does not want it started.
    if !matches!(way, Some("reboot" | "kexec")) {
        return Ok(());
    }
    let me = std::env::current_exe().map_err(AgentError::system("finding the agent"))?;
    let mut command = Command::new(&me);
    command.arg(LAST_RESORT).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map(drop).map_err(AgentError::file(me))
}

/// That process. It goes with the kernel.
pub fn last_resort() {
    std::thread::sleep(LEAVES);
    reset();
}
