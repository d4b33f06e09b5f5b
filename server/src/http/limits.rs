//! What clients of a TCP port may take: connections in all and from one address, time, and how slow they may be.

use crate::net::Shared;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The limits of one port. `Default` is what the documentation promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once: 8 000. Beyond, new clients wait in the kernel's queue.
    pub max_connections: usize,
    /// Connections at once from one address (of IPv6: from one network of [`Self::ipv6_client`]): 256. Beyond, new ones
    /// are closed.
    pub max_per_address: usize,
    /// Addresses that the limit for one does not bind.
    pub shared: Shared,
    /// Prefix of the IPv6 network that counts as one client: 64. One host has as many addresses of it as it likes.
    pub ipv6_client: u8,
    /// Bytes per second that a client must take while an answer waits for it: 1 KiB/s, over [`Self::rate_window`].
    /// A report that is held waits for the server: nothing is to be taken meanwhile.
    pub min_rate: u32,
    /// Over so long: 30 s.
    pub rate_window: Duration,
    /// A TLS handshake takes at most so long: 10 s.
    pub handshake: Duration,
    /// From the first byte of a request to the end of its header, and from the connection to its first one: 10 s.
    pub header: Duration,
    /// A connection without a request is let go after: 75 s.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 8_000,
            max_per_address: 256,
            shared: Shared::default(),
            ipv6_client: 64,
            min_rate: 1024,
            rate_window: Duration::from_secs(30),
            handshake: Duration::from_secs(10),
            header: Duration::from_secs(10),
            idle: Duration::from_secs(75),
        }
    }
}

/// That an address was refused is said at most so often.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Who counts as one client.
fn client(address: IpAddr, prefix: u8) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
        }
    }
}

#[derive(Debug, Default)]
struct Counted {
    connections: HashMap<IpAddr, usize>,
    said: Option<Instant>,
}

/// Counts the connections of one port.
#[derive(Debug)]
pub(super) struct Gate {
    /// The table of kiln.toml that sets it, for the log.
    table: &'static str,
    limits: Limits,
    slots: Arc<Semaphore>,
    counted: Arc<Mutex<Counted>>,
}

impl Gate {
    pub(super) fn new(table: &'static str, limits: Limits) -> Self {
        let slots = Arc::new(Semaphore::new(limits.max_connections));
        Self { table, limits, slots, counted: Arc::default() }
    }

    /// Waits until there is room for one more connection.
    pub(super) async fn room(&self) -> OwnedSemaphorePermit {
        self.slots.clone().acquire_owned().await.expect("nobody closes the semaphore")
    }

    /// Lets a connection in, or not if its address has all it may have.
    pub(super) fn admit(&self, from: IpAddr, slot: OwnedSemaphorePermit) -> Option<Ticket> {
        let client = client(from, self.limits.ipv6_client);
        let mut counted = self.counted.lock().expect("no code that holds this lock panics");
        let connections = counted.connections.entry(client).or_default();
        if *connections < self.limits.max_per_address || self.limits.shared.contains(from) {
            *connections += 1;
            return Some(Ticket { client, counted: self.counted.clone(), _slot: slot });
        }
        let now = Instant::now();
        if counted.said.is_none_or(|said| now.duration_since(said) >= SAY_AGAIN) {
            counted.said = Some(now);
            let (table, limit) = (self.table, self.limits.max_per_address);
            tracing::warn!("{client} has {limit} connections and gets no more: [{table}] max_per_address");
        }
        None
    }
}

/// One connection; it is counted until the value is dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    client: IpAddr,
    counted: Arc<Mutex<Counted>>,
    _slot: OwnedSemaphorePermit,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut counted = self.counted.lock().expect("no code that holds this lock panics");
        if let Some(connections) = counted.connections.get_mut(&self.client) {
            *connections -= 1;
            if *connections == 0 {
                counted.connections.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_shared_and_how_wide_a_client_is_can_be_said() {
        let shared = Shared::parse(&["10.1.0.0/16".to_owned()]).unwrap();
        let limits = Limits { max_connections: 9, max_per_address: 1, shared, ipv6_client: 56, ..Limits::default() };
        let gate = Gate::new("http", limits);
        let admit = async |text: &str| gate.admit(text.parse().unwrap(), gate.room().await);
        let many = [admit("10.1.2.3").await, admit("10.1.2.3").await, admit("10.1.2.3").await];
        assert!(many.iter().all(Option::is_some), "machines behind one address");
        let one = [admit("10.2.2.3").await, admit("10.2.2.3").await];
        assert!(one[0].is_some() && one[1].is_none());
        let wide = [admit("fd00:0:0:100::1").await, admit("fd00:0:0:1ff::1").await, admit("fd00:0:0:200::1").await];
        assert!(wide[0].is_some() && wide[1].is_none() && wide[2].is_some(), "a /56 is one client");
        drop((many, one, wide));
        assert!(gate.counted.lock().unwrap().connections.is_empty());
    }

    #[tokio::test]
    async fn each_client_is_counted_and_none_is_remembered() {
        let gate = Gate::new("http", Limits { max_connections: 5, max_per_address: 2, ..Limits::default() });
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let admit = async |text| gate.admit(address(text), gate.room().await);
        let first = admit("10.0.0.1").await.unwrap();
        let second = admit("::ffff:10.0.0.1").await.unwrap();
        assert!(admit("10.0.0.1").await.is_none(), "one client, however its address is written");
        let others =
            [admit("10.0.0.2").await.unwrap(), admit("fd00::1").await.unwrap(), admit("fd00::2").await.unwrap()];
        assert_eq!(gate.slots.available_permits(), 0);
        drop(second);
        let third = admit("10.0.0.1").await.unwrap();
        drop((first, third));
        assert!(admit("fd00::ffff:1").await.is_none(), "another address of the same /64");
        assert!(admit("fd00:0:0:1::1").await.is_some());
        drop(others);
        assert!(gate.counted.lock().unwrap().connections.is_empty());
        assert_eq!(gate.slots.available_permits(), 5);
    }
}
