//! The TFTP loop: one socket for requests, and one per download, bound to the address the request came to.
//!
//! The download sockets are not connected: RFC 1350 wants a stranger told, which a connected socket cannot do.

use super::files::{BootFiles, Cache};
use super::packet_socket::PacketSocket;
use super::{BootNet, Download, NetError, NetEvent, PROGRESS, Shared as SharedAddresses, tell, unix_ms};
use bytes::Bytes;
use kiln_netboot::tftp::{Action, BootFile, Ending, Limits, Request, Transfer, error_packet};
use kiln_netboot::{TftpError, UefiProgram, ipxe};
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendmsg};
use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant as TokioInstant, timeout_at};

/// What the loop may use.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where requests come in.
    pub listen: SocketAddrV4,
    /// Of each download.
    pub limits: Limits,
    /// Downloads at once; the next client is told that the server is busy.
    pub max_transfers: usize,
    /// Downloads at once of one address: firmware makes one, a chain perhaps two.
    pub max_per_address: usize,
    /// Addresses that the limit for one does not bind.
    pub shared: SharedAddresses,
    /// Bytes of files held in memory.
    pub cache_bytes: u64,
    /// This server's address in the script for iPXE; none: the one a request came in on.
    pub address: Option<Ipv4Addr>,
    /// Port of the artifacts' HTTP.
    pub http_port: u16,
    /// What UEFI firmware is given: what else there is for it is no file of this server.
    pub uefi: UefiProgram,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 69),
            limits: Limits::default(),
            max_transfers: 4096,
            max_per_address: 64,
            shared: SharedAddresses::default(),
            cache_bytes: 512 << 20,
            address: None,
            http_port: 8080,
            uefi: UefiProgram::default(),
        }
    }
}

struct Shared {
    net: BootNet,
    cache: Cache,
    limits: Limits,
    address: Option<Ipv4Addr>,
    http_port: u16,
    events: mpsc::Sender<NetEvent>,
    /// Clients with a download: a repeated request of one is dropped (its answer is on the way).
    active: Mutex<BTreeSet<SocketAddrV4>>,
}

/// Serves TFTP for ever.
pub async fn run(
    net: BootNet,
    settings: Settings,
    files: Arc<dyn BootFiles>,
    events: mpsc::Sender<NetEvent>,
) -> Result<(), NetError> {
    let advice = ": another TFTP server runs on this host. Stop it, or set [tftp] listen";
    let socket = PacketSocket::open(settings.listen, false, advice)?;
    let why = "boot programs of PXE firmware".into();
    tell(&events, NetEvent::Listening { what: "TFTP", address: socket.address, why });
    let shared = Arc::new(Shared {
        net,
        cache: Cache::new(files, settings.cache_bytes),
        limits: settings.limits,
        address: settings.address,
        http_port: settings.http_port,
        events,
        active: Mutex::new(BTreeSet::new()),
    });
    let mut downloads = JoinSet::new();
    let mut buffer = vec![0; 1024];
    loop {
        let received = tokio::select! {
            received = socket.receive(&mut buffer) => received?,
            Some(_) = downloads.join_next() => continue,
        };
        let (peer, bytes) = (received.from, &buffer[..received.length]);
        let refuse = match shared.admit(&settings, peer, bytes) {
            Ok(None) => continue,
            Ok(Some((request, file))) => {
                downloads.spawn(Arc::clone(&shared).serve(received.local, peer, request, file));
                continue;
            }
            Err(error) => error,
        };
        shared.refused(peer, bytes, &refuse);
        if !matches!(refuse, TftpError::NotARequest { .. }) {
            // A stray DATA, ACK or ERROR is not answered here: two servers could go on at it for ever.
            let _ = socket.send(&error_packet(&refuse), peer, received.interface, received.local).await;
        }
    }
}

impl Shared {
    /// The request and its file; none for a repeated request.
    fn admit(
        &self,
        settings: &Settings,
        peer: SocketAddrV4,
        bytes: &[u8],
    ) -> Result<Option<(Request, BootFile)>, TftpError> {
        let request = Request::parse(bytes)?;
        let file = BootFile::parse(&request.name)?;
        if !settings.uefi.serves(&file) {
            return Err(TftpError::NoSuchFile);
        }
        let mut active = self.active.lock().expect("no code that holds this lock panics");
        if active.contains(&peer) {
            return Ok(None);
        }
        let port = |port| SocketAddrV4::new(*peer.ip(), port);
        let same_address = active.range(port(0)..=port(u16::MAX)).count();
        let alone = !settings.shared.contains((*peer.ip()).into());
        if active.len() >= settings.max_transfers || (alone && same_address >= settings.max_per_address) {
            return Err(TftpError::Busy);
        }
        active.insert(peer);
        Ok(Some((request, file)))
    }

    fn refused(&self, peer: SocketAddrV4, bytes: &[u8], reason: &TftpError) {
        let name = bytes.get(2..).unwrap_or_default().split(|b| *b == 0).next().unwrap_or_default();
        let name = name.iter().take(120).map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '?' }).collect();
        tell(&self.events, NetEvent::TftpRefused { peer: peer.into(), name, reason: reason.to_string() });
    }

    async fn serve(self: Arc<Self>, local: Ipv4Addr, peer: SocketAddrV4, request: Request, file: BootFile) {
        let _active = Active { shared: &self, peer };
        let machine = self.net.machine_at(*peer.ip());
        let (mac, id) = machine.map_or((None, None), |(mac, id)| (Some(mac), id));
        let download = Download { peer: peer.into(), mac, id, file };
        if let Err(error) = self.transfer(local, &request, &download).await {
            let reason = format!("the download's socket failed: {error}");
            tell(&self.events, NetEvent::TftpFailed { download, bytes: 0, reason });
        }
    }

    async fn transfer(&self, local: Ipv4Addr, request: &Request, download: &Download) -> io::Result<()> {
        let socket = UdpSocket::bind((local, 0)).await?;
        let read = match &download.file {
            BootFile::Autoexec => {
                let http = format!("http://{}:{}", self.address.unwrap_or(local), self.http_port);
                ipxe::autoexec_script(&http).map(Bytes::from).map_err(io::Error::other)
            }
            file @ (BootFile::Uki(_)
            | BootFile::Undionly
            | BootFile::Snponly
            | BootFile::Shim
            | BootFile::AfterShim) => self.cache.get(file).await,
        };
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) => {
                socket.send_to(&error_packet(&TftpError::NoSuchFile), download.peer).await?;
                let reason = format!("{}: {error}", download.file.path());
                tell(&self.events, NetEvent::TftpRefused { peer: download.peer, name: request.name.clone(), reason });
                return Ok(());
            }
        };
        let begun = Instant::now();
        let size = bytes.len() as u64;
        let (mut transfer, mut actions) = Transfer::start(request, download.peer, size, self.limits, begun.elapsed());
        let mut told = false;
        let mut moved = (0, begun);
        let mut buffer = [0; 600];
        loop {
            if !told && actions.iter().any(|a| matches!(a, Action::Block { .. })) {
                told = true;
                tell(&self.events, NetEvent::TftpStart { download: download.clone() });
            }
            if transfer.acknowledged() > moved.0 && moved.1.elapsed() >= PROGRESS {
                moved = (transfer.acknowledged(), Instant::now());
                tell(&self.events, NetEvent::TftpMoves { download: download.clone() });
            }
            for action in actions {
                match action {
                    Action::Send(packet) => drop(socket.send_to(&packet, download.peer).await?),
                    Action::Refuse(stranger, packet) => drop(socket.send_to(&packet, stranger).await),
                    Action::Block { number, start, end } => {
                        send_block(&socket, download.peer, number, slice(&bytes, start, end)).await?;
                    }
                    Action::End(ending) => {
                        self.ended(&ending, download, transfer.acknowledged(), begun);
                        return Ok(());
                    }
                }
            }
            let Some(deadline) = transfer.deadline() else { return Ok(()) };
            let at = TokioInstant::from_std(begun + deadline);
            actions = match timeout_at(at, socket.recv_from(&mut buffer)).await {
                Ok(received) => {
                    let (length, from) = received?;
                    transfer.packet(begun.elapsed(), from, &buffer[..length])
                }
                Err(_) => transfer.tick(begun.elapsed()),
            };
        }
    }

    fn ended(&self, ending: &Ending, download: &Download, acknowledged: u64, begun: Instant) {
        let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let download = download.clone();
        let failed = |bytes: u64, reason: String| NetEvent::TftpFailed { download: download.clone(), bytes, reason };
        let event = match ending {
            Ending::Probed => return,
            Ending::Done => {
                if let IpAddr::V4(address) = download.peer.ip() {
                    self.net.lock().tftp_done(address, &download.file, unix_ms());
                }
                NetEvent::TftpDone { download, bytes: acknowledged, ms }
            }
            Ending::Aborted { code, text } => {
                failed(acknowledged, format!("the client gave up: error {code}, {text:?}"))
            }
            Ending::Stalled { acknowledged } => {
                failed(*acknowledged, format!("the client stopped answering for {} s", self.limits.stall.as_secs()))
            }
            Ending::TooSlow { acknowledged } => {
                failed(*acknowledged, format!("too slow: {acknowledged} bytes in {} s", begun.elapsed().as_secs()))
            }
        };
        tell(&self.events, event);
    }
}

/// Takes the client off the list of the active, however its download ends.
struct Active<'a> {
    shared: &'a Shared,
    peer: SocketAddrV4,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.shared.active.lock().expect("no code that holds this lock panics").remove(&self.peer);
    }
}

fn slice(bytes: &Bytes, start: u64, end: u64) -> &[u8] {
    let index = |at: u64| usize::try_from(at).expect("a position in a file that is in memory");
    &bytes[index(start)..index(end)]
}

/// Header and file bytes leave in one datagram without being copied together first.
async fn send_block(socket: &UdpSocket, peer: SocketAddr, number: u16, data: &[u8]) -> io::Result<()> {
    let header = Action::data_header(number);
    let parts = [IoSlice::new(&header), IoSlice::new(data)];
    let to = SockaddrStorage::from(peer);
    let send = || {
        sendmsg(socket.as_raw_fd(), &parts, &[], MsgFlags::MSG_DONTWAIT, Some(&to))?;
        Ok(())
    };
    socket.async_io(Interest::WRITABLE, send).await
}
