//! Proxy mode, with packets captured from real firmware: OVMF's PXE, QEMU's iPXE ROM, Debian's undionly.kpxe and
//! snponly.efi.
#![allow(clippy::unwrap_used)]

mod common;
use common::*;
use dhcproto::v4::MessageType;
use kiln_netboot::tftp::BootFile;
use kiln_netboot::{Arrival, BootAnswer, BootKind, BootQuery, Dhcp, Event, Mac, Offer, Output, Step, UefiProgram};
use std::net::{Ipv4Addr, SocketAddrV4};

fn uki() -> BootAnswer {
    BootAnswer::Uki { sha256: "ab".repeat(32).parse().unwrap() }
}

/// Sends a packet through, answering what is asked; the query, and what came out after it.
fn ask(dhcp: &mut Dhcp, now_ms: u64, port: u16, packet: &[u8], answer: BootAnswer) -> (BootQuery, Vec<Output>) {
    match dhcp.receive(now_ms, &arrival(port), packet) {
        Step::Ask(mut outputs, pending) => {
            let query = pending.query.clone();
            outputs.extend(dhcp.answered(now_ms, *pending, answer));
            (query, outputs)
        }
        Step::Done(outputs) => panic!("no question asked: {outputs:?}"),
    }
}

fn silent(dhcp: &mut Dhcp, now_ms: u64, packet: &[u8]) -> Vec<Output> {
    match dhcp.receive(now_ms, &arrival(67), packet) {
        Step::Done(outputs) => {
            assert_eq!(sent(&outputs), Vec::<&kiln_netboot::Datagram>::new());
            outputs
        }
        Step::Ask(_, pending) => panic!("asked {:?}", pending.query),
    }
}

#[test]
fn ovmf_is_offered_the_uki_by_tftp() {
    let mut dhcp = proxy();
    let (query, outputs) = ask(&mut dhcp, 0, 67, &packet("ovmf-pxe-discover"), uki());
    assert_eq!(query.kind, BootKind::UefiPxe);
    assert_eq!(query.id.unwrap().as_str(), "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!(query.mac.to_string(), "52:54:00:00:00:02");

    let [datagram] = sent(&outputs)[..] else { panic!("{outputs:?}") };
    assert_eq!(datagram.to, SocketAddrV4::new(Ipv4Addr::BROADCAST, 68));
    assert_eq!((datagram.from, datagram.from_port, datagram.interface), (SERVER, 67, 3));
    let reply = Reply::read(&datagram.bytes);
    let file = format!("b/{}/kiln.efi", "ab".repeat(32));
    assert_eq!(reply.kind(), MessageType::Offer);
    assert_eq!(reply.0.xid(), 0x05e2_aa2f);
    assert_eq!((reply.0.yiaddr(), reply.0.siaddr()), (Ipv4Addr::UNSPECIFIED, SERVER));
    assert_eq!(reply.server_id(), SERVER);
    assert_eq!(reply.raw(60).unwrap(), b"PXEClient");
    assert_eq!(reply.raw(43).unwrap(), [6, 1, 8, 255]);
    assert_eq!(reply.raw(97), packet_option("ovmf-pxe-discover", 97));
    assert_eq!(reply.file(), file);
    assert_eq!(reply.raw(67).unwrap(), format!("{file}\0").as_bytes());
    assert_eq!(reply.raw(66).unwrap(), b"10.77.0.1");
    assert_eq!(reply.raw(51), None, "a proxy leases nothing");
    assert!(events(&outputs).iter().any(|e| matches!(e, Event::Offered { offer: Offer::Tftp(BootFile::Uki(_)), .. })));
}

fn packet_option(name: &str, code: u8) -> Option<Vec<u8>> {
    Reply::read(&packet(name)).raw(code)
}

#[test]
fn port_4011_is_answered_with_an_ack_to_where_it_came_from() {
    let mut dhcp = proxy();
    let from = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 101), 68);
    let request = with_option(&packet("ovmf-pxe-request"), 43, &[71, 4, 0, 0, 0, 0, 255]);
    let Step::Ask(_, pending) = dhcp.receive(0, &Arrival { from, ..arrival(4011) }, &request) else {
        panic!("a boot server request is a question");
    };
    let outputs = dhcp.answered(0, *pending, uki());
    let [datagram] = sent(&outputs)[..] else { panic!("{outputs:?}") };
    assert_eq!((datagram.to, datagram.from_port), (from, 4011));
    let reply = Reply::read(&datagram.bytes);
    assert_eq!(reply.kind(), MessageType::Ack);
    assert_eq!(reply.raw(43).unwrap(), [6, 1, 8, 71, 4, 0, 0, 0, 0, 255], "the asked boot item comes back");
}

#[test]
fn a_request_for_another_servers_offer_is_not_ours_but_tells_who_has_which_address() {
    let mut dhcp = proxy();
    ask(&mut dhcp, 0, 67, &packet("ovmf-pxe-discover"), uki());
    let request = with_option(&packet("ovmf-pxe-request"), 54, &OTHER.octets());
    let outputs = silent(&mut dhcp, 1, &request);
    assert_eq!(events(&outputs), [&Event::OtherServer { server: OTHER }]);
    assert_eq!(events(&silent(&mut dhcp, 2, &request)), Vec::<&Event>::new(), "said once");
    let (mac, id) = dhcp.machine_at(Ipv4Addr::new(10, 77, 0, 101)).unwrap();
    assert_eq!(mac, "52:54:00:00:00:02".parse::<Mac>().unwrap());
    assert_eq!(id.unwrap().as_str(), "01234567-89ab-cdef-0123-456789abcdef");
}

#[test]
fn a_dhcp_server_at_the_same_address_is_not_answered_for() {
    let mut dhcp = proxy();
    ask(&mut dhcp, 0, 67, &packet("ovmf-pxe-discover"), uki());
    let request = with_option(&packet("ovmf-pxe-request"), 54, &SERVER.octets());
    assert_eq!(events(&silent(&mut dhcp, 1, &request)), [&Event::OtherServer { server: SERVER }]);
    assert_eq!(dhcp.deadline_ms(), None);
    let (_, outputs) = ask(&mut dhcp, 2, 67, &with_option(&request, 50, &[]), uki());
    assert_eq!(Reply::read(&sent(&outputs)[0].bytes).kind(), MessageType::Ack, "only this one is the proxy's own");
}

#[test]
fn rom_then_undionly_then_script() {
    let mut dhcp = proxy();
    let undionly = |outputs: &[Output]| {
        assert_eq!(Reply::read(&sent(outputs)[0].bytes).file(), "undionly.kpxe");
    };
    let (query, outputs) = ask(&mut dhcp, 0, 67, &packet("ipxe-rom-discover"), BootAnswer::Ipxe);
    assert_eq!(query.kind, BootKind::BiosIpxe, "the ROM itself could run the script");
    undionly(&outputs);
    let taken = with_option(&packet("ipxe-rom-request"), 54, &OTHER.octets());
    silent(&mut dhcp, 2_000, &taken);
    dhcp.tftp_done(Ipv4Addr::new(10, 77, 0, 100), &BootFile::Undionly, 5_000);
    let (_, outputs) = ask(&mut dhcp, 9_000, 67, &packet("undionly-discover"), uki());
    let url = "http://10.77.0.1:8080/boot.ipxe?uuid=01234567-89ab-cdef-0123-456789abcdef&mac=52:54:00:00:00:01";
    let reply = Reply::read(&sent(&outputs)[0].bytes);
    assert_eq!((reply.file().as_str(), reply.raw(67).unwrap()), (url, url.as_bytes().to_vec()));

    // The broadcast flag alone shows it as well: a server started in between does not chain it again.
    let (_, outputs) = ask(&mut proxy(), 9_000, 67, &packet("undionly-discover"), BootAnswer::Ipxe);
    assert_eq!(Reply::read(&sent(&outputs)[0].bytes).file(), url);

    // A plain PXE ROM and an iPXE without HTTP get undionly.kpxe; the latter not again after it had it.
    let plain = with_option(&with_option(&packet("ipxe-rom-discover"), 77, &[]), 175, &[]);
    let (query, outputs) = ask(&mut proxy(), 0, 67, &plain, BootAnswer::Ipxe);
    assert_eq!(query.kind, BootKind::BiosPxe);
    undionly(&outputs);
    let poor = with_option(&packet("ipxe-rom-discover"), 175, &[24, 1, 1]);
    let mut dhcp = proxy();
    undionly(&ask(&mut dhcp, 0, 67, &poor, BootAnswer::Ipxe).1);
    silent(&mut dhcp, 1, &taken);
    dhcp.tftp_done(Ipv4Addr::new(10, 77, 0, 100), &BootFile::Undionly, 5_000);
    let (_, outputs) = ask(&mut dhcp, 6_000, 67, &poor, BootAnswer::Ipxe);
    assert!(sent(&outputs).is_empty());
    assert!(matches!(events(&outputs)[..], [Event::Discover { .. }, Event::BootLoop { .. }, Event::Withheld { .. }]));
}

/// Where the site's key is not in db, or firmware loads no large program: another one first, by TFTP, for x86 alone.
#[test]
fn uefi_pxe_is_given_what_the_site_chose() {
    for (uefi, file) in [(UefiProgram::Ipxe, "snponly.efi"), (UefiProgram::Shim, "shimx64.efi")] {
        let config = kiln_netboot::Config { uefi, ..config(kiln_netboot::Mode::Proxy) };
        let mut dhcp = Dhcp::new(config.clone(), []).unwrap();
        let (query, outputs) = ask(&mut dhcp, 0, 67, &packet("ovmf-pxe-discover"), uki());
        assert_eq!((query.kind, Reply::read(&sent(&outputs)[0].bytes).file().as_str()), (BootKind::UefiPxe, file));
        // The iPXE that comes of it, and HTTP Boot, are sent to the release itself.
        let release = format!("http://10.77.0.1:8080/b/{}/kiln.efi", "ab".repeat(32));
        for client in ["snponly-discover", "ovmf-http-discover"] {
            let mut dhcp = Dhcp::new(config.clone(), []).unwrap();
            let (_, outputs) = ask(&mut dhcp, 0, 67, &packet(client), uki());
            assert_eq!(Reply::read(&sent(&outputs)[0].bytes).file(), release, "{client}");
        }
        // Architecture 11: arm64.
        let arm = with_option(&packet("ovmf-pxe-discover"), 93, &[0, 11]);
        let (_, outputs) = ask(&mut Dhcp::new(config.clone(), []).unwrap(), 0, 67, &arm, uki());
        assert!(Reply::read(&sent(&outputs)[0].bytes).file().ends_with("/kiln.efi"));
    }
}

#[test]
fn ipxe_on_uefi_gets_the_uki_by_http() {
    let (query, outputs) = ask(&mut proxy(), 0, 67, &packet("snponly-discover"), uki());
    assert_eq!(query.kind, BootKind::UefiIpxe);
    assert_eq!(
        Reply::read(&sent(&outputs)[0].bytes).file(),
        format!("http://10.77.0.1:8080/b/{}/kiln.efi", "ab".repeat(32))
    );
}

#[test]
fn the_agent_learns_where_its_server_is() {
    let mut dhcp = proxy();
    let discover = with_option(&packet("ovmf-pxe-discover"), 60, b"KilnAgent");
    let Step::Done(outputs) = dhcp.receive(0, &arrival(67), &discover) else { panic!("nothing to decide") };
    let reply = Reply::read(&sent(&outputs)[0].bytes);
    assert_eq!((reply.kind(), reply.0.yiaddr(), reply.0.siaddr()), (MessageType::Offer, Ipv4Addr::UNSPECIFIED, SERVER));
    assert_eq!(reply.raw(60).unwrap(), b"KilnAgent");
    let mut expected = vec![1, 21];
    expected.extend(b"http://10.77.0.1:8080");
    expected.extend([2, 22]);
    expected.extend(b"https://10.77.0.1:8443");
    assert_eq!(reply.raw(43).unwrap(), expected);
}

#[test]
fn a_machine_that_must_wait_and_a_foreign_one_get_no_offer() {
    let reason = "quarantined".to_owned();
    let wait = BootAnswer::Wait { reason: reason.clone() };
    let (_, outputs) = ask(&mut proxy(), 0, 67, &packet("ovmf-pxe-discover"), wait);
    assert!(sent(&outputs).is_empty());
    assert!(matches!(events(&outputs)[1], Event::Withheld { reason: r, .. } if *r == reason));
    let (_, outputs) = ask(&mut proxy(), 0, 67, &packet("ovmf-pxe-discover"), BootAnswer::Ignore);
    assert!(sent(&outputs).is_empty());
    let ia32 = with_option(&packet("ovmf-pxe-discover"), 93, &[0, 6]);
    let outputs = silent(&mut proxy(), 0, &ia32);
    assert!(matches!(events(&outputs)[..], [Event::Withheld { reason, .. }] if reason.contains("architecture")));
    silent(&mut proxy(), 0, &with_option(&packet("ovmf-pxe-discover"), 60, b"systemd-networkd"));
}

#[test]
fn the_whole_list_of_option_93_is_read() {
    let listed = with_option(&packet("ovmf-pxe-discover"), 93, &[0, 6, 0, 7]);
    let (query, _) = ask(&mut proxy(), 0, 67, &listed, uki());
    assert_eq!(query.kind, BootKind::UefiPxe);
    let by_class = with_option(&packet("ovmf-pxe-discover"), 93, &[]);
    assert_eq!(ask(&mut proxy(), 0, 67, &by_class, uki()).0.kind, BootKind::UefiPxe, "option 60 names it too");
}

#[test]
fn through_a_relay_the_answer_goes_to_the_relay_with_its_option_as_it_came() {
    let agent = [1, 3, b'e', b't', b'h', 9, 4, 0, 0, 0, 1];
    let mut relayed = with_option(&packet("ovmf-pxe-discover"), 82, &agent);
    relayed[24..28].copy_from_slice(&[10, 99, 0, 1]);
    let (_, outputs) = ask(&mut proxy(), 0, 67, &relayed, uki());
    let datagram = sent(&outputs)[0];
    assert_eq!(datagram.to, SocketAddrV4::new(Ipv4Addr::new(10, 99, 0, 1), 67));
    let tail = datagram.bytes.iter().rposition(|b| *b == 255).unwrap();
    assert_eq!(datagram.bytes[tail - agent.len() - 2..tail], [&[82, 11][..], &agent].concat());
}

/// Where the trusted relay at 10.99.0.1 says that a packet with this option 82 came from.
fn heard(agent: &[u8], giaddr: [u8; 4], from: [u8; 4]) -> Vec<String> {
    let mut dhcp = proxy();
    dhcp.trust_relays([Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 1, 1)].into());
    let mut relayed = with_option(&packet("ovmf-pxe-discover"), 82, agent);
    relayed[24..28].copy_from_slice(&giaddr);
    let from = SocketAddrV4::new(from.into(), 67);
    let outputs = match dhcp.receive(0, &Arrival { from, ..arrival(67) }, &relayed) {
        Step::Ask(outputs, _) | Step::Done(outputs) => outputs,
    };
    let place =
        |event: &&Event| if let Event::HeardAt { position, .. } = event { Some(position.clone()) } else { None };
    events(&outputs).iter().filter_map(place).collect()
}

#[test]
fn a_position_is_a_trusted_relays_word_and_nobody_elses() {
    let relay = [10, 99, 0, 1];
    let both = [&[1, 6][..], b"eth1/3", &[2, 4], b"sw-7"].concat();
    assert_eq!(heard(&both, relay, relay), ["10.99.0.1 sw-7 eth1/3"]);
    assert_eq!(heard(&both, relay, [10, 99, 1, 1]), ["10.99.0.1 sw-7 eth1/3"], "from another address of the relay's");
    assert_eq!(heard(&[1, 2, 0, 7], relay, relay), ["10.99.0.1 - 0x0007"], "an id that is no text");
    // Two ids that a person would read as one are two.
    let (dash, hex) = ([1, 1, b'a', 2, 1, b'-'], [&[1, 1, b'a', 2, 4][..], b"0x2d"].concat());
    assert_eq!(heard(&dash, relay, relay), ["10.99.0.1 0x2d a"]);
    assert_eq!(heard(&hex, relay, relay), ["10.99.0.1 0x30783264 a"]);

    let nowhere: [String; 0] = [];
    assert_eq!(heard(&both, [0; 4], relay), nowhere, "no relay was there");
    assert_eq!(heard(&both, [10, 99, 0, 2], relay), nowhere, "a relay that nobody listed");
    assert_eq!(heard(&both, relay, [10, 77, 0, 50]), nowhere, "a client that writes the relay's name itself");
    assert_eq!(heard(&both[8..], relay, relay), nowhere, "a switch without its port");
    assert_eq!(heard(&both[..both.len() - 1], relay, relay), nowhere, "cut short");
    assert_eq!(heard(&[&both[..], &[1, 1, b'x']].concat(), relay, relay), nowhere, "two ports");
    assert_eq!(heard(&[&[1, 65][..], &[b'p'; 65]].concat(), relay, relay), nowhere, "too long to be told");
}

#[test]
fn no_reply_is_longer_than_the_client_takes() {
    let agent = [7; 250];
    let mut relayed = with_option(&with_option(&packet("ovmf-pxe-discover"), 82, &agent), 57, &576u16.to_be_bytes());
    relayed[24..28].copy_from_slice(&[10, 99, 0, 1]);
    let (_, outputs) = ask(&mut proxy(), 0, 67, &relayed, uki());
    let bytes = &sent(&outputs)[0].bytes;
    assert!(bytes.len() <= 576 - 28, "{}", bytes.len());
    let reply = Reply::read(bytes);
    assert_eq!(reply.file(), format!("b/{}/kiln.efi", "ab".repeat(32)), "the header's field holds it all the same");
}

#[test]
fn nobody_else_gives_addresses_is_said_once_after_ten_seconds() {
    let mut dhcp = proxy();
    ask(&mut dhcp, 0, 67, &packet("ovmf-pxe-discover"), BootAnswer::Wait { reason: "quarantined".into() });
    assert_eq!(dhcp.deadline_ms(), None, "EDK2 takes no address where there is no boot program");
    ask(&mut dhcp, 1_000, 67, &packet("ovmf-pxe-discover"), uki());
    ask(&mut dhcp, 5_000, 67, &packet("ovmf-pxe-discover"), uki());
    assert_eq!(dhcp.deadline_ms(), Some(11_000));
    assert_eq!(dhcp.tick(10_999), []);
    assert_eq!(dhcp.tick(11_000), [Output::Event(Event::NoOtherServer)]);
    ask(&mut dhcp, 20_000, 67, &packet("ovmf-pxe-discover"), uki());
    assert_eq!((dhcp.deadline_ms(), dhcp.tick(99_000)), (None, vec![]));
    // Once one is seen, its loss is worth a word again.
    silent(&mut dhcp, 100_000, &with_option(&packet("ovmf-pxe-request"), 54, &OTHER.octets()));
    ask(&mut dhcp, 200_000, 67, &packet("ovmf-pxe-discover"), uki());
    silent(&mut dhcp, 201_000, &with_option(&packet("ovmf-pxe-request"), 54, &OTHER.octets()));
    assert_eq!(dhcp.tick(299_000), []);
    ask(&mut dhcp, 300_000, 67, &packet("ovmf-pxe-discover"), uki());
    assert_eq!(dhcp.tick(310_000), [Output::Event(Event::NoOtherServer)]);
    assert!(Event::NO_OTHER_SERVER.contains(r#"[dhcp] mode = "full""#));
}

#[test]
fn http_boot_is_offered_a_url() {
    let (query, outputs) = ask(&mut proxy(), 0, 67, &packet("ovmf-http-discover"), uki());
    assert_eq!(query.kind, BootKind::UefiHttp);
    let reply = Reply::read(&sent(&outputs)[0].bytes);
    let url = format!("http://10.77.0.1:8080/b/{}/kiln.efi", "ab".repeat(32));
    assert_eq!(reply.raw(60).unwrap(), b"HTTPClient");
    assert_eq!((reply.raw(67).unwrap(), reply.file()), (url.clone().into_bytes(), url));
    assert_eq!(reply.raw(43), None);
    let off = kiln_netboot::Config { http_boot: false, ..config(kiln_netboot::Mode::Proxy) };
    let outputs = silent(&mut Dhcp::new(off, []).unwrap(), 0, &packet("ovmf-http-discover"));
    assert!(matches!(events(&outputs)[..], [Event::Withheld { reason, .. }] if reason.contains("http_boot")));
}
