//! What DHCP servers, or whoever is faster, say to the agent.

/// DHCPv4: an answer.
pub mod dhcp_answer {
    use super::super::agent::dhcp_message::{Lease, given, is_host_name, kiln_location, lease_of, read, request};
    use dhcproto::Encodable as _;
    use dhcproto::v4::MessageType;
    use kiln_protocol::{VENDOR_CLASS, VENDOR_OPTION_AGENT_URL, VENDOR_OPTION_HTTP_URL};
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;

    /// Where the options begin (RFC 2131 §2), behind the magic cookie.
    const OPTIONS: usize = 240;

    fn lease(bytes: &[u8], xid: u32) -> Option<Lease> {
        Some(lease_of("eth0", &[2, 0, 0, 0, 0, 1], &read(bytes, xid)?))
    }

    /// The options, by another reader: if each is one of those below, as long as its RFC says, and there once, and an end
    /// follows them.
    fn plain(bytes: &[u8]) -> Option<BTreeMap<u8, &[u8]>> {
        let mut rest = bytes.get(OPTIONS..)?;
        let mut found = BTreeMap::new();
        loop {
            let (code, after) = rest.split_first()?;
            rest = after;
            if *code == 255 {
                return Some(found);
            }
            if *code != 0 {
                let (length, after) = after.split_first()?;
                let (value, after) = after.split_at_checked(usize::from(*length))?;
                let fits = match code {
                    1 | 51 | 54 => value.len() == 4,
                    3 | 6 => !value.is_empty() && value.len().is_multiple_of(4),
                    12 | 15 => value.is_ascii(),
                    53 => value.len() == 1,
                    43 | 60 | 66 => true,
                    _ => false,
                };
                if !fits || found.insert(*code, value).is_some() {
                    return None;
                }
                rest = after;
            }
        }
    }

    fn compare(lease: &Lease, options: &BTreeMap<u8, &[u8]>) {
        let addresses = |code: u8| -> Vec<Ipv4Addr> {
            let value = options.get(&code).copied().unwrap_or_default();
            value.as_chunks::<4>().0.iter().map(|address| Ipv4Addr::from(*address)).collect()
        };
        let name = |code: u8| {
            let text = String::from_utf8(options.get(&code)?.to_vec()).ok()?;
            Some(text).filter(|text| is_host_name(text))
        };
        assert_eq!(lease.router, addresses(3).first().copied());
        assert_eq!(lease.dns, addresses(6).into_iter().take(3).collect::<Vec<_>>());
        assert_eq!(lease.duration_s, addresses(51).first().map_or(3600, |seconds| u32::from(*seconds)));
        assert_eq!((lease.hostname.clone(), lease.domain.clone()), (name(12), name(15)));
        if let Some(server) = addresses(54).first() {
            assert_eq!(lease.server, *server);
        }
    }

    pub fn run(data: &[u8]) {
        let Some(xid) = data.get(4..8) else { return };
        let xid = u32::from_be_bytes(xid.try_into().expect("four bytes"));
        assert!(read(data, xid.wrapping_add(1)).is_none(), "an answer to somebody else");
        let Some(message) = read(data, xid) else { return };
        assert_eq!(data[0], 2, "what asks is no answer");
        let lease = lease(data, xid).expect("just now");
        assert!(lease.prefix <= 32 && lease.dns.len() <= 3 && lease.renew_after().as_secs() >= 30);
        for name in [&lease.domain, &lease.hostname].into_iter().flatten() {
            let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-".contains(&b));
            assert!(plain && (1..254).contains(&name.len()), "{name:?} goes into files that others read");
        }
        if let Some(address) = given(&message) {
            assert_eq!(address, lease.address);
            assert!(!address.is_unspecified() && !address.is_loopback() && !address.is_multicast(), "{address}");
        }
        let options = plain(data);
        if let Some(location) = kiln_location(&message) {
            for url in [location.http_url, location.agent_url].into_iter().flatten() {
                assert!(url.len() < 256 && url.bytes().all(|b| b.is_ascii_graphic()), "{url:?}");
            }
            let class = options.as_ref().is_none_or(|options| options.get(&60) == Some(&VENDOR_CLASS.as_bytes()));
            assert!(class, "what is not for the agent says nothing to it");
        }
        if let Some(options) = options {
            compare(&lease, &options);
            // Behind the end: whatever it is, it says nothing.
            let more = [data, &[0; 7], &[1, 4, 255, 0, 0, 0, 3, 4, 10, 0, 0, 1]].concat();
            assert_eq!(self::lease(&more, xid), Some(lease));
            assert_eq!(read(&more, xid).as_ref().map(kiln_location), Some(kiln_location(&message)));
        }
    }

    fn packet(yiaddr: [u8; 4], options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; OPTIONS];
        bytes[..8].copy_from_slice(&[2, 1, 6, 0, 1, 2, 3, 4]);
        bytes[16..20].copy_from_slice(&yiaddr);
        bytes[20..24].copy_from_slice(&[10, 9, 0, 1]);
        bytes[236..].copy_from_slice(&[99, 130, 83, 99]);
        for (code, value) in options {
            bytes.extend([*code, u8::try_from(value.len()).expect("short")]);
            bytes.extend_from_slice(value);
        }
        bytes.push(255);
        bytes
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let url = |code: u8, url: &str| [&[code, u8::try_from(url.len()).expect("short")], url.as_bytes()].concat();
        let urls = [
            url(VENDOR_OPTION_HTTP_URL, "http://10.9.0.1:8080"),
            url(VENDOR_OPTION_AGENT_URL, "https://kiln.example:8443"),
        ]
        .concat();
        let kiln: [(u8, &[u8]); 2] = [(60, VENDOR_CLASS.as_bytes()), (43, &urls)];
        let given: [(u8, &[u8]); 8] = [
            (53, &[5]),
            (54, &[10, 9, 0, 1]),
            (51, &[0, 0, 14, 16]),
            (1, &[255, 255, 255, 0]),
            (3, &[10, 9, 0, 1, 10, 9, 0, 2]),
            (6, &[10, 9, 0, 53, 10, 9, 0, 54, 10, 9, 0, 55, 10, 9, 0, 56]),
            (12, b"rack-1"),
            (15, b"rack.example"),
        ];
        let machine = "4c4c4544-0042-3510-8052-b4c04f4b3332".parse().expect("an id");
        let ours = request(MessageType::Discover, 7, &[2, 0, 0, 0, 0, 1], &machine);
        let mut proxy = given[1..2].to_vec();
        proxy.push((53, &[2]));
        proxy.extend(kiln);
        let mut both = given.to_vec();
        both.extend(kiln);
        both.push((66, b"10.9.0.7\0"));
        vec![
            packet([10, 9, 0, 50], &given),
            packet([0; 4], &proxy),
            packet([10, 9, 0, 50], &both),
            packet([127, 0, 0, 1], &[(53, &[6]), (12, b"a b")]),
            ours.to_vec().expect("a message of ours"),
        ]
    }
}

/// DHCPv6: an answer.
pub mod dhcp6_answer {
    use super::super::agent::dhcp6_message::{
        ADVERTISE, CLIENT_ID, DNS, DOMAINS, IA_ADDRESS, IA_NA, Lease6, RENEW, REPLY, SERVER_ID, STATUS, options, parse,
        put, request, servers,
    };
    use std::net::Ipv6Addr;

    /// The machine's DUID.
    const CLIENT: &[u8] = b"\0\x04kiln-kiln-kiln-k";

    /// What a server would have written to say so.
    fn written(lease: &Lease6, kind: u8, id: [u8; 3]) -> Vec<u8> {
        let mut message = vec![kind];
        message.extend(id);
        put(&mut message, CLIENT_ID, CLIENT);
        put(&mut message, SERVER_ID, &lease.server);
        if let Some(address) = lease.address {
            let mut association = [&[0, 0, 0, 1][..], &lease.renew_s.to_be_bytes(), &[0; 4]].concat();
            // Preferred for no time and valid for a second: for none it would be taken back.
            put(&mut association, IA_ADDRESS, &[&address.octets()[..], &[0, 0, 0, 0, 0, 0, 0, 1]].concat());
            put(&mut message, IA_NA, &association);
        }
        let servers: Vec<u8> = lease.dns.iter().flat_map(Ipv6Addr::octets).collect();
        put(&mut message, DNS, &servers);
        if let Some(domain) = &lease.domain {
            let mut labels = Vec::new();
            for label in domain.split('.') {
                labels.push(u8::try_from(label.len()).expect("at most 63"));
                labels.extend(label.bytes());
            }
            labels.push(0);
            put(&mut message, DOMAINS, &labels);
        }
        message
    }

    pub fn run(data: &[u8]) {
        let Some(([kind, id @ ..], _)) = data.split_first_chunk::<4>() else { return };
        let (kind, id) = (*kind, *id);
        let Some(lease) = parse(data, kind, id, CLIENT) else { return };
        assert_eq!(parse(data, kind ^ 1, id, CLIENT), None, "an answer of another kind");
        assert_eq!(parse(data, kind, [id[0] ^ 1, id[1], id[2]], CLIENT), None, "another's transaction");
        assert_eq!(parse(data, kind, id, b"another"), None, "another client's");
        assert!((1..=130).contains(&lease.server.len()) && lease.renew_after().as_secs() >= 30);
        assert!(lease.dns.len() <= 3 && servers(&lease).count() == lease.dns.len());
        if let Some(address) = lease.address {
            assert!(!address.is_unspecified() && !address.is_loopback() && !address.is_multicast(), "{address}");
        }
        if let Some(domain) = &lease.domain {
            let plain = domain.bytes().all(|b| b.is_ascii_alphanumeric() || b".-".contains(&b));
            assert!(
                plain && domain.len() <= 253 && !domain.contains(".."),
                "{domain:?} goes into files that others read"
            );
        }
        // Without an address nothing says when to ask again.
        let renew_s = if lease.address.is_some() { lease.renew_s } else { 3600 };
        let expected = Lease6 { renew_s, ..lease.clone() };
        assert_eq!(parse(&written(&lease, kind, id), kind, id, CLIENT), Some(expected));

        let asked = request(RENEW, id, CLIENT, &lease);
        let found: Vec<(u16, &[u8])> = options(&asked[4..]).collect();
        let length: usize = found.iter().map(|(_, data)| 4 + data.len()).sum();
        assert_eq!(length, asked.len() - 4, "what the agent asks is whole");
        assert!(found.contains(&(SERVER_ID, lease.server.as_slice())), "and for who answered");
    }

    pub fn seeds() -> Vec<Vec<u8>> {
        let address: Ipv6Addr = "2001:db8::7".parse().expect("an address");
        let lease = Lease6 {
            interface: String::new(),
            address: Some(address),
            dns: vec!["2001:db8::53".parse().expect("an address"); 2],
            domain: Some("rack.example".into()),
            server: b"\0\x01server".to_vec(),
            renew_s: 90,
        };
        let mut refused = written(&Lease6 { address: None, ..lease.clone() }, ADVERTISE, [1, 2, 3]);
        put(&mut refused, STATUS, &[0, 2]);
        let mut none_left = written(&Lease6 { address: None, ..lease.clone() }, REPLY, [1, 2, 3]);
        let mut association = vec![0; 12];
        put(&mut association, STATUS, &[0, 2]);
        put(&mut none_left, IA_NA, &association);
        let names = Lease6 { address: None, ..lease.clone() };
        vec![written(&lease, REPLY, [1, 2, 3]), written(&names, REPLY, [0, 0, 0]), refused, none_left]
    }
}
