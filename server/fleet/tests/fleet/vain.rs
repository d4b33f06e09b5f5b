//! A kexec that came to nothing: how it is noticed, and what its class has shown then.

use crate::common::*;
use kiln_fleet::*;
use kiln_protocol::*;
use proptest::prelude::*;

fn class() -> HardwareClass {
    HardwareClass { model: "Maker Box".into(), firmware: "1".into() }
}

/// Good on 1, of a known class.
fn of_class(n: u8) -> Story {
    let mut s = Story::good_on_1();
    s.m.id = id(n);
    s.then(Event::Classed(class())).then(by(1, healthy(1, "a", 3, 1))).is(StateKind::Healthy);
    s
}

/// It is sent to 2 by kexec, by a person's word, and goes.
fn jumps(s: &mut Story) -> &mut Story {
    s.assign(2, Via::Kexec).then(Event::Granted).leaves()
}

fn arrives(s: &mut Story) -> &mut Story {
    s.then(by(1, report(1, "b", 1, 2)))
}

fn shown(s: &Story) -> Option<ProvenBy> {
    s.m.came_up.iter().find(|came| came.release == rel(2)).cloned()
}

fn says_so(actions: &[Action]) -> bool {
    let words = "a kexec to minimal/2 came to nothing";
    actions.iter().any(|action| matches!(action, Action::Say { warn: true, text } if text.starts_with(words)))
}

/// In words, and what happens.
type Way = (&'static str, fn(&mut Story));

/// Each way in which it shows, and it is said once.
#[test]
fn a_kexec_that_came_to_nothing_takes_the_way_back() {
    let ways: [Way; 6] = [
        ("its firmware is heard instead", |s| {
            s.then(Event::Asked);
        }),
        ("nothing is heard", |s| {
            s.wait(BOOT_DEADLINE_MS + LIVE_MS).is(StateKind::Unreachable);
        }),
        ("it is back from its disk, with the release that it left", |s| {
            s.then(by(1, report(1, "c", 1, 1)));
        }),
        ("its agent speaks, and its firmware is next", |s| {
            arrives(s).wait(LIVE_MS).then(Event::Asked);
        }),
        ("its agent speaks, and another boot from its disk is next", |s| {
            arrives(s).then(by(1, report(1, "c", 1, 1)));
        }),
        ("it comes up, and is not well in its time", |s| {
            arrives(s).reports_for(BOOT_DEADLINE_MS + 120_000, |seq| unwell(1, "b", seq, 2)).is(StateKind::FellBack);
        }),
    ];
    for (what, fails) in ways {
        let mut s = of_class(1);
        jumps(&mut s);
        assert_eq!(shown(&s), None, "{what}: nothing is known yet");
        fails(&mut s);
        let failed = shown(&s).unwrap_or_else(|| panic!("{what}: {:?}", s.m.state));
        assert_eq!((failed.ways, failed.failed), (Ways::default(), 1), "{what}");
        // A person switches it off and on: it is the same kexec.
        let mut again = Vec::new();
        for event in [Event::Asked, by(1, report(1, "z", 1, 1)), by(1, healthy(1, "z", 2, 1))] {
            s.now += LIVE_MS;
            s.then(Event::Tick).then(event);
            again.extend(s.last.clone());
        }
        assert_eq!(shown(&s).map(|came| came.failed), Some(1), "{what}");
        assert!(!says_so(&again), "{what}: {again:?}");
        // What it remembers is what is stored.
        let stored: Machine = serde_json::from_str(&serde_json::to_string(&s.m).unwrap()).unwrap();
        assert_eq!(stored.came_up, s.m.came_up, "{what}");
    }
    let mut s = of_class(1);
    jumps(&mut s).then(Event::Asked);
    assert!(says_so(&s.last) && s.last.contains(&Action::Save), "{:?}", s.last);
}

#[test]
fn what_is_no_failed_kexec_takes_nothing_back() {
    // It comes up, is well, and its firmware starts it later.
    let mut s = of_class(1);
    arrives(jumps(&mut s)).then(by(1, healthy(1, "b", 2, 2))).is(StateKind::Healthy);
    s.wait(LIVE_MS).boots_trial(2).then(by(1, report(1, "c", 1, 2))).then(by(1, healthy(1, "c", 2, 2)));
    let both = ProvenBy { release: rel(2), ways: Ways { cold: true, kexec: true }, after: 0, failed: 0 };
    assert_eq!(shown(&s), Some(both));
    // The next kernel could not be loaded: it says so, and goes through firmware.
    let mut s = of_class(1);
    jumps(&mut s);
    let mut r = going(1, "a", 9, 1);
    let failure = Failure { kind: "kexec".into(), message: "no room".into(), attempt: 3, retry_in_ms: None };
    r.stages.push(StageRecord { stage: Stage::Going, state: StageState::Failed(failure), at_ms: r.at_ms });
    s.then(by(1, r)).wait(LIVE_MS).then(Event::Asked);
    assert_eq!(shown(&s), None);
    // It went through firmware, and was never well there.
    let mut s = of_class(1);
    s.assign(2, Via::Cold).then(Event::Granted).leaves().then(Event::Asked).then(by(1, report(1, "b", 1, 2)));
    s.wait(LIVE_MS).then(Event::Asked);
    assert_eq!(shown(&s), None);
    // Of one whose class is not known nothing is kept.
    let mut s = Story::good_on_1();
    jumps(&mut s).then(Event::Asked);
    assert!(s.m.came_up.is_empty() && !says_so(&s.last));
}

/// The machines of one class, as the caller keeps them.
#[derive(Default)]
struct Fleet {
    classes: Classes,
    all: Vec<Story>,
}

impl Fleet {
    /// What the caller does after each step of a machine.
    fn tell(&mut self) -> Proof {
        for s in &self.all {
            self.classes.note(&s.m);
        }
        let proofs = self.classes.proofs(&class());
        for s in &mut self.all {
            s.m.proofs = proofs.clone();
        }
        proofs.get(&rel(2)).copied().unwrap_or_default()
    }

    /// One more machine, which knows what its class has shown.
    fn add(&mut self) -> &mut Story {
        self.all.push(of_class(u8::try_from(self.all.len()).unwrap() + 1));
        self.tell();
        self.all.last_mut().unwrap()
    }
}

fn proof(cold: bool, kexec: bool, failed: u32) -> Proof {
    Proof { ways: Ways { cold, kexec }, failed }
}

#[test]
fn one_failed_kexec_makes_its_class_go_cold_until_one_is_shown_again() {
    let mut fleet = Fleet::default();
    // One has come up by kexec and runs on, one has come up from firmware: the others go by kexec.
    arrives(jumps(fleet.add())).then(by(1, healthy(1, "b", 2, 2)));
    fleet.add().assign(2, Via::Cold).then(Event::Granted).leaves().then(Event::Asked);
    fleet.all[1].then(by(1, healthy(1, "b", 1, 2)));
    assert_eq!(fleet.tell(), proof(true, true, 0));
    fleet.add().then(Event::Assign { release: rel(2), via: Route::Auto });
    assert_eq!(fleet.all[2].m.leaves_by(), Via::Kexec);

    // One has jumped and spoken, another is lost: whatever the first one says from now on, it jumped before that.
    arrives(jumps(fleet.add()));
    jumps(fleet.add()).then(Event::Asked);
    assert_eq!(fleet.tell(), proof(true, false, 1));
    fleet.all[3].then(by(1, healthy(1, "b", 2, 2))).is(StateKind::Healthy);
    fleet.all[0].then(by(1, healthy(1, "b", 3, 2))).is(StateKind::Healthy);
    assert_eq!(fleet.tell(), proof(true, false, 1));

    // Nobody waits for it: the way is the cold one, and says why.
    let other = &mut fleet.all[2];
    other.then(by(1, healthy(1, "a", 4, 1)));
    let why = "by cold boot: a kexec to minimal/2 came to nothing on a machine of its class, and none has come up by one since";
    assert!(other.m.state.reason.ends_with(why), "{}", other.m.state.reason);
    let Desire::Run(assigned) = desire(&other.m, &key(1)) else { panic!("{:?}", other.m.state) };
    assert_eq!(assigned.via, Via::Cold);
    // Another release is not meant.
    other.m.proofs = std::sync::Arc::new([(rel(3), proof(true, true, 0))].into());
    other.then(Event::Assign { release: rel(3), via: Route::Auto });
    assert_eq!(other.m.leaves_by(), Via::Kexec);
    other.then(Event::Assign { release: rel(2), via: Route::Auto });

    // By a person's word one goes, and comes up.
    arrives(jumps(fleet.add())).then(by(1, healthy(1, "b", 2, 2)));
    assert_eq!(fleet.tell(), proof(true, true, 1));
    assert_eq!(fleet.all[2].m.leaves_by(), Via::Kexec);

    // The next loss counts anew; with the machine that was to blame it goes.
    jumps(fleet.add()).wait(BOOT_DEADLINE_MS + LIVE_MS).is(StateKind::Unreachable);
    assert_eq!(fleet.tell(), proof(true, false, 2));
    assert_eq!(fleet.all[2].m.leaves_by(), Via::Cold);
    fleet.all.last_mut().unwrap().then(Event::Retire);
    assert_eq!(fleet.tell(), proof(true, true, 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// One after another: what the newest kexec came to is what the class has shown, whatever was before.
    #[test]
    fn the_newest_kexec_decides(attempts in proptest::collection::vec(any::<bool>(), 1..12)) {
        let (mut fleet, mut failed) = (Fleet::default(), 0);
        for well in attempts {
            let s = fleet.add();
            jumps(s);
            if well {
                arrives(s).then(by(1, healthy(1, "b", 2, 2)));
            } else {
                s.then(Event::Asked);
                failed += 1;
            }
            prop_assert_eq!(fleet.tell(), proof(false, well, failed));
        }
    }
}
