//! The network, owned by the agent for the whole boot: links by netlink, addresses by its own DHCP client.

// Matches over other crates' enums of a hundred variants name only those that are read.
#![allow(clippy::wildcard_enum_match_arm)]

mod bootcard;
mod dhcp;
mod link;

pub use dhcp::Lease;

use crate::error::{AgentError, Result};
use crate::facts;
use kiln_protocol::MachineId;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

/// How long one round of DISCOVERs may take.
const ROUND: Duration = Duration::from_secs(12);
/// How long another card's lease waits for that of the card the firmware booted from.
const FAVOUR: Duration = Duration::from_secs(3);

/// Brings every interface up, asks on all of them, and configures the first that gets a lease: that of the card the
/// firmware booted from, if it gets one soon after another.
pub async fn bring_up(machine: &MachineId, need_location: bool) -> Result<Lease> {
    let names = facts::interfaces();
    if names.is_empty() {
        return Err(AgentError::NoInterface);
    }
    let links = link::Links::open()?;
    let booted = bootcard::mac();
    let mut favourite = None;
    let mut asking = JoinSet::new();
    for name in &names {
        let hardware = match links.up(name).await {
            Ok(hardware) if hardware.len() == 6 => hardware,
            // Not Ethernet, or a card that will not come up: the others may.
            Ok(_) => continue,
            Err(error) => {
                println!("kiln-agent: {error}");
                continue;
            }
        };
        if booted.is_some_and(|mac| mac[..] == hardware[..]) {
            favourite = Some(name.clone());
        }
        asking.spawn(dhcp::acquire(name.clone(), hardware, machine.clone(), need_location));
    }
    let lease = choose(&mut asking, favourite.as_deref()).await;
    asking.abort_all();
    let lease = lease.ok_or_else(|| AgentError::NoOffer { interfaces: names.join(", "), seconds: ROUND.as_secs() })?;
    // What was leased is the network's word: one that cannot be used is the network's fault, and tried again.
    links
        .configure(&lease)
        .await
        .map_err(|error| AgentError::BadLease { interface: lease.interface.clone(), reason: error.to_string() })?;
    write_resolver(&lease)?;
    Ok(lease)
}

/// Waits for leases until the choice is made.
async fn choose(asking: &mut JoinSet<Result<Lease>>, favourite: Option<&str>) -> Option<Lease> {
    let mut choice = Choice { favourite, other: None, until: Instant::now() + ROUND };
    loop {
        match timeout_at(choice.until, asking.join_next()).await {
            Ok(Some(Ok(Ok(lease)))) => {
                if let Some(lease) = choice.offer(lease, Instant::now()) {
                    return Some(lease);
                }
            }
            // Nothing came of this card.
            Ok(Some(Ok(Err(_)) | Err(_))) => {}
            Ok(None) | Err(_) => return choice.other,
        }
    }
}

/// The favourite's lease, else the first that came [`FAVOUR`] ago, else none by the end of the round.
struct Choice<'a> {
    favourite: Option<&'a str>,
    other: Option<Lease>,
    /// Then the choice is made.
    until: Instant,
}

impl Choice<'_> {
    /// A card got a lease at `now`; given back if it is the one.
    fn offer(&mut self, lease: Lease, now: Instant) -> Option<Lease> {
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

/// Renews the lease for as long as the machine runs (RFC 2131 §4.4.5). When it cannot, the address is kept: a machine
/// that answers on an old address is easier to help than one that has gone silent.
pub async fn keep(mut lease: Lease, machine: MachineId) {
    loop {
        tokio::time::sleep(lease.renew_after()).await;
        match dhcp::renew(&lease, &machine).await {
            Ok(renewed) => lease = renewed,
            Err(error) => {
                eprintln!("kiln-agent: lease of {} on {} not renewed: {error}", lease.address, lease.interface);
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
        }
    }
}

fn write_resolver(lease: &Lease) -> Result<()> {
    use std::fmt::Write;
    let mut text = String::new();
    if let Some(domain) = &lease.domain {
        writeln!(text, "search {domain}").expect("writing to a String cannot fail");
    }
    for server in &lease.dns {
        writeln!(text, "nameserver {server}").expect("writing to a String cannot fail");
    }
    let path = "/run/kiln/resolv.conf";
    std::fs::write(path, text).map_err(AgentError::file(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn lease(interface: &str) -> Lease {
        Lease {
            interface: interface.into(),
            hardware: vec![2, 0, 0, 0, 0, 1],
            address: Ipv4Addr::LOCALHOST,
            prefix: 24,
            router: None,
            dns: Vec::new(),
            domain: None,
            hostname: None,
            server: Ipv4Addr::LOCALHOST,
            duration_s: 60,
            http_url: None,
            agent_url: None,
            next_server: None,
        }
    }

    #[test]
    fn the_card_that_booted_is_favoured_and_not_waited_for_in_vain() {
        let start = Instant::now();
        let choice = |favourite| Choice { favourite, other: None, until: start + ROUND };
        assert_eq!(choice(None).offer(lease("eth0"), start), Some(lease("eth0")), "nobody knows: the first");
        assert_eq!(choice(Some("eth1")).offer(lease("eth1"), start), Some(lease("eth1")));

        let mut waits = choice(Some("eth1"));
        assert_eq!(waits.offer(lease("eth0"), start), None);
        assert_eq!(waits.offer(lease("eth2"), start + Duration::from_secs(1)), None);
        assert_eq!(
            (waits.other.clone(), waits.until),
            (Some(lease("eth0")), start + FAVOUR),
            "the first of the others"
        );
        assert_eq!(waits.offer(lease("eth1"), start + FAVOUR), Some(lease("eth1")));

        let mut late = choice(Some("eth1"));
        assert_eq!(late.offer(lease("eth0"), start + ROUND), None);
        assert_eq!(late.until, start + ROUND, "never beyond the round");
    }
}
