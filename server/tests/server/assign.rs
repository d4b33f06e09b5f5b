//! Releases that a machine or its role cannot be given.

use crate::common::*;
use hyper::StatusCode;
use jiff::Timestamp;
use kiln_protocol::*;
use serde_json::json;

async fn refused(server: &Server, release: u64, words: &str) {
    let answer = server.try_assign("rack-1", release).await;
    assert!(answer.status == StatusCode::UNPROCESSABLE_ENTITY && answer.text().contains(words), "{}", answer.text());
}

#[tokio::test]
async fn a_key_that_a_tpm_seals_goes_to_no_release_whose_agent_knows_no_tpm() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent { storage: KeyStorage::Tpm, ..Agent::new(1, &site.manifest(1)) };
    let report = agent.healthy();
    agent.send(&server, &report).await;
    site.publish_as(2, |manifest| manifest.measured = None);
    refused(&server, 2, "sealed in its TPM").await;
    server.assign("rack-1", 1).await;
    // Another machine's key lies in a variable: any agent finds it there.
    let mut agent = Agent::new(2, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    server.assign("rack-2", 2).await;
}

/// The floor was raised without asking the server: what it signed before is not handed out again either.
#[tokio::test]
async fn what_fell_below_the_floor_is_signed_for_nobody() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    assigned(&agent.send(&server, &report).await);
    site.publish(2);
    kiln_images::raise_floor(site.path(), "minimal", 2, Timestamp::now()).unwrap();
    // An order has the server look at the repository.
    refused(&server, 1, "below the floor 2").await;
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    let words = "minimal/1 is below the floor 2 of its image: assign another";
    assert_eq!(waits(&reply), words);
    let view = server.machine("rack-1").await;
    assert!(view.reason.contains(words), "{}", view.reason);
    server.assign("rack-1", 2).await;
    assert!(!server.machine("rack-1").await.reason.contains(words));
    let report = agent.healthy();
    assigned(&agent.send(&server, &report).await);
}

/// `[[machine]]` approves no machine that a person could not.
#[tokio::test]
async fn the_list_gives_no_machine_a_name_that_is_taken_or_a_release_that_does_not_fit() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    // A person called another one as the list calls machine 1.
    let mut other = Agent::new(9, &site.manifest(1));
    let report = other.report();
    other.send(&server, &report).await;
    let body = json!({ "name": "rack-1", "role": "lab" });
    let approved = server.order("POST", &format!("machines/{}/approve", machine_id(9)), body).await;
    assert_eq!(approved.status, StatusCode::OK, "{}", approved.text());
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    let words = "kiln.toml lists it as rack-1 with role lab, and it is not approved: the name \"rack-1\" is taken";
    assert!(waits(&reply).starts_with(words), "{}", waits(&reply));
    let id = machine_id(1).to_string();
    let view = server.machine(&id).await;
    assert!(view.state == "discovered" && view.reason.starts_with(words), "{view:?}");
    assert_eq!(server.machine("rack-1").await.id, machine_id(9));
    // It is approved as soon as it can be.
    server.order("POST", "machines/rack-1/retire", json!({})).await;
    let report = agent.healthy();
    assigned(&agent.send(&server, &report).await);
    assert_eq!(server.machine("rack-1").await.id, machine_id(1));

    site.publish_as(2, |manifest| manifest.measured = None);
    server.assign("rack-1", 2).await;
    let mut sealed = Agent { storage: KeyStorage::Tpm, ..Agent::new(2, &site.manifest(1)) };
    let report = sealed.healthy();
    let reply = sealed.send(&server, &report).await;
    assert!(
        waits(&reply).contains("not approved: the identity key of rack-2 is sealed in its TPM"),
        "{}",
        waits(&reply)
    );
    site.publish(3);
    server.assign("rack-1", 3).await;
    let report = sealed.healthy();
    assigned(&sealed.send(&server, &report).await);
    let approvals = server.audit().await.into_iter().filter(|r| r.what.starts_with("approved as rack-")).count();
    assert_eq!(approvals, 3, "two by the list, one by a person");
}

/// `[[machine]]` with a serial number in place of an id.
#[tokio::test]
async fn a_listed_serial_number_belongs_to_the_first_key_that_claims_it() {
    let site = TestSite::new();
    let mine = Agent::new(6, &site.manifest(1));
    let keyed =
        format!("[[machine]]\nserial = \"XYZ-2\"\nname = \"keyed\"\nrole = \"lab\"\nkey = \"{}\"", mine.key_id());
    site.configure(&format!("[[machine]]\nserial = \"abc-1\"\nname = \"desk\"\nrole = \"lab\"\n{keyed}"));
    let server = Server::start(&site).await;
    let says = async |agent: &mut Agent, serial: &str| {
        let mut report = agent.healthy();
        report.machine.serial = serial.to_owned();
        agent.send(&server, &report).await
    };
    let (mut first, mut second) = (Agent::new(7, &site.manifest(1)), Agent::new(8, &site.manifest(1)));
    assigned(&says(&mut first, "ABC-1").await);
    assert_eq!(server.machine("desk").await.id, machine_id(7));
    let reply = says(&mut second, "ABC-1").await;
    let words = "lists it as desk with role lab, and it is not approved: serial number abc-1 is also claimed by desk";
    assert!(waits(&reply).contains(words), "{}", waits(&reply));
    assert_eq!(server.machine(machine_id(8).as_str()).await.state, "discovered");
    assigned(&says(&mut first, "ABC-1").await);
    // Its place is free when it is taken out of service.
    let answer = server.order("POST", "machines/desk/retire", json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assigned(&says(&mut second, "ABC-1").await);
    assert_eq!(server.machine("desk").await.id, machine_id(8));

    // Where the list names the key, no other claims the serial number.
    let (mut other, mut mine) = (Agent::new(5, &site.manifest(1)), mine);
    let reply = says(&mut other, "xyz-2").await;
    assert!(
        waits(&reply).contains("names the identity key of the machine with serial number XYZ-2"),
        "{}",
        waits(&reply)
    );
    let reply = says(&mut mine, "xyz-2").await;
    assert!(waits(&reply).contains("is also claimed by"), "{}", waits(&reply));
    says(&mut other, "").await;
    assigned(&says(&mut mine, "xyz-2").await);
    // Nor does one that knows the id take it from the machine, by a person's clear or by a restart of the server.
    let signer = std::sync::Arc::new(kiln_release::Signer::from_seed(&[77; 32]));
    let mut thief = Agent { signer, boot: 50, ..mine.clone() };
    let words = "kiln.toml names the identity key of keyed";
    assert!(waits(&says(&mut thief, "xyz-2").await).contains(words));
    assert_eq!(server.order("POST", "machines/keyed/clear", json!({})).await.status, StatusCode::OK);
    assert!(waits(&says(&mut thief, "xyz-2").await).contains(words));
    drop(server);
    let server = Server::start(&site).await;
    let report = thief.healthy();
    assert!(waits(&thief.send(&server, &report).await).contains(words));
}

#[tokio::test]
async fn a_role_that_only_reports_gets_no_release_that_forbids_it() {
    let site = TestSite::new();
    let toml = std::fs::read_to_string(site.path().join("kiln.toml")).unwrap();
    let reports = toml.replace("name = \"lab\"\n", "name = \"lab\"\nexec = \"report\"\n");
    std::fs::write(site.path().join("kiln.toml"), reports).unwrap();
    site.publish_as(2, |manifest| manifest.role_may_report = Some(true));
    site.publish_as(3, |manifest| manifest.role_may_report = None);
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    server.assign("rack-1", 2).await;
    refused(&server, 1, "exec = \\\"report\\\"").await;
    server.assign("rack-1", 3).await;
}

#[tokio::test]
async fn what_is_about_to_be_pruned_is_given_to_nobody_and_what_machines_need_is_not_pruned() {
    let site = TestSite::new();
    (2..=4).for_each(|release| drop(site.publish(release)));
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    server.assign("rack-1", 3).await;
    let withhold = async |token: Option<&str>| {
        let (path, body) = ("releases/minimal/withhold", json!({ "releases": [1, 2, 3] }));
        match token {
            Some(token) => server.with(token, "POST", path, body).await,
            None => server.order("POST", path, body).await,
        }
    };
    let viewer = server.token("ann", "viewer").await;
    assert_eq!(withhold(Some(&viewer)).await.status, StatusCode::FORBIDDEN);
    assert_eq!(withhold(None).await.json(), json!({ "releases": [1, 3] }));
    let answer = server.try_assign("rack-1", 2).await;
    assert!(
        answer.status == StatusCode::CONFLICT && answer.text().contains("about to be taken out"),
        "{}",
        answer.text()
    );
    for release in [1, 3, 4] {
        server.assign("rack-1", release).await;
    }
    let audit = server.audit().await;
    assert!(audit.iter().any(|r| r.what == "withheld, to be pruned: minimal/2"), "{audit:?}");
}

/// What an older kiln.toml said of a machine is dropped when the server starts with one that does not list it.
#[tokio::test]
async fn a_machine_that_is_taken_off_the_list_has_nothing_more_of_it() {
    let site = TestSite::new();
    let two = site.publish_as(2, |manifest| manifest.measured = None);
    let server = Server::start(&site).await;
    let mut agent = Agent { storage: KeyStorage::Tpm, ..Agent::new(1, &two) };
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    assert!(waits(&reply).contains("kiln.toml lists it as rack-1"), "{}", waits(&reply));
    assert_eq!(server.machine(machine_id(1).as_str()).await.name, "rack-1");
    drop(server);

    let file = site.path().join("kiln.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let line = format!("[[machine]]\nid = \"{}\"\nname = \"rack-1\"\nrole = \"lab\"\n", machine_id(1));
    assert!(text.contains(&line), "{text}");
    std::fs::write(&file, text.replace(&line, "")).unwrap();
    // Before it speaks, and kept.
    for _ in 0..2 {
        let server = Server::start(&site).await;
        let view = server.machine(machine_id(1).as_str()).await;
        assert_eq!((view.state.as_str(), view.name.as_str()), ("discovered", machine_id(1).as_str()));
        assert!(view.reason.starts_with("nobody has approved it"), "{}", view.reason);
    }
    let server = Server::start(&site).await;
    let report = agent.healthy();
    let reply = agent.send(&server, &report).await;
    assert!(waits(&reply).contains("nobody has approved it"), "{}", waits(&reply));
    // The name is free.
    let one = site.manifest(1);
    let mut other = Agent::new(9, &one);
    let report = other.report();
    other.send(&server, &report).await;
    let path = format!("machines/{}/approve", machine_id(9));
    let answer = server.order("POST", &path, json!({ "role": "lab", "name": "rack-1" })).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
}
