//! The messages of a DHCPv4 client (RFC 2131 §2, options of RFC 2132): what it asks, and what is read of an answer. No
//! socket and no clock; those are in `dhcp`.

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder};
use kiln_protocol::{MachineId, VENDOR_CLASS, VENDOR_OPTION_AGENT_URL, VENDOR_OPTION_HTTP_URL};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::time::Duration;

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
pub struct Location {
    pub http_url: Option<String>,
    pub agent_url: Option<String>,
}

/// A broadcast of ours.
pub fn request(kind: MessageType, xid: u32, hardware: &[u8], machine: &MachineId) -> Message {
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
pub fn uuid_of(machine: &MachineId) -> Vec<u8> {
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

/// An answer to our own message; none if it cannot be read, or is somebody else's.
pub fn read(bytes: &[u8], xid: u32) -> Option<Message> {
    let message = Message::decode(&mut Decoder::new(bytes)).ok()?;
    (message.xid() == xid && message.opcode() == Opcode::BootReply).then_some(message)
}

/// The address that it gives. A proxy gives none, and what no machine can have is none.
pub fn given(message: &Message) -> Option<Ipv4Addr> {
    let address = message.yiaddr();
    let nobodys = address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast();
    (!nobodys).then_some(address)
}

/// Who answers.
pub fn server_of(message: &Message) -> Ipv4Addr {
    match message.opts().get(OptionCode::ServerIdentifier) {
        Some(DhcpOption::ServerIdentifier(server)) => *server,
        _ => message.siaddr(),
    }
}

/// What the answer gives, without Kiln's own words.
pub fn lease_of(interface: &str, hardware: &[u8], message: &Message) -> Lease {
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
pub fn is_host_name(text: &str) -> bool {
    (1..=253).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-')
}

/// Option 60 must be our own class back, option 43 carries the URLs.
pub fn kiln_location(message: &Message) -> Option<Location> {
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
    use dhcproto::Encodable;

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
