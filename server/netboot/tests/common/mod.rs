//! Packets as real firmware sent them, and a client's view of the replies.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use dhcproto::v4::{DhcpOption, Message, OptionCode};
use dhcproto::{Decodable, Decoder};
use kiln_netboot::{Arrival, Config, Datagram, Dhcp, Event, Mode, Output, UefiProgram};
use std::net::{Ipv4Addr, SocketAddrV4};

pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub const OTHER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// A packet of tests/packets: captured from QEMU's firmware (machine UUID 01234567-89ab-cdef-0123-456789abcdef).
pub fn packet(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/packets/{name}.hex", env!("CARGO_MANIFEST_DIR"));
    #[allow(clippy::disallowed_methods)] // a test may read its own data
    let text = std::fs::read_to_string(&path).unwrap();
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// The packet with one option's value replaced, added, or (empty value) removed.
pub fn with_option(packet: &[u8], code: u8, value: &[u8]) -> Vec<u8> {
    let mut out = packet[..240].to_vec();
    let mut at = 240;
    while packet[at] != 255 {
        let end = at + 2 + usize::from(packet[at + 1]);
        if packet[at] != code {
            out.extend(&packet[at..end]);
        }
        at = end;
    }
    if !value.is_empty() {
        out.extend([code, u8::try_from(value.len()).unwrap()]);
        out.extend(value);
    }
    out.push(255);
    out
}

pub fn arrival(port: u16) -> Arrival {
    Arrival {
        interface: 3,
        local: SERVER,
        netmask: Ipv4Addr::new(255, 255, 255, 0),
        from: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68),
        port,
    }
}

pub fn config(mode: Mode) -> Config {
    let (http_port, agent_port, uefi) = (8080, 8443, UefiProgram::Uki);
    Config { mode, address: None, http_port, agent_port, http_boot: true, chain_ipxe: true, uefi }
}

pub fn proxy() -> Dhcp {
    Dhcp::new(config(Mode::Proxy), []).unwrap()
}

pub fn sent(outputs: &[Output]) -> Vec<&Datagram> {
    outputs.iter().filter_map(|o| if let Output::Send(d) = o { Some(d) } else { None }).collect()
}

pub fn events(outputs: &[Output]) -> Vec<&Event> {
    outputs.iter().filter_map(|o| if let Output::Event(e) = o { Some(e) } else { None }).collect()
}

/// A reply, read by dhcproto: an eye other than the one that wrote it.
pub struct Reply(pub Message);

impl Reply {
    pub fn read(bytes: &[u8]) -> Self {
        assert!(bytes.len() >= 300, "{} bytes", bytes.len());
        Self(Message::decode(&mut Decoder::new(bytes)).unwrap())
    }

    pub fn kind(&self) -> dhcproto::v4::MessageType {
        self.0.opts().msg_type().unwrap()
    }

    pub fn raw(&self, code: u8) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let option = self.0.opts().get(OptionCode::from(code))?;
        dhcproto::Encodable::encode(option, &mut dhcproto::Encoder::new(&mut bytes)).unwrap();
        Some(bytes[2..].to_vec())
    }

    pub fn file(&self) -> String {
        String::from_utf8(self.0.fname().unwrap_or_default().to_vec()).unwrap().trim_end_matches('\0').to_owned()
    }

    pub fn server_id(&self) -> Ipv4Addr {
        match self.0.opts().get(OptionCode::ServerIdentifier) {
            Some(DhcpOption::ServerIdentifier(address)) => *address,
            other => panic!("no server identifier: {other:?}"),
        }
    }
}
