//! The messages of a DHCPv6 client (RFC 9915 §7.3, §21): what it asks, and what is read of an answer. No socket and no
//! clock; those are in `dhcp6`.

use super::dhcp_message::is_host_name;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

pub const SOLICIT: u8 = 1;
pub const ADVERTISE: u8 = 2;
pub const REQUEST: u8 = 3;
pub const RENEW: u8 = 5;
pub const REPLY: u8 = 7;
pub const INFORMATION: u8 = 11;

pub const CLIENT_ID: u16 = 1;
pub const SERVER_ID: u16 = 2;
pub const IA_NA: u16 = 3;
pub const IA_ADDRESS: u16 = 5;
pub const OPTION_REQUEST: u16 = 6;
pub const ELAPSED_TIME: u16 = 8;
pub const STATUS: u16 = 13;
pub const DNS: u16 = 23;
pub const DOMAINS: u16 = 24;

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

/// Appends an option.
pub fn put(message: &mut Vec<u8>, code: u16, data: &[u8]) {
    message.extend(code.to_be_bytes());
    message.extend(u16::try_from(data.len()).expect("options are short").to_be_bytes());
    message.extend(data);
}

/// A message of ours; `known` is what it asks for again.
pub fn request(kind: u8, id: [u8; 3], client: &[u8], known: &Lease6) -> Vec<u8> {
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
pub fn options(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
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
pub fn parse(bytes: &[u8], wanted: u8, id: [u8; 3], client: &[u8]) -> Option<Lease6> {
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
                // One whose valid lifetime is 0 is taken back (RFC 9915 §18.2.10.1).
                let is_given = |data: &[u8]| seconds(data, 20).is_some_and(|valid| valid > 0);
                let given = options(inside).find(|(code, data)| *code == IA_ADDRESS && is_given(data));
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
        let label = std::str::from_utf8(rest.get(..usize::from(*length))?).ok()?;
        // A dot inside a label would make it another name.
        labels.push(Some(label).filter(|label| !label.contains('.'))?);
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
        let mut taken = answer(REPLY, b"us", 0);
        let valid = taken.windows(4).rposition(|bytes| bytes == [0, 0, 1, 0]).unwrap();
        taken[valid + 2] = 0;
        assert_eq!(parse(&taken, REPLY, [1, 2, 3], b"us").unwrap().address, None, "an address that is taken back");
        assert_eq!(parse(&answer(REPLY, b"us", 0), REPLY, [1, 2, 4], b"us"), None, "another's transaction");
        assert_eq!(parse(&answer(REPLY, b"them", 0), REPLY, [1, 2, 3], b"us"), None, "another client's");
        assert_eq!(parse(&answer(ADVERTISE, b"us", 0), REPLY, [1, 2, 3], b"us"), None);
        assert_eq!(domain(b"\x04rack\x07exam"), None);
        assert_eq!(domain(b"\x01/\x00"), None, "no name of a host");
        assert_eq!(domain(b"\x03a.b\x00"), None, "a dot inside a label");
    }

    #[test]
    fn a_renewal_names_server_and_address() {
        let known = parse(&answer(REPLY, b"us", 0), REPLY, [1, 2, 3], b"us").unwrap();
        let message = request(RENEW, [7, 8, 9], b"us", &known);
        let found: Vec<(u16, usize)> = options(&message[4..]).map(|(code, data)| (code, data.len())).collect();
        assert_eq!(message[..4], [RENEW, 7, 8, 9]);
        assert_eq!(found, [(CLIENT_ID, 2), (ELAPSED_TIME, 2), (OPTION_REQUEST, 4), (SERVER_ID, 6), (IA_NA, 40)]);
    }
}
