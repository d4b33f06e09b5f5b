//! Drift, draining and events as the server takes them.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;

fn with(seq: u64, condition: Condition) -> Event {
    by(1, Report { condition: Some(condition), ..healthy(1, "a", seq, 1) })
}

fn said(story: &Story) -> Vec<(bool, String)> {
    let said = story.last.iter().filter_map(|action| match action {
        Action::Say { warn, text } => Some((*warn, text.clone())),
        Action::Save | Action::Forget | Action::Sign | Action::Wake | Action::Stage(_) | Action::Record(_) => None,
    });
    said.collect()
}

fn drift(what: &str) -> Difference {
    Difference { kind: DriftKind::Listener, what: what.into(), text: format!("nc listens on {what}\u{1b}[31m") }
}

#[test]
fn events_are_taken_once_with_their_time_and_said_as_loud_as_they_are() {
    let mut story = Story::good_on_1();
    let mut spool = Spool::new("s".into());
    let at = |mono_ms| Clocks { boot_id: "a".into(), mono_ms, unix_ms: 0 };
    spool.note(&at(0), "drift", true, "nc listens on tcp/4444");
    spool.note(&at(5000), "drift", false, "no longer");
    let report = |spool: &mut Spool| Condition { spool: spool.report(&at(60_000)), ..Condition::default() };
    story.then(with(3, report(&mut spool)));
    assert_eq!(
        said(&story),
        [(true, "drift: nc listens on tcp/4444".to_owned()), (false, "drift: no longer".to_owned())]
    );
    let times: Vec<u64> = story.m.condition.events.iter().map(|e| story.now - e.at).collect();
    assert_eq!(times, [60_000, 55_000]);
    // The reply was lost: the machine says it again.
    story.then(with(4, report(&mut spool)));
    assert_eq!((said(&story), story.m.condition.events.len()), (vec![], 2));
    // And what it remembers outlives the server.
    let kept: Machine = serde_json::from_str(&serde_json::to_string(&story.m).unwrap()).unwrap();
    assert_eq!(kept.condition, story.m.condition);

    spool.answered();
    for n in 0..300 {
        spool.note(&at(70_000 + n), "health", true, &format!("check {n} fails"));
    }
    story.then(with(5, report(&mut spool)));
    assert_eq!(said(&story)[0], (true, "dropped: 44 events were dropped on the machine: its spool was full".into()));
    assert_eq!((story.m.condition.events.len(), said(&story).len()), (EVENTS_KEPT, SPOOL_BATCH + 1));
}

#[test]
fn drift_is_the_machines_newest_word_and_ends_with_its_boot() {
    let mut story = Story::good_on_1();
    let condition = Condition { drift: vec![drift("tcp/4444")], drift_count: 40, ..Condition::default() };
    story.then(with(3, condition.clone())).is(StateKind::Healthy);
    assert!(story.last.contains(&Action::Save));
    assert_eq!(story.m.condition.drift_count, 40);
    assert_eq!(
        story.m.condition.drift[0].text, "nc listens on tcp/4444[31m",
        "no control character reaches a terminal"
    );
    story.then(with(4, condition.clone()));
    assert!(!story.last.contains(&Action::Save), "the same again is no write");
    let many = Condition { drift: (0..100).map(|n| drift(&n.to_string())).collect(), ..condition };
    story.then(with(5, many));
    assert_eq!(story.m.condition.drift.len(), DRIFT_LIMIT);
    story.then(by(1, report(1, "b", 1, 1)));
    assert_eq!((story.m.condition.drift.len(), story.m.condition.drift_count), (0, 0));
}

#[test]
fn a_machine_that_drains_has_its_hooks_time_and_says_which_runs() {
    let mut story = Story::good_on_1();
    story.assign(2, Via::Cold);
    let draining = |seq: u64, left_ms| {
        let draining = Draining { hook: "lb".into(), number: 3, of: 5, since_ms: 40_000, left_ms };
        let condition = Some(Condition { draining: Some(draining), ..Condition::default() });
        let prefetch =
            Some(Prefetch { image: "minimal".parse().unwrap(), release: 2, sequence: 2, ready: true, progress: None });
        by(1, Report { condition, prefetch, ..healthy(1, "a", seq, 1) })
    };
    story.then(by(1, healthy(1, "a", 3, 1))).then(Event::Granted).is(StateKind::Draining);
    story.then(draining(4, 20 * 60_000)).is(StateKind::Draining);
    assert_eq!(story.m.state.reason, "may leave for minimal/2; draining: 3 of 5, hook lb since 40 s");
    let begun = story.m.state.since;
    assert!(story.m.state.deadline.unwrap() >= story.now + 20 * 60_000);
    // Also while its services stop, and for two hours at most.
    let mut unwell = draining(5, u64::MAX);
    if let Event::Report(reported) = &mut unwell {
        reported.report.health = Some(Health { healthy: false, detail: "web.service is inactive".into() });
    }
    story.then(unwell).is(StateKind::Draining);
    assert_eq!(story.m.state.deadline, Some(begun + 2 * 3_600_000));
    story.m.state.deadline = Some(story.now);
    story.wait(1000).is(StateKind::Degraded);
}

#[test]
fn stale_metadata_is_said_once_and_stands_until_the_running_system_says_otherwise() {
    let of = |file: &str| Some(Stale { file: file.into(), expires: "2026-01-01T00:00:00Z".parse().unwrap() });
    let mut story = Story::good_on_1();
    let with = |seq, stale| by(1, Report { stale, ..healthy(1, "a", seq, 1) });
    story.then(with(3, of("targets.json\u{1b}"))).is(StateKind::Healthy);
    assert_eq!(story.m.condition.stale, of("targets.json"), "no control character reaches a terminal");
    let words =
        "stale: targets.json expired at 2026-01-01T00:00:00Z; it goes to no other release until new dates are signed";
    assert_eq!(said(&story), [(true, words.to_owned())]);
    story.then(with(4, of("targets.json")));
    assert!(said(&story).is_empty() && !story.last.contains(&Action::Save), "the same again is no news");
    let kept: Machine = serde_json::from_str(&serde_json::to_string(&story.m).unwrap()).unwrap();
    assert_eq!(kept.condition, story.m.condition);
    story.then(by(1, report(1, "b", 1, 1)));
    assert_eq!(story.m.condition.stale, of("targets.json"), "this boot has verified nothing yet");
    story.then(by(1, Report { stale: of("targets.json"), ..report(1, "b", 2, 1) }));
    assert!(said(&story).is_empty(), "nor is it news in the next boot");
    story.then(by(1, healthy(1, "b", 3, 1)));
    assert!(story.m.condition.stale.is_none() && story.last.contains(&Action::Save));
}
