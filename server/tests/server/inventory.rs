//! What machines are made of, from the agent API to the operator's: kept over a kill, compared, and only the machine's
//! own key may say it.

use crate::common::*;
use hyper::StatusCode;
use kiln_protocol::*;
use kiln_server::view::HardwareView;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use tokio::net::TcpStream;

pub async fn post(server: &Server, agent: &Agent, inventory: Inventory) -> Answer {
    let report = InventoryReport { machine: machine_id(agent.n), boot_id: format!("boot-{}", agent.boot), inventory };
    let stream = TcpStream::connect(server.agent).await.unwrap();
    let name = ServerName::try_from(kiln_release::AGENT_API_NAME).unwrap();
    let tls = tokio_rustls::TlsConnector::from(Arc::new(server.tls(Some(agent.identity()))));
    let stream = tls.connect(name, stream).await.unwrap();
    try_call(stream, "POST", INVENTORY_PATH, &[], serde_json::to_vec(&report).unwrap()).await.unwrap()
}

async fn hardware(server: &Server) -> HardwareView {
    let answer = server.http("GET", "/api/v1/machines/rack-1/inventory", &[]).await;
    serde_json::from_value(answer.json()).unwrap()
}

fn with(slots: &[(&str, u64)]) -> Inventory {
    let dimm = |(slot, bytes): &(&str, u64)| Dimm { slot: (*slot).into(), bytes: *bytes, ..Dimm::default() };
    Inventory { dimms: slots.iter().map(dimm).collect(), ..Inventory::default() }
}

#[tokio::test]
async fn an_inventory_is_kept_compared_and_shown() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    assert_eq!(post(&server, &agent, with(&[])).await.status, StatusCode::CONFLICT, "its report comes first");
    let report = agent.healthy();
    agent.send(&server, &report).await;
    assert_eq!(server.http("GET", "/api/v1/machines/rack-1/inventory", &[]).await.status, StatusCode::NOT_FOUND);

    let gib = 1 << 30;
    let answer = post(&server, &agent, with(&[("A1", gib), ("A2", gib)])).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let other = Agent { signer: Arc::new(kiln_release::Signer::from_seed(&[77; 32])), ..agent.clone() };
    assert_eq!(post(&server, &other, with(&[])).await.status, StatusCode::FORBIDDEN, "another key");
    server.signal("-KILL");
    drop(server);

    let server = Server::start(&site).await;
    assert_eq!(hardware(&server).await.inventory, with(&[("A1", gib), ("A2", gib)]).tame());
    assert_eq!(post(&server, &agent, with(&[("A1", gib), ("A2", 0)])).await.status, StatusCode::OK);
    let view = hardware(&server).await;
    let said: Vec<(bool, &str)> = view.events.iter().map(|e| (e.warn, e.text.as_str())).collect();
    assert_eq!(
        said,
        [
            (false, "first inventory: 0 CPUs, 2 GiB in 2 modules, 0 disks, 0 network cards"),
            (true, "DIMM A2 gone (1 GiB)")
        ]
    );
    assert_eq!(server.machine("rack-1").await.last_words, "DIMM A2 gone (1 GiB)");
}
