//! Access roles, attempts and second persons, decided without a clock.

use kiln_fleet::access::{
    AccessRole, Attempts, Proposal, ProposalEvent, ProposalRefusal, ProposalState, Refusals, Spree,
};
use proptest::prelude::*;
use std::collections::BTreeSet;

#[test]
fn roles_are_ordered_and_written_as_people_write_them() {
    use AccessRole::{Admin, Operator, Technician, Viewer};
    assert!(Viewer < Technician && Technician < Operator && Operator < Admin);
    for role in AccessRole::ALL {
        assert_eq!(role.as_str().parse::<AccessRole>().unwrap(), role);
        assert_eq!(serde_json::to_string(&role).unwrap(), format!("\"{role}\""));
    }
    assert!("root".parse::<AccessRole>().is_err() && "Admin".parse::<AccessRole>().is_err());
}

#[test]
fn five_failures_are_free_and_then_one_each_minute() {
    let mut attempts = Attempts::new(5, 60_000, 100);
    for n in 0..5 {
        assert_eq!(attempts.wait("10.0.0.1", 1_000), None, "try {n}");
        attempts.failed("10.0.0.1", 1_000);
    }
    assert_eq!(attempts.wait("10.0.0.1", 1_000), Some(60_000));
    assert_eq!(attempts.wait("10.0.0.2", 1_000), None, "another's failures are not its own");
    assert_eq!(attempts.wait("10.0.0.1", 60_999), Some(1));
    assert_eq!(attempts.wait("10.0.0.1", 61_000), None);
    attempts.failed("10.0.0.1", 61_000);
    assert_eq!(attempts.wait("10.0.0.1", 61_000), Some(60_000));
    // A clock that goes back locks nobody out for long.
    assert_eq!(attempts.wait("10.0.0.1", 0), Some(60_000));
}

#[test]
fn a_crowd_of_addresses_takes_no_more_memory_and_shares_one_place() {
    let mut attempts = Attempts::new(2, 60_000, 50);
    for n in 0..10_000 {
        attempts.failed(&format!("10.0.{}.{}", n / 250, n % 250), 1_000);
    }
    assert!(attempts.len() <= 51, "{}", attempts.len());
    assert!(attempts.wait("192.0.2.1", 1_000).is_some(), "no room: it waits with the others");
    // What is forgiven makes room.
    attempts.failed("192.0.2.1", 1_000_000);
    assert!(attempts.len() <= 51 && attempts.wait("192.0.2.1", 1_000_000).is_none());
}

proptest! {
    #[test]
    fn nobody_fails_more_often_than_allowed(times in proptest::collection::vec(0_u64..5_000, 1..200)) {
        let (burst, each) = (3, 1_000);
        let mut attempts = Attempts::new(burst, each, 10);
        let (mut now, mut taken) = (0, 0_u64);
        for pause in times {
            now += pause;
            if attempts.wait("a", now).is_none() {
                attempts.failed("a", now);
                taken += 1;
            }
            prop_assert!(taken <= u64::from(burst) + now / each, "{taken} in {now} ms");
        }
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn proposal() -> Proposal {
    Proposal {
        id: "k1".into(),
        action: "assign".into(),
        what: "assign minimal/2 to rack-1".into(),
        by: "token ann".into(),
        behind: set(&["token ann", "uid 0"]),
        alone: set(&["token ann"]),
        at: 1_000,
        deadline: 10_000,
        state: ProposalState::Open,
    }
}

fn confirm(by: &str, behind: &[&str]) -> ProposalEvent {
    ProposalEvent::Confirm { by: by.into(), behind: set(behind), alone: set(&[by]) }
}

#[test]
fn whoever_made_both_credentials_alone_is_one_person() {
    let asked = Proposal {
        by: "token one".into(),
        behind: set(&["token one", "token ann", "uid 0"]),
        alone: set(&["token one", "token ann"]),
        ..proposal()
    };
    let two = |alone: &[&str]| ProposalEvent::Confirm {
        by: "token two".into(),
        behind: set(&["token two", "token ann", "uid 0"]),
        alone: set(alone),
    };
    let refused = asked.clone().event(two(&["token two", "token ann"]), 2_000);
    assert_eq!(refused, Err(ProposalRefusal::SameMaker { maker: "token ann".into() }));
    // Another had to confirm the making of the second token: nobody holds both.
    assert!(matches!(asked.event(two(&["token two"]), 2_000).unwrap().state, ProposalState::Confirmed { .. }));
    // What was asked for before this was known is confirmed as before.
    let mut older = serde_json::to_value(proposal()).unwrap();
    older.as_object_mut().unwrap().remove("alone");
    assert_eq!(serde_json::from_value::<Proposal>(older).unwrap().alone, set(&[]));
}

#[test]
fn only_another_person_confirms_and_only_once() {
    let same = |r: Result<Proposal, ProposalRefusal>| matches!(r, Err(ProposalRefusal::SamePerson { .. }));
    assert!(same(proposal().event(confirm("token ann", &["token ann"]), 2_000)));
    assert!(same(proposal().event(confirm("uid 0", &["uid 0"]), 2_000)), "it made ann's token, and could use it");
    assert!(same(proposal().event(confirm("token doll", &["token doll", "token ann", "uid 0"]), 2_000)), "ann made it");
    let done = proposal().event(confirm("token ben", &["token ben", "uid 0"]), 2_000).unwrap();
    assert!(matches!(&done.state, ProposalState::Confirmed { by, outcome: None, .. } if by == "token ben"));
    let again = done.clone().event(confirm("token cid", &["token cid"]), 2_001);
    assert_eq!(again, Err(ProposalRefusal::Confirmed));
    assert_eq!(
        done.clone().event(ProposalEvent::Refuse { by: "token ann".into() }, 2_001),
        Err(ProposalRefusal::Confirmed)
    );
    let told = done.event(ProposalEvent::Done { outcome: "done".into() }, 2_002).unwrap();
    assert!(matches!(told.state, ProposalState::Confirmed { outcome: Some(_), .. }));
}

#[test]
fn what_is_refused_or_too_old_is_over() {
    let refused = proposal().event(ProposalEvent::Refuse { by: "token ann".into() }, 2_000).unwrap();
    assert_eq!(refused.event(confirm("token ben", &["token ben"]), 2_001), Err(ProposalRefusal::Refused));
    assert_eq!(proposal().event(confirm("token ben", &["token ben"]), 10_000), Err(ProposalRefusal::Expired));
    assert!(proposal().is_open(9_999) && !proposal().is_open(10_000));
    let expired = proposal().event(ProposalEvent::Tick, 10_000).unwrap();
    assert_eq!(expired.state, ProposalState::Expired);
    assert_eq!(expired.event(confirm("token ben", &["token ben"]), 5_000), Err(ProposalRefusal::Expired));
    assert_eq!(proposal().event(ProposalEvent::Tick, 9_999).unwrap().state, ProposalState::Open);
}

#[test]
fn a_person_changes_a_few_machines_alone_in_an_hour() {
    let mut spree = Spree::default();
    let mut take = |who: &[&str], machine: &str, now: u64| spree.take(who[0], &set(who), machine, 2, now);
    assert!(take(&["ann"], "rack-1", 0) && take(&["ann"], "rack-2", 10));
    assert!(!take(&["ann"], "rack-3", 20) && take(&["ben"], "rack-3", 20));
    assert!(take(&["ann"], "rack-1", 30), "the same one again is no further one");
    assert!(!take(&["ann"], "rack-3", 3_600_000), "rack-1 was changed again at 30");
    assert!(!take(&["doll", "ann"], "rack-3", 3_600_000), "a token of her own making is no other person");
    assert!(take(&["doll", "ann"], "rack-3", 3_600_011));
    assert!(
        take(&["toy", "ann"], "rack-4", 3_600_012),
        "what doll changed is not toy's, and ann may have made both for others"
    );
    assert!(!take(&["ann"], "rack-5", 3_600_013), "what her tokens changed counts for her");
    assert!(take(&["toy", "ann"], "rack-5", 3_600_014) && !take(&["toy", "ann"], "rack-6", 3_600_015));
    assert!(take(&["doll", "ann"], "rack-6", 3_600_016), "toy spent its own, not doll's");
}

#[test]
fn refusals_that_come_thick_are_counted_and_none_is_lost() {
    let mut refusals = Refusals::default();
    let mut take = |who: &str, times: u64, now| (0..times).filter(|_| refusals.take(who, now)).count();
    assert_eq!((take("token ann", 500, 1_000), take("token ann", 5, 60_999), take("token ben", 3, 2_000)), (20, 0, 3));
    assert!(refusals.over(Some(60_999)).is_empty());
    assert_eq!(refusals.over(Some(61_000)), [("token ann".to_owned(), 485)], "whole: ben's were written");
    // A new minute; and the end of the server, or a clock that goes back, ends each.
    for end in [None, Some(0)] {
        assert_eq!((0..21).filter(|_| refusals.take("token ann", 70_000)).count(), 20);
        assert_eq!(refusals.over(end), [("token ann".to_owned(), 1)]);
        assert!(refusals.over(end).is_empty());
    }
    // A crowd of names shares one place.
    let written = (0..10_000).filter(|n| refusals.take(&format!("oidc {n}"), 80_000)).count();
    assert_eq!(written, 4_096 + 20);
    assert_eq!(refusals.over(None), [("others".to_owned(), 10_000 - 4_096 - 20)]);
}
