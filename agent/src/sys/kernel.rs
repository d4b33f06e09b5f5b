//! Modules, kexec, the clock, the watchdog, keys and descriptors.

use super::close_all_but;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;

/// `finit_module(2)` of a `.ko` or of one compressed as the kernel itself can read, with its parameters.
pub fn load_module(file: &File, compressed: bool, parameters: &CStr) -> Result<()> {
    const MODULE_INIT_COMPRESSED_FILE: libc::c_int = 4;
    let flags = if compressed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
    // SAFETY: the descriptor is open for the call, the parameters are NUL-terminated.
    let rc = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), flags) };
    if rc == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// `kexec_file_load(2)`: kernel and initrd are read, and where lockdown asks for it verified, by the running kernel.
pub fn kexec_file_load(kernel: &File, initrd: &File, command_line: &str) -> Result<()> {
    let line =
        CString::new(command_line).map_err(|_| Error::new(ErrorKind::InvalidInput, "NUL in the command line"))?;
    let len = line.as_bytes_with_nul().len();
    // SAFETY: both descriptors are open, `line` lives over the call and `len` counts its NUL as the call demands.
    let rc = unsafe {
        libc::syscall(libc::SYS_kexec_file_load, kernel.as_raw_fd(), initrd.as_raw_fd(), len, line.as_ptr(), 0_u64)
    };
    if rc == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// `adjtimex(2)`, reading only: the largest error of the kernel's clock in microseconds; none while nothing sets it.
pub fn clock_error() -> Result<Option<u64>> {
    // SAFETY: every field of `timex` is a number, for which zero is valid; `modes` of zero changes nothing.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `state` has the kernel's layout and lives over the call.
    let rc = unsafe { libc::adjtimex(&raw mut state) };
    if rc < 0 {
        return Err(Error::last_os_error());
    }
    Ok((state.status & libc::STA_UNSYNC == 0).then(|| u64::try_from(state.maxerror).unwrap_or(u64::MAX)))
}

nix::ioctl_read!(fs_get_flags, b'f', 1, libc::c_long);
nix::ioctl_write_ptr!(fs_set_flags, b'f', 2, libc::c_long);

/// Takes the immutable flag off a file: efivarfs puts it on every variable it does not know (efivarfs.rst).
pub fn clear_immutable(file: &File) -> Result<()> {
    const FS_IMMUTABLE_FL: libc::c_long = 0x10;
    let mut flags: libc::c_long = 0;
    // SAFETY: `flags` is the long that FS_IOC_GETFLAGS writes, and FS_IOC_SETFLAGS reads.
    unsafe {
        fs_get_flags(file.as_raw_fd(), &raw mut flags)?;
        flags &= !FS_IMMUTABLE_FL;
        fs_set_flags(file.as_raw_fd(), &raw const flags)?;
    }
    Ok(())
}

nix::ioctl_readwrite!(wdioc_settimeout, b'W', 6, libc::c_int);

/// Sets an open watchdog's time-out (watchdog-api.rst, WDIOC_SETTIMEOUT); gives what the hardware made of it. Seconds.
pub fn watchdog_timeout(watchdog: &File, seconds: libc::c_int) -> Result<libc::c_int> {
    let mut seconds = seconds;
    // SAFETY: `seconds` is the int that the call reads and writes.
    unsafe { wdioc_settimeout(watchdog.as_raw_fd(), &raw mut seconds) }?;
    Ok(seconds)
}

/// A descriptor that the runtime waits for, of a file that can be polled.
pub fn watched(file: File) -> Result<AsyncFd<File>> {
    // SAFETY: a File's descriptor is its own, stays the same, and is open for as long as the AsyncFd that owns it.
    Ok(unsafe { AsyncFd::register(file) }?)
}

/// A file in memory, gone with its last descriptor.
pub fn memory_file(name: &CStr) -> Result<File> {
    // SAFETY: `name` is NUL-terminated; a descriptor that is not negative is ours alone.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 { Err(Error::last_os_error()) } else { Ok(File::from_raw_fd(fd)) }
    }
}

/// `add_key(2)`: a key of type `user` in this thread's process keyring, found there by `request_key`.
pub fn add_user_key(description: &CStr, payload: &[u8]) -> Result<()> {
    const KEY_SPEC_PROCESS_KEYRING: libc::c_int = -2;
    // SAFETY: type and description are NUL-terminated, the payload lives over the call and has the given length.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            description.as_ptr(),
            payload.as_ptr(),
            payload.len(),
            KEY_SPEC_PROCESS_KEYRING,
        )
    };
    if rc < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Takes over a descriptor that systemd gave this process (sd_listen_fds(3)); not for exec'd children.
pub fn inherited(number: RawFd) -> Result<OwnedFd> {
    // SAFETY: F_SETFD fails on what is not open; the caller's environment says that this one is meant for it.
    unsafe {
        if libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) != 0 {
            return Err(Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(number))
    }
}

/// Resets the machine unless this process is another program within so long. An execve(2) first ends every other thread and waits
/// for it (fs/exec.c, de_thread): one that a disk holds in the kernel would make that for ever. So would the closing of the disk
/// that it brings, if it were the last: `disk` is held beside it, by a process that may wait for it.
pub fn reset_unless_gone(patience: Duration, disk: Option<&File>) -> Result<()> {
    fn reset() {
        // SAFETY: the path is NUL-terminated, and one byte is written (Documentation/admin-guide/sysrq.rst).
        unsafe {
            let trigger = libc::open(c"/proc/sysrq-trigger".as_ptr(), libc::O_WRONLY);
            libc::write(trigger, b"b".as_ptr().cast(), 1);
        }
    }
    let (_, pipe) = minder(patience, disk.map(File::as_raw_fd), reset)?;
    // The kernel closes it when the other program begins.
    let _ = pipe.into_raw_fd();
    Ok(())
}

/// A process that does `late` unless the end of a pipe that is given back is closed within so long. It keeps `disk` open until it
/// ends.
fn minder(patience: Duration, disk: Option<RawFd>, late: fn()) -> Result<(libc::pid_t, OwnedFd)> {
    let (reader, writer) = std::io::pipe()?;
    let patience = libc::c_int::try_from(patience.as_millis()).unwrap_or(libc::c_int::MAX);
    let mut wait = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the child makes system calls and ends: nothing that a lock of another thread could hold up (signal-safety(7)).
    // `wait` is the one pollfd that poll reads and writes.
    match unsafe { libc::fork() } {
        ..0 => Err(Error::last_os_error()),
        0 => unsafe {
            close_all_but([wait.fd, disk.unwrap_or(wait.fd)]);
            if libc::poll(&raw mut wait, 1, patience) == 0 {
                late();
            }
            libc::_exit(0)
        },
        child => Ok((child, writer.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(child: libc::pid_t) -> libc::c_int {
        let mut status = 0;
        // SAFETY: the child is the test's own; `status` is the int that is written.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(libc::WIFEXITED(status));
        libc::WEXITSTATUS(status)
    }

    fn late() {
        // SAFETY: it ends the child that calls it.
        unsafe { libc::_exit(7) }
    }

    #[test]
    fn what_is_not_gone_in_its_time_is_late_and_what_is_gone_is_not() {
        let disk = tempfile::tempfile().unwrap();
        let (child, pipe) = minder(Duration::from_millis(20), None, late).unwrap();
        assert_eq!(status(child), 7);
        drop(pipe);
        let (child, pipe) = minder(Duration::from_secs(600), Some(disk.as_raw_fd()), late).unwrap();
        drop(pipe);
        assert_eq!(status(child), 0);
    }
}
