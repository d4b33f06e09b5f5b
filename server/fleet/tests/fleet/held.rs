//! Firmware packets while the agent speaks: what is spoofed moves nothing, what is true counts as if it were believed
//! at once.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

#[test]
fn a_spoofed_packet_is_dropped_when_the_machine_speaks_again() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Cold);
    for _ in 0..5 {
        s.boots_trial(2).then(Event::Downloaded).is(StateKind::Healthy);
    }
    assert!(s.m.is_available() && s.m.attempts == 0);
    assert!(
        s.m.why().starts_with(&s.m.state.reason) && s.m.why().contains("in its name at 00:17:08 UTC"),
        "{}",
        s.m.why()
    );
    assert_eq!(s.m.boot_release(LIMIT), Some(&rel(1)), "a machine that really restarts so often gets the good one");
    s.then(by(1, healthy(1, "a", 3, 1))).is(StateKind::Healthy);
    assert!(s.last.iter().any(|a| matches!(a, Action::Say { warn: true, .. })) && s.last.contains(&Action::Save));
    assert_eq!((s.m.held_packets.len(), s.m.boots.len(), s.m.boot_release(LIMIT)), (0, 1, Some(&rel(2))));
    assert_eq!(s.m.why(), s.m.state.reason);
    s.then(Event::Downloads(rel(2)));
    assert!(s.m.held_packets.is_empty() && s.last.is_empty(), "its own prefetch says nothing");
}

#[test]
fn a_restart_that_nobody_announced_is_believed_when_the_new_boot_reports() {
    let mut s = Story::good_on_1();
    s.then(Event::Asked);
    let asked = s.now;
    s.then(Event::Asked).then(Event::Downloads(rel(1))).then(Event::Downloaded).is(StateKind::Healthy);
    s.then(by(1, report(1, "b", 1, 1))).is(StateKind::Booting);
    assert_eq!(s.m.state.since, asked, "at its own time");
    let stages: Vec<_> = s.m.boots[1].stages.iter().map(|r| (r.stage, r.at - asked)).collect();
    assert_eq!(stages, [(Stage::Dhcp, 0), (Stage::Program, 2_000), (Stage::Program, 3_000)]);
}

#[test]
fn a_restart_that_does_not_come_up_is_believed_when_the_agent_is_silent() {
    let mut s = Story::good_on_1();
    let heard = s.now;
    s.then(Event::Asked).then(Event::Downloads(rel(1)));
    assert_eq!(s.m.due(LIMITS), Some(heard + LIVE_MS));
    s.now = heard + LIVE_MS - 1_000;
    s.then(Event::Tick).is(StateKind::Booting);
    assert_eq!(s.m.state.deadline, Some(heard + 1_000 + BOOT_DEADLINE_MS), "from its first sign on");
    assert!(s.m.held_packets.is_empty() && s.m.agent_seen.is_none());
    s.then(Event::Asked).is(StateKind::Booting);
    assert!(s.m.held_packets.is_empty(), "nobody speaks for it now");
}

#[test]
fn a_server_that_was_down_believes_nothing_at_once() {
    let mut s = Story::good_on_1();
    s.boots_trial(1);
    s.now += 10 * LIVE_MS;
    s.then(Event::ServerStarted).then(Event::Tick).is(StateKind::Healthy);
    s.then(by(1, healthy(1, "a", 3, 1))).is(StateKind::Healthy);
    assert_eq!(s.m.boots.len(), 1);
}

#[test]
fn an_order_ends_the_count_of_what_came_before_it() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Cold);
    for _ in 0..2 {
        s.boots_trial(2);
    }
    s.assign(2, Via::Cold).boots_trial(2);
    s.then(by(1, report(1, "b", 1, 2)));
    assert_eq!(s.m.attempts, 1);
}

#[test]
fn more_boots_than_are_kept_leave_the_first_and_the_last() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Cold);
    for _ in 0..25 {
        s.boots_trial(2);
        s.now -= 3_000;
    }
    assert_eq!(s.m.held_packets.len(), HELD_KEPT);
    assert!(s.last.is_empty(), "a flood is not a flood of writes: {:?}", s.last);
    assert_eq!(s.m.held_packets.last().unwrap().downloads, Some((s.now + 2_000, rel(2))));
    let text = serde_json::to_string(&s.m).unwrap();
    assert_eq!(serde_json::from_str::<Machine>(&text).unwrap().held_packets, s.m.held_packets);
    let older = text.replace("\"held_packets\"", "\"x\"").replace("\"agent_seen\"", "\"y\"");
    assert_eq!(serde_json::from_str::<Machine>(&older).unwrap().agent_seen, None, "a machine stored by an older kiln");
}

/// Packets that anybody can send.
fn any_packet() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::Asked),
        3 => (1..4_u64).prop_map(|r| Event::Downloads(rel(r))),
        1 => Just(Event::Downloaded),
        1 => Just(Event::TakesBytes),
    ]
}

/// What a machine that stays up, and a person, do.
#[derive(Debug, Clone)]
enum Live {
    Report { health: Option<bool>, ready: bool, stages: Vec<StageRecord> },
    Order(Event),
}

fn any_live() -> impl Strategy<Value = Live> {
    let stays = |record: &StageRecord| match record.state {
        StageState::Started | StageState::Done => record.stage != Stage::Going,
        StageState::Failed(_) | StageState::Waiting { .. } => true,
    };
    let stages = proptest::collection::vec(any_stage().prop_filter("it does not say that it leaves", stays), 0..3);
    prop_oneof![
        6 => (any::<Option<bool>>(), any::<bool>(), stages)
            .prop_map(|(health, ready, stages)| Live::Report { health, ready, stages }),
        2 => (1..4_u64).prop_map(|r| Live::Order(Event::Assign { release: rel(r), via: Via::Cold.into() })),
        1 => Just(Live::Order(Event::Approve { name: "n".into(), role: "r".into(), release: rel(1) })),
        1 => Just(Live::Order(Event::Granted)),
        1 => Just(Live::Order(Event::Clear)),
        1 => Just(Live::Order(Event::Retire)),
        2 => Just(Live::Order(Event::Tick)),
    ]
}

/// Time passes up to `now`, as in the server: a tick at every moment that asks for one.
fn pass(mut m: Machine, now: Millis) -> Machine {
    while let Some(due) = m.due(LIMITS).filter(|due| *due < now) {
        m = m.event(Event::Tick, LIMITS, due).0;
        assert!(
            m.due(LIMITS).is_none_or(|next| next > due),
            "a tick that leaves work undone is repeated for ever: {m:?}"
        );
    }
    m
}

/// Without the words for people: a silence while packets are kept is not remarked on.
fn wordless(mut m: Machine) -> Machine {
    m.state.reason.clear();
    m.last_words.clear();
    m.fell_back.iter_mut().for_each(String::clear);
    m.refused.iter_mut().for_each(|refused| refused.reason.clear());
    m.past = PastBoots::default(); // the same boots, which a packet that is kept lets go later
    m
}

/// One step in the life of a machine that restarts as machines do.
#[derive(Debug, Clone)]
enum Real {
    /// Its firmware asks, may download, and may have all of it.
    Firmware { asks: u8, downloads: bool, whole: bool },
    /// What was downloaded comes up: reports so often, healthy in the end or not.
    Up { reports: u8, healthy: bool, gives_up: bool },
    /// A person orders.
    Assign(u64),
    /// Nothing, for so many seconds.
    Silence(u64),
    /// The server is started anew.
    Server,
}

fn any_real() -> impl Strategy<Value = Real> {
    prop_oneof![
        8 => (1..4_u8, prop::bool::weighted(0.9), any::<bool>())
            .prop_map(|(asks, downloads, whole)| Real::Firmware { asks, downloads, whole }),
        6 => (1..4_u8, any::<bool>(), any::<bool>())
            .prop_map(|(reports, healthy, gives_up)| Real::Up { reports, healthy, gives_up }),
        2 => (1..4_u64).prop_map(Real::Assign),
        2 => (1..400_u64).prop_map(Real::Silence),
        1 => Just(Real::Server),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_spoofed_between_live_reports_moves_nothing(
        steps in proptest::collection::vec(
            (any_live(), 0..LIVE_MS / 2, proptest::collection::vec((any_packet(), 0..5_000_u64), 0..8)),
            1..40,
        )
    ) {
        let mut base = Story::good_on_1();
        base.assign(2, Via::Cold);
        let (mut spoofed, mut now, mut seq, mut heard) = (base.m.clone(), base.now, 2, base.now - 1_000);
        let mut base = base.m;
        for (live, pause, packets) in steps {
            // Reports never stop for long.
            let end = now + pause.min((heard + LIVE_MS - 1).saturating_sub(now));
            for (packet, wait) in packets {
                now = (now + wait).min(end);
                spoofed = pass(spoofed, now).event(packet, LIMITS, now).0;
                let seen = Machine { held_packets: vec![], ..spoofed.clone() };
                prop_assert_eq!(&seen, &pass(base.clone(), now));
            }
            now = end;
            let event = match live {
                Live::Order(event) if now + 1_000 < heard + LIVE_MS => event,
                Live::Order(_) => by(1, healthy(1, "a", 0, 1)), // a stray
                Live::Report { health, ready, stages } => {
                    (seq, heard) = (seq + 1, now);
                    let mut r = healthy(1, "a", seq, 1);
                    r.health = health.map(|healthy| Health { healthy, detail: "says so".into() });
                    let image = r.embedded.image.clone();
                    r.prefetch = ready.then_some(Prefetch { image, release: 2, sequence: 2, ready, progress: None });
                    r.stages = stages;
                    by(1, r)
                }
            };
            let report = matches!(&event, Event::Report(r) if r.report.seq > 0);
            base = pass(base, now).event(event.clone(), LIMITS, now).0;
            spoofed = pass(spoofed, now).event(event, LIMITS, now).0;
            prop_assert!(!report || spoofed.held_packets.is_empty());
            prop_assert_eq!(&Machine { held_packets: vec![], ..spoofed.clone() }, &base);
        }
    }

    /// The same life, once with packets kept, once with every packet believed at once, as before there was an agent's
    /// word against them: after each boot, and at each firmware's question, both say the same.
    #[test]
    fn a_real_reboot_loop_counts_as_if_believed_at_once(
        first in any::<bool>(),
        life in proptest::collection::vec((any_real(), 500..40_000_u64), 1..60),
    ) {
        let mut start = Story::good_on_1();
        if first {
            start.assign(2, Via::Cold).then(Event::Granted).leaves();
        } else {
            start.assign(2, Via::Cold);
        }
        let mut now = start.now;
        let (mut kept, mut believed) = (start.m.clone(), start.m);
        let (mut loaded, mut boot) = (1, 0);
        for (step, pause) in life {
            now += pause;
            let mut both = |event: Event, now: Millis| {
                kept = pass(kept.clone(), now).event(event.clone(), LIMITS, now).0;
                believed = pass(believed.clone(), now);
                if matches!(event, Event::Asked | Event::Downloads(_) | Event::TakesBytes | Event::Downloaded) {
                    believed.agent_seen = None;
                }
                believed = believed.clone().event(event, LIMITS, now).0;
                (kept.clone(), believed.clone())
            };
            match step {
                Real::Firmware { asks, downloads, whole } => {
                    for _ in 0..asks {
                        now += 4_000;
                        let (k, b) = both(Event::Tick, now);
                        prop_assert_eq!(k.boot_release(LIMIT), b.boot_release(LIMIT), "what is served");
                        both(Event::Asked, now);
                    }
                    if downloads {
                        let (k, b) = both(Event::Tick, now);
                        let served = k.boot_release(LIMIT).unwrap().clone();
                        prop_assert_eq!(Some(&served), b.boot_release(LIMIT));
                        loaded = served.release;
                        both(Event::Downloads(served), now);
                        now += u64::from(asks) * 10_000;
                        both(Event::TakesBytes, now);
                        if whole {
                            both(Event::Downloaded, now + 300);
                        }
                    }
                }
                Real::Up { reports, healthy: well, gives_up: ends } => {
                    boot += 1;
                    let name = format!("r{boot}");
                    for seq in 1..=u64::from(reports) {
                        now += 2_000;
                        let last = seq == u64::from(reports);
                        let r = match (well && last, ends && last) {
                            (true, _) => healthy(1, &name, seq, loaded),
                            (false, true) => gives_up(1, &name, seq, loaded),
                            (false, false) => report(1, &name, seq, loaded),
                        };
                        let (k, b) = both(by(1, r), now);
                        prop_assert_eq!(wordless(k), wordless(b));
                    }
                }
                // An order that comes between is tested above: it starts the count anew, and so forgets a fall-back
                // that only packets tell of.
                Real::Assign(_) if !both(Event::Tick, now).0.held_packets.is_empty() => {}
                Real::Assign(release) => {
                    both(Event::Assign { release: rel(release), via: Via::Cold.into() }, now);
                }
                Real::Silence(s) => now += s * 1_000,
                Real::Server => {
                    both(Event::ServerStarted, now);
                }
            }
        }
    }
}
