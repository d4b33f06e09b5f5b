//! What is asked of disks: to forget, and by NVMe and SCSI how they are.

use super::{close_all_but, raw_ioctl};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;

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

/// `fsync(2)` of an open disk, by a process of its own. Whoever waits for a disk that hangs is woken by no signal, and a thread of
/// PID 1 that is held so would hold the hand-over to the image's init: execve(2) first ends all other threads, and waits for them.
/// The wait for a process ends with a signal.
pub fn flush(disk: &File) -> Result<()> {
    // SAFETY: the child makes system calls and ends: nothing that a lock of another thread could hold up (signal-safety(7)).
    let child = unsafe {
        match libc::fork() {
            0 => {
                close_all_but([disk.as_raw_fd(); 2]);
                let failed = libc::fsync(disk.as_raw_fd()) != 0;
                libc::_exit(if failed { Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) } else { 0 })
            }
            child => child,
        }
    };
    if child < 0 {
        return Err(Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: the child is this function's own, and nobody else waits for it; `status` is the int that is written.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
    match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(()),
        (true, errno) => Err(Error::from_raw_os_error(errno)),
        (false, _) => Err(Error::other("what flushes the disk was killed")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!(size_of::<NvmePassthru>(), 72);
        assert_eq!(size_of::<SgIoHdr>(), 88);
    }

    #[test]
    fn a_flush_says_what_the_kernel_says_of_it() {
        flush(&tempfile::tempfile().unwrap()).unwrap();
        let (_reader, writer) = std::io::pipe().unwrap();
        // A pipe has nothing to be flushed to (fsync(2), EINVAL).
        let refused = flush(&File::from(std::os::fd::OwnedFd::from(writer))).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    }
}
