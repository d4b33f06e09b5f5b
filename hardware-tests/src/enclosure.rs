//! The lab's own namespaces: user, network, mount and PID.
//!
//! Whatever happens to the lab, nothing stays behind: the first process inside is the PID namespace's init, and the
//! kernel kills it when the process outside dies (`PR_SET_PDEATHSIG`), everything inside when the init dies
//! (`pid_namespaces(7)`), and frees bridge, taps and mounts with the last process. Three processes in a chain:
//!
//! `kiln-lab run` (outside, waits) → `kiln-lab init` (PID 1, mounts, then becomes…) → `kiln-lab run` (inside).
//!
//! A user namespace with one mapping, caller → 0, serves root and ordinary users alike: inside, the lab is root over its
//! own network and mounts and nobody elsewhere.

use crate::error::{AtPath, LabError};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getegid, geteuid};
use std::ffi::OsString;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// Set inside.
const INSIDE: &str = "KILN_LAB_INSIDE";
/// PID of the process outside, as the outer `/proc` names it.
const OUTSIDE_PID: &str = "KILN_LAB_OUTSIDE_PID";

/// Whether this process runs inside the lab's namespaces.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs `argv` inside new namespaces and waits for it, passing SIGINT, SIGTERM and SIGHUP on as SIGTERM.
///
/// `program` is the `kiln-lab` binary. `listener`, if any, was opened in the caller's network and becomes the standard
/// input inside. Must be called while this process has one thread.
pub fn run(
    program: &Path,
    argv: &[OsString],
    listener: Option<TcpListener>,
    scratch: &Path,
) -> Result<ExitStatus, LabError> {
    std::fs::create_dir_all(scratch).at(scratch)?;
    let (uid, gid) = (geteuid(), getegid());
    let outside_pid = std::process::id();
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)
        .map_err(|source| LabError::NoUserNamespaces { source })?;
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ] {
        std::fs::write(file, text).at(file)?;
    }
    // From here on SIGINT must not end this process before the inside has ended. No thread may wait for signals here:
    // after unshare(CLONE_NEWPID) the kernel refuses new threads.
    let watched = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD].map(|s| s as i32);
    let watch_failed = |source| LabError::Enclosure { step: "watch signals", source };
    let mut signals = signal_hook::iterator::Signals::new(watched).map_err(watch_failed)?;
    let mut child = Command::new(program)
        .arg("init")
        .arg(scratch)
        .arg("--")
        .args(argv)
        .env(INSIDE, "1")
        .env(OUTSIDE_PID, outside_pid.to_string())
        .stdin(listener.map_or_else(Stdio::null, |l| Stdio::from(OwnedFd::from(l))))
        // Ctrl-C on a terminal reaches only this process, which passes it on: one order of shutting down, not four.
        .process_group(0)
        .spawn()
        .map_err(|source| LabError::Spawn { command: program.display().to_string(), source })?;
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a PID fits i32"));
    loop {
        if let Some(status) =
            child.try_wait().map_err(|source| LabError::Enclosure { step: "wait for the process", source })?
        {
            return Ok(status);
        }
        for signal in signals.wait() {
            if signal != Signal::SIGCHLD as i32 {
                // It may have ended just now: then there is nobody to tell.
                let _ = kill(pid, Signal::SIGTERM);
            }
        }
    }
}

/// The first process inside: ties its life to the process outside, mounts, brings loopback up, becomes `argv`.
pub fn init(scratch: &Path, argv: &[OsString]) -> Result<std::convert::Infallible, LabError> {
    let step = |step: &'static str| move |e: nix::Error| LabError::Enclosure { step, source: e.into() };
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("ask for the parent's death signal"))?;
    // The parent may have died before the line above. /proc is still the outer one: it knows.
    let stat = std::fs::read_to_string("/proc/self/stat").at("/proc/self/stat")?;
    let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1).map(str::to_owned));
    if parent != std::env::var(OUTSIDE_PID).ok() {
        return Err(LabError::NotEnclosed);
    }
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(step("make mounts private"))?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("kiln-lab"), scratch, Some("tmpfs"), plain, Some("mode=0700")).map_err(step("mount a tmpfs"))?;
    // For tools that look at processes. Containers that hide parts of /proc forbid it; then the outer one stays.
    let _ = mount(Some("proc"), "/proc", Some("proc"), plain | MsFlags::MS_NOEXEC, none);
    crate::command::run("ip", ["link", "set", "lo", "up"])?;
    let (program, args) = argv.split_first().ok_or(LabError::NotEnclosed)?;
    let source = Command::new(program).args(args).exec();
    Err(LabError::Spawn { command: program.display().to_string(), source })
}

/// An exit code for what ran inside: its own, or 128 + signal as shells do.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
