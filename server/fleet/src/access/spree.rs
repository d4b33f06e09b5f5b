//! How many machines one person changes alone in an hour.

use crate::Millis;
use std::collections::{BTreeMap, BTreeSet};

/// So far back it is counted.
const WINDOW_MS: Millis = 3_600_000;
/// Names in changes that are remembered; beyond, everybody needs a second person.
const KEPT: usize = 10_000;

/// Which machines each person changed within the last hour.
#[derive(Debug, Clone, Default)]
pub struct Spree {
    /// By who did it, and the machine.
    changed: BTreeMap<(String, String), Change>,
}

#[derive(Debug, Clone)]
struct Change {
    at: Millis,
    /// Who can act, alone, as whoever did it; that one too.
    who: BTreeSet<String>,
}

impl Spree {
    /// Whether `by` may change this machine, with `alone` different machines in an hour; if so, it counts for each of `who`: itself
    /// and who can act as it, alone. What counts against it is what was done by itself, by those that it can act as, and by one of
    /// `who` under that one's own name; not what another did whose token has the same maker.
    pub fn take(&mut self, by: &str, who: &BTreeSet<String>, machine: &str, alone: usize, now: Millis) -> bool {
        self.changed.retain(|_, change| change.at.saturating_add(WINDOW_MS) > now);
        let spent = |counts: &dyn Fn(&str, &Change) -> bool| {
            let others = self.changed.iter().filter(|((did, what), change)| what != machine && counts(did, change));
            others.map(|((_, what), _)| what).collect::<BTreeSet<_>>().len() >= alone
        };
        if spent(&|_, change| change.who.contains(by)) || who.iter().any(|maker| spent(&|did, _| did == maker)) {
            return false;
        }
        let key = (by.to_owned(), machine.to_owned());
        let kept: usize =
            self.changed.iter().filter(|(other, _)| **other != key).map(|(_, change)| change.who.len()).sum();
        if kept + who.len() > KEPT {
            return false;
        }
        self.changed.insert(key, Change { at: now, who: who.clone() });
        true
    }
}
