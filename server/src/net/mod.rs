//! The sockets of the boot protocols: DHCP on ports 67 and 4011, TFTP on 69. All decisions are `kiln-netboot`'s.
//!
//! [`dhcp::run`] and [`tftp::run`] share one [`BootNet`]. Each runs for ever; drop its future to stop it. What happens
//! comes out as [`NetEvent`]s. IPv4 only.

pub mod dhcp;
mod error;
mod files;
mod interfaces;
mod packet_socket;
mod shared;
pub mod tftp;

pub use error::NetError;
pub use files::{BootFiles, SiteFiles, Stamp};
pub use shared::Shared;

use kiln_netboot::tftp::BootFile;
use kiln_netboot::{BootAnswer, BootQuery, Config, Dhcp, Event, Lease, Mac, RangeError};
use kiln_protocol::MachineId;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// The caller's boot decision. It is asked at a DISCOVER and again at the REQUEST, so asking must change nothing. An
/// answer later than [`dhcp::DECISION_TIMEOUT`] is not used: the client asks again.
pub type Decide = Arc<dyn Fn(BootQuery) -> Pin<Box<dyn Future<Output = BootAnswer> + Send>> + Send + Sync>;

/// A download that goes on is told so often.
pub const PROGRESS: Duration = Duration::from_secs(2);

/// Something a person or the stage log wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetEvent {
    /// A socket is open.
    Listening {
        /// Protocol and role: `proxyDHCP`, `PXE boot server`, `TFTP`.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why, or with which restriction.
        why: String,
    },
    /// A part that is not essential could not be started.
    NotListening {
        /// Protocol and role.
        what: &'static str,
        /// What is lost and what to do.
        reason: String,
    },
    /// DHCP's own events.
    Dhcp(Event),
    /// Persist this lease.
    Lease(Lease),
    /// A client downloads a file (a mere question for its size is not told).
    TftpStart {
        /// Who and what.
        download: Download,
    },
    /// It has acknowledged more of it; told every [`PROGRESS`] at most.
    TftpMoves {
        /// Who and what.
        download: Download,
    },
    /// It has all of it.
    TftpDone {
        /// Who and what.
        download: Download,
        /// Its size.
        bytes: u64,
        /// How long it took.
        ms: u64,
    },
    /// It has not.
    TftpFailed {
        /// Who and what.
        download: Download,
        /// Bytes it acknowledged.
        bytes: u64,
        /// Why, in a sentence.
        reason: String,
    },
    /// A request that was answered with an ERROR.
    TftpRefused {
        /// Who.
        peer: SocketAddr,
        /// The name asked for, cut to 120 characters; empty if none could be read.
        name: String,
        /// Why.
        reason: String,
    },
}

/// Who downloads what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// The client's address and port.
    pub peer: SocketAddr,
    /// The machine last seen taking that address.
    pub mac: Option<Mac>,
    /// Its SMBIOS UUID.
    pub id: Option<MachineId>,
    /// The file.
    pub file: BootFile,
}

/// The DHCP state that the loops and the rest of the server share.
#[derive(Debug, Clone)]
pub struct BootNet(Arc<Mutex<Dhcp>>);

impl BootNet {
    /// With leases that an earlier run persisted ([`NetEvent::Lease`]).
    pub fn new(config: Config, leases: impl IntoIterator<Item = Lease>) -> Result<Self, RangeError> {
        Ok(Self(Arc::new(Mutex::new(Dhcp::new(config, leases)?))))
    }

    /// Whose word on where a packet entered the network counts.
    pub fn trust_relays(&self, relays: BTreeSet<Ipv4Addr>) {
        self.lock().trust_relays(relays);
    }

    /// Which machine was last seen taking this address: HTTP has nothing else to tell clients by.
    pub fn machine_at(&self, address: Ipv4Addr) -> Option<(Mac, Option<MachineId>)> {
        self.lock().machine_at(address)
    }

    /// The machine fetched `/boot.ipxe`: its chain of boot programs holds.
    pub fn script_fetched(&self, mac: Mac) {
        self.lock().script_fetched(mac);
    }

    fn lock(&self) -> MutexGuard<'_, Dhcp> {
        self.0.lock().expect("no code that holds this lock panics: the protocol is total over its input")
    }
}

fn tell(events: &mpsc::Sender<NetEvent>, event: NetEvent) {
    // A reader that lags behind in a storm loses events, not boots.
    let _ = events.try_send(event);
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
