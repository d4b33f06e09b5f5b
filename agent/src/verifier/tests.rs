//! What a boot server with every online key can do: the replies here are signed with the site's real director key, the
//! metadata is real and served over HTTP. What it does not have is an operator's key.

mod stored;

use super::*;
use crate::testing::director::Director;
use crate::testing::web;
use crate::testing::{TestSite, flow, now, operator};
use jiff::SignedDuration;
use kiln_protocol::{
    ASSIGNMENT_TYPE, BoundMachine, Desired, FRESHNESS_TYPE, OrderedMachine, SPEC_VERSION, Stage, StageState, WipeMethod,
};
use kiln_release::sign_envelope;
use serde_json::json;
use std::collections::BTreeMap;

/// The release of class rescue; 1 is the ordinary one.
const RESCUE: u64 = 2;

/// Where a memory is written before it takes the place of the old one. No file can be made there while a folder has the name.
const IN_THE_WAY: &str = "seen.new";

fn rescue() -> OrderAction {
    OrderAction::Assign { image: "minimal".parse().unwrap(), release: RESCUE, class: Class::Rescue }
}

fn wipe() -> OrderAction {
    OrderAction::Wipe { disks: Vec::new(), method: WipeMethod::Best }
}

/// An order for this machine that holds for an hour, before anybody changes or signs it.
fn order(verifier: &Verifier, n: u8, action: OrderAction) -> Order {
    let id = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    Order {
        type_: ORDER_TYPE.into(),
        spec_version: SPEC_VERSION.into(),
        id: format!("{n:02x}").repeat(16).parse().unwrap(),
        machines: vec![OrderedMachine { id, key: Some(verifier.key_id()) }],
        action,
        issued: now(),
        expires: now() + SignedDuration::from_hours(1),
    }
}

#[allow(clippy::unnecessary_wraps)] // as replies carry it
fn signed(order: &Order) -> Option<String> {
    Some(sign_envelope(order, &[&operator()]).unwrap())
}

struct Machine {
    site: TestSite,
    verifier: Verifier,
    /// Of the release that its boot image embeds.
    verified: Verified,
    runtime: tokio::runtime::Runtime,
    nonces: u8,
    dir: tempfile::TempDir,
}

impl Machine {
    /// One that booted this release.
    fn of(release: u64) -> Self {
        let site = TestSite::with_rescue(3, RESCUE);
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
        let mut verifier = site.verifier(release, &[http], &[], dir.path());
        let here = verifier.here().unwrap();
        let verified = runtime.block_on(verifier.verify_metadata(&here)).unwrap();
        Self { site, verifier, verified, runtime, nonces: 0, dir }
    }

    /// The server hands on this order and assigns this release; what the machine makes of it.
    fn hears(
        &mut self,
        order: Option<String>,
        release: u64,
        sequence: u64,
    ) -> std::result::Result<Answer, &'static str> {
        self.hears_by(order, Some((release, sequence)), |freshness| freshness)
    }

    fn hears_by(
        &mut self,
        order: Option<String>,
        assigned: Option<(u64, u64)>,
        change: impl Fn(Freshness) -> Freshness,
    ) -> std::result::Result<Answer, &'static str> {
        self.nonces += 1;
        let nonce: Nonce = format!("{:02x}", self.nonces).repeat(32).parse().unwrap();
        let director = &self.site.director;
        let fresh = |text: &str| {
            let freshness = Freshness {
                type_: FRESHNESS_TYPE.into(),
                spec_version: SPEC_VERSION.into(),
                nonce: nonce.clone(),
                assignment_sha256: hex::sha256(text.as_bytes()).parse().unwrap(),
                now: now(),
            };
            sign_envelope(&change(freshness), &[director]).unwrap()
        };
        let decision = match assigned {
            None => Decision::Wait { reason: "retired".into() },
            Some((release, sequence)) => {
                let manifest = serde_json::to_vec(&self.site.manifests[&release]).unwrap();
                let id = "00000000-0000-0000-0000-000000000001".parse().unwrap();
                let assignment = Assignment {
                    type_: ASSIGNMENT_TYPE.into(),
                    spec_version: SPEC_VERSION.into(),
                    machine: BoundMachine { id, key: self.verifier.key_id() },
                    image: "minimal".parse().unwrap(),
                    release,
                    manifest_sha256: hex::sha256(&manifest).parse().unwrap(),
                    role: "lab".into(),
                    arch: crate::facts::architecture(),
                    sequence,
                    rebuild: 0,
                    settings: RoleSettings::default(),
                    issued: now(),
                    expires: now() + SignedDuration::from_hours(1),
                };
                let assignment = sign_envelope(&assignment, &[director]).unwrap();
                let freshness = fresh(&assignment);
                Decision::Assigned { assignment, freshness, via: Via::Cold, grant: Grant::Go }
            }
        };
        let order = order.map(|order| OrderGiven { freshness: fresh(&order), order });
        let desired = Desired { etag: String::new(), decision, order };
        let reply = Reply {
            desired,
            again_ms: 1000,
            may_wait: false,
            about: None,
            thresholds: BTreeMap::new(),
            dbx: None,
            attest: false,
            secrets: None,
            certify: false,
        };
        self.verifier.check_reply(&self.verified, reply, &nonce).map_err(|e| e.kind())
    }

    /// From now on it is one with a disk. Gives the files of the repository that its release verifies with.
    fn lives_on_a_disk(&mut self) -> BTreeMap<String, String> {
        let (http, _hear) = web::honest(self.site.files.clone(), BTreeMap::new());
        self.verifier.servers.http = vec![http];
        self.verifier.boot.site.mode = Mode::Disk;
        let here = self.verifier.here().unwrap();
        self.runtime.block_on(self.verifier.verify_metadata(&here)).unwrap().files
    }

    /// What its disk keeps beside its release, which is assigned anew.
    fn record(&mut self, files: &BTreeMap<String, String>, sequence: u64) -> Record {
        assert!(self.hears(None, 1, sequence).is_ok());
        let assignment = self.verifier.accepted.clone().unwrap();
        Record { files: files.clone(), assignment, servers: Servers::default() }
    }

    /// From now on nothing that it remembers can be stored, as where firmware's store is full; or can again.
    fn stores(&self, stores: bool) {
        let in_the_way = self.dir.path().join(IN_THE_WAY);
        let changed = if stores { std::fs::remove_dir(in_the_way) } else { std::fs::create_dir(in_the_way) };
        changed.unwrap();
    }

    /// Whether it would fetch and start this release now.
    fn may_run(&self, release: u64) -> std::result::Result<(), &'static str> {
        self.verifier.may_run(&self.site.manifests[&release]).map_err(|e| e.kind())
    }
}

#[test]
fn only_an_operators_order_leads_to_a_rescue_release() {
    let mut machine = Machine::of(1);
    assert!(machine.hears(None, RESCUE, 2).is_ok(), "an assignment may claim what it likes");
    assert_eq!(machine.may_run(RESCUE), Err("order-missing"), "and is not followed");
    let order = order(&machine.verifier, 1, rescue());
    assert!(machine.hears(signed(&order), RESCUE, 3).is_ok());
    assert_eq!((machine.may_run(RESCUE), machine.may_run(1)), (Ok(()), Ok(())));
    assert!(machine.verifier.in_memory_only());
    let release = machine.site.manifests[&RESCUE].clone();
    let other = Manifest { class: "wipe".into(), ..release };
    assert_eq!(machine.verifier.may_run(&other).unwrap_err().kind(), "order-missing", "the class is part of the order");
    // Sent home: the order is over, and is not taken a second time.
    assert!(machine.hears(None, 1, 4).is_ok());
    assert_eq!(machine.may_run(RESCUE), Err("order-missing"));
    assert_eq!(machine.hears(signed(&order), RESCUE, 5).err(), Some("order-replayed"));
    assert_eq!(machine.may_run(RESCUE), Err("order-missing"));
}

#[test]
fn a_boot_server_that_serves_the_rescue_program_itself_gets_no_shell() {
    // Signed by the site and started by the firmware: the first thing that decides is the agent in it.
    let mut machine = Machine::of(RESCUE);
    assert_eq!(machine.hears(None, RESCUE, 2).err(), Some("order-missing"));
    assert_eq!(machine.may_run(RESCUE), Err("order-missing"));
    let order = order(&machine.verifier, 1, rescue());
    assert!(machine.hears(signed(&order), RESCUE, 2).is_ok());
    assert_eq!(machine.may_run(RESCUE), Ok(()));
    assert!(machine.hears(signed(&order), RESCUE, 2).is_ok(), "a restart under the same assignment");
    assert!(machine.hears(None, 1, 3).is_ok(), "the way home needs no order");
}

#[test]
fn every_false_order_is_refused_by_its_own_reason() {
    let mut machine = Machine::of(1);
    let good = order(&machine.verifier, 1, rescue());
    let foreign = sign_envelope(&good, &[&Signer::from_seed(&[99; 32])]).unwrap();
    let directors = sign_envelope(&good, &[&machine.site.director]).unwrap();
    let everybody_online: Vec<Signer> = [2, 6].map(|n| Signer::from_seed(&[n; 32])).into();
    let online = sign_envelope(&good, &everybody_online.iter().collect::<Vec<_>>()).unwrap();
    let altered = signed(&good).unwrap().replace("\"release\":2", "\"release\":3");
    let key = Some("ab".repeat(32).parse().unwrap());
    let others = Order { machines: vec![OrderedMachine { key, ..good.machines[0].clone() }], ..good.clone() };
    let by_name = Order { machines: vec![OrderedMachine { key: None, ..good.machines[0].clone() }], ..good.clone() };
    let late = Order { expires: now() - SignedDuration::from_hours(1), ..good.clone() };
    let version = Order { spec_version: "7.0".into(), ..good.clone() };
    let statement = Order { type_: ASSIGNMENT_TYPE.into(), ..good.clone() };
    let padded = format!("{}{}", signed(&good).unwrap(), " ".repeat(70_000));
    for (order, expected) in [
        (Some(foreign), "order-bad-signature"),
        (Some(directors), "order-bad-signature"),
        (Some(online), "order-bad-signature"),
        (Some(altered), "order-bad-signature"),
        (signed(&others), "order-wrong-machine"),
        (signed(&by_name), "order-wrong-machine"),
        (signed(&late), "order-expired"),
        (signed(&version), "order-wrong-type"),
        (signed(&statement), "order-not-an-order"),
        (Some(padded), "order-too-long"),
        (Some("{}".into()), "order-malformed"),
    ] {
        assert_eq!(machine.hears(order, RESCUE, 2).err(), Some(expected));
        assert_eq!(machine.may_run(RESCUE), Err("order-missing"), "after {expected}");
    }
    // An old reply of the server itself, given again by somebody on the network.
    let replayed = |f: Freshness| Freshness { nonce: "ee".repeat(32).parse().unwrap(), ..f };
    assert_eq!(machine.hears_by(signed(&good), Some((RESCUE, 2)), replayed).err(), Some("freshness-wrong-nonce"));
    assert_eq!(machine.may_run(RESCUE), Err("order-missing"));
}

#[test]
fn a_wipe_is_obeyed_by_order_alone_and_once() {
    let mut machine = Machine::of(1);
    let wanted = order(&machine.verifier, 1, wipe());
    let by_director = sign_envelope(&wanted, &[&machine.site.director]).unwrap();
    assert_eq!(machine.hears(Some(by_director), 1, 2).err(), Some("order-bad-signature"));
    // Also of a machine that nothing is assigned to, and again after a cut: until its receipt is delivered.
    for assigned in [None, Some((1, 2)), None] {
        let answer = machine.hears_by(signed(&wanted), assigned, |f| f);
        assert!(matches!(answer, Ok(Answer::Wipe(order)) if order == wanted));
    }
    machine.verifier.wiped(&wanted).unwrap();
    assert_eq!(machine.hears(signed(&wanted), 1, 2).err(), Some("order-replayed"));
    let kept = machine.verifier.place.memory().unwrap();
    assert!(kept.mark(&wanted).is_some_and(|mark| mark.sequence == 0), "it is remembered over a restart");
    assert_eq!(machine.may_run(RESCUE), Err("order-missing"), "a wipe allows no release");
}

#[test]
fn orders_are_remembered_until_they_expire_and_no_more_than_fit() {
    let mut machine = Machine::of(1);
    for n in 1..=4 {
        let order = order(&machine.verifier, n, wipe());
        machine.verifier.wiped(&order).unwrap();
    }
    let one_more = order(&machine.verifier, 6, rescue());
    assert_eq!(machine.hears(signed(&one_more), RESCUE, 2).err(), Some("order-memory-full"));
    assert_eq!(machine.may_run(RESCUE), Err("order-missing"));
    machine.verifier.now += SignedDuration::from_hours(2);
    let later = Order { expires: now() + SignedDuration::from_hours(9), ..order(&machine.verifier, 6, rescue()) };
    machine.verifier.memory.take_order(&later, 2, machine.verifier.now).unwrap();
    assert_eq!(machine.verifier.memory.orders.len(), 1, "those that expired are forgotten");
}

/// Whoever has the disk has older records of the same release, each as well signed.
#[test]
fn only_the_record_that_was_written_last_starts_a_release() {
    let mut machine = Machine::of(1);
    let here = machine.verifier.here().unwrap();
    let files = machine.lives_on_a_disk();
    let [first, second, third] = [2, 3, 4].map(|sequence| machine.record(&files, sequence));
    let (manifest, mut verifier) = (machine.site.manifests[&1].clone(), machine.verifier);
    let starts = |verifier: &mut Verifier, record: &Record| {
        verifier.verify_record(&here, record, true).map(|(_, assignment)| assignment.sequence).map_err(|e| e.kind())
    };
    // A memory of an earlier agent has none, and takes what it finds.
    assert_eq!(starts(&mut verifier, &first), Ok(2));
    assert_eq!(starts(&mut verifier, &second), Err("disk-other-record"));
    // The next is to be written: a cut leaves the one or the other, and what a boot has found is it.
    let slots = [Some(Label::of(&content(&manifest).unwrap().root_hash)), Some(Label([9; 16]))];
    verifier.expect_record(&manifest, &second.digest(), slots).unwrap();
    let expecting = verifier.memory.clone();
    // A look at the disk meanwhile forgets neither.
    assert!(verifier.verify_record(&here, &first, false).is_ok());
    let other = Record { assignment: third.assignment.clone(), ..first.clone() };
    assert_eq!(verifier.verify_record(&here, &other, false).map(drop).map_err(|e| e.kind()), Err("disk-other-record"));
    assert_eq!(verifier.memory, expecting);
    assert_eq!(starts(&mut verifier, &first), Ok(2));
    verifier.memory = expecting;
    assert_eq!(starts(&mut verifier, &second), Ok(3));
    assert_eq!(starts(&mut verifier, &first), Err("disk-other-record"), "put back by whoever has the disk");
    // Over a restart, and over a third that was never written, another way to the same server.
    verifier.memory = verifier.place.memory().unwrap();
    for digest in [third.digest(), "never written".to_owned(), third.digest()] {
        verifier.expect_record(&manifest, &digest, slots).unwrap();
    }
    assert_eq!(verifier.memory.records.len(), 2);
    let servers = Servers { http: vec!["http://elsewhere".into()], ..Servers::default() };
    assert_eq!(starts(&mut verifier, &Record { servers, ..third }), Ok(4));
    // What lies in no slot any more is forgotten.
    let next = Label([7; 16]);
    verifier.memory.expect_record(&next, "next", &[]);
    assert_eq!(verifier.memory.records.len(), 1);
    assert_eq!(starts(&mut verifier, &second), Err("disk-other-record"));
}

/// A slot may hold another image's release, by an order of class normal: the numbers of the one that runs say nothing of it.
#[test]
fn a_record_is_held_to_the_floor_of_its_own_image() {
    let mut machine = Machine::of(1);
    let beside = machine.verifier.here().unwrap();
    let files = machine.lives_on_a_disk();
    let record = machine.record(&files, 2);
    let mut verifier = machine.verifier;
    verifier.boot.image = "other".into();
    for (floors, expected) in
        [([("other", 9), ("minimal", 1)], Ok(())), ([("other", 1), ("minimal", 9)], Err("assignment-below-floor"))]
    {
        verifier.memory.floors = floors.map(|(image, floor)| (image.to_owned(), floor)).into();
        let verified = verifier.verify_record(&beside, &record, false);
        assert_eq!(verified.map(drop).map_err(|e| e.kind()), expected, "{floors:?}");
    }
}

/// A server that is off for sixty days: what lies beside the release on the disk held for thirty.
#[test]
fn an_assignment_that_expired_on_the_disk_starts_its_release_and_leads_to_no_other() {
    let mut machine = Machine::of(1);
    let here = machine.verifier.here().unwrap();
    let files = machine.lives_on_a_disk();
    let kept = machine.record(&files, 2);
    let envelope: serde_json::Value = serde_json::from_str(&kept.assignment).unwrap();
    let given: Assignment = serde_json::from_value(envelope["signed"].clone()).unwrap();
    let days = |days: i64| now() + SignedDuration::from_hours(24 * days);
    let old = Assignment { issued: days(-60), expires: days(-30), ..given };
    let record = Record { assignment: sign_envelope(&old, &[&machine.site.director]).unwrap(), ..kept };
    let (verified, assigned) = machine.verifier.verify_record(&here, &record, true).unwrap();
    assert_eq!(assigned, old);
    // The server told the time: the machine knows that the thirty days are over.
    let currency = machine.verifier.currency(&verified);
    assert!(assigned.expires < currency.now && currency.stale.is_none(), "{currency:?}");
    let plan = |assigned: &Assignment| {
        crate::plan::decide(&here, assigned, &machine.verifier.memory, &currency).map_err(|e| e.kind())
    };
    assert_eq!(plan(&assigned), Ok(crate::plan::Plan::Stay));
    assert_eq!(plan(&Assignment { release: 3, ..assigned }), Err("assignment-expired"));
}

/// What is forgotten of an order is worth the time by which it had expired.
#[test]
fn a_wipe_is_not_obeyed_anew_when_the_director_turns_the_time_back() {
    let mut machine = Machine::of(1);
    let first = order(&machine.verifier, 1, wipe());
    machine.verifier.wiped(&first).unwrap();
    machine.verifier.now += SignedDuration::from_hours(2);
    let second = Order { expires: now() + SignedDuration::from_hours(9), ..order(&machine.verifier, 2, wipe()) };
    machine.verifier.wiped(&second).unwrap();
    assert!(!machine.verifier.memory.orders.contains_key(first.id.as_str()), "it has expired");
    // A restart, as it begins; the director says the time at which the first order was given.
    let memory = machine.verifier.place.memory().unwrap();
    machine.verifier.now = memory.time_floor.map_or(now(), |floor| floor.max(now()));
    machine.verifier.memory = memory;
    assert_eq!(machine.hears(signed(&first), 1, 2).err(), Some("order-expired"));
    // Another director has the word: what the one before said of the time counts no more, what operators signed does.
    let memory = &mut machine.verifier.memory;
    memory.director = "another".into();
    assert!(memory.directed_by(&machine.verified.site) && memory.time_floor.is_none());
    machine.verifier.now = now();
    assert_eq!(machine.hears(signed(&first), 1, 3).err(), Some("order-replayed"));
    let third = Order { expires: first.expires + SignedDuration::from_secs(1), ..order(&machine.verifier, 3, wipe()) };
    assert!(matches!(machine.hears(signed(&third), 1, 3), Ok(Answer::Wipe(_))), "one that cannot have been forgotten");
}

#[test]
fn the_stolen_boot_server_is_told_why_its_rescue_release_is_not_fetched() {
    let machine = Machine::of(1);
    let director = Director::start(&machine.site, (RESCUE, 5, Via::Cold, true));
    let (http, _hear) = web::honest(machine.site.files.clone(), BTreeMap::new());
    let dir = tempfile::tempdir().unwrap();
    let verifier = machine.site.verifier(1, &[http], std::slice::from_ref(&director.url), dir.path());
    let mut flow = flow(verifier, Some(1), Duration::from_millis(100));
    machine.runtime.block_on(async {
        flow.find_server().await.unwrap();
        let here = flow.verifier.here().unwrap();
        let verified = flow.verifier.verify_metadata(&here).await.unwrap();
        let Answer::Assigned { assignment, via, .. } = flow.ask(&verified, 0).await.unwrap() else { panic!("waits") };
        let error = flow.prefetch(&assignment, via, dir.path()).await.unwrap_err();
        assert_eq!(error.kind(), "order-missing");
    });
    let heard = director.heard();
    let told = heard.iter().flat_map(|report| &report.stages).find_map(|record| match &record.state {
        StageState::Failed(failure) => Some((record.stage, failure.kind.clone(), failure.message.clone())),
        StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
    });
    let (stage, kind, message) = told.expect("the server hears of it");
    assert_eq!((stage, kind.as_str()), (Stage::Prefetch, "order-missing"));
    assert!(message.contains("minimal/2 is of class rescue: it needs an order that an operator signed"), "{message}");
    assert!(json!(heard).to_string().contains("order-missing"));
}
