//! The network boot protocols as pure functions: DHCP and proxyDHCP for boot clients, TFTP transfers, iPXE scripts.
//!
//! Nothing here opens a socket, reads a clock or draws a random number. A protocol is told the time, where a packet
//! came from and its bytes; it answers with what to send. `server/src/net` owns the sockets.
//!
//! - [`Dhcp`]: one site's DHCP side. [`Dhcp::receive`] reads a packet; where a boot decision is needed it hands back
//!   a [`Pending`] with the [`BootQuery`], and [`Dhcp::answered`] turns the [`BootAnswer`] into the reply.
//! - [`tftp`]: requests, and one [`tftp::Transfer`] per download.
//! - [`ipxe`]: what an iPXE client says it can do, and the script it gets.
//!
//! Sources: RFC 2131, 2132, 3046, 3396, 4578, the PXE 2.1 specification, the UEFI specification §24.7 (HTTP Boot), and
//! RFC 1350, 2347, 2348, 2349, 7440 for TFTP. Where firmware forces a deviation, the code says which. IPv6 is not here.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod boot;
mod chain;
mod client;
mod dhcp;
mod error;
pub mod ipxe;
mod leases;
mod mac;
mod options;
mod reply;
pub mod tftp;
mod watch;

pub use boot::{BootAnswer, BootKind, BootQuery, Offer};
pub use client::{Client, ClientArch, MessageType, VendorClass};
pub use dhcp::{Arrival, Config, Datagram, Dhcp, Event, Mode, Output, Pending, Step, UefiProgram};
pub use error::{MacError, PacketError, RangeError, TftpError};
pub use leases::{Lease, LeaseConfig, LeaseState};
pub use mac::Mac;

/// UDP port of DHCP servers and relays.
pub const SERVER_PORT: u16 = 67;
/// UDP port of DHCP clients.
pub const CLIENT_PORT: u16 = 68;
/// UDP port of PXE boot servers (PXE 2.1 §2.2.4), where a client that got a proxy's offer may ask it again.
pub const BOOT_SERVER_PORT: u16 = 4011;
