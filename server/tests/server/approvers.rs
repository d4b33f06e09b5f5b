//! Who approves what: a technician places new machines; what was placed before is an operator's to move or to bring back.

use crate::common::*;
use hyper::StatusCode;
use kiln_fleet::access::AccessRole;
use kiln_server::access::calls::CALLS;
use kiln_server::view::MachineView;
use serde_json::{Value, json};

/// Another role for the same image.
const DB: &str = "[[role]]\nname = \"db\"\nimage = \"minimal\"";

async fn approve(server: &Server, token: &str, n: u8, body: Value) -> Answer {
    server.with(token, "POST", &format!("machines/{}/approve", machine_id(n)), body).await
}

async fn role(server: &Server, n: u8) -> Option<String> {
    server.machine(machine_id(n).as_str()).await.role
}

/// The site with that role and more; machines 1 and 2 are in service with role lab, nobody approved machine 9.
async fn rack(more: &str) -> (TestSite, Server) {
    let site = TestSite::new();
    site.configure(&format!("{more}\n{DB}"));
    let server = Server::start(&site).await;
    for n in [1, 2] {
        let mut agent = Agent::new(n, &site.manifest(1));
        let report = agent.healthy();
        agent.send(&server, &report).await;
    }
    let mut stranger = Agent::new(9, &site.manifest(1));
    let report = stranger.report();
    waits(&stranger.send(&server, &report).await);
    (site, server)
}

#[tokio::test]
async fn a_technician_places_new_machines_and_moves_none_that_was_placed() {
    let (_site, server) = rack("").await;
    let (tec, ann) = (server.token("tec", "technician").await, server.token("ann", "operator").await);
    let refused = async |n: u8, body: Value, words: &str| {
        let before = server.machine(machine_id(n).as_str()).await;
        let answer = approve(&server, &tec, n, body.clone()).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{body}: {}", answer.text());
        assert!(answer.text().contains(words), "{}", answer.text());
        // Out of service it has no name any more, and is still called by it.
        let title = words.split(' ').next().unwrap();
        let what_to_do = format!(
            "An operator moves this one into another role, renames it or brings it back: `kiln machine approve {title} "
        );
        assert!(answer.text().contains(&what_to_do), "{}", answer.text());
        let after = server.machine(machine_id(n).as_str()).await;
        assert_eq!(
            (after.role, after.name, after.state, after.assigned.map(|a| a.sequence)),
            (before.role, before.name, before.state, before.assigned.map(|a| a.sequence)),
        );
    };
    let done = async |token: &str, n: u8, body: Value| {
        let answer = approve(&server, token, n, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    };
    // In service: another role, another name, and what would change nothing.
    for body in [json!({ "role": "db" }), json!({ "role": "lab", "name": "mine" }), json!({ "role": "lab" })] {
        refused(1, body, "rack-1 is healthy (role lab), and token tec has the access role technician").await;
    }
    // A new one, once.
    done(&tec, 9, json!({ "role": "lab", "name": "nine" })).await;
    assert_eq!(role(&server, 9).await.as_deref(), Some("lab"));
    refused(9, json!({ "role": "db" }), "nine is ").await;
    // Out of service, by an operator's word.
    server.order("POST", "machines/rack-1/retire", json!({})).await;
    refused(1, json!({ "role": "lab" }), "rack-1 is retired (role lab)").await;
    // An operator does both.
    done(&ann, 1, json!({ "role": "db" })).await;
    done(&ann, 2, json!({ "role": "db" })).await;
    assert_ne!(server.machine("rack-1").await.state, "retired");
    assert_eq!((role(&server, 1).await.as_deref(), role(&server, 2).await.as_deref()), (Some("db"), Some("db")));
    let audit = server.audit().await;
    let kept =
        audit.iter().filter(|r| r.actor.starts_with("token tec") && r.result.contains("approves new machines only"));
    assert_eq!(kept.count(), 5, "{audit:?}");
}

#[tokio::test]
async fn no_second_person_makes_an_operator_of_a_technician() {
    let (_site, server) = rack("[access]\nfour_eyes = [\"approve\"]").await;
    let (tec, tom) = (server.token("tec", "technician").await, server.token("tom", "technician").await);
    let (ann, ben) = (server.token("ann", "operator").await, server.token("ben", "operator").await);
    let confirm = async |token: &str, asked: &Answer| {
        assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.text());
        let id = asked.json()["pending"]["id"].as_str().unwrap().to_owned();
        server.with(token, "POST", &format!("pending/{id}/confirm"), json!({})).await
    };
    // Nobody confirms what whoever asks may not.
    let asked = approve(&server, &tec, 1, json!({ "role": "db" })).await;
    assert_eq!(asked.status, StatusCode::FORBIDDEN, "{}", asked.text());
    assert!(asked.text().contains("rack-1 is healthy (role lab)"), "{}", asked.text());
    assert_eq!(server.order("GET", "pending", Value::Null).await.json(), json!([]));
    // Two operators do; an operator and a technician do not.
    let asked = approve(&server, &ann, 1, json!({ "role": "db" })).await;
    let by_technician = confirm(&tom, &asked).await;
    assert_eq!(by_technician.status, StatusCode::FORBIDDEN, "{}", by_technician.text());
    assert!(by_technician.text().contains("this call needs operator"), "{}", by_technician.text());
    assert_eq!(role(&server, 1).await.as_deref(), Some("lab"));
    let by_operator = confirm(&ben, &asked).await;
    assert_eq!(by_operator.status, StatusCode::OK, "{}", by_operator.text());
    assert_eq!(role(&server, 1).await.as_deref(), Some("db"));
    // Two technicians place a new one, unless it was placed meanwhile: then an operator's word lends the technician nothing.
    let late = approve(&server, &tec, 9, json!({ "role": "lab" })).await;
    let asked = approve(&server, &tec, 9, json!({ "role": "db", "name": "nine" })).await;
    let placed = confirm(&tom, &asked).await;
    assert_eq!(placed.status, StatusCode::OK, "{}", placed.text());
    let too_late = confirm(&ben, &late).await;
    assert_eq!(too_late.status, StatusCode::FORBIDDEN, "{}", too_late.text());
    assert!(too_late.text().contains("token tec has the access role technician"), "{}", too_late.text());
    assert_eq!(role(&server, 9).await.as_deref(), Some("db"));
}

#[tokio::test]
async fn a_person_moves_few_machines_into_another_role_alone() {
    let (_site, server) = rack("[access]\nassign_alone = 1").await;
    let ann = server.token("ann", "operator").await;
    // New machines are no change of anybody's.
    assert_eq!(approve(&server, &ann, 9, json!({ "role": "lab", "name": "nine" })).await.status, StatusCode::OK);
    assert_eq!(approve(&server, &ann, 1, json!({ "role": "db" })).await.status, StatusCode::OK);
    let second = approve(&server, &ann, 2, json!({ "role": "db" })).await;
    assert_eq!(second.status, StatusCode::ACCEPTED, "{}", second.text());
    let assign = json!({ "image": "minimal", "release": 1, "via": "kexec" });
    let third = server.with(&ann, "PUT", "machines/rack-2/assignment", assign).await;
    assert_eq!(third.status, StatusCode::ACCEPTED, "one share for both: {}", third.text());
    assert_eq!(role(&server, 2).await.as_deref(), Some("lab"));
}

/// In service a machine keeps its release, whatever the newest one would let the role choose.
#[tokio::test]
async fn a_role_fits_the_release_that_a_machine_keeps() {
    let (site, server) = rack("[[role]]\nname = \"loose\"\nimage = \"minimal\"\nexec = \"report\"").await;
    site.publish_as(2, |manifest| manifest.role_may_report = Some(true));
    let body = json!({ "role": "loose" });
    let approve =
        async |n: u8| server.order("POST", &format!("machines/{}/approve", machine_id(n)), body.clone()).await;
    let refused = approve(1).await;
    assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", refused.text());
    assert!(refused.text().contains("minimal/1 lets no role say so"), "{}", refused.text());
    assert_eq!(role(&server, 1).await.as_deref(), Some("lab"));
    server.assign("rack-1", 2).await;
    // A new one gets the newest.
    for n in [1, 9] {
        let approved = approve(n).await;
        assert_eq!(approved.status, StatusCode::OK, "{}", approved.text());
        assert_eq!(role(&server, n).await.as_deref(), Some("loose"));
    }
}

/// A body that the call itself would take.
fn body_of(action: &str) -> Value {
    match action {
        "approve" => json!({ "role": "db", "name": "mine" }),
        "excuse" => json!({ "reason": "disk ordered" }),
        "assign" => json!({ "image": "minimal", "release": 1, "via": "cold" }),
        "replace" => json!({ "with": machine_id(9) }),
        _ => json!({}),
    }
}

/// In service, retired, and one that nobody approved: who may not say what machines run changes nothing of what a machine is and runs,
/// by no call about it. But a technician places the new one.
#[tokio::test]
async fn no_call_of_a_lower_access_role_changes_what_a_machine_is_or_runs() {
    let (_site, server) = rack("").await;
    server.order("POST", "machines/rack-2/retire", json!({})).await;
    let mut tried = 0;
    for role in [AccessRole::Viewer, AccessRole::Technician] {
        let token = server.token(&format!("t-{role}"), role.as_str()).await;
        for call in CALLS.iter().filter(|call| call.changes() && call.path.contains("/machines/{machine}/")) {
            for (n, state) in [(1, "healthy"), (2, "retired"), (9, "discovered")] {
                if (role, call.action, n) == (AccessRole::Technician, "approve", 9) {
                    continue;
                }
                let id = machine_id(n).to_string();
                let before = server.machine(&id).await;
                assert_eq!(before.state, state, "{}", before.reason);
                let path = call.path.strip_prefix("/api/v1/").unwrap().replace("{machine}", &id);
                let answer = server.with(&token, call.method, &path, body_of(call.action)).await;
                // Also where the table would let it in.
                let may = role >= call.least && call.action != "approve";
                assert_eq!(answer.status != StatusCode::FORBIDDEN, may, "{role} {path}: {}", answer.text());
                let after = server.machine(&id).await;
                let runs = |view: &MachineView| view.assigned.as_ref().map(|a| (a.release, a.sequence));
                assert_eq!(runs(&after), runs(&before), "{role} {path}");
                assert_eq!(
                    (after.name, after.role, after.state, after.key),
                    (before.name, before.role, before.state, before.key),
                    "{role} {path}"
                );
                tried += 1;
            }
        }
    }
    assert!(tried > 2 * 3 * 7, "{tried}");
}
