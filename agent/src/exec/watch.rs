//! When the guard is asked for a sign of life, and when it is replaced: a pure step, `event(self, event, now) → (self,
//! actions)`.
//!
//! A guard that is idle is asked once a second. From the moment something is executed it is asked every 30 ms, and two
//! times without an answer end it: a stopped guard holds no program longer than 100 ms before its replacement starts.

/// Milliseconds of a clock that only goes forward.
pub type Millis = u64;

/// Between signs of life while programs are executed.
const BUSY_MS: Millis = 30;
/// And while none are.
const IDLE_MS: Millis = 1_000;
/// Times without an answer. More than one: whoever asks may itself have been held up.
const MISSED: u8 = 2;
/// A start takes milliseconds; one that takes so long failed.
const START_MS: Millis = 2_000;
/// A guard is replaced at once if it lived so long, or the one before did; others after a pause that doubles.
const LIVED_MS: Millis = 1_000;
const PAUSES_MS: std::ops::RangeInclusive<Millis> = 50..=5_000;
/// While there is no guard, what is asked is answered by policy so often.
const DRAIN_MS: Millis = 50;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The guard is ready.
    Ready,
    /// It gave a sign of life.
    Pong(u32),
    /// It ended, or could not be started; why.
    Died(String),
    /// Something is executed.
    Asked,
    /// Time passed.
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Spawn,
    Kill,
    Ping(u32),
    /// Answer, by policy, what a guard that is gone had read and not answered.
    Orphans,
    /// Answer, by policy, what is asked now: nobody else does.
    Drain,
    Alarm(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Down { until: Millis },
    Starting { since: Millis },
    Up { since: Millis },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    phase: Phase,
    /// Before the next start, if this guard does not live long; none yet: 0.
    pause: Millis,
    /// The sign of life asked for, and how often it was missed.
    ping: Option<(u32, u8)>,
    asked_at: Millis,
    /// When it was last asked for, or missed: steps come more often than that.
    looked_at: Millis,
    busy_until: Millis,
    next: u32,
}

impl Watch {
    pub fn new() -> Self {
        let phase = Phase::Down { until: 0 };
        Self { phase, pause: 0, ping: None, asked_at: 0, looked_at: 0, busy_until: 0, next: 0 }
    }

    pub fn is_up(&self) -> bool {
        match self.phase {
            Phase::Up { .. } => true,
            Phase::Down { .. } | Phase::Starting { .. } => false,
        }
    }

    /// Whether the first program that is executed is to be told as [`Event::Asked`].
    pub fn listens(&self, now: Millis) -> bool {
        self.is_up() && self.ping.is_none() && self.busy_until <= now
    }

    /// [`Event::Tick`] is to come after so many milliseconds, if nothing else does.
    pub fn wait(&self, now: Millis) -> Millis {
        match self.phase {
            Phase::Down { until } => until.saturating_sub(now).clamp(1, DRAIN_MS),
            Phase::Starting { since } => (since + START_MS).saturating_sub(now).max(1),
            Phase::Up { .. } => (self.looked_at + self.interval(now)).saturating_sub(now).max(1),
        }
    }

    /// Between two looks.
    fn interval(&self, now: Millis) -> Millis {
        if self.ping.is_some() || self.busy_until > now { BUSY_MS } else { IDLE_MS }
    }

    pub fn event(mut self, event: Event, now: Millis) -> (Self, Vec<Action>) {
        let mut out = Vec::new();
        match (event, self.phase.clone()) {
            (Event::Ready, Phase::Starting { .. }) => {
                self.phase = Phase::Up { since: now };
                // Whoever waited for it is asked about now.
                self.busy(now, &mut out);
            }
            (Event::Pong(number), Phase::Up { .. }) => {
                if self.ping.is_some_and(|(asked, _)| asked == number) {
                    self.ping = None;
                }
            }
            (Event::Died(why), Phase::Starting { .. } | Phase::Up { .. }) => self.gone(why, now, &mut out),
            (Event::Asked, Phase::Up { .. }) => self.busy(now, &mut out),
            (Event::Tick, Phase::Up { .. }) => self.tick(now, &mut out),
            (Event::Tick, Phase::Starting { since }) => {
                if now >= since + START_MS {
                    out.push(Action::Kill);
                    self.gone(format!("it was not ready after {START_MS} ms"), now, &mut out);
                }
            }
            (Event::Tick, Phase::Down { until }) => {
                if until <= now {
                    out.push(Action::Spawn);
                    self.phase = Phase::Starting { since: now };
                } else {
                    out.push(Action::Drain);
                }
            }
            // Late words of a guard that was ended.
            (Event::Ready | Event::Pong(_) | Event::Died(_) | Event::Asked, Phase::Down { .. })
            | (Event::Pong(_) | Event::Asked, Phase::Starting { .. })
            | (Event::Ready, Phase::Up { .. }) => {}
        }
        (self, out)
    }

    fn busy(&mut self, now: Millis, out: &mut Vec<Action>) {
        self.busy_until = now + IDLE_MS;
        if self.ping.is_none() {
            self.ask(now, out);
        }
    }

    fn ask(&mut self, now: Millis, out: &mut Vec<Action>) {
        self.next = self.next.wrapping_add(1);
        (self.ping, self.asked_at, self.looked_at) = (Some((self.next, 0)), now, now);
        out.push(Action::Ping(self.next));
    }

    fn tick(&mut self, now: Millis, out: &mut Vec<Action>) {
        if now < self.looked_at + self.interval(now) {
            return;
        }
        match &mut self.ping {
            Some((_, missed)) => {
                self.looked_at = now;
                *missed += 1;
                if *missed >= MISSED {
                    out.push(Action::Kill);
                    let late = now.saturating_sub(self.asked_at);
                    self.gone(format!("it gave no sign of life for {late} ms"), now, out);
                }
            }
            None => self.ask(now, out),
        }
    }

    fn gone(&mut self, why: String, now: Millis, out: &mut Vec<Action>) {
        out.extend([Action::Orphans, Action::Alarm(why)]);
        self.ping = None;
        let lived = match self.phase {
            Phase::Up { since } => now.saturating_sub(since) >= LIVED_MS,
            Phase::Down { .. } | Phase::Starting { .. } => false,
        };
        if lived {
            self.pause = 0;
        }
        if self.pause == 0 {
            out.push(Action::Spawn);
            self.phase = Phase::Starting { since: now };
        } else {
            out.push(Action::Drain);
            self.phase = Phase::Down { until: now + self.pause };
        }
        if !lived {
            self.pause = (self.pause * 2).clamp(*PAUSES_MS.start(), *PAUSES_MS.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guard that is up since `now`, and gave its first sign of life.
    fn up(now: Millis) -> Watch {
        let (watch, actions) = Watch::new().event(Event::Tick, now);
        assert_eq!(actions, [Action::Spawn]);
        let (watch, actions) = watch.event(Event::Ready, now);
        assert_eq!(actions, [Action::Ping(1)]);
        watch.event(Event::Pong(1), now).0
    }

    /// What a guard that gives no sign of life is answered with, and when; ticks come when they are asked for.
    fn silent(mut watch: Watch, mut now: Millis) -> (Millis, Vec<Action>) {
        loop {
            now += watch.wait(now);
            let (next, actions) = watch.event(Event::Tick, now);
            if actions.contains(&Action::Kill) {
                return (now, actions);
            }
            watch = next;
        }
    }

    #[test]
    fn a_stopped_guard_is_replaced_within_100_ms_of_the_next_execution() {
        // Idle for ten seconds, answering.
        let mut watch = up(0);
        let mut pings = 0;
        for now in (0..10_000).step_by(10) {
            // More often than it is to be asked: what else there is to do makes steps, too.
            let (next, actions) = watch.event(Event::Tick, now);
            watch = next;
            for action in actions {
                let Action::Ping(number) = action else { panic!("{action:?} at {now}") };
                pings += 1;
                watch = watch.event(Event::Pong(number), now).0;
            }
        }
        assert!((38..=46).contains(&pings), "for a second each 30 ms, then once a second: {pings}");
        // It is stopped; something is executed.
        assert!(watch.listens(10_000));
        let (watch, actions) = watch.event(Event::Asked, 10_000);
        assert!(matches!(actions[..], [Action::Ping(_)]), "{actions:?}");
        let (at, actions) = silent(watch, 10_000);
        assert!(at <= 10_100, "{at}");
        let [Action::Kill, Action::Orphans, Action::Alarm(words), Action::Spawn] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert_eq!(words, "it gave no sign of life for 60 ms");
    }

    #[test]
    fn a_stopped_guard_is_noticed_without_anything_executed() {
        let watch = Watch { busy_until: 0, ..up(0) };
        let (at, _) = silent(watch, 0);
        assert!(at <= 1_100, "{at}");
    }

    #[test]
    fn a_guard_that_dies_again_and_again_is_started_ever_later_and_meanwhile_policy_answers() {
        let (watch, actions) = up(0).event(Event::Died("signal 9".into()), 10);
        assert_eq!(actions, [Action::Orphans, Action::Alarm("signal 9".into()), Action::Spawn], "once at once");
        let (mut watch, mut now) = (watch, 10);
        for pause in [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let (next, actions) = watch.event(Event::Died("signal 9".into()), now);
            assert_eq!(actions, [Action::Orphans, Action::Alarm("signal 9".into()), Action::Drain]);
            watch = next;
            let began = now;
            loop {
                assert!(watch.wait(now) <= DRAIN_MS);
                now += watch.wait(now);
                let (next, actions) = watch.event(Event::Tick, now);
                watch = next;
                if actions == [Action::Spawn] {
                    break;
                }
                assert_eq!(actions, [Action::Drain]);
            }
            assert_eq!(now - began, pause);
        }
        let (watch, actions) = watch.event(Event::Ready, now);
        assert_eq!(actions.len(), 1);
        let (watch, actions) = watch.event(Event::Died("signal 9".into()), now + LIVED_MS);
        assert_eq!(actions.last(), Some(&Action::Spawn), "one that lived is replaced at once");
        let (_, actions) = watch.event(Event::Tick, now + LIVED_MS + START_MS);
        assert_eq!(actions[0], Action::Kill, "a start that hangs is one that failed");
    }

    #[test]
    fn late_words_of_a_guard_that_is_gone_change_nothing() {
        let young = Watch { pause: 50, ..up(0) };
        let (watch, _) = young.event(Event::Died(String::new()), 1);
        for event in [Event::Ready, Event::Pong(1), Event::Died(String::new()), Event::Asked] {
            assert_eq!(watch.clone().event(event, 2), (watch.clone(), Vec::new()));
        }
    }
}
