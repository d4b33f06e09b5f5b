//! The service as it runs: against a boot server on loopback, with a shell script for systemctl. Only the machine's
//! restart is another.

mod disk;
mod gone;
mod hooks;
mod rest;

use super::*;
use crate::health::Probe;
use crate::spool::Keeper;
use crate::testing::director::{Director, Line, Order};
use crate::testing::web::{self, Gate, Gates, Happened};
use crate::testing::{TestSite, journal, program, root_hash};
use kiln_protocol::{Attestation, HexBytes, Judged, Report, StageState, Via};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;
use tempfile::TempDir;

/// Nothing here takes longer on any host, but for what has its own deadline. Shorter than a report is held: what is news does not wait
/// for that.
const PATIENCE: Duration = Duration::from_secs(40);

/// A machine that runs a release, with its own systemctl.
struct Machine {
    dir: TempDir,
    /// What systemctl was told to leave by.
    left: Receiver<String>,
    /// How the service ended, were it not for the restart.
    ended: Receiver<String>,
}

/// The machine's restart.
fn stays(_: nix::sys::reboot::RebootMode) -> std::io::Error {
    std::io::Error::other("the test stays in the room")
}

/// `state` says what `is-system-running` says; "hang" hangs it. Leaving is told through a FIFO.
const SYSTEMCTL: &str = r#"#!/bin/sh
case "$1" in
is-system-running)
    state=$(cat DIR/state)
    [ "$state" = hang ] && exec tail -f /dev/null
    echo "$state" ;;
list-units) echo "broken.service loaded failed failed" ;;
*) echo "$1" >DIR/left ;;
esac
"#;

impl Machine {
    /// Starts the service of a machine that runs `release`. What it may not reach comes first in its lists of servers.
    fn start(
        site: &TestSite,
        release: u64,
        http: &str,
        agent: &str,
        state: &str,
        probe: fn() -> Result<String>,
    ) -> Self {
        Self::start_in(site, release, http, agent, state, probe, Path::new("/"))
    }

    /// The same with hooks, which are programs of `root`.
    fn start_in(
        site: &TestSite,
        release: u64,
        http: &str,
        agent: &str,
        state: &str,
        probe: fn() -> Result<String>,
        root: &Path,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("state"), state).unwrap();
        let script = SYSTEMCTL.replace("DIR", dir.path().to_str().unwrap());
        program(&at("systemctl"), script.as_bytes());
        nix::unistd::mkfifo(&at("left"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::create_dir(at("next")).unwrap();
        std::fs::create_dir(at("vda")).unwrap();
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (agents, http) = ([format!("https://{nobody}"), agent.to_owned()], [http.to_owned()]);
        let verifier = site.verifier(release, &http, &agents, &at("machine"));
        verifier.pins.set(&site.known_keys);
        let checks = Checks::new(
            site.manifests[&release].health.clone(),
            root_hash(release),
            Probe::new(probe, at("systemctl")),
        );
        let (systemctl, next, spool, root) = (at("systemctl"), at("next"), at("spool.json"), root.to_owned());
        let hooks = site.manifests[&release].hooks.clone();
        let (lives_on, counted, (end, ended)) = (at("vda"), at("service-starts"), channel());
        starts::count(&counted);
        std::thread::spawn(move || {
            let door = Door { systemctl, reboot: stays };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let journal = journal(&verifier);
            let mut verifier = verifier;
            verifier.put_up = 4;
            // Ends with the test: its thread is not waited for.
            let mut service = Service::new(verifier, journal, next, door).unwrap();
            service.watch = Watch::new(Keeper::open(Some(&spool), None), hooks, root);
            service.lives_on = Some(lives_on);
            service.starts = Some(counted);
            let error = runtime.block_on(Box::pin(service.run(checks)));
            // Most tests do not wait for it.
            let _ = end.send(error.to_string());
        });
        let (tell, left) = channel();
        let fifo = at("left");
        std::thread::spawn(move || {
            let mut verb = String::new();
            let read = std::fs::File::open(fifo).and_then(|mut file| file.read_to_string(&mut verb));
            let _ = read.map(|_| tell.send(verb.trim().to_owned()));
        });
        Self { dir, left, ended }
    }

    fn set_state(&self, state: &str) {
        // At once, not a truncated file first.
        let new = self.dir.path().join("state.new");
        std::fs::write(&new, state).unwrap();
        std::fs::rename(new, self.dir.path().join("state")).unwrap();
    }

    fn next(&self) -> Vec<String> {
        let entries = self.dir.path().join("next").read_dir().unwrap().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }
}

fn healthy(report: &Report) -> bool {
    report.health.as_ref().is_some_and(|h| h.healthy)
}

fn received(report: &Report) -> u64 {
    report.prefetch.as_ref().and_then(|p| p.progress).map_or(0, |p| p.received_bytes)
}

fn failed(report: &Report, stage: Stage) -> Option<&str> {
    report.stages.iter().find_map(|record| match &record.state {
        StageState::Failed(failure) if record.stage == stage => Some(failure.kind.as_str()),
        StageState::Failed(_) | StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
    })
}

/// A machine that runs the site's one release, healthy under its director.
fn healthy_on_1(may_go: bool) -> (TestSite, Director, Machine) {
    let site = TestSite::new(1);
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let director = Director::start(&site, (1, 4, Via::Cold, may_go));
    let begun = Instant::now();
    let machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    director.wait("of health", begun, PATIENCE, healthy);
    (site, director, machine)
}

/// One that ends before it is heard of counts, whatever it dies of; one whose server answered, or whose checks were made, came up.
#[test]
fn a_start_of_the_service_came_up_once_it_was_heard_of_or_had_looked() {
    /// Who holds it keeps the checks waiting.
    static LOOKS: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let (_site, director, machine) = healthy_on_1(false);
    let turned = Instant::now();
    machine.set_state("degraded");
    director.wait("of another state", turned, PATIENCE, |report| !healthy(report));
    assert!(!machine.dir.path().join("service-starts").exists(), "a second report went out");

    let site = TestSite::new(1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service-starts");
    // Somebody listens, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let servers = [format!("https://{}", silent.local_addr().unwrap())];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let start = || {
        let verifier = site.verifier(1, &[], &servers, &dir.path().join("machine"));
        let journal = journal(&verifier);
        let door = Door { systemctl: dir.path().join("none"), reboot: stays };
        let mut service = Service::new(verifier, journal, dir.path().join("next"), door).unwrap();
        service.starts = Some(path.clone());
        let looks = || {
            drop(LOOKS.lock());
            Ok(root_hash(1))
        };
        (service, Checks::new(Vec::new(), root_hash(1), Probe::new(looks, dir.path().join("none"))))
    };
    for n in 0..3 {
        assert_eq!(starts::count(&path), n, "starts that came to nothing");
        let (service, checks) = start();
        // It is begun, and no more.
        let _nobody_looks = LOOKS.lock().unwrap();
        let begun = async { tokio::time::timeout(Duration::ZERO, Box::pin(service.run(checks))).await };
        assert!(runtime.block_on(begun).is_err());
    }
    let (service, checks) = start();
    let came_up = async {
        while path.exists() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let ended = async {
        tokio::select! {
            error = Box::pin(service.run(checks)) => Some(error),
            () = came_up => None,
        }
    };
    let ended = runtime.block_on(async { tokio::time::timeout(PATIENCE, ended).await });
    assert!(ended.expect("its checks are made while the server is silent").is_none());
}

/// A gate in the middle of this file.
fn gate(path: &str) -> (Arc<Gate>, Gates) {
    let gate = Arc::<Gate>::default();
    let gates = [(path.to_owned(), (300_000, Arc::clone(&gate)))].into();
    (gate, gates)
}

#[test]
fn health_and_progress_are_reported_while_a_release_is_fetched() {
    let site = TestSite::new(2);
    let [_, root] = site.paths(2);
    let (gate, gates) = gate(&root);
    let (http, _hear) = web::honest(site.files.clone(), gates);
    let order: Order = (2, 5, Via::Cold, false);
    let director = Director::start(&site, (1, 4, Via::Cold, false));
    let begun = Instant::now();
    let machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    director.wait("of health", begun, PATIENCE, healthy);

    director.order(order);
    let uki = site.manifests[&2].uki.length;
    let half = director.wait("of half the root", begun, PATIENCE, |r| received(r) >= uki + 300_000);
    let prefetch = half.prefetch.unwrap();
    assert_eq!((prefetch.release, prefetch.sequence, prefetch.ready), (2, 5, false));
    let progress = prefetch.progress.unwrap();
    assert_eq!(progress.received_bytes, uki + 300_000);
    assert_eq!(progress.total_bytes, uki + site.manifests[&2].root.length);

    let turned = Instant::now();
    machine.set_state("degraded");
    let not_two = WATCH_EVERY * 9 / 5;
    let report = director.wait("of lost health", turned, not_two, |r| r.health.is_some() && !healthy(r));
    assert!(report.health.unwrap().detail.contains("broken.service"));
    assert!(report.prefetch.is_some_and(|p| !p.ready), "the prefetch goes on");
    let mended = Instant::now();
    machine.set_state("running");
    // Sooner than one that is healthy is looked at again.
    director.wait("of health again", mended, WATCH_EVERY * 9 / 10, healthy);

    gate.open();
    director.wait("that it is ready", turned, PATIENCE, |r| r.prefetch.as_ref().is_some_and(|p| p.ready));
    director.order((2, 5, Via::Cold, true));
    assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot");
    let going = director.heard().pop().unwrap();
    assert_eq!(going.health.unwrap().detail, "leaving for minimal/2");
    assert!(going.stages.iter().any(|s| s.stage == Stage::Going && s.state == StageState::Started));
}

#[test]
fn another_assignment_ends_the_transfer_at_once() {
    let site = TestSite::new(3);
    let ([uki, _], [next_uki, _]) = (site.paths(2), site.paths(3));
    let (_gate, gates) = gate(&uki);
    let (http, hear) = web::honest(site.files.clone(), gates);
    let director = Director::start(&site, (2, 5, Via::Kexec, false));
    let begun = Instant::now();
    let machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    web::wait(&hear, PATIENCE, |h| *h == Happened::Asked(uki.clone(), 0));
    director.wait("of a part of it", begun, PATIENCE, |r| healthy(r) && received(r) > 0);
    assert_eq!(machine.next(), ["next.efi"]);

    // The report is held; the change answers it.
    director.order((3, 6, Via::Kexec, false));
    // Long before the transfer would end by itself, which brings nothing any more.
    let at_once = Duration::from_secs(8);
    web::wait(&hear, at_once, |h| *h == Happened::Gone(uki.clone()));
    web::wait(&hear, at_once, |h| *h == Happened::Asked(next_uki.clone(), 0));
    let ready =
        director.wait("that the other is ready", begun, PATIENCE, |r| r.prefetch.as_ref().is_some_and(|p| p.ready));
    assert_eq!(ready.prefetch.map(|p| (p.release, p.sequence)), Some((3, 6)));
    let mut files = machine.next();
    files.sort();
    assert_eq!(files, ["next", "next.efi"]);
    let bytes = |name: &str| std::fs::read(machine.dir.path().join("next").join(name)).unwrap();
    assert_eq!(
        (&bytes("next.efi"), &bytes("next")),
        (&site.files[&next_uki[1..]], &site.files[&site.paths(3)[1][1..]])
    );

    // And one that takes it back leaves nothing.
    let taken_back = Instant::now();
    director.order((1, 7, Via::Kexec, false));
    director.wait("of no prefetch", taken_back, PATIENCE, |r| r.prefetch.is_none());
    assert!(machine.next().is_empty());
}

/// A check that never comes back, not even when its thread is asked to end.
fn hangs() -> Result<String> {
    loop {
        std::thread::park();
    }
}

#[test]
fn a_machine_whose_checks_hang_follows_an_assignment_and_leaves() {
    type Look = fn() -> Result<String>;
    let begun = Instant::now();
    let looks: [(&str, Look, &str); 2] = [
        ("hang", || Ok(root_hash(2)), "systemctl gave no answer in 10 s"),
        ("running", hangs, "the kernel's table for the root: an earlier check still hangs in the kernel"),
    ];
    let machines = looks.map(|(state, look, words)| {
        let site = TestSite::new(2);
        let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
        // Back to the release before, as a server does with a trial that never became healthy.
        let director = Director::start(&site, (1, 9, Via::Cold, false));
        let machine = Machine::start(&site, 2, &http, &director.url, state, look);
        (director, machine, words)
    });
    for (director, machine, words) in machines {
        director.wait("that release 1 is ready", begun, PATIENCE, |r| r.prefetch.as_ref().is_some_and(|p| p.ready));
        director.wait(words, begun, PATIENCE, |r| r.health.as_ref().is_some_and(|h| !h.healthy && h.detail == words));
        assert!(!director.heard().iter().any(healthy));
        director.order((1, 9, Via::Cold, true));
        assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot");
    }
}

#[test]
fn a_kernel_that_cannot_be_loaded_is_gone_to_through_the_firmware() {
    let site = TestSite::new(2);
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    // No kernel takes these bytes for one, and no host lets this test try.
    let director = Director::start(&site, (2, 5, Via::Kexec, true));
    let begun = Instant::now();
    let machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    let report =
        director.wait("of the failure", begun, PATIENCE, |r| failed(r, Stage::Going) == Some("machine-system-call"));
    assert!(report.stages.iter().any(|s| s.stage == Stage::Grant && s.state == StageState::Done), "{report:#?}");
    assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot");
}

#[test]
fn a_release_that_does_not_verify_is_not_gone_to_and_the_machine_stays_healthy() {
    let site = TestSite::new(2);
    let mut files = site.files.clone();
    let [_, root] = site.paths(2);
    files.get_mut(&root[1..]).unwrap()[4096] ^= 1;
    let (http, hear) = web::honest(files, BTreeMap::new());
    let director = Director::start(&site, (2, 5, Via::Cold, true));
    let begun = Instant::now();
    let machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    // Three tries, then it is said that nothing is fetched any more.
    for _ in 0..3 {
        web::wait(&hear, PATIENCE, |h| *h == Happened::Asked(root.clone(), 0));
    }
    let given_up = director.wait("that it is given up", begun, PATIENCE, |r| {
        failed(r, Stage::Prefetch) == Some("root-hash-mismatch") && r.prefetch.is_none()
    });
    assert!(healthy(&given_up));
    assert!(machine.left.try_recv().is_err());
    assert!(machine.next().is_empty());
}

/// A disk-mode machine goes on from memory while nobody is there to boot it. Its init, which lies on that disk, is not asked.
#[test]
fn a_machine_whose_disk_is_pulled_out_restarts_once_its_server_answers() {
    let (_site, director, machine) = healthy_on_1(false);
    director.line(Line::Dead);
    std::fs::remove_dir(machine.dir.path().join("vda")).unwrap();
    assert!(machine.ended.recv_timeout(WATCH_EVERY + Duration::from_secs(3)).is_err(), "it stays without a server");
    let back = Instant::now();
    director.line(Line::Whole);
    director.wait("of the disk", back, 3 * PATIENCE, |r| failed(r, Stage::Service) == Some("disk-none"));
    let ended = machine.ended.recv_timeout(PATIENCE).unwrap();
    assert!(ended.contains("leaving a system whose disk is gone"), "{ended}");
    assert!(machine.left.try_recv().is_err(), "systemctl was not asked");
}

/// An order for the machine of these tests, signed by this key.
fn wipe_order(site: &TestSite, n: u8, signer: &kiln_release::Signer) -> String {
    let machine = kiln_release::Signer::from_seed(&site.machine_key);
    let key = kiln_release::certificate::spki_key_id(&kiln_release::certificate::spki_der(&machine));
    let id = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    let order = kiln_protocol::Order {
        type_: kiln_protocol::ORDER_TYPE.into(),
        spec_version: kiln_protocol::SPEC_VERSION.into(),
        id: format!("{n:02x}").repeat(16).parse().unwrap(),
        machines: vec![kiln_protocol::OrderedMachine { id, key: Some(key.parse().unwrap()) }],
        action: kiln_protocol::OrderAction::Wipe { disks: Vec::new(), method: kiln_protocol::WipeMethod::Best },
        issued: crate::testing::now(),
        expires: crate::testing::now() + jiff::SignedDuration::from_hours(1),
    };
    kiln_release::sign_envelope(&order, &[signer]).unwrap()
}

#[test]
fn a_running_machine_goes_to_be_wiped_by_an_operators_word_and_not_by_its_servers() {
    let (site, gate, timestamp) = (TestSite::new(1), Arc::<Gate>::default(), "/metadata/timestamp.json".to_owned());
    let (http, hear) = web::honest(site.files.clone(), [(timestamp.clone(), (0, Arc::clone(&gate)))].into());
    let director = Director::start(&site, (1, 4, Via::Cold, true));
    let begun = Instant::now();
    let machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    director.wait("of health", begun, PATIENCE, healthy);

    // What the order is verified with comes late: the next report is held by then, and its answer is not waited for.
    let heard = director.heard().len();
    director.give(Some(wipe_order(&site, 1, &site.director)));
    web::wait(&hear, PATIENCE, |happened| *happened == Happened::Asked(timestamp.clone(), 0));
    director.wait_for(heard + 1, PATIENCE);
    gate.open();
    director.wait("of the refusal", begun, PATIENCE, |r| failed(r, Stage::Wipe) == Some("order-bad-signature"));
    assert!(machine.left.try_recv().is_err(), "it stays");

    director.give(Some(wipe_order(&site, 2, &crate::testing::operator())));
    let going = |r: &Report| r.stages.iter().any(|s| s.stage == Stage::Going && s.state == StageState::Started);
    director.wait("of going", begun, PATIENCE, going);
    assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot", "the initramfs does it");
}

/// Whatever is fetched meanwhile, and however slowly.
#[test]
fn an_operators_word_does_not_wait_for_a_long_transfer() {
    let site = TestSite::new(2);
    let [uki, _] = site.paths(2);
    let (_gate, gates) = gate(&uki);
    let (http, hear) = web::honest(site.files.clone(), gates);
    let director = Director::start(&site, (2, 5, Via::Cold, false));
    let begun = Instant::now();
    let machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    web::wait(&hear, PATIENCE, |h| *h == Happened::Asked(uki.clone(), 0));
    director.wait("of a part of it", begun, PATIENCE, |r| healthy(r) && received(r) > 0);
    director.give(Some(wipe_order(&site, 1, &crate::testing::operator())));
    let going = |r: &Report| r.stages.iter().any(|s| s.stage == Stage::Going && s.state == StageState::Started);
    director.wait("of going", begun, PATIENCE, going);
    assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot");
}

#[test]
fn a_machine_that_is_due_goes_to_its_own_release_again() {
    let (_site, director, machine) = healthy_on_1(true);
    let begun = Instant::now();
    // Another sequence alone is no reason: the role was signed anew.
    let heard = director.heard().len();
    director.order((1, 5, Via::Cold, true));
    director.wait_for(heard + 1, PATIENCE);
    assert!(director.heard().iter().all(|report| report.prefetch.is_none()) && machine.left.try_recv().is_err());

    director.rebuild((1, 6, Via::Cold, true));
    let ready = |r: &Report| r.prefetch.as_ref().is_some_and(|p| p.ready && p.release == 1 && p.sequence == 6);
    director.wait("of what is fetched anew", begun, PATIENCE, ready);
    assert_eq!(machine.left.recv_timeout(PATIENCE).unwrap(), "reboot");
}

#[test]
fn what_a_role_selects_is_believed_only_where_it_is_signed() {
    let (_site, director, machine) = healthy_on_1(false);
    let begun = Instant::now();
    // A threshold that is signed is looked at, and here refused, because the release declares no such check.
    let spool = machine.dir.path().join("spool.json");
    let told = || std::fs::read_to_string(&spool).unwrap_or_default();
    director.threshold("signed", "10%");
    // Another sequence, so that the held report is answered.
    director.order((1, 5, Via::Cold, false));
    hooks::wait_until("the signed threshold", || told().contains("the role sets the threshold signed"));
    director.line(Line::Forges);
    director.order((1, 6, Via::Cold, false));
    let refused =
        |r: &Report| r.stages.iter().any(|s| s.stage == Stage::Assignment && matches!(&s.state, StageState::Failed(_)));
    director.wait("of the forged choice", begun, PATIENCE, refused);
    // What lies beside it unsigned is not looked at, though a round of checks has passed.
    let turned = Instant::now();
    machine.set_state("degraded");
    director.wait("of lost health", turned, PATIENCE, |r| r.health.is_some() && !healthy(r));
    assert!(!told().contains("threshold forged"), "{}", told());
    // It goes on, and believes the next that is signed.
    director.line(Line::Whole);
    director.order((1, 7, Via::Cold, false));
    director.wait("of what is signed", begun, PATIENCE, |r| r.desired_etag.starts_with("1-7-"));
    assert!(machine.left.try_recv().is_err());
}

#[test]
fn an_answer_that_cannot_be_read_turns_to_the_next_server() {
    let site = TestSite::new(1);
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let (bad, good) =
        (Director::start(&site, (1, 4, Via::Cold, false)), Director::start(&site, (1, 4, Via::Cold, false)));
    bad.line(Line::Garbles);
    let state = TempDir::new().unwrap();
    let verifier = site.verifier(1, &[http], &[bad.url.clone(), good.url.clone()], state.path());
    let mut journal = journal(&verifier);
    let (ca, key, clock) = (&verifier.boot.site.agent_api_ca_pem, &verifier.key, &verifier.clock);
    let mut api = Api::new(&verifier.servers.agent, ca, key, clock).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let error = journal.send(&mut api, 0).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("not of version 1"), "{error}");
        journal.send(&mut api, 0).await.unwrap();
    });
    assert_eq!((bad.heard().len(), good.heard().len()), (1, 1));
}

#[test]
fn a_server_whose_key_the_site_does_not_name_hears_nothing_any_more() {
    let mut site = TestSite::that_names_its_server();
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let good = Director::start(&site, (1, 4, Via::Cold, false));
    // Whoever stole the boot server has a key that the CA has signed.
    [site.tls[1], site.tls[2]] = site.other_tls.clone();
    let thief = Director::start(&site, (1, 4, Via::Cold, false));
    let state = TempDir::new().unwrap();
    let mut verifier = site.verifier(1, &[http], &[thief.url.clone(), good.url.clone()], state.path());
    let mut journal = journal(&verifier);
    let (ca, key, clock) = (&verifier.boot.site.agent_api_ca_pem, &verifier.key, &verifier.clock);
    let mut api = Api::new(&verifier.servers.agent, ca, key, clock).unwrap().pinned(&verifier.pins);
    let here = verifier.here().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        // Nothing is known of the site yet but its CA.
        journal.send(&mut api, 0).await.unwrap();
        assert_eq!((thief.heard().len(), good.heard().len()), (1, 0));
        verifier.verify_metadata(&here).await.unwrap();
        // Also on the connection that is open.
        let error = journal.send(&mut api, 0).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), "agent-api-key-revoked", "{error}");
        journal.send(&mut api, 0).await.unwrap();
    });
    // Nor what the machine says when it leaves: that goes over another connection, which knows the same keys.
    let (machine, boot_id) = (journal.machine.id.clone(), journal.state.boot_id.clone());
    let leave = Attestation::Leave { machine, boot_id, measured: HexBytes(Vec::new()) };
    let door = Door { systemctl: "systemctl".into(), reboot: |_| unreachable!("nobody leaves here") };
    let service = Service::new(verifier, journal, state.path().join("next"), door).unwrap();
    let told = async { service.prover.0.another().attest::<Judged>(&leave).await };
    let error = runtime.block_on(told).map(drop).unwrap_err();
    assert_eq!(error.kind(), "agent-api-key-revoked", "{error}");
    assert_eq!((thief.heard().len(), good.heard().len()), (1, 1));
}

#[test]
fn a_key_that_the_site_names_since_then_is_believed_when_its_metadata_was_read_anew() {
    let mut site = TestSite::that_names_its_server();
    site.known_keys = vec!["ab".repeat(32)];
    let (http, _hear) = web::honest(site.files.clone(), BTreeMap::new());
    let director = Director::start(&site, (1, 4, Via::Cold, false));
    let begun = Instant::now();
    let _machine = Machine::start(&site, 1, &http, &director.url, "running", || Ok(root_hash(1)));
    director.wait("of health", begun, PATIENCE, healthy);
}
