//! A firmware that says nothing more, before a real `kiln serve` on a real (virtual) cable: a DISCOVER that no download
//! follows, and a TFTP client that goes silent in the middle.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/network.rs"]
mod network;

use common::{Server, TestSite};
use jiff::Timestamp;
use kiln_protocol::Stage;
use kiln_release::{Artifact, hex};
use kiln_server::view::{BootView, MachineView};
use network::{CABLE, PATIENCE, SERVER, firmware, inside, packet, sh};
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

const DISCOVER: &str = include_str!("../netboot/tests/packets/ovmf-pxe-discover.hex");
const REQUEST: &str = include_str!("../netboot/tests/packets/ovmf-pxe-request.hex");
/// The address that the captured REQUEST asks for.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 101);
/// Bytes of a boot program that no socket's buffers hold.
const LARGE: usize = 24 << 20;
/// Longer than the patience, which is longer than a loaded host stops for: each of its pieces is a move.
const SLOW_FOR: Duration = Duration::from_secs(14);

fn id(n: u8) -> String {
    format!("01234567-89ab-cdef-0123-456789abcd{n:02x}")
}

/// A captured packet as that of machine `n`.
fn of(n: u8, text: &str) -> Vec<u8> {
    let mut bytes = packet(text);
    bytes[33] = n;
    let uuid = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd];
    let last = bytes.windows(uuid.len()).rposition(|w| w == uuid).unwrap() + uuid.len();
    bytes[last] = n;
    if let Some(at) = bytes.windows(4).position(|w| w == CLIENT.octets()) {
        bytes[at + 3] = 100 + n;
    }
    bytes
}

/// A release with a boot program of 24 MiB.
fn publish_large(site: &TestSite, release: u64) -> String {
    let mut manifest = common::build(&site.site, release);
    let folder = site.site.build("minimal", release);
    let uki = vec![7; LARGE];
    manifest.uki = Artifact { sha256: hex::sha256(&uki), length: uki.len() as u64 };
    std::fs::write(folder.join("kiln.efi"), uki).unwrap();
    std::fs::write(folder.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
    kiln_images::publish(site.path(), "minimal", release, Timestamp::now()).unwrap();
    manifest.uki.sha256
}

/// Downloads by HTTP as machine 3, slowly: longer than the patience.
async fn slow_download(server: SocketAddr, sha256: &str) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    socket.bind("10.77.0.103:0".parse().unwrap()).unwrap();
    let mut stream = socket.connect(SocketAddr::new(SERVER.into(), server.port())).await.unwrap();
    let request = format!("GET /b/{sha256}/kiln.efi HTTP/1.0\r\nHost: kiln\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut pace = tokio::time::interval(SLOW_FOR / 16);
    let (mut piece, mut got) = (vec![0; LARGE / 16], 0);
    loop {
        pace.tick().await;
        let mut filled = 0;
        while filled < piece.len() {
            match stream.read(&mut piece[filled..]).await.unwrap() {
                0 => {
                    assert!(got + filled > LARGE, "{} bytes", got + filled);
                    return;
                }
                n => filled += n,
            }
        }
        got += filled;
    }
}

/// The machine as soon as it is so, from the stream of events.
async fn once(server: &Server, n: u8, what: &str, so: impl Fn(&MachineView) -> bool) -> MachineView {
    let watching = async {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        stream.write_all(b"GET /api/v1/events HTTP/1.0\r\nHost: kiln\r\n\r\n").await.unwrap();
        let mut lines = BufReader::new(stream).lines();
        loop {
            let line = lines.next_line().await.unwrap().expect("the stream goes on");
            let Some(data) = line.strip_prefix("data:") else { continue };
            let all = serde_json::from_str::<Vec<MachineView>>(data);
            let views = all.or_else(|_| serde_json::from_str::<MachineView>(data).map(|view| vec![view])).unwrap();
            if let Some(view) = views.into_iter().find(|view| view.id.as_str() == id(n) && so(view)) {
                return view;
            }
        }
    };
    match timeout(PATIENCE, watching).await {
        Ok(view) => view,
        Err(tokio::time::error::Elapsed { .. }) => panic!("{what} did not come; {:#?}", server.machine(&id(n)).await),
    }
}

fn stages(view: &MachineView) -> Vec<(Stage, &str)> {
    let last: &BootView = view.boots.last().unwrap();
    last.stages.iter().map(|s| (s.stage, s.kind.as_deref().unwrap_or(&s.state))).collect()
}

async fn approve(server: &Server, n: u8) {
    let path = format!("machines/{}/approve", id(n));
    let answer = server.order("POST", &path, json!({ "role": "lab", "name": format!("machine-{n}") })).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 1500];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (buffer[..length].to_vec(), from)
}

/// The packet that follows this one, which may have been sent again meanwhile.
fn after(before: &[u8], socket: &UdpSocket) -> Vec<u8> {
    loop {
        let (packet, _) = receive(socket);
        if packet != before {
            return packet;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_firmware_is_shown_with_its_stage_and_a_typed_reason() {
    if !inside("a_silent_firmware_is_shown_with_its_stage_and_a_typed_reason") {
        return;
    }
    sh(CABLE);
    sh("ip addr add 10.77.0.101/24 dev k1; ip addr add 10.77.0.103/24 dev k1");
    let site = TestSite::new();
    let config = "[http]\nlisten = \"0.0.0.0:0\"\n[agent_api]\nlisten = \"127.0.0.1:0\"\n[dhcp]\ninterface = \"k0\"\n\
                  [fleet]\nfirmware_patience = \"10s\"\n[[role]]\nname = \"lab\"\nimage = \"minimal\"\n";
    std::fs::write(site.path().join("kiln.toml"), config).unwrap();
    let large = publish_large(&site, 2);
    let server = Server::start(&site).await;
    let log = || std::fs::read_to_string(site.path().join("log")).unwrap();
    common::until(&server, |status| status["listening"].to_string().contains("TFTP")).await;

    // All ask; the first goes on as far as the second block, the third downloads by HTTP, and is only slow.
    let uki = site.manifest(1).uki.sha256;
    let asking = tokio::task::spawn_blocking(move || {
        let port = firmware();
        for n in 1..=3 {
            port.send_to(&of(n, DISCOVER), "255.255.255.255:67").unwrap();
            assert_eq!(receive(&port).0[33], n, "an answer to this machine");
        }
        for n in [1, 3] {
            port.send_to(&of(n, REQUEST), "255.255.255.255:67").unwrap();
        }
    });
    asking.await.unwrap();
    for n in 1..=3 {
        once(&server, n, "the machine", |_| true).await;
        approve(&server, n).await;
    }
    let client = UdpSocket::bind(SocketAddrV4::new(CLIENT, 0)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = [b"\0\x01b/", uki.as_bytes(), b"/kiln.efi\0octet\0blksize\x008\0"].concat();
    let downloading = tokio::task::spawn_blocking(move || {
        client.send_to(&request, "10.77.0.1:69").unwrap();
        let (oack, server) = receive(&client);
        assert_eq!(oack[..2], [0, 6], "{oack:?}");
        client.send_to(&[0, 4, 0, 0], server).unwrap();
        let first = after(&oack, &client);
        assert_eq!(first, b"\0\x03\0\x01uki of m");
        client.send_to(&[0, 4, 0, 1], server).unwrap();
        assert_eq!(after(&first, &client), b"\0\x03\0\x02inimal/1");
        (client, server)
    });
    let (client, tftp) = downloading.await.unwrap();

    let http = server.http;
    let slow = tokio::spawn(async move { slow_download(http, &large).await });

    let stalled = |view: &MachineView| stages(view).last() == Some(&(Stage::Program, "download-stalled"));
    let view = once(&server, 1, "a stalled download", stalled).await;
    assert_eq!(stages(&view)[..2], [(Stage::Dhcp, "done"), (Stage::Program, "started")]);
    assert_eq!((view.state.as_str(), view.stage_label.as_str()), ("booting", "Downloads its boot program"));
    assert!(view.reason.contains("no more of its boot program has been taken for 10 s"), "{}", view.reason);
    assert_eq!(view.last_words, view.reason);
    let silent = |view: &MachineView| stages(view).last() == Some(&(Stage::Program, "no-download"));
    let view = once(&server, 2, "a missing download", silent).await;
    assert_eq!(stages(&view).len(), 2);
    assert_eq!(view.state, "booting");
    assert!(view.reason.contains("do UDP 69 (TFTP) and TCP 8080 (HTTP) of this server reach it"), "{}", view.reason);

    let kiln = env!("CARGO_BIN_EXE_kiln");
    let shown = Command::new(kiln).args(["machine", "show", "machine-1", "--site"]).arg(site.path()).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("failed [download-stalled] no more of its boot program"), "{shown}");

    // It goes on after all: block 2 was resent meanwhile, and the empty third one ends the file.
    let ending = tokio::task::spawn_blocking(move || {
        client.send_to(&[0, 4, 0, 2], tftp).unwrap();
        while receive(&client).0 != b"\0\x03\0\x03" {}
        client.send_to(&[0, 4, 0, 3], tftp).unwrap();
    });
    ending.await.unwrap();
    let view = once(&server, 1, "the whole program", |view| stages(view).last().unwrap().1 == "done").await;
    assert_eq!(stages(&view), [(Stage::Dhcp, "done"), (Stage::Program, "started"), (Stage::Program, "done")]);
    assert!(view.state == "booting" && !view.reason.contains("no more of"), "{}", view.reason);
    slow.await.unwrap();
    let view = once(&server, 3, "the slow one's program", |view| stages(view).last().unwrap().1 == "done").await;
    assert_eq!(stages(&view).len(), 3);
    for said in ["no more of its boot program", "has not begun to download"] {
        assert_eq!(log().matches(said).count(), 1, "{said}: once in {}", log());
    }
}
