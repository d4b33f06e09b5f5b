//! The host's interfaces and their IPv4 addresses, looked up again when something unknown appears.

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// Addresses come and go while a server runs; a packet is worth a new look at most this often.
const FRESH: Duration = Duration::from_secs(5);

/// One IPv4 address of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) index: u32,
    pub(crate) address: Ipv4Addr,
    pub(crate) netmask: Ipv4Addr,
}

#[derive(Debug)]
pub(crate) struct Interfaces {
    addresses: Vec<Interface>,
    read_at: Instant,
}

impl Interfaces {
    pub(crate) fn read() -> Self {
        Self { addresses: read(), read_at: Instant::now() }
    }

    pub(crate) fn all(&self) -> &[Interface] {
        &self.addresses
    }

    /// The address of interface `index` to answer from: `preferred` if it is one of its own, else its first.
    pub(crate) fn on(&mut self, index: u32, preferred: Option<Ipv4Addr>) -> Option<Interface> {
        let found = self.find(index, preferred);
        if found.is_some() || self.read_at.elapsed() < FRESH {
            return found;
        }
        *self = Self::read();
        self.find(index, preferred)
    }

    fn find(&self, index: u32, preferred: Option<Ipv4Addr>) -> Option<Interface> {
        let mut here = self.addresses.iter().filter(|a| a.index == index);
        let first = here.clone().next();
        here.find(|a| Some(a.address) == preferred).or(first).cloned()
    }
}

fn read() -> Vec<Interface> {
    let Ok(list) = getifaddrs() else { return Vec::new() };
    list.filter_map(|entry| {
        let address = entry.address?.as_sockaddr_in()?.ip();
        let netmask = entry.netmask.and_then(|m| Some(m.as_sockaddr_in()?.ip()));
        Some(Interface {
            index: if_nametoindex(entry.interface_name.as_str()).ok()?,
            name: entry.interface_name,
            address,
            netmask: netmask.unwrap_or(Ipv4Addr::new(255, 255, 255, 0)),
        })
    })
    .collect()
}
