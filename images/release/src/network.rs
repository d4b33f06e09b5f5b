//! How machines are connected: part of `site.json`, signed by the release signers, and the default of a boot image.
//!
//! It is data: cards, bonds, VLANs and addresses, no commands. The first section that matches a machine is the one it
//! uses; a machine that none matches asks every card by DHCPv4 and listens for IPv6 routers.

use crate::error::FormatError;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Most sections of a configuration.
const SECTIONS: usize = 1024;
/// Most links of a section, members of a bond, addresses of a link: a section is kept in an EFI variable.
const EACH: usize = 8;
/// The longest name of a link that Linux has.
const NAME: usize = 15;

/// A versioned network configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// Grows with each change, from 1. A machine on which a version failed waits for a higher one.
    pub version: u64,
    /// The first that matches counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub section: Vec<Section>,
}

/// Which machines, and how they are connected. Lists that are empty match every machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// Role names; before its first assignment a machine has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub role: Vec<String>,
    /// SMBIOS UUIDs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub machine: Vec<String>,
    /// MAC addresses of any of its cards, `52:54:00:00:00:01`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mac: Vec<String>,
    /// Its links, each after those it stands on. None: every card by itself, as without a configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub link: Vec<LinkConfig>,
    /// Base URLs of artifacts, before those of the boot image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub http_urls: Vec<String>,
    /// Base URLs of the agent API, before those of the boot image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub agent_urls: Vec<String>,
}

/// What a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// A network card: the first that one of `card` names.
    Card,
    /// All cards that `card` names, as one: one works, the others stand by.
    ActiveBackup,
    /// All cards that `card` names, as one, by LACP with the switch.
    Lacp,
    /// A tagged network on another link.
    Vlan,
}

/// A link and its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkConfig {
    /// What it is called. Of a card it is only what other links call it.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// Of cards and bonds: a MAC address, `driver:NAME`, `booted` (the card the firmware booted from) or `any`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub card: Vec<String>,
    /// Of a VLAN: the link it is on.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub on: String,
    /// Of a VLAN: its number.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub id: u16,
    /// Maximum transmission unit; 0: the kernel's.
    #[serde(default, skip_serializing_if = "is_zero_mtu")]
    pub mtu: u32,
    /// Static addresses with prefix: `10.0.0.7/24`, `2001:db8::7/64`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub address: Vec<String>,
    /// Default routers, one of each family at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateway: Vec<IpAddr>,
    /// Name servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// Domain to search.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// An address by DHCPv4.
    #[serde(default, skip_serializing_if = "is_false")]
    pub dhcp4: bool,
    /// An address by router advertisements.
    #[serde(default, skip_serializing_if = "is_false")]
    pub slaac: bool,
    /// An address by DHCPv6.
    #[serde(default, skip_serializing_if = "is_false")]
    pub dhcp6: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's form
fn is_zero(n: &u16) -> bool {
    *n == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's form
fn is_zero_mtu(n: &u32) -> bool {
    *n == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's form
fn is_false(flag: &bool) -> bool {
    !flag
}

/// `10.0.0.7/24`, taken apart.
pub fn parse_address(text: &str) -> Option<(IpAddr, u8)> {
    let (ip, prefix) = text.split_once('/')?;
    let ip: IpAddr = ip.parse().ok()?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.parse().ok().filter(|prefix| (1..=most).contains(prefix))?;
    (!ip.is_unspecified() && !ip.is_multicast() && !ip.is_loopback()).then_some((ip, prefix))
}

/// `52:54:00:00:00:01`, lower case or not.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn is_card(text: &str) -> bool {
    let driver = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    matches!(text, "booted" | "any") || text.strip_prefix("driver:").is_some_and(driver) || parse_mac(text).is_some()
}

fn is_link_name(name: &str) -> bool {
    (1..=NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
        && !matches!(name, "." | ".." | "lo" | "all" | "default")
}

fn is_domain(name: &str) -> bool {
    name.len() <= 253 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-".contains(&b))
}

fn is_url(url: &str, schemes: &[&str]) -> bool {
    let rest = schemes.iter().find_map(|scheme| url.strip_prefix(scheme));
    rest.is_some_and(|rest| !rest.is_empty() && !rest.ends_with('/') && rest.bytes().all(|b| b.is_ascii_graphic()))
}

struct Check<'a>(&'a str);

impl Check<'_> {
    fn that(&self, holds: bool, got: &dyn std::fmt::Display, reason: &'static str) -> Result<(), FormatError> {
        if holds {
            return Ok(());
        }
        let got = if self.0.is_empty() { got.to_string() } else { format!("link {}: {got}", self.0) };
        Err(FormatError::BadField { what: "network configuration", field: "network", got, reason })
    }
}

impl NetworkConfig {
    /// Checks every field, and that each section's links stand on each other.
    pub fn check(&self) -> Result<(), FormatError> {
        let check = Check("");
        check.that(self.version > 0, &self.version, "versions are numbered from 1")?;
        check.that(self.section.len() <= SECTIONS, &self.section.len(), "at most 1024 sections")?;
        self.section.iter().try_for_each(Section::check)
    }

    /// How a machine is connected; none of the sections may be for it.
    pub fn section_of(&self, role: Option<&str>, machine: &str, macs: &[String]) -> Option<&Section> {
        let same = |list: &[String], one: &str| list.iter().any(|other| other.eq_ignore_ascii_case(one));
        self.section.iter().find(|section| {
            (section.role.is_empty() || role.is_some_and(|role| section.role.iter().any(|other| other == role)))
                && (section.machine.is_empty() || same(&section.machine, machine))
                && (section.mac.is_empty() || macs.iter().any(|mac| same(&section.mac, mac)))
        })
    }
}

impl Section {
    fn check(&self) -> Result<(), FormatError> {
        let check = Check("");
        for list in [&self.role, &self.machine, &self.mac] {
            check.that(list.len() <= SECTIONS, &list.len(), "a section names at most 1024 roles, machines or cards")?;
        }
        for mac in &self.mac {
            check.that(parse_mac(mac).is_some(), mac, "a MAC address is as 52:54:00:00:00:01")?;
        }
        check.that(self.link.len() <= EACH, &self.link.len(), "a section has at most 8 links")?;
        for (urls, schemes) in [(&self.http_urls, &["http://", "https://"][..]), (&self.agent_urls, &["https://"][..])]
        {
            check.that(urls.len() <= EACH, &urls.len(), "at most 8 URLs")?;
            for url in urls {
                check.that(is_url(url, schemes), url, "http(s)://HOST[:PORT][/PATH] without a slash at its end")?;
            }
        }
        let mut gateways = Vec::new();
        for (at, link) in self.link.iter().enumerate() {
            link.check(&self.link[..at])?;
            for gateway in &link.gateway {
                let first = gateways.iter().all(|other: &bool| *other != gateway.is_ipv4());
                Check(&link.name).that(first, gateway, "a second default router of this family")?;
                gateways.push(gateway.is_ipv4());
            }
        }
        let addressed = |l: &LinkConfig| l.dhcp4 || l.dhcp6 || l.slaac || !l.address.is_empty();
        let some = self.link.is_empty() || self.link.iter().any(addressed);
        check.that(some, &"every link", "no link would get an address: address, dhcp4, slaac or dhcp6")
    }
}

impl LinkConfig {
    fn check(&self, before: &[Self]) -> Result<(), FormatError> {
        let check = Check(&self.name);
        check.that(is_link_name(&self.name), &self.name, "1 to 15 letters, digits, `-`, `_` and `.`")?;
        check.that(before.iter().all(|link| link.name != self.name), &self.name, "a name that is there twice")?;
        for list in [self.card.len(), self.address.len(), self.gateway.len(), self.dns.len()] {
            check.that(list <= EACH, &list, "at most 8 cards, addresses, routers and name servers")?;
        }
        let form = "a card is a MAC address, driver:NAME, booted or any";
        self.card.iter().try_for_each(|card| check.that(is_card(card), card, form))?;
        if self.kind == LinkKind::Vlan {
            check.that(self.card.is_empty(), &"card", "a VLAN is `on` another link")?;
            check.that((1..=4094).contains(&self.id), &self.id, "a VLAN's id is from 1 to 4094")?;
            let parent = before.iter().any(|link| link.name == self.on && link.kind != LinkKind::Vlan);
            check.that(parent, &self.on, "a VLAN is `on` a card or bond that stands before it")?;
        } else {
            check.that(
                !self.card.is_empty(),
                &"card",
                "it names no card: a MAC address, driver:NAME, booted or any",
            )?;
            check.that(self.on.is_empty() && self.id == 0, &"on, id", "only of a VLAN")?;
        }
        check.that(self.mtu == 0 || (1280..=9216).contains(&self.mtu), &self.mtu, "an MTU is from 1280 to 9216")?;
        for address in &self.address {
            check.that(parse_address(address).is_some(), address, "an address with its prefix, as 10.0.0.7/24")?;
        }
        for gateway in &self.gateway {
            let reached = self.address.iter().filter_map(|a| parse_address(a)).any(|(ip, prefix)| {
                let bits = |ip: &IpAddr| match ip {
                    IpAddr::V4(ip) => (u128::from(ip.to_bits()) << 96, true),
                    IpAddr::V6(ip) => (ip.to_bits(), false),
                };
                let ((a, family), (b, other)) = (bits(&ip), bits(gateway));
                let link_local = matches!(gateway, IpAddr::V6(ip) if ip.is_unicast_link_local());
                family == other && (link_local || (a ^ b) >> (128 - u32::from(prefix)) == 0)
            });
            check.that(reached, gateway, "a router that none of the link's own addresses reaches")?;
        }
        check.that(is_domain(&self.domain), &self.domain, "a domain has letters, digits, dots and dashes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, kind: LinkKind) -> LinkConfig {
        LinkConfig {
            name: name.into(),
            kind,
            card: Vec::new(),
            on: String::new(),
            id: 0,
            mtu: 0,
            address: Vec::new(),
            gateway: Vec::new(),
            dns: Vec::new(),
            domain: String::new(),
            dhcp4: false,
            slaac: false,
            dhcp6: false,
        }
    }

    fn config() -> NetworkConfig {
        let bond = LinkConfig {
            card: vec!["52:54:00:00:00:01".into(), "driver:mlx5_core".into()],
            ..link("bond0", LinkKind::Lacp)
        };
        let vlan = LinkConfig {
            on: "bond0".into(),
            id: 10,
            address: vec!["10.0.0.7/24".into(), "2001:db8::7/64".into()],
            gateway: vec!["10.0.0.1".parse().unwrap(), "fe80::1".parse().unwrap()],
            ..link("vlan10", LinkKind::Vlan)
        };
        let section = Section { role: vec!["db".into()], link: vec![bond, vlan], ..Section::default() };
        NetworkConfig { version: 3, section: vec![section] }
    }

    #[test]
    fn golden_bytes() {
        let golden = r#"{"version":3,"section":[{"role":["db"],"link":[{"name":"bond0","kind":"lacp","card":["52:54:00:00:00:01","driver:mlx5_core"]},{"name":"vlan10","kind":"vlan","on":"bond0","id":10,"address":["10.0.0.7/24","2001:db8::7/64"],"gateway":["10.0.0.1","fe80::1"]}]}]}"#;
        assert_eq!(serde_json::to_string(&config()).unwrap(), golden);
        let newer = golden.replacen('{', r#"{"added_later":1,"#, 1);
        assert_eq!(serde_json::from_str::<NetworkConfig>(&newer).unwrap(), config());
        config().check().unwrap();
    }

    #[test]
    fn the_first_section_that_matches_is_the_machines() {
        let of = |role: &[&str], machine: &[&str], mac: &[&str]| {
            let list = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
            Section { role: list(role), machine: list(machine), mac: list(mac), ..Section::default() }
        };
        let sections = vec![of(&["db"], &[], &[]), of(&[], &["ID-1"], &["52:54:00:00:00:0A"]), of(&[], &[], &["x"])];
        let config = NetworkConfig { version: 1, section: sections };
        let find = |role, machine, mac: &str| {
            let found = config.section_of(role, machine, &[mac.to_owned()])?;
            config.section.iter().position(|section| section == found)
        };
        assert_eq!(find(Some("db"), "id-1", "52:54:00:00:00:0a"), Some(0));
        assert_eq!(find(Some("web"), "id-1", "52:54:00:00:00:0a"), Some(1), "case does not matter");
        assert_eq!(find(None, "id-1", "52:54:00:00:00:0b"), None, "all of a section's lists must match");
        assert_eq!(find(None, "id-2", "x"), Some(2));
    }

    #[test]
    fn what_cannot_work_is_refused() {
        type Edit = fn(&mut NetworkConfig);
        let cases: [(Edit, &str); 16] = [
            (|c| c.version = 0, "numbered from 1"),
            (|c| c.section[0].link[0].name = "a-name-of-sixteen".into(), "1 to 15 letters"),
            (|c| c.section[0].link[0].name = "../x".into(), "1 to 15 letters"),
            (|c| c.section[0].link[1].name = "bond0".into(), "twice"),
            (|c| c.section[0].link[0].card = vec!["eth0".into()], "driver:NAME"),
            (|c| c.section[0].link[0].card.clear(), "names no card"),
            (|c| c.section[0].link[1].card = vec!["any".into()], "`on` another link"),
            (|c| c.section[0].link[1].id = 4095, "1 to 4094"),
            (|c| c.section[0].link[1].on = "vlan10".into(), "stands before it"),
            (|c| c.section[0].link[0].id = 3, "only of a VLAN"),
            (|c| c.section[0].link[1].address = vec!["10.0.0.7".into()], "with its prefix"),
            (|c| c.section[0].link[1].gateway[0] = "10.0.1.1".parse().unwrap(), "reaches"),
            (|c| c.section[0].link[1].gateway[1] = "10.0.0.2".parse().unwrap(), "second default router"),
            (|c| c.section[0].link[1].address.clear(), "reaches"),
            (|c| c.section[0].link.truncate(1), "no link would get an address"),
            (|c| c.section[0].agent_urls = vec!["http://a".into()], "HOST"),
        ];
        for (number, (edit, reason)) in cases.into_iter().enumerate() {
            let mut config = config();
            edit(&mut config);
            let refused = config.check().unwrap_err().to_string();
            assert!(refused.contains(reason), "{number}: {refused}");
        }
    }

    #[test]
    fn addresses_and_macs() {
        assert_eq!(parse_address("10.0.0.7/24"), Some(("10.0.0.7".parse().unwrap(), 24)));
        for bad in ["10.0.0.7", "10.0.0.7/33", "10.0.0.7/0", "::/64", "ff02::1/64", "127.0.0.1/8", "x/24", "::1/128"] {
            assert_eq!(parse_address(bad), None, "{bad}");
        }
        assert_eq!(parse_mac("52:54:00:00:00:0A"), Some([0x52, 0x54, 0, 0, 0, 10]));
        for bad in ["52:54:00:00:00", "52:54:00:00:00:01:02", "5:254:0:0:0:0", "52-54-00-00-00-01", "+1:54:00:00:00:01"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
