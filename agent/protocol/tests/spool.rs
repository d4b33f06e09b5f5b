//! Over a line that loses reports and replies, every event that the spool had room for is taken once, in order.
#![allow(clippy::unwrap_used)]

use kiln_protocol::{Clocks, Intake, SPOOL_BATCH, SPOOL_LIMIT, Spool};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn clocks(boot: &str, ms: u64) -> Clocks {
    Clocks { boot_id: boot.into(), mono_ms: ms, unix_ms: 1_000_000 + ms }
}

#[derive(Debug, Clone)]
enum Step {
    Happens,
    Flood(usize),
    Report {
        arrives: bool,
        answered: bool,
    },
    /// The agent is started again from what it keeps.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Happens),
        1 => (1_usize..600).prop_map(Step::Flood),
        4 => (any::<bool>(), any::<bool>()).prop_map(|(arrives, answered)| Step::Report { arrives, answered }),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #[test]
    fn each_event_is_taken_once_in_order_and_what_was_dropped_is_counted(steps in prop::collection::vec(step(), 1..120)) {
        let (mut spool, mut intake) = (Spool::new("one".into()), Intake::default());
        let (mut happened, mut dropped, mut got) = (0_u64, 0_u64, Vec::<u64>::new());
        let mut note = |spool: &mut Spool, now: u64| {
            happened += 1;
            spool.note(&clocks("b", now), "health", true, &happened.to_string());
        };
        let drained = std::iter::repeat_n(Step::Report { arrives: true, answered: true }, SPOOL_LIMIT / SPOOL_BATCH + 1);
        for (now, step) in (0_u64..).zip(steps.into_iter().chain(drained)) {
            match step {
                Step::Happens => note(&mut spool, now),
                Step::Flood(events) => (0..events).for_each(|_| note(&mut spool, now)),
                Step::Report { arrives, answered } => {
                    let report = spool.report(&clocks("b", now));
                    prop_assert!(report.events.len() <= SPOOL_BATCH);
                    if arrives {
                        let (missed, taken) = intake.take(&report);
                        dropped += missed;
                        got.extend(taken.iter().map(|e| e.text.parse::<u64>().unwrap()));
                    }
                    if arrives && answered {
                        spool.answered();
                    }
                }
                Step::Restart => {
                    let kept = serde_json::to_vec(&spool).unwrap();
                    spool = serde_json::from_slice(&kept).unwrap();
                }
            }
        }
        prop_assert!(spool.is_empty());
        prop_assert!(got.windows(2).all(|pair| pair[0] < pair[1]), "once, in order");
        prop_assert_eq!(got.len() as u64 + dropped, happened);
    }
}

#[test]
fn another_spool_begins_anew_and_a_forgetful_server_counts_nothing_as_lost() {
    let (mut spool, mut intake) = (Spool::new("one".into()), Intake::default());
    for text in ["a", "b"] {
        spool.note(&clocks("b", 1), "drift", true, text);
        intake.take(&spool.report(&clocks("b", 2)));
        assert!(spool.answered());
    }
    spool.note(&clocks("b", 3), "drift", true, "c");
    // The server was put back to an old backup.
    let (missed, taken) = Intake::default().take(&spool.report(&clocks("b", 4)));
    assert_eq!((missed, taken.len()), (0, 1));
    // The machine's memory is gone.
    let mut other = Spool::new("two".into());
    other.note(&clocks("c", 1), "drift", false, "x");
    let (missed, taken) = intake.take(&other.report(&clocks("c", 5)));
    assert_eq!((missed, taken[0].text.as_str(), taken[0].age_ms), (0, "x", 4));
}

#[test]
fn ages_are_of_this_boots_clock_and_of_the_wall_clock_over_boots_and_texts_are_cut() {
    let mut spool = Spool::new("one".into());
    spool.note(&clocks("b", 10_000), "health", true, &"ü".repeat(400));
    let report = spool.report(&Clocks { boot_id: "b".into(), mono_ms: 12_000, unix_ms: 5 });
    assert_eq!((report.events[0].age_ms, report.events[0].text.len()), (2000, 300));
    let report = spool.report(&Clocks { boot_id: "c".into(), mono_ms: 1, unix_ms: 1_070_000 });
    assert_eq!(report.events[0].age_ms, 60_000);
}

/// A machine over many restarts, and a server that dies.
#[derive(Debug, Clone)]
enum Days {
    Happens,
    /// The state partition takes what the spool holds, or is full.
    Keeps {
        full: bool,
    },
    /// The server commits what it took, or dies before that; then the reply arrives, or it dies before that.
    Reports {
        commits: bool,
        answers: bool,
    },
    /// The power fails: what the machine has is what its disk has.
    Cut,
}

fn days() -> impl Strategy<Value = Days> {
    prop_oneof![
        40 => Just(Days::Happens),
        6 => any::<bool>().prop_map(|full| Days::Keeps { full }),
        8 => (any::<bool>(), any::<bool>()).prop_map(|(commits, answers)| Days::Reports { commits, answers }),
        1 => Just(Days::Cut),
    ]
}

/// Every event that reached the disk or the server is taken once; those are missing that the power took with it, and
/// those for which there was no room, which are counted or were lost with the cut.
fn live(steps: impl Iterator<Item = Days>) {
    let (mut disk, mut intake) = (serde_json::to_vec(&Spool::new("0".into())).unwrap(), Intake::default());
    let mut spool = Spool::new("0".into());
    let (mut happened, mut boots, mut dropped) = (0_u64, 0_u64, 0_u64);
    let (mut got, mut times) = (BTreeSet::new(), 0_usize);
    let (mut since_kept, mut lost) = (BTreeSet::new(), BTreeSet::new());
    let drain =
        std::iter::repeat_n(Days::Reports { commits: true, answers: true }, 3 * (SPOOL_LIMIT / SPOOL_BATCH + 2));
    for (now, step) in (0_u64..).zip(steps.chain(drain)) {
        let at = clocks(&boots.to_string(), now);
        match step {
            Days::Happens => {
                happened += 1;
                spool.note(&at, "health", true, &happened.to_string());
                since_kept.insert(happened);
            }
            Days::Keeps { full: true } => {}
            Days::Keeps { full: false } => {
                disk = serde_json::to_vec(&spool).unwrap();
                since_kept.clear();
            }
            Days::Reports { commits, answers } => {
                let report = spool.report(&at);
                let mut after = intake.clone();
                let (missed, taken) = after.take(&report);
                if commits {
                    intake = serde_json::from_slice(&serde_json::to_vec(&after).unwrap()).unwrap();
                    dropped += missed;
                    times += taken.len();
                    got.extend(taken.iter().map(|e| e.text.parse::<u64>().unwrap()));
                }
                if commits && answers {
                    spool.answered();
                }
            }
            // The server remembers 16 spools.
            Days::Cut if boots == 12 => {}
            Days::Cut => {
                boots += 1;
                lost.extend(since_kept.iter().filter(|n| !got.contains(*n)).copied());
                since_kept.clear();
                spool = serde_json::from_slice::<Spool>(&disk).unwrap().taken_up(boots.to_string());
            }
        }
        assert!(serde_json::to_vec(&spool).unwrap().len() < 256 << 10, "it is bounded");
    }
    assert!(spool.is_empty());
    assert_eq!(got.len(), times, "none is taken twice");
    let missing = (1..=happened).filter(|n| !got.contains(n) && !lost.contains(n)).count() as u64;
    assert!(missing <= dropped, "{missing} are missing, {dropped} are counted");
}

proptest! {
    #[test]
    fn over_restarts_full_disks_and_a_dying_server_no_event_is_taken_twice(steps in prop::collection::vec(days(), 1..400)) {
        live(steps.into_iter());
    }
}

#[test]
fn thousands_of_events_of_days_without_a_server_are_told_once() {
    // Long floods without a server, with a disk that is full half of the time.
    let day = |n: u32| {
        let hour = (0..200).map(|_| Days::Happens).chain([Days::Keeps { full: n.is_multiple_of(2) }]);
        let asks = [Days::Reports { commits: n.is_multiple_of(3), answers: false }];
        hour.chain(asks).chain((n % 7 == 6).then_some(Days::Cut)).collect::<Vec<_>>()
    };
    live((0..40).flat_map(day));
}

#[test]
fn numbers_that_the_disk_does_not_know_of_are_not_given_again() {
    let (mut spool, mut intake) = (Spool::new("one".into()), Intake::default());
    spool.note(&clocks("a", 1), "drift", true, "kept");
    let disk = serde_json::to_vec(&spool).unwrap();
    spool.note(&clocks("a", 2), "drift", true, "sent, never kept");
    assert_eq!(intake.take(&spool.report(&clocks("a", 3))).1.len(), 2);
    // The power fails. What happens from now on has a number that the server has not seen.
    for name in ["two", "three"] {
        let mut spool = serde_json::from_slice::<Spool>(&disk).unwrap().taken_up(name.into());
        spool.note(&clocks(name, 1), "drift", true, "new");
        assert_eq!(intake.take(&spool.report(&clocks(name, 2))), (0, vec![]), "the server has that already");
        assert!(spool.answered() && !spool.is_empty());
        let (missed, taken) = intake.take(&spool.report(&clocks(name, 3)));
        assert_eq!((missed, taken.len(), taken[0].text.as_str()), (0, 1, "new"));
    }
}
