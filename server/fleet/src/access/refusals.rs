//! What one person is refused is written down one by one only up to a point: whoever holds a token, a viewer's too, could fill
//! the audit log with calls that it may not make. What comes thicker is counted, and the count is written.

use crate::Millis;
use std::collections::BTreeMap;

/// So long a person's refusals are counted together.
const WINDOW_MS: Millis = 60_000;
/// So many of them are written one by one.
const WRITTEN: u64 = 20;
/// Persons who are counted apart.
const PERSONS: usize = 4_096;
/// All whom there was no room for. No credential's holder is called so.
const OTHERS: &str = "others";

/// Who was refused how often within the last minute.
#[derive(Debug, Clone, Default)]
pub struct Refusals {
    persons: BTreeMap<String, Window>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    since: Millis,
    count: u64,
}

impl Refusals {
    /// One more. Whether it is written by itself.
    pub fn take(&mut self, who: &str, now: Millis) -> bool {
        let known = self.persons.contains_key(who) || self.persons.len() < PERSONS;
        let who = if known { who } else { OTHERS };
        let window = self.persons.entry(who.to_owned()).or_insert(Window { since: now, count: 0 });
        window.count = window.count.saturating_add(1);
        window.count <= WRITTEN
    }

    /// Whose minute is over, and how many of that one's refusals were not written by themselves; none: everybody's is. A minute
    /// that began later than now ends, too: the clock went back.
    pub fn over(&mut self, now: Option<Millis>) -> Vec<(String, u64)> {
        let mut more = Vec::new();
        self.persons.retain(|who, window| {
            let goes_on = now.is_some_and(|now| (window.since..window.since.saturating_add(WINDOW_MS)).contains(&now));
            if !goes_on && window.count > WRITTEN {
                more.push((who.clone(), window.count - WRITTEN));
            }
            goes_on
        });
        more
    }
}
