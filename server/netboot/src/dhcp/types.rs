//! What the DHCP side is told, and what it answers.

use super::answer::Pending;
use crate::tftp::BootFile;
use crate::{BootQuery, Lease, LeaseConfig, Mac, Offer};
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
    /// What UEFI PXE firmware is given.
    pub uefi: UefiProgram,
}

/// What UEFI PXE firmware of an x86 machine is given; others, and UEFI HTTP Boot, get the UKI.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UefiProgram {
    /// The release's UKI: nothing lies between.
    #[default]
    Uki,
    /// iPXE, which fetches the UKI by HTTP.
    Ipxe,
    /// shim, which starts iPXE under Secure Boot where db trusts Microsoft and not the site.
    Shim,
}

impl UefiProgram {
    /// Whether TFTP gives this file out. What a site does not use it does not offer either: an iPXE that finds an
    /// `autoexec.ipxe` runs it before it looks at what DHCP answers.
    pub fn serves(self, file: &BootFile) -> bool {
        match (file, self) {
            (BootFile::Uki(_) | BootFile::Undionly | BootFile::Snponly, _)
            | (BootFile::Shim | BootFile::AfterShim | BootFile::Autoexec, Self::Ipxe | Self::Shim) => true,
            (BootFile::Shim | BootFile::AfterShim | BootFile::Autoexec, Self::Uki) => false,
        }
    }
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
    /// A relay that is trusted says where this machine's packet entered the network ([`crate::Client::position`]).
    HeardAt { mac: Mac, position: String },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ways_by_shim_and_ipxe_are_offered_where_they_are_chosen() {
        let ways = [UefiProgram::Uki, UefiProgram::Ipxe, UefiProgram::Shim];
        for file in [BootFile::Shim, BootFile::AfterShim, BootFile::Autoexec] {
            assert_eq!(ways.map(|way| way.serves(&file)), [false, true, true], "{file:?}");
        }
        // A machine that waits may need these, whatever the way.
        for file in [BootFile::Undionly, BootFile::Snponly, BootFile::Uki("ab".repeat(32).parse().unwrap())] {
            assert_eq!(ways.map(|way| way.serves(&file)), [true; 3], "{file:?}");
        }
    }
}
