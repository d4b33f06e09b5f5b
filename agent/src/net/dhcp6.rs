//! A DHCPv6 client (RFC 9915, once 8415): one address (IA_NA), or name servers alone, from whoever answers on the link.
//! Routers and the on-link prefix are the router advertisements' to say (RFC 4861), which the kernel hears. What is said
//! here is where to look, never what to trust. No prefix delegation, no reconfigure, no temporary addresses.

use super::dhcp::{PAUSES, xid};
use super::dhcp_message::uuid_of;
use super::dhcp6_message::{ADVERTISE, INFORMATION, Lease6, RENEW, REPLY, REQUEST, SOLICIT, parse, request};
use super::netlink::{Netlink, Watch};
use crate::error::{AgentError, Result};
use kiln_protocol::MachineId;
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

/// All relay agents and servers on the link.
const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// Asks on one interface: for an address, or for name servers alone.
pub async fn acquire(interface: String, machine: MachineId, address: bool) -> Result<Lease6> {
    let mut asking = Asking::begin(&interface, &machine).await?;
    if !address {
        return asking.exchange(INFORMATION, &Lease6::default(), REPLY).await;
    }
    asking.address().await
}

/// Asks for the same again. Of an address that is over, and is not renewed, another is asked for, as of a network that was
/// renumbered.
pub async fn renew(lease: &Lease6, is_over: bool, machine: &MachineId) -> Result<Lease6> {
    let mut asking = Asking::begin(&lease.interface, machine).await?;
    let kind = if lease.address.is_some() { RENEW } else { INFORMATION };
    match asking.exchange(kind, lease, REPLY).await {
        Err(_) if is_over && kind == RENEW => asking.address().await,
        done => done,
    }
}

struct Asking {
    socket: UdpSocket,
    to: SocketAddrV6,
    interface: String,
    /// DUID-UUID (RFC 6355).
    client: Vec<u8>,
}

impl Asking {
    /// Waits for the link-local address, without which nothing can be sent.
    async fn begin(interface: &str, machine: &MachineId) -> Result<Self> {
        let (mut netlink, mut watch) = (Netlink::open()?, Watch::open()?);
        let index = netlink.link(interface)?.index;
        let until = Instant::now() + Duration::from_secs(PAUSES.iter().sum());
        loop {
            let own = |a: &super::netlink::Address| a.index == index && !a.global && a.settled && a.ip.is_ipv6();
            if netlink.addresses()?.iter().any(own) {
                break;
            }
            let silent = |_| no_answer(interface);
            timeout_at(until, watch.changed()).await.map_err(silent)?;
        }
        let open = || {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
            socket.set_only_v6(true)?;
            socket.set_reuse_address(true)?;
            socket.bind_device(Some(interface.as_bytes()))?;
            socket.set_nonblocking(true)?;
            socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 546)).into())?;
            UdpSocket::from_std(socket.into())
        };
        let socket = open().map_err(AgentError::system(format!("opening the DHCPv6 port on {interface}")))?;
        let client = [&[0, 4], &uuid_of(machine)[..]].concat();
        Ok(Self { socket, to: SocketAddrV6::new(SERVERS, 547, 0, index), interface: interface.to_owned(), client })
    }

    /// From whoever gives one.
    async fn address(&mut self) -> Result<Lease6> {
        let offered = self.exchange(SOLICIT, &Lease6::default(), ADVERTISE).await?;
        self.exchange(REQUEST, &offered, REPLY).await
    }

    /// Sends until an answer of that kind comes that gives what was asked for.
    async fn exchange(&mut self, kind: u8, known: &Lease6, wanted: u8) -> Result<Lease6> {
        let [_, id @ ..] = xid().to_be_bytes();
        let message = request(kind, id, &self.client, known);
        let mut buffer = [0; 1500];
        for pause in PAUSES {
            let sent = self.socket.send_to(&message, self.to).await;
            sent.map_err(AgentError::system("sending a DHCPv6 message"))?;
            let until = Instant::now() + Duration::from_secs(pause);
            while let Ok(received) = timeout_at(until, self.socket.recv_from(&mut buffer)).await {
                let (length, _) = received.map_err(AgentError::system("receiving a DHCPv6 message"))?;
                if let Some(mut lease) = parse(&buffer[..length], wanted, id, &self.client)
                    && (lease.address.is_some() || kind == INFORMATION)
                {
                    lease.interface.clone_from(&self.interface);
                    return Ok(lease);
                }
            }
        }
        Err(no_answer(&self.interface))
    }
}

fn no_answer(interface: &str) -> AgentError {
    AgentError::NoOffer { interfaces: format!("{interface} (DHCPv6)"), seconds: PAUSES.iter().sum() }
}
