//! A DHCPv4 client (RFC 2131): the address from whoever leases one, the boot server's place from Kiln's own answer to
//! vendor class `KilnAgent`, which may come from another server on the link (a proxy: yiaddr 0). What is said here
//! is where to look, never what to trust.

use super::dhcp_message::{Lease, given, kiln_location, lease_of, read, request, server_of};
use crate::error::{AgentError, Result};
use dhcproto::Encodable;
use dhcproto::v4::{DhcpOption, Message, MessageType};
use kiln_protocol::MachineId;
use ring::rand::{SecureRandom, SystemRandom};
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

/// Pauses between DISCOVERs.
pub(super) const PAUSES: [u64; 3] = [2, 4, 5];
/// How long Kiln's own answer is waited for once an address is offered.
const LOCATION: Duration = Duration::from_secs(2);

/// Gets a lease on one interface.
pub async fn acquire(interface: String, hardware: Vec<u8>, machine: MachineId, need_location: bool) -> Result<Lease> {
    let socket = open(&interface)?;
    let xid = xid();
    let mut location = None;
    let mut offer: Option<Message> = None;
    for pause in PAUSES {
        send(&socket, &request(MessageType::Discover, xid, &hardware, &machine)).await?;
        let mut until = Instant::now() + Duration::from_secs(pause);
        while let Some(message) = receive(&socket, until, xid).await? {
            if message.opts().msg_type() != Some(MessageType::Offer) {
                continue;
            }
            if let Some(found) = kiln_location(&message) {
                location = Some(found);
            }
            if offer.is_none() && given(&message).is_some() {
                offer = Some(message);
                until = until.min(Instant::now() + LOCATION);
            }
            if offer.is_some() && (location.is_some() || !need_location) {
                break;
            }
        }
        if offer.is_some() {
            break;
        }
    }
    let no_offer = || AgentError::NoOffer { interfaces: interface.clone(), seconds: PAUSES.iter().sum() };
    let offer = offer.ok_or_else(no_offer)?;
    let mut ask = request(MessageType::Request, xid, &hardware, &machine);
    ask.opts_mut().insert(DhcpOption::RequestedIpAddress(offer.yiaddr()));
    ask.opts_mut().insert(DhcpOption::ServerIdentifier(server_of(&offer)));
    for pause in PAUSES {
        send(&socket, &ask).await?;
        let until = Instant::now() + Duration::from_secs(pause);
        while let Some(message) = receive(&socket, until, xid).await? {
            match message.opts().msg_type() {
                Some(MessageType::Ack) if given(&message).is_some() => {
                    let mut lease = lease_of(&interface, &hardware, &message);
                    if let Some(found) = kiln_location(&message).or(location) {
                        (lease.http_url, lease.agent_url) = (found.http_url, found.agent_url);
                    }
                    return Ok(lease);
                }
                Some(MessageType::Nak) => return Err(no_offer()),
                _ => {}
            }
        }
    }
    Err(no_offer())
}

/// Asks for the same address again.
pub async fn renew(lease: &Lease, machine: &MachineId) -> Result<Lease> {
    let socket = open(&lease.interface)?;
    let xid = xid();
    let mut ask = request(MessageType::Request, xid, &lease.hardware, machine);
    ask.set_ciaddr(lease.address);
    for pause in PAUSES {
        send(&socket, &ask).await?;
        let until = Instant::now() + Duration::from_secs(pause);
        while let Some(message) = receive(&socket, until, xid).await? {
            if message.opts().msg_type() == Some(MessageType::Ack) && message.yiaddr() == lease.address {
                let mut renewed = lease_of(&lease.interface, &lease.hardware, &message);
                renewed.http_url.clone_from(&lease.http_url);
                renewed.agent_url.clone_from(&lease.agent_url);
                return Ok(renewed);
            }
        }
    }
    Err(AgentError::NoOffer { interfaces: lease.interface.clone(), seconds: PAUSES.iter().sum() })
}

fn open(interface: &str) -> Result<UdpSocket> {
    let make = || -> std::io::Result<UdpSocket> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_reuse_address(true)?;
        socket.set_broadcast(true)?;
        socket.bind_device(Some(interface.as_bytes()))?;
        socket.set_nonblocking(true)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 68)).into())?;
        UdpSocket::from_std(socket.into())
    };
    make().map_err(AgentError::system(format!("opening the DHCP port on {interface}")))
}

pub(super) fn xid() -> u32 {
    let mut bytes = [0; 4];
    // A predictable transaction id costs nothing that DHCP could promise anyway.
    if SystemRandom::new().fill(&mut bytes).is_err() {
        bytes = std::process::id().to_le_bytes();
    }
    u32::from_le_bytes(bytes)
}

async fn send(socket: &UdpSocket, message: &Message) -> Result<()> {
    let bytes =
        message.to_vec().map_err(|e| AgentError::system("encoding a DHCP message")(std::io::Error::other(e)))?;
    let to = SocketAddr::from((Ipv4Addr::BROADCAST, 67));
    socket.send_to(&bytes, to).await.map_err(AgentError::system("sending a DHCP message"))?;
    Ok(())
}

/// The next answer to `xid` before `until`; packets that cannot be read are passed over.
async fn receive(socket: &UdpSocket, until: Instant, xid: u32) -> Result<Option<Message>> {
    let mut buffer = [0; 1500];
    loop {
        let Ok(received) = timeout_at(until, socket.recv_from(&mut buffer)).await else { return Ok(None) };
        let (length, _) = received.map_err(AgentError::system("receiving a DHCP message"))?;
        if let Some(message) = read(&buffer[..length], xid) {
            return Ok(Some(message));
        }
    }
}
