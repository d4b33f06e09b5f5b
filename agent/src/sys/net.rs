//! Frames of one EtherType, and a card's firmware.

use super::raw_ioctl;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct ethtool_drvinfo` of linux/ethtool.h.
#[repr(C)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    rest: [u8; 96],
}

/// `struct ifreq` of linux/if.h, with a pointer in its union.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    data: *mut DriverInfo,
    rest: [u64; 2],
}

/// What an interface's driver says of its card's firmware (`ETHTOOL_GDRVINFO`); empty where it says nothing.
pub fn card_firmware(interface: &str) -> Result<String> {
    const GDRVINFO: u32 = 3;
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let mut name = [0; libc::IFNAMSIZ];
    if interface.is_empty() || interface.len() >= name.len() {
        return Err(ErrorKind::InvalidInput.into());
    }
    name[..interface.len()].copy_from_slice(interface.as_bytes());
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut info = DriverInfo { cmd: GDRVINFO, driver: [0; 32], version: [0; 32], firmware: [0; 32], rest: [0; 96] };
    let mut request = InterfaceRequest { name, data: &raw mut info, rest: [0; 2] };
    // SAFETY: `request` has the kernel's layout, and `info` is what the command fills in.
    if unsafe { raw_ioctl(socket.as_raw_fd(), SIOCETHTOOL, (&raw mut request).cast()) } < 0 {
        return Err(Error::last_os_error());
    }
    let said = info.firmware.split(|byte| *byte == 0).next().unwrap_or_default();
    let said = String::from_utf8_lossy(said).trim().to_owned();
    Ok(if said == "N/A" { String::new() } else { said })
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
    fn a_card_is_asked_in_the_kernels_layout() {
        assert_eq!((size_of::<DriverInfo>(), size_of::<InterfaceRequest>()), (196, size_of::<libc::ifreq>()));
        let none = card_firmware("kiln-none0").unwrap_err();
        assert_eq!(none.raw_os_error(), Some(libc::ENODEV), "{none}");
        assert_eq!(card_firmware("longer-than-any-name").unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
