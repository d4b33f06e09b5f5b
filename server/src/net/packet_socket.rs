//! UDP sockets that know through which interface, and to which address, a datagram came, and can answer the same way.
//!
//! `IP_PKTINFO` (ip(7)) both ways. A reply to 255.255.255.255 needs the interface, and a client takes an answer only
//! from the address it asked, which the routing table alone does not choose right on a server with several.

use super::NetError;
use nix::libc;
use nix::sys::socket::sockopt::Ipv4PacketInfo;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// A storm of requests waits here rather than being dropped; the kernel caps it at `net.core.rmem_max`.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Where a datagram came from and to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received {
    pub(crate) length: usize,
    pub(crate) from: SocketAddrV4,
    pub(crate) interface: u32,
    /// This host's address on that interface, to answer from.
    pub(crate) local: Ipv4Addr,
}

#[derive(Debug)]
pub(crate) struct PacketSocket {
    socket: UdpSocket,
    pub(crate) address: SocketAddr,
}

impl PacketSocket {
    /// Opens `address`. `shared`: other programs may hold the same port, as several DHCP servers on one host do.
    pub(crate) fn open(address: SocketAddrV4, shared: bool, advice: &'static str) -> Result<Self, NetError> {
        let at = SocketAddr::V4(address);
        let fail = |error| NetError::open(at, error, advice);
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).map_err(fail)?;
        socket.set_nonblocking(true).map_err(fail)?;
        socket.set_broadcast(true).map_err(fail)?;
        socket.set_reuse_address(shared).map_err(fail)?;
        let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER); // smaller works too
        setsockopt(&socket, Ipv4PacketInfo, &true).map_err(|e| fail(e.into()))?;
        socket.bind(&at.into()).map_err(fail)?;
        let address = socket.local_addr().map_err(fail)?.as_socket().unwrap_or(at);
        Ok(Self { socket: UdpSocket::from_std(socket.into()).map_err(fail)?, address })
    }

    /// Waits for the next datagram.
    pub(crate) async fn receive(&self, buffer: &mut [u8]) -> Result<Received, NetError> {
        loop {
            match self.socket.async_io(Interest::READABLE, || self.receive_now(buffer)).await {
                Ok(Some(received)) => return Ok(received),
                Ok(None) => {}
                // An ICMP error about an earlier reply of ours: nothing to do with this socket's health.
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(NetError::Receive { address: self.address, error }),
            }
        }
    }

    /// None: a datagram without the information asked for, which cannot be answered.
    fn receive_now(&self, buffer: &mut [u8]) -> io::Result<Option<Received>> {
        let mut control = nix::cmsg_space!(libc::in_pktinfo);
        let mut parts = [IoSliceMut::new(buffer)];
        let message =
            recvmsg::<SockaddrIn>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
        let info =
            message.cmsgs()?.find_map(|c| if let ControlMessageOwned::Ipv4PacketInfo(i) = c { Some(i) } else { None });
        Ok(message.address.zip(info).and_then(|(from, info)| {
            Some(Received {
                length: message.bytes,
                from: SocketAddrV4::new(from.ip(), from.port()),
                interface: u32::try_from(info.ipi_ifindex).ok()?,
                local: Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr)),
            })
        }))
    }

    /// Sends through `interface` from `local`. Waits while the socket's buffer is full.
    pub(crate) async fn send(&self, bytes: &[u8], to: SocketAddrV4, interface: u32, local: Ipv4Addr) -> io::Result<()> {
        // To a relay or a client in another network the routing table must choose the way.
        let ipi_ifindex = if to.ip().is_broadcast() { libc::c_int::try_from(interface).unwrap_or(0) } else { 0 };
        let address = libc::in_addr { s_addr: u32::from(local).to_be() };
        let info = libc::in_pktinfo { ipi_ifindex, ipi_spec_dst: address, ipi_addr: libc::in_addr { s_addr: 0 } };
        let to = SockaddrIn::from(to);
        self.socket
            .async_io(Interest::WRITABLE, || {
                let control = [ControlMessage::Ipv4PacketInfo(&info)];
                let parts = [IoSlice::new(bytes)];
                sendmsg(self.socket.as_raw_fd(), &parts, &control, MsgFlags::MSG_DONTWAIT, Some(&to))?;
                Ok(())
            })
            .await
    }
}
