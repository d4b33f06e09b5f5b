//! How many machines one person changes alone in an hour.

use crate::Millis;
use std::collections::{BTreeMap, BTreeSet};

/// So far back it is counted.
const WINDOW_MS: Millis = 3_600_000;
/// Changes that are remembered; beyond, everybody needs a second person.
const KEPT: usize = 10_000;

/// Which machines each person changed within the last hour.
#[derive(Debug, Clone, Default)]
pub struct Spree {
    changed: BTreeMap<(String, String), Millis>,
}

impl Spree {
    /// Whether whoever has these names, alone, may change this machine, with `alone` different machines in an hour; if so, it counts
    /// for each of them.
    pub fn take(&mut self, who: &BTreeSet<String>, machine: &str, alone: usize, now: Millis) -> bool {
        self.changed.retain(|_, at| at.saturating_add(WINDOW_MS) > now);
        let others = |by: &String| self.changed.keys().filter(|(other, what)| other == by && what != machine).count();
        let spent = who.iter().any(|by| others(by) >= alone);
        let keys: Vec<(String, String)> = who.iter().map(|by| (by.clone(), machine.to_owned())).collect();
        let new = keys.iter().filter(|key| !self.changed.contains_key(*key)).count();
        if spent || self.changed.len() + new > KEPT {
            return false;
        }
        self.changed.extend(keys.into_iter().map(|key| (key, now)));
        true
    }
}
