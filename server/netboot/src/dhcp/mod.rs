//! One site's DHCP side: proxy beside another server, full server, or off.
//!
//! `receive` → (perhaps a boot decision by the caller) → `answered`. Requests are read on ports 67 and 4011; replies
//! say to where, from which address and through which interface they go. RFC 2131; PXE 2.1 §2.2 for the proxy.

mod answer;
mod types;

pub use answer::Pending;
pub use types::{Arrival, Config, Datagram, Event, Mode, Output, Step, UefiProgram};

use crate::chain::Memory;
use crate::leases::{Leases, Verdict};
use crate::reply::ReplyType;
use crate::tftp::BootFile;
use crate::watch::Watch;
use crate::{BOOT_SERVER_PORT, Client, Lease, Mac, MessageType, RangeError, SERVER_PORT, VendorClass};
use kiln_protocol::MachineId;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// The state of one site's DHCP side.
#[derive(Debug)]
pub struct Dhcp {
    config: Config,
    leases: Option<Leases>,
    memory: Memory,
    watch: Watch,
    /// Whose word on where a packet came from counts.
    relays: BTreeSet<Ipv4Addr>,
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
        Ok(Self { config, leases, memory: Memory::new(), watch: Watch::default(), relays: BTreeSet::new() })
    }

    /// Whose word on where a packet entered the network counts, from now on.
    pub fn trust_relays(&mut self, relays: BTreeSet<Ipv4Addr>) {
        self.relays = relays;
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

    /// Whether a packet that names server `id` speaks to this one. A proxy offers no address, so whoever asks for one
    /// means another server, even one at the same address: a DHCP server on the same host.
    fn is_ours(&self, id: Ipv4Addr, arrival: &Arrival, client: &Client) -> bool {
        let same = id == arrival.local || Some(id) == self.config.address;
        same && (self.leases.is_some() || client.requested.is_none())
    }

    /// What any packet tells, whether it is answered or not.
    fn observe(&mut self, now_ms: u64, arrival: &Arrival, client: &Client, outputs: &mut Vec<Output>) {
        // From a relay's own address: what a client sends itself, under a relay's name, comes from the client's.
        let from_relay = self.relays.contains(arrival.from.ip());
        if let Some(position) = client.position(&self.relays).filter(|_| from_relay) {
            outputs.push(Output::Event(Event::HeardAt { mac: client.mac, position }));
        }
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

    /// A client that has what it needs from this proxy now takes an address from somebody. (One that got no boot
    /// program may not ask for an address at all: EDK2 does not.)
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
}

/// Addresses that are nobody's to lease: this server's and the relay's.
fn reserved(arrival: &Arrival, client: &Client, address: Option<Ipv4Addr>) -> Vec<Ipv4Addr> {
    [Some(arrival.local), Some(client.giaddr), address].into_iter().flatten().collect()
}
