//! Over a line that loses reports and replies, every event that the spool had room for is taken once, in order.
#![allow(clippy::unwrap_used)]

use kiln_protocol::{Clocks, Intake, SPOOL_BATCH, SPOOL_LIMIT, Spool};
use proptest::prelude::*;

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
