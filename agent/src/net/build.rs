//! Links and static addresses of a section: cards are chosen, bonds and VLANs made of them. What was there before is
//! taken away first, so that going back to an older section is the same as going to a newer one.

use super::netlink::{Bonding, Link, Netlink, Watch};
use super::{CARRIER, bootcard};
use crate::error::{AgentError, Result};
use kiln_release::network::{LinkConfig, LinkKind, Section, parse_address, parse_mac};
use std::collections::HashSet;
use tokio::time::{Instant, timeout_at};

/// Takes away every bond, VLAN and address. All cards are up afterwards, and listen to routers or not.
pub fn clear(netlink: &mut Netlink, listen: bool) -> Result<()> {
    let links = netlink.links()?;
    for kind in ["vlan", "bond"] {
        for link in links.iter().filter(|link| link.kind == kind) {
            netlink.delete(link)?;
        }
    }
    let cards: Vec<Link> = netlink.links()?.into_iter().filter(Link::is_card).collect();
    for address in netlink.addresses()? {
        // With its last address an interface loses its routes.
        if address.ip.is_ipv4() && cards.iter().any(|card| card.index == address.index) {
            netlink.delete_address(&address)?;
        }
    }
    for card in &cards {
        listen_to_routers(&card.name, listen, listen);
        // A card that does not come up is one without a link to whoever chooses.
        if let Err(error) = netlink.set(card, true) {
            println!("kiln-agent: {error}");
        }
    }
    Ok(())
}

/// Sets every card up that is not. No router is listened to before the machine is configured, which begins with [`clear`].
pub fn raise(netlink: &mut Netlink) -> Result<()> {
    for card in netlink.links()?.iter().filter(|link| link.is_card() && !link.up) {
        drop(std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", card.name), "1"));
        // Told where it is chosen.
        drop(netlink.set(card, true));
    }
    Ok(())
}

/// Whether the kernel takes a router's word for routes, and for addresses (Documentation/networking/ip-sysctl.rst). What
/// it took before is forgotten, and routers are asked anew.
fn listen_to_routers(interface: &str, routes: bool, addresses: bool) {
    let (routes, addresses) = (if routes { "1" } else { "0" }, if addresses { "1" } else { "0" });
    for (key, value) in [("disable_ipv6", "1"), ("accept_ra", routes), ("autoconf", addresses), ("disable_ipv6", "0")] {
        // A kernel without IPv6 has no such file, and no such word to take.
        drop(std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/{key}"), value));
    }
}

/// All cards, the one the firmware booted from first, then those with a carrier. Waits a while for the first carrier.
pub async fn cards(netlink: &mut Netlink, watch: &mut Watch) -> Result<Vec<Link>> {
    let until = Instant::now() + CARRIER;
    let booted = bootcard::mac();
    let is_booted = |link: &Link| booted.is_some_and(|mac| mac[..] == *link.own_mac());
    loop {
        let mut cards: Vec<Link> = netlink.links()?.into_iter().filter(Link::is_card).collect();
        cards.sort_by_key(|card| (!is_booted(card), !card.carrier, card.name.clone()));
        if cards.is_empty() {
            return Err(AgentError::NoInterface);
        }
        let all = cards.iter().all(|card| card.carrier);
        let known = cards.iter().find(|card| is_booted(card)).is_some_and(|card| card.carrier);
        if all || known || timeout_at(until, watch.changed()).await.is_err() {
            return Ok(cards);
        }
    }
}

fn driver(interface: &str) -> String {
    let link = std::fs::read_link(format!("/sys/class/net/{interface}/device/driver")).unwrap_or_default();
    link.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Those of `cards` that a link names, in the order it names them, without those that another link has.
fn choose(
    link: &LinkConfig,
    cards: &[Link],
    taken: &HashSet<u32>,
    driver: impl Fn(&str) -> String,
    booted: Option<[u8; 6]>,
) -> Vec<Link> {
    let mut chosen: Vec<Link> = Vec::new();
    for name in &link.card {
        for card in cards {
            let named = match name.as_str() {
                "any" => true,
                // Where the firmware does not say, the first with a carrier stands in.
                "booted" => booted.is_none_or(|mac| mac[..] == *card.own_mac()),
                other => match other.strip_prefix("driver:") {
                    Some(wanted) => driver(&card.name).replace('-', "_") == wanted.replace('-', "_"),
                    None => parse_mac(other).is_some_and(|mac| mac[..] == *card.own_mac()),
                },
            };
            if named && !taken.contains(&card.index) && chosen.iter().all(|other| other.index != card.index) {
                chosen.push(card.clone());
            }
        }
    }
    if link.kind == LinkKind::Card {
        let best = chosen.iter().position(|card| card.carrier).unwrap_or(0);
        chosen = chosen.into_iter().skip(best).take(1).collect();
    }
    chosen
}

/// Makes the links of a section on cleared cards, and gives them their static addresses. With each configured link comes
/// the kernel's.
pub async fn build(netlink: &mut Netlink, watch: &mut Watch, section: &Section) -> Result<Vec<(LinkConfig, Link)>> {
    let cards = cards(netlink, watch).await?;
    let mut taken = HashSet::new();
    let mut made: Vec<(LinkConfig, Link)> = Vec::new();
    for config in &section.link {
        let members = choose(config, &cards, &taken, driver, bootcard::mac());
        taken.extend(members.iter().map(|card| card.index));
        let no_card = || AgentError::NoCard { link: config.name.clone(), wanted: config.card.join(", ") };
        let link = match config.kind {
            LinkKind::Card => members.into_iter().next().ok_or_else(no_card)?,
            LinkKind::Vlan => {
                let parent = made.iter().find(|(other, _)| other.name == config.on);
                let (_, parent) = parent.expect("the configuration was checked: it stands before its VLAN");
                netlink.add_vlan(&config.name, parent, config.id)?;
                netlink.link(&config.name)?
            }
            LinkKind::ActiveBackup | LinkKind::Lacp => {
                if members.is_empty() {
                    return Err(no_card());
                }
                let lacp = config.kind == LinkKind::Lacp;
                netlink.add_bond(&config.name, if lacp { Bonding::Lacp } else { Bonding::ActiveBackup })?;
                let bond = netlink.link(&config.name)?;
                for card in &members {
                    netlink.set(card, false)?;
                    netlink.enslave(card, &bond)?;
                    netlink.set(card, true)?;
                }
                netlink.link(&config.name)?
            }
        };
        if config.mtu > 0 {
            netlink.set_mtu(&link, config.mtu)?;
        }
        listen_to_routers(&link.name, config.slaac || config.dhcp6, config.slaac);
        netlink.set(&link, true)?;
        for (ip, prefix) in config.address.iter().filter_map(|text| parse_address(text)) {
            netlink.add_address(&link, &ip, prefix)?;
        }
        for gateway in &config.gateway {
            netlink.default_route(&link, gateway)?;
        }
        made.push((config.clone(), link));
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_chosen_by_what_is_painted_on_them() {
        let card = |index: u32, carrier| Link {
            index,
            name: format!("eth{index}"),
            ethernet: true,
            carrier,
            mac: vec![2, 0, 0, 0, 0, 9],
            permanent_mac: vec![2, 0, 0, 0, 0, u8::try_from(index).unwrap()],
            ..Link::default()
        };
        let cards = [card(1, false), card(2, true), card(3, true)];
        let driver = |name: &str| if name == "eth3" { "mlx5-core".to_owned() } else { "igb".to_owned() };
        let find = |kind, names: &[&str], taken: &[u32], booted| -> Vec<u32> {
            let text = serde_json::json!({ "name": "x", "kind": kind, "card": names });
            let link: LinkConfig = serde_json::from_value(text).unwrap();
            let taken = taken.iter().copied().collect();
            choose(&link, &cards, &taken, driver, booted).into_iter().map(|card| card.index).collect()
        };
        assert_eq!(find("lacp", &["any"], &[], None), [1, 2, 3]);
        assert_eq!(find("lacp", &["any"], &[2], None), [1, 3]);
        assert_eq!(find("active-backup", &["driver:mlx5_core", "02:00:00:00:00:01"], &[], None), [3, 1]);
        assert_eq!(find("card", &["any"], &[], None), [2], "the first with a carrier");
        assert_eq!(find("card", &["02:00:00:00:00:01"], &[], None), [1], "it was named: without one too");
        assert_eq!(find("card", &["booted"], &[], Some([2, 0, 0, 0, 0, 3])), [3]);
        assert_eq!(find("card", &["booted"], &[], Some([2, 0, 0, 0, 0, 7])), Vec::<u32>::new());
        assert_eq!(find("card", &["booted"], &[], None), [2]);
    }
}
