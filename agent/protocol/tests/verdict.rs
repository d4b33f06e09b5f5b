//! Hysteresis and soak, as a table and against a plain model.
#![allow(clippy::unwrap_used)]

use kiln_protocol::{Rule, Verdict};
use proptest::prelude::*;

fn rule(soak_ms: u64, fail_after: u32, pass_after: u32) -> Rule {
    Rule { name: "web".into(), soak_ms, fail_after, pass_after }
}

fn found(pass: bool) -> Result<(), String> {
    if pass { Ok(()) } else { Err("web: status 500".into()) }
}

#[test]
fn a_check_turns_after_enough_failures_or_passes_in_a_row() {
    // One letter a second: `.` passes, `x` fails; below, what the machine then is.
    let table = [
        (rule(0, 1, 1), "x..x.", "-++-+"),
        (rule(0, 3, 1), ".xx.xxx.", "++++++-+"),
        (rule(0, 1, 3), "...x...", "--+---+"),
        (rule(0, 2, 2), "..x.xx.x..", "-++++----+"),
        (rule(2000, 1, 1), "...x....", "--+---++"),
        (rule(2000, 2, 1), "...xx....", "--++---++"),
        (rule(1000, 1, 4), ".....", "---++"),
    ];
    for (rule, results, expected) in table {
        let mut verdict = Verdict::new(vec![rule.clone()]);
        let mut got = String::new();
        for (second, result) in (0..).zip(results.chars()) {
            let (next, health, turns) = verdict.round(vec![found(result == '.')], second * 1000);
            let before = got.ends_with('+');
            assert_eq!(
                turns.iter().map(|t| t.good).collect::<Vec<_>>(),
                Vec::from_iter((health.healthy != before).then_some(health.healthy))
            );
            got.push(if health.healthy { '+' } else { '-' });
            verdict = next;
        }
        assert_eq!(got, expected, "{results} by {rule:?}");
    }
}

#[test]
fn the_words_say_what_fails_what_is_borne_and_what_is_still_to_come() {
    let verdict = Verdict::new(vec![rule(0, 1, 1), rule(5000, 3, 2)]);
    assert!(!verdict.all_pass());
    let (verdict, health, _) = verdict.round(vec![Ok(()), Err("down".into())], 0);
    assert_eq!((health.detail.as_str(), verdict.all_pass()), ("down", false));
    let (verdict, health, _) = verdict.round(vec![Ok(()), Ok(())], 1000);
    assert!(verdict.all_pass() && !health.healthy);
    assert_eq!(health.detail, "all checks pass; 5 s of soak left");
    let (verdict, health, turns) = verdict.round(vec![Ok(()), Ok(())], 6000);
    assert_eq!((health.healthy, health.detail.as_str(), turns.len()), (true, "all checks pass", 1));
    let (verdict, health, _) = verdict.round(vec![Ok(()), Err("slow".into())], 7000);
    assert!(!verdict.all_pass() && health.healthy);
    assert_eq!((health.healthy, health.detail.as_str()), (true, "all checks hold; failed 1 of 3 times in a row: slow"));
    // A check without a result has failed.
    let (_, health, turns) = verdict.round(vec![], 8000);
    assert_eq!((health.healthy, health.detail.as_str(), turns.len()), (false, "web was not checked", 1));
    let (_, health, _) = Verdict::new(vec![rule(0, 1, 3)]).round(vec![Ok(())], 0);
    assert_eq!(health.detail, "all checks pass; 2 more in a row are asked for");
}

proptest! {
    /// Against the definition: good once a run of passes was long enough in number and time, until a run of failures was.
    #[test]
    fn the_verdict_is_its_definition(
        soak in 0_u64..6000, fail_after in 1_u32..4, pass_after in 1_u32..4,
        steps in prop::collection::vec((any::<bool>(), 1_u64..3000), 1..80)
    ) {
        let mut verdict = Verdict::new(vec![rule(soak, fail_after, pass_after)]);
        let (mut now, mut good, mut run, mut began) = (0, false, (true, 0), 0);
        for (pass, pause) in steps {
            now += pause;
            if run.0 != pass || run.1 == 0 || (!good && run.1 == u32::MAX) {
                (run, began) = ((pass, 0), now);
            }
            run.1 += 1;
            good = if good { pass || run.1 < fail_after } else { pass && run.1 >= pass_after && now - began >= soak };
            let (next, health, turns) = verdict.round(vec![found(pass)], now);
            prop_assert_eq!(health.healthy, good);
            prop_assert!(!health.detail.is_empty() && turns.len() <= 1);
            verdict = next;
        }
    }
}
