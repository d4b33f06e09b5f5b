//! The network, owned by the agent for the whole boot: links by netlink, addresses by its own DHCP clients and by the
//! kernel's ear for IPv6 routers. Here one way to be connected is taken; which ways there are is `trial`'s and `uplink`'s.

// Matches over other crates' enums of a hundred variants name only those that are read.
#![allow(clippy::wildcard_enum_match_arm)]

mod bootcard;
mod build;
mod dhcp;
mod dhcp6;
mod dhcp6_message;
mod dhcp_message;
mod netlink;
mod own;
#[cfg(test)]
mod tests;
pub mod trial;

pub use dhcp_message::Lease;
pub use dhcp6_message::Lease6;
pub use own::Ground;

use crate::error::{AgentError, Result};
use kiln_protocol::MachineId;
use kiln_release::network::{LinkConfig, Section};
use netlink::{Link, Netlink, Watch};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

/// How long one round of DISCOVERs may take.
const ROUND: Duration = Duration::from_secs(12);
/// How long another card's lease waits for that of the card the firmware booted from.
const FAVOUR: Duration = Duration::from_secs(3);
/// How long a link may take to find its other end.
const CARRIER: Duration = Duration::from_secs(5);
/// How long name servers are asked for where the address is a router's word.
const NAMES: Duration = Duration::from_secs(3);
const RESOLVER: &str = "/run/kiln/resolv.conf";

/// How the machine is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    /// Its first link with an address.
    pub interface: String,
    /// Its addresses that reach beyond a link.
    pub addresses: Vec<IpAddr>,
    pub leases: Vec<Lease>,
    pub leases6: Vec<Lease6>,
    pub dns: Vec<IpAddr>,
    pub domain: Option<String>,
    pub hostname: Option<String>,
    /// Where Kiln says artifacts are.
    pub http_url: Option<String>,
    /// Where Kiln says the agent API is.
    pub agent_url: Option<String>,
    /// Where a boot server might be, if Kiln said nothing itself.
    pub next_server: Option<Ipv4Addr>,
}

impl Uplink {
    /// Its addresses and where they are, for people.
    pub fn describe(&self) -> String {
        let addresses: Vec<String> = self.addresses.iter().map(IpAddr::to_string).collect();
        format!("{} on {}", addresses.join(", "), self.interface)
    }

    /// Takes a lease over; its address and route become the kernel's.
    fn lease(&mut self, netlink: &mut Netlink, lease: Lease) -> Result<()> {
        let link = netlink.link(&lease.interface)?;
        // What was leased is the network's word: one that cannot be used is the network's fault, and tried again.
        let bad = |error: AgentError| AgentError::BadLease { interface: link.name.clone(), reason: error.to_string() };
        netlink.add_address(&link, &lease.address.into(), lease.prefix).map_err(bad)?;
        if let Some(router) = lease.router {
            netlink.default_route(&link, &router.into()).map_err(bad)?;
        }
        self.dns.extend(lease.dns.iter().map(|ip| IpAddr::V4(*ip)));
        for (known, said) in [
            (&mut self.domain, &lease.domain),
            (&mut self.hostname, &lease.hostname),
            (&mut self.http_url, &lease.http_url),
            (&mut self.agent_url, &lease.agent_url),
        ] {
            if known.is_none() {
                known.clone_from(said);
            }
        }
        self.next_server = self.next_server.or(lease.next_server);
        self.leases.push(lease);
        Ok(())
    }

    fn lease6(&mut self, netlink: &mut Netlink, lease: Lease6) -> Result<()> {
        if let Some(address) = lease.address {
            let link = netlink.link(&lease.interface)?;
            netlink.add_address(&link, &address.into(), 128)?;
        }
        self.dns.extend(dhcp6_message::servers(&lease));
        if self.domain.is_none() {
            self.domain.clone_from(&lease.domain);
        }
        self.leases6.push(lease);
        Ok(())
    }

    /// What is known by now of `links` is written down, and the resolver told.
    fn finish(mut self, netlink: &mut Netlink, links: &[&Link]) -> Result<Self> {
        let all = netlink.addresses()?;
        let of =
            |link: &&Link| all.iter().filter(|a| a.index == link.index && a.global).map(|a| a.ip).collect::<Vec<_>>();
        self.addresses = links.iter().flat_map(of).collect();
        if let Some(first) = links.iter().find(|link| !of(link).is_empty()) {
            self.interface.clone_from(&first.name);
        }
        write_resolver(self.domain.as_deref(), &self.dns)?;
        Ok(self)
    }

    /// Renews what is leased for as long as the value is kept.
    pub fn keep(&self, machine: &MachineId) -> JoinSet<()> {
        let mut renewals = JoinSet::new();
        for lease in &self.leases {
            renewals.spawn(keep(lease.clone(), machine.clone()));
        }
        for lease in &self.leases6 {
            renewals.spawn(keep6(lease.clone(), machine.clone()));
        }
        renewals
    }
}

/// Sets every card up, ahead of all else: what its link needs until it carries something passes beside what else the machine
/// has to do. One that does not come up is one without a link to [`bring_up`].
pub fn raise() {
    if let Err(error) = Netlink::open().and_then(|mut netlink| build::raise(&mut netlink)) {
        println!("kiln-agent: {error}");
    }
}

/// Whether a running system's link has no carrier, or is gone, and some card beside it has one. Where the kernel does not say: no.
pub fn others_lead(name: &str) -> bool {
    let Ok(mut netlink) = Netlink::open() else { return false };
    let Ok(mut links) = netlink.links() else { return false };
    links.retain(|link| link.carrier && (link.name == name || netlink.own.is_card(Ground::System, link)));
    !links.is_empty() && links.iter().all(|link| link.name != name)
}

/// The kernel's number of a link. A card that is put back under its name has another, and nothing of what was given to it.
pub fn number_of(name: &str) -> Option<u32> {
    Some(Netlink::open().ok()?.link(name).ok()?.index)
}

/// Connects the machine as a section says; one without links: by any card that is given an address, those in `avoid` last.
/// What was configured before is taken away; in a running system, by the agent alone.
pub async fn bring_up(
    ground: Ground,
    machine: &MachineId,
    need_location: bool,
    section: &Section,
    avoid: &mut HashSet<String>,
) -> Result<Uplink> {
    if section.link.is_empty() {
        automatic(ground, machine, need_location, avoid).await
    } else {
        configured(ground, machine, need_location, section).await
    }
}

/// Asks on every card, and configures the first that gets a lease: that of the card the firmware booted from, if it gets
/// one soon after another. Without any lease, a card that hears an IPv6 router does.
async fn automatic(
    ground: Ground,
    machine: &MachineId,
    need_location: bool,
    avoid: &mut HashSet<String>,
) -> Result<Uplink> {
    let mut netlink = Netlink::open()?;
    let cards = build::clear(&mut netlink, ground, true)?;
    if cards.is_empty() {
        return Err(AgentError::NoInterface);
    }
    if cards.iter().all(|card| avoid.contains(&card.name)) {
        avoid.clear();
    }
    let booted = bootcard::mac();
    let favourite = cards.iter().find(|card| booted.is_some_and(|mac| mac[..] == *card.own_mac()));
    let favourite = favourite.map(|card| card.name.clone()).filter(|name| !avoid.contains(name));
    let mut asking = JoinSet::new();
    for card in &cards {
        asking.spawn(ask(card.clone(), machine.clone(), need_location));
    }
    let until = Instant::now() + ROUND;
    let choice = Choice { favourite: favourite.as_deref(), avoid, other: None, avoided: None, until };
    let lease = choose(&mut asking, choice).await;
    asking.abort_all();
    let mut uplink = Uplink::default();
    if let Some(lease) = lease {
        let card = cards.iter().find(|card| card.name == lease.interface);
        if avoid.contains(&lease.interface) {
            avoid.clear();
        }
        uplink.lease(&mut netlink, lease)?;
        return uplink.finish(&mut netlink, &card.into_iter().collect::<Vec<_>>());
    }
    let addresses = netlink.addresses()?;
    let routed = |card: &&Link| addresses.iter().any(|a| a.index == card.index && a.global && a.settled);
    let card = cards.iter().filter(|card| !avoid.contains(&card.name)).find(routed).or(cards.iter().find(routed));
    let names = || cards.iter().map(|card| card.name.as_str()).collect::<Vec<_>>().join(", ");
    let card = card.ok_or_else(|| AgentError::NoOffer { interfaces: names(), seconds: ROUND.as_secs() })?;
    if let Ok(Ok(names)) = timeout(NAMES, dhcp6::acquire(card.name.clone(), machine.clone(), false)).await {
        uplink.lease6(&mut netlink, names)?;
    }
    uplink.finish(&mut netlink, &[card])
}

/// Asks for a lease as soon as the card has a carrier: a question before that is lost, and the next comes only after a pause
/// (RFC 2131 §4.1). A driver that never says so is asked all the same.
async fn ask(card: Link, machine: MachineId, need_location: bool) -> Result<Lease> {
    let (mut netlink, mut watch) = (Netlink::open()?, Watch::open()?);
    connected(&mut netlink, &mut watch, &[&card]).await?;
    dhcp::acquire(card.name, card.mac, machine, need_location).await
}

/// What came of one question.
enum Got {
    Lease(Lease),
    Lease6(Lease6),
    Routed,
}

async fn configured(ground: Ground, machine: &MachineId, need_location: bool, section: &Section) -> Result<Uplink> {
    let (mut netlink, mut watch) = (Netlink::open()?, Watch::open()?);
    build::clear(&mut netlink, ground, false)?;
    let made = build::build(&mut netlink, &mut watch, ground, section).await?;
    let addressed: Vec<&Link> = made.iter().filter(|(config, _)| is_addressed(config)).map(|(_, link)| link).collect();
    connected(&mut netlink, &mut watch, &addressed).await?;
    let mut asking: JoinSet<Result<Got>> = JoinSet::new();
    let until = Instant::now() + ROUND;
    let mut uplink = Uplink::default();
    let mut static_one = false;
    for (config, link) in &made {
        let (name, machine) = (link.name.clone(), machine.clone());
        uplink.dns.extend(&config.dns);
        if uplink.domain.is_none() && !config.domain.is_empty() {
            uplink.domain = Some(config.domain.clone());
        }
        static_one |= !config.address.is_empty();
        if config.dhcp4 {
            // A bond has its cards' address only now.
            let mac = netlink.link(&name)?.mac;
            let (name, machine) = (name.clone(), machine.clone());
            asking.spawn(async move { dhcp::acquire(name, mac, machine, need_location).await.map(Got::Lease) });
        }
        if config.dhcp6 {
            let name = name.clone();
            asking.spawn(async move { dhcp6::acquire(name, machine, true).await.map(Got::Lease6) });
        }
        if config.slaac {
            asking.spawn(routed(link.index, name));
        }
    }
    let (mut got, mut last) = (static_one, None);
    while let Ok(Some(done)) = timeout_at(until, asking.join_next()).await {
        match done {
            Ok(Ok(Got::Lease(lease))) => uplink.lease(&mut netlink, lease)?,
            Ok(Ok(Got::Lease6(lease))) => uplink.lease6(&mut netlink, lease)?,
            Ok(Ok(Got::Routed)) => {}
            Ok(Err(error)) => {
                println!("kiln-agent: {error}");
                last = Some(error);
                continue;
            }
            Err(_) => continue,
        }
        got = true;
    }
    asking.abort_all();
    if !got {
        let names = made.iter().map(|(_, link)| link.name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(last.unwrap_or(AgentError::NoOffer { interfaces: names, seconds: ROUND.as_secs() }));
    }
    // A static or leased address of IPv6 is not used before nobody else has it.
    settled(&mut netlink, &mut watch, &addressed).await?;
    uplink.finish(&mut netlink, &addressed)
}

fn is_addressed(config: &LinkConfig) -> bool {
    config.dhcp4 || config.dhcp6 || config.slaac || !config.address.is_empty()
}

/// Waits until every one of `links` has a carrier; one that has none in time is left as it is.
async fn connected(netlink: &mut Netlink, watch: &mut Watch, links: &[&Link]) -> Result<()> {
    let until = Instant::now() + CARRIER;
    loop {
        let now = netlink.links()?;
        if links.iter().all(|link| now.iter().any(|other| other.index == link.index && other.carrier))
            || timeout_at(until, watch.changed()).await.is_err()
        {
            return Ok(());
        }
    }
}

/// Waits for the end of duplicate address detection.
async fn settled(netlink: &mut Netlink, watch: &mut Watch, links: &[&Link]) -> Result<()> {
    let until = Instant::now() + CARRIER;
    loop {
        let open = netlink.addresses()?.into_iter().any(|a| !a.settled && links.iter().any(|l| l.index == a.index));
        if !open || timeout_at(until, watch.changed()).await.is_err() {
            return Ok(());
        }
    }
}

/// Waits for an address that a router's word made.
async fn routed(index: u32, name: String) -> Result<Got> {
    let (mut netlink, mut watch) = (Netlink::open()?, Watch::open()?);
    let until = Instant::now() + ROUND;
    loop {
        let own = |a: &netlink::Address| a.index == index && a.global && a.settled && a.ip.is_ipv6();
        if netlink.addresses()?.iter().any(own) {
            return Ok(Got::Routed);
        }
        if timeout_at(until, watch.changed()).await.is_err() {
            let interfaces = format!("{name} (IPv6 router)");
            return Err(AgentError::NoOffer { interfaces, seconds: ROUND.as_secs() });
        }
    }
}

/// Waits for leases until the choice is made.
async fn choose(asking: &mut JoinSet<Result<Lease>>, mut choice: Choice<'_>) -> Option<Lease> {
    loop {
        match timeout_at(choice.until, asking.join_next()).await {
            Ok(Some(Ok(Ok(lease)))) => {
                if let Some(lease) = choice.offer(lease, Instant::now()) {
                    return Some(lease);
                }
            }
            // Nothing came of this card.
            Ok(Some(Ok(Err(_)) | Err(_))) => {}
            Ok(None) | Err(_) => return choice.other.or(choice.avoided),
        }
    }
}

/// The favourite's lease, else the first that came [`FAVOUR`] ago, else none by the end of the round. A card by which the
/// server was not reached is taken when there is no other.
struct Choice<'a> {
    favourite: Option<&'a str>,
    avoid: &'a HashSet<String>,
    other: Option<Lease>,
    avoided: Option<Lease>,
    /// Then the choice is made.
    until: Instant,
}

impl Choice<'_> {
    /// A card got a lease at `now`; given back if it is the one.
    fn offer(&mut self, lease: Lease, now: Instant) -> Option<Lease> {
        if self.avoid.contains(&lease.interface) {
            self.avoided.get_or_insert(lease);
            return None;
        }
        if self.favourite.is_none_or(|name| name == lease.interface) {
            return Some(lease);
        }
        if self.other.is_none() {
            self.until = self.until.min(now + FAVOUR);
            self.other = Some(lease);
        }
        None
    }
}

/// Renews a lease (RFC 2131 §4.4.5). When it cannot, the address is kept: a machine that answers on an old address is
/// easier to help than one that has gone silent. Ends only where the lease is over and another address is given.
async fn keep(mut lease: Lease, machine: MachineId) {
    let mut over = Instant::now() + 2 * lease.renew_after();
    loop {
        tokio::time::sleep(lease.renew_after()).await;
        match renew(&lease, over, &machine).await {
            Ok(renewed) if renewed.address == lease.address => {
                over = Instant::now() + 2 * renewed.renew_after();
                lease = renewed;
            }
            Ok(Lease { interface, address, .. }) => {
                eprintln!("kiln-agent: {interface} is given {address} in place of {}", lease.address);
                return;
            }
            Err(error) => {
                eprintln!("kiln-agent: lease of {} on {} not renewed: {error}", lease.address, lease.interface);
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
        }
    }
}

/// Of one that is over and is not renewed another is asked for, as of a network that was renumbered.
async fn renew(lease: &Lease, over: Instant, machine: &MachineId) -> Result<Lease> {
    match dhcp::renew(lease, machine).await {
        Err(_) if over <= Instant::now() => {
            dhcp::acquire(lease.interface.clone(), lease.hardware.clone(), machine.clone(), false).await
        }
        done => done,
    }
}

/// The same by DHCPv6 (RFC 9915 §18.2.4). T1 is half of how long an address is preferred, where the server says none: behind that it
/// is over.
async fn keep6(mut lease: Lease6, machine: MachineId) {
    let mut over = Instant::now() + 2 * lease.renew_after();
    loop {
        tokio::time::sleep(lease.renew_after()).await;
        match dhcp6::renew(&lease, over <= Instant::now(), &machine).await {
            Ok(renewed) if renewed.address == lease.address => {
                over = Instant::now() + 2 * renewed.renew_after();
                lease = renewed;
            }
            Ok(_) => {
                eprintln!("kiln-agent: {} is given another IPv6 address than the one that was leased", lease.interface);
                return;
            }
            Err(error) => {
                eprintln!("kiln-agent: DHCPv6 lease on {} not renewed: {error}", lease.interface);
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
        }
    }
}

fn write_resolver(domain: Option<&str>, dns: &[IpAddr]) -> Result<()> {
    use std::fmt::Write;
    let mut text = String::new();
    if let Some(domain) = domain {
        writeln!(text, "search {domain}").expect("writing to a String cannot fail");
    }
    // resolv.conf(5): three are read.
    for server in dns.iter().take(3) {
        writeln!(text, "nameserver {server}").expect("writing to a String cannot fail");
    }
    std::fs::create_dir_all("/run/kiln").map_err(AgentError::file("/run/kiln"))?;
    std::fs::write(RESOLVER, text).map_err(AgentError::file(RESOLVER))
}
