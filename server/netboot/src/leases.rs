//! The address leases of a full DHCP server, as a table in memory (RFC 2131 §3.1, §4.3).
//!
//! Off-spec: a lease belongs to the Ethernet address, never to option 61. Firmware, iPXE, the agent and the booted
//! system each make up another client identifier; by address the machine keeps one IP address through the whole chain.
//! Not here: probing an address before it is offered (a client's DECLINE does that), and more than one range.

use crate::{Mac, RangeError};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// The largest table kept.
pub(crate) const MAX_ADDRESSES: u64 = 65_536;
/// How long an offer keeps its address for the client that has not taken it yet.
const OFFER_MS: u64 = 60_000;
/// How long an address that somebody else turned out to use is left alone.
const DECLINED_MS: u64 = 600_000;

/// What a full server leases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseConfig {
    /// First address.
    pub start: Ipv4Addr,
    /// Last address.
    pub end: Ipv4Addr,
    /// Option 3.
    pub router: Option<Ipv4Addr>,
    /// Option 6.
    pub dns: Vec<Ipv4Addr>,
    /// Option 51, seconds.
    pub lease_s: u32,
}

impl LeaseConfig {
    /// Refuses a range that is empty, too large or leased for too short a time.
    pub fn check(&self) -> Result<(), RangeError> {
        let (start, end) = (self.start, self.end);
        if end < start {
            return Err(RangeError::Backwards { start, end });
        }
        let size = u64::from(u32::from(end) - u32::from(start)) + 1;
        if size > MAX_ADDRESSES {
            return Err(RangeError::TooLarge { start, end, size });
        }
        if self.lease_s < 60 {
            return Err(RangeError::LeaseTime { got: self.lease_s });
        }
        Ok(())
    }
}

/// How a lease stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// Offered, not taken yet: need not be persisted.
    Offered,
    /// Taken.
    Bound,
    /// Given back, or run out: the machine gets the address again if it is still free.
    Free,
    /// A client found it in use by somebody else.
    Declined,
}

/// One address. Persist every [`LeaseState::Bound`], [`LeaseState::Free`] and [`LeaseState::Declined`] one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: Ipv4Addr,
    /// Whose it is.
    pub mac: Mac,
    /// How it stands.
    pub state: LeaseState,
    /// Until when, unix milliseconds.
    pub until_ms: u64,
}

/// The answer to a client's REQUEST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Granted(Lease),
    Refused,
    /// Nothing is known about it: another server may (RFC 2131 §4.3.2, INIT-REBOOT).
    Silent,
}

#[derive(Debug, Clone)]
pub(crate) struct Leases {
    pub(crate) config: LeaseConfig,
    by_address: BTreeMap<Ipv4Addr, Lease>,
    by_mac: BTreeMap<Mac, Ipv4Addr>,
    /// Where the search for a never used address goes on.
    next: u32,
}

impl Leases {
    pub(crate) fn new(config: LeaseConfig) -> Result<Self, RangeError> {
        config.check()?;
        let next = config.start.into();
        Ok(Self { config, by_address: BTreeMap::new(), by_mac: BTreeMap::new(), next })
    }

    /// Takes up what an earlier run persisted; leases outside the range are dropped. Of a machine that moved, its former
    /// address may be among them: the lease that ends last is the one it has.
    pub(crate) fn restore(&mut self, leases: impl IntoIterator<Item = Lease>) {
        let mut leases: Vec<Lease> = leases.into_iter().filter(|lease| self.in_range(lease.address)).collect();
        leases.sort_by_key(|lease| lease.until_ms);
        for lease in leases {
            self.put(lease);
        }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Lease> {
        self.by_address.values()
    }

    pub(crate) fn in_range(&self, address: Ipv4Addr) -> bool {
        (self.config.start..=self.config.end).contains(&address)
    }

    fn put(&mut self, lease: Lease) {
        if let Some(old) = self.by_mac.get(&lease.mac).copied().filter(|a| *a != lease.address) {
            // One address per machine: a Declined one stays in the table, but is nobody's.
            if self.by_address.get(&old).is_some_and(|l| l.mac == lease.mac && l.state != LeaseState::Declined) {
                self.by_address.remove(&old);
            }
        }
        let before = self.by_address.get(&lease.address).map(|l| l.mac).filter(|m| *m != lease.mac);
        if let Some(before) = before.filter(|m| self.by_mac.get(m) == Some(&lease.address)) {
            self.by_mac.remove(&before);
        }
        if lease.state == LeaseState::Declined {
            self.by_mac.remove(&lease.mac);
        } else {
            self.by_mac.insert(lease.mac, lease.address);
        }
        self.by_address.insert(lease.address, lease);
    }

    /// Whether `mac` may have `address` now.
    fn available(&self, address: Ipv4Addr, mac: Mac, reserved: &[Ipv4Addr], now_ms: u64) -> bool {
        if !self.in_range(address) || reserved.contains(&address) {
            return false;
        }
        if self.config.router == Some(address) || self.config.dns.contains(&address) {
            return false;
        }
        self.by_address.get(&address).is_none_or(|lease| match lease.state {
            LeaseState::Offered | LeaseState::Bound => lease.mac == mac || lease.until_ms <= now_ms,
            LeaseState::Free => true,
            LeaseState::Declined => lease.until_ms <= now_ms,
        })
    }

    /// DISCOVER: its own address, else the one it asks for, else one nobody had, else the one longest out of use.
    pub(crate) fn offer(
        &mut self,
        mac: Mac,
        requested: Option<Ipv4Addr>,
        reserved: &[Ipv4Addr],
        now_ms: u64,
    ) -> Option<Lease> {
        let own = self.by_mac.get(&mac).copied();
        let address = own
            .filter(|a| self.available(*a, mac, reserved, now_ms))
            .or_else(|| requested.filter(|a| self.available(*a, mac, reserved, now_ms)))
            .or_else(|| self.fresh(mac, reserved, now_ms))
            .or_else(|| {
                let idle = self.by_address.values().filter(|l| self.available(l.address, mac, reserved, now_ms));
                idle.min_by_key(|l| l.until_ms).map(|l| l.address)
            })?;
        if let Some(bound) = self
            .by_address
            .get(&address)
            .filter(|l| l.mac == mac && l.state == LeaseState::Bound && l.until_ms > now_ms)
        {
            return Some(bound.clone()); // a bound client that asks again keeps its lease while it decides
        }
        let lease = Lease { address, mac, state: LeaseState::Offered, until_ms: now_ms + OFFER_MS };
        self.put(lease.clone());
        Some(lease)
    }

    /// An address without an entry, searched once around from where the last search ended.
    fn fresh(&mut self, mac: Mac, reserved: &[Ipv4Addr], now_ms: u64) -> Option<Ipv4Addr> {
        let (start, end) = (u32::from(self.config.start), u32::from(self.config.end));
        let size = end - start + 1;
        if u32::try_from(self.by_address.len()).is_ok_and(|n| n >= size) {
            return None;
        }
        for step in 0..size {
            let at = start + (self.next - start + step) % size;
            let address = Ipv4Addr::from(at);
            if !self.by_address.contains_key(&address) && self.available(address, mac, reserved, now_ms) {
                self.next = if at == end { start } else { at + 1 };
                return Some(address);
            }
        }
        None
    }

    /// REQUEST for `address`. `selecting`: the client took an offer of this server (option 54 names it).
    pub(crate) fn request(
        &mut self,
        mac: Mac,
        address: Ipv4Addr,
        selecting: bool,
        reserved: &[Ipv4Addr],
        now_ms: u64,
    ) -> Verdict {
        let known = self.by_address.get(&address).is_some_and(|l| l.mac == mac);
        if !self.available(address, mac, reserved, now_ms) {
            // Ours to refuse: it names an address of this network that is somebody else's, or none of the range.
            return Verdict::Refused;
        }
        if !known && !selecting && self.by_address.contains_key(&address) {
            return Verdict::Refused;
        }
        if !known && !selecting && !self.by_mac.contains_key(&mac) {
            return Verdict::Silent;
        }
        if !known && !selecting {
            return Verdict::Refused; // it has another address here
        }
        let until_ms = now_ms + u64::from(self.config.lease_s) * 1000;
        let lease = Lease { address, mac, state: LeaseState::Bound, until_ms };
        self.put(lease.clone());
        Verdict::Granted(lease)
    }

    /// The client took another server's offer: this one's is free again.
    pub(crate) fn forget_offer(&mut self, mac: Mac) {
        let Some(address) = self.by_mac.get(&mac).copied() else { return };
        if self.by_address.get(&address).is_some_and(|l| l.state == LeaseState::Offered) {
            self.by_address.remove(&address);
            self.by_mac.remove(&mac);
        }
    }

    /// RELEASE.
    pub(crate) fn release(&mut self, mac: Mac, address: Ipv4Addr, now_ms: u64) -> Option<Lease> {
        let lease = self.by_address.get_mut(&address).filter(|l| l.mac == mac && l.state == LeaseState::Bound)?;
        lease.state = LeaseState::Free;
        lease.until_ms = now_ms;
        Some(lease.clone())
    }

    /// DECLINE. Only from the machine the address was given to: nobody can declare a whole range unusable.
    pub(crate) fn decline(&mut self, mac: Mac, address: Ipv4Addr, now_ms: u64) -> Option<Lease> {
        self.by_address.get(&address).filter(|l| l.mac == mac)?;
        let lease = Lease { address, mac, state: LeaseState::Declined, until_ms: now_ms + DECLINED_MS };
        self.put(lease.clone());
        Some(lease)
    }
}
