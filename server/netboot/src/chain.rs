//! What is remembered of boot clients between packets: who was given undionly.kpxe and fetched it, and who has which
//! address.
//!
//! Deviation, forced by firmware: an iPXE in ROM and undionly.kpxe of the same build send equal options (measured with
//! Debian's ipxe-qemu and undionly.kpxe: 60, 77, 93, 94, 97, 175 are the same bytes). Two things tell the second from
//! the first: it sets the broadcast flag, because it starts with the address of the cached ACK that the ROM left it;
//! and it was given undionly.kpxe and fetched it within the last minute. The memory is bounded; losing an entry costs
//! one more chain.

use crate::Mac;
use kiln_protocol::MachineId;
use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

/// How long after its download a request of the same machine is taken for undionly.kpxe's own.
const FETCHED_MS: u64 = 60_000;
/// How long tries are counted together.
const COUNT_MS: u64 = 600_000;
/// So often undionly.kpxe is given without progress before the loop is named.
const MAX_GIVEN: u32 = 5;
/// Machines remembered.
const MAX_ENTRIES: usize = 16_384;

/// A map that forgets its oldest key when full.
#[derive(Debug, Clone)]
struct Bounded<K, V> {
    map: BTreeMap<K, V>,
    order: VecDeque<K>,
}

impl<K: Ord + Copy, V> Bounded<K, V> {
    fn new() -> Self {
        Self { map: BTreeMap::new(), order: VecDeque::new() }
    }

    fn entry(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        if !self.map.contains_key(&key) {
            if self.order.len() >= MAX_ENTRIES
                && let Some(old) = self.order.pop_front()
            {
                self.map.remove(&old);
            }
            self.order.push_back(key);
        }
        self.map.entry(key).or_insert_with(make)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Given {
    times: u32,
    first_ms: u64,
    xid: Option<u32>,
    fetched_ms: Option<u64>,
    script_xid: Option<u32>,
}

/// Where a BIOS client stands on the ladder ROM → undionly.kpxe → script.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rung {
    /// It is iPXE.
    pub(crate) ipxe: bool,
    /// It can run the script.
    pub(crate) capable: bool,
    /// It shows the mark of an iPXE started by another boot ROM.
    pub(crate) chained: bool,
    /// The site wants its own undionly.kpxe in place of a ROM's iPXE.
    pub(crate) chain_rom: bool,
}

/// What a BIOS client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    Undionly,
    Script,
    /// It got undionly.kpxe so many times, and comes back each time unable to go on.
    Loop {
        times: u32,
    },
}

#[derive(Debug, Clone)]
pub(crate) struct Memory {
    given: Bounded<Mac, Given>,
    hosts: Bounded<Ipv4Addr, (Mac, Option<MachineId>)>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self { given: Bounded::new(), hosts: Bounded::new() }
    }

    /// A client said which address it takes: TFTP and HTTP know machines by it.
    pub(crate) fn learn(&mut self, address: Ipv4Addr, mac: Mac, id: Option<&MachineId>) {
        if address.is_unspecified() || address.is_broadcast() || address.is_multicast() {
            return;
        }
        let known = self.hosts.entry(address, || (mac, None));
        let keep = known.1.take().filter(|_| known.0 == mac);
        *known = (mac, id.cloned().or(keep));
    }

    pub(crate) fn at(&self, address: Ipv4Addr) -> Option<(Mac, Option<MachineId>)> {
        self.hosts.map.get(&address).cloned()
    }

    /// The machine finished downloading undionly.kpxe.
    pub(crate) fn fetched(&mut self, mac: Mac, now_ms: u64) {
        if let Some(given) = self.given.map.get_mut(&mac) {
            given.fetched_ms = Some(now_ms);
        }
    }

    /// The machine fetched its script: the chain holds.
    pub(crate) fn progress(&mut self, mac: Mac) {
        if let Some(given) = self.given.map.get_mut(&mac) {
            *given = Given::default();
        }
    }

    /// What this client gets; asked at its DISCOVER and its REQUEST, which share `xid`.
    pub(crate) fn link(&mut self, mac: Mac, xid: u32, rung: Rung, now_ms: u64) -> Link {
        let Rung { ipxe, capable, chained, chain_rom } = rung;
        if ipxe && capable && (chained || !chain_rom) {
            return Link::Script;
        }
        let given = self.given.entry(mac, Given::default);
        if now_ms.saturating_sub(given.first_ms) > COUNT_MS {
            *given = Given { fetched_ms: given.fetched_ms, script_xid: given.script_xid, ..Given::default() };
        }
        let fetched = given.fetched_ms.is_some_and(|at| now_ms.saturating_sub(at) <= FETCHED_MS);
        if ipxe && capable && (fetched || given.script_xid == Some(xid) || given.times > MAX_GIVEN) {
            given.script_xid = Some(xid);
            return Link::Script;
        }
        if given.xid != Some(xid) {
            if given.times == 0 {
                given.first_ms = now_ms;
            }
            given.xid = Some(xid);
            given.times = given.times.saturating_add(1);
        }
        // A plain ROM is served all the same: it may just be switched off and on. An iPXE would chain for ever.
        if ipxe && !capable && (fetched || given.times > MAX_GIVEN) {
            return Link::Loop { times: given.times };
        }
        Link::Undionly
    }

    /// How often this machine was given undionly.kpxe in vain, once that is too often.
    pub(crate) fn vain(&self, mac: Mac) -> Option<u32> {
        self.given.map.get(&mac).map(|g| g.times).filter(|n| *n > MAX_GIVEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);

    const CAPABLE: Rung = Rung { ipxe: true, capable: true, chained: false, chain_rom: true };

    #[test]
    fn rom_then_undionly_then_script_though_both_look_the_same() {
        let mut memory = Memory::new();
        assert_eq!(memory.link(MAC, 1, CAPABLE, 1_000), Link::Undionly, "DISCOVER of the ROM");
        assert_eq!(memory.link(MAC, 1, CAPABLE, 3_000), Link::Undionly, "its REQUEST");
        memory.fetched(MAC, 10_000);
        assert_eq!(memory.link(MAC, 2, CAPABLE, 20_000), Link::Script, "DISCOVER of undionly.kpxe");
        assert_eq!(memory.link(MAC, 2, CAPABLE, 90_000), Link::Script, "its REQUEST, late");
        assert_eq!(memory.link(MAC, 3, CAPABLE, 90_000), Link::Undionly, "after a power cycle: the ROM again");
    }

    #[test]
    fn without_a_download_only_the_mark_or_too_many_tries_lead_on() {
        let mut memory = Memory::new();
        for xid in 0..=MAX_GIVEN {
            assert_eq!(memory.link(MAC, xid, CAPABLE, u64::from(xid)), Link::Undionly);
        }
        assert_eq!(memory.vain(MAC), Some(MAX_GIVEN + 1));
        assert_eq!(memory.link(MAC, 99, CAPABLE, 61), Link::Script, "it can go on by itself: better than a loop");
        let chained = Rung { chained: true, ..CAPABLE };
        assert_eq!(Memory::new().link(MAC, 1, chained, 0), Link::Script);
        let own = Rung { chain_rom: false, ..CAPABLE };
        assert_eq!(Memory::new().link(MAC, 1, own, 0), Link::Script, "by capability alone, where chosen");
    }

    #[test]
    fn an_ipxe_that_cannot_go_on_is_not_chained_for_ever() {
        let poor = Rung { capable: false, chained: true, ..CAPABLE };
        let mut memory = Memory::new();
        assert_eq!(memory.link(MAC, 1, poor, 0), Link::Undionly);
        memory.fetched(MAC, 1_000);
        assert_eq!(memory.link(MAC, 2, poor, 2_000), Link::Loop { times: 2 });
        memory.progress(MAC);
        assert_eq!(memory.link(MAC, 3, poor, 3_000), Link::Undionly);
        let rom = Rung { ipxe: false, ..poor };
        assert_eq!(
            (0..20).map(|xid| memory.link(MAC, 10 + xid, rom, 4_000)).filter(|l| *l == Link::Undionly).count(),
            20
        );
    }

    #[test]
    fn memory_is_bounded_and_forgets_the_oldest() {
        let mut memory = Memory::new();
        for n in 0..=u32::try_from(MAX_ENTRIES).unwrap() {
            memory.learn(Ipv4Addr::from(0x0a00_0001 + n), MAC, None);
        }
        assert_eq!(memory.hosts.map.len(), MAX_ENTRIES);
        assert_eq!(memory.hosts.order.len(), MAX_ENTRIES);
        assert_eq!(memory.at(Ipv4Addr::new(10, 0, 0, 1)), None);
        assert!(memory.at(Ipv4Addr::new(10, 0, 0, 2)).is_some());
    }
}
