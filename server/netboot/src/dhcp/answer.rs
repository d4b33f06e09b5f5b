//! The answer to a client: its boot program by the caller's decision, and where the reply goes.

use super::Dhcp;
use super::types::{Arrival, Datagram, Event, Output, Step, UefiProgram};
use crate::boot::{Place, classify};
use crate::chain::{Link, Rung};
use crate::reply::{ReplyType, Terms, build};
use crate::tftp::BootFile;
use crate::{
    BOOT_SERVER_PORT, BootAnswer, BootKind, BootQuery, CLIENT_PORT, Client, Lease, MessageType, Offer, SERVER_PORT,
    VendorClass,
};
use kiln_protocol::Architecture;
use std::net::{Ipv4Addr, SocketAddrV4};

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

impl Dhcp {
    /// Goes on with a client that gets an answer: asks the caller if it is a boot client.
    pub(super) fn boot(
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
            (BootAnswer::Uki { sha256 }, BootKind::UefiPxe) => match (self.config.uefi, query.arch) {
                (UefiProgram::Ipxe, Architecture::X86_64) => Offer::Tftp(BootFile::Snponly),
                (UefiProgram::Shim, Architecture::X86_64) => Offer::Tftp(BootFile::Shim),
                (UefiProgram::Uki, _) | (UefiProgram::Ipxe | UefiProgram::Shim, Architecture::Aarch64) => {
                    place.uki(query.kind, &sha256)
                }
            },
            (BootAnswer::Uki { sha256 }, BootKind::UefiHttp | BootKind::UefiIpxe) => place.uki(query.kind, &sha256),
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

    pub(super) fn send(
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
