//! The agent's only unsafe code: system calls that no safe wrapper covers. Each function checks its arguments and
//! returns the error the kernel gave.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
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

const LO_FLAGS_READ_ONLY: u32 = 1;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, LoopConfig);

nix::ioctl_none!(blk_reread_partitions, 0x12, 95);

/// `BLKRRPART`: the kernel's partitions become those of the disk's table. Refused while one of them is in use.
pub fn reread_partitions(disk: &File) -> Result<()> {
    // SAFETY: an ioctl without an argument on an open descriptor.
    unsafe { blk_reread_partitions(disk.as_raw_fd()) }?;
    Ok(())
}

/// A free loop device's number, from an open /dev/loop-control.
pub fn loop_get_free(control: &File) -> Result<u32> {
    // SAFETY: an ioctl without an argument on an open descriptor.
    let number = unsafe { loop_ctl_get_free(control.as_raw_fd()) }?;
    u32::try_from(number).map_err(|_| Error::other("the kernel gave a negative loop number"))
}

/// Binds `backing` read-only to an open loop device, with blocks of 4096 bytes.
pub fn loop_bind(device: &File, backing: &File) -> Result<()> {
    let fd = u32::try_from(backing.as_raw_fd()).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
    let info = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: LO_FLAGS_READ_ONLY,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let config = LoopConfig { fd, block_size: 4096, info, reserved: [0; 8] };
    // SAFETY: `config` has the kernel's layout (repr(C), linux/loop.h) and lives over the call.
    unsafe { loop_configure(device.as_raw_fd(), &raw const config) }?;
    Ok(())
}

/// `struct dm_ioctl` of linux/dm-ioctl.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct DmIoctl {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// `struct dm_target_spec` of linux/dm-ioctl.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct DmTargetSpec {
    sector_start: u64,
    length: u64,
    status: i32,
    next: u32,
    target_type: [u8; 16],
}

/// One ioctl's buffer: header, one target, its parameters.
#[repr(C)]
struct DmBuffer {
    header: DmIoctl,
    target: DmTargetSpec,
    params: [u8; 1024],
}

const DM_READONLY_FLAG: u32 = 1;
/// Asks `DM_TABLE_STATUS` for the table, not the status.
const DM_STATUS_TABLE_FLAG: u32 = 1 << 4;

/// What to ask of device-mapper.
#[derive(Clone, Copy)]
pub enum DmCommand {
    Create,
    Load,
    Resume,
    Table,
}

impl DmCommand {
    /// `_IOWR(0xfd, N, struct dm_ioctl)`.
    fn request(self) -> libc::c_ulong {
        let number: u8 = match self {
            Self::Create => 3,
            Self::Resume => 6,
            Self::Load => 9,
            Self::Table => 12,
        };
        nix::request_code_readwrite!(0xfd, number, size_of::<DmIoctl>()) as libc::c_ulong
    }
}

/// Asks device-mapper (an open /dev/mapper/control) about the device `name`. `table` is (sectors, type, parameters)
/// for `Load`. For `Table` the answer is the loaded table's parameters.
pub fn device_mapper(
    control: &File,
    command: DmCommand,
    name: &str,
    table: Option<(u64, &str, &str)>,
) -> Result<String> {
    let too_long = || Error::new(ErrorKind::InvalidInput, "device-mapper name or table too long");
    let size = u32::try_from(size_of::<DmBuffer>()).expect("a fixed size below 4 GiB");
    let start = u32::try_from(size_of::<DmIoctl>()).expect("a fixed size below 4 GiB");
    let mut buffer = DmBuffer {
        header: DmIoctl {
            version: [4, 0, 0],
            data_size: size,
            data_start: start,
            target_count: 0,
            open_count: 0,
            flags: 0,
            event_nr: 0,
            padding: 0,
            dev: 0,
            name: [0; 128],
            uuid: [0; 129],
            data: [0; 7],
        },
        target: DmTargetSpec { sector_start: 0, length: 0, status: 0, next: 0, target_type: [0; 16] },
        params: [0; 1024],
    };
    put(&mut buffer.header.name, name).ok_or_else(too_long)?;
    match command {
        DmCommand::Create | DmCommand::Load => buffer.header.flags = DM_READONLY_FLAG,
        DmCommand::Table => buffer.header.flags = DM_STATUS_TABLE_FLAG,
        DmCommand::Resume => {}
    }
    if let Some((sectors, target_type, params)) = table {
        buffer.header.target_count = 1;
        buffer.target.length = sectors;
        put(&mut buffer.target.target_type, target_type).ok_or_else(too_long)?;
        put(&mut buffer.params, params).ok_or_else(too_long)?;
    }
    // SAFETY: `buffer` has the kernel's layout, `data_size` is its whole size, and the kernel writes no further.
    let rc = unsafe { raw_ioctl(control.as_raw_fd(), command.request(), (&raw mut buffer).cast()) };
    if rc < 0 {
        return Err(Error::last_os_error());
    }
    Ok(CStr::from_bytes_until_nul(&buffer.params).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default())
}

/// SAFETY: the caller vouches that `arg` points to what `request` reads and writes.
unsafe fn raw_ioctl(fd: RawFd, request: libc::c_ulong, arg: *mut libc::c_void) -> libc::c_int {
    // musl and glibc differ in the type of `request`; its 32 bits are the same.
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::unnecessary_cast)]
    unsafe {
        libc::ioctl(fd, request as _, arg)
    }
}

/// Copies `text` and keeps a NUL behind it.
fn put(field: &mut [u8], text: &str) -> Option<()> {
    (text.len() < field.len()).then(|| field[..text.len()].copy_from_slice(text.as_bytes()))
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

nix::ioctl_write_ptr_bad!(blk_discard, 0x1277, [u64; 2]);
nix::ioctl_write_ptr_bad!(blk_secdiscard, 0x127d, [u64; 2]);
nix::ioctl_none_bad!(blk_flsbuf, 0x1261);

/// `BLKDISCARD` or `BLKSECDISCARD` of the first `bytes` of an open disk (linux/fs.h). What is left is the disk's affair.
pub fn discard(disk: &File, bytes: u64, secure: bool) -> Result<()> {
    let range = [0, bytes];
    // SAFETY: `range` is the two u64 (start, length) that both calls read.
    unsafe {
        if secure {
            blk_secdiscard(disk.as_raw_fd(), &raw const range)?;
        } else {
            blk_discard(disk.as_raw_fd(), &raw const range)?;
        }
    }
    Ok(())
}

/// `BLKFLSBUF`: what is cached of a disk is dropped, so that the next read is the disk's own answer. For a file in its
/// place the same is asked as advice.
pub fn forget_buffers(disk: &File) -> Result<()> {
    nix::fcntl::posix_fadvise(disk, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    // SAFETY: an ioctl without an argument on an open descriptor.
    match unsafe { blk_flsbuf(disk.as_raw_fd()) } {
        Ok(_) | Err(nix::errno::Errno::ENOTTY) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// `struct nvme_passthru_cmd` of linux/nvme_ioctl.h.
#[repr(C)]
#[derive(Default)]
struct NvmePassthru {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11_to_15: [u32; 5],
    timeout_ms: u32,
    result: u32,
}

nix::ioctl_readwrite!(nvme_admin_cmd, b'N', 0x41, NvmePassthru);
nix::ioctl_none!(nvme_id, b'N', 0x40);

/// An admin command of NVMe that sends no data.
#[derive(Debug, Clone, Copy)]
pub struct NvmeCommand {
    pub opcode: u8,
    pub nsid: u32,
    pub cdw10: u32,
    pub timeout_ms: u32,
}

/// `NVME_IOCTL_ADMIN_CMD`: sends a command to the controller of an open disk; what it answers goes to `data`.
pub fn nvme_admin(disk: &File, command: NvmeCommand, data: &mut [u8]) -> Result<()> {
    let mut passthru = NvmePassthru {
        opcode: command.opcode,
        nsid: command.nsid,
        addr: if data.is_empty() { 0 } else { data.as_mut_ptr() as u64 },
        data_len: u32::try_from(data.len()).map_err(|_| Error::from(ErrorKind::InvalidInput))?,
        cdw10: command.cdw10,
        timeout_ms: command.timeout_ms,
        ..NvmePassthru::default()
    };
    // SAFETY: `passthru` has the kernel's layout; `addr` and `data_len` are a buffer that lives over the call.
    match unsafe { nvme_admin_cmd(disk.as_raw_fd(), &raw mut passthru) }? {
        0 => Ok(()),
        status => Err(Error::other(format!("NVMe command {:#04x} ended with status {status:#x}", command.opcode))),
    }
}

/// `NVME_IOCTL_ID`: the name space that an open disk is.
pub fn nvme_name_space(disk: &File) -> Result<u32> {
    // SAFETY: an ioctl without an argument on an open descriptor.
    let number = unsafe { nvme_id(disk.as_raw_fd()) }?;
    u32::try_from(number).map_err(|_| Error::other("the kernel gave a negative name space"))
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

/// `struct sg_io_hdr` of scsi/sg.h.
#[repr(C)]
struct SgIoHdr {
    interface_id: i32,
    direction: i32,
    cmd_len: u8,
    sense_max: u8,
    iovec_count: u16,
    data_len: u32,
    data: *mut u8,
    cmd: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: i32,
    user: *mut u8,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sense_written: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration: u32,
    info: u32,
}

/// How long a disk may take to answer what it is asked of itself.
pub const DISK_PATIENCE_MS: u32 = 10_000;

/// `SG_IO`: a SCSI command that reads into `data` or, where that is empty, moves nothing. Gives its status and sense.
pub fn scsi_command(disk: &File, cdb: &[u8], data: &mut [u8]) -> Result<(u8, [u8; 32])> {
    const SG_IO: libc::c_ulong = 0x2285;
    let mut sense = [0_u8; 32];
    let invalid = |_| Error::from(ErrorKind::InvalidInput);
    let mut header = SgIoHdr {
        interface_id: i32::from(b'S'),
        direction: if data.is_empty() { -1 } else { -3 },
        cmd_len: u8::try_from(cdb.len()).map_err(invalid)?,
        sense_max: 32,
        iovec_count: 0,
        data_len: u32::try_from(data.len()).map_err(invalid)?,
        data: data.as_mut_ptr(),
        cmd: cdb.as_ptr(),
        sense: sense.as_mut_ptr(),
        timeout_ms: DISK_PATIENCE_MS,
        flags: 0,
        pack_id: 0,
        user: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sense_written: 0,
        host_status: 0,
        driver_status: 0,
        residual: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: `header` has the kernel's layout; its three pointers go to buffers of the lengths beside them, which live
    // over the call.
    let rc = unsafe { raw_ioctl(disk.as_raw_fd(), SG_IO, (&raw mut header).cast()) };
    match rc {
        0 if header.host_status == 0 => Ok((header.status, sense)),
        0 => Err(Error::other("the controller did not pass the command on")),
        _ => Err(Error::last_os_error()),
    }
}

/// `struct ipmi_msg` of linux/ipmi.h.
#[repr(C)]
struct IpmiMsg {
    netfn: u8,
    cmd: u8,
    data_len: u16,
    data: *mut u8,
}

/// `struct ipmi_req` of linux/ipmi.h.
#[repr(C)]
struct IpmiReq {
    addr: *mut u8,
    addr_len: u32,
    msgid: libc::c_long,
    msg: IpmiMsg,
}

/// `struct ipmi_recv` of linux/ipmi.h.
#[repr(C)]
struct IpmiRecv {
    recv_type: i32,
    addr: *mut u8,
    addr_len: u32,
    msgid: libc::c_long,
    msg: IpmiMsg,
}

/// A command to the management controller of this machine through `/dev/ipmi0`, and its answer, completion code first.
pub fn ipmi_command(device: &File, netfn: u8, cmd: u8, data: &[u8]) -> Result<Vec<u8>> {
    // _IOR('i', 13, struct ipmi_req), _IOWR('i', 11, struct ipmi_recv)
    const SEND: libc::c_ulong = 0x8028_690d;
    const RECEIVE_TRUNC: libc::c_ulong = 0xc030_690b;
    const PATIENCE_MS: libc::c_int = 5_000;
    // struct ipmi_system_interface_addr: type, channel (the controller itself), lun.
    let mut addr = [0_u8; 32];
    addr[..4].copy_from_slice(&0x0c_i32.to_ne_bytes());
    addr[4..6].copy_from_slice(&0x0f_i16.to_ne_bytes());
    let mut sent = data.to_vec();
    let data_len = u16::try_from(sent.len()).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
    let msg = IpmiMsg { netfn, cmd, data_len, data: sent.as_mut_ptr() };
    let mut request = IpmiReq { addr: addr.as_mut_ptr(), addr_len: 8, msgid: 1, msg };
    // SAFETY: `request` has the kernel's layout; address and data are of the lengths beside them.
    if unsafe { raw_ioctl(device.as_raw_fd(), SEND, (&raw mut request).cast()) } < 0 {
        return Err(Error::last_os_error());
    }
    let mut ready = libc::pollfd { fd: device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure, and the count says one.
    if unsafe { libc::poll(&raw mut ready, 1, PATIENCE_MS) } < 1 {
        return Err(Error::other(format!("the BMC gives no answer within {} s", PATIENCE_MS / 1000)));
    }
    let mut answer = vec![0; 64];
    let msg = IpmiMsg { netfn: 0, cmd: 0, data_len: 64, data: answer.as_mut_ptr() };
    let mut received = IpmiRecv { recv_type: 0, addr: addr.as_mut_ptr(), addr_len: 32, msgid: 0, msg };
    // SAFETY: likewise; the kernel cuts the answer to the 64 bytes there are.
    if unsafe { raw_ioctl(device.as_raw_fd(), RECEIVE_TRUNC, (&raw mut received).cast()) } < 0 {
        return Err(Error::last_os_error());
    }
    answer.truncate(received.msg.data_len.into());
    Ok(answer)
}

/// A socket that gets the payloads of one EtherType that come in on one interface, also those to `groups`
/// (packet(7)).
#[allow(clippy::cast_possible_truncation)] // small constants and sizes of small structures, in the types C gives them
pub fn frames(interface: u32, ethertype: u16, groups: &[[u8; 6]]) -> Result<OwnedFd> {
    let index = i32::try_from(interface).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers; a descriptor that is not negative is ours alone.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, kind, 0);
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ethertype.to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    for group in groups {
        let mut member = libc::packet_mreq {
            mr_ifindex: index,
            mr_type: libc::PACKET_MR_MULTICAST as u16,
            mr_alen: 6,
            mr_address: [0; 8],
        };
        member.mr_address[..6].copy_from_slice(group);
        let size = size_of::<libc::packet_mreq>() as libc::socklen_t;
        let (level, name) = (libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP);
        // SAFETY: `member` is the structure that the option takes, with its size.
        let rc = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const member).cast(), size) };
        if rc < 0 {
            return Err(Error::last_os_error());
        }
    }
    let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `to` is this family's address, with its size.
    let rc = unsafe { libc::bind(socket.as_raw_fd(), (&raw const to).cast(), size) };
    if rc < 0 { Err(Error::last_os_error()) } else { Ok(socket) }
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

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(size_of::<DmIoctl>(), 312);
        assert_eq!(size_of::<DmTargetSpec>(), 40);
        assert_eq!(size_of::<NvmePassthru>(), 72);
        assert_eq!(size_of::<SgIoHdr>(), 88);
        assert_eq!((size_of::<IpmiReq>(), size_of::<IpmiRecv>()), (40, 48));
        // _IOWR(0xfd, 3, 312 bytes), as strace shows DM_DEV_CREATE.
        assert_eq!(DmCommand::Create.request(), 0xc138_fd03);
    }
}
