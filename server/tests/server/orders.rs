//! Operators' orders through a running `kiln serve`: signed with the real command, submitted over its socket, handed to
//! machines, and what comes of them.

use crate::common::*;
use hyper::StatusCode;
use jiff::Timestamp;
use kiln_protocol::*;
use kiln_release::{Manifest, Signer, hex, sign_envelope};
use std::path::PathBuf;
use std::process::{Command, Output};

/// Publishes minimal/N of class rescue.
fn publish_rescue(site: &TestSite, release: u64) -> Manifest {
    let manifest = Manifest { class: "rescue".into(), ..build(&site.site, release) };
    let path = site.site.build("minimal", release).join("manifest.json");
    std::fs::write(path, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    kiln_images::publish(site.path(), "minimal", release, Timestamp::now()).unwrap();
    manifest
}

fn kiln(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kiln")).args(arguments).output().unwrap()
}

#[track_caller]
fn does(arguments: &[&str]) -> String {
    let done = kiln(arguments);
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

#[track_caller]
fn refuses(arguments: &[&str], reason: &str) {
    let done = kiln(arguments);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains(reason), "{arguments:?}: {said}");
}

/// What files are needed, as texts for a command line.
struct Desk {
    site: String,
    key: String,
    dir: tempfile::TempDir,
}

impl Desk {
    fn new(site: &TestSite) -> Self {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        let dir = tempfile::tempdir().unwrap();
        Self { site: text(site.path().to_owned()), key: text(site.path().join("offline/operator.key")), dir }
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }
}

fn named(agent: &Agent) -> String {
    format!("{}:{}", machine_id(agent.n), agent.key_id())
}

/// What a machine does with a reply's order: the agent's own checks.
fn takes(site: &TestSite, agent: &Agent, report: &Report, reply: &Reply) -> Order {
    let given = reply.desired.order.as_ref().expect("an order comes with the reply");
    let signed = site.signed_site();
    let (order, sha256) = signed.verify_operator::<Order>(given.order.as_bytes(), ORDER_TYPE).unwrap();
    let (fresh, _) = signed.verify_director::<Freshness>(given.freshness.as_bytes()).unwrap();
    check_freshness(&fresh, &report.nonce, &sha256.parse().unwrap()).unwrap();
    let me = Ordered { key: &agent.key_id(), name_only: None, now: fresh.now, mark: None, sequence: 0 };
    check_order(&order, &me).unwrap();
    order
}

#[tokio::test]
async fn a_rescue_release_is_assigned_by_a_signed_order_and_only_so() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    assert_eq!(reply.desired.order, None);
    let rescue = publish_rescue(&site, 2);
    let desk = Desk::new(&site);
    let body = serde_json::json!({ "image": "minimal", "release": 2, "via": "cold" });
    let refused = server.order("PUT", "machines/rack-1/assignment", body).await;
    assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(refused.text().contains("kiln order sign assign minimal/2 --class rescue"), "{}", refused.text());

    let (file, machine) = (desk.file("order"), named(&agent));
    does(&[
        "order",
        "sign",
        "assign",
        "minimal/2",
        "--class",
        "rescue",
        "--machine",
        &machine,
        "--key",
        &desk.key,
        "--out",
        &file,
    ]);
    assert!(
        does(&["order", "submit", &file, "--site", &desk.site])
            .contains("is handed to rack-1: run minimal/2 of class rescue")
    );
    refuses(&["order", "submit", &file, "--site", &desk.site], "was submitted before");

    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    assert_ne!(reply.desired.etag, "");
    let order = takes(&site, &agent, &report, &reply);
    let (envelope, ..) = assigned(&reply);
    let (assignment, _) = site.signed_site().verify_director::<Assignment>(envelope.as_bytes()).unwrap();
    assert!(order.allows(&assignment.release_id(), "rescue"));
    assert!(does(&["order", "list", "--site", &desk.site]).contains(" open"));

    // It is there; a restart of the server forgets nothing.
    agent.restart(&rescue);
    let report = agent.healthy();
    agent.send(&server, &report).await;
    drop(server);
    let server = Server::start(&site).await;
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    takes(&site, &agent, &report, &reply);
    let view = server.machine("rack-1").await;
    assert_eq!((view.state.as_str(), view.release), ("healthy", Some(2)));
    assert_eq!(view.last_good, Some("minimal/1".parse().unwrap()), "it is not one to come back to");
    assert!(view.order.unwrap().ends_with(": done"));

    // Home: the order is over.
    server.assign("rack-1", 1).await;
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    assert_eq!(reply.desired.order, None);
    let list = does(&["order", "list", "--site", &desk.site]);
    assert!(list.contains("superseded") && list.contains("rack-1") && list.contains("uid "), "{list}");
    let audit = server.order("GET", "audit", serde_json::Value::Null).await;
    let found = audit.text().matches("run minimal/2 of class rescue").count();
    assert_eq!(found, 1, "{}", audit.text());
}

#[tokio::test]
async fn the_server_takes_no_order_that_a_machine_would_refuse() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    publish_rescue(&site, 2);
    let desk = Desk::new(&site);
    let director = site.path().join("online/director.key");
    let (mine, other) = (named(&agent), format!("{}:{}", machine_id(1), "ab".repeat(32)));
    let unknown = format!("{}:{}", machine_id(77), "ab".repeat(32));
    let cases = [
        ("director", "minimal/2", "rescue", &mine, director.to_str().unwrap(), "24h", "signed by 0 trusted keys"),
        ("other", "minimal/2", "rescue", &other, &desk.key, "24h", "not this one with key"),
        ("unknown", "minimal/2", "rescue", &unknown, &desk.key, "24h", "there is no machine"),
        ("late", "minimal/2", "rescue", &mine, &desk.key, "0s", "expired"),
        ("class", "minimal/2", "wipe", &mine, &desk.key, "24h", "minimal/2 is of class rescue, the order says wipe"),
        ("release", "minimal/9", "rescue", &mine, &desk.key, "24h", "minimal/9 is not published"),
    ];
    for (name, release, class, machine, key, expires, reason) in cases {
        let file = desk.file(name);
        does(&[
            "order",
            "sign",
            "assign",
            release,
            "--class",
            class,
            "--machine",
            machine,
            "--key",
            key,
            "--expires",
            expires,
            "--out",
            &file,
        ]);
        refuses(&["order", "submit", &file, "--site", &desk.site], reason);
    }
    assert_eq!(server.machine("rack-1").await.order, None);
    // Over TCP nobody submits anything.
    assert_eq!(server.http("POST", "/api/v1/orders", &[]).await.status, StatusCode::FORBIDDEN);

    // A server that was stolen and given back: what the machine refused meanwhile is on record.
    let mut told = agent.healthy();
    let message = "minimal/2 is of class rescue: it needs an order that an operator signed".to_owned();
    let failure = Failure { kind: "order-missing".into(), message, attempt: 1, retry_in_ms: None };
    told.stages = vec![StageRecord { stage: Stage::Prefetch, state: StageState::Failed(failure), at_ms: 9 }];
    agent.send(&server, &told).await;
    let view = server.machine("rack-1").await;
    assert!(view.last_words.contains("it needs an order that an operator signed"), "{}", view.last_words);
    let kinds = view.boots.last().unwrap().stages.iter().filter_map(|stage| stage.kind.as_deref());
    assert_eq!(kinds.collect::<Vec<_>>(), ["order-missing"]);
}

#[tokio::test]
async fn two_operators_sign_where_the_site_asks_for_two() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let desk = Desk::new(&site);
    let keys = ["ann", "ben", "cid"].map(|name| desk.file(name));
    for key in &keys {
        does(&["order", "key", key]);
    }
    refuses(&["order", "key", &keys[0]], "File exists");
    let public = keys.clone().map(|key| format!("{key}.pub"));
    let [ann, ben, cid] = public.each_ref().map(String::as_str);
    refuses(&["trust", "operators", ann, "--threshold", "2", "--site", &desk.site], "operator_threshold");
    does(&["trust", "operators", ann, ben, cid, "--threshold", "2", "--site", &desk.site]);

    let file = desk.file("order");
    let machine = named(&agent);
    does(&["order", "sign", "wipe", "--all-disks", "--machine", &machine, "--key", &keys[0], "--out", &file]);
    refuses(&["order", "submit", &file, "--site", &desk.site], "signed by 1 trusted keys, 2 are needed");
    does(&["order", "cosign", &file, "--key", &keys[0]]);
    refuses(&["order", "submit", &file, "--site", &desk.site], "signed by 1 trusted keys, 2 are needed");
    does(&["order", "cosign", &file, "--key", &desk.key]);
    refuses(&["order", "submit", &file, "--site", &desk.site], "signed by 1 trusted keys, 2 are needed");
    does(&["order", "cosign", &file, "--key", &keys[2]]);
    does(&["order", "submit", &file, "--site", &desk.site]);
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    assert!(matches!(takes(&site, &agent, &report, &reply).action, OrderAction::Wipe { .. }));
}

fn receipt(agent: &Agent, order: &OrderId, outcome: WipeOutcome) -> Receipt {
    Receipt {
        type_: RECEIPT_TYPE.into(),
        spec_version: SPEC_VERSION.into(),
        machine: machine_id(agent.n),
        key: agent.key_id(),
        public_key: hex::encode(&agent.signer.public_bytes()),
        order: order.clone(),
        disks: vec![WipedDisk {
            name: "nvme0n1".into(),
            model: "Disk".into(),
            serial: "SER1".into(),
            bytes: 1 << 30,
            methods: vec!["nvme-format".into()],
            outcome,
            detail: "all 1073741824 bytes were read back and are 0x00".into(),
        }],
        finished: "2026-01-01T00:00:00Z".parse().unwrap(),
        seconds: 60,
    }
}

async fn bring(server: &Server, agent: &Agent, receipt: &Receipt, signer: &Signer) -> (StatusCode, String) {
    let text = sign_envelope(receipt, &[signer]).unwrap();
    let answer = server.post_to(RECEIPT_PATH, server.tls(Some(agent.identity())), text.into_bytes()).await.unwrap();
    (answer.status, answer.text())
}

#[tokio::test]
async fn a_wipe_ends_with_a_receipt_that_anybody_can_check() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agents = [1, 2].map(|n| Agent::new(n, &site.manifest(1)));
    for agent in &mut agents {
        let report = agent.healthy();
        agent.send(&server, &report).await;
    }
    let desk = Desk::new(&site);
    let [one, two] = &mut agents;
    // It is on its way out: the wipe is for it none the less.
    does(&["machine", "retire", "rack-1", "--site", &desk.site]);
    refuses(&["machine", "receipt", "rack-1", "--site", &desk.site], "has no receipt");
    let wipe = ["machine", "wipe", "rack-1", "--order-key", &desk.key, "--all-disks", "--site", &desk.site];
    assert!(does(&wipe).contains("wipe all disks"));
    let report = one.healthy();
    let reply = one.send(&server, &report).await;
    assert!(waits(&reply).contains("out of service"));
    let order = takes(&site, one, &report, &reply);
    let report = two.healthy();
    assert_eq!(two.send(&server, &report).await.desired.order, None, "it is for nobody else");

    let good = receipt(one, &order.id, WipeOutcome::Wiped);
    let theirs = receipt(two, &order.id, WipeOutcome::Wiped);
    let (status, text) = bring(&server, two, &good, &one.signer).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{text}");
    assert!(text.contains("another key"), "{text}");
    assert!(bring(&server, one, &good, &two.signer).await.1.contains("signed by 0"));
    assert!(bring(&server, two, &theirs, &two.signer).await.1.contains("no order"));
    // Right in itself, and signed by the key that brings it: in the other machine's name.
    let named = Receipt { machine: machine_id(1), ..theirs };
    let (status, text) = bring(&server, two, &named, &two.signer).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{text}");
    assert!(text.contains("no order"), "{text}");
    let open = does(&["order", "list", "--site", &desk.site]);
    assert!(open.contains(" open"), "{open}");
    let (status, text) = bring(&server, one, &good, &one.signer).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let report = one.healthy();
    assert_eq!(one.send(&server, &report).await.desired.order, None, "it is done");
    let list = does(&["order", "list", "--site", &desk.site]);
    assert!(list.contains(" done"), "{list}");

    let file = desk.file("receipt");
    let shown = does(&["machine", "receipt", "rack-1", "--out", &file, "--site", &desk.site]);
    assert!(shown.contains("SER1") && shown.contains("nvme-format") && shown.contains("wiped"), "{shown}");
    drop(server);
    let key = one.key_id().to_string();
    does(&["order", "verify-receipt", &file, "--key", &key]);
    assert!(does(&["order", "verify-receipt", &file]).contains("compare the key"));
    refuses(&["order", "verify-receipt", &file, "--key", two.key_id().as_str()], "not by the machine's key");
    let altered = desk.file("altered");
    std::fs::write(&altered, std::fs::read_to_string(&file).unwrap().replace("SER1", "SER2")).unwrap();
    refuses(&["order", "verify-receipt", &altered, "--key", &key], "signed by 0");
}

#[tokio::test]
async fn a_disk_that_was_not_wiped_is_never_called_wiped() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let desk = Desk::new(&site);
    does(&["machine", "wipe", "rack-1", "--order-key", &desk.key, "--disk", "SER1", "--site", &desk.site]);
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    let order = takes(&site, &agent, &report, &reply);
    let failed = receipt(&agent, &order.id, WipeOutcome::Failed);
    assert_eq!(bring(&server, &agent, &failed, &agent.signer).await.0, StatusCode::OK);
    let list = does(&["order", "list", "--site", &desk.site]);
    assert!(list.contains("failed: not wiped: nvme0n1 (SER1)") && !list.contains("done"), "{list}");
    let file = desk.file("receipt");
    does(&["machine", "receipt", "rack-1", "--out", &file, "--site", &desk.site]);
    refuses(&["order", "verify-receipt", &file], "disks were not wiped: nvme0n1 (SER1)");
}

#[tokio::test]
async fn new_hardware_takes_the_place_of_old() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut old = Agent::new(1, &site.manifest(1));
    // The list expects the old one at its place.
    let with_serial = |mut report: Report, serial: &str| {
        report.machine.serial = serial.into();
        report
    };
    let list = site.path().join("list.csv");
    std::fs::write(&list, "serial,rack,unit,switch,port\nOLD1,A,U14,s1,12\n").unwrap();
    does(&["expected", "import", list.to_str().unwrap(), "--site", site.path().to_str().unwrap()]);
    let report = with_serial(old.healthy(), "OLD1");
    old.send(&server, &report).await;
    let mut new = Agent::new(9, &site.manifest(1));
    let desk = Desk::new(&site);
    let id = machine_id(9).to_string();
    let replace = ["machine", "replace", "rack-1", id.as_str(), "--site", desk.site.as_str()];
    refuses(&replace, "there is no machine");
    let report = with_serial(new.report(), "NEW1");
    assert!(waits(&new.send(&server, &report).await).contains("nobody has approved it"));
    let other = ["machine", "replace", "rack-1", "rack-1", "--site", desk.site.as_str()];
    refuses(&other, "rack-1 cannot replace itself");
    assert!(does(&replace).contains("is rack-1 now, to run minimal/1; rack-1 is retired"));
    // Its place is the old one's on the list too, and nobody else's.
    let whole = server.http("GET", "/api/v1/expected", &[]).await.json();
    let whole: kiln_server::view::ExpectedWhole = serde_json::from_value(whole).unwrap();
    let [entry] = &whole.machines[..] else { panic!("{whole:?}") };
    let listed = &entry.listed;
    assert_eq!((entry.title.as_str(), listed.uuid.clone()), ("NEW1", Some(machine_id(9))));
    let place = [&listed.position.rack, &listed.position.unit, &listed.switch, &listed.port];
    assert_eq!(place, ["A", "U14", "s1", "12"]);
    let audit = server.order("GET", "audit", serde_json::json!({})).await.text();
    assert!(audit.contains(&format!("the place of OLD1 is now that of {id}")), "{audit}");

    let report = with_serial(new.report(), "NEW1");
    let reply = new.send(&server, &report).await;
    let (assignment, _) = site.signed_site().verify_director::<Assignment>(assigned(&reply).0.as_bytes()).unwrap();
    assert_eq!((assignment.machine.key, assignment.role.as_str()), (new.key_id(), "lab"));
    let report = old.healthy();
    assert!(waits(&old.send(&server, &report).await).contains(&format!("{id} took its place")));
    let (placed, gone) = (server.machine("rack-1").await, server.machine(machine_id(1).as_str()).await);
    assert_eq!((placed.id, gone.state.as_str()), (machine_id(9), "retired"));
    assert_eq!(gone.boots.len(), 1, "its history stays");
    refuses(&["machine", "replace", machine_id(1).as_str(), &id, "--site", &desk.site], "rack-1 is in service");
    // A wipe of what is on its way out is by its id.
    let wipe = ["machine", "wipe", gone.id.as_str(), "--order-key", &desk.key, "--all-disks", "--site", &desk.site];
    does(&wipe);
    let report = old.healthy();
    let reply = old.send(&server, &report).await;
    takes(&site, &old, &report, &reply);
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(server.machine("rack-1").await.id, machine_id(9), "also after a restart");
}

/// Arguments of a command.
type Words<'a> = &'a [&'a str];

/// Such a machine forgets with each boot what was done: a stolen server could have it wiped again and again.
#[tokio::test]
async fn a_wipe_of_a_machine_without_a_lasting_key_holds_for_an_hour() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let (mut keyed, desk) = (Agent::new(1, &site.manifest(1)), Desk::new(&site));
    let mut forgets = Agent { storage: KeyStorage::Ephemeral, ..Agent::new(2, &site.manifest(1)) };
    for agent in [&mut keyed, &mut forgets] {
        let report = agent.report();
        agent.send(&server, &report).await;
    }
    let hours = |expires: &serde_json::Value, from: Timestamp| {
        let expires: Timestamp = expires.as_str().unwrap().parse().unwrap();
        (expires.as_second() - from.as_second() + 1800) / 3600
    };
    let (with_key, id_alone) = (named(&keyed), machine_id(2).to_string());
    let (with_key, id_alone) = (with_key.as_str(), id_alone.as_str());
    let (wipe, assign) = (["wipe", "--all-disks"], ["assign", "minimal/1", "--class", "rescue"]);
    let cases: [(Words<'_>, Words<'_>, Words<'_>, i64); 5] = [
        (&wipe, &[with_key], &[], 24),
        (&wipe, &[id_alone], &[], 1),
        (&wipe, &[with_key, id_alone], &[], 1),
        (&wipe, &[id_alone], &["--expires", "2d"], 48),
        (&assign, &[id_alone], &[], 24),
    ];
    for (n, (what, machines, more, expected)) in cases.into_iter().enumerate() {
        let file = desk.file(&format!("order-{n}"));
        let mut arguments = vec!["order", "sign"];
        arguments.extend(what);
        for &machine in machines {
            arguments.extend(["--machine", machine]);
        }
        arguments.extend(more);
        does(&[&arguments[..], &["--key", &desk.key, "--out", &file]].concat());
        let order: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let issued = order["signed"]["issued"].as_str().unwrap().parse().unwrap();
        assert_eq!(hours(&order["signed"]["expires"], issued), expected, "{arguments:?}");
    }
    // In one step, where the server says how the machine keeps its key.
    for (name, expected) in [("rack-1", 24), ("rack-2", 1)] {
        does(&["machine", "wipe", name, "--order-key", &desk.key, "--all-disks", "--site", &desk.site]);
        let orders = server.order("GET", "orders", serde_json::Value::Null).await.json();
        let order = orders.as_array().unwrap().iter().find(|order| order["machines"][0]["name"] == name).unwrap();
        assert_eq!(hours(&order["expires"], Timestamp::now()), expected, "{order}");
    }
}
