//! Differences that appear and go are events of the machine.

use super::Comparison;
use crate::Millis;
use crate::condition::EventAt;
use crate::event::Action;
use crate::machine::Machine;
use crate::step::save;

/// Kind of its events.
const KIND: &str = "expected";

impl Machine {
    /// Takes a comparison in, and says what is new in it.
    pub(crate) fn compared(&mut self, comparison: Option<Comparison>, now: Millis, out: &mut Vec<Action>) {
        if self.comparison == comparison {
            return;
        }
        let before = self.comparison.take().unwrap_or_default();
        let after = comparison.clone().unwrap_or_default();
        self.comparison = comparison;
        save(out);
        let mut say = |alarm: bool, text: String| {
            self.condition.keep(EventAt { at: now, kind: KIND.into(), alarm, text }, out);
        };
        if let Some(entry) = after.entry.as_ref().filter(|entry| before.entry.as_ref() != Some(entry)) {
            let place = if after.expected.is_empty() { String::new() } else { format!(", {}", after.expected) };
            say(false, format!("is {entry} of the list{place}"));
        }
        for new in after.differences.iter().filter(|text| !before.differences.contains(text)) {
            say(true, new.clone());
        }
        if self.comparison.is_none() {
            return; // there is no list any more: nothing was put right
        }
        for old in before.differences.iter().filter(|text| !after.differences.contains(text)) {
            say(false, format!("no more: {old}"));
        }
    }
}
