//! How many machines one person changes alone in an hour.

use crate::Millis;
use std::collections::BTreeMap;

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
    /// Whether this person may change this machine alone, with `alone` different machines in an hour; if so, it counts.
    pub fn take(&mut self, who: &str, machine: &str, alone: usize, now: Millis) -> bool {
        self.changed.retain(|_, at| at.saturating_add(WINDOW_MS) > now);
        let key = (who.to_owned(), machine.to_owned());
        let others = self.changed.keys().filter(|(by, what)| by == who && what != machine).count();
        if others >= alone || (self.changed.len() >= KEPT && !self.changed.contains_key(&key)) {
            return false;
        }
        self.changed.insert(key, now);
        true
    }
}
