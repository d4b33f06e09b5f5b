//! Where machines were heard lately, by the relays that the site trusts. In memory only: a server that starts again hears them
//! at their next boot.

use super::{Control, now_ms};
use kiln_fleet::Millis;
use kiln_netboot::Mac;
use std::collections::BTreeMap;

/// For so long it counts: from the firmware's first packet to the agent's report.
const FRESH_MS: Millis = 5 * 60_000;
/// Ethernet addresses that are remembered. With so many fresh ones further ones are not: a flood takes nothing away.
const MOST: usize = 4096;
/// Of one position: the oldest goes, so that one port takes no other's room.
const MOST_AT_ONE: usize = 16;

/// By Ethernet address.
#[derive(Debug, Default)]
pub(crate) struct Positions(BTreeMap<String, (String, Millis)>);

impl Positions {
    /// Whether that is news.
    fn note(&mut self, mac: String, position: &str, now: Millis) -> bool {
        if self.0.get(&mac).is_none_or(|(before, _)| before != position) {
            self.make_room_at(position);
        }
        if self.0.len() >= MOST {
            self.0.retain(|_, (_, at)| is_fresh(*at, now));
        }
        if self.0.len() >= MOST && !self.0.contains_key(&mac) {
            return false;
        }
        let before = self.0.insert(mac, (position.to_owned(), now));
        before.is_none_or(|(old, _)| old != position)
    }

    fn make_room_at(&mut self, position: &str) {
        let here = || self.0.iter().filter(move |(_, (place, _))| place == position);
        if here().count() < MOST_AT_ONE {
            return;
        }
        let oldest = here().min_by_key(|(_, (_, at))| *at).map(|(mac, _)| mac.clone());
        if let Some(mac) = oldest {
            self.0.remove(&mac);
        }
    }

    /// Where a machine with these addresses was heard; none: nowhere, or at two places.
    pub(crate) fn of(&self, macs: &[String], now: Millis) -> Option<&str> {
        let heard = macs.iter().filter_map(|mac| self.0.get(mac));
        let mut places = heard.filter(|(_, at)| is_fresh(*at, now)).map(|(place, _)| place.as_str());
        let first = places.next()?;
        places.all(|place| place == first).then_some(first)
    }
}

fn is_fresh(at: Millis, now: Millis) -> bool {
    now < at.saturating_add(FRESH_MS)
}

impl Control {
    /// A trusted relay says where this machine's packet entered the network.
    pub fn heard_at(&self, mac: Mac, position: &str) {
        let is_new = self.lock().positions.note(mac.to_string(), position, now_ms());
        if is_new {
            tracing::info!(%mac, "is heard at {position:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_counts_for_minutes_and_two_places_are_none() {
        let mut positions = Positions::default();
        let mac = |n: usize| format!("02:00:00:00:{:02x}:{:02x}", n / 256, n % 256);
        positions.note(mac(1), "here", 1_000);
        assert_eq!(positions.of(&[mac(2), mac(1)], 1_000 + FRESH_MS - 1), Some("here"));
        assert_eq!(positions.of(&[mac(1)], 1_000 + FRESH_MS), None);
        positions.note(mac(2), "there", 1_000);
        assert_eq!(positions.of(&[mac(1), mac(2)], 2_000), None, "which of two it is nobody knows");
        positions.note(mac(2), "here", 1_500);
        assert_eq!(positions.of(&[mac(1), mac(2)], 2_000), Some("here"));
        // A flood at one port takes room from that port alone.
        for n in 0..2 * MOST {
            positions.note(mac(n + 16), "flood", 2_000 + n as Millis / 100);
        }
        assert_eq!(positions.0.len(), 2 + MOST_AT_ONE);
        assert_eq!(positions.of(&[mac(2 * MOST + 15)], 3_000), Some("flood"), "the newest there");
        assert_eq!(positions.of(&[mac(1), mac(2)], 3_000), Some("here"));
        // A flood from everywhere: who was heard before is not pushed out, and may be heard anew.
        for n in 0..2 * MOST {
            positions.note(mac(n + 16), &format!("flood {n}"), 2_000);
        }
        assert_eq!(positions.0.len(), MOST);
        positions.note(mac(1), "moved", 3_000);
        assert_eq!(positions.of(&[mac(1)], 3_000), Some("moved"));
        positions.note(mac(3), "later", 2_000 + FRESH_MS);
        assert_eq!(positions.of(&[mac(3)], 2_000 + FRESH_MS), Some("later"), "what is stale makes room");
    }
}
