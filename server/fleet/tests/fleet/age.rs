//! Machines are put up anew before they are older than their role allows, and not all on one day.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use std::collections::BTreeMap;

const DAY: Millis = 24 * 3_600_000;
const AGE: Millis = 30 * DAY;

fn aged() -> Story {
    let mut s = Story::good_on_1();
    s.m.max_age = Some(AGE);
    s
}

/// It goes on reporting in this boot.
fn speaks(s: &mut Story) {
    let boot = s.m.boots.back().unwrap();
    let (name, seq) = (boot.boot_id.clone(), boot.seq + 1);
    s.then(by(1, healthy(1, &name, seq, 1)));
}

#[test]
fn a_machine_is_put_up_anew_in_the_last_quarter_of_its_age() {
    let mut s = aged();
    let (due, since) = (s.m.rebuild_due().unwrap(), s.m.put_up().unwrap());
    assert!((since + AGE * 3 / 4..=since + AGE).contains(&due));
    assert!(s.m.due(LIMITS).unwrap() <= due, "a tick comes in time");
    s.now = due - 10_000;
    speaks(&mut s);
    let before = s.m.assigned.clone().unwrap();
    s.now = due - 5_000;
    s.then(Event::Tick);
    assert_eq!(s.m.assigned.as_ref(), Some(&before), "not before its time");
    s.now = due;
    s.then(Event::Tick).is(StateKind::Healthy);
    let after = s.m.assigned.clone().unwrap();
    assert_eq!((after.release, after.via, after.rebuild), (before.release, Via::Cold, before.sequence + 1));
    assert_eq!(after.sequence, before.sequence + 1);
    assert!(s.last.contains(&Action::Sign) && s.m.state.reason.contains("for its age"), "{}", s.m.state.reason);
    assert!(!s.m.runs_assigned() && s.m.rebuild_due().is_none(), "it is ordered once");
    speaks(&mut s);
    s.then(Event::Tick);
    assert_eq!(s.m.assigned.as_ref().unwrap().sequence, after.sequence);
    // It goes, and comes back on the same release.
    s.leaves();
    s.then(by(1, healthy(1, "next", 1, 1))).is(StateKind::Healthy);
    assert!(s.m.runs_assigned() && s.m.fell_back.is_none() && s.m.attempts == 0);
    assert!(s.m.rebuild_due().unwrap() > s.now + AGE * 3 / 4 - DAY, "from this boot on it counts anew");
}

#[test]
fn it_waits_for_its_turn_like_any_other() {
    let mut s = aged();
    s.now = s.m.rebuild_due().unwrap();
    speaks(&mut s);
    s.then(Event::Tick);
    let sequence = s.m.assigned.as_ref().unwrap().sequence;
    let mut away = Story::good_on_1().m;
    (away.id, away.name) = (id(2), Some("rack-2".into()));
    away.state.kind = StateKind::Unreachable;
    let mut machines: BTreeMap<MachineId, Machine> = [(id(1), s.m.clone()), (id(2), away)].into();
    let reason = |machines: &_| match grant(&id(1), machines, LIMITS) {
        Grant::Go => "go".to_owned(),
        Grant::Hold { reason, .. } => reason,
    };
    assert_eq!(reason(&machines), "it fetches minimal/1 first");
    let image = "minimal".parse().unwrap();
    let ready = Prefetch { image, release: 1, sequence, ready: true, progress: None };
    machines.get_mut(&id(1)).unwrap().prefetch = Some(ready);
    assert!(reason(&machines).contains("rack-2 is unreachable"), "{}", reason(&machines));
    machines.get_mut(&id(2)).unwrap().state.kind = StateKind::Healthy;
    assert_eq!(reason(&machines), "go");
}

#[test]
fn what_is_not_settled_is_left_alone() {
    let mut none = Story::good_on_1();
    none.now += 10 * AGE;
    speaks(&mut none);
    none.then(Event::Tick);
    assert_eq!((none.m.rebuild_due(), none.m.assigned.as_ref().unwrap().rebuild), (None, 0), "no age, no rebuild");
    let mut moving = aged();
    moving.assign(2, Via::Cold);
    assert_eq!(moving.m.rebuild_due(), None, "it goes elsewhere anyhow");
    let mut unwell = aged();
    unwell.then(by(1, super_unwell(&unwell))).is(StateKind::Degraded);
    assert_eq!(unwell.m.rebuild_due(), None, "a person looks first");
    // A restart of its own is a rebuild in memory: it counts anew.
    let mut restarted = aged();
    let first = restarted.m.rebuild_due().unwrap();
    restarted.now += 20 * DAY;
    restarted.then(by(1, healthy(1, "b", 1, 1)));
    assert!(restarted.m.rebuild_due().unwrap() >= first + 19 * DAY);
    // One that restarts by itself while it is due needs no second restart.
    let mut due = aged();
    due.now = due.m.rebuild_due().unwrap();
    speaks(&mut due);
    due.then(Event::Tick);
    due.then(by(1, healthy(1, "b", 1, 1))).is(StateKind::Healthy);
    assert!(due.m.runs_assigned());
}

fn super_unwell(s: &Story) -> Report {
    let boot = s.m.boots.back().unwrap();
    unwell(1, &boot.boot_id, boot.seq + 1, 1)
}

#[test]
fn machines_of_one_day_are_not_rebuilt_on_one_day() {
    let s = aged();
    let mut days: BTreeMap<u64, u32> = BTreeMap::new();
    let since = s.m.put_up().unwrap();
    for n in 0..1000_u32 {
        let mut m = s.m.clone();
        m.id = format!("6b696c6e-0000-4000-8000-{n:012x}").parse().unwrap();
        let due = m.rebuild_due().unwrap();
        assert!(due <= since + AGE, "never older than its role allows");
        *days.entry((due - since) / DAY).or_default() += 1;
    }
    // A quarter of 30 days is 7.5 of them: 1000 machines are about 133 a day.
    assert!(days.len() >= 8 && days.values().all(|n| *n < 200), "{days:?}");
}

#[test]
fn a_disk_is_as_old_as_its_last_whole_look_whatever_boots_came_since() {
    let mut s = aged();
    let says = |s: &mut Story, boot: &str, seq: u64, put_up: u64| {
        let condition = Some(Condition { put_up: Some(put_up), ..Condition::default() });
        s.then(by(1, Report { condition, ..healthy(1, boot, seq, 1) }));
    };
    says(&mut s, "a", 3, 0);
    let since = s.m.put_up().unwrap();
    assert_eq!(since, s.m.boots.back().unwrap().started, "from the first word on");
    s.now += 20 * DAY;
    says(&mut s, "b", 1, 0);
    assert_eq!(s.m.put_up(), Some(since), "a plain restart reads nothing back");
    s.now = s.m.rebuild_due().unwrap();
    says(&mut s, "b", 2, 0);
    s.then(Event::Tick);
    let rebuild = s.m.assigned.as_ref().unwrap().rebuild;
    assert!(rebuild > 0 && s.m.rebuilding.is_some());
    // The power fails before it looked: it is ordered again.
    says(&mut s, "c", 1, 0);
    s.then(Event::Tick);
    let again = s.m.assigned.as_ref().unwrap().rebuild;
    assert!(again > rebuild, "{again}");
    says(&mut s, "d", 1, again);
    assert!(s.m.runs_assigned() && s.m.put_up() == Some(s.now), "and then it is young");
    let kept: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!(kept.put_up(), s.m.put_up());
}
