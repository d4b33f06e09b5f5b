//! How often a wrong credential may be tried. One number for each address or account: when all its failures will be
//! forgiven (the generic cell rate algorithm of ITU-T I.371, of failures only).

use crate::Millis;
use std::collections::BTreeMap;

/// Failures of each address, or of each account. Bounded: whoever comes when there is no room shares one place.
#[derive(Debug, Clone)]
pub struct Attempts {
    /// When the last failure of each is forgiven.
    forgiven: BTreeMap<String, Millis>,
    burst: u64,
    each: Millis,
    most: usize,
}

/// The place of those for whom there was no room. No address or account is called so.
const OTHERS: &str = "";

impl Attempts {
    /// `burst` failures at once, then one in `each` milliseconds; of at most `most` at a time.
    pub fn new(burst: u32, each: Millis, most: usize) -> Self {
        Self { forgiven: BTreeMap::new(), burst: u64::from(burst.max(1)), each: each.max(1), most }
    }

    /// So long nothing of this one is looked at; none: it may try.
    pub fn wait(&self, who: &str, now: Millis) -> Option<Millis> {
        let full = self.forgiven.len() >= self.most && !self.forgiven.contains_key(who);
        let at = *self.forgiven.get(if full { OTHERS } else { who })?;
        // Never longer than for the failures that are counted, also when the clock went back.
        let wait = at.saturating_sub(now).min(self.burst * self.each).saturating_sub((self.burst - 1) * self.each);
        (wait > 0).then_some(wait)
    }

    /// One that failed.
    pub fn failed(&mut self, who: &str, now: Millis) {
        let who = if self.forgiven.contains_key(who) {
            who
        } else {
            if self.forgiven.len() >= self.most {
                self.forgiven.retain(|_, at| *at > now);
            }
            if self.forgiven.len() < self.most { who } else { OTHERS }
        };
        let at = self.forgiven.entry(who.to_owned()).or_insert(now);
        *at = (*at).clamp(now, now.saturating_add(self.burst * self.each)).saturating_add(self.each);
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.forgiven.len()
    }

    /// Nobody failed.
    pub fn is_empty(&self) -> bool {
        self.forgiven.is_empty()
    }
}
