//! One site's DHCP side: proxy beside another server, full server, or off.
//!
//! `receive` → (perhaps a boot decision by the caller) → `answered`. Requests are read on ports 67 and 4011; replies say to
//! where, from which address and through which interface they go. RFC 2131; PXE 2.1 §2.2 for the proxy.

use crate::boot::{Place, classify};
use crate::chain::{Link, Memory, Rung};
use crate::leases::{Leases, Verdict};
use crate::reply::{ReplyType, Terms, build};
use crate::tftp::BootFile;
use crate::watch::Watch;
use crate::{
    BOOT_SERVER_PORT, BootAnswer, BootKind, BootQuery, CLIENT_PORT, Client, Lease, LeaseConfig, Mac, MessageType,
    Offer, RangeError, SERVER_PORT, VendorClass,
};
use kiln_protocol::MachineId;
use std::net::{Ipv4Addr, SocketAddrV4};

/// What this server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: the site's own server points at Kiln.
    Off,
    /// Boot clients and the agent, beside a server that gives out addresses.
    Proxy,
    /// Everyone, with an address.
    Full(LeaseConfig),
}

/// A site's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What is answered.
    pub mode: Mode,
    /// The address boot clients are sent to; none: the one their request came in on.
    pub address: Option<Ipv4Addr>,
    /// Port of the artifacts' HTTP.
    pub http_port: u16,
    /// Port of the agent API.
    pub agent_port: u16,
    /// Whether UEFI HTTP Boot is answered.
    pub http_boot: bool,
    /// Whether an iPXE that could run the script is replaced by the site's undionly.kpxe first.
    pub chain_ipxe: bool,
}

/// How a packet came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Index of the interface.
    pub interface: u32,
    /// This server's address there.
    pub local: Ipv4Addr,
    /// Its netmask.
    pub netmask: Ipv4Addr,
    /// Who sent it.
    pub from: SocketAddrV4,
    /// Which of this server's ports it came to: 67 or 4011.
    pub port: u16,
}

/// A packet to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// To where; the broadcast address needs the interface.
    pub to: SocketAddrV4,
    /// From which of this server's addresses.
    pub from: Ipv4Addr,
    /// From which of its ports.
    pub from_port: u16,
    /// Through which interface.
    pub interface: u32,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What happened, for people and the stage log.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are named for what they hold
pub enum Event {
    /// A boot client asks.
    Discover { query: BootQuery },
    /// It was offered something.
    Offered { query: BootQuery, offer: Offer },
    /// It took an offer, and this is its address (0.0.0.0: not seen).
    Accepted { query: BootQuery, address: Ipv4Addr },
    /// An agent asked where its server is.
    AgentAsked { mac: Mac, id: Option<MachineId> },
    /// A boot client gets no program.
    Withheld { mac: Mac, id: Option<MachineId>, reason: String },
    /// A machine was given undionly.kpxe again and again and never came further.
    BootLoop { mac: Mac, times: u32 },
    /// A DISCOVER, and no sign of a server that gives out addresses.
    NoOtherServer,
    /// The site's own DHCP server, when it is first seen or another than before.
    OtherServer { server: Ipv4Addr },
    /// The lease range is used up.
    NoAddressLeft { mac: Mac },
    /// A packet that is none.
    Malformed { from: SocketAddrV4, reason: String },
    /// A reply that the system refused to send.
    Unsent { to: SocketAddrV4, reason: String },
}

impl Event {
    /// The sentence that names the setting, for [`Event::NoOtherServer`].
    pub const NO_OTHER_SERVER: &'static str = "a machine asks for an address and no DHCP server answered within 10 s: Kiln runs as a \
         proxy and gives out none. Start the site's DHCP server, or set `[dhcp] mode = \"full\"`";
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send this.
    Send(Datagram),
    /// Log this.
    Event(Event),
    /// Persist this lease.
    Lease(Lease),
}

/// The result of reading a packet.
#[derive(Debug)]
pub enum Step {
    /// All there is to do.
    Done(Vec<Output>),
    /// Do this, decide, then call [`Dhcp::answered`].
    Ask(Vec<Output>, Box<Pending>),
}

/// A request that waits for the caller's boot decision.
#[derive(Debug)]
pub struct Pending {
    /// What is asked.
    pub query: BootQuery,
    client: Client,
    arrival: Arrival,
    reply: ReplyType,
    lease: Option<Lease>,
}

/// The state of one site's DHCP side.
#[derive(Debug)]
pub struct Dhcp {
    config: Config,
    leases: Option<Leases>,
    memory: Memory,
    watch: Watch,
}

impl Dhcp {
    /// With leases that an earlier run persisted.
    pub fn new(config: Config, leases: impl IntoIterator<Item = Lease>) -> Result<Self, RangeError> {
        let leases = match &config.mode {
            Mode::Off | Mode::Proxy => None,
            Mode::Full(lease_config) => {
                let mut table = Leases::new(lease_config.clone())?;
                table.restore(leases);
                Some(table)
            }
        };
        Ok(Self { config, leases, memory: Memory::new(), watch: Watch::default() })
    }

    /// What is answered.
    pub fn mode(&self) -> &Mode {
        &self.config.mode
    }

    /// Every lease, to be persisted as a whole.
    pub fn leases(&self) -> Vec<Lease> {
        self.leases.iter().flat_map(Leases::all).cloned().collect()
    }

    /// Which machine was last seen taking this address.
    pub fn machine_at(&self, address: Ipv4Addr) -> Option<(Mac, Option<MachineId>)> {
        self.memory.at(address)
    }

    /// A TFTP download of `file` by `address` is complete.
    pub fn tftp_done(&mut self, address: Ipv4Addr, file: &BootFile, now_ms: u64) {
        if let (BootFile::Undionly, Some((mac, _))) = (file, self.memory.at(address)) {
            self.memory.fetched(mac, now_ms);
        }
    }

    /// The machine fetched its iPXE script.
    pub fn script_fetched(&mut self, mac: Mac) {
        self.memory.progress(mac);
    }

    /// When [`Dhcp::tick`] has something to do, unix milliseconds.
    pub fn deadline_ms(&self) -> Option<u64> {
        self.watch.deadline_ms()
    }

    /// Time has passed.
    pub fn tick(&mut self, now_ms: u64) -> Vec<Output> {
        if self.watch.tick(now_ms) { vec![Output::Event(Event::NoOtherServer)] } else { Vec::new() }
    }

    /// Reads a packet. `now_ms` is unix milliseconds.
    pub fn receive(&mut self, now_ms: u64, arrival: &Arrival, packet: &[u8]) -> Step {
        if self.config.mode == Mode::Off {
            return Step::Done(Vec::new());
        }
        let client = match Client::parse(packet) {
            Ok(client) => client,
            Err(error) => {
                let event = Event::Malformed { from: arrival.from, reason: error.to_string() };
                return Step::Done(vec![Output::Event(event)]);
            }
        };
        let mut outputs = self.tick(now_ms);
        self.observe(now_ms, arrival, &client, &mut outputs);
        let ours = client.server_id.is_none_or(|id| self.is_ours(id, arrival, &client));
        match client.message_type {
            MessageType::Discover => {
                let (lease, reply) = match self.discover_lease(now_ms, arrival, &client, &mut outputs) {
                    Ok(lease) => (lease, ReplyType::Offer),
                    Err(()) => return Step::Done(outputs),
                };
                self.boot(arrival, client, reply, lease, outputs)
            }
            MessageType::Request if arrival.port == BOOT_SERVER_PORT => {
                self.boot(arrival, client, ReplyType::Ack, None, outputs) // whatever server it names: it came here
            }
            MessageType::Request if !ours => Step::Done(outputs),
            MessageType::Request => match self.request_lease(now_ms, arrival, &client) {
                Some(Verdict::Granted(lease)) => {
                    outputs.push(Output::Lease(lease.clone()));
                    self.boot(arrival, client, ReplyType::Ack, Some(lease), outputs)
                }
                Some(Verdict::Refused) => {
                    outputs.push(self.send(arrival, &client, ReplyType::Nak, None, None));
                    Step::Done(outputs)
                }
                Some(Verdict::Silent) => Step::Done(outputs),
                // A proxy answers a REQUEST only where it is named.
                None if client.server_id.is_none() => Step::Done(outputs),
                None => self.boot(arrival, client, ReplyType::Ack, None, outputs),
            },
            MessageType::Inform => self.boot(arrival, client, ReplyType::Ack, None, outputs),
            MessageType::Decline => {
                let declined = client.requested.filter(|_| ours);
                let lease = declined.and_then(|a| self.leases.as_mut()?.decline(client.mac, a, now_ms));
                outputs.extend(lease.map(Output::Lease));
                Step::Done(outputs)
            }
            MessageType::Release => {
                let lease =
                    self.leases.as_mut().filter(|_| ours).and_then(|l| l.release(client.mac, client.ciaddr, now_ms));
                outputs.extend(lease.map(Output::Lease));
                Step::Done(outputs)
            }
        }
    }

    /// Whether a packet that names server `id` speaks to this one. A proxy offers no address, so whoever asks for one means
    /// another server, even one at the same address: a DHCP server on the same host.
    fn is_ours(&self, id: Ipv4Addr, arrival: &Arrival, client: &Client) -> bool {
        let same = id == arrival.local || Some(id) == self.config.address;
        same && (self.leases.is_some() || client.requested.is_none())
    }

    /// What any packet tells, whether it is answered or not.
    fn observe(&mut self, now_ms: u64, arrival: &Arrival, client: &Client, outputs: &mut Vec<Output>) {
        match client.message_type {
            MessageType::Discover => {
                if client.vendor == VendorClass::Agent {
                    self.expect_other_server(now_ms, arrival);
                }
            }
            MessageType::Request | MessageType::Inform => {
                let address = if client.ciaddr.is_unspecified() { client.requested } else { Some(client.ciaddr) };
                if let Some(address) = address {
                    self.memory.learn(address, client.mac, client.id.as_ref());
                }
                let other = client.server_id.filter(|id| !self.is_ours(*id, arrival, client));
                if let Some(server) = other {
                    if self.watch.other_server(server) {
                        outputs.push(Output::Event(Event::OtherServer { server }));
                    }
                    if let Some(leases) = &mut self.leases {
                        leases.forget_offer(client.mac);
                    }
                }
            }
            MessageType::Decline | MessageType::Release => {}
        }
    }

    /// A client that has what it needs from this proxy now takes an address from somebody. (One that got no boot program may
    /// not ask for an address at all: EDK2 does not.)
    fn expect_other_server(&mut self, now_ms: u64, arrival: &Arrival) {
        if self.config.mode == Mode::Proxy && arrival.port == SERVER_PORT {
            self.watch.offered(now_ms);
        }
    }

    /// The client's network is the range's: leases for others are not this table's.
    fn leases_here(&mut self, arrival: &Arrival, client: &Client) -> Option<&mut Leases> {
        let on = if client.giaddr.is_unspecified() { arrival.local } else { client.giaddr };
        let mask = u32::from(arrival.netmask);
        let leases = self.leases.as_mut()?;
        (u32::from(on) & mask == u32::from(leases.config.start) & mask).then_some(leases)
    }

    /// An address to offer; an error where a full server has none and must stay silent.
    fn discover_lease(
        &mut self,
        now_ms: u64,
        arrival: &Arrival,
        client: &Client,
        outputs: &mut Vec<Output>,
    ) -> Result<Option<Lease>, ()> {
        if arrival.port == BOOT_SERVER_PORT {
            return Ok(None);
        }
        let reserved = reserved(arrival, client, self.config.address);
        let Some(leases) = self.leases_here(arrival, client) else { return Ok(None) };
        let lease = leases.offer(client.mac, client.requested, &reserved, now_ms);
        if lease.is_none() {
            outputs.push(Output::Event(Event::NoAddressLeft { mac: client.mac }));
            return Err(());
        }
        Ok(lease)
    }

    /// RFC 2131 §4.3.2. None: there is no table for this client.
    fn request_lease(&mut self, now_ms: u64, arrival: &Arrival, client: &Client) -> Option<Verdict> {
        let reserved = reserved(arrival, client, self.config.address);
        let leases = self.leases_here(arrival, client)?;
        let selecting = client.server_id.is_some();
        let renewing = !client.ciaddr.is_unspecified();
        let address = if renewing { client.ciaddr } else { client.requested? };
        Some(leases.request(client.mac, address, selecting, &reserved, now_ms))
    }

    /// Goes on with a client that gets an answer: asks the caller if it is a boot client.
    fn boot(
        &mut self,
        arrival: &Arrival,
        client: Client,
        reply: ReplyType,
        lease: Option<Lease>,
        mut outputs: Vec<Output>,
    ) -> Step {
        if let Some(lease) = &lease {
            self.memory.learn(lease.address, client.mac, client.id.as_ref());
        }
        match client.vendor {
            VendorClass::Other => {
                let inform_here =
                    client.message_type == MessageType::Inform && self.leases_here(arrival, &client).is_some();
                if lease.is_some() || inform_here {
                    outputs.push(self.send(arrival, &client, reply, lease.as_ref(), None));
                }
                Step::Done(outputs)
            }
            VendorClass::Agent => {
                outputs.push(Output::Event(Event::AgentAsked { mac: client.mac, id: client.id.clone() }));
                outputs.push(self.send(arrival, &client, reply, lease.as_ref(), Some(&Offer::Location)));
                Step::Done(outputs)
            }
            VendorClass::Pxe | VendorClass::Http => match classify(&client, self.config.http_boot) {
                Ok((arch, firmware, kind)) => {
                    let query = BootQuery {
                        id: client.id.clone(),
                        id_plain: client.id_plain.clone(),
                        mac: client.mac,
                        arch,
                        firmware,
                        kind,
                    };
                    if client.message_type == MessageType::Discover {
                        outputs.push(Output::Event(Event::Discover { query: query.clone() }));
                    }
                    Step::Ask(outputs, Box::new(Pending { query, client, arrival: *arrival, reply, lease }))
                }
                Err(reason) => {
                    self.withhold(arrival, &client, reply, lease.as_ref(), reason, &mut outputs);
                    Step::Done(outputs)
                }
            },
        }
    }

    /// The caller has decided.
    pub fn answered(&mut self, now_ms: u64, pending: Pending, answer: BootAnswer) -> Vec<Output> {
        let Pending { query, client, arrival, reply, lease } = pending;
        let mut outputs = Vec::new();
        let place = self.place(&arrival);
        let offer = match (answer, query.kind) {
            (BootAnswer::Ignore, _) => {
                if lease.is_some() {
                    outputs.push(self.send(&arrival, &client, reply, lease.as_ref(), None));
                }
                return outputs;
            }
            (BootAnswer::Wait { reason }, _) => {
                self.withhold(&arrival, &client, reply, lease.as_ref(), reason, &mut outputs);
                return outputs;
            }
            (BootAnswer::Uki { sha256 }, BootKind::UefiPxe | BootKind::UefiHttp | BootKind::UefiIpxe) => {
                place.uki(query.kind, &sha256)
            }
            (BootAnswer::Ipxe, BootKind::UefiPxe) => Offer::Tftp(BootFile::Snponly),
            (BootAnswer::Ipxe, BootKind::UefiHttp) => {
                Offer::Url(format!("{}/{}", place.http(), BootFile::Snponly.path()))
            }
            (BootAnswer::Ipxe, BootKind::UefiIpxe) => place.script(&client),
            (BootAnswer::Ipxe | BootAnswer::Uki { .. }, BootKind::BiosPxe | BootKind::BiosIpxe) => {
                let rung = Rung {
                    ipxe: client.is_ipxe,
                    capable: query.kind == BootKind::BiosIpxe,
                    chained: client.is_ipxe && client.broadcast,
                    chain_rom: self.config.chain_ipxe,
                };
                match self.memory.link(client.mac, client.xid, rung, now_ms) {
                    Link::Script => place.script(&client),
                    Link::Undionly => {
                        if let Some(times) = self.memory.vain(client.mac) {
                            outputs.push(Output::Event(Event::BootLoop { mac: client.mac, times }));
                        }
                        Offer::Tftp(BootFile::Undionly)
                    }
                    Link::Loop { times } => {
                        outputs.push(Output::Event(Event::BootLoop { mac: client.mac, times }));
                        let reason =
                            "its iPXE lacks HTTP or bzImage, also after undionly.kpxe: give it a full undionly.kpxe";
                        self.withhold(&arrival, &client, reply, lease.as_ref(), reason.into(), &mut outputs);
                        return outputs;
                    }
                }
            }
        };
        if reply == ReplyType::Offer {
            self.expect_other_server(now_ms, &arrival);
        }
        outputs.push(self.send(&arrival, &client, reply, lease.as_ref(), Some(&offer)));
        outputs.push(Output::Event(match reply {
            ReplyType::Ack => {
                let address = lease.map_or(client.requested.unwrap_or(client.ciaddr), |l| l.address);
                Event::Accepted { query, address }
            }
            ReplyType::Offer | ReplyType::Nak => Event::Offered { query, offer },
        }));
        outputs
    }

    /// No boot program: in full mode the client still gets its address, a proxy stays silent.
    fn withhold(
        &self,
        arrival: &Arrival,
        client: &Client,
        reply: ReplyType,
        lease: Option<&Lease>,
        reason: String,
        outputs: &mut Vec<Output>,
    ) {
        if lease.is_some() {
            outputs.push(self.send(arrival, client, reply, lease, None));
        }
        outputs.push(Output::Event(Event::Withheld { mac: client.mac, id: client.id.clone(), reason }));
    }

    fn place(&self, arrival: &Arrival) -> Place {
        Place {
            address: self.config.address.unwrap_or(arrival.local),
            http_port: self.config.http_port,
            agent_port: self.config.agent_port,
        }
    }

    fn send(
        &self,
        arrival: &Arrival,
        client: &Client,
        reply: ReplyType,
        lease: Option<&Lease>,
        offer: Option<&Offer>,
    ) -> Output {
        let place = self.place(arrival);
        let inform = client.message_type == MessageType::Inform;
        let terms = self.leases.as_ref().filter(|_| lease.is_some() || inform).map(|l| Terms {
            lease,
            config: &l.config,
            netmask: arrival.netmask,
        });
        let bytes = build(client, reply, arrival.local, terms.as_ref(), offer.map(|o| (o, &place)));
        Output::Send(Datagram {
            to: destination(arrival, client, reply),
            from: arrival.local,
            from_port: arrival.port,
            interface: arrival.interface,
            bytes,
        })
    }
}

/// Addresses that are nobody's to lease: this server's and the relay's.
fn reserved(arrival: &Arrival, client: &Client, address: Option<Ipv4Addr>) -> Vec<Ipv4Addr> {
    [Some(arrival.local), Some(client.giaddr), address].into_iter().flatten().collect()
}

/// RFC 2131 §4.1; on port 4011 the answer goes back to where the question came from (PXE 2.1 §2.4.5).
fn destination(arrival: &Arrival, client: &Client, reply: ReplyType) -> SocketAddrV4 {
    let broadcast = SocketAddrV4::new(Ipv4Addr::BROADCAST, CLIENT_PORT);
    if !client.giaddr.is_unspecified() {
        return SocketAddrV4::new(client.giaddr, SERVER_PORT);
    }
    if arrival.port == BOOT_SERVER_PORT && !arrival.from.ip().is_unspecified() {
        return arrival.from;
    }
    match reply {
        ReplyType::Nak => broadcast,
        ReplyType::Offer | ReplyType::Ack if client.ciaddr.is_unspecified() => {
            // Off-spec: a client that wants unicast to yiaddr has no ARP entry yet, and every client takes a broadcast.
            broadcast
        }
        ReplyType::Offer | ReplyType::Ack => SocketAddrV4::new(client.ciaddr, CLIENT_PORT),
    }
}
