//! Builds a reply: the header by dhcproto from the request's own, the options in the order old ROMs expect.

use crate::boot::Place;
use crate::client::PXE_BOOT_ITEM;
use crate::leases::{Lease, LeaseConfig};
use crate::options::{HEADER, MAGIC, code};
use crate::{Client, Offer, VendorClass};
use dhcproto::v4::{Flags, Opcode};
use dhcproto::{Encodable, Encoder};
use kiln_protocol::{VENDOR_OPTION_AGENT_URL, VENDOR_OPTION_HTTP_URL};
use std::net::Ipv4Addr;

/// RFC 2131 does not ask for it, BOOTP relays and old ROMs drop anything shorter (RFC 951: 300 bytes).
const MIN_REPLY: usize = 300;

/// What kind of reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReplyType {
    Offer = 2,
    Ack = 5,
    Nak = 6,
}

/// An address and how long it is the client's; `lease` is none for a client that keeps its own address (INFORM).
#[derive(Debug, Clone)]
pub(crate) struct Terms<'a> {
    pub(crate) lease: Option<&'a Lease>,
    pub(crate) config: &'a LeaseConfig,
    pub(crate) netmask: Ipv4Addr,
}

struct Writer(Vec<u8>);

impl Writer {
    fn put(&mut self, code: u8, value: &[u8]) {
        for part in value.chunks(255) {
            self.0.push(code);
            self.0.push(u8::try_from(part.len()).expect("chunks of at most 255"));
            self.0.extend_from_slice(part);
        }
    }
}

/// The bytes of a reply. `server` is option 54.
pub(crate) fn build(
    client: &Client,
    kind: ReplyType,
    server: Ipv4Addr,
    terms: Option<&Terms<'_>>,
    boot: Option<(&Offer, &Place)>,
) -> Vec<u8> {
    let mut message = client.message.clone();
    message.set_opcode(Opcode::BootReply).set_hops(0).set_secs(0).clear_addrs().set_giaddr(client.giaddr);
    message.clear_sname();
    message.clear_fname();
    match kind {
        ReplyType::Ack => {
            message.set_ciaddr(client.ciaddr);
        }
        // RFC 2131 §4.3.2: through a relay, a refusal must reach a client whose address may be wrong.
        ReplyType::Nak if !client.giaddr.is_unspecified() => {
            message.set_flags(Flags::default().set_broadcast());
        }
        ReplyType::Offer | ReplyType::Nak => {}
    }
    if let Some(lease) = terms.and_then(|t| t.lease) {
        message.set_yiaddr(lease.address);
    }

    let mut out = Writer(Vec::with_capacity(200));
    out.put(code::MESSAGE_TYPE, &[kind as u8]);
    out.put(code::SERVER_ID, &server.octets());
    if let Some(terms) = terms {
        put_terms(&mut out, terms);
    }
    let mut file_at_hand = false;
    let mut droppable = Vec::new();
    if let Some((offer, place)) = boot {
        message.set_siaddr(place.address);
        put_class(&mut out, client, place);
        let name = match offer {
            Offer::Tftp(file) => Some(file.path()),
            Offer::Url(url) => Some(url.clone()),
            Offer::Location => None,
        };
        if let Some(name) = name {
            if name.len() < 128 {
                message.set_fname_str(&name);
                file_at_hand = true;
            }
            droppable = boot_file_options(offer, place, name);
        }
    }
    if let Some(id) = client.machine_id.as_deref().filter(|_| kind != ReplyType::Nak && boot.is_some()) {
        out.put(code::MACHINE_ID, id);
    }

    // RFC 2132 §9.10: no reply longer than the client takes. The file's name is in the header as well.
    let relay = client.relay_agent.as_deref().unwrap_or_default();
    let tail = if relay.is_empty() { 1 } else { relay.len() + 3 };
    for (code, value) in droppable {
        if !file_at_hand || HEADER + out.0.len() + value.len() + 2 + tail <= client.max_message {
            out.put(code, &value);
        }
    }
    if !relay.is_empty() {
        out.put(code::RELAY_AGENT, relay); // RFC 3046 §2.2: echoed as it came, last
    }
    out.0.push(code::END);

    let mut bytes = Vec::with_capacity(HEADER + out.0.len());
    message.encode(&mut Encoder::new(&mut bytes)).expect("a header has fixed length and a Vec grows");
    debug_assert_eq!((bytes.len(), &bytes[HEADER - 4..]), (HEADER, &MAGIC[..]));
    bytes.extend_from_slice(&out.0);
    if bytes.len() < MIN_REPLY {
        bytes.resize(MIN_REPLY, code::PAD);
    }
    bytes
}

/// RFC 2132 §3.3, 3.5, 3.8, 5.3, 9.2, 9.11, 9.12.
fn put_terms(out: &mut Writer, terms: &Terms<'_>) {
    if terms.lease.is_some() {
        let seconds = terms.config.lease_s;
        out.put(51, &seconds.to_be_bytes());
        out.put(58, &(seconds / 2).to_be_bytes());
        out.put(59, &(seconds / 8 * 7).to_be_bytes());
    }
    out.put(1, &terms.netmask.octets());
    let network = u32::from(terms.config.start) & u32::from(terms.netmask);
    out.put(28, &(network | !u32::from(terms.netmask)).to_be_bytes());
    if let Some(router) = terms.config.router {
        out.put(3, &router.octets());
    }
    let dns: Vec<u8> = terms.config.dns.iter().take(8).flat_map(Ipv4Addr::octets).collect();
    out.put(6, &dns);
}

/// Option 60 makes the reply a boot server's; option 43 says how to go on.
fn put_class(out: &mut Writer, client: &Client, place: &Place) {
    match client.vendor {
        VendorClass::Pxe => {
            out.put(code::VENDOR_CLASS, b"PXEClient");
            // PXE 2.1 table 2-1: PXE_DISCOVERY_CONTROL bit 3, take the file of this reply without looking for boot
            // servers.
            let mut options = vec![6, 1, 8];
            if let Some(item) = client.boot_item {
                options.extend([PXE_BOOT_ITEM, 4]);
                options.extend(item);
            }
            options.push(code::END);
            out.put(code::VENDOR_SPECIFIC, &options);
        }
        VendorClass::Http => out.put(code::VENDOR_CLASS, b"HTTPClient"), // UEFI §24.7.3.1: else the offer is no HTTP one
        VendorClass::Agent => {
            out.put(code::VENDOR_CLASS, kiln_protocol::VENDOR_CLASS.as_bytes());
            let mut options = Writer(Vec::new());
            options.put(VENDOR_OPTION_HTTP_URL, place.http().as_bytes());
            options.put(VENDOR_OPTION_AGENT_URL, place.agent().as_bytes());
            out.put(code::VENDOR_SPECIFIC, &options.0);
        }
        VendorClass::Other => {}
    }
}

/// Options 67 and 66.
fn boot_file_options(offer: &Offer, place: &Place, name: String) -> Vec<(u8, Vec<u8>)> {
    let mut file = name.into_bytes();
    match offer {
        Offer::Tftp(_) => {
            // Off-spec: RFC 2132 counts the name and ends it with nothing, but ROMs read on to the next zero byte.
            file.push(0);
            vec![(67, file), (66, place.address.to_string().into_bytes())]
        }
        Offer::Url(_) => vec![(67, file)],
        Offer::Location => Vec::new(),
    }
}
