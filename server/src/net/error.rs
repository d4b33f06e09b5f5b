//! Why a boot protocol's loop cannot run.

use std::io;
use std::net::SocketAddr;

/// A loop that could not start, or whose socket broke.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Missing rights.
    #[error("no right to open port {port}: run as root, or give the program CAP_NET_BIND_SERVICE")]
    Rights {
        /// Which port.
        port: u16,
    },
    /// The port is taken.
    #[error("{address}/udp is in use by another program{advice}")]
    InUse {
        /// Which address.
        address: SocketAddr,
        /// What to do.
        advice: &'static str,
    },
    /// Any other failure to open a socket.
    #[error("cannot open {address}/udp: {error}")]
    Open {
        /// Which address.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// The socket stopped working.
    #[error("receiving on {address}/udp failed: {error}")]
    Receive {
        /// Which address.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// There is no such interface.
    #[error("there is no network interface {name:?} ([dhcp] interface); there are: {present}")]
    NoInterface {
        /// The one asked for.
        name: String,
        /// Those that are there.
        present: String,
    },
}

impl NetError {
    pub(crate) fn open(address: SocketAddr, error: io::Error, advice: &'static str) -> Self {
        if error.kind() == io::ErrorKind::PermissionDenied {
            Self::Rights { port: address.port() }
        } else if error.kind() == io::ErrorKind::AddrInUse {
            Self::InUse { address, advice }
        } else {
            Self::Open { address, error }
        }
    }
}
