//! The management controller of this machine.

use super::raw_ioctl;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!((size_of::<IpmiReq>(), size_of::<IpmiRecv>()), (40, 48));
    }
}
