//! A DHCPv4 client (RFC 2131): the address from whoever leases one, the boot server's place from Kiln's own answer to
//! vendor class `KilnAgent`, which may come from another server on the link (a proxy: yiaddr 0). What is said here
//! is where to look, never what to trust.

use crate::error::{AgentError, Result};
use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable};
use kiln_protocol::{MachineId, VENDOR_CLASS, VENDOR_OPTION_AGENT_URL, VENDOR_OPTION_HTTP_URL};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

/// Pauses between DISCOVERs.
pub(super) const PAUSES: [u64; 3] = [2, 4, 5];
/// How long Kiln's own answer is waited for once an address is offered.
const LOCATION: Duration = Duration::from_secs(2);

/// What a link was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub interface: String,
    pub hardware: Vec<u8>,
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub router: Option<Ipv4Addr>,
    pub dns: Vec<Ipv4Addr>,
    pub domain: Option<String>,
    pub hostname: Option<String>,
    pub server: Ipv4Addr,
    /// Seconds.
    pub duration_s: u32,
    /// Where Kiln says artifacts are.
    pub http_url: Option<String>,
    /// Where Kiln says the agent API is.
    pub agent_url: Option<String>,
    /// Option 66 or siaddr: where a boot server might be, if Kiln said nothing itself.
    pub next_server: Option<Ipv4Addr>,
}

impl Lease {
    /// T1: half the lease (RFC 2131 §4.4.5).
    pub fn renew_after(&self) -> Duration {
        Duration::from_secs(u64::from((self.duration_s / 2).max(30)))
    }
}

/// Kiln's own answer.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Location {
    http_url: Option<String>,
    agent_url: Option<String>,
}

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
            if offer.is_none() && !message.yiaddr().is_unspecified() {
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
                Some(MessageType::Ack) if !message.yiaddr().is_unspecified() => {
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

fn request(kind: MessageType, xid: u32, hardware: &[u8], machine: &MachineId) -> Message {
    let zero = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(xid, zero, zero, zero, zero, hardware);
    message.set_opcode(Opcode::BootRequest);
    message.set_flags(Flags::default().set_broadcast());
    let options = message.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ClassIdentifier(VENDOR_CLASS.as_bytes().to_vec()));
    options.insert(DhcpOption::ParameterRequestList(vec![
        OptionCode::SubnetMask,
        OptionCode::Router,
        OptionCode::DomainNameServer,
        OptionCode::Hostname,
        OptionCode::DomainName,
        OptionCode::VendorExtensions,
        OptionCode::TFTPServerName,
    ]));
    options.insert(DhcpOption::ClientMachineIdentifier(machine_identifier(machine)));
    message
}

/// The 16 bytes of the id, as it is written.
pub(super) fn uuid_of(machine: &MachineId) -> Vec<u8> {
    let digits: Vec<u8> = machine.as_str().bytes().filter(|b| *b != b'-').collect();
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok()).unwrap_or(0);
    digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// Option 97 (RFC 4578 §2.3): type 0, then the UUID as firmware sends it, in SMBIOS order: the first three fields are
/// little-endian (SMBIOS 3.7 §7.2.1).
fn machine_identifier(machine: &MachineId) -> Vec<u8> {
    let mut uuid = uuid_of(machine);
    for field in [0..4, 4..6, 6..8] {
        uuid[field].reverse();
    }
    uuid.insert(0, 0);
    uuid
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
        if let Ok(message) = Message::decode(&mut Decoder::new(&buffer[..length]))
            && message.xid() == xid
            && message.opcode() == Opcode::BootReply
        {
            return Ok(Some(message));
        }
    }
}

fn server_of(message: &Message) -> Ipv4Addr {
    match message.opts().get(OptionCode::ServerIdentifier) {
        Some(DhcpOption::ServerIdentifier(server)) => *server,
        _ => message.siaddr(),
    }
}

fn lease_of(interface: &str, hardware: &[u8], message: &Message) -> Lease {
    let options = message.opts();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let mut lease = Lease {
        interface: interface.to_owned(),
        hardware: hardware.to_vec(),
        address: message.yiaddr(),
        prefix: 24,
        router: None,
        dns: Vec::new(),
        domain: None,
        hostname: None,
        server: server_of(message),
        duration_s: 3600,
        http_url: None,
        agent_url: None,
        next_server: Some(message.siaddr()).filter(|a| !a.is_unspecified()),
    };
    for (_, option) in options.iter() {
        match option {
            DhcpOption::SubnetMask(mask) => {
                lease.prefix = u8::try_from(u32::from(*mask).leading_ones()).unwrap_or(32);
            }
            DhcpOption::Router(routers) => lease.router = routers.first().copied(),
            DhcpOption::DomainNameServer(servers) => lease.dns = servers.iter().take(3).copied().collect(),
            DhcpOption::DomainName(name) => lease.domain = Some(name.clone()).filter(|n| is_host_name(n)),
            DhcpOption::Hostname(name) => lease.hostname = Some(name.clone()).filter(|n| is_host_name(n)),
            DhcpOption::AddressLeaseTime(seconds) => lease.duration_s = *seconds,
            DhcpOption::TFTPServerName(name) => lease.next_server = text(name).parse().ok().or(lease.next_server),
            _ => {}
        }
    }
    lease
}

/// Letters, digits, dots and dashes: what comes from the network goes into files that others read.
pub(super) fn is_host_name(text: &str) -> bool {
    (1..=253).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-')
}

/// Option 60 must be our own class back, option 43 carries the URLs.
fn kiln_location(message: &Message) -> Option<Location> {
    match message.opts().get(OptionCode::ClassIdentifier) {
        Some(DhcpOption::ClassIdentifier(class)) if class == VENDOR_CLASS.as_bytes() => {}
        _ => return None,
    }
    let Some(DhcpOption::VendorExtensions(bytes)) = message.opts().get(OptionCode::VendorExtensions) else {
        return None;
    };
    let mut location = Location::default();
    let mut rest = bytes.as_slice();
    while let [code, length, tail @ ..] = rest {
        let value = tail.get(..usize::from(*length))?;
        let text = std::str::from_utf8(value).ok().filter(|t| t.bytes().all(|b| b.is_ascii_graphic()));
        match *code {
            VENDOR_OPTION_HTTP_URL => location.http_url = text.map(str::to_owned),
            VENDOR_OPTION_AGENT_URL => location.agent_url = text.map(str::to_owned),
            _ => {}
        }
        rest = &tail[usize::from(*length)..];
    }
    Some(location)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kilns_answer_is_read_and_a_cut_one_is_not() {
        let mut message = Message::default();
        message.opts_mut().insert(DhcpOption::ClassIdentifier(VENDOR_CLASS.as_bytes().to_vec()));
        let mut value = vec![VENDOR_OPTION_HTTP_URL, 8];
        value.extend(b"http://a");
        value.extend([VENDOR_OPTION_AGENT_URL, 9]);
        value.extend(b"https://b");
        message.opts_mut().insert(DhcpOption::VendorExtensions(value.clone()));
        let expected = Location { http_url: Some("http://a".into()), agent_url: Some("https://b".into()) };
        assert_eq!(kiln_location(&message), Some(expected));
        value.truncate(15);
        message.opts_mut().insert(DhcpOption::VendorExtensions(value));
        assert_eq!(kiln_location(&message), None);
        message.opts_mut().insert(DhcpOption::ClassIdentifier(b"PXEClient".to_vec()));
        assert_eq!(kiln_location(&message), None);
    }

    #[test]
    fn the_request_names_the_machine() {
        let id: MachineId = "4c4c4544-0042-3510-8052-b4c04f4b3332".parse().unwrap();
        let message = request(MessageType::Discover, 7, &[2, 0, 0, 0, 0, 1], &id);
        let bytes = message.to_vec().unwrap();
        let back = Message::decode(&mut Decoder::new(&bytes)).unwrap();
        let Some(DhcpOption::ClientMachineIdentifier(uuid)) = back.opts().get(OptionCode::ClientMachineIdentifier)
        else {
            panic!("option 97 is missing")
        };
        assert_eq!((uuid.len(), uuid[0], &uuid[1..7], uuid[16]), (17, 0, &[0x44, 0x45, 0x4c, 0x4c, 0x42, 0][..], 0x32));
    }
}
