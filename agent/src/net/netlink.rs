//! Links, addresses and routes by NETLINK_ROUTE messages: rtnetlink(7), netlink(7), linux/if_link.h, linux/if_addr.h.
//! The kernel answers at once, so a request is a plain call; [`Watch`] waits for what the kernel tells by itself.

use crate::error::{AgentError, Result};
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{Error, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::time::Duration;
use tokio::net::UdpSocket;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const REPLACE: u16 = 0x100;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;

const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_PERM_ADDRESS: u16 = 54;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const VLAN_ID: u16 = 1;
const BOND_MODE: u16 = 1;
const BOND_MIIMON: u16 = 3;
const BOND_HASH_POLICY: u16 = 14;
const BOND_LACP_RATE: u16 = 21;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const NESTED: u16 = 0x8000;

const UP: u32 = 1;
const LOWER_UP: u32 = 0x1_0000;
const ETHERNET: u16 = 1;
/// Duplicate address detection is under way, or has failed (RFC 4862 §5.4).
const TENTATIVE: u32 = 0x40;
const DUPLICATE: u32 = 0x08;

/// More than an answer of the kernel's.
const BUFFER: usize = 64 * 1024;
const PATIENCE: Duration = Duration::from_secs(5);

/// A link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// `bond`, `vlan`, `veth`; of a card: none.
    pub kind: String,
    pub ethernet: bool,
    /// Somebody set it up.
    pub up: bool,
    /// And it has found its other end.
    pub carrier: bool,
    pub mac: Vec<u8>,
    /// The card's own address, where a bond has lent it another.
    pub permanent_mac: Vec<u8>,
}

impl Link {
    /// A network card; or the end of a virtual cable, which is one to whoever is in a namespace.
    pub fn is_card(&self) -> bool {
        self.ethernet && self.mac.len() == 6 && matches!(self.kind.as_str(), "" | "veth") && self.name != "lo"
    }

    /// What is painted on the card.
    pub fn own_mac(&self) -> &[u8] {
        if self.permanent_mac.len() == 6 { &self.permanent_mac } else { &self.mac }
    }
}

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub index: u32,
    pub ip: IpAddr,
    pub prefix: u8,
    /// Reaches beyond its link.
    pub global: bool,
    /// Duplicate address detection has nothing against it.
    pub settled: bool,
}

/// How a bond shares its cards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bonding {
    ActiveBackup,
    /// IEEE 802.3ad, fast LACP, hashed by addresses and ports.
    Lacp,
}

struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 16];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        Self(bytes)
    }

    /// `struct ifinfomsg`.
    fn link(kind: u16, flags: u16, index: u32, (up, change): (u32, u32)) -> Self {
        let mut message = Self::new(kind, flags);
        message.0.extend([0; 4]);
        for field in [index, up, change] {
            message.0.extend(field.to_ne_bytes());
        }
        message
    }

    fn attribute(&mut self, kind: u16, data: &[u8]) {
        let length = u16::try_from(data.len() + 4).expect("attributes are names, addresses and numbers");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn nested(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend([0; 4]);
        inside(self);
        let length = u16::try_from(self.0.len() - start).expect("a few attributes");
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Cuts what begins with its own length; `header` is the least.
fn cut<'a>(rest: &mut &'a [u8], length: usize, header: usize) -> Option<&'a [u8]> {
    let piece = rest.get(..length).filter(|_| length >= header)?;
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(piece)
}

/// The attributes of `bytes`; a cut one ends them.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (usize::from(short(bytes, 0)?), short(bytes, 2)?);
        Some((kind & !NESTED, &cut(&mut bytes, length, 4)?[4..]))
    })
}

fn text(data: &[u8]) -> String {
    String::from_utf8_lossy(data.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let flags = number(body, 8)?;
    let mut link = Link {
        index: number(body, 4)?,
        ethernet: short(body, 2)? == ETHERNET,
        up: flags & UP == UP,
        carrier: flags & (UP | LOWER_UP) == UP | LOWER_UP,
        ..Link::default()
    };
    for (kind, data) in attributes(body.get(16..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(data),
            IFLA_ADDRESS => link.mac = data.to_vec(),
            IFLA_PERM_ADDRESS => link.permanent_mac = data.to_vec(),
            IFLA_LINKINFO => {
                // A member of a bond has this too, with the bond's kind alone.
                let kind = attributes(data).find(|(kind, _)| *kind == INFO_KIND);
                link.kind = kind.map(|(_, data)| text(data)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

fn parse_address(body: &[u8]) -> Option<Address> {
    let [_, prefix, flags, scope] = *body.first_chunk::<4>()?;
    let (mut ip, mut flags) = (None, u32::from(flags));
    for (kind, data) in attributes(body.get(8..)?) {
        match (kind, data.len()) {
            // Of a point-to-point link the local end counts.
            (IFA_ADDRESS, _) if ip.is_some() => {}
            (IFA_ADDRESS | IFA_LOCAL, 4) => ip = Some(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
            (IFA_ADDRESS | IFA_LOCAL, 16) => ip = Some(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
            (IFA_FLAGS, 4) => flags = number(data, 0)?,
            _ => {}
        }
    }
    let settled = flags & (TENTATIVE | DUPLICATE) == 0;
    Some(Address { index: number(body, 4)?, ip: ip?, prefix, global: scope == 0, settled })
}

fn octets(ip: &IpAddr) -> (u8, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (2, ip.octets().to_vec()),
        IpAddr::V6(ip) => (10, ip.octets().to_vec()),
    }
}

/// The kernel's side of the network.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub fn open() -> Result<Self> {
        let open = || {
            let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(0)))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok::<_, Error>(socket)
        };
        Ok(Self { socket: open().map_err(AgentError::system("opening a netlink socket"))?, sequence: 0 })
    }

    /// Sends; gives the bodies that come back, or the kernel's refusal.
    fn ask(&mut self, mut message: Message) -> std::io::Result<Vec<Vec<u8>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(message.0.len()).expect("messages are short");
        message.0[..4].copy_from_slice(&length.to_ne_bytes());
        message.0[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        self.socket.send(&message.0)?;
        let cut_short = || Error::new(ErrorKind::InvalidData, "the kernel's answer is cut short");
        let (mut bodies, mut buffer) = (Vec::new(), vec![0; BUFFER]);
        loop {
            let length = (&self.socket).read(&mut buffer)?;
            let mut rest = &buffer[..length];
            while let Some(length) = number(rest, 0) {
                let length = usize::try_from(length).map_err(|_| cut_short())?;
                let one = cut(&mut rest, length, 16).ok_or_else(cut_short)?;
                if number(one, 8) != Some(self.sequence) {
                    continue;
                }
                let body = &one[16..];
                match short(one, 4).ok_or_else(cut_short)? {
                    MESSAGE_DONE => return Ok(bodies),
                    MESSAGE_ERROR => {
                        let code = number(body, 0).ok_or_else(cut_short)?.cast_signed();
                        return if code == 0 { Ok(bodies) } else { Err(Error::from_raw_os_error(-code)) };
                    }
                    _ => bodies.push(body.to_vec()),
                }
            }
        }
    }

    fn change(&mut self, message: Message, what: impl FnOnce() -> String) -> Result<()> {
        self.ask(message).map(drop).map_err(|error| AgentError::system(what())(error))
    }

    /// Every link there is.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let answer = self.ask(Message::link(GET_LINK, DUMP, 0, (0, 0)));
        Ok(answer.map_err(AgentError::system("listing links"))?.iter().filter_map(|body| parse_link(body)).collect())
    }

    /// The link of this name.
    pub fn link(&mut self, name: &str) -> Result<Link> {
        self.links()?.into_iter().find(|link| link.name == name).ok_or(AgentError::NoInterface)
    }

    /// Every address of every link.
    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        let mut message = Message::new(GET_ADDRESS, DUMP);
        message.0.extend([0; 8]);
        let answer = self.ask(message).map_err(AgentError::system("listing addresses"))?;
        Ok(answer.iter().filter_map(|body| parse_address(body)).collect())
    }

    /// Sets a link up or down.
    pub fn set(&mut self, link: &Link, up: bool) -> Result<()> {
        let message = Message::link(NEW_LINK, ACK, link.index, (u32::from(up), UP));
        self.change(message, || format!("setting {} {}", link.name, if up { "up" } else { "down" }))
    }

    pub fn set_mtu(&mut self, link: &Link, mtu: u32) -> Result<()> {
        let mut message = Message::link(NEW_LINK, ACK, link.index, (0, 0));
        message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
        self.change(message, || format!("setting the MTU of {} to {mtu}", link.name))
    }

    /// Makes a card, which must be down, a member of a bond.
    pub fn enslave(&mut self, link: &Link, bond: &Link) -> Result<()> {
        let mut message = Message::link(NEW_LINK, ACK, link.index, (0, 0));
        message.attribute(IFLA_MASTER, &bond.index.to_ne_bytes());
        self.change(message, || format!("making {} a member of {}", link.name, bond.name))
    }

    pub fn add_vlan(&mut self, name: &str, parent: &Link, id: u16) -> Result<()> {
        let mut message = Message::link(NEW_LINK, ACK | CREATE | EXCLUSIVE, 0, (0, 0));
        message.attribute(IFLA_IFNAME, name.as_bytes());
        message.attribute(IFLA_LINK, &parent.index.to_ne_bytes());
        message.nested(IFLA_LINKINFO, |info| {
            info.attribute(INFO_KIND, b"vlan");
            info.nested(INFO_DATA, |data| data.attribute(VLAN_ID, &id.to_ne_bytes()));
        });
        self.change(message, || format!("making VLAN {id} on {}", parent.name))
    }

    pub fn add_bond(&mut self, name: &str, bonding: Bonding) -> Result<()> {
        let mut message = Message::link(NEW_LINK, ACK | CREATE | EXCLUSIVE, 0, (0, 0));
        message.attribute(IFLA_IFNAME, name.as_bytes());
        message.nested(IFLA_LINKINFO, |info| {
            info.attribute(INFO_KIND, b"bond");
            info.nested(INFO_DATA, |data| {
                data.attribute(BOND_MODE, &[if bonding == Bonding::Lacp { 4 } else { 1 }]);
                data.attribute(BOND_MIIMON, &100_u32.to_ne_bytes());
                if bonding == Bonding::Lacp {
                    data.attribute(BOND_LACP_RATE, &[1]);
                    data.attribute(BOND_HASH_POLICY, &[1]);
                }
            });
        });
        self.change(message, || format!("making the bond {name}"))
    }

    pub fn delete(&mut self, link: &Link) -> Result<()> {
        self.change(Message::link(DELETE_LINK, ACK, link.index, (0, 0)), || format!("removing {}", link.name))
    }

    fn address(&mut self, kind: u16, flags: u16, (index, ip, prefix): (u32, &IpAddr, u8)) -> Result<()> {
        let (family, octets) = octets(ip);
        let mut message = Message::new(kind, ACK | flags);
        message.0.extend([family, prefix, 0, 0]);
        message.0.extend(index.to_ne_bytes());
        message.attribute(IFA_LOCAL, &octets);
        message.attribute(IFA_ADDRESS, &octets);
        let verb = if kind == NEW_ADDRESS { "giving" } else { "taking" };
        self.change(message, || format!("{verb} the address {ip}/{prefix}"))
    }

    pub fn add_address(&mut self, link: &Link, ip: &IpAddr, prefix: u8) -> Result<()> {
        self.address(NEW_ADDRESS, CREATE | REPLACE, (link.index, ip, prefix))
    }

    pub fn delete_address(&mut self, address: &Address) -> Result<()> {
        self.address(DELETE_ADDRESS, 0, (address.index, &address.ip, address.prefix))
    }

    /// The default route, in place of what was there.
    pub fn default_route(&mut self, link: &Link, gateway: &IpAddr) -> Result<()> {
        const MAIN_TABLE: u8 = 254;
        const STATIC: u8 = 4;
        const UNICAST: u8 = 1;
        let (family, octets) = octets(gateway);
        let mut message = Message::new(NEW_ROUTE, ACK | CREATE | REPLACE);
        message.0.extend([family, 0, 0, 0, MAIN_TABLE, STATIC, 0, UNICAST]);
        message.0.extend([0; 4]);
        message.attribute(RTA_GATEWAY, &octets);
        message.attribute(RTA_OIF, &link.index.to_ne_bytes());
        self.change(message, || format!("setting the default route by {gateway}"))
    }
}

/// What the kernel tells of links and addresses. tokio has no type for a netlink socket; one for datagrams reads it as well.
pub struct Watch(UdpSocket);

impl Watch {
    /// RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR.
    const GROUPS: u32 = 0x1 | 0x10 | 0x100;

    pub fn open() -> Result<Self> {
        let open = || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, Self::GROUPS))?;
            UdpSocket::from_std(fd.into())
        };
        Ok(Self(open().map_err(AgentError::system("opening a netlink socket"))?))
    }

    /// Comes back when something has changed since the last call.
    pub async fn changed(&mut self) {
        let mut buffer = [0; 8192];
        if self.0.readable().await.is_ok() {
            loop {
                match self.0.try_recv(&mut buffer) {
                    Ok(_) => {}
                    // ENOBUFS: some of it was lost. What is there is listed anew anyhow.
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                    Err(_) => break,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_has_the_kernels_form() {
        let mut message = Message::link(NEW_LINK, ACK, 7, (1, 1));
        message.attribute(IFLA_IFNAME, b"v.10");
        message.nested(IFLA_LINKINFO, |info| info.attribute(INFO_KIND, b"vlan"));
        let body = &message.0[16..];
        let link = parse_link(body).unwrap();
        assert_eq!((link.index, link.name.as_str(), link.kind.as_str(), link.carrier), (7, "v.10", "vlan", false));
        assert_eq!(message.0.len() % 4, 0);
    }

    #[test]
    fn this_machines_loopback_is_seen() {
        let mut netlink = Netlink::open().unwrap();
        let lo = netlink.link("lo").unwrap();
        assert!(!lo.is_card() && !lo.ethernet);
        assert_eq!(netlink.link("kiln-none").unwrap_err().kind(), "network-no-interface");
        netlink.addresses().unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            parse_link(&bytes);
            parse_address(&bytes);
            attributes(&bytes).count();
        }
    }
}
