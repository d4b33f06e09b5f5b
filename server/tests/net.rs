//! The boot protocols on real sockets, in a user and network namespace of their own: TFTP against the clients Debian
//! ships, DHCP over a pair of virtual Ethernet ports with packets captured from OVMF.
#![allow(clippy::unwrap_used)]

#[path = "common/network.rs"]
mod network;
#[path = "../../images/tests/oracle/mod.rs"]
mod oracle;

use kiln_netboot::tftp::BootFile;
use kiln_netboot::{BootAnswer, Config, Event, Mode, UefiProgram};
use kiln_protocol::Sha256Hex;
use kiln_server::net::{BootFiles, BootNet, Decide, NetEvent, Stamp, dhcp, tftp};
use network::{CABLE, PATIENCE, SERVER, firmware, inside, packet, sh};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::timeout;

fn present(program: &str) -> bool {
    let found = ["/usr/bin", "/usr/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(program).exists());
    if !found {
        oracle::skipped(&format!("{program} is not installed"));
    }
    found
}

/// Files made up in memory; counts the reads.
struct Made {
    reads: AtomicUsize,
}

impl Made {
    const SIZE: usize = 3_000_001;

    fn bytes(file: &BootFile) -> Vec<u8> {
        match file {
            BootFile::Uki(_) => (0..Self::SIZE).map(|i| u8::try_from((i ^ (i >> 9)) & 0xff).unwrap()).collect(),
            BootFile::Undionly => vec![7; 1024], // a whole number of blocks: the last one is empty
            BootFile::Snponly | BootFile::Shim | BootFile::AfterShim | BootFile::Autoexec => Vec::new(),
        }
    }
}

impl BootFiles for Made {
    fn stamp(&self, file: &BootFile) -> io::Result<Stamp> {
        match file {
            BootFile::Snponly | BootFile::Shim | BootFile::AfterShim | BootFile::Autoexec => {
                Err(io::ErrorKind::NotFound.into())
            }
            BootFile::Uki(_) => Ok(Stamp { length: Self::SIZE as u64, modified: SystemTime::UNIX_EPOCH }),
            BootFile::Undionly => Ok(Stamp { length: 1024, modified: SystemTime::UNIX_EPOCH }),
        }
    }

    fn read(&self, file: &BootFile) -> io::Result<Vec<u8>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        Ok(Self::bytes(file))
    }
}

fn sha() -> Sha256Hex {
    "ab".repeat(32).parse().unwrap()
}

fn boot_net() -> BootNet {
    let config = Config {
        mode: Mode::Proxy,
        address: None,
        http_port: 8080,
        agent_port: 8443,
        http_boot: true,
        chain_ipxe: true,
        uefi: UefiProgram::Uki,
    };
    BootNet::new(config, []).unwrap()
}

async fn event(events: &mut mpsc::Receiver<NetEvent>, mut wanted: impl FnMut(&NetEvent) -> bool) -> NetEvent {
    let mut seen = Vec::new();
    let search = async {
        loop {
            let event = events.recv().await.expect("the loop runs");
            if wanted(&event) {
                return event;
            }
            seen.push(event);
        }
    };
    let found = timeout(PATIENCE, search).await.ok();
    found.unwrap_or_else(|| panic!("the event did not come; seen: {seen:#?}"))
}

async fn serve_tftp(settings: tftp::Settings) -> (Arc<Made>, mpsc::Receiver<NetEvent>) {
    let (sender, mut events) = mpsc::channel(1000);
    let files = Arc::new(Made { reads: AtomicUsize::new(0) });
    tokio::spawn(tftp::run(boot_net(), settings, files.clone(), sender));
    event(&mut events, |e| matches!(e, NetEvent::Listening { what: "TFTP", .. })).await;
    (files, events)
}

/// Runs a client in a directory of its own; what it wrote to `out`.
async fn fetch(command: &str) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let (at, command) = (dir.path().to_owned(), command.to_owned());
    let client = move || {
        let mut run = Command::new("timeout");
        run.args(["20", "sh", "-c", &command]).current_dir(at).stdin(Stdio::null()).output().unwrap()
    };
    let ran = tokio::task::spawn_blocking(client).await.unwrap();
    println!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    std::fs::read(dir.path().join("out")).ok().filter(|bytes| !bytes.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn tftp_clients_get_exactly_the_bytes() {
    if !inside("tftp_clients_get_exactly_the_bytes") {
        return;
    }
    sh("ip link set lo up");
    let (files, mut events) = serve_tftp(tftp::Settings::default()).await;
    let (uki, undionly) = (BootFile::Uki(sha()), BootFile::Undionly);
    let path = uki.path();
    let clients = [
        ("curl", format!("curl -sS --tftp-no-options -o out tftp://127.0.0.1/{path}"), &uki),
        ("curl", format!("curl -sS --tftp-blksize 1428 -o out tftp://127.0.0.1/{path}"), &uki),
        ("curl", "curl -sS -o out tftp://127.0.0.1/undionly.kpxe".into(), &undionly),
        ("tftp", format!("tftp -m binary 127.0.0.1 -c get {path} out"), &uki),
        ("atftp", format!("atftp --option 'blksize 1428' --option 'windowsize 8' -g -r {path} -l out 127.0.0.1"), &uki),
        (
            "atftp",
            "atftp --option 'tsize 0' --option 'timeout 2' -g -r undionly.kpxe -l out 127.0.0.1".into(),
            &undionly,
        ),
    ];
    let mut tried = 0;
    for (program, command, file) in clients {
        if !present(program) {
            continue;
        }
        tried += 1;
        let expected = Made::bytes(file);
        let got = fetch(&command).await;
        assert!(got.as_ref() == Some(&expected), "{command}: {:?} bytes", got.map(|g| g.len()));
        let done = event(&mut events, |e| matches!(e, NetEvent::TftpDone { .. })).await;
        let NetEvent::TftpDone { download, bytes, .. } = done else { panic!() };
        assert_eq!((&download.file, bytes), (file, expected.len() as u64), "{command}");
    }
    assert!(tried == 0 || files.reads.load(Ordering::Relaxed) <= 2, "each file is read once");
    if present("curl") {
        let refused = |e: &NetEvent| matches!(e, NetEvent::TftpRefused { name, .. } if name.ends_with("etc/passwd"));
        assert_eq!(fetch("curl -sS --path-as-is -o out tftp://127.0.0.1/../../etc/passwd").await, None);
        event(&mut events, refused).await;
        assert_eq!(fetch("curl -sS -o out tftp://127.0.0.1/snponly.efi").await, None, "a known name, not there");
        event(&mut events, |e| matches!(e, NetEvent::TftpRefused { name, .. } if name == "snponly.efi")).await;
        for asked in ["shimx64.efi", "grubx64.efi", "autoexec.ipxe"] {
            assert_eq!(fetch(&format!("curl -sS -o out tftp://127.0.0.1/{asked}")).await, None, "the site gives UKIs");
            event(&mut events, |e| matches!(e, NetEvent::TftpRefused { name, .. } if name == asked)).await;
        }
        let listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 6969);
        let shim = tftp::Settings { listen, uefi: UefiProgram::Shim, ..tftp::Settings::default() };
        let (_files, _events) = serve_tftp(shim).await;
        let script = fetch("curl -sS -o out tftp://127.0.0.1:6969/autoexec.ipxe").await.unwrap();
        let asks = "chain http://127.0.0.1:8080/boot.ipxe?";
        assert!(String::from_utf8_lossy(&script).contains(asks), "made for the address that it is asked at");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tftp_bounds_downloads_and_tells_strangers() {
    if !inside("tftp_bounds_downloads_and_tells_strangers") {
        return;
    }
    sh("ip link set lo up");
    let (_, mut events) = serve_tftp(tftp::Settings { max_per_address: 1, ..tftp::Settings::default() }).await;
    let work = tokio::task::spawn_blocking(|| {
        let socket = || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        let (client, second) = (socket(), socket());
        let mut buffer = [0; 600];
        let request = b"\0\x01undionly.kpxe\0octet\0";
        client.send_to(request, "127.0.0.1:69").unwrap();
        let (length, port) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((length, &buffer[..4]), (516, &[0, 3, 0, 1][..]));
        // The same address has its one download.
        second.send_to(request, "127.0.0.1:69").unwrap();
        let (_, from) = second.recv_from(&mut buffer).unwrap();
        assert_eq!((from.port(), &buffer[..4]), (69, &[0, 5, 0, 0][..]));
        assert!(buffer[4..].starts_with(b"server is busy"));
        // Somebody else's ACK to the first download's port.
        second.send_to(&[0, 4, 0, 1], port).unwrap();
        second.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..4], &[0, 5, 0, 5]);
        // Which goes on: block 2, and 3, the empty one.
        for (number, expected) in [(1, 516), (2, 4)] {
            client.send_to(&[0, 4, 0, number], port).unwrap();
            let mut length = client.recv_from(&mut buffer).unwrap().0;
            // The block before may have been sent again meanwhile.
            while buffer[3] == number {
                length = client.recv_from(&mut buffer).unwrap().0;
            }
            assert_eq!((length, buffer[3]), (expected, number + 1));
        }
        client.send_to(&[0, 4, 0, 3], port).unwrap();
    });
    work.await.unwrap();
    let done = event(&mut events, |e| matches!(e, NetEvent::TftpDone { .. })).await;
    assert!(matches!(done, NetEvent::TftpDone { bytes: 1024, .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_greedy_address_does_not_keep_others_from_tftp() {
    if !inside("one_greedy_address_does_not_keep_others_from_tftp") {
        return;
    }
    sh("ip link set lo up");
    let limits = tftp::Settings::default().limits;
    // Longer than what follows takes, also where the host stops meanwhile.
    let stall = Duration::from_secs(8);
    let settings = tftp::Settings {
        max_transfers: 8,
        max_per_address: 4,
        limits: kiln_netboot::tftp::Limits { stall, ..limits },
        ..tftp::Settings::default()
    };
    let (_, mut events) = serve_tftp(settings).await;
    let socket = |address: &str| {
        let socket = UdpSocket::bind((address, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    let greedy: Vec<UdpSocket> = (0..20).map(|_| socket("127.0.0.2")).collect();
    let request = format!("\0\x01b/{}/kiln.efi\0octet\0timeout\x00255\0blksize\x001468\0", sha());
    let mut buffer = [0; 2000];
    let mut answers = Vec::new();
    for socket in &greedy {
        socket.send_to(request.as_bytes(), "127.0.0.1:69").unwrap();
        let (length, _) = socket.recv_from(&mut buffer).unwrap();
        assert!(!buffer[..length].windows(7).any(|w| w == b"timeout"), "a wait of 255 s is not granted");
        answers.push(buffer[1]);
    }
    let (oacks, errors) = (6, 5);
    assert_eq!(answers, [[oacks; 4].as_slice(), &[errors; 16]].concat(), "four transfers, and busy to all others");
    // Meanwhile another address has all of the file.
    let other = socket("127.0.0.3");
    let work = tokio::task::spawn_blocking(move || {
        let (mut buffer, mut whole, mut next) = ([0; 600], Vec::new(), 1);
        other.send_to(b"\0\x01undionly.kpxe\0octet\0", "127.0.0.1:69").unwrap();
        loop {
            let (length, port) = other.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[1], 3);
            other.send_to(&[0, 4, buffer[2], buffer[3]], port).unwrap();
            // One that was sent again is acknowledged again, and no more.
            if buffer[3] == next {
                whole.extend_from_slice(&buffer[4..length]);
                next += 1;
                if length < 516 {
                    return whole;
                }
            }
        }
    });
    assert_eq!(work.await.unwrap().len(), 1024);
    // And the greedy one's silence costs it its transfers: it is let in again when they are given up.
    for _ in 0..4 {
        let failed = event(&mut events, |e| matches!(e, NetEvent::TftpFailed { .. })).await;
        assert!(matches!(failed, NetEvent::TftpFailed { reason, .. } if reason.contains("stopped answering for 8 s")));
    }
    for socket in &greedy {
        socket.set_nonblocking(true).unwrap();
        while socket.recv_from(&mut buffer).is_ok() {}
        socket.set_nonblocking(false).unwrap();
    }
    greedy[19].send_to(request.as_bytes(), "127.0.0.1:69").unwrap();
    greedy[19].recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[1], oacks);
}

#[tokio::test(flavor = "multi_thread")]
async fn ovmf_is_answered_over_ethernet() {
    if !inside("ovmf_is_answered_over_ethernet") {
        return;
    }
    sh(CABLE);
    let (sender, mut events) = mpsc::channel(1000);
    let decide: Decide = Arc::new(|_| Box::pin(async { BootAnswer::Uki { sha256: sha() } }));
    let settings = dhcp::Settings { interface: Some("k0".into()) };
    tokio::spawn(dhcp::run(boot_net(), settings, decide, sender));
    event(&mut events, |e| matches!(e, NetEvent::Listening { what: "PXE boot server", .. })).await;
    let client = firmware();
    let work = tokio::task::spawn_blocking(move || {
        let mut buffer = [0; 1500];
        let discover = packet(include_str!("../netboot/tests/packets/ovmf-pxe-discover.hex"));
        client.send_to(&discover, "255.255.255.255:67").unwrap();
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(from, SocketAddrV4::new(SERVER, 67).into(), "from the interface's own address");
        assert!(length >= 300 && buffer[0] == 2 && buffer[4..8] == discover[4..8]);
        assert_eq!(buffer[20..24], SERVER.octets(), "siaddr");
        assert_eq!(buffer[108..183], *format!("b/{}/kiln.efi", sha()).as_bytes());
    });
    work.await.unwrap();
    event(&mut events, |e| matches!(e, NetEvent::Dhcp(Event::Offered { .. }))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_download_is_told_to_go_on() {
    if !inside("a_slow_download_is_told_to_go_on") {
        return;
    }
    sh("ip link set lo up");
    let (_, mut events) = serve_tftp(tftp::Settings::default()).await;
    let work = tokio::task::spawn_blocking(|| {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.send_to(b"\0\x01undionly.kpxe\0octet\0", "127.0.0.1:69").unwrap();
        let mut buffer = [0; 600];
        // Resent after 1 s, and after 2 s more: then it is acknowledged at last.
        for _ in 0..3 {
            let (_, port) = client.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..4], [0, 3, 0, 1]);
            client.connect(port).unwrap();
        }
        client.send(&[0, 4, 0, 1]).unwrap();
        client
    });
    event(&mut events, |e| matches!(e, NetEvent::TftpMoves { download } if download.file == BootFile::Undionly)).await;
    work.await.unwrap();
}

/// A socket that holds port 67 as another DHCP server on this host would.
fn other_server(shared: bool) -> UdpSocket {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.set_reuse_address(shared).unwrap();
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 67).into()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_runs_beside_a_dhcp_server_on_its_own_host() {
    if !inside("a_proxy_runs_beside_a_dhcp_server_on_its_own_host") {
        return;
    }
    sh(CABLE);
    let run = |sender| {
        let decide: Decide = Arc::new(|_| Box::pin(async { BootAnswer::Ignore }));
        tokio::spawn(dhcp::run(boot_net(), dhcp::Settings::default(), decide, sender))
    };
    let selfish = other_server(false);
    let (sender, _events) = mpsc::channel(1000);
    let refused = timeout(PATIENCE, run(sender)).await.unwrap().unwrap().unwrap_err();
    assert!(refused.to_string().contains("does not share it"), "{refused}");
    drop(selfish);

    let other = other_server(true);
    let (sender, mut events) = mpsc::channel(1000);
    run(sender);
    let listening = event(&mut events, |e| matches!(e, NetEvent::Listening { what: "proxyDHCP", .. })).await;
    assert!(matches!(listening, NetEvent::Listening { why, .. } if why.contains("broadcasts only")));
    let client = firmware();
    let work = tokio::task::spawn_blocking(move || {
        let mut buffer = [0; 1500];
        let discover = packet(include_str!("../netboot/tests/packets/ovmf-pxe-discover.hex"));
        client.send_to(&discover, "255.255.255.255:67").unwrap();
        other.recv_from(&mut buffer).unwrap();
        // A renewal goes to the other server alone.
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"renewal", "127.0.0.1:67").unwrap();
        // (The broadcast comes twice: the sender's own kernel hands it a copy as well.)
        while !other.recv_from(&mut buffer).is_ok_and(|(length, _)| buffer[..length] == *b"renewal") {
            assert_eq!(buffer[..240], discover[..240], "the renewal did not come");
            buffer[0] = 0;
        }
    });
    event(&mut events, |e| matches!(e, NetEvent::Dhcp(Event::Discover { .. }))).await;
    work.await.unwrap();
}
