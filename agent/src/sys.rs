//! The agent's only unsafe code: system calls that no safe wrapper covers. Each function checks its arguments and
//! returns the error the kernel gave.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

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
