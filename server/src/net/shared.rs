//! Addresses behind which are many machines: a NAT, a cache, a proxy. What one address may have at once does not bind
//! them; what all may have together does.

use std::net::IpAddr;

/// Most networks that can be named: whoever needs more has one network.
const MOST: usize = 8;

/// Networks of such addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shared([Option<(IpAddr, u8)>; MOST]);

impl Shared {
    /// Reads `192.0.2.0/24`, `2001:db8::/32` or an address by itself.
    pub fn parse(texts: &[String]) -> Result<Self, String> {
        if texts.len() > MOST {
            return Err(format!("{} networks; at most {MOST} can be named", texts.len()));
        }
        let mut networks = [None; MOST];
        for (place, text) in networks.iter_mut().zip(texts) {
            let (ip, prefix) = text.split_once('/').unwrap_or((text, ""));
            let bad = || format!("{text:?}: expected a network, as 192.0.2.0/24");
            let ip: IpAddr = ip.parse().map_err(|_| bad())?;
            let most = if ip.is_ipv4() { 32 } else { 128 };
            let prefix = if text.contains('/') { prefix.parse().map_err(|_| bad())? } else { most };
            *place = Some((ip, prefix)).filter(|_| prefix <= most);
            if place.is_none() {
                return Err(bad());
            }
        }
        Ok(Self(networks))
    }

    /// Whether an address is of one of the networks.
    pub fn contains(&self, address: IpAddr) -> bool {
        let bits = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => u128::from(ip.to_bits()) << 96,
            IpAddr::V6(ip) => ip.to_bits(),
        };
        let address = address.to_canonical();
        self.0.iter().flatten().any(|(network, prefix)| {
            let differ = bits(*network) ^ bits(address);
            network.is_ipv4() == address.is_ipv4() && differ.checked_shr(128 - u32::from(*prefix)).unwrap_or(0) == 0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_hold_their_addresses() {
        let texts = ["192.0.2.0/24", "198.51.100.7", "2001:db8::/32"].map(str::to_owned);
        let shared = Shared::parse(&texts).unwrap();
        for (address, expected) in [
            ("192.0.2.255", true),
            ("192.0.3.0", false),
            ("198.51.100.7", true),
            ("198.51.100.8", false),
            ("::ffff:192.0.2.1", true),
            ("2001:db8:ffff::1", true),
            ("2001:db9::1", false),
        ] {
            assert_eq!(shared.contains(address.parse().unwrap()), expected, "{address}");
        }
        assert!(!Shared::default().contains("192.0.2.1".parse().unwrap()));
        assert!(Shared::parse(&["0.0.0.0/0".to_owned()]).unwrap().contains("10.0.0.1".parse().unwrap()));
        for bad in ["x", "192.0.2.0/33", "192.0.2.0/", "::/129", ""] {
            assert!(Shared::parse(&[bad.to_owned()]).is_err(), "{bad}");
        }
        assert!(Shared::parse(&vec!["10.0.0.1".to_owned(); 9]).is_err());
    }
}
