//! Any bytes at all: no panic, no reply to what is no request, replies of bounded size.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use kiln_netboot::{BootAnswer, Dhcp, LeaseConfig, Mode, PacketError, Step, tftp::Request};
use proptest::prelude::*;
use std::net::Ipv4Addr;

const NAMES: [&str; 9] = [
    "ipxe-rom-discover",
    "ipxe-rom-request",
    "ovmf-http-discover",
    "ovmf-http-request",
    "ovmf-pxe-discover",
    "ovmf-pxe-request",
    "snponly-discover",
    "undionly-discover",
    "undionly-request",
];

fn servers() -> [Dhcp; 2] {
    let range = LeaseConfig {
        start: Ipv4Addr::new(10, 77, 0, 100),
        end: Ipv4Addr::new(10, 77, 0, 110),
        router: None,
        dns: vec![],
        lease_s: 60,
    };
    [proxy(), Dhcp::new(config(Mode::Full(range)), []).unwrap()]
}

fn feed(packet: &[u8]) {
    for mut dhcp in servers() {
        for port in [67, 4011] {
            let outputs = match dhcp.receive(1, &arrival(port), packet) {
                Step::Done(outputs) => outputs,
                Step::Ask(_, pending) => dhcp.answered(1, *pending, BootAnswer::Ipxe),
            };
            for datagram in sent(&outputs) {
                assert!((300..=1472).contains(&datagram.bytes.len()), "{} bytes", datagram.bytes.len());
                assert_eq!(datagram.bytes[0], 2);
                assert_eq!(datagram.bytes[4..8], packet[4..8], "the client's transaction id");
            }
        }
    }
}

proptest! {
    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        feed(&bytes);
        let _ = Request::parse(&bytes);
    }

    #[test]
    fn noise_after_a_good_header(options in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut packet = packet("ovmf-pxe-discover")[..240].to_vec();
        packet.extend([53, 1, 1]);
        packet.extend(options);
        packet.push(255);
        feed(&packet);
    }

    #[test]
    fn damaged_captures(which in 0..NAMES.len(), hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut packet = packet(NAMES[which]);
        for (at, byte) in hits {
            let at = at.index(packet.len());
            packet[at] = byte;
        }
        feed(&packet);
    }

    #[test]
    fn requests_for_files(text in "\\PC{0,200}") {
        let mut packet = vec![0, 1];
        packet.extend(text.bytes());
        packet.extend(b"\0octet\0blksize\0");
        packet.extend(text.bytes());
        packet.push(0);
        let _ = Request::parse(&packet);
    }
}

#[test]
fn a_capture_cut_anywhere_is_refused_not_misread() {
    for name in NAMES {
        let whole = packet(name);
        let end = whole.iter().rposition(|b| *b == 255).unwrap();
        for length in 0..end {
            let error = kiln_netboot::Client::parse(&whole[..length]).unwrap_err();
            assert!(
                matches!(error, PacketError::Length { .. } | PacketError::NoEnd | PacketError::OptionCut { .. }),
                "{name} cut at {length}: {error}"
            );
        }
        assert!(kiln_netboot::Client::parse(&whole).is_ok(), "{name}");
    }
}

#[test]
fn a_relay_option_that_would_swell_the_reply_is_refused() {
    let mut relayed = with_option(&packet("ovmf-pxe-discover"), 82, &[1; 255]);
    feed(&relayed);
    relayed.truncate(relayed.len() - 1);
    relayed.extend([82, 1, 1, 255]);
    assert_eq!(
        kiln_netboot::Client::parse(&relayed).unwrap_err(),
        PacketError::OptionLength { code: 82, expected: "at most 255", got: 256 }
    );
}
