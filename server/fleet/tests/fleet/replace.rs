//! New hardware in the place of old.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;

/// Machine 2, which has reported and which nobody has approved.
fn new() -> Machine {
    let machine = Machine::discovered(id(2), 1_000_000);
    let event = Event::Report(Box::new(Reported { key: key(2), report: report(2, "n", 1, 1), published_root: None }));
    let (machine, _) = machine.event(event, LIMITS, 1_000_100);
    assert_eq!(machine.state.kind, StateKind::Discovered);
    machine
}

fn step(machine: Machine, event: Event) -> Machine {
    machine.event(event, LIMITS, 2_000_000).0
}

fn approved(machine: Machine, name: &str) -> Machine {
    step(machine, Event::Approve { name: name.into(), role: "db".into(), release: rel(1) })
}

#[test]
fn the_new_one_takes_over_name_role_and_release() {
    let mut s = Story::good_on_1();
    s.assign(3, Via::Cold);
    let expected = Replacement { name: "rack-1".into(), role: "lab".into(), release: rel(3) };
    assert_eq!(s.m.replaced_by(&new()), Ok(expected.clone()));
    // Dead hardware, retired first: its name is free, and still what is taken over.
    s.then(Event::Retire).is(StateKind::Retired);
    assert_eq!((s.m.name.as_deref(), s.m.title()), (None, "rack-1"));
    assert_eq!(s.m.replaced_by(&new()), Ok(expected));
    assert_eq!(s.m.good, [rel(1)], "its history stays");
    // Hardware from the shelf that had a place before.
    let spare = step(approved(new(), "rack-9"), Event::Retire);
    assert!(s.m.replaced_by(&spare).is_ok());
}

#[test]
fn what_an_operator_ordered_is_not_taken_over() {
    let mut s = Story::good_on_1();
    let errand = Errand::Run { release: rel(2), class: Class::Rescue, via: Via::Kexec };
    let (id, expires) = ("ab".repeat(16).parse().unwrap(), s.now + 1_000_000);
    s.then(Event::Ordered(MachineOrder { id, errand, expires, state: OrderState::Open }));
    assert_eq!(s.m.replaced_by(&new()).unwrap().release, rel(1));
}

#[test]
fn each_reason_against_it_is_its_own() {
    let old = Story::good_on_1().m;
    let silent = Machine::discovered(id(2), 1_000_000);
    let mut arm = new();
    arm.facts.as_mut().unwrap().arch = Architecture::Aarch64;
    let mut bad = new();
    bad.refused.push(Refused { release: rel(1), reason: "it hung".into() });
    let mut quarantined = new();
    quarantined.state.kind = StateKind::Quarantined;
    let mut nothing = old.clone();
    (nothing.assigned, nothing.good) = (None, vec![]);
    let fresh = new();
    for (case, old, new, expected) in [
        ("itself", &old, &old, "rack-1 cannot replace itself"),
        ("unnamed", &silent, &Story::good_on_1().m, "is not approved yet"),
        (
            "in service",
            &old,
            &approved(new(), "rack-9"),
            "rack-9 is in service: run `kiln machine retire rack-9` first",
        ),
        ("never reported", &old, &silent, "has not reported yet"),
        ("architecture", &old, &arm, "is aarch64, rack-1 is x86_64"),
        ("quarantined pair", &old, &bad, "minimal/1 is quarantined"),
        ("quarantined", &old, &quarantined, "is quarantined"),
        ("nothing", &nothing, &fresh, "rack-1 has no release to take over"),
    ] {
        let refusal = old.replaced_by(new).unwrap_err().to_string();
        assert!(refusal.contains(expected), "{case}: {refusal}");
    }
}

#[test]
fn a_replaced_machine_says_by_which_and_its_name_is_free() {
    let mut s = Story::good_on_1();
    s.then(Event::Replaced { by: id(2) }).is(StateKind::Retired);
    assert_eq!((s.m.name.as_deref(), s.m.former_name.as_deref()), (None, Some("rack-1")));
    assert!(s.m.state.reason.contains(id(2).as_str()), "{}", s.m.state.reason);
    assert!(s.last.contains(&Action::Save) && s.last.contains(&Action::Wake));
    // Back in service under another name.
    s.then(Event::Approve { name: "rack-5".into(), role: "lab".into(), release: rel(1) });
    assert_eq!((s.m.name.as_deref(), s.m.former_name.as_deref(), s.m.title()), (Some("rack-5"), None, "rack-5"));
}
