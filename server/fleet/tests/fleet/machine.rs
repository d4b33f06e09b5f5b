//! The machine's state machine: the stories a person would tell, then whatever a machine or a network can do.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

#[test]
fn first_boot_to_healthy() {
    let s = Story::good_on_1();
    assert_eq!(s.m.assigned.as_ref().unwrap().sequence, 1);
    assert_eq!(s.m.last_good(), Some(&rel(1)));
    let stages: Vec<Stage> = s.m.boots[0].stages.iter().map(|s| s.stage).collect();
    assert_eq!(stages, [Stage::Dhcp, Stage::Program, Stage::Program]);
    assert_eq!(s.m.boots.len(), 1, "firmware's and agent's part are one boot");
    assert!(!s.m.is_trial());
}

#[test]
fn a_root_hash_that_was_not_published_is_not_healthy() {
    let mut s = Story::good_on_1();
    let mut r = healthy(1, "a", 3, 1);
    r.running.as_mut().unwrap().root_hash = root(9);
    s.then(by(1, r)).is(StateKind::Degraded);
    assert!(s.m.state.reason.contains("root hash"));
}

#[test]
fn reimage_by_kexec() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec).is(StateKind::Healthy);
    assert!(s.last.contains(&Action::Sign) && s.last.contains(&Action::Wake) && s.last.contains(&Action::Save));
    assert_eq!(s.m.assigned.as_ref().unwrap().sequence, 2);
    s.then(Event::Granted).is(StateKind::Draining);
    assert!(!s.m.is_available());
    s.then(by(1, healthy(1, "a", 3, 1))).is(StateKind::Draining);
    let mut r = healthy(1, "a", 4, 1);
    r.stages = vec![StageRecord { stage: Stage::Going, state: StageState::Started, at_ms: 3_900 }];
    s.then(by(1, r)).is(StateKind::Reimaging);
    s.then(by(1, report(1, "b", 1, 2))).is(StateKind::Reimaging);
    assert_eq!(s.m.boots.back().unwrap().via, Via::Kexec);
    s.then(by(1, healthy(1, "b", 2, 2))).is(StateKind::Healthy);
    assert_eq!((s.m.last_good(), s.m.granted), (Some(&rel(1)), None), "firmware has not started it yet");
    assert!(s.m.is_trial() && s.m.is_available());
    assert_eq!(s.m.state.reason, "runs minimal/2 since a kexec; good once it is healthy after a cold boot too");
    s.boots_trial(2).then(by(1, report(1, "c", 1, 2))).then(by(1, healthy(1, "c", 2, 2))).is(StateKind::Healthy);
    assert_eq!((s.m.last_good(), s.m.attempts, s.m.carried.clone()), (Some(&rel(2)), 0, None));
    assert_eq!(s.m.state.reason, "runs minimal/2");
}

#[test]
fn a_trial_that_hangs_after_a_kexec_has_had_a_boot() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec).then(Event::Granted).then(by(1, going(1, "a", 4, 1))).is(StateKind::Reimaging);
    assert_eq!(
        (s.m.boot_release(1), s.m.boot_release(2)),
        (Some(&rel(1)), Some(&rel(2))),
        "answered before it is recorded"
    );
    s.then(Event::Asked).then(Event::Asked).is(StateKind::Reimaging);
    assert_eq!(s.m.attempts, 1, "the kexec was one, however often its firmware repeats itself");
    s.then(Event::Downloads(rel(2)));
    assert_eq!(s.m.attempts, 2);

    let mut s = Story::good_on_1();
    let mut r = going(1, "a", 4, 1);
    let failure = Failure { kind: "kexec-load".into(), message: "refused".into(), attempt: 1, retry_in_ms: None };
    r.stages.insert(0, StageRecord { stage: Stage::Going, state: StageState::Failed(failure), at_ms: r.at_ms });
    s.assign(2, Via::Kexec).then(Event::Granted).then(by(1, r)).is(StateKind::Reimaging).then(Event::Asked);
    assert_eq!(s.m.attempts, 0, "it could not be loaded, so it goes through its firmware");
}

#[test]
fn a_failed_start_of_the_other_release_gives_the_grant_back() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec).then(Event::Granted);
    let mut r = healthy(1, "a", 4, 1);
    let failure = Failure { kind: "kexec-load".into(), message: "refused".into(), attempt: 1, retry_in_ms: Some(1) };
    r.stages = vec![StageRecord { stage: Stage::Going, state: StageState::Failed(failure), at_ms: 3_900 }];
    s.then(by(1, r)).is(StateKind::Healthy);
    assert_eq!(s.m.granted, None);
    assert!(s.m.last_words.contains("refused"));
}

#[test]
fn a_trial_has_three_boots_then_the_last_known_good_one() {
    let mut s = Story::good_on_1();
    s.assign(2, Via::Cold).then(Event::Granted).leaves();
    for n in 1..=3 {
        // The first is believed at once: the agent said that it leaves. The others wait for the next boot's report.
        s.boots_trial(2);
        assert_eq!(s.m.attempts, if n == 1 { 1 } else { n - 1 }, "retransmissions do not count");
        s.then(by(1, report(1, &format!("t{n}"), 1, 2))).is(StateKind::Reimaging);
        assert_eq!(s.m.attempts, n);
    }
    assert_eq!(s.m.boot_release(LIMIT), Some(&rel(1)), "decided before the packet is recorded");
    // Its agent gave the boot up, and said so: what its firmware asks is believed.
    s.then(by(1, gives_up(1, "t3", 2, 2)));
    s.then(Event::Asked).is(StateKind::FellBack);
    assert!(s.last.contains(&Action::Sign));
    assert_eq!(s.m.boot_release(LIMIT), Some(&rel(1)));
    let a = s.m.assigned.clone().unwrap();
    assert_eq!((a.release, a.sequence), (rel(1), 3), "an older release under a higher sequence");
    assert!(!s.m.is_available());
    s.then(by(1, healthy(1, "back", 1, 1))).is(StateKind::FellBack);
    assert!(s.m.is_available(), "it works, and keeps saying why it is not where it was sent");
    assert_eq!(s.m.check_assign(&rel(2)).unwrap_err().to_string().matches("kiln machine clear rack-1").count(), 1);
    s.then(Event::Clear).is(StateKind::Healthy);
    assert_eq!(s.m.check_assign(&rel(2)), Ok(()));
}

#[test]
fn power_blips_on_a_good_release_cost_nothing() {
    let mut s = Story::good_on_1();
    for n in 0..20 {
        s.boots_trial(1).then(by(1, report(1, &format!("p{n}"), 1, 1))).is(StateKind::Booting);
    }
    assert_eq!((s.m.attempts, s.m.boot_release(LIMIT), s.m.boots.len()), (0, Some(&rel(1)), BOOTS_KEPT));
    // Nor where it was well in between, however short.
    for n in 0..20 {
        s.boots_trial(1).then(by(1, report(1, &format!("q{n}"), 1, 1)));
        s.then(by(1, healthy(1, &format!("q{n}"), 2, 1))).is(StateKind::Healthy);
        s.then(by(1, unwell(1, &format!("q{n}"), 3, 1))).is(StateKind::Degraded);
    }
    assert!(s.m.boot_loop.starts.is_empty() && matches!(desire(&s.m, &key(1)), Desire::Run(_)));
}

#[test]
fn a_trial_with_nothing_to_go_back_to_goes_on_and_says_so() {
    let mut s = Story::new();
    s.then(by(1, report(1, "a", 1, 1))).approve();
    s.wait(LIVE_MS);
    for _ in 0..5 {
        s.boots_trial(1);
    }
    assert_eq!(s.m.boot_release(LIMIT), Some(&rel(1)));
    assert!(s.m.last_words.contains("no earlier good release"), "{}", s.m.last_words);
}

#[test]
fn strays_change_nothing() {
    let mut s = Story::good_on_1();
    s.then(by(1, report(1, "b", 5, 1)));
    // That one came late is remembered of its boot.
    let rest = |m: &Machine| Machine { last_seen: 0, boots: std::collections::VecDeque::new(), ..m.clone() };
    let before = s.m.clone();
    for stray in [report(1, "b", 5, 1), report(1, "b", 4, 2), healthy(1, "a", 99, 1)] {
        s.then(by(1, stray));
        assert_eq!(rest(&s.m), rest(&before));
        assert_eq!((&s.m.boots[1], s.m.boots[0].late <= 1), (&before.boots[1], true));
        assert_eq!(s.last, []);
    }
}

#[test]
fn silence_has_a_deadline_and_a_reason_in_every_state() {
    let mut s = Story::good_on_1();
    s.wait(LIVE_MS / 2).is(StateKind::Healthy).wait(LIVE_MS).is(StateKind::Unreachable);
    assert!(s.m.state.reason.contains("no word for"));
    s.then(by(1, healthy(1, "a", 3, 1))).is(StateKind::Healthy);
    s.then(Event::Asked).is(StateKind::Healthy).wait(LIVE_MS).is(StateKind::Booting);
    s.wait(BOOT_DEADLINE_MS).is(StateKind::Unreachable);
    s.then(by(1, report(1, "c", 1, 1))).is(StateKind::Booting);
    for n in 2..20 {
        s.now += 60_000;
        s.then(by(1, report(1, "c", n, 1)));
    }
    s.then(Event::Tick).is(StateKind::Degraded);
    s.then(by(1, healthy(1, "c", 30, 1))).assign(2, Via::Cold).then(Event::Granted).is(StateKind::Draining);
    s.wait(DRAIN_DEADLINE_MS).is(StateKind::Degraded);
    assert_eq!(s.m.granted, None);
    let mut unknown = Story::new();
    unknown.then(by(1, report(1, "a", 1, 1))).wait(FORGET_MS);
    assert_eq!(unknown.last, [Action::Forget]);
}

#[test]
fn a_server_that_was_down_blames_nobody() {
    let mut s = Story::good_on_1();
    s.now += 10 * LIVE_MS;
    s.then(Event::ServerStarted).then(Event::Tick).is(StateKind::Healthy);
    s.wait(LIVE_MS).is(StateKind::Unreachable);
}

#[test]
fn a_stranger_gets_nothing_and_disturbs_nothing_until_a_person_says_so() {
    let mut s = Story::good_on_1();
    s.then(by(2, report(1, "x", 1, 1))).is(StateKind::Healthy);
    assert!(s.last.contains(&Action::Save) && s.m.last_words.contains("clear rack-1"));
    s.then(by(2, report(1, "x", 2, 1))).is(StateKind::Healthy);
    assert!(s.last.is_empty(), "a stranger that repeats itself is no news: {:?}", s.last);
    assert!(matches!(desire(&s.m, &key(2)), Desire::Wait(why) if why.contains("clear rack-1")));
    assert!(matches!(desire(&s.m, &key(1)), Desire::Run(_)));
    s.then(by(1, healthy(1, "a", 9, 1))).is(StateKind::Healthy);
    // Its firmware's settings were erased, and a person has looked.
    s.then(by(2, report(1, "x", 3, 1))).then(Event::Adopt(key(2)));
    s.then(by(2, healthy(1, "x", 4, 1))).is(StateKind::Healthy);
    assert!(matches!(desire(&s.m, &key(2)), Desire::Run(_)));
    assert!(matches!(desire(&s.m, &key(1)), Desire::Wait(_)));
}

#[test]
fn a_name_only_machine_brings_a_new_key_with_a_new_boot_only() {
    let ephemeral = |mut r: Report| {
        r.machine.key_storage = KeyStorage::Ephemeral;
        r
    };
    let mut s = Story::new();
    s.then(by(1, ephemeral(healthy(1, "a", 1, 1)))).approve().is(StateKind::Healthy);
    s.then(by(2, ephemeral(report(1, "b", 1, 1)))).is(StateKind::Booting);
    assert!(matches!(desire(&s.m, &key(2)), Desire::Run(_)));
    assert!(matches!(desire(&s.m, &key(1)), Desire::Wait(_)), "the key of the boot before is nobody's");
    s.then(by(1, ephemeral(healthy(1, "a", 2, 1)))).is(StateKind::Quarantined);

    let mut s = Story::new();
    s.then(by(1, ephemeral(healthy(1, "a", 1, 1)))).approve();
    s.then(by(2, ephemeral(report(1, "a", 2, 1)))).is(StateKind::Quarantined);
}

#[test]
fn orders_need_an_approved_machine() {
    let mut s = Story::new();
    assert!(matches!(s.m.check_assign(&rel(1)), Err(Refusal::NotApproved { .. })));
    s.assign(1, Via::Cold).is(StateKind::Discovered);
    assert_eq!(s.m.assigned, None);
    s.approve().then(Event::Retire).is(StateKind::Retired);
    assert!(matches!(s.m.check_assign(&rel(1)), Err(Refusal::Retired { .. })));
    s.approve().is(StateKind::Approved);
    assert_eq!(s.m.assigned.as_ref().unwrap().sequence, 2, "a sequence is never used twice");
}

#[test]
fn why_the_list_does_not_approve_it_is_said_once() {
    let mut s = Story::new();
    let no = |reason: &str| Event::NotApproved { reason: reason.into() };
    s.then(no("the name is taken")).is(StateKind::Discovered);
    assert_eq!((s.m.state.reason.as_str(), s.last.contains(&Action::Save)), ("the name is taken", true));
    let deadline = s.m.state.deadline;
    s.then(no("the name is taken"));
    assert!(s.last.is_empty() && s.m.state.deadline == deadline, "{:?}", s.last);
    s.then(no("it does not fit"));
    assert_eq!(s.m.state.reason, "it does not fit");
    s.approve().then(no("too late")).is(StateKind::Approved);
    assert_ne!(s.m.state.reason, "too late");
}

#[test]
fn a_machine_survives_being_stored() {
    let s = Story::good_on_1();
    let text = serde_json::to_string(&s.m).unwrap();
    let mut back: Machine = serde_json::from_str(&text).unwrap();
    back.boots = s.m.boots.iter().map(|b| serde_json::from_str(&serde_json::to_string(b).unwrap()).unwrap()).collect();
    assert_eq!(back, s.m);
}

#[test]
fn that_it_was_heard_outlives_a_commit_that_failed() {
    let mut s = Story::good_on_1();
    let stored = s.m.clone();
    s.wait(LIVE_MS / 2).then(by(1, healthy(1, "a", 9, 1)));
    assert!(s.m.agent_seen == Some(s.now) && stored.agent_seen != s.m.agent_seen);
    let back = stored.clone().put_back(s.m.clone());
    assert_eq!((back.last_seen, back.agent_seen, back.reported), (s.now, Some(s.now), Some(s.now)));
    let other = Machine { key: Some(key(2)), ..s.m.clone() };
    assert_eq!(stored.clone().put_back(other).agent_seen, stored.agent_seen, "another key's word is not its own");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_happens(events in proptest::collection::vec((any_event(), 0..400_000_u64), 1..60)) {
        let mut m = Machine::discovered(id(1), 0);
        let mut now = 0;
        let mut kinds = std::collections::BTreeSet::new();
        for (event, pause) in events {
            now += pause;
            let before = m.clone();
            let forced = matches!(event, Event::Assign { .. } | Event::Approve { .. });
            let (after, out) = m.event(event.clone(), LIMITS, now);
            kinds.insert(after.state.kind);
            prop_assert!(!after.state.reason.is_empty());
            prop_assert!(!after.state.reason.contains('\n') && !after.last_words.contains('\n'));
            prop_assert!(after.boots.len() <= BOOTS_KEPT && after.good.len() <= 8);
            prop_assert!(after.held_packets.len() <= HELD_KEPT);
            prop_assert!(after.boots.iter().all(|b| b.stages.len() <= RECORDS_KEPT));
            prop_assert!(after.boots.iter().flat_map(|b| &b.stages).all(|s| s.at <= now), "nothing is in the future");
            let waits_for_a_person =
                matches!(after.state.kind, StateKind::Unreachable | StateKind::Quarantined | StateKind::Retired);
            prop_assert_eq!(after.state.deadline.is_none(), waits_for_a_person, "{:?}", after.state);
            // One assignment; its sequence grows exactly when it changes; a change is signed and saved.
            let (a, b) = (before.assigned.as_ref(), after.assigned.as_ref());
            if a != b {
                let steps = b.map_or(0, |b| b.sequence) - a.map_or(0, |a| a.sequence);
                prop_assert!(out.contains(&Action::Sign) && out.contains(&Action::Save));
                let held = u32::try_from(before.held_packets.len()).unwrap();
                let up = before.healthy_by.is_some_and(|by| by <= now) && before.agent_seen.is_some();
                let looped = before.boot_loop.starts.len() + 1 >= LOOP_STARTS
                    || before.boot_loop.mute + held + 1 >= MUTE_STARTS;
                let fell = after.fell_back.is_some() && (before.attempts + held >= LIMIT || up || looped);
                prop_assert!(steps == 1 && (forced || fell) || steps == 2 && forced && held > 0, "{steps}");
            }
            // An availability or a state that changed is committed, and those who wait are told.
            if before.state.kind != after.state.kind {
                prop_assert!(out.contains(&Action::Save) && out.contains(&Action::Wake));
            }
            if before.is_available() != after.is_available() {
                prop_assert!(out.contains(&Action::Wake));
            }
            // Once a good release exists, a trial never gets more boots than the limit.
            if after.asked && after.is_trial() && after.last_good().is_some() && after.boot_release(LIMIT).is_some() {
                prop_assert!(after.attempts < LIMIT);
            }
            prop_assert!(after.state.kind != StateKind::Healthy || after.running.is_some() || before == after
                || before.state.kind == StateKind::Healthy);
            let waits = after.due(LIMITS).is_none_or(|due| due > now);
            prop_assert!(!matches!(event, Event::Tick) || waits, "a tick for ever");
            // A step repeated at the same time by a lost reply says nothing new.
            if let Event::Report(_) = &event {
                let (again, out) = after.clone().event(event, LIMITS, now);
                prop_assert_eq!(&again, &after);
                prop_assert!(out.is_empty(), "{:?}", out);
            }
            m = after;
        }
    }
}

#[test]
fn a_prefetch_that_goes_on_is_known_at_once_and_stored_in_tenths() {
    let mut machine = Machine::discovered(id(1), 0).event(by(1, healthy(1, "a", 1, 1)), LIMITS, 1000).0;
    let (mut saved, total_bytes) = (0, 1_000_000);
    for seq in 2..=1001 {
        let progress = Some(Progress { received_bytes: (seq - 1) * 1000, total_bytes });
        let image = "minimal".parse().unwrap();
        let prefetch = Some(Prefetch { image, release: 2, sequence: 1, ready: false, progress });
        let agent_memory = Some(AgentMemory { rss_bytes: seq, peak_bytes: seq, cpu_ms: None, ran_ms: None });
        let said = Report { prefetch: prefetch.clone(), agent_memory, ..healthy(1, "a", seq, 1) };
        let (next, actions) = machine.event(by(1, said), LIMITS, 1000 + seq);
        saved += usize::from(actions.contains(&Action::Save));
        assert_eq!((&next.prefetch, next.agent_memory), (&prefetch, agent_memory));
        machine = next;
    }
    assert_eq!(saved, 11, "the first report of it, and every tenth");
}

#[test]
fn what_an_allow_list_denies_is_said_and_stored_once_and_counted_for_nothing() {
    let denied = |count| ExecState {
        running: true,
        denied: count,
        violations: vec![ExecViolation {
            path: "/srv/x".into(),
            sha256: None,
            verdict: ExecVerdict::Denied,
            ancestry: Vec::new(),
            at_ms: count,
            count,
        }],
        ..ExecState::default()
    };
    let mut machine = Machine::discovered(id(1), 0).event(by(1, healthy(1, "a", 1, 1)), LIMITS, 1000).0;
    let (mut saved, mut said) = (0, Vec::new());
    for seq in 2..=100 {
        let exec = Some(denied(seq));
        let report = Report { exec: exec.clone(), ..healthy(1, "a", seq, 1) };
        let (next, actions) = machine.event(by(1, report), LIMITS, 1000 + seq);
        saved += usize::from(actions.contains(&Action::Save));
        for action in actions {
            if let Action::Say { warn, text } = action {
                said.push((warn, text));
            }
        }
        assert_eq!(next.exec, exec, "the count is known at once");
        machine = next;
    }
    assert_eq!((saved, said), (1, vec![(true, "allow-list: denied /srv/x (not read whole) by ".to_owned())]));
    let machine = machine.event(by(1, healthy(1, "b", 1, 1)), LIMITS, 5000).0;
    assert_eq!(machine.exec, None, "it is of one boot");
}
