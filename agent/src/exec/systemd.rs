//! What systemd keeps for the service over its restarts.

use crate::sys;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

/// The name under which systemd keeps the group.
pub(super) const STORED: &str = "exec-guard";

/// The group that systemd kept over a restart of the service (sd_listen_fds(3)).
pub(super) fn stored() -> Option<OwnedFd> {
    const FIRST: i32 = 3;
    let own = std::env::var("LISTEN_PID").ok()?.parse() == Ok(std::process::id());
    let named = std::env::var("LISTEN_FDNAMES").is_ok_and(|names| names == STORED);
    (own && named).then(|| sys::inherited(FIRST).ok()).flatten()
}

/// Tells systemd something, and gives it a descriptor to keep (sd_notify(3)). Without systemd, nothing.
pub(super) fn notify(words: &str, keep: Option<&OwnedFd>) -> nix::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg, socket};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from) else { return Ok(()) };
    let address = match path.to_string_lossy().strip_prefix('@') {
        Some(name) => UnixAddr::new_abstract(name.as_bytes())?,
        None => UnixAddr::new(&path)?,
    };
    let to = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let numbers: Vec<i32> = keep.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights = if numbers.is_empty() { &[][..] } else { &rights[..] };
    let words = [std::io::IoSlice::new(words.as_bytes())];
    sendmsg(to.as_raw_fd(), &words, rights, MsgFlags::MSG_NOSIGNAL, Some(&address)).map(drop)
}
