//! What the guard of executable places stands on: fanotify, leases, locked memory, and a filter on itself.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What a file system's mark asks for: permission to open a file for execution (fanotify(7)).
pub const FAN_OPEN_EXEC_PERM: u64 = libc::FAN_OPEN_EXEC_PERM;
/// What a file's mark asks for: word that a writer closed it.
pub const FAN_CLOSE_WRITE: u64 = libc::FAN_CLOSE_WRITE;

/// A fanotify group for permission decisions over files' final content. Reading it never waits. Its queue has no limit:
/// at one, the kernel would let through what it cannot ask about. What waits there is one event for each process.
pub fn fanotify_group() -> Result<OwnedFd> {
    let flags = libc::FAN_CLASS_CONTENT
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_UNLIMITED_QUEUE
        | libc::FAN_UNLIMITED_MARKS;
    let files = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_LARGEFILE;
    // SAFETY: two numbers; a descriptor that is not negative is ours alone.
    unsafe {
        let fd = libc::fanotify_init(flags, files.cast_unsigned());
        if fd < 0 { Err(Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// What to mark, of the file system or the file that a descriptor belongs to.
#[derive(Debug, Clone, Copy)]
pub enum Mark {
    /// Ask before a file of this file system is executed.
    FileSystem,
    /// Tell when a writer closes this file. It does not keep the file in the kernel's memory.
    File,
    /// Forget the marks of all files.
    ForgetFiles,
}

/// `fanotify_mark(2)`.
pub fn fanotify_mark(group: BorrowedFd<'_>, mark: Mark, of: BorrowedFd<'_>) -> Result<()> {
    let (flags, mask) = match mark {
        Mark::FileSystem => (libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM, FAN_OPEN_EXEC_PERM),
        Mark::File => (libc::FAN_MARK_ADD | libc::FAN_MARK_EVICTABLE, FAN_CLOSE_WRITE),
        Mark::ForgetFiles => (libc::FAN_MARK_FLUSH, 0),
    };
    // SAFETY: both descriptors are open for the call; without a path the second one names the object.
    let rc = unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask, of.as_raw_fd(), std::ptr::null()) };
    if rc == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// One event of a fanotify group.
#[derive(Debug)]
pub struct FanEvent {
    pub mask: u64,
    /// The file; none if the queue overflowed.
    pub file: Option<File>,
    pub pid: i32,
}

/// Reads what waits in the group, at most 32 events; nothing if none does.
pub fn fanotify_read(group: BorrowedFd<'_>) -> Result<Vec<FanEvent>> {
    const SIZE: usize = size_of::<libc::fanotify_event_metadata>();
    let mut buffer = [0_u8; 32 * SIZE];
    let length = match nix::unistd::read(group, &mut buffer) {
        Ok(length) => length,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => 0,
        Err(errno) => return Err(errno.into()),
    };
    let mut events = Vec::new();
    let mut rest = &buffer[..length];
    while rest.len() >= SIZE {
        // SAFETY: SIZE bytes are there, and any bytes are a value of this struct of numbers.
        let event: libc::fanotify_event_metadata = unsafe { std::ptr::read_unaligned(rest.as_ptr().cast()) };
        let next = usize::try_from(event.event_len).unwrap_or(0);
        if event.vers != libc::FANOTIFY_METADATA_VERSION || next < SIZE || next > rest.len() {
            return Err(Error::other(format!("fanotify events of version {} are not known", event.vers)));
        }
        // SAFETY: the kernel opened it for this process with this very read.
        let file = (event.fd >= 0).then(|| unsafe { File::from_raw_fd(event.fd) });
        events.push(FanEvent { mask: event.mask, file, pid: event.pid });
        rest = &rest[next..];
    }
    Ok(events)
}

/// Takes or gives back a read lease on an open file (fcntl_locking(2)): none is given while anybody has it open for
/// writing, and who wants to open it for writing waits while it is held.
pub fn lease(file: &File, take: bool) -> Result<()> {
    let kind = if take { libc::F_RDLCK } else { libc::F_UNLCK };
    // SAFETY: a descriptor that is open and a number.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::c_int::from(kind)) };
    if rc == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// Makes this process the first to run, keeps it out of swap with all it will ever map, and lets it survive the signal
/// by which the kernel asks for a lease.
pub fn hold_in_memory() -> Result<()> {
    const PRIO_THIS_PROCESS: libc::id_t = 0;
    // SAFETY: numbers only; SIG_IGN runs no code.
    let done = unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
        libc::setpriority(libc::PRIO_PROCESS, PRIO_THIS_PROCESS, -20) == 0
            && libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) == 0
    };
    if done { Ok(()) } else { Err(Error::last_os_error()) }
}

/// This architecture in linux/audit.h.
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
/// This architecture in linux/audit.h.
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// From here on this thread, and every one it starts, opens no file and executes nothing: the kernel answers EPERM
/// (seccomp_unotify(2)'s older brother, SECCOMP_MODE_FILTER). It cannot be taken back.
pub fn open_nothing() -> Result<()> {
    let banned = [
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_open_by_handle_at,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_creat,
    ];
    let word = |number: libc::c_long| u32::try_from(number).expect("system calls have small numbers");
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).expect("operation codes of classic BPF have 16 bits"),
        jt,
        jf,
        k,
    };
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let refuse = step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | 1);
    let mut program = vec![
        // struct seccomp_data: nr at 0, arch at 4. Another architecture's calls are refused all.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 4),
        step(equal, 1, 0, AUDIT_ARCH),
        refuse,
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
    ];
    for (at, number) in banned.iter().enumerate() {
        let to_refuse = u8::try_from(banned.len() - at).expect("a short list");
        program.push(step(equal, to_refuse, 0, word(*number)));
    }
    program.push(step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    program.push(refuse);
    let len = libc::c_ushort::try_from(program.len()).expect("a short program");
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: the program lives over the call, and `len` is its length; the other arguments are numbers.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    };
    if done { Ok(()) } else { Err(Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_thread_opens_and_executes_nothing_and_goes_on() {
        let sealed = std::thread::spawn(|| {
            let before = File::open("/proc/self/status").unwrap();
            open_nothing().unwrap();
            let denied = |error: Error| assert_eq!(error.raw_os_error(), Some(libc::EPERM));
            denied(File::open("/dev/null").unwrap_err());
            denied(File::create("/dev/null").unwrap_err());
            denied(std::process::Command::new("/bin/true").spawn().unwrap_err());
            std::thread::spawn(move || denied(File::open("/dev/null").unwrap_err())).join().unwrap();
            std::io::read_to_string(before).unwrap()
        });
        let status = sealed.join().unwrap();
        assert!(status.contains("Name:"), "what was open stays so: {status}");
        File::open("/dev/null").unwrap();
    }
}
