//! A machine that cannot store what it remembers.

use super::*;
use crate::testing::journal;
use kiln_protocol::StageRecord;

/// How often these records tell that a file of the machine cannot be written.
fn files_told<'a>(records: impl IntoIterator<Item = &'a StageRecord>) -> usize {
    let of = |record: &&StageRecord| match &record.state {
        StageState::Failed(failure) => failure.kind == "machine-file",
        StageState::Started | StageState::Done | StageState::Waiting { .. } => false,
    };
    records.into_iter().filter(of).count()
}

#[test]
fn a_memory_that_cannot_be_stored_ends_no_boot_and_binds_this_one() {
    for mode in [Mode::Ram, Mode::Disk] {
        let mut machine = Machine::of(1);
        let (http, _hear) = web::honest(machine.site.files.clone(), BTreeMap::new());
        machine.verifier.servers.http = vec![http];
        machine.verifier.boot.site.mode = mode;
        let stored = machine.verifier.place.memory().unwrap();
        machine.stores(false);
        let (mut journal, here) = (journal(&machine.verifier), machine.verifier.here().unwrap());
        assert!(machine.hears(None, 1, 5).is_ok(), "what is assigned is followed");
        machine.verified = machine.runtime.block_on(machine.verifier.verify_metadata(&here)).unwrap();
        assert_eq!(machine.hears(None, 1, 4).err(), Some("assignment-old-sequence"));
        if mode == Mode::Disk {
            let (files, assignment) = (machine.verified.files.clone(), machine.verifier.accepted.clone().unwrap());
            let record = Record { files, assignment, servers: Servers::default() };
            let manifest = machine.site.manifests[&1].clone();
            assert!(!machine.verifier.expect_record(&manifest, &record.digest(), [None; 2]).unwrap());
            assert!(machine.verifier.verify_record(&here, &record, true).is_ok());
        }
        machine.verifier.memory.hear_floors(&[("minimal".to_owned(), 2)].into(), ["minimal"; 2], &[]);
        assert!(!machine.verifier.keep());
        let below = machine.verifier.memory.may_boot(&machine.verifier.boot).unwrap_err();
        assert_eq!(below.kind(), "release-below-floor");
        // Told once, and shown.
        for _ in 0..2 {
            machine.verifier.say(&mut journal);
            machine.verifier.keep();
        }
        assert_eq!((files_told(&journal.state.pending), journal.machine.rollback_memory), (1, RollbackMemory::None));
        // The service of this boot goes on with it, the next boot with what was stored.
        assert_eq!(machine.verifier.place.resume(None).unwrap().memory, machine.verifier.memory);
        assert_eq!(machine.verifier.place.memory().unwrap(), stored);
        machine.stores(true);
        assert!(machine.verifier.keep());
        machine.verifier.say(&mut journal);
        assert_eq!(journal.machine.rollback_memory, RollbackMemory::File);
        assert_eq!(machine.verifier.place.memory().unwrap(), machine.verifier.memory);
    }
}

#[test]
fn an_order_whose_mark_cannot_be_stored_is_not_followed() {
    let mut machine = Machine::of(1);
    let (to_rescue, to_wipe) = (order(&machine.verifier, 1, rescue()), order(&machine.verifier, 2, wipe()));
    machine.stores(false);
    for order in [&to_rescue, &to_wipe] {
        assert_eq!(machine.hears(signed(order), RESCUE, 2).err(), Some("order-not-remembered"));
        assert_eq!(machine.may_run(RESCUE), Err("order-missing"));
        let copy = machine.verifier.place.resume(None).unwrap().memory;
        assert!(copy.orders.is_empty() && machine.verifier.memory.orders.is_empty(), "its mark is taken back");
    }
    machine.stores(true);
    assert!(machine.hears(signed(&to_rescue), RESCUE, 3).is_ok());
    machine.stores(false);
    assert!(machine.hears(signed(&to_rescue), RESCUE, 3).is_ok(), "this mark is stored");
    assert_eq!(machine.may_run(RESCUE), Ok(()));
    assert_eq!(machine.hears(signed(&to_rescue), RESCUE, 4).err(), Some("order-replayed"));
    assert_eq!(machine.hears(signed(&to_wipe), 1, 4).err(), Some("order-not-remembered"));
    machine.stores(true);
    assert!(matches!(machine.hears(signed(&to_wipe), 1, 4), Ok(Answer::Wipe(_))));
    let kept = machine.verifier.place.memory().unwrap();
    assert_eq!(kept.mark(&to_wipe).map(|mark| mark.sequence), Some(WIPING), "taken, and not done");
}

#[test]
fn the_server_hears_once_that_a_machine_stores_nothing_and_shows_it_without_a_rollback_memory() {
    let site = TestSite::new(1);
    let director = Director::start(&site, (1, 5, Via::Cold, false));
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(IN_THE_WAY)).unwrap();
    let verifier = site.verifier(1, &[http], std::slice::from_ref(&director.url), dir.path());
    let mut flow = flow(verifier, Some(1), Duration::from_secs(20));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        flow.find_server().await.unwrap();
        let here = flow.verifier.here().unwrap();
        let verified = flow.verifier.verify_metadata(&here).await.unwrap();
        for _ in 0..3 {
            let answer = flow.ask(&verified, 0).await.unwrap();
            assert!(matches!(answer, Answer::Assigned { .. }));
        }
    });
    let heard = director.heard();
    assert_eq!(files_told(heard.iter().flat_map(|report| &report.stages)), 1);
    assert_eq!(heard.last().map(|report| report.machine.rollback_memory), Some(RollbackMemory::None));
}

#[test]
fn the_time_is_stored_once_a_day() {
    let mut machine = Machine::of(1);
    let hour = SignedDuration::from_hours(1);
    machine.verifier.memory.time_floor = None;
    let begun = machine.verifier.now;
    machine.verifier.move_clock(begun + hour);
    assert_eq!(machine.verifier.memory.time_floor, Some(begun + hour));
    machine.verifier.move_clock(begun + hour * 24);
    assert_eq!(machine.verifier.now, begun + hour * 24, "the machine's own moves on");
    assert_eq!(machine.verifier.memory.time_floor, Some(begun + hour), "storage wears");
    machine.verifier.move_clock(begun);
    machine.verifier.move_clock(begun + hour * 25);
    assert_eq!(machine.verifier.memory.time_floor, Some(begun + hour * 25));
}
