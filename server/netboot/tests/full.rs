//! Full mode: addresses for everyone, the boot program for boot clients.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use dhcproto::v4::MessageType;
use kiln_netboot::{BootAnswer, Dhcp, Event, Lease, LeaseConfig, LeaseState, Mode, Output, RangeError, Step};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};

fn at(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, last)
}

fn lease_config(first: u8, last: u8) -> LeaseConfig {
    LeaseConfig { start: at(first), end: at(last), router: Some(at(254)), dns: vec![at(253), at(252)], lease_s: 3600 }
}

fn full(first: u8, last: u8) -> Dhcp {
    Dhcp::new(config(Mode::Full(lease_config(first, last))), []).unwrap()
}

/// A packet of an ordinary client with the given MAC's last byte.
fn ordinary(kind: u8, mac: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
    let mut packet = with_option(&packet("ovmf-pxe-discover"), 60, &[]);
    packet[33] = mac;
    let mut packet = with_option(&packet, 53, &[kind]);
    for (code, value) in options {
        packet = with_option(&packet, *code, value);
    }
    packet
}

fn step(dhcp: &mut Dhcp, now_ms: u64, packet: &[u8]) -> Vec<Output> {
    match dhcp.receive(now_ms, &arrival(67), packet) {
        Step::Done(outputs) => outputs,
        Step::Ask(mut outputs, pending) => {
            let answer = BootAnswer::Uki { sha256: "ab".repeat(32).parse().unwrap() };
            outputs.extend(dhcp.answered(now_ms, *pending, answer));
            outputs
        }
    }
}

fn reply(dhcp: &mut Dhcp, now_ms: u64, packet: &[u8]) -> Option<Reply> {
    let outputs = step(dhcp, now_ms, packet);
    sent(&outputs).first().map(|d| Reply::read(&d.bytes))
}

/// DISCOVER and REQUEST: the address.
fn lease(dhcp: &mut Dhcp, now_ms: u64, mac: u8) -> Option<Ipv4Addr> {
    let offered = reply(dhcp, now_ms, &ordinary(1, mac, &[]))?.0.yiaddr();
    let options: [(u8, &[u8]); 2] = [(54, &SERVER.octets()), (50, &offered.octets())];
    let ack = reply(dhcp, now_ms, &ordinary(3, mac, &options))?;
    assert_eq!((ack.kind(), ack.0.yiaddr()), (MessageType::Ack, offered));
    Some(offered)
}

#[test]
fn a_boot_client_gets_address_and_program_in_one_reply() {
    let mut dhcp = full(100, 110);
    let offer = reply(&mut dhcp, 0, &packet("ovmf-pxe-discover")).unwrap();
    assert_eq!((offer.kind(), offer.0.yiaddr(), offer.0.siaddr()), (MessageType::Offer, at(100), SERVER));
    assert_eq!(offer.raw(60).unwrap(), b"PXEClient");
    assert_eq!(offer.raw(1).unwrap(), [255, 255, 255, 0]);
    assert_eq!(offer.raw(28).unwrap(), [10, 77, 0, 255]);
    assert_eq!(offer.raw(3).unwrap(), at(254).octets());
    assert_eq!(offer.raw(6).unwrap(), [10, 77, 0, 253, 10, 77, 0, 252]);
    assert_eq!(offer.raw(51).unwrap(), 3600u32.to_be_bytes());
    assert!(offer.file().ends_with("/kiln.efi"));
    let request = with_option(&with_option(&packet("ovmf-pxe-request"), 54, &SERVER.octets()), 50, &at(100).octets());
    let outputs = step(&mut dhcp, 5, &request);
    let bound = Lease {
        address: at(100),
        mac: "52:54:00:00:00:02".parse().unwrap(),
        state: LeaseState::Bound,
        until_ms: 3_600_005,
    };
    assert!(outputs.contains(&Output::Lease(bound.clone())));
    assert_eq!(Reply::read(&sent(&outputs)[0].bytes).kind(), MessageType::Ack);
    assert!(events(&outputs).iter().any(|e| matches!(e, Event::Accepted { address, .. } if *address == at(100))));
    assert_eq!(dhcp.machine_at(at(100)).unwrap().0, bound.mac);
    assert_eq!(dhcp.leases(), [bound]);
}

#[test]
fn http_boot_and_the_agent_are_served_with_their_lease() {
    let mut dhcp = full(100, 110);
    let offer = reply(&mut dhcp, 0, &packet("ovmf-http-discover")).unwrap();
    assert_eq!(offer.raw(60).unwrap(), b"HTTPClient");
    let url = format!("http://10.77.0.1:8080/b/{}/kiln.efi", "ab".repeat(32));
    assert_eq!((offer.0.yiaddr(), offer.raw(67).unwrap()), (at(100), url.into_bytes()));
    let agent = with_option(&packet("ovmf-http-discover"), 60, b"KilnAgent");
    let offer = reply(&mut dhcp, 0, &agent).unwrap();
    assert_eq!(offer.0.yiaddr(), at(100), "the same machine keeps its address");
    assert_eq!(offer.raw(60).unwrap(), b"KilnAgent");
    assert_eq!(offer.file(), "");
}

#[test]
fn a_boot_client_that_must_wait_still_gets_its_address() {
    let mut dhcp = full(100, 110);
    let Step::Ask(_, pending) = dhcp.receive(0, &arrival(67), &packet("ovmf-pxe-discover")) else { panic!() };
    let outputs = dhcp.answered(0, *pending, BootAnswer::Wait { reason: "quarantined".into() });
    let offer = Reply::read(&sent(&outputs)[0].bytes);
    assert_eq!((offer.0.yiaddr(), offer.raw(60), offer.file()), (at(100), None, String::new()));
}

#[test]
fn request_is_judged_as_rfc_2131_has_it() {
    let mut dhcp = full(100, 101);
    assert_eq!(lease(&mut dhcp, 0, 1), Some(at(100)));
    let kind = |dhcp: &mut Dhcp, packet: &[u8]| reply(dhcp, 1, packet).map(|r| r.kind());
    // INIT-REBOOT: its own, somebody else's, one of no range, and a client never seen.
    assert_eq!(kind(&mut dhcp, &ordinary(3, 1, &[(50, &at(100).octets())])), Some(MessageType::Ack));
    assert_eq!(kind(&mut dhcp, &ordinary(3, 2, &[(50, &at(100).octets())])), Some(MessageType::Nak));
    assert_eq!(kind(&mut dhcp, &ordinary(3, 1, &[(50, &[192, 168, 1, 1])])), Some(MessageType::Nak));
    assert_eq!(kind(&mut dhcp, &ordinary(3, 9, &[(50, &at(101).octets())])), None);
    // RENEWING: unicast, and answered so.
    let mut renew = ordinary(3, 1, &[]);
    renew[12..16].copy_from_slice(&at(100).octets());
    let outputs = step(&mut dhcp, 1, &renew);
    assert_eq!(sent(&outputs)[0].to, SocketAddrV4::new(at(100), 68));
    // SELECTING another server frees the offer, which the next client gets.
    assert_eq!(reply(&mut dhcp, 1, &ordinary(1, 2, &[])).unwrap().0.yiaddr(), at(101));
    let elsewhere: [(u8, &[u8]); 2] = [(54, &OTHER.octets()), (50, &at(200).octets())];
    assert_eq!(kind(&mut dhcp, &ordinary(3, 2, &elsewhere)), None);
    assert_eq!(lease(&mut dhcp, 2, 3), Some(at(101)));
    // Nothing left, said by name.
    let outputs = step(&mut dhcp, 3, &ordinary(1, 4, &[]));
    assert!(sent(&outputs).is_empty());
    assert!(matches!(events(&outputs)[..], [Event::NoAddressLeft { .. }]));
    // RELEASE makes room; the other's DECLINE takes an address away, a stranger's does not.
    let mut release = ordinary(7, 1, &[(54, &SERVER.octets())]);
    release[12..16].copy_from_slice(&at(100).octets());
    step(&mut dhcp, 4, &release);
    step(&mut dhcp, 4, &ordinary(4, 1, &[(54, &SERVER.octets()), (50, &at(101).octets())]));
    assert_eq!(lease(&mut dhcp, 5, 3), Some(at(101)));
    step(&mut dhcp, 6, &ordinary(4, 3, &[(54, &SERVER.octets()), (50, &at(101).octets())]));
    assert_eq!(lease(&mut dhcp, 7, 3), Some(at(100)));
    assert!(
        step(&mut dhcp, 8, &ordinary(1, 5, &[]))
            .iter()
            .any(|o| matches!(o, Output::Event(Event::NoAddressLeft { .. })))
    );
    assert_eq!(lease(&mut dhcp, 700_000, 5), Some(at(101)), "a declined address comes back after a while");
}

#[test]
fn leases_survive_a_restart() {
    let mut dhcp = full(100, 110);
    for mac in 0..5 {
        lease(&mut dhcp, 0, mac);
    }
    let mut again = Dhcp::new(config(Mode::Full(lease_config(100, 110))), dhcp.leases()).unwrap();
    assert_eq!(again.leases(), dhcp.leases());
    assert_eq!(lease(&mut again, 1, 9), Some(at(105)));
    assert_eq!(lease(&mut again, 1, 3), Some(at(103)));
}

#[test]
fn a_machine_that_moved_gives_up_its_former_address_also_over_a_restart() {
    let mut dhcp = full(100, 101);
    let select = |dhcp: &mut Dhcp, now_ms: u64, mac: u8, address: u8| {
        let wanted = at(address).octets();
        let answer = reply(dhcp, now_ms, &ordinary(3, mac, &[(54, &SERVER.octets()), (50, &wanted)])).unwrap();
        (answer.kind(), answer.0.yiaddr())
    };
    // What is persisted, in the order it was first written: both addresses are there, whichever it has now.
    let mut stored: Vec<Lease> = Vec::new();
    let mut persist = |dhcp: &Dhcp| {
        for lease in dhcp.leases() {
            match stored.iter_mut().find(|known| known.address == lease.address) {
                Some(known) => *known = lease,
                None => stored.push(lease),
            }
        }
        stored.clone()
    };
    for (minute, address) in [(0, 100), (1, 101), (2, 100)] {
        assert_eq!(select(&mut dhcp, minute * 60_000, 0, address), (MessageType::Ack, at(address)));
        persist(&dhcp);
    }
    let mut again = Dhcp::new(config(Mode::Full(lease_config(100, 101))), persist(&dhcp)).unwrap();
    for server in [&mut dhcp, &mut again] {
        assert_eq!(select(server, 180_000, 1, 100).0, MessageType::Nak, "it is the first machine's");
        assert_eq!(select(server, 180_000, 1, 101), (MessageType::Ack, at(101)), "which has no other");
    }
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let refused = |c: LeaseConfig| Dhcp::new(config(Mode::Full(c)), []).unwrap_err();
    assert!(matches!(refused(lease_config(110, 100)), RangeError::Backwards { .. }));
    let end = Ipv4Addr::new(10, 90, 0, 1);
    assert!(matches!(refused(LeaseConfig { end, ..lease_config(1, 2) }), RangeError::TooLarge { .. }));
    assert!(matches!(refused(LeaseConfig { lease_s: 5, ..lease_config(1, 2) }), RangeError::LeaseTime { got: 5 }));
}

proptest! {
    /// Whatever clients do and in which order: no two hold one address at a time, none outside the range is given, and
    /// the server's, the router's and the DNS servers' own are never given.
    #[test]
    fn no_address_is_given_twice(steps in prop::collection::vec((0u8..12, 0u8..6, 248u8..=255, 0u64..4_000_000), 1..120)) {
        let mut dhcp = full(248, 254);
        let mut held: BTreeMap<Ipv4Addr, (u8, u64)> = BTreeMap::new();
        let mut now_ms = 0;
        for (mac, action, address, pause) in steps {
            now_ms += pause;
            let wanted = at(address).octets();
            let server = SERVER.octets();
            let packet = match action {
                0 => ordinary(1, mac, &[]),
                1 => ordinary(1, mac, &[(50, &wanted)]),
                2 => ordinary(3, mac, &[(54, &server), (50, &wanted)]),
                3 => ordinary(3, mac, &[(50, &wanted)]),
                4 => ordinary(4, mac, &[(54, &server), (50, &wanted)]),
                _ => {
                    let mut release = ordinary(7, mac, &[(54, &server)]);
                    release[12..16].copy_from_slice(&wanted);
                    release
                }
            };
            match action {
                4 | 5 if held.get(&at(address)).is_some_and(|(m, _)| *m == mac) => drop(held.remove(&at(address))),
                _ => {}
            }
            let Some(reply) = reply(&mut dhcp, now_ms, &packet) else { continue };
            if reply.kind() != MessageType::Ack {
                continue;
            }
            let given = reply.0.yiaddr();
            prop_assert!((248..=251).contains(&given.octets()[3]), "{given} is reserved or outside");
            if let Some((other, until)) = held.get(&given).filter(|(m, _)| *m != mac) {
                prop_assert!(*until <= now_ms, "{given} is {other}'s until {until}, given to {mac} at {now_ms}");
            }
            // One address for each machine: with the new one it gives the former up.
            held.retain(|_, (holder, _)| *holder != mac);
            held.insert(given, (mac, now_ms + 3_600_000));
        }
    }
}
