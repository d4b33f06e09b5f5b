//! The DHCP loop: reads ports 67 and 4011, asks for boot decisions, sends the replies.
//!
//! Beside another DHCP server on the same host: both must open port 67 shared. A broadcast then reaches both, but a
//! unicast (a renewal, a relay) only one. So where port 67 is taken already, a proxy listens for broadcasts alone and
//! leaves the unicasts to the other; a full server refuses to start.

use super::interfaces::Interfaces;
use super::packet_socket::{PacketSocket, Received};
use super::{BootNet, Decide, NetError, NetEvent, tell, unix_ms};
use kiln_netboot::{Arrival, BOOT_SERVER_PORT, BootAnswer, Event, Mode, Output, Pending, SERVER_PORT, Step};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long a boot decision may take.
pub const DECISION_TIMEOUT: Duration = Duration::from_secs(2);
/// So many decisions may be open; beyond, requests are dropped and the clients ask again.
const MAX_DECISIONS: usize = 4096;
/// Longest datagram looked at: one byte more than the longest that is read, so that a longer one is seen to be too
/// long.
const BUFFER: usize = 4097;

/// What the loop needs to know beside the protocol's own settings.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The one interface to answer on; none: every one that has an address.
    pub interface: Option<String>,
}

struct Loop {
    net: BootNet,
    settings: Settings,
    interfaces: Interfaces,
    events: mpsc::Sender<NetEvent>,
    server: PacketSocket,
    /// Port 4011; none where it could not be opened.
    boot_server: Option<PacketSocket>,
}

/// Answers DHCP for ever. In mode `off` it opens nothing and waits.
pub async fn run(
    net: BootNet,
    settings: Settings,
    decide: Decide,
    events: mpsc::Sender<NetEvent>,
) -> Result<(), NetError> {
    let mode = net.lock().mode().clone();
    if mode == Mode::Off {
        let reason = "[dhcp] mode = \"off\": the site's own server must name Kiln".into();
        tell(&events, NetEvent::NotListening { what: "DHCP", reason });
        return std::future::pending().await;
    }
    let interfaces = Interfaces::read();
    check_interface(&interfaces, settings.interface.as_deref())?;
    let server = open_server(&mode, &settings, &events)?;
    let boot_server = open_boot_server(&events);
    Loop { net, settings, interfaces, events, server, boot_server }.run(decide).await
}

fn check_interface(interfaces: &Interfaces, wanted: Option<&str>) -> Result<(), NetError> {
    let Some(name) = wanted else { return Ok(()) };
    if nix::net::if_::if_nametoindex(name).is_ok() {
        return Ok(()); // its address may come later
    }
    let mut present: Vec<_> = interfaces.all().iter().map(|a| a.name.as_str()).collect();
    present.dedup();
    Err(NetError::NoInterface { name: name.into(), present: present.join(", ") })
}

fn open_server(mode: &Mode, settings: &Settings, events: &mpsc::Sender<NetEvent>) -> Result<PacketSocket, NetError> {
    let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, SERVER_PORT);
    let advice =
        ": another DHCP server runs on this host. Stop it, or let Kiln be a proxy beside it ([dhcp] mode = \"proxy\")";
    let on = settings.interface.as_ref().map_or("on every interface".into(), |name| format!("on {name}"));
    let what = match mode {
        Mode::Full(_) => "full DHCP",
        Mode::Proxy | Mode::Off => "proxyDHCP",
    };
    // Opened unshared first: that is how to learn whether somebody else is there.
    let taken = match PacketSocket::open(any, false, advice) {
        Ok(_) => false,
        Err(NetError::InUse { .. }) if *mode == Mode::Proxy => true,
        Err(error) => return Err(error),
    };
    let (at, why) = if taken {
        let broadcasts = SocketAddrV4::new(Ipv4Addr::BROADCAST, SERVER_PORT);
        (
            broadcasts,
            format!("{on}, broadcasts only: another DHCP server on this host has port 67, relays reach that one"),
        )
    } else {
        (any, on)
    };
    let socket =
        PacketSocket::open(at, true, ": the DHCP server on this host does not share it. Give Kiln another host")?;
    tell(events, NetEvent::Listening { what, address: socket.address, why });
    Ok(socket)
}

/// Without it, clients that ask a proxy a second time get no answer there; most never do.
fn open_boot_server(events: &mpsc::Sender<NetEvent>) -> Option<PacketSocket> {
    let what = "PXE boot server";
    match PacketSocket::open(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, BOOT_SERVER_PORT), false, "") {
        Ok(socket) => {
            let why = "for PXE clients that ask a second time".into();
            tell(events, NetEvent::Listening { what, address: socket.address, why });
            Some(socket)
        }
        Err(error) => {
            let reason = format!("{error}; firmware that insists on PXE's own port will not boot");
            tell(events, NetEvent::NotListening { what, reason });
            None
        }
    }
}

impl Loop {
    async fn run(mut self, decide: Decide) -> Result<(), NetError> {
        let mut decisions: JoinSet<Option<(Box<Pending>, BootAnswer)>> = JoinSet::new();
        let (mut buffer, mut buffer_4011) = (vec![0; BUFFER], vec![0; BUFFER]);
        loop {
            let deadline = self.net.lock().deadline_ms();
            let wait = Duration::from_millis(deadline.map_or(60_000, |at| at.saturating_sub(unix_ms())));
            let received = tokio::select! {
                received = self.server.receive(&mut buffer) => Some((received?, SERVER_PORT)),
                received = receive_if(self.boot_server.as_ref(), &mut buffer_4011) => Some((received?, BOOT_SERVER_PORT)),
                Some(joined) = decisions.join_next() => {
                    if let Ok(Some((pending, answer))) = joined {
                        let outputs = self.net.lock().answered(unix_ms(), *pending, answer);
                        self.perform(outputs).await;
                    }
                    None
                }
                () = sleep(wait) => {
                    let outputs = self.net.lock().tick(unix_ms());
                    self.perform(outputs).await;
                    None
                }
            };
            let Some((received, port)) = received else { continue };
            let bytes = if port == SERVER_PORT { &buffer[..received.length] } else { &buffer_4011[..received.length] };
            let Some(arrival) = self.arrival(&received, port) else { continue };
            let step = self.net.lock().receive(unix_ms(), &arrival, bytes);
            match step {
                Step::Done(outputs) => self.perform(outputs).await,
                Step::Ask(outputs, pending) => {
                    self.perform(outputs).await;
                    if decisions.len() < MAX_DECISIONS {
                        let answer = decide(pending.query.clone());
                        decisions.spawn(async move {
                            timeout(DECISION_TIMEOUT, answer).await.ok().map(|answer| (pending, answer))
                        });
                    }
                }
            }
        }
    }

    /// None: not an interface that is answered on.
    fn arrival(&mut self, received: &Received, port: u16) -> Option<Arrival> {
        let here = self.interfaces.on(received.interface, Some(received.local))?;
        if self.settings.interface.as_ref().is_some_and(|wanted| *wanted != here.name) {
            return None;
        }
        Some(Arrival { interface: here.index, local: here.address, netmask: here.netmask, from: received.from, port })
    }

    async fn perform(&self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send(datagram) => {
                    let socket = match &self.boot_server {
                        Some(boot_server) if datagram.from_port == BOOT_SERVER_PORT => boot_server,
                        Some(_) | None => &self.server,
                    };
                    let (to, interface) = (datagram.to, datagram.interface);
                    if let Err(error) = socket.send(&datagram.bytes, to, interface, datagram.from).await {
                        tell(&self.events, NetEvent::Dhcp(Event::Unsent { to, reason: error.to_string() }));
                    }
                }
                Output::Event(event) => tell(&self.events, NetEvent::Dhcp(event)),
                // A lost lease could be given out twice after a restart: wait for room.
                Output::Lease(lease) => drop(self.events.send(NetEvent::Lease(lease)).await),
            }
        }
    }
}

async fn receive_if(socket: Option<&PacketSocket>, buffer: &mut [u8]) -> Result<Received, NetError> {
    match socket {
        Some(socket) => socket.receive(buffer).await,
        None => std::future::pending().await,
    }
}
