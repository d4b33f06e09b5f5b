//! What of the machine's network is the agent's. In the initramfs all of it is; in a running system the image's programs have
//! links and addresses of their own beside it, and none of those may be touched. Kept in a file, over the hand-over and
//! restarts of the service.

use super::netlink::{Address, Link};
use crate::error::{AgentError, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::IpAddr;

const PATH: &str = "/run/kiln/links.json";
const NEW: &str = "/run/kiln/links.json.new";

/// Who else is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// Nobody.
    Initramfs,
    /// The image's programs.
    System,
}

/// What the agent has made, and the cards that it began with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {
    /// The kernel's numbers of the initramfs' cards: names change, numbers are not given twice.
    cards: BTreeSet<u32>,
    /// Names of bonds and VLANs.
    links: BTreeSet<String>,
    /// Link, address, prefix.
    addresses: BTreeSet<(u32, IpAddr, u8)>,
}

impl Own {
    /// What was kept; nothing, where that cannot be read: then nothing is taken away.
    pub fn read() -> Self {
        let bytes = match std::fs::read(PATH) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Self::default(),
            Err(error) => {
                eprintln!("kiln-agent: {PATH}: {error}");
                return Self::default();
            }
        };
        serde_json::from_slice(&bytes).inspect_err(|error| eprintln!("kiln-agent: {PATH}: {error}")).unwrap_or_default()
    }

    fn write(&self) -> Result<()> {
        let bytes = serde_json::to_vec(self).expect("numbers, names and addresses always become JSON");
        std::fs::create_dir_all("/run/kiln").map_err(AgentError::file("/run/kiln"))?;
        std::fs::write(NEW, bytes).and_then(|()| std::fs::rename(NEW, PATH)).map_err(AgentError::file(PATH))
    }

    /// All that was made has been taken away, and these are the cards.
    pub fn begin(&mut self, ground: Ground, cards: &[Link]) -> Result<()> {
        let cards = match ground {
            Ground::Initramfs => cards.iter().map(|card| card.index).collect(),
            Ground::System => std::mem::take(&mut self.cards),
        };
        *self = Self { cards, ..Self::default() };
        self.write()
    }

    /// A bond or VLAN was made.
    pub fn add_link(&mut self, name: &str) -> Result<()> {
        self.links.insert(name.to_owned());
        self.write()
    }

    /// An address was given.
    pub fn add_address(&mut self, link: &Link, ip: IpAddr, prefix: u8) -> Result<()> {
        self.addresses.insert((link.index, ip, prefix));
        self.write()
    }

    /// Whether the agent made this bond or VLAN.
    pub fn made(&self, ground: Ground, link: &Link) -> bool {
        ground == Ground::Initramfs || self.links.contains(&link.name)
    }

    /// Whether the agent gave this address.
    pub fn gave(&self, address: &Address) -> bool {
        self.addresses.contains(&(address.index, address.ip, address.prefix))
    }

    /// Whether this is a card to ask on. In a running system the end of a virtual cable is a container's, unless it was there
    /// before, and one with a master is its bridge's or bond's.
    pub fn is_card(&self, ground: Ground, link: &Link) -> bool {
        let free = match ground {
            Ground::Initramfs => true,
            Ground::System => link.master == 0 && (link.kind.is_empty() || self.cards.contains(&link.index)),
        };
        free && link.is_card()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: &str, master: u32) -> Link {
        let (name, kind, mac) = (name.to_owned(), kind.to_owned(), vec![2, 0, 0, 0, 0, 1]);
        Link { index, name, kind, master, mac, ethernet: true, ..Link::default() }
    }

    #[test]
    fn a_running_systems_own_links_are_nobody_elses() {
        let ip: IpAddr = "10.9.0.7".parse().unwrap();
        let own = Own { cards: [2, 9].into(), links: ["up".to_owned()].into(), addresses: [(2, ip, 24)].into() };
        for (link, theirs, system) in [
            (link(2, "eth0", "", 0), true, true),
            (link(3, "eth1", "", 0), true, true),
            (link(9, "a0", "veth", 0), true, true),
            (link(8, "veth7f", "veth", 0), true, false),
            (link(4, "eth2", "", 7), true, false),
            (link(5, "br0", "bridge", 0), false, false),
        ] {
            assert_eq!(own.is_card(Ground::Initramfs, &link), theirs, "{link:?}");
            assert_eq!(own.is_card(Ground::System, &link), system, "{link:?}");
        }
        for (link, system) in [(link(6, "up", "bond", 0), true), (link(7, "store.9", "vlan", 0), false)] {
            assert!(own.made(Ground::Initramfs, &link));
            assert_eq!(own.made(Ground::System, &link), system, "{link:?}");
        }
        let address = |index, prefix| Address { index, ip, prefix, global: true, settled: true };
        assert!(own.gave(&address(2, 24)) && !own.gave(&address(2, 32)) && !own.gave(&address(3, 24)));
    }
}
