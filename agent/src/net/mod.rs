//! The network, owned by the agent for the whole boot: links by netlink, addresses by its own DHCP client.

// Matches over other crates' enums of a hundred variants name only those that are read.
#![allow(clippy::wildcard_enum_match_arm)]

mod dhcp;
mod link;

pub use dhcp::Lease;

use crate::error::{AgentError, Result};
use crate::facts;
use kiln_protocol::MachineId;
use std::time::Duration;
use tokio::task::JoinSet;

/// How long one round of DISCOVERs may take.
const ROUND: Duration = Duration::from_secs(12);

/// Brings every interface up, asks on all of them, and configures the first that gets a lease.
pub async fn bring_up(machine: &MachineId, need_location: bool) -> Result<Lease> {
    let names = facts::interfaces();
    if names.is_empty() {
        return Err(AgentError::NoInterface);
    }
    let links = link::Links::open()?;
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
        asking.spawn(dhcp::acquire(name.clone(), hardware, machine.clone(), need_location));
    }
    let first = async {
        while let Some(finished) = asking.join_next().await {
            if let Ok(Ok(lease)) = finished {
                return Some(lease);
            }
        }
        None
    };
    let lease = tokio::time::timeout(ROUND, first).await.ok().flatten();
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
