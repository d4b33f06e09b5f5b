//! Network configurations that are tried and left, and links that lead nowhere any more.

use super::*;
use crate::testing::director::Director;
use crate::testing::namespace::enter;
use crate::testing::{TestSite, flow, listen, web};
use crate::verifier::Answer;
use kiln_protocol::{StageState, Via};
use kiln_release::network::NetworkConfig;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use tokio::time::timeout;

/// By which this machine's one card has `address`, and the server is at `host` of it.
fn config(version: u64, address: &str, host: &str, (http, agent): (u16, u16)) -> NetworkConfig {
    let section: Value = json!({ "link": [
        { "name": "up", "kind": "card", "card": ["any"], "address": [address] } ],
        "http_urls": [format!("http://{host}:{http}")], "agent_urls": [format!("https://{host}:{agent}")] });
    let mut config = NetworkConfig { version, section: vec![serde_json::from_value(section).unwrap()] };
    if version > 1 {
        config.section[0].role = vec!["lab".into()];
    }
    config.check().unwrap();
    config
}

/// What a boot came to: what is known, the addresses that are used, and which failures the server heard of.
struct Boot {
    known: Known,
    addresses: Vec<String>,
    told: Vec<String>,
}

/// A boot up to the network that its metadata says. The boot image knows one of its own, by which the server is
/// reached too.
fn boot(state: &Path, signed: (u64, &str, &str)) -> Boot {
    let (http, agent) = (listen(), listen());
    let ports = (http.1.port(), agent.1.port());
    let (version, address, host) = signed;
    let site = TestSite::with_network(1, config(version, address, host, ports));
    let director = Director::start_on(agent, &site, (1, 1, Via::Cold, false));
    let (_url, _hear) = web::honest_on(http, site.files.clone(), BTreeMap::new());
    let mut verifier = site.verifier(1, &[], &[], state);
    verifier.boot.site.network = Some(config(1, "10.9.0.6/24", "10.9.0.6", ports));
    let mut flow = flow(verifier, None, Duration::from_secs(9));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut network = Network::start(&mut flow);
        network.trial = Duration::from_secs(15);
        network.connect(&mut flow, &mut None).await.unwrap();
        let here = flow.verifier.here().unwrap();
        let verified = flow.verifier.verify_metadata(&here).await.unwrap();
        let Answer::Assigned { assignment, .. } = flow.ask(&verified, 0).await.unwrap() else { panic!("it waits") };
        network.adopt(&mut flow, &mut None, &verified, &assignment.role).await.unwrap();
        let uplink = network.uplink().unwrap();
        let heard = director.heard();
        let failures = heard.iter().flat_map(|report| &report.stages).filter_map(|stage| match &stage.state {
            StageState::Failed(f) if f.kind == "network-config-reverted" => Some(f.message.clone()),
            StageState::Failed(_) | StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
        });
        let addresses = uplink.addresses.iter().map(ToString::to_string).collect();
        Boot { known: network.known, addresses, told: failures.collect() }
    })
}

#[test]
fn an_address_whose_lease_is_over_is_left_though_the_server_is_reached_by_it() {
    let site = TestSite::new(1);
    let director = Director::start(&site, (1, 1, Via::Cold, false));
    let dir = tempfile::tempdir().unwrap();
    let verifier = site.verifier(1, &[], std::slice::from_ref(&director.url), &dir.path().join("state"));
    let (servers, ca) = (&verifier.servers.agent, &verifier.boot.site.agent_api_ca_pem);
    let mut api = Api::new(servers, ca, &verifier.key, &verifier.clock).unwrap();
    let look = Duration::from_millis(10);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        api.reaches().await.unwrap();
        let begun = Instant::now();
        let mut renewals = JoinSet::new();
        // Another address was given.
        renewals.spawn(async {});
        let left = lost("none", &mut renewals, &mut api, look);
        timeout_at(begun + Duration::from_secs(20), left).await.expect("it is left");
        assert!(begun.elapsed() >= look * LOOKS, "not at the first look");
    });
}

/// The only card of a machine is pulled out, and put back.
#[test]
fn a_card_that_is_put_back_under_its_name_is_looked_at_anew() {
    if !enter("uplink::tests::a_card_that_is_put_back_under_its_name_is_looked_at_anew", "-rnm") {
        return;
    }
    let sh = |script: &str| assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success(), "{script}");
    let put = "ip link add a0 type veth peer name b0; ip link set a0 up; ip link set b0 up";
    sh(&format!("mount -t tmpfs tmpfs /run; ip link set lo up; {put}"));
    let (site, dir) = (TestSite::new(1), tempfile::tempdir().unwrap());
    let verifier = site.verifier(1, &[], &["https://127.0.0.1:9".to_owned()], &dir.path().join("state"));
    let (servers, ca) = (&verifier.servers.agent, &verifier.boot.site.agent_api_ca_pem);
    let mut api = Api::new(servers, ca, &verifier.key, &verifier.clock).unwrap();
    let look = Duration::from_millis(10);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut renewals = JoinSet::new();
        let mut left = std::pin::pin!(lost("a0", &mut renewals, &mut api, look));
        assert!(timeout(3 * LOOKS * look, &mut left).await.is_err(), "a server that is gone is waited for");
        sh("ip link del a0");
        assert!(timeout(3 * LOOKS * look, &mut left).await.is_err(), "and so is a card, where there is no other");
        sh(put);
        timeout(Duration::from_secs(20), left).await.expect("nothing of what it had is on it any more");
    });
}

/// Machine and server are in one namespace: the server is at an address that the machine's card has only under the
/// configuration that gives it. IPv4, then IPv6, then a mistake.
#[test]
fn a_configuration_that_loses_the_server_is_left_and_told_and_not_tried_again() {
    let test = "uplink::tests::a_configuration_that_loses_the_server_is_left_and_told_and_not_tried_again";
    if !enter(test, "-rnm") {
        return;
    }
    let script = "mount -t tmpfs tmpfs /run; ip netns add net; ip link set lo up
        ip link add a0 type veth peer name b0; ip link set b0 netns net; ip -n net link set b0 up";
    assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success());
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let versions =
        |known: &Known| (known.worked.as_ref().map(|w| w.version), known.refused.as_ref().map(|r| r.version));
    let one = boot(&state, (2, "10.9.0.7/24", "10.9.0.7"));
    assert_eq!((one.addresses, versions(&one.known)), (vec!["10.9.0.7".to_owned()], (Some(2), None)));
    // Artifacts and the agent API at IPv6 literals, and no IPv4 at all.
    let two = boot(&state, (3, "2001:db8::7/64", "[2001:db8::7]"));
    assert_eq!((two.addresses, versions(&two.known)), (vec!["2001:db8::7".to_owned()], (Some(3), None)));
    assert!(one.told.is_empty() && two.told.is_empty());
    // The server is not where this one says.
    let wrong = boot(&state, (4, "10.9.0.7/24", "10.9.0.98"));
    assert_eq!(versions(&wrong.known), (Some(3), Some(4)), "{:?}", wrong.told);
    assert!(wrong.told[0].contains("network configuration 4 was left"), "{:?}", wrong.told);
    assert!(wrong.addresses != ["10.9.0.7"]);
    // The next boot does not try it again, and says so; a newer one is tried.
    let again = boot(&state, (4, "10.9.0.7/24", "10.9.0.98"));
    assert_eq!((&again.known, again.told.len()), (&wrong.known, 1));
    let better = boot(&state, (5, "10.9.0.8/24", "10.9.0.8"));
    assert_eq!((better.addresses, versions(&better.known)), (vec!["10.9.0.8".to_owned()], (Some(5), None)));
}
