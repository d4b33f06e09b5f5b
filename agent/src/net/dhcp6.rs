//! A DHCPv6 client (RFC 9915, once 8415): one address (IA_NA), or name servers alone, from whoever answers on the link.
//! Routers and the on-link prefix are the router advertisements' to say (RFC 4861), which the kernel hears. What is said
//! here is where to look, never what to trust. No prefix delegation, no reconfigure, no temporary addresses.

use super::dhcp::{PAUSES, is_host_name, uuid_of, xid};
use super::netlink::{Netlink, Watch};
use crate::error::{AgentError, Result};
use kiln_protocol::MachineId;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const RENEW: u8 = 5;
const REPLY: u8 = 7;
const INFORMATION: u8 = 11;

const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_ADDRESS: u16 = 5;
const OPTION_REQUEST: u16 = 6;
const ELAPSED_TIME: u16 = 8;
const STATUS: u16 = 13;
const DNS: u16 = 23;
const DOMAINS: u16 = 24;

/// All relay agents and servers on the link.
const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
/// Longest DUID of a server.
const DUID: usize = 130;

/// What a server gave.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease6 {
    pub interface: String,
    /// None: it was asked for name servers alone.
    pub address: Option<Ipv6Addr>,
    pub dns: Vec<Ipv6Addr>,
    pub domain: Option<String>,
    /// The server's DUID.
    pub server: Vec<u8>,
    /// When to ask it again, seconds.
    pub renew_s: u32,
}

impl Lease6 {
    pub fn renew_after(&self) -> Duration {
        Duration::from_secs(u64::from(self.renew_s.max(30)))
    }
}

/// Asks on one interface: for an address, or for name servers alone.
pub async fn acquire(interface: String, machine: MachineId, address: bool) -> Result<Lease6> {
    let mut asking = Asking::begin(&interface, &machine).await?;
    if !address {
        return asking.exchange(INFORMATION, &Lease6::default(), REPLY).await;
    }
    let offered = asking.exchange(SOLICIT, &Lease6::default(), ADVERTISE).await?;
    asking.exchange(REQUEST, &offered, REPLY).await
}

/// Asks for the same again.
pub async fn renew(lease: &Lease6, machine: &MachineId) -> Result<Lease6> {
    let mut asking = Asking::begin(&lease.interface, machine).await?;
    let kind = if lease.address.is_some() { RENEW } else { INFORMATION };
    asking.exchange(kind, lease, REPLY).await
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

fn put(message: &mut Vec<u8>, code: u16, data: &[u8]) {
    message.extend(code.to_be_bytes());
    message.extend(u16::try_from(data.len()).expect("options are short").to_be_bytes());
    message.extend(data);
}

fn request(kind: u8, id: [u8; 3], client: &[u8], known: &Lease6) -> Vec<u8> {
    let mut message = vec![kind];
    message.extend(id);
    put(&mut message, CLIENT_ID, client);
    put(&mut message, ELAPSED_TIME, &[0, 0]);
    put(&mut message, OPTION_REQUEST, &[0, 23, 0, 24]);
    if matches!(kind, REQUEST | RENEW) {
        put(&mut message, SERVER_ID, &known.server);
    }
    if kind != INFORMATION {
        // IAID 1, T1 and T2 are the server's to say.
        let mut association = vec![0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        if let Some(address) = known.address {
            put(&mut association, IA_ADDRESS, &[&address.octets()[..], &[0; 8]].concat());
        }
        put(&mut message, IA_NA, &association);
    }
    message
}

/// The options of `bytes`; a cut one ends them.
fn options(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d, rest @ ..] = bytes else { return None };
        let (code, length) = (u16::from_be_bytes([*a, *b]), usize::from(u16::from_be_bytes([*c, *d])));
        let data = rest.get(..length)?;
        bytes = &rest[length..];
        Some((code, data))
    })
}

fn seconds(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

/// An answer to our own message that refuses nothing.
fn parse(bytes: &[u8], wanted: u8, id: [u8; 3], client: &[u8]) -> Option<Lease6> {
    let rest = bytes.strip_prefix(&[wanted])?.strip_prefix(&id)?;
    let mut lease = Lease6 { renew_s: 3600, ..Lease6::default() };
    let mut ours = false;
    for (code, data) in options(rest) {
        match code {
            CLIENT_ID => ours = data == client,
            SERVER_ID if data.len() <= DUID => lease.server = data.to_vec(),
            STATUS if data.get(..2) != Some(&[0, 0]) => return None,
            DNS => {
                let addresses = data.as_chunks::<16>().0.iter().take(3);
                lease.dns = addresses.map(|octets| Ipv6Addr::from(*octets)).collect();
            }
            DOMAINS => lease.domain = domain(data),
            IA_NA => {
                let inside = data.get(12..)?;
                if options(inside).any(|(code, data)| code == STATUS && data.get(..2) != Some(&[0, 0])) {
                    continue;
                }
                let given = options(inside).find(|(code, data)| *code == IA_ADDRESS && data.len() >= 24);
                let Some((_, given)) = given else { continue };
                let address = Ipv6Addr::from(*given.first_chunk::<16>()?);
                let usable = !address.is_unspecified() && !address.is_multicast() && !address.is_loopback();
                lease.address = Some(address).filter(|_| usable);
                let (preferred, t1) = (seconds(given, 16)?, seconds(data, 4)?);
                lease.renew_s = if t1 > 0 { t1 } else { preferred / 2 };
            }
            _ => {}
        }
    }
    (ours && !lease.server.is_empty()).then_some(lease)
}

/// The first name of a list (RFC 1035 §3.1, no compression).
fn domain(mut data: &[u8]) -> Option<String> {
    let mut labels = Vec::new();
    while let [length @ 1..=63, rest @ ..] = data {
        labels.push(std::str::from_utf8(rest.get(..usize::from(*length))?).ok()?);
        data = &rest[usize::from(*length)..];
    }
    Some(labels.join(".")).filter(|name| data.first() == Some(&0) && is_host_name(name))
}

/// For the resolver.
pub fn servers(lease: &Lease6) -> impl Iterator<Item = IpAddr> {
    lease.dns.iter().map(|ip| IpAddr::V6(*ip))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(kind: u8, client: &[u8], status: u8) -> Vec<u8> {
        let mut message = vec![kind, 1, 2, 3];
        put(&mut message, CLIENT_ID, client);
        put(&mut message, SERVER_ID, b"server");
        let mut association = vec![0, 0, 0, 1, 0, 0, 0, 90, 0, 0, 0, 120];
        let address: Ipv6Addr = "2001:db8::7".parse().unwrap();
        put(&mut association, IA_ADDRESS, &[&address.octets()[..], &[0, 0, 0, 200, 0, 0, 1, 0]].concat());
        put(&mut association, STATUS, &[0, status]);
        put(&mut message, IA_NA, &association);
        put(&mut message, DOMAINS, b"\x04rack\x07example\x00");
        put(&mut message, DNS, &"2001:db8::53".parse::<Ipv6Addr>().unwrap().octets());
        message
    }

    #[test]
    fn an_answer_is_read_and_a_refusal_is_none() {
        let lease = parse(&answer(REPLY, b"us", 0), REPLY, [1, 2, 3], b"us").unwrap();
        assert_eq!((lease.address, lease.renew_s), (Some("2001:db8::7".parse().unwrap()), 90));
        assert_eq!((lease.domain.as_deref(), lease.dns.len()), (Some("rack.example"), 1));
        assert_eq!(lease.server, b"server");
        assert_eq!(parse(&answer(REPLY, b"us", 2), REPLY, [1, 2, 3], b"us").unwrap().address, None, "no address left");
        assert_eq!(parse(&answer(REPLY, b"us", 0), REPLY, [1, 2, 4], b"us"), None, "another's transaction");
        assert_eq!(parse(&answer(REPLY, b"them", 0), REPLY, [1, 2, 3], b"us"), None, "another client's");
        assert_eq!(parse(&answer(ADVERTISE, b"us", 0), REPLY, [1, 2, 3], b"us"), None);
        assert_eq!(domain(b"\x04rack\x07exam"), None);
        assert_eq!(domain(b"\x01/\x00"), None, "no name of a host");
    }

    #[test]
    fn a_renewal_names_server_and_address() {
        let known = parse(&answer(REPLY, b"us", 0), REPLY, [1, 2, 3], b"us").unwrap();
        let message = request(RENEW, [7, 8, 9], b"us", &known);
        let found: Vec<(u16, usize)> = options(&message[4..]).map(|(code, data)| (code, data.len())).collect();
        assert_eq!(message[..4], [RENEW, 7, 8, 9]);
        assert_eq!(found, [(CLIENT_ID, 2), (ELAPSED_TIME, 2), (OPTION_REQUEST, 4), (SERVER_ID, 6), (IA_NA, 40)]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 4..200)) {
            bytes[..4].copy_from_slice(&[REPLY, 1, 2, 3]);
            parse(&bytes, REPLY, [1, 2, 3], b"us");
            domain(&bytes);
        }

        #[test]
        fn a_cut_answer_is_survived(cut in 0_usize..140) {
            let whole = answer(REPLY, b"us", 0);
            parse(&whole[..cut.min(whole.len())], REPLY, [1, 2, 3], b"us");
        }
    }
}
