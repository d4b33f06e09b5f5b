//! The list of expected machines through a running `kiln serve`: imported with the real command, matched with machines
//! that report, kept over a kill, audited, and refused where it is broken.

use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::*;
use kiln_server::view::{ExpectedView, ExpectedWhole, MachineView};
use std::process::Command;
use std::time::Instant;

fn kiln(site: &TestSite, arguments: &[&str]) -> (bool, String) {
    let site = site.path().to_str().unwrap();
    let done = Command::new(env!("CARGO_BIN_EXE_kiln")).args(arguments).args(["--site", site]).output().unwrap();
    (done.status.success(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
}

/// A file of this name and content, imported.
fn import(site: &TestSite, name: &str, text: &str, more: &[&str]) -> (bool, String) {
    let path = site.path().join(name);
    std::fs::write(&path, text).unwrap();
    kiln(site, &[&["expected", "import", path.to_str().unwrap()], more].concat())
}

/// The machine, once it is so.
async fn until_machine(server: &Server, name: &str, is: impl Fn(&MachineView) -> bool) -> MachineView {
    let begun = Instant::now();
    loop {
        let view = server.machine(name).await;
        if is(&view) {
            return view;
        }
        assert!(begun.elapsed() < PATIENCE, "{:?}", view.comparison);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

fn differences(view: &MachineView) -> Vec<&str> {
    view.comparison.iter().flat_map(|c| &c.differences).map(String::as_str).collect()
}

async fn whole(server: &Server) -> ExpectedWhole {
    serde_json::from_value(server.http("GET", "/api/v1/expected", &[]).await.json()).unwrap()
}

fn report(agent: &mut Agent, serial: &str) -> Report {
    let mut report = agent.healthy();
    report.machine.serial = serial.into();
    report
}

async fn post(server: &Server, agent: &Agent, dimms: &[(&str, u64)], port: &str) {
    let dimm = |(slot, gib): &(&str, u64)| Dimm { slot: (*slot).into(), bytes: gib << 30, ..Dimm::default() };
    let neighbour = Some(Neighbour { system_name: "s1".into(), port: port.into(), ..Neighbour::default() });
    let nic = Nic { name: "eth0".into(), mac: "52:54:00:00:00:01".into(), neighbour, ..Nic::default() };
    let inventory = Inventory { dimms: dimms.iter().map(dimm).collect(), nics: vec![nic], ..Inventory::default() };
    let report = InventoryReport { machine: machine_id(agent.n), boot_id: "b".into(), inventory };
    let body = serde_json::to_vec(&report).unwrap();
    let answer = server.post_to(INVENTORY_PATH, server.tls(Some(agent.identity())), body).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
}

#[tokio::test]
async fn what_comes_up_is_compared_with_the_list_and_differences_come_and_go() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let (mut first, mut second) = (Agent::new(1, &site.manifest(1)), Agent::new(2, &site.manifest(1)));
    let healthy = report(&mut first, "ABC1");
    first.send(&server, &healthy).await;
    assert_eq!(server.machine("rack-1").await.comparison, None, "without a list nothing is expected");

    let toml = "[[sku]]\nname = \"db\"\nmemory = \"4 x 32 GiB\"\n[[port]]\nswitch = \"s1\"\nport = \"12\"\nrack = \"A\"\nunit = 12\n";
    let (done, said) = import(&site, "skus.toml", toml, &[]);
    assert!(done && said.contains("2 new"), "{said}");
    let list = "\u{feff}serial;rack;unit;sku;expected\r\nABC1;A;14;db;\r\nABC2;A;15;db;2020-11-20\r\n";
    let (done, said) = import(&site, "list.csv", list, &["--dry-run"]);
    assert!(done && said.contains("would be 2 new"), "{said}");
    assert!(whole(&server).await.machines.is_empty());
    let (done, said) = import(&site, "list.csv", list, &[]);
    assert!(done && said.contains("2 machines, 1 kinds of machine and 1 switch ports"), "{said}");

    until_machine(&server, "rack-1", |m| m.comparison.as_ref().is_some_and(|c| c.entry.is_some())).await;
    let full = [("A1", 32), ("A2", 32), ("B1", 32), ("B2", 32)];
    post(&server, &first, &[full[0], ("A2", 0), full[2], full[3]], "12").await;
    let two = ["racked in U12, expected U14", "DIMM A2 missing: 3 of 4 × 32 GiB"];
    let view = until_machine(&server, "rack-1", |m| differences(m) == two).await;
    assert!(view.condition.events.iter().any(|e| e.alarm && e.kind == "expected" && e.text == two[1]), "{view:?}");
    let (_, said) = kiln(&site, &["machine", "show", "rack-1"]);
    assert!(said.contains("place        rack A U14\nfound at     rack A U12\ndiffers      racked in U12"), "{said}");

    // It is kept, and so is what is said of it.
    server.signal("-KILL");
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(differences(&server.machine("rack-1").await), two);
    let seen = whole(&server).await.machines;
    let state: Vec<(&str, &str)> = seen.iter().map(|m| (m.title.as_str(), m.state.as_str())).collect();
    assert_eq!(state, [("ABC1", "2 differences"), ("ABC2", "expected since 2020-11-20, never seen")]);
    let (_, said) = kiln(&site, &["expected", "list", "--differs"]);
    assert!(said.contains("ABC2") && said.contains("never seen"), "{said}");

    // The part is put in, the machine is moved, and a second one claims the serial number.
    post(&server, &first, &full, "99").await;
    let view = until_machine(&server, "rack-1", |m| differences(m).is_empty()).await;
    assert!(view.condition.events.iter().any(|e| !e.alarm && e.text == format!("no more: {}", two[1])), "{view:?}");
    let claims = report(&mut second, "abc1");
    second.send(&server, &claims).await;
    let both = ["serial number abc1 is also claimed by rack-1"];
    until_machine(&server, "rack-2", |m| differences(m) == both).await;
    until_machine(&server, "rack-1", |m| differences(m) == ["serial number ABC1 is also claimed by rack-2"]).await;
    let own = report(&mut second, "ABC9");
    second.send(&server, &own).await;
    let none = ["not on the list of expected machines (serial number ABC9)"];
    until_machine(&server, "rack-2", |m| differences(m) == none).await;
    until_machine(&server, "rack-1", |m| differences(m).is_empty()).await;
    assert_eq!(whole(&server).await.unlisted[0].name, "rack-2");

    // The list approves nobody: a stranger with an expected serial number waits as any other.
    let mut stranger = Agent::new(9, &site.manifest(1));
    let claims = report(&mut stranger, "ABC2");
    let reply = stranger.send(&server, &claims).await;
    assert!(waits(&reply).contains("nobody has approved it"));
    let begun = Instant::now();
    loop {
        let answer = server.http("GET", "/api/v1/expected/abc2", &[]).await;
        let view: ExpectedView = serde_json::from_value(answer.json()).unwrap();
        if view.state == "came up, and waits for approval" {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{view:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let (done, said) = kiln(&site, &["expected", "remove", "ABC2"]);
    assert!(done && said.contains("ABC2 is not expected any more"), "{said}");
    let audit = server.order("GET", "audit", serde_json::json!({})).await.text();
    assert!(audit.contains("ABC2 taken off") && audit.contains("2 new, 0 changed"), "{audit}");
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_tcp_takes_none() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let (done, said) = import(&site, "a.csv", "serial,sku\nA1,nope\nA2,\nA1,\n", &[]);
    assert!(!done && said.contains("nothing is imported"), "{said}");
    assert!(said.contains("line 4, column 1: serial A1 is in line 2 too"), "{said}");
    assert!(said.contains("line 2, column 4: sku \"nope\" is not known"), "{said}");
    assert!(whole(&server).await.machines.is_empty());
    let (done, said) = kiln(&site, &["expected", "show", "A1"]);
    assert!(!done && said.contains("is not on the list"), "{said}");
    let long = "x".repeat(kiln_server::expected::TOML_LIMIT + 1);
    let (done, said) = import(&site, "long.toml", &long, &[]);
    assert!(!done && said.contains("split it"), "{said}");
    let answer = server.http("POST", "/api/v1/expected", &[]).await;
    assert!(
        answer.status == StatusCode::FORBIDDEN || answer.status == StatusCode::METHOD_NOT_ALLOWED,
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn a_hundred_thousand_machines_are_imported_at_once() {
    use std::fmt::Write as _;
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut text = String::from("serial,rack,unit,switch,port,memory\n");
    for n in 0..100_000 {
        let _ = writeln!(text, "SN{n:06},R{},{},s{},{},16 x 32 GiB", n / 40, n % 40 + 1, n / 40, n % 40);
    }
    let begun = Instant::now();
    let (done, said) = import(&site, "big.csv", &text, &[]);
    println!("imported in {:?}", begun.elapsed());
    assert!(done && said.contains("100000 new"), "{said}");
    let (done, said) = import(&site, "big.csv", &text, &["--replace"]);
    assert!(done && said.contains("0 new, 0 changed, 0 taken off, 100000 as they were"), "{said}");
    server.signal("-KILL");
    drop(server);
    let server = Server::start(&site).await;
    assert_eq!(whole(&server).await.machines.len(), 100_000);
}
