//! LLDP, as far as it says where a cable ends: IEEE Std 802.1AB-2016 §8 (TLV formats) and §9.1 (addresses).
//!
//! Receiving only: this host announces nothing. A frame proves nothing, and anything that does not have its form is
//! refused as a whole.

use crate::inventory::{Neighbour, clean};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

/// EtherType of LLDP.
pub const LLDP_ETHERTYPE: u16 = 0x88cc;
/// Destinations of LLDP frames: nearest bridge, nearest non-TPMR bridge, nearest customer bridge (§7.1).
pub const LLDP_ADDRESSES: [[u8; 6]; 3] =
    [[1, 0x80, 0xc2, 0, 0, 0x0e], [1, 0x80, 0xc2, 0, 0, 0x03], [1, 0x80, 0xc2, 0, 0, 0x00]];
/// Most TLVs looked at: an Ethernet frame of 1500 bytes of empty ones.
const TLVS: usize = 750;
/// Longest text kept, bytes.
const TEXT: usize = 64;

/// What one frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lldp {
    /// The port at the other end, and for how many seconds that counts.
    Neighbour(Neighbour, u16),
    /// The sender goes, or forgets this port (§9.2.7.7.2 "shutdown").
    Leaves,
}

/// Why a frame is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LldpError {
    /// A TLV is longer than what is left of the frame.
    #[error("a TLV is longer than the frame")]
    Truncated,
    /// Chassis ID, port ID and time to live must come first, once, in this order (§8.2).
    #[error("chassis id, port id and time to live do not come first, in this order")]
    Order,
    /// One of the three is shorter or longer than it may be.
    #[error("a mandatory TLV has a wrong length")]
    Length,
}

/// Reads the payload of a frame of [`LLDP_ETHERTYPE`]: what follows the Ethernet header.
pub fn parse_lldp(payload: &[u8]) -> Result<Lldp, LldpError> {
    let mut rest = payload;
    let mut found = Neighbour::default();
    let mut ttl = 0;
    for number in 0..TLVS {
        // Type: 7 bits, length: 9 bits (§8.4). A frame without the end TLV ends with its bytes.
        let Some((header, after)) = rest.split_first_chunk::<2>() else { break };
        let header = u16::from_be_bytes(*header);
        let (kind, length) = (header >> 9, usize::from(header & 0x1ff));
        let (value, after) = after.split_at_checked(length).ok_or(LldpError::Truncated)?;
        rest = after;
        match (number, kind) {
            (0, 1) => found.chassis = identifier(value, &CHASSIS)?,
            (1, 2) => found.port = identifier(value, &PORT)?,
            (2, 3) => {
                // Later versions may make it longer (§8.5.4).
                let seconds = value.first_chunk::<2>().ok_or(LldpError::Length)?;
                ttl = u16::from_be_bytes(*seconds);
                if ttl == 0 {
                    return Ok(Lldp::Leaves);
                }
            }
            (0..=2, _) | (_, 1..=3) => return Err(LldpError::Order),
            (_, 0) => break,
            (_, 4) => found.port_description = text(value),
            (_, 5) => found.system_name = text(value),
            (_, _) => {} // what it is and can: of no use here
        }
    }
    if ttl == 0 { Err(LldpError::Order) } else { Ok(Lldp::Neighbour(found, ttl)) }
}

/// Which subtypes of an identifier are not text (§8.5.2.2, §8.5.3.2).
struct Subtypes {
    mac: u8,
    network: u8,
}

const CHASSIS: Subtypes = Subtypes { mac: 4, network: 5 };
const PORT: Subtypes = Subtypes { mac: 3, network: 4 };

/// A subtype and 1 to 255 bytes.
fn identifier(value: &[u8], subtypes: &Subtypes) -> Result<String, LldpError> {
    let (subtype, id) = value.split_first().ok_or(LldpError::Length)?;
    if id.is_empty() || id.len() > 255 {
        return Err(LldpError::Length);
    }
    let known = if *subtype == subtypes.mac && id.len() == 6 {
        Some(hex(id, ":"))
    } else if *subtype == subtypes.network {
        address(id)
    } else {
        None
    };
    Ok(known.unwrap_or_else(|| text(id)))
}

/// IANA address family number, 1 for IPv4 and 2 for IPv6, and the address.
fn address(id: &[u8]) -> Option<String> {
    match id.split_first()? {
        (1, address) => <[u8; 4]>::try_from(address).ok().map(|a| Ipv4Addr::from(a).to_string()),
        (2, address) => <[u8; 16]>::try_from(address).ok().map(|a| Ipv6Addr::from(a).to_string()),
        (_, _) => None,
    }
}

/// Text where it is printable, else hex digits: vendors put binary numbers into "locally assigned".
fn text(value: &[u8]) -> String {
    // Some end their texts with NUL, as the standard does not.
    let value = value.strip_suffix(&[0]).unwrap_or(value);
    match std::str::from_utf8(value) {
        Ok(text) if !text.chars().any(|c| c.is_control() && !c.is_whitespace()) => clean(text, TEXT),
        Ok(_) | Err(_) => clean(&hex(value, ""), TEXT),
    }
}

fn hex(bytes: &[u8], between: &str) -> String {
    let mut text = String::new();
    for (n, byte) in bytes.iter().enumerate() {
        let between = if n == 0 { "" } else { between };
        write!(text, "{between}{byte:02x}").expect("writing to a String cannot fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len()).unwrap();
        let header = (u16::from(kind) << 9) | length;
        [&header.to_be_bytes()[..], value].concat()
    }

    fn frame(tlvs: &[(u8, &[u8])]) -> Vec<u8> {
        tlvs.iter().flat_map(|(kind, value)| tlv(*kind, value)).collect()
    }

    const CHASSIS_ID: (u8, &[u8]) = (1, &[4, 0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
    const PORT_ID: (u8, &[u8]) = (2, b"\x05Ethernet1/3");
    const TTL: (u8, &[u8]) = (3, &[0, 120]);

    fn neighbour(payload: &[u8]) -> Neighbour {
        match parse_lldp(payload) {
            Ok(Lldp::Neighbour(neighbour, 120)) => neighbour,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_switch_is_read() {
        let whole =
            frame(&[CHASSIS_ID, PORT_ID, TTL, (4, b"to rack 7"), (5, b"s1"), (127, b"\0\x80\xc2\x01\0\x07"), (0, b"")]);
        let got = neighbour(&[whole, vec![0; 20]].concat());
        assert_eq!((got.chassis.as_str(), got.port.as_str()), ("52:54:00:ab:cd:ef", "Ethernet1/3"));
        assert_eq!((got.port_description.as_str(), got.system_name.as_str()), ("to rack 7", "s1"));
        assert_eq!(got.place(), "switch s1 port Ethernet1/3");
        let nameless = neighbour(&frame(&[CHASSIS_ID, PORT_ID, TTL]));
        assert_eq!(nameless.place(), "switch 52:54:00:ab:cd:ef port Ethernet1/3");
    }

    #[test]
    fn each_kind_of_identifier_is_shown_as_people_write_it() {
        let port = |value: &[u8]| neighbour(&frame(&[CHASSIS_ID, (2, value), TTL])).port;
        assert_eq!(port(b"\x03\x00\x11\x22\x33\x44\x55"), "00:11:22:33:44:55");
        assert_eq!(port(b"\x04\x01\x0a\x00\x00\x01"), "10.0.0.1");
        assert_eq!(port(&[&[4, 2, 0xfe, 0x80][..], &[0; 13], &[1]].concat()), "fe80::1");
        assert_eq!(port(b"\x07\x00\x00\x02\x0d"), "0000020d");
        assert_eq!(port(b"\x07513\0"), "513");
        assert_eq!(port(b"\x05Gi1/0/7 \x1b[2J"), "4769312f302f37201b5b324a", "a terminal's commands are not text");
    }

    #[test]
    fn what_is_no_lldp_is_refused() {
        let refuse = |tlvs: &[(u8, &[u8])]| parse_lldp(&frame(tlvs)).unwrap_err();
        assert_eq!(refuse(&[]), LldpError::Order);
        assert_eq!(refuse(&[PORT_ID, CHASSIS_ID, TTL]), LldpError::Order);
        assert_eq!(refuse(&[CHASSIS_ID, PORT_ID]), LldpError::Order);
        assert_eq!(refuse(&[CHASSIS_ID, PORT_ID, TTL, PORT_ID]), LldpError::Order, "twice");
        assert_eq!(refuse(&[(1, &[4]), PORT_ID, TTL]), LldpError::Length);
        assert_eq!(refuse(&[CHASSIS_ID, PORT_ID, (3, &[1])]), LldpError::Length);
        assert_eq!(parse_lldp(&[2, 200, 4]), Err(LldpError::Truncated));
        assert_eq!(parse_lldp(&frame(&[CHASSIS_ID, PORT_ID, (3, &[0, 0])])), Ok(Lldp::Leaves));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_bounded_answer(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = parse_lldp(&bytes);
        }

        #[test]
        fn any_values_are_bounded_and_printable(
            chassis in proptest::collection::vec(any::<u8>(), 2..256),
            port in proptest::collection::vec(any::<u8>(), 2..256),
            more in proptest::collection::vec((4_u8..128, proptest::collection::vec(any::<u8>(), 0..511)), 0..8),
        ) {
            let mut bytes = frame(&[(1, &chassis), (2, &port), TTL]);
            for (kind, value) in &more {
                bytes.extend(tlv(*kind, value));
            }
            let got = neighbour(&bytes);
            for text in [got.chassis, got.port, got.port_description, got.system_name] {
                prop_assert!(text.len() <= TEXT && !text.chars().any(char::is_control), "{:?}", text);
            }
        }

        #[test]
        fn a_cut_frame_is_never_read_as_another(cut in 0_usize..60) {
            let whole = frame(&[CHASSIS_ID, PORT_ID, TTL, (4, b"to rack 7"), (5, b"switch-with-a-name")]);
            let cut = cut.min(whole.len());
            if let Ok(Lldp::Neighbour(got, _)) = parse_lldp(&whole[..cut]) {
                let all = neighbour(&whole);
                prop_assert_eq!((got.chassis, got.port), (all.chassis, all.port));
                prop_assert!(got.system_name.is_empty() || got.system_name == all.system_name);
            }
        }
    }
}
