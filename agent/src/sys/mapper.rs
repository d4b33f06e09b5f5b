//! Loop devices, partitions, device-mapper.

use super::raw_ioctl;
use std::ffi::CStr;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;

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
/// The kernel wipes its copies of the buffer.
const DM_SECURE_DATA_FLAG: u32 = 1 << 15;

/// What to ask of device-mapper.
#[derive(Clone, Copy)]
pub enum DmCommand {
    Create,
    Load,
    /// The two for a device that is written to. What is loaded may be a key: the kernel forgets the buffer.
    CreateWritable,
    LoadWritable,
    Resume,
    Table,
    Status,
}

impl DmCommand {
    /// `_IOWR(0xfd, N, struct dm_ioctl)`.
    fn request(self) -> libc::c_ulong {
        let number: u8 = match self {
            Self::Create | Self::CreateWritable => 3,
            Self::Resume => 6,
            Self::Load | Self::LoadWritable => 9,
            Self::Table | Self::Status => 12,
        };
        nix::request_code_readwrite!(0xfd, number, size_of::<DmIoctl>()) as libc::c_ulong
    }
}

/// Asks device-mapper (an open /dev/mapper/control) about the device `name`. `table` is (sectors, type, parameters)
/// for `Load`. For `Table` the answer is the loaded table's parameters, for `Status` what its target says of itself.
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
        DmCommand::LoadWritable => buffer.header.flags = DM_SECURE_DATA_FLAG,
        DmCommand::Resume | DmCommand::CreateWritable | DmCommand::Status => {}
    }
    if let Some((sectors, target_type, params)) = table {
        buffer.header.target_count = 1;
        buffer.target.length = sectors;
        put(&mut buffer.target.target_type, target_type).ok_or_else(too_long)?;
        put(&mut buffer.params, params).ok_or_else(too_long)?;
    }
    // SAFETY: `buffer` has the kernel's layout, `data_size` is its whole size, and the kernel writes no further.
    let rc = unsafe { raw_ioctl(control.as_raw_fd(), command.request(), (&raw mut buffer).cast()) };
    let error = Error::last_os_error();
    let answer = CStr::from_bytes_until_nul(&buffer.params).map(|s| s.to_string_lossy().into_owned());
    // A table may hold a key.
    buffer.params.fill(0);
    std::hint::black_box(&mut buffer.params);
    if rc < 0 { Err(error) } else { Ok(answer.unwrap_or_default()) }
}

/// Copies `text` and keeps a NUL behind it.
fn put(field: &mut [u8], text: &str) -> Option<()> {
    (text.len() < field.len()).then(|| field[..text.len()].copy_from_slice(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(size_of::<DmIoctl>(), 312);
        assert_eq!(size_of::<DmTargetSpec>(), 40);
        // _IOWR(0xfd, 3, 312 bytes), as strace shows DM_DEV_CREATE.
        assert_eq!(DmCommand::Create.request(), 0xc138_fd03);
    }
}
