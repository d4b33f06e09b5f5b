//! A role that asks for an acceptance run: who is held, what a pass and a failure do, and who may say it.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use std::collections::BTreeMap;

const REQUIRED: Demand =
    Demand { required: true, least: Least { disk_read_mib_s: None, network_mib_s: None, link_mbit_s: None } };

fn order(n: u8, release: u64) -> MachineOrder {
    let errand = Errand::Run { release: rel(release), class: Class::Acceptance, via: Via::Kexec };
    MachineOrder {
        id: format!("{n:02x}").repeat(16).parse().unwrap(),
        errand,
        expires: 1_000_000_000,
        state: OrderState::Open,
    }
}

fn result(test: TestKind, outcome: Outcome, read: u64) -> TestResult {
    let measures = BTreeMap::from([("read_mib_s".to_owned(), read), ("mib_s".to_owned(), 50)]);
    TestResult { test, part: format!("{test} 1"), outcome, detail: "it rattles".into(), measures }
}

fn finished(disk: Outcome) -> Acceptance {
    let all = [
        (TestKind::Memory, Outcome::Passed),
        (TestKind::Cpu, Outcome::Passed),
        (TestKind::Disk, disk),
        (TestKind::Network, Outcome::Passed),
    ];
    Acceptance { done: true, doing: String::new(), results: all.map(|(t, o)| result(t, o, 100)).into() }
}

fn says(boot: &str, seq: u64, run: Acceptance) -> Event {
    by(1, Report { acceptance: Some(run), ..healthy(1, boot, seq, 9) })
}

/// Approved with a role that asks for a run, and waiting in its initramfs.
fn held() -> Story {
    let mut s = Story::new();
    s.then(by(1, report(1, "b1", 1, 1)));
    s.m.demand = REQUIRED;
    s.approve();
    s
}

fn waits_for(s: &Story) -> String {
    match desire(&s.m, &key(1)) {
        Desire::Wait(reason) => reason,
        Desire::Run(a) => panic!("runs {}", a.release),
    }
}

fn runs(s: &Story) -> u64 {
    match desire(&s.m, &key(1)) {
        Desire::Wait(reason) => panic!("{reason}"),
        Desire::Run(a) => a.release.release,
    }
}

#[test]
fn a_new_machine_is_held_and_holds_nobody() {
    let mut s = held();
    assert!(waits_for(&s).contains("wants a passed acceptance run first"), "{}", waits_for(&s));
    assert!(s.m.why().contains("held: role lab") && !s.m.counts(), "{}", s.m.why());
    for n in 2..60 {
        s.then(by(1, report(1, "b1", n, 1))).wait(60_000);
    }
    s.is(StateKind::Booting);
    let mut none = held();
    none.m.demand = Demand::default();
    assert_eq!((runs(&none), none.m.counts()), (1, true), "the role does not ask any more");
    let mut old = Story::good_on_1();
    old.m.demand = REQUIRED;
    assert_eq!((runs(&old), old.m.awaits_acceptance()), (1, false), "a machine of the fleet is not held");
}

#[test]
fn a_pass_lets_it_into_the_fleet() {
    let mut s = held();
    s.then(Event::Ordered(order(1, 9)));
    assert_eq!(runs(&s), 9);
    let running = Acceptance { doing: "tests memory, at most 90 s".into(), ..Acceptance::default() };
    s.then(says("b2", 1, running));
    assert!(s.m.why().ends_with("acceptance run: tests memory, at most 90 s") && !s.m.counts(), "{}", s.m.why());
    s.then(says("b2", 2, finished(Outcome::Passed)));
    assert_eq!((runs(&s), s.m.awaits_acceptance(), s.m.acceptance_words()), (1, false, None));
    assert_eq!(s.m.acceptance.as_ref().unwrap().state(), "passed");
    assert!(s.last.contains(&Action::Sign) && s.last.contains(&Action::Save));
    s.then(by(1, healthy(1, "b3", 1, 1))).is(StateKind::Healthy);
    assert!(s.m.counts() && s.m.good == [rel(1)]);
}

#[test]
fn a_failure_names_the_part_and_a_second_order_runs_again() {
    let mut s = held();
    s.then(Event::Ordered(order(1, 9)));
    s.then(says("b2", 1, finished(Outcome::Failed)));
    assert_eq!(s.m.acceptance.as_ref().unwrap().failures, ["disk 1: it rattles"]);
    assert!(s.m.last_words.contains("disk 1: it rattles") && s.m.why().contains("order the run again"));
    assert_eq!(runs(&s), 9, "it stays where it is while the order holds");
    s.then(says("b2", 2, finished(Outcome::Passed)));
    assert!(s.m.awaits_acceptance(), "what ended is judged once");
    let sequence = s.m.assigned.as_ref().unwrap().sequence;
    s.then(Event::Ordered(order(2, 9)));
    let assigned = s.m.assigned.clone().unwrap();
    assert!(assigned.sequence > sequence && assigned.rebuild == assigned.sequence, "it is put up anew");
    s.then(says("b3", 1, finished(Outcome::Passed)));
    assert_eq!((runs(&s), s.m.awaits_acceptance()), (1, false));
}

#[test]
fn a_failure_outlives_its_order_and_a_role_may_ask_for_more() {
    let mut s = held();
    s.m.demand.least.disk_read_mib_s = Some(101);
    s.then(Event::Ordered(order(1, 9)));
    s.then(says("b2", 1, finished(Outcome::Passed)));
    let asked = "disk 1: it gave 100 MiB/s, at least 101 are asked for";
    assert_eq!(s.m.acceptance.as_ref().unwrap().failures, [asked]);
    s.now = 1_000_000_001;
    s.then(Event::Tick);
    assert!(waits_for(&s).contains(asked), "{}", waits_for(&s));
}

#[test]
fn only_the_ordered_release_with_its_published_root_says_it() {
    let mut s = held();
    s.then(says("b2", 1, finished(Outcome::Passed)));
    assert!(s.m.acceptance.is_none() && s.m.awaits_acceptance(), "nobody ordered it");
    s.then(Event::Ordered(order(1, 9)));
    let forged = Report { acceptance: Some(finished(Outcome::Passed)), ..healthy(1, "b3", 1, 9) };
    let unknown = Reported { key: key(1), report: forged, published_root: Some(root(7)) };
    s.then(Event::Report(Box::new(unknown)));
    assert!(s.m.acceptance.is_none() && s.m.awaits_acceptance(), "another root");
    let ordinary = Report { acceptance: Some(finished(Outcome::Passed)), ..healthy(1, "b4", 1, 1) };
    s.then(by(1, ordinary));
    assert!(s.m.acceptance.is_none(), "another release");
}

#[test]
fn what_is_kept_of_a_run_is_bounded() {
    let mut s = held();
    s.then(Event::Ordered(order(1, 9)));
    let mut run = finished(Outcome::Passed);
    run.results.extend(vec![result(TestKind::Disk, Outcome::Passed, 1); 200]);
    run.results.extend(vec![result(TestKind::Disk, Outcome::Failed, 1); 50]);
    s.then(says("b2", 1, run));
    let kept = s.m.acceptance.as_ref().unwrap();
    let failed = kept.run.results.iter().filter(|r| r.outcome == Outcome::Failed).count();
    assert_eq!((kept.run.results.len(), failed, kept.failures.len()), (ACCEPTANCE_KEPT, 50, 32));
    let stored = serde_json::to_string(&s.m).unwrap();
    assert_eq!(serde_json::from_str::<Machine>(&stored).unwrap().acceptance, s.m.acceptance);
}
