//! Frames of one EtherType.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

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
