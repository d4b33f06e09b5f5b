//! The grant to reimage: who may leave, and whom a missing machine holds.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn rack(n: u8) -> BTreeMap<MachineId, Machine> {
    (1..=n)
        .map(|k| {
            let mut m = Machine::discovered(id(k), 0);
            for e in [
                by(k, healthy(k, "a", 1, 1)),
                Event::Approve { name: format!("rack-{k}"), role: "lab".into(), release: rel(1) },
                Event::Assign { release: rel(2), via: Via::Kexec.into() },
                by(
                    k,
                    Report {
                        prefetch: Some(Prefetch {
                            image: "minimal".parse().unwrap(),
                            release: 2,
                            sequence: 2,
                            ready: true,
                            progress: None,
                        }),
                        ..healthy(k, "a", 2, 1)
                    },
                ),
            ] {
                m = m.event(e, LIMITS, 1000).0;
            }
            (id(k), m)
        })
        .collect()
}

#[test]
fn machines_leave_one_at_a_time() {
    let mut machines = rack(3);
    let limits = Limits::default();
    assert_eq!(grant(&id(1), &machines, limits), Grant::Go);
    let m = machines.remove(&id(1)).unwrap();
    machines.insert(id(1), m.event(Event::Granted, LIMITS, 2000).0);
    assert_eq!(grant(&id(1), &machines, limits), Grant::Go, "the same answer again");
    let Grant::Hold { reason, .. } = grant(&id(2), &machines, limits) else { panic!("must hold") };
    assert_eq!(reason, "1 of at most 1 machines are unavailable: rack-1 is draining");
    assert_eq!(grant(&id(2), &machines, Limits { max_unavailable: 2, ..limits }), Grant::Go);
    let m = machines.remove(&id(1)).unwrap();
    let (m, out) = m.event(by(1, healthy(1, "b", 1, 2)), LIMITS, 3000);
    assert!(out.contains(&Action::Wake), "those who wait are told");
    machines.insert(id(1), m);
    assert_eq!(grant(&id(2), &machines, limits), Grant::Go);
}

#[test]
fn a_dead_machine_holds_the_others() {
    let mut machines = rack(2);
    let m = machines.remove(&id(2)).unwrap();
    machines.insert(id(2), m.event(Event::Tick, LIMITS, 10 * LIVE_MS).0);
    assert!(matches!(grant(&id(1), &machines, Limits::default()), Grant::Hold { .. }));
    let m = machines.remove(&id(2)).unwrap();
    machines.insert(id(2), m.event(Event::Retire, LIMITS, 10 * LIVE_MS).0);
    assert_eq!(grant(&id(1), &machines, Limits::default()), Grant::Go, "out of service");
}

#[test]
fn a_machine_that_a_person_excused_holds_nobody_until_it_is_healthy_again() {
    let excuse = || Event::Excuse { reason: "disk ordered".into() };
    let mut machines = rack(2);
    let m = machines.remove(&id(2)).unwrap();
    assert!(matches!(m.check_excuse(), Err(Refusal::Available { .. })));
    let (m, _) = m.event(excuse(), LIMITS, 2000);
    assert_eq!(m.excused, None, "it does its work");
    let (m, _) = m.event(Event::Tick, LIMITS, 10 * LIVE_MS);
    machines.insert(id(2), m.clone());
    let Grant::Hold { reason, .. } = grant(&id(1), &machines, LIMITS) else { panic!("must hold") };
    assert!(reason.contains("kiln machine excuse rack-2"), "{reason}");
    let (m, out) = m.event(excuse(), LIMITS, 10 * LIVE_MS);
    assert!(out.contains(&Action::Wake) && out.contains(&Action::Save), "{out:?}");
    machines.insert(id(2), m.clone());
    assert_eq!(grant(&id(1), &machines, LIMITS), Grant::Go);
    // Back, but not well: still excused. Healthy once: it counts like any other.
    let (m, _) = m.event(by(2, unwell(2, "b", 1, 1)), LIMITS, 11 * LIVE_MS);
    assert!(!m.counts());
    let (m, _) = m.event(by(2, healthy(2, "b", 2, 1)), LIMITS, 11 * LIVE_MS + 1000);
    assert!(m.counts() && m.excused.is_none());
    let (m, _) = m.event(Event::Tick, LIMITS, 20 * LIVE_MS);
    machines.insert(id(2), m);
    assert!(matches!(grant(&id(1), &machines, LIMITS), Grant::Hold { .. }), "one excuse, one absence");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// A rack under orders, crashes and silence never loses more machines to grants than the limit.
    #[test]
    fn the_limit_holds(steps in proptest::collection::vec((1..6_u8, 0..6_u8), 1..200), max in 1..3_usize) {
        let mut machines = rack(5);
        let limits = Limits { max_unavailable: max, ..Limits::default() };
        let mut now = 10_000;
        let mut boot = 0_u32;
        for (n, what) in steps {
            now += 1_000;
            let m = machines[&id(n)].clone();
            let seq = m.boots.back().map_or(1, |b| b.seq + 1);
            let current = m.boots.back().map(|b| b.boot_id.clone()).unwrap_or_default();
            let runs = m.running.as_ref().map_or(1, |r| r.release);
            let event = match what {
                0 | 1 => {
                    let unavailable = machines.values().filter(|m| !m.is_available()).count();
                    if m.is_available() && grant(&id(n), &machines, limits) == Grant::Go && m.granted.is_none() {
                        prop_assert!(unavailable < max, "{unavailable} of {max}");
                        Event::Granted
                    } else {
                        Event::Tick
                    }
                }
                2 if m.granted.is_some() => {
                    let mut r = healthy(n, &current, seq, runs);
                    r.stages.push(StageRecord { stage: Stage::Going, state: StageState::Started, at_ms: 0 });
                    by(n, r)
                }
                3 if m.state.kind == StateKind::Reimaging => {
                    boot += 1;
                    by(n, healthy(n, &format!("n{boot}"), 1, 2))
                }
                4 => Event::Asked,
                _ => by(n, healthy(n, &current, seq, runs)),
            };
            machines.insert(id(n), m.event(event, LIMITS, now).0);
        }
    }
}
