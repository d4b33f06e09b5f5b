//! Until when whoever wants to execute may wait for a verdict. Pure: the time is given.

use super::ANSWER_MS;
use std::time::{Duration, Instant};

/// Longest sleep of a guard for whom nobody waits.
const NOBODY_MS: u64 = 60_000;

/// When somebody who asks now is answered at the latest.
pub fn due(asked: Instant) -> Instant {
    asked + Duration::from_millis(ANSWER_MS)
}

/// Whether the time is up.
pub fn is_up(due: Instant, now: Instant) -> bool {
    due <= now
}

/// So many milliseconds the guard may sleep before the first of those who wait is due; a part of one counts as one, else it would
/// wake too early, again and again.
pub fn sleep_ms(due: impl Iterator<Item = Instant>, now: Instant) -> u64 {
    due.min().map_or(NOBODY_MS, |due| {
        let left = due.saturating_duration_since(now);
        u64::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guard that nothing else wakes, by a clock of the test's own: when each is answered, and how often it woke for that.
    fn guard(asked_us: &[u64]) -> (Vec<Duration>, usize) {
        let begun = Instant::now();
        let asked: Vec<Instant> = asked_us.iter().map(|us| begun + Duration::from_micros(*us)).collect();
        let mut answered: Vec<Option<Instant>> = vec![None; asked.len()];
        let (mut now, mut wakes) = (begun, 0);
        while answered.contains(&None) {
            let open =
                || asked.iter().zip(&answered).filter(|(_, answered)| answered.is_none()).map(|(asked, _)| *asked);
            // Who asks wakes it.
            let next = open().filter(|asked| *asked > now).min();
            let waiting = open().filter(|asked| *asked <= now).map(due);
            let sleep = now + Duration::from_millis(sleep_ms(waiting, now));
            now = next.map_or(sleep, |next| next.min(sleep));
            wakes += 1;
            for (asked, answered) in asked.iter().zip(&mut answered) {
                if *asked <= now && answered.is_none() && is_up(due(*asked), now) {
                    *answered = Some(now);
                }
            }
        }
        let waited = answered.into_iter().zip(&asked).map(|(answered, asked)| answered.unwrap() - *asked);
        (waited.collect(), wakes)
    }

    #[test]
    fn everybody_is_answered_when_due_and_nobody_is_looked_at_in_vain() {
        let limit = Duration::from_millis(ANSWER_MS);
        for asked in [&[0][..], &[0, 0, 0], &[1, 2, 3, 999, 1000, 1001], &[0, 99_999, 100_000, 100_001, 250_000]] {
            let (waited, wakes) = guard(asked);
            let in_time = |waited: &Duration| (limit..limit + Duration::from_millis(1)).contains(waited);
            assert!(waited.iter().all(in_time), "{asked:?}: {waited:?}");
            assert!(wakes <= 2 * asked.len(), "{asked:?}: woke {wakes} times");
        }
    }

    #[test]
    fn a_guard_that_was_held_up_does_not_sleep_when_somebody_is_late() {
        let now = Instant::now();
        let late = due(now);
        assert!(is_up(late, late) && !is_up(late, late.checked_sub(Duration::from_nanos(1)).unwrap()));
        let later = late + Duration::from_secs(5);
        assert_eq!(sleep_ms([due(later), late].into_iter(), later), 0);
        assert_eq!(sleep_ms([late].into_iter(), late.checked_sub(Duration::from_nanos(1)).unwrap()), 1);
        assert_eq!(sleep_ms(std::iter::empty(), later), NOBODY_MS);
    }
}
