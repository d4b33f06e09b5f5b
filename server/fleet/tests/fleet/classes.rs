//! Hardware classes: which way a machine goes where a person left that to the server, and what its class has shown.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

fn class(firmware: &str) -> HardwareClass {
    HardwareClass { model: "Maker Box".into(), firmware: firmware.into() }
}

fn ways(cold: bool, kexec: bool) -> Ways {
    Ways { cold, kexec }
}

fn proof(cold: bool, kexec: bool) -> Proof {
    Proof { ways: ways(cold, kexec), failed: 0 }
}

fn proven(release: u64, cold: bool, kexec: bool) -> ProvenBy {
    ProvenBy { release: rel(release), ways: ways(cold, kexec), after: 0, failed: 0 }
}

fn assign_auto(s: &mut Story, release: u64) -> &mut Story {
    s.then(Event::Assign { release: rel(release), via: Route::Auto })
}

/// What the caller does after each step of a machine.
fn note(classes: &mut Classes, m: &mut Machine) {
    classes.note(m);
    m.proofs = m.class.as_ref().map_or_else(Arc::default, |class| classes.proofs(class));
}

/// Every combination of what speaks for and against a kexec, and every word of a person.
#[test]
fn the_server_takes_a_kexec_only_where_the_machine_and_its_class_have_shown_it() {
    let mut kexecs = 0;
    for n in 0..64_u8 {
        let bit = |at: u8| (n >> at) & 1 == 1;
        let (own, known, cold, kexec, other, secrets) = (bit(0), bit(1), bit(2), bit(3), bit(4), bit(5));
        for route in Route::ALL {
            let mut s = Story::good_on_1();
            if !own {
                s.m.boots.back_mut().unwrap().via = Via::Kexec;
                s.m.good.clear();
            }
            if other {
                for current in [&mut s.m.running, &mut s.m.embedded].into_iter().flatten() {
                    current.image = "other".parse().unwrap();
                }
            }
            s.m.class = known.then(|| class("1"));
            s.m.proofs = Arc::new(BTreeMap::from([(rel(2), proof(cold, kexec)), (rel(3), proof(true, true))]));
            s.m.secrets_policy = if secrets { SecretsPolicy::Cold } else { SecretsPolicy::Attested };
            s.then(Event::Assign { release: rel(2), via: route });
            let shown = known && cold && kexec && !other;
            let want = match route {
                Route::Kexec if own && !secrets => Via::Kexec,
                Route::Auto if own && !secrets && shown => Via::Kexec,
                Route::Cold | Route::Kexec | Route::Auto => Via::Cold,
            };
            assert_eq!(s.m.leaves_by(), want, "{n:06b} {route}");
            // Whoever left it to the server reads why it is not the quick way.
            let says_why = s.m.state.reason.contains(", by cold boot: ");
            assert_eq!(says_why, route == Route::Auto && want == Via::Cold, "{n:06b} {route}: {}", s.m.state.reason);
            kexecs += u32::from(want == Via::Kexec);
        }
    }
    assert_eq!(kexecs, 16 + 1, "by a person's word, and by what was shown");
}

#[test]
fn a_canary_of_a_class_opens_the_quick_way_to_the_others() {
    let mut classes = Classes::default();
    let mut other = Story::good_on_1();
    other.m.id = id(2);
    let mut canary = Story::good_on_1();
    let mut tell = |canary: &mut Story, other: &mut Story| {
        note(&mut classes, &mut canary.m);
        note(&mut classes, &mut other.m);
        let changed = classes.take_changed();
        let Desire::Run(assigned) = desire(&other.m, &key(1)) else { panic!("{:?}", other.m.state) };
        (assigned.via, changed.len())
    };
    let why = |other: &mut Story| {
        let seq = other.m.boots.back().unwrap().seq + 1;
        other.then(by(1, Report { machine: other.m.facts.clone().unwrap(), ..healthy(2, "a", seq, 1) }));
        other.m.state.reason.clone()
    };
    assign_auto(&mut other, 2);
    assert!(why(&mut other).ends_with("its class is not known: no inventory came that names its model and firmware"));
    other.then(Event::Classed(class("1")));
    canary.then(Event::Classed(class("1")));
    assert!(canary.last.contains(&Action::Save) && canary.m.came_up.is_empty());
    canary.then(by(1, healthy(1, "a", 3, 1)));
    assert!(canary.last.contains(&Action::Save), "what it shows is kept, though nothing else is new");
    assert_eq!(canary.m.came_up, [proven(1, true, false)]);
    canary.then(by(1, healthy(1, "a", 4, 1)));
    assert_eq!(canary.last, [], "once");
    assert_eq!(tell(&mut canary, &mut other), (Via::Cold, 1));
    assert!(
        why(&mut other)
            .ends_with("minimal/2 is assigned, by cold boot: no machine of its class has come up on minimal/2 yet")
    );

    // A person's word sends the canary by kexec; it comes up, and its class has shown half.
    canary.assign(2, Via::Kexec).then(Event::Granted).leaves();
    canary.then(by(1, report(1, "b", 1, 2)));
    assert_eq!(tell(&mut canary, &mut other).0, Via::Cold, "it is up, and not healthy");
    canary.then(by(1, healthy(1, "b", 2, 2))).is(StateKind::Healthy);
    assert_eq!(tell(&mut canary, &mut other), (Via::Cold, 1));
    assert!(why(&mut other).ends_with("no machine of its class has come up on minimal/2 from firmware yet"));

    // Its firmware starts it too.
    canary.boots_trial(2).then(by(1, report(1, "c", 1, 2))).then(by(1, healthy(1, "c", 2, 2)));
    assert_eq!(canary.m.came_up.last(), Some(&proven(2, true, true)));
    assert_eq!(tell(&mut canary, &mut other), (Via::Kexec, 1));
    assert_eq!(why(&mut other), "runs minimal/1; minimal/2 is assigned");

    // Its firmware is updated: it is of another class, and what it has shown is gone with the old one.
    canary.then(Event::Classed(class("2")));
    assert_eq!(tell(&mut canary, &mut other).0, Via::Cold);
    canary.then(by(1, healthy(1, "c", 3, 2)));
    assert_eq!(canary.m.came_up, [proven(2, true, false)]);
}

#[test]
fn what_the_server_assigns_by_itself_is_by_cold_boot_whatever_was_shown() {
    let mut s = Story::good_on_1();
    s.m.max_age = Some(3_600_000);
    s.then(Event::Classed(class("1")));
    s.m.proofs = Arc::new((1..4).map(|release| (rel(release), proof(true, true))).collect());
    assign_auto(&mut s, 1);
    assert_eq!(s.m.leaves_by(), Via::Kexec);
    s.reports_for(4_000_000, |seq| healthy(1, "a", seq, 1));
    let assigned = s.m.assigned.clone().unwrap();
    assert!(assigned.rebuild > 0 && !assigned.auto, "{assigned:?}");
    assert_eq!(s.m.leaves_by(), Via::Cold);
}

#[test]
fn a_class_wakes_nobody_but_for_a_machine_whose_way_it_may_change() {
    let mut stranger = Story::new();
    stranger.then(by(1, healthy(1, "a", 1, 1))).is(StateKind::Discovered);
    for version in ["1", "2", "1"] {
        stranger.then(Event::Classed(class(version)));
        assert_eq!(stranger.last, [Action::Save]);
    }
    let mut s = Story::good_on_1();
    s.assign(2, Via::Kexec).then(Event::Classed(class("1")));
    assert_eq!(s.last, [Action::Save]);
    assign_auto(&mut s, 3).then(Event::Classed(class("2")));
    assert_eq!(s.last, [Action::Save, Action::Wake]);
}

#[test]
fn a_machine_remembers_few_releases_and_only_those_that_were_healthy() {
    let mut s = Story::good_on_1();
    s.then(Event::Classed(class("1"))).then(by(1, unwell(1, "a", 3, 1)));
    assert!(s.m.came_up.is_empty());
    s.then(by(1, healthy(1, "a", 4, 1)));
    for release in 2..20 {
        s.assign(release, Via::Cold).then(Event::Granted).leaves();
        let boot = format!("n{release}");
        s.then(by(1, report(1, &boot, 1, release))).then(by(1, healthy(1, &boot, 2, release)));
        assert_eq!(s.m.came_up.last().unwrap().release, rel(release));
        assert!(s.m.came_up.len() <= CAME_UP_KEPT);
    }
    let stored: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
    assert_eq!((stored.class, stored.came_up), (s.m.class.clone(), s.m.came_up.clone()));
    // The same class again changes nothing.
    let before = s.m.clone();
    s.then(Event::Classed(class("1")));
    assert_eq!((&s.m.came_up, s.last.len()), (&before.came_up, 0));
}

#[test]
fn a_class_is_model_and_firmware_and_nothing_is_like_what_does_not_say_them() {
    let inventory = |product: &str, version: &str| Inventory {
        system: System { manufacturer: "Maker".into(), product: product.into(), ..System::default() },
        firmware: FirmwareVersion { vendor: "V".into(), version: version.into(), ..FirmwareVersion::default() },
        ..Inventory::default()
    };
    let found = HardwareClass::of(&inventory("Box", "1.2")).unwrap();
    assert_eq!(found.to_string(), "Maker Box, firmware V 1.2");
    assert_ne!(Some(found), HardwareClass::of(&inventory("Box", "1.3")));
    for (product, version) in [("", "1"), ("Box", ""), ("", "")] {
        assert_eq!(HardwareClass::of(&inventory(product, version)), None);
    }
    for route in Route::ALL {
        assert_eq!(route.as_str().parse::<Route>(), Ok(route));
    }
    let wrong = "fast".parse::<Route>().unwrap_err().to_string();
    assert_eq!(wrong, r#""fast" is no way to a release: say kexec, cold or auto"#);
}

/// From nothing, as all of a fleet's machines are.
fn naive(machines: &BTreeMap<MachineId, Machine>) -> BTreeMap<HardwareClass, (usize, Proofs)> {
    let mut all: BTreeMap<HardwareClass, (usize, Proofs)> = BTreeMap::new();
    let serves = |m: &&Machine| m.state.kind.in_fleet() && m.state.kind != StateKind::Quarantined;
    let of = || machines.values().filter(serves).filter_map(|m| Some((m.class.as_ref()?, &m.came_up)));
    for (class, came_up) in of() {
        let (count, proofs) = all.entry(class.clone()).or_default();
        *count += 1;
        for came in came_up {
            let proof = proofs.entry(came.release.clone()).or_default();
            proof.failed = proof.failed.max(came.failed);
            proof.ways.cold |= came.ways.cold;
        }
    }
    for (class, came_up) in of() {
        for came in came_up {
            let proof = all.get_mut(class).and_then(|(_, proofs)| proofs.get_mut(&came.release)).unwrap();
            proof.ways.kexec |= came.ways.kexec && came.after >= proof.failed;
        }
    }
    all
}

fn any_proven() -> impl Strategy<Value = ProvenBy> {
    let some = |p: &ProvenBy| p.ways != Ways::default() || p.failed > 0;
    (1..4_u64, any::<(bool, bool)>(), 0..3_u32, 0..3_u32)
        .prop_map(|(release, (cold, kexec), after, failed)| ProvenBy { after, failed, ..proven(release, cold, kexec) })
        .prop_filter("a machine keeps what says something", some)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// The account that is kept is that of the machines, and who is told of a change is everybody who has to be.
    #[test]
    fn the_account_of_classes_is_what_the_machines_say(
        steps in proptest::collection::vec((1..5_u8, 0..12_usize, 0..3_u8, proptest::option::of(any_proven())), 1..80)
    ) {
        let mut machines: BTreeMap<MachineId, Machine> = BTreeMap::new();
        let mut classes = Classes::default();
        for (n, kind, firmware, shown) in steps {
            let before = naive(&machines);
            if let Some(kind) = StateKind::ALL.get(kind) {
                    let m = machines.entry(id(n)).or_insert_with(|| Machine::discovered(id(n), 0));
                    m.state.kind = *kind;
                    let is = (firmware > 0).then(|| class(&firmware.to_string()));
                    if m.class != is {
                        m.came_up.clear();
                        m.class = is;
                    }
                    if let Some(shown) = shown {
                        m.came_up.retain(|came| came.release != shown.release);
                        m.came_up.push(shown);
                    }
                    classes.note(m);
            } else {
                    machines.remove(&id(n));
                    classes.forget(&id(n));
            }
            let after = naive(&machines);
            let kept: BTreeMap<_, _> =
                classes.all().map(|(class, count, proofs)| (class.clone(), (count, proofs.clone()))).collect();
            prop_assert_eq!(&after, &kept);
            let proofs = |of: &BTreeMap<HardwareClass, (usize, Proofs)>, class: &HardwareClass| {
                of.get(class).map_or_else(Proofs::default, |(_, proofs)| proofs.clone())
            };
            let all: BTreeSet<&HardwareClass> = before.keys().chain(after.keys()).collect();
            let changed = classes.take_changed();
            for class in all {
                if proofs(&before, class) != proofs(&after, class) {
                    prop_assert!(changed.contains(class), "{class}");
                }
                prop_assert_eq!((*classes.proofs(class)).clone(), proofs(&after, class));
            }
        }
    }
}
