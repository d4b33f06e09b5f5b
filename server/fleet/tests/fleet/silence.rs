//! A firmware that says nothing more: typed failures by the server's clock, taken back by whatever is heard next.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

const PATIENCE: Millis = FIRMWARE_PATIENCE_MS;

/// Approved, its agent never heard, its firmware at the begin of a boot.
fn firmware() -> Story {
    let mut s = Story::new();
    s.then(Event::Asked).approve().is(StateKind::Booting);
    s
}

/// The stages of the newest boot, with the kind of a failure.
fn stages(s: &Story) -> Vec<(Stage, String)> {
    let word = |state: &StageState| match state {
        StageState::Started => "started".into(),
        StageState::Done => "done".into(),
        StageState::Failed(f) => f.kind.clone(),
        StageState::Waiting { reason } => reason.clone(),
    };
    s.m.boots.back().unwrap().stages.iter().map(|r| (r.stage, word(&r.state))).collect()
}

impl Failing for Story {
    fn fails(&mut self, stage: Stage, kind: &str) -> &mut Self {
        assert_eq!(stages(self).last(), Some(&(stage, kind.to_owned())));
        let told = self.last.iter().filter(|a| matches!(a, Action::Stage(s) if s.stage == stage)).count();
        assert!(told == 1 && self.last.contains(&Action::Save), "it is told once: {:?}", self.last);
        assert!(self.m.state.reason.starts_with(stage.label()), "{}", self.m.state.reason);
        assert_eq!(self.m.last_words, self.m.state.reason);
        let deadline = self.m.state.deadline;
        self.wait(PATIENCE / 2).is(StateKind::Booting);
        assert_eq!((&self.last, self.m.state.deadline), (&vec![], deadline), "once, and the state's deadline stays");
        self
    }
}

trait Failing {
    fn fails(&mut self, stage: Stage, kind: &str) -> &mut Self;
}

#[test]
fn an_answer_without_a_download() {
    let mut s = firmware();
    s.wait(PATIENCE / 2).then(Event::Asked);
    assert_eq!(stages(&s), [(Stage::Dhcp, "done".into())]);
    assert_eq!(s.m.due(LIMITS), Some(s.m.boots[0].started + PATIENCE), "a firmware that repeats itself has not moved");
    s.wait(PATIENCE / 2).fails(Stage::Program, NO_DOWNLOAD);
    assert!(s.m.state.reason.contains("UDP 69") && s.m.state.reason.contains("TCP 8080"), "{}", s.m.state.reason);
    s.then(Event::Asked).is(StateKind::Booting);
    assert!(s.m.state.reason.contains("UDP 69"), "still: {}", s.m.state.reason);
    s.then(Event::Downloads(rel(1)));
    assert_eq!(stages(&s), [(Stage::Dhcp, "done".into()), (Stage::Program, "started".into())]);
    assert_eq!((s.m.state.reason.as_str(), s.m.last_words.as_str()), ("downloads minimal/1", ""));
}

#[test]
fn a_chain_of_loaders_has_time_at_each_link_but_not_for_ever() {
    let mut s = firmware();
    for _ in 0..2 {
        s.wait(PATIENCE - 10_000).then(Event::TakesBytes).then(Event::Asked).is(StateKind::Booting);
        assert_eq!(stages(&s).len(), 1);
    }
    s.wait(PATIENCE - 10_000).then(Event::TakesBytes).wait(PATIENCE / 2).fails(Stage::Program, NO_DOWNLOAD);
    s.then(Event::TakesBytes).then(Event::Tick);
    assert_eq!(stages(&s).len(), 2, "a chain that goes in circles is not told again and again");
}

#[test]
fn a_download_that_goes_no_further() {
    let mut s = firmware();
    s.then(Event::Downloads(rel(1)));
    for _ in 0..10 {
        s.wait(PATIENCE - 10_000).then(Event::TakesBytes);
    }
    assert_eq!(stages(&s).len(), 2, "slow is not stalled");
    s.wait(PATIENCE).fails(Stage::Program, STALLED);
    s.then(Event::TakesBytes).then(Event::Tick).is(StateKind::Booting);
    assert_eq!(stages(&s).last(), Some(&(Stage::Program, "started".into())));
    assert!(!s.m.state.reason.contains("no more"), "{}", s.m.state.reason);
    s.wait(PATIENCE).fails(Stage::Program, STALLED).then(Event::Downloaded);
    assert_eq!(stages(&s)[1..], [(Stage::Program, "started".into()), (Stage::Program, "done".into())]);
    s.wait(BOOT_DEADLINE_MS).is(StateKind::Unreachable);
}

#[test]
fn a_boot_program_without_an_agent() {
    let mut s = firmware();
    s.then(Event::Downloads(rel(1))).then(Event::Downloaded).wait(AGENT_PATIENCE * PATIENCE - 2_000);
    assert_eq!(stages(&s).len(), 3);
    s.wait(1_000).fails(Stage::Start, NO_AGENT);
    assert!(s.m.state.reason.contains("look at its console"), "{}", s.m.state.reason);
    let mut late = Story { m: s.m.clone(), now: s.now, last: vec![] };
    late.then(by(1, report(1, "a", 1, 1))).is(StateKind::Booting);
    assert_eq!(stages(&late).len(), 3, "what was suspected is taken back: {:?}", stages(&late));
    assert_eq!((late.m.boots.len(), late.m.last_words.as_str()), (1, ""));
    // Or it starts anew; its last words are still the last that is known of it.
    s.then(Event::Asked).is(StateKind::Booting);
    assert_eq!(stages(&s), [(Stage::Dhcp, "done".into())]);
    assert!(s.m.last_words.contains("no agent was heard"));
    s.wait(BOOT_DEADLINE_MS).is(StateKind::Unreachable);
    assert!(s.m.state.reason.contains("UDP 69"), "the words stay: {}", s.m.state.reason);
}

#[test]
fn a_trial_that_never_starts_an_agent_says_so_when_it_is_given_up() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Cold).then(Event::Granted).leaves();
    for _ in 0..3 {
        s.boots_trial(2).then(Event::Downloaded).wait(AGENT_PATIENCE * PATIENCE).is(StateKind::Reimaging);
        assert!(s.m.state.reason.contains("look at its console"), "{}", s.m.state.reason);
    }
    s.then(Event::Asked).is(StateKind::FellBack);
    assert!(s.m.state.reason.contains("minimal/2 was not healthy in 3 boots (Agent starts: "), "{}", s.m.state.reason);
}

#[test]
fn states_that_say_something_else_keep_their_reason() {
    let mut s = Story::new();
    s.then(Event::Asked);
    let reason = s.m.state.reason.clone();
    s.wait(PATIENCE).is(StateKind::Discovered);
    assert_eq!(s.m.state.reason, reason);
    assert_eq!(stages(&s).last(), Some(&(Stage::Program, NO_DOWNLOAD.into())));
    s.then(Event::Retire).then(Event::Asked).then(Event::Downloads(rel(1))).wait(PATIENCE);
    assert_eq!(stages(&s).last(), Some(&(Stage::Program, "started".into())), "nobody waits for it");
}

#[test]
fn a_server_that_was_down_suspects_nobody_at_once() {
    let mut s = firmware();
    s.then(Event::Downloads(rel(1)));
    s.now += 10 * PATIENCE;
    s.then(Event::ServerStarted).then(Event::Tick);
    assert_eq!(stages(&s).len(), 2);
    s.wait(PATIENCE).fails(Stage::Program, STALLED);
}

#[test]
fn packets_that_are_not_confirmed_are_not_judged() {
    let mut s = Story::good_on_1();
    s.then(Event::Asked).then(Event::Downloads(rel(1))).wait(PATIENCE + 5_000).is(StateKind::Healthy);
    assert_eq!((s.m.boots.len(), &s.last), (1, &vec![]));
    s.then(Event::TakesBytes).wait(LIVE_MS - PATIENCE - 5_000).is(StateKind::Booting);
    assert_eq!(stages(&s).last(), Some(&(Stage::Program, "started".into())), "it moved 55 s ago");
    s.wait(10_000).is(StateKind::Booting);
    assert_eq!(stages(&s).last(), Some(&(Stage::Program, STALLED.into())));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever a firmware does and whenever: no silence of more than the patience goes unsaid, none is said early,
    /// each once, and the machine stays on its way.
    #[test]
    fn every_silence_is_said_once_and_in_time(
        steps in proptest::collection::vec((0..4_u8, 0..3 * PATIENCE), 1..60),
        firmware_patience in 5_000..300_000_u64,
    ) {
        let limits = Limits { firmware_patience, ..LIMITS };
        let mut s = firmware();
        let mut moved = s.m.boots[0].started;
        for (what, pause) in steps {
            let end = s.now + pause;
            let mut said = 0;
            while let Some(due) = s.m.due(limits).filter(|due| *due <= end) {
                let (m, out) = s.m.clone().event(Event::Tick, limits, due.max(s.now));
                s.now = due.max(s.now);
                let failed = |a: &&Action| matches!(a, Action::Stage(StageAt { state: StageState::Failed(_), .. }));
                for _ in out.iter().filter(failed) {
                    said += 1;
                    let circles = s.now >= m.boots[0].started + AGENT_PATIENCE * firmware_patience;
                    prop_assert!(circles || s.now >= moved + firmware_patience, "{} after {moved}", s.now);
                    prop_assert!(!m.last_words.is_empty() && m.state.reason.len() > 20);
                }
                prop_assert!(m.due(limits).is_none_or(|next| next > s.now));
                s.m = m;
            }
            prop_assert!(said <= 1);
            s.now = end;
            let event = match what {
                0 => Event::Asked,
                1 => Event::Downloads(rel(1)),
                2 => Event::TakesBytes,
                _ => Event::Downloaded,
            };
            let silent = matches!(s.m.boots.back().unwrap().stages.last().unwrap().state, StageState::Failed(_));
            let overdue = s.now > moved + AGENT_PATIENCE * firmware_patience;
            prop_assert!(silent || !overdue, "{:?}", s.m.boots.back());
            let asks_again = what == 0 && s.m.boots.back().unwrap().stages.iter().all(|r| r.stage == Stage::Dhcp);
            if !asks_again {
                moved = s.now;
            }
            let (m, _) = s.m.clone().event(event, limits, s.now);
            s.m = m;
            let kinds = [StateKind::Booting, StateKind::Degraded, StateKind::Unreachable];
            prop_assert!(kinds.contains(&s.m.state.kind), "{:?}", s.m.state);
        }
    }
}
