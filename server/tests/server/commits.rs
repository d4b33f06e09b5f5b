//! A commit that fails: memory has what the database has, whoever waited for it hears that, and the next word works.

use crate::certificates::{request, wanting};
use crate::common::*;
use futures_util::future::join_all;
use kiln_fleet::access::AccessRole;
use kiln_protocol::*;
use kiln_release::{CertificatePolicy, hex};
use kiln_server::access::Caller;
use kiln_server::control::Control;
use kiln_server::error::ControlError;
use sqlx::{AnyConnection, Connection};

const NO_MACHINE: &str =
    "CREATE TRIGGER refuses BEFORE INSERT ON machines BEGIN SELECT RAISE(ABORT, 'no room for it'); END";
const NO_RECORD: &str =
    "CREATE TRIGGER refuses BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no room for it'); END";
const NO_NOTE: &str = "CREATE TRIGGER refuses BEFORE INSERT ON notes BEGIN SELECT RAISE(ABORT, 'no room for it'); END";

/// The server's database, opened beside it. From the trigger on it refuses such rows, and with them their transactions.
async fn refuse(site: &TestSite, trigger: &'static str) -> AnyConnection {
    let mut db = AnyConnection::connect(&format!("sqlite://{}", site.site.database().display())).await.unwrap();
    for sql in ["PRAGMA busy_timeout = 5000", trigger] {
        sqlx::query(sql).execute(&mut db).await.unwrap();
    }
    db
}

async fn allow(mut db: AnyConnection) {
    sqlx::query("DROP TRIGGER refuses").execute(&mut db).await.unwrap();
    db.close().await.unwrap();
}

/// Sequence of what the machine is assigned: in memory, and in the database.
async fn sequences(control: &Control) -> (u64, u64) {
    let stored = control.store.machine(&machine_id(1)).await.unwrap().unwrap().machine;
    (control.view("rack-1").unwrap().assigned.unwrap().sequence, stored.assigned.unwrap().sequence)
}

fn is_not_stored(result: Result<(), ControlError>) {
    let error = result.unwrap_err();
    assert!(matches!(error, ControlError::Store(_)), "{error}");
}

#[tokio::test]
async fn a_commit_that_fails_leaves_memory_as_the_database_is() {
    let site = TestSite::new();
    site.publish(2);
    let (control, _stop) = control(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    assigned(&control.report(agent.key_id(), report).await.unwrap());
    let before = control.view("rack-1").unwrap();
    assert_eq!(sequences(&control).await, (1, 1));

    let db = refuse(&site, NO_MACHINE).await;
    // The second is built on what the first could not store.
    let (retired, cleared) = tokio::join!(control.retire("rack-1", "ann"), control.clear("rack-1", None, "ben"));
    is_not_stored(retired);
    is_not_stored(cleared);
    let view = control.view("rack-1").unwrap();
    assert_eq!((&view.state, &view.name, &view.reason), (&before.state, &before.name, &before.reason));
    let release: ReleaseId = "minimal/2".parse().unwrap();
    for _ in 0..2 {
        is_not_stored(control.assign("rack-1", &release, Via::Cold, "ann").await);
        assert_eq!(sequences(&control).await, (1, 1));
    }
    // Of one that was never stored nothing is kept.
    let mut other = Agent::new(2, &site.manifest(1));
    let report = other.healthy();
    assert!(control.report(other.key_id(), report).await.is_err());
    assert!(matches!(control.view("rack-2"), Err(ControlError::NoSuchMachine(_))));
    // Nor does the audit log tell of what was not done.
    let audit = control.store.audit_tail(100).await.unwrap();
    let told = |what: &str| audit.iter().any(|r| r.what.starts_with(what));
    assert!(told("approved as rack-1") && !told("approved as rack-2"), "{audit:?}");
    assert!(!told("retired") && !told("cleared") && !told("assigned"), "{audit:?}");

    allow(db).await;
    // What the audit log does not take is not done either.
    let db = refuse(&site, NO_RECORD).await;
    is_not_stored(control.assign("rack-1", &release, Via::Cold, "ann").await);
    assert_eq!(sequences(&control).await, (1, 1));
    allow(db).await;
    for (agent, name) in [(&mut agent, "rack-1"), (&mut other, "rack-2")] {
        let report = agent.healthy();
        assigned(&control.report(agent.key_id(), report).await.unwrap());
        assert_eq!(control.view(name).unwrap().state, "healthy");
    }
    control.assign("rack-1", &release, Via::Cold, "ann").await.unwrap();
    assert_eq!(sequences(&control).await, (2, 2));
}

#[tokio::test]
async fn a_revocation_that_was_not_stored_can_be_made_again() {
    let site = TestSite::new();
    let (control, _stop) = control(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    assigned(&control.report(agent.key_id(), report).await.unwrap());

    let db = refuse(&site, NO_NOTE).await;
    is_not_stored(control.revoke_key("rack-1", "ann").await.map(drop));
    assert!(!control.access.is_revoked(&agent.key_id()));
    assert!(!control.view("rack-1").unwrap().reason.contains("revoked"));
    let report = agent.healthy();
    assigned(&control.report(agent.key_id(), report).await.unwrap());

    allow(db).await;
    control.revoke_key("rack-1", "ann").await.unwrap();
    assert!(control.access.is_revoked(&agent.key_id()));
    let note = control.store.note(&format!("revoked-key/{}", agent.key_id())).await.unwrap();
    assert!(note.is_some_and(|note| note.contains("ann")));
}

/// Where there are as many tokens as are kept, the oldest that ended makes room for a new one.
#[tokio::test]
async fn a_token_that_was_not_stored_drives_none_out() {
    let site = TestSite::new();
    let (control, _stop) = control(&site).await;
    let by = Caller::local(0);
    let create = async |name: String| control.token_create(&name, AccessRole::Viewer, None, &by).await;
    create("old".into()).await.unwrap();
    control.token_revoke("old", &by).await.unwrap();
    // Until a new one would drive an old one out.
    for made in join_all((1..1_000).map(|n| create(format!("t{n}")))).await {
        made.unwrap();
    }
    let is_there = |name: &str| control.tokens().iter().any(|token| token.name == name);
    let db = refuse(&site, NO_NOTE).await;
    is_not_stored(create("new".into()).await.map(drop));
    assert!(is_there("old") && !is_there("new") && control.tokens().len() == 1_000);
    allow(db).await;
    create("new".into()).await.unwrap();
    assert!(!is_there("old") && is_there("new") && control.tokens().len() == 1_000);
}

/// It runs a release that wants a certificate.
async fn at_work(site: &TestSite, control: &Control) -> Agent {
    let mut agent = Agent::new(1, &site.manifest(2));
    for _ in 0..2 {
        let report = agent.healthy();
        control.report(agent.key_id(), report).await.unwrap();
    }
    agent
}

/// The serial number of the next that it asks for.
async fn certified(control: &Control, agent: &Agent) -> Result<Vec<u8>, ControlError> {
    let answer = control.certify(&agent.key_id(), &request(agent).1).await?;
    let issued = answer.issued.unwrap_or_else(|| panic!("{:?}", answer.refused));
    Ok(hex::decode(&issued.serial).unwrap())
}

async fn is_listed(control: &Control, serial: &[u8]) -> bool {
    control.revoked_certificates().await.unwrap().der.windows(serial.len()).any(|bytes| bytes == serial)
}

#[tokio::test]
async fn a_certificate_whose_end_was_not_stored_ends_when_that_is_ordered_again() {
    for retires in [true, false] {
        let site = TestSite::new();
        site.publish_as(2, wanting(CertificatePolicy::Approved));
        let (control, _stop) = control(&site).await;
        let agent = at_work(&site, &control).await;
        let serial = certified(&control, &agent).await.unwrap();
        let order = async || {
            if retires {
                return control.retire("rack-1", "ann").await;
            }
            control.revoke_key("rack-1", "ann").await.map(drop)
        };
        let db = refuse(&site, NO_NOTE).await;
        is_not_stored(order().await);
        assert!(!is_listed(&control, &serial).await, "it was not ended");
        allow(db).await;
        order().await.unwrap();
        assert!(is_listed(&control, &serial).await);
        // As after a restart.
        let (again, _stop) = crate::common::control(&site).await;
        assert!(is_listed(&again, &serial).await);
    }
}

#[tokio::test]
async fn certificates_that_were_not_stored_drive_none_out() {
    let site = TestSite::new();
    site.publish_as(2, wanting(CertificatePolicy::Approved));
    let (control, _stop) = control(&site).await;
    let agent = at_work(&site, &control).await;
    let first = certified(&control, &agent).await.unwrap();
    let db = refuse(&site, NO_NOTE).await;
    // More than are known of one machine.
    for _ in 0..33 {
        is_not_stored(certified(&control, &agent).await.map(drop));
    }
    assert!(!is_listed(&control, &first).await);
    allow(db).await;
    certified(&control, &agent).await.unwrap();
    assert!(!is_listed(&control, &first).await, "two hold");
    certified(&control, &agent).await.unwrap();
    assert!(is_listed(&control, &first).await);
}
