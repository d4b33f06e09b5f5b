//! Every event in every state, and no order of them that asks for the impossible.

use super::post::HOLD_S;
use super::step::waiting;
use super::*;
use crate::error::FailureClass;
use kiln_protocol::Stage;
use proptest::prelude::*;

const MID: u8 = 128;

fn target(release: u64, sequence: u64) -> Target {
    Target { release: ReleaseId { image: "minimal".parse().unwrap(), release }, sequence }
}

fn answer(wanted: Option<(Target, Grant)>) -> Event {
    let wanted = wanted.map(|(target, grant)| Wanted { target, grant });
    Event::Answered(Answer { again_ms: 2000, may_wait: true, wanted })
}

fn hold() -> Grant {
    Grant::Hold { reason: "1 of 1 machines may be unavailable".into(), until_ms: None }
}

fn trouble(class: FailureClass) -> Trouble {
    Trouble { stage: Stage::Prefetch, class, kind: "kind".into(), message: "message".into(), moved: false }
}

fn checked(healthy: bool) -> Event {
    Event::Checked(Health { healthy, detail: "detail".into() })
}

/// A healthy machine whose report is held, on that way.
fn at(way: Way) -> Duty {
    let health = Some(Health { healthy: true, detail: String::new() });
    Duty { health, way, post: Post::Held, may_wait: true, up: true, ..Duty::new() }
}

#[test]
fn each_of_several_silent_servers_is_told_of_once_until_one_answers() {
    let mut duty = Duty::new();
    let mut said = Vec::new();
    for n in 0..20_u64 {
        if n == 10 {
            (duty, _) = duty.event(answer(None), n * 100_000, MID);
        }
        let (next, actions) = duty.event(Event::Unanswered(format!("server {} is silent", n % 2)), n * 100_000, MID);
        duty = next;
        said.extend(actions.into_iter().filter(|action| matches!(action, Action::Say(_))));
    }
    let each = ["server 0 is silent", "server 1 is silent"].map(|words| Action::Say(words.into()));
    assert_eq!(said, [each.clone(), each].concat());
    // A server that finds ever other words fills no memory.
    for n in 0..1000_u64 {
        (duty, _) = duty.event(Event::Unanswered(n.to_string()), n, MID);
    }
    assert_eq!(duty.said.len(), MOST_SAID);
}

/// Every way there is, with its name in the documents; all of release 2, sequence 5.
fn ways() -> Vec<(&'static str, Way)> {
    let target = target(2, 5);
    let all = [
        Way::Stays,
        Way::Fetches { target: target.clone(), failed: 2 },
        Way::Rests { target: target.clone(), failed: 2, until: NOW, gave_up: false },
        Way::Ready { target: target.clone(), grant: None, failed: 0, until: 0 },
        Way::Asks { target: target.clone(), failed: 0 },
        Way::Drains { target: target.clone(), failed: 0 },
        Way::Leaves { target },
        Way::Gone,
    ];
    all.into_iter().map(|way| (name(&way), way)).collect()
}

const NOW: Millis = 10_000;

fn name(way: &Way) -> &'static str {
    match way {
        Way::Stays => "stays",
        Way::Fetches { .. } => "fetches",
        Way::Rests { .. } => "rests",
        Way::Ready { .. } => "ready",
        Way::Asks { .. } => "asks",
        Way::Drains { .. } => "drains",
        Way::Leaves { .. } => "leaves",
        Way::Gone => "gone",
    }
}

fn events() -> Vec<(&'static str, Event)> {
    vec![
        ("answer: no other release", answer(None)),
        ("answer: this one, hold", answer(Some((target(2, 5), hold())))),
        ("answer: this one, go", answer(Some((target(2, 5), Grant::Go)))),
        ("answer: another", answer(Some((target(1, 6), Grant::Go)))),
        ("no answer", Event::Unanswered("words".into())),
        ("healthy", checked(true)),
        ("not healthy", checked(false)),
        ("fetched", Event::Fetched(None)),
        ("may go", Event::MayGo),
        ("drained", Event::Drained(None)),
        ("a hook keeps it", Event::Drained(Some(trouble(FailureClass::Machine)))),
        ("failed: unreachable", Event::Failed(trouble(FailureClass::Unreachable))),
        ("failed: did not verify", Event::Failed(trouble(FailureClass::Verification))),
        ("loaded", Event::Loaded(None)),
        ("not loaded", Event::Loaded(Some(trouble(FailureClass::Machine)))),
        ("not loaded, and a cold boot leads elsewhere", Event::Stuck(trouble(FailureClass::Machine))),
        ("news", Event::News),
        ("time", Event::Time),
    ]
}

/// What the documents show of an action: reports and records are the same everywhere, and not shown.
fn word(action: &Action) -> Option<&'static str> {
    match action {
        Action::Fetch(_) => Some("fetch"),
        Action::AskWhetherToGo(_) => Some("ask"),
        Action::CallOff => Some("call off"),
        Action::Discard => Some("discard"),
        Action::Drain => Some("drain"),
        Action::Undrain => Some("undrain"),
        Action::Load => Some("load"),
        Action::Leave { cold: false } => Some("leave"),
        Action::Leave { cold: true } => Some("leave by cold boot"),
        Action::Record(..) | Action::Say(_) | Action::Report(_) | Action::EndHold => None,
    }
}

#[test]
fn every_event_in_every_state_is_as_the_documents_say() {
    let names: Vec<&str> = ways().into_iter().map(|(name, _)| name).collect();
    let mut lines = vec![format!("| | {} |", names.join(" | ")), format!("|---|{}", "---|".repeat(names.len()))];
    for (event_name, event) in events() {
        let mut cells = vec![event_name.to_owned()];
        for (before, way) in ways() {
            let (after, actions) = at(way.clone()).event(event.clone(), NOW - u64::from(event != Event::Time), MID);
            let words: Vec<&str> = actions.iter().filter_map(word).collect();
            let to = if name(&after.way) == before { String::new() } else { format!("→ {}", name(&after.way)) };
            let cell = match (to.is_empty(), words.is_empty()) {
                (true, true) => "–".to_owned(),
                (false, true) => to,
                (_, false) => format!("{to} ({})", words.join(", ")),
            };
            cells.push(cell.trim().to_owned());
        }
        lines.push(format!("| {} |", cells.join(" | ")));
    }
    let table = lines.join("\n");
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/state-machines.md");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains(&table), "docs/state-machines.md is to hold this table:\n{table}");
}

#[test]
fn an_unhealthy_turn_is_reported_in_the_same_step_whatever_runs() {
    for (name, way) in ways() {
        if way == Way::Gone {
            continue;
        }
        let (after, actions) = at(way).event(checked(false), NOW - 1, MID);
        let expected = [waiting(Stage::Health, "detail"), Action::EndHold, Action::Report(0)];
        assert_eq!(actions, expected, "{name}");
        assert_eq!(after.health().map(|h| h.healthy), Some(false));
        // And the turn back, when the short report is answered.
        let (after, actions) = after.event(checked(true), NOW, MID);
        assert!(!actions.iter().any(|a| matches!(a, Action::Report(_))), "{name}: one report at a time");
        let (_, actions) = after.event(Event::Unanswered("x".into()), NOW + BREATH_MS, MID);
        assert!(actions.iter().any(|a| matches!(a, Action::Report(_))), "{name}: {actions:?}");
    }
}

#[test]
fn an_unhealthy_machine_follows_an_assignment_and_its_checks_may_hang() {
    let mut duty = Duty { health: None, may_wait: false, ..at(Way::Stays) };
    let mut said = Vec::new();
    let steps = [
        answer(Some((target(1, 6), Grant::Hold { reason: "it fetches minimal/1 first".into(), until_ms: None }))),
        Event::Fetched(None),
        answer(Some((target(1, 6), Grant::Go))),
        Event::MayGo,
        Event::Drained(None),
        Event::Loaded(None),
    ];
    for (n, event) in (0..).zip(steps) {
        let (next, actions) = duty.event(event, NOW + n * 1000, MID);
        said.extend(actions.iter().filter_map(word));
        duty = next;
    }
    assert_eq!(said, ["fetch", "ask", "drain", "load", "leave"], "no check was ever answered");
}

#[test]
fn a_machine_that_no_way_leads_from_does_its_work_and_tries_again_after_a_while() {
    let stuck = Event::Stuck(Trouble { stage: Stage::Going, ..trouble(FailureClass::Machine) });
    let (duty, actions) = at(Way::Leaves { target: target(2, 5) }).event(stuck, NOW, MID);
    assert!(!actions.iter().any(|action| matches!(action, Action::Leave { .. })), "{actions:?}");
    let told = |a: &Action| matches!(a, Action::Record(Stage::Going, kiln_protocol::StageState::Failed(_)));
    assert!(actions.iter().any(told) && actions.contains(&Action::Report(HOLD_S)), "{actions:?}");
    assert_eq!((duty.health().map(|h| h.healthy), duty.prefetch()), (Some(true), None));
    // Not at once: its work was interrupted for nothing.
    let (duty, actions) = duty.event(Event::Unanswered("no route".into()), NOW + 14 * 60_000, MID);
    assert!(!actions.iter().any(|action| matches!(action, Action::Fetch(_))), "{actions:?}");
    let (_, actions) = duty.event(Event::Time, NOW + 15 * 60_000, MID);
    assert!(actions.contains(&Action::Fetch(target(2, 5))), "{actions:?}");
}

#[test]
fn a_go_does_not_outlive_the_servers_silence() {
    let way = Way::Ready { target: target(2, 5), grant: Some(Grant::Go), failed: 1, until: NOW + 60_000 };
    let (duty, _) = at(way).event(Event::Unanswered("no route".into()), NOW, MID);
    // The server may have taken it back meanwhile, and ordered something else.
    let (duty, actions) = duty.event(Event::Time, NOW + 600_000, MID);
    assert!(!actions.iter().any(|a| matches!(a, Action::AskWhetherToGo(_))), "{actions:?}");
    let (_, actions) = duty.event(answer(Some((target(2, 5), Grant::Go))), NOW + 601_000, MID);
    assert!(actions.contains(&Action::AskWhetherToGo(target(2, 5))), "{actions:?}");
}

#[test]
fn tries_rest_longer_and_a_release_that_does_not_verify_is_given_up_for_a_minute() {
    let rest = |failed, class, moved| {
        let way = Way::Fetches { target: target(2, 5), failed };
        let (after, _) = at(way).event(Event::Failed(Trouble { moved, ..trouble(class) }), NOW, 128);
        let gave_up = after.prefetch().is_none();
        let Way::Rests { until, .. } = after.way else { panic!("{after:?}") };
        (until - NOW, gave_up)
    };
    assert_eq!(rest(0, FailureClass::Verification, false), (1000, false));
    assert_eq!(rest(1, FailureClass::Verification, false), (2000, false));
    assert_eq!(rest(2, FailureClass::Verification, false), (60_000, true));
    assert_eq!(rest(50, FailureClass::Verification, false), (60_000, true));
    assert_eq!(rest(50, FailureClass::Unreachable, false), (60_000, false), "the server may come back");
    assert_eq!(rest(50, FailureClass::Unreachable, true), (1000, false), "it came on");
}

#[test]
fn news_breaks_the_hold_five_times_a_second_at_most() {
    let (mut duty, mut posts) = (at(Way::Stays), 0);
    for now in (NOW..NOW + 10_000).step_by(10) {
        let (next, actions) = duty.event(Event::News, now, MID);
        posts += actions.iter().filter(|a| matches!(a, Action::Report(_))).count();
        duty = next;
    }
    assert!((49..=51).contains(&posts), "{posts}");
    let (after, actions) = at(Way::Stays).event(Event::News, NOW, MID);
    assert_eq!(actions, [Action::EndHold, Action::Report(HOLD_S)], "and at once");
    assert_eq!(after.health().map(|h| h.healthy), Some(true));
}

/// What the driver would hold, to see that no step asks for what cannot be.
#[derive(Debug, Default)]
struct Driver {
    posted: Option<u32>,
    last_post: Option<Millis>,
    job: Option<Action>,
    drains: bool,
}

impl Driver {
    /// The events that can come now.
    fn possible(&self) -> Vec<Event> {
        let posted = |e: &Event| matches!(e, Event::Answered(_) | Event::Unanswered(_)) && self.posted.is_some();
        let of_job = |e: &Event| match self.job {
            Some(Action::Fetch(_)) => matches!(e, Event::Fetched(_) | Event::Failed(_)),
            Some(Action::AskWhetherToGo(_)) => matches!(e, Event::MayGo | Event::Failed(_)),
            Some(Action::Load) => matches!(e, Event::Loaded(_) | Event::Stuck(_)),
            Some(_) | None => false,
        };
        let always = |e: &Event| matches!(e, Event::Checked(_) | Event::News | Event::Time);
        let hooks = |e: &Event| matches!(e, Event::Drained(_)) && self.drains;
        events().into_iter().map(|(_, e)| e).filter(|e| posted(e) || of_job(e) || hooks(e) || always(e)).collect()
    }

    fn take(&mut self, event: &Event) {
        match event {
            Event::Answered(_) | Event::Unanswered(_) => self.posted = None,
            Event::Fetched(_) | Event::MayGo | Event::Failed(_) | Event::Loaded(_) | Event::Stuck(_) => self.job = None,
            Event::Drained(_) => self.drains = false,
            Event::Checked(_) | Event::News | Event::Time => {}
        }
    }

    fn perform(&mut self, action: Action, now: Millis) {
        match action {
            Action::Report(hold) => {
                assert_eq!(self.posted, None, "one report at a time");
                assert!(self.last_post.is_none_or(|last| last + BREATH_MS <= now), "without a breath");
                (self.posted, self.last_post) = (Some(hold), Some(now));
            }
            Action::EndHold => assert!(self.posted.take().is_some_and(|hold| hold > 0), "nothing is held"),
            Action::Drain => {
                assert!(self.job.is_none() && !self.drains, "drained beside {:?}", self.job);
                self.drains = true;
            }
            Action::Undrain => self.drains = false,
            Action::Fetch(_) | Action::AskWhetherToGo(_) | Action::Load => {
                assert_eq!(self.job, None, "one job at a time");
                assert!(!self.drains, "its work is still being ended");
                self.job = Some(action);
            }
            Action::CallOff => {
                let job = self.job.take();
                assert!(matches!(job, Some(Action::Fetch(_) | Action::AskWhetherToGo(_))), "{job:?} called off");
            }
            Action::Leave { .. } => assert!(self.job.is_none() && !self.drains),
            Action::Record(..) | Action::Say(_) | Action::Discard => {}
        }
    }
}

proptest! {
    #[test]
    fn no_order_of_events_asks_for_the_impossible_or_stops(
        steps in prop::collection::vec((any::<prop::sample::Index>(), 0_u64..3000, any::<u8>()), 1..200)
    ) {
        let (mut duty, mut driver, mut now) = (Duty::new(), Driver::default(), 1000);
        for (choice, pause, jitter) in steps {
            // Time comes when it was asked for, at the latest.
            let (event, at) = match duty.wakes() {
                Some(wakes) if wakes < now + pause => (Event::Time, wakes.max(now)),
                Some(_) | None => (choice.get(&driver.possible()).clone(), now + pause),
            };
            now = at;
            driver.take(&event);
            let (next, actions) = duty.event(event, now, jitter);
            duty = next;
            let left = actions.iter().any(|a| matches!(a, Action::Leave { .. }));
            for action in actions {
                driver.perform(action, now);
            }
            if left {
                break;
            }
            prop_assert!(duty.wakes().is_none_or(|wakes| wakes > now), "it would spin: {duty:?}");
            prop_assert!(driver.posted.is_some() || duty.wakes().is_some(), "it would never report again: {duty:?}");
            prop_assert!(driver.posted.is_none_or(|hold| hold == 0 || hold <= HOLD_S));
        }
    }

    #[test]
    fn strays_change_nothing_for_the_worse(steps in prop::collection::vec(any::<prop::sample::Index>(), 1..100)) {
        let all: Vec<Event> = events().into_iter().map(|(_, event)| event).collect();
        let mut duty = Duty::new();
        let (mut asked, mut may) = (false, false);
        for (now, step) in (1..).zip(steps) {
            let event = step.get(&all).clone();
            may |= asked && event == Event::MayGo;
            let (next, actions) = duty.event(event, now * 500, 0);
            for action in &actions {
                match action {
                    Action::AskWhetherToGo(_) => asked = true,
                    Action::CallOff => asked = false,
                    Action::Load | Action::Leave { .. } => prop_assert!(may, "it leaves without being asked"),
                    Action::Record(..) | Action::Say(_) | Action::Report(_) | Action::EndHold | Action::Fetch(_)
                    | Action::Drain | Action::Undrain | Action::Discard => {}
                }
            }
            duty = next;
        }
    }
}
