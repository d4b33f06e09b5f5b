//! The host's clock, as far as it may make the server forget something: one that jumped ahead and is set right again made it
//! forget nothing.

use kiln_fleet::Millis;
use std::time::{Duration, Instant};

/// By so much it may be ahead of the time that passed: clocks are set now and then.
const SLACK_MS: Millis = 60 * 60_000;
/// One that stays ahead for so long is right: it was behind before, or the host slept.
const STAYS: Duration = Duration::from_secs(24 * 3_600);

/// What the clock showed, against the time that passed since the server started.
#[derive(Debug, Default)]
pub(super) struct Steady {
    /// What it showed when it was believed last, and when that was.
    believed: Option<(Millis, Instant)>,
    /// Since when it is ahead of that.
    ahead: Option<Instant>,
}

impl Steady {
    /// The time by which something may be forgotten: never later than `now`, which the host's clock shows at this instant.
    pub(super) fn time(&mut self, now: Millis, at: Instant) -> Millis {
        if let Some((before, since)) = self.believed {
            let passed = Millis::try_from(at.saturating_duration_since(since).as_millis()).unwrap_or(Millis::MAX);
            let expected = before.saturating_add(passed);
            if now > expected.saturating_add(SLACK_MS) {
                let ahead = *self.ahead.get_or_insert(at);
                if at.saturating_duration_since(ahead) < STAYS {
                    return expected;
                }
            }
        }
        (self.believed, self.ahead) = (Some((now, at)), None);
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Millis = 3_600_000;
    const YEAR: Millis = 365 * 24 * HOUR;

    #[test]
    fn a_clock_that_jumps_ahead_is_believed_once_it_stays_there() {
        let (mut steady, start) = (Steady::default(), Instant::now());
        let at = |hours: u64| start + Duration::from_secs(hours * 3_600);
        let first = 50 * YEAR;
        assert_eq!(steady.time(first, at(0)), first);
        // By less than an hour: it was set.
        assert_eq!(steady.time(first + 2 * HOUR, at(1)), first + 2 * HOUR);
        // For one look, or some hours: what passed counts, and behind it the clock that is right again.
        for hours in 2..10 {
            assert_eq!(steady.time(first + YEAR, at(hours)), first + (hours + 1) * HOUR);
        }
        assert_eq!(steady.time(first + 11 * HOUR, at(10)), first + 11 * HOUR);
        // Ahead again, it begins anew; after a day it is the time.
        for hours in 11..35 {
            assert_eq!(steady.time(first + YEAR, at(hours)), first + (hours + 1) * HOUR, "{hours}");
        }
        assert_eq!(steady.time(first + YEAR, at(35)), first + YEAR);
        // Back is believed at once: nothing is forgotten by that.
        assert_eq!(steady.time(first, at(36)), first);
    }
}
