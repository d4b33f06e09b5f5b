//! Packets that any machine on the link can send.

/// DHCP: packets to a proxy and to a full server.
pub mod dhcp {
    use kiln_netboot::{
        Arrival, BootAnswer, Client, Config, Datagram, Dhcp, LeaseConfig, LeaseState, Mode, Output, Step, UefiProgram,
    };
    use std::net::{Ipv4Addr, SocketAddrV4};

    const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
    const FIRST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
    const LAST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 110);
    const LONGEST: usize = 4096;

    fn servers() -> [Dhcp; 2] {
        let (router, dns) = (Some(SERVER), vec![SERVER]);
        let range = LeaseConfig { start: FIRST, end: LAST, router, dns, lease_s: 60 };
        [Mode::Proxy, Mode::Full(range)].map(|mode| {
            let (address, chain_ipxe, uefi) = (None, true, UefiProgram::Shim);
            let config = Config { mode, address, http_port: 8080, agent_port: 8443, http_boot: true, chain_ipxe, uefi };
            Dhcp::new(config, []).expect("a small range")
        })
    }

    fn arrival(port: u16) -> Arrival {
        let from = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68);
        Arrival { interface: 3, local: SERVER, netmask: Ipv4Addr::new(255, 255, 255, 0), from, port }
    }

    /// A reply, read by its own rules (RFC 2131 §2): fixed header, then options that end with 255.
    fn check(reply: &Datagram, packet: &[u8]) {
        let bytes = &reply.bytes;
        assert!((300..=1472).contains(&bytes.len()), "{} bytes", bytes.len());
        assert_eq!((bytes[0], &bytes[4..8], &bytes[28..34]), (2, &packet[4..8], &packet[28..34]), "whose reply is it?");
        assert_eq!(bytes[236..240], [99, 130, 83, 99]);
        let (mut at, mut kinds) = (240, 0);
        loop {
            match bytes[at] {
                255 => break,
                0 => at += 1,
                code => {
                    kinds += usize::from(code == 53);
                    at += 2 + usize::from(bytes[at + 1]);
                }
            }
        }
        assert!(kinds == 1 && bytes[at..].iter().all(|b| matches!(b, 0 | 255)), "one message type, and an end");
        assert!(matches!(reply.to.port(), 67 | 68 | 4011) || reply.to.port() == 68, "{}", reply.to);
    }

    /// The first byte says how the boot is decided; packets follow, each with its length before it.
    pub fn run(data: &[u8]) {
        let Some((choice, mut rest)) = super::super::choice(data) else { return };
        let answer = match choice % 4 {
            0 => BootAnswer::Ipxe,
            1 => BootAnswer::Uki { sha256: "ab".repeat(32).parse().expect("a hash") },
            2 => BootAnswer::Wait { reason: "not approved".into() },
            _ => BootAnswer::Ignore,
        };
        let mut packets = Vec::new();
        while let Some((length, more)) = rest.split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*length)).min(more.len());
            let (packet, more) = more.split_at(length);
            packets.push(packet);
            rest = more;
        }
        let mut servers = servers();
        for (number, packet) in packets.iter().take(6).enumerate() {
            let now = 1_800_000_000_000 + 1000 * number as u64;
            let known = Client::parse(packet).is_ok();
            if packet.len() < LONGEST && known {
                let padded = [*packet, &[0]].concat();
                let (one, other) = (Client::parse(packet).expect("just now"), Client::parse(&padded).expect("padded"));
                assert_eq!(
                    (one.mac, one.xid, one.arch()),
                    (other.mac, other.xid, other.arch()),
                    "padding says nothing"
                );
            }
            for dhcp in &mut servers {
                for port in [67, 4011] {
                    let outputs = match dhcp.receive(now, &arrival(port), packet) {
                        Step::Done(outputs) => outputs,
                        Step::Ask(mut outputs, pending) => {
                            outputs.extend(dhcp.answered(now, *pending, answer.clone()));
                            outputs
                        }
                    };
                    assert!(outputs.len() < 16, "{} outputs of one packet", outputs.len());
                    for output in &outputs {
                        match output {
                            Output::Send(reply) => {
                                assert!(known, "a reply to what is no request");
                                check(reply, packet);
                            }
                            Output::Lease(lease) => assert!((FIRST..=LAST).contains(&lease.address)),
                            Output::Event(_) => {}
                        }
                    }
                }
                let leases = dhcp.leases();
                let bound: Vec<_> = leases.iter().filter(|lease| lease.state == LeaseState::Bound).collect();
                let twice = bound.iter().enumerate().any(|(n, a)| bound[..n].iter().any(|b| a.address == b.address));
                assert!(!twice && leases.len() <= 11, "an address given twice");
            }
        }
    }

    fn packet(text: &str) -> Vec<u8> {
        kiln_release::hex::decode(&text.split_whitespace().collect::<String>()).expect("hex")
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        macro_rules! captures {
            ($($name:literal),+) => { [$(packet(include_str!(concat!("../../../server/netboot/tests/packets/", $name, ".hex")))),+] };
        }
        let all = captures!(
            "ipxe-rom-discover",
            "ipxe-rom-request",
            "ovmf-http-discover",
            "ovmf-http-request",
            "ovmf-pxe-discover",
            "ovmf-pxe-request",
            "snponly-discover",
            "undionly-discover",
            "undionly-request"
        );
        let framed =
            |packet: &Vec<u8>| [&u16::try_from(packet.len()).expect("short").to_be_bytes(), &packet[..]].concat();
        let mut seeds: Vec<Vec<u8>> =
            (0_u8..).zip(&all).map(|(n, packet)| [&[n], framed(packet).as_slice()].concat()).collect();
        let conversation: Vec<u8> = all[..2].iter().chain(&all[7..]).flat_map(framed).collect();
        seeds.push([&[1], conversation.as_slice()].concat());
        seeds
    }
}

/// TFTP: a request, then packets and time for its transfer.
pub mod tftp {
    use kiln_netboot::tftp::{Action, BootFile, Ending, Limits, Request, Transfer, error_packet};
    use std::net::SocketAddr;
    use std::time::Duration;

    const MS: Duration = Duration::from_millis(1);

    struct Watched {
        request: Request,
        size: u64,
        ended: bool,
        sent: u64,
    }

    impl Watched {
        fn check(&mut self, actions: &[Action], limits: &Limits) {
            assert!(!self.ended || actions.is_empty(), "after its end");
            let window = usize::from(self.request.windowsize.unwrap_or(1).min(limits.max_windowsize));
            let block = u64::from(self.request.blksize.unwrap_or(512).min(limits.max_blksize));
            let blocks = actions.iter().filter(|action| matches!(action, Action::Block { .. })).count();
            assert!(blocks <= window, "{blocks} blocks at once, a window of {window}");
            for action in actions {
                match action {
                    Action::Send(bytes) | Action::Refuse(_, bytes) => assert!(bytes.len() <= 600),
                    Action::Block { start, end, .. } => {
                        assert!(start <= end && *end <= self.size && end - start <= block, "{start}..{end}");
                        assert_eq!(start % block, 0);
                        assert!(*start <= self.sent, "a gap in what is sent");
                        self.sent = self.sent.max(*end);
                    }
                    Action::End(ending) => {
                        self.ended = true;
                        if *ending == Ending::Done {
                            assert_eq!(self.sent, self.size, "done before all was sent");
                        }
                    }
                }
            }
        }
    }

    /// Length of the request, size of the file (two bytes), the request; then steps of three bytes.
    pub fn run(data: &[u8]) {
        let Some((head, rest)) = data.split_first_chunk::<3>() else { return };
        let (packet, steps) = rest.split_at(usize::from(head[0]).min(rest.len()));
        let request = match Request::parse(packet) {
            Ok(request) => request,
            Err(error) => {
                let refusal = error_packet(&error);
                assert!(refusal.len() < 200 && refusal.ends_with(&[0]) && refusal.starts_with(&[0, 5]));
                return;
            }
        };
        if let Ok(file) = BootFile::parse(&request.name) {
            assert_eq!(BootFile::parse(&file.path()), Ok(file.clone()));
            assert!(!file.path().contains("..") && !file.path().starts_with('/'));
        }
        let size = u64::from(u16::from_be_bytes([head[1], head[2]])) * 7;
        let (peer, stranger): (SocketAddr, SocketAddr) =
            (([10, 77, 0, 9], 2000).into(), ([10, 77, 0, 10], 2000).into());
        let (limits, mut now, mut last) = (Limits::default(), Duration::ZERO, 0_u16);
        let (mut transfer, actions) = Transfer::start(&request, peer, size, limits, now);
        let mut watched = Watched { request, size, ended: false, sent: 0 };
        watched.check(&actions, &limits);
        for step in steps.as_chunks::<3>().0.iter().take(400) {
            let number = u16::from_be_bytes([step[1], step[2]]);
            if let Some(Action::Block { number, .. }) = actions.last() {
                last = last.max(*number);
            }
            let before = transfer.acknowledged();
            let actions = match step[0] % 8 {
                0 => {
                    now += MS * u32::from(number);
                    transfer.tick(now)
                }
                1 => transfer.packet(now, stranger, &[0, 4, step[1], step[2]]),
                2 => transfer.packet(now, peer, &[0, 5, 0, step[1], step[2], b'x', 0]),
                3 => transfer.packet(now, peer, &step[1..]),
                4 | 5 => {
                    last = last.wrapping_add(number % 4);
                    transfer.packet(now, peer, &[&[0, 4][..], &last.to_be_bytes()].concat())
                }
                _ => transfer.packet(now, peer, &[0, 4, step[1], step[2]]),
            };
            assert!(transfer.acknowledged() >= before && transfer.acknowledged() <= size);
            watched.check(&actions, &limits);
            assert_eq!(transfer.deadline().is_none(), watched.ended, "it ends, or it has a deadline");
        }
        // Whatever happened, silence ends it.
        for _ in 0..64 {
            let Some(deadline) = transfer.deadline() else { return };
            now = now.max(deadline);
            let actions = transfer.tick(now);
            watched.check(&actions, &limits);
        }
        assert!(transfer.deadline().is_none(), "a transfer that nobody takes does not end");
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let uki = format!("b/{}/kiln.efi", "ab".repeat(32));
        let request =
            |name: &str, options: &str| [b"\0\x01", name.as_bytes(), b"\0octet\0", options.as_bytes()].concat();
        let framed = |request: &[u8], steps: &[u8]| {
            [&[u8::try_from(request.len()).expect("short"), 1, 0], request, steps].concat()
        };
        let acks: Vec<u8> = (0..40).flat_map(|_| [4, 0, 1]).collect();
        let losses: Vec<u8> = (0..40).flat_map(|n| [[4, 0, 1], [0, 4, 0], [6, 0, n]].concat()).collect();
        vec![
            framed(&request(&uki, "tsize\x000\0blksize\x001468\0windowsize\x004\0"), &acks),
            framed(&request("undionly.kpxe", "blksize\x001432\0tsize\x000\0"), &losses),
            framed(&request("/snponly.efi", ""), &acks),
            framed(&request("x", "timeout\x002\0"), &[1, 0, 0, 2, 0, 0]),
            framed(b"\0\x02x\0octet\0", &[]),
        ]
    }
}
