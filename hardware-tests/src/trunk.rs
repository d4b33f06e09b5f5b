//! A switch whose trunk ports one machine is cabled to, for bonds and VLANs on real links: untagged frames belong to the
//! rack's bridge, those of one VLAN to a network of their own on which the boot server has an address too. It speaks
//! LACP (IEEE 802.1AX-2014 §6.4) or does not, and before a bundle is made its ports work by themselves, as firmware needs
//! it. By LLDP it says each second which port a cable is at.
//!
//! ```text
//!  machine ── cable0 ─┐                    ┌─ untagged: tap `native` on the bridge
//!  machine ── cable1 ─┤ this switch ───────┤
//!                     └                    └─ VLAN 10: tap `access10`, 10.77.10.1 (kiln serve)
//! ```
//! Cables are QEMU's datagram sockets, a frame each. Towards a tap a QEMU without a machine is the plug. The kernel's own
//! VLANs and bonds are not used: not every host of a rack has them.

use crate::command;
use crate::error::{AtPath, LabError};
use crate::net;
use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The tagged network.
pub const VLAN: u16 = 10;
/// The boot server's address in it.
pub const SERVER: &str = "10.77.10.1";
/// What its LLDP calls it.
pub const NAME: &str = "trunk-1";

const NATIVE: &str = "native";
const ACCESS: &str = "access10";
const SLOW_PROTOCOLS: [u8; 2] = [0x88, 0x09];
const LACP: u8 = 1;
const LLDP: [u8; 2] = [0x88, 0xcc];
const LLDP_EVERY: Duration = Duration::from_secs(1);
const TAGGED: [u8; 2] = [0x81, 0x00];
/// This switch as LACP's actor: it takes part by itself, wants fast answers, may be bundled, and has done so.
const STATE: u8 = 0x3f;
/// Aggregation, synchronisation, collecting, distributing.
const BUNDLED: u8 = 0x3c;
const SYSTEM: [u8; 6] = [0x02, 0x4b, 0x49, 0x4c, 0x4e, 0x01];
/// Three fast periods (§6.4.4, Short Timeout Time).
const HEARD: Duration = Duration::from_secs(3);
const FRAME: usize = 64 << 10;
const PLUGGED: Duration = Duration::from_secs(20);

/// One of the switch's ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Port {
    /// Where a cable of the machine ends.
    Cable(u8),
    /// The bridge's network.
    Native,
    /// The VLAN's network.
    Access,
}

/// What the other end of a cable said of itself by LACP.
#[derive(Debug, Clone, Copy)]
struct Partner {
    bundled: bool,
    heard: Instant,
}

/// The switch itself: what comes of a frame.
#[derive(Debug)]
struct Switch {
    cables: u8,
    lacp: bool,
    /// The cable on which a sender was last heard.
    learnt: BTreeMap<[u8; 6], u8>,
    partners: BTreeMap<u8, Partner>,
}

impl Switch {
    fn new(cables: u8) -> Self {
        Self { cables, lacp: false, learnt: BTreeMap::new(), partners: BTreeMap::new() }
    }

    fn bundle(&self, now: Instant) -> Vec<u8> {
        let alive = |p: &Partner| p.bundled && now.duration_since(p.heard) < HEARD;
        self.partners.iter().filter(|(_, partner)| alive(partner)).map(|(cable, _)| *cable).collect()
    }

    /// The frames that leave for one that came.
    fn frame(&mut self, from: Port, frame: &[u8], now: Instant) -> Vec<(Port, Vec<u8>)> {
        let Some((to, rest)) = frame.split_first_chunk::<6>() else { return Vec::new() };
        let (Some(sender), Some(kind)) = (rest.first_chunk::<6>(), frame.get(12..14)) else { return Vec::new() };
        match from {
            Port::Cable(cable) if kind == SLOW_PROTOCOLS => self.lacpdu(cable, frame, now),
            Port::Cable(cable) => {
                self.learnt.insert(*sender, cable);
                match frame.get(14..16) {
                    Some(tag) if kind == TAGGED => {
                        let id = u16::from_be_bytes([tag[0], tag[1]]) & 0xfff;
                        let bare = [&frame[..12], &frame[16..]].concat();
                        if id == VLAN { vec![(Port::Access, bare)] } else { Vec::new() }
                    }
                    Some(_) | None => vec![(Port::Native, frame.to_vec())],
                }
            }
            Port::Native | Port::Access => {
                let frame = if from == Port::Access {
                    [&frame[..12], &TAGGED, &VLAN.to_be_bytes(), &frame[12..]].concat()
                } else {
                    frame.to_vec()
                };
                let bundle = self.bundle(now);
                let cables: Vec<u8> = match (self.learnt.get(to), bundle.first()) {
                    (Some(cable), None) => vec![*cable],
                    (Some(cable), Some(_)) if bundle.contains(cable) => vec![*cable],
                    // A bundle is one link: it gets what is for everybody once.
                    (_, Some(first)) => vec![*first],
                    (None, None) => (0..self.cables).collect(),
                };
                cables.into_iter().map(|cable| (Port::Cable(cable), frame.clone())).collect()
            }
        }
    }

    /// §6.4.2.3: subtype, version; actor (type 1, length 20), partner (type 2, length 20), collector (type 3, length 16).
    fn lacpdu(&mut self, cable: u8, frame: &[u8], now: Instant) -> Vec<(Port, Vec<u8>)> {
        let (Some([LACP, _]), Some(actor), Some(partner)) = (frame.get(14..16), frame.get(18..33), frame.get(38..53))
        else {
            return Vec::new();
        };
        if !self.lacp {
            return Vec::new();
        }
        let bundled = actor[14] & BUNDLED == BUNDLED && partner[2..8] == SYSTEM;
        self.partners.insert(cable, Partner { bundled, heard: now });
        let mut answer = vec![0x01, 0x80, 0xc2, 0, 0, 0x02];
        answer.extend([0x02, 0x4b, 0x49, 0x4c, 0x4e, 0x10 + cable]);
        answer.extend(SLOW_PROTOCOLS);
        answer.extend([LACP, 1, 1, 20, 0x80, 0]);
        answer.extend(SYSTEM);
        answer.extend([0, 1, 0x80, 0, 0, cable + 1, STATE, 0, 0, 0, 2, 20]);
        answer.extend(actor);
        answer.extend([0, 0, 0, 3, 16]);
        answer.resize(14 + 110, 0);
        vec![(Port::Cable(cable), answer)]
    }
}

/// What its LLDP calls the port of a cable.
pub fn port_name(cable: u8) -> String {
    format!("Eth1/{}", cable + 1)
}

/// IEEE Std 802.1AB-2016 §8: chassis id (a MAC address), port id (locally assigned), time to live, system name, end.
fn lldp(cable: u8) -> Vec<u8> {
    let chassis = [&[4][..], &SYSTEM].concat();
    let port = [&[7][..], port_name(cable).as_bytes()].concat();
    let parts: [(u8, &[u8]); 5] = [(1, &chassis), (2, &port), (3, &[0, 120]), (5, NAME.as_bytes()), (0, &[])];
    let mut frame = vec![0x01, 0x80, 0xc2, 0, 0, 0x0e];
    frame.extend([0x02, 0x4b, 0x49, 0x4c, 0x4e, 0x10 + cable]);
    frame.extend(LLDP);
    for (kind, value) in parts {
        frame.extend([kind << 1, u8::try_from(value.len()).expect("a few bytes")]);
        frame.extend(value);
    }
    // The shortest frame that a card sends.
    frame.resize(frame.len().max(60), 0);
    frame
}

type Shared = Arc<(Mutex<Switch>, Condvar)>;

fn lock(shared: &Shared) -> MutexGuard<'_, Switch> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running switch.
#[derive(Debug)]
pub struct Trunk {
    shared: Shared,
    plugs: Vec<Child>,
    /// Its LLDP ends with it.
    _speaks: Sender<()>,
}

/// The two ends of a cable: the machine's socket and the switch's.
pub fn ends(dir: &Path, cable: u8) -> (PathBuf, PathBuf) {
    (dir.join(format!("cable{cable}.machine")), dir.join(format!("cable{cable}.switch")))
}

/// QEMU's words for a cable whose own end is `here`.
pub fn netdev(id: &str, here: &Path, there: &Path) -> String {
    let (here, there) = (here.display(), there.display());
    format!("dgram,id={id},local.type=unix,local.path={here},remote.type=unix,remote.path={there}")
}

impl Trunk {
    /// Starts it, with `cables` cables that end in `dir`. The bridge is there.
    pub fn start(dir: &Path, cables: u8) -> Result<Self, LabError> {
        net::make_tap(NATIVE)?;
        net::make_network(ACCESS, SERVER)?;
        let mut ports = BTreeMap::new();
        for cable in 0..cables {
            let (there, here) = ends(dir, cable);
            ports.insert(Port::Cable(cable), (UnixDatagram::bind(&here).at(&here)?, there));
        }
        let mut plugs = Vec::new();
        for (port, tap) in [(Port::Native, NATIVE), (Port::Access, ACCESS)] {
            let (there, here) = (dir.join(format!("{tap}.plug")), dir.join(format!("{tap}.switch")));
            ports.insert(port, (UnixDatagram::bind(&here).at(&here)?, there.clone()));
            plugs.push(plug(tap, &there, &here)?);
        }
        let shared: Shared = Arc::new((Mutex::new(Switch::new(cables)), Condvar::new()));
        let ports = Arc::new(ports);
        for from in ports.keys().copied() {
            let (ports, shared) = (Arc::clone(&ports), Arc::clone(&shared));
            std::thread::spawn(move || {
                let mut buffer = vec![0; FRAME];
                while let Ok(length) = ports[&from].0.recv(&mut buffer) {
                    let out = lock(&shared).frame(from, &buffer[..length], Instant::now());
                    shared.1.notify_all();
                    for (port, frame) in out {
                        let (socket, to) = &ports[&port];
                        // Nobody is at the other end: the machine is off.
                        let _ = socket.send_to(&frame, to);
                    }
                }
            });
        }
        let (speaks, ended) = channel();
        std::thread::spawn(move || {
            while ended.recv_timeout(LLDP_EVERY) == Err(RecvTimeoutError::Timeout) {
                for cable in 0..cables {
                    let (socket, to) = &ports[&Port::Cable(cable)];
                    // As above.
                    let _ = socket.send_to(&lldp(cable), to);
                }
            }
        });
        Ok(Self { shared, plugs, _speaks: speaks })
    }

    /// Speaks LACP from now on, or no more.
    pub fn set_lacp(&self, lacp: bool) {
        let mut switch = lock(&self.shared);
        (switch.lacp, switch.partners) = (lacp, BTreeMap::new());
    }

    /// The cables in the bundle, as both ends see it.
    pub fn bundle(&self) -> Vec<u8> {
        lock(&self.shared).bundle(Instant::now())
    }

    /// Waits until the bundle is of exactly these cables.
    pub fn wait_bundle(&self, cables: &[u8], limit: Duration) -> Result<(), LabError> {
        let deadline = Instant::now() + limit;
        let mut switch = lock(&self.shared);
        loop {
            let now = Instant::now();
            let bundle = switch.bundle(now);
            if bundle == cables {
                return Ok(());
            }
            if now >= deadline {
                let what = format!("a bundle of the cables {cables:?}; it has {bundle:?}");
                return Err(LabError::TooLong { who: "the trunk".into(), what, limit });
            }
            // A partner also leaves by silence, which is no frame: looked for at the pace of LACP.
            let pause = (deadline - now).min(Duration::from_secs(1));
            switch = self.shared.1.wait_timeout(switch, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Trunk {
    fn drop(&mut self) {
        for plug in &mut self.plugs {
            let _ = plug.kill();
            let _ = plug.wait();
        }
    }
}

/// A QEMU without a machine that carries frames between a tap and a socket.
fn plug(tap: &str, here: &Path, there: &Path) -> Result<Child, LabError> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none"]);
    qemu.args(["-netdev", &format!("tap,id=tap,ifname={tap},script=no,downscript=no")]);
    qemu.args(["-netdev", &netdev("cable", here, there)]);
    qemu.args(["-netdev", "hubport,id=a,hubid=0,netdev=tap", "-netdev", "hubport,id=b,hubid=0,netdev=cable"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = qemu.spawn().map_err(|source| LabError::Spawn { command: command::shown(&qemu), source })?;
    let begun = Instant::now();
    while !here.exists() {
        // QEMU makes the socket some time after it was started, and tells nobody.
        let ended = child.try_wait().ok().flatten();
        if ended.is_some() || begun.elapsed() > PLUGGED {
            let _ = child.kill();
            let status = child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
            return Err(LabError::Died { program: command::shown(&qemu), status, last_words: String::new() });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(child)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: [u8; 6] = [2, 0, 0, 0, 0, 7];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn frame(to: [u8; 6], from: [u8; 6], behind: &[u8]) -> Vec<u8> {
        [&to[..], &from, behind].concat()
    }

    #[test]
    fn tags_are_put_on_and_taken_off_and_foreign_ones_go_nowhere() {
        let (mut switch, now) = (Switch::new(2), Instant::now());
        let bare = frame(OTHER, MACHINE, &[8, 0, 1, 2, 3]);
        let tagged = |id: u8| frame(OTHER, MACHINE, &[0x81, 0, 0, id, 8, 0, 1, 2, 3]);
        assert_eq!(switch.frame(Port::Cable(1), &bare, now), [(Port::Native, bare.clone())]);
        assert_eq!(switch.frame(Port::Cable(1), &tagged(10), now), [(Port::Access, bare)]);
        assert!(switch.frame(Port::Cable(1), &tagged(99), now).is_empty());
        let back = frame(MACHINE, OTHER, &[8, 0, 1]);
        let out = frame(MACHINE, OTHER, &[0x81, 0, 0, 10, 8, 0, 1]);
        assert_eq!(switch.frame(Port::Access, &back, now), [(Port::Cable(1), out)], "where it was heard");
        let all = frame([255; 6], OTHER, &[8, 6]);
        assert_eq!(switch.frame(Port::Native, &all, now).len(), 2, "to both cables");
        assert!(switch.frame(Port::Cable(0), &[0; 13], now).is_empty());
    }

    #[test]
    fn each_port_says_by_lldp_which_it_is() {
        let said = kiln_protocol::parse_lldp(&lldp(1)[14..]).unwrap();
        let kiln_protocol::Lldp::Neighbour(neighbour, 120) = said else { panic!("{said:?}") };
        assert_eq!((neighbour.system_name.as_str(), neighbour.port.as_str()), (NAME, "Eth1/2"));
        assert_eq!(neighbour.chassis, "02:4b:49:4c:4e:01");
    }

    #[test]
    fn lacp_is_answered_and_a_bundle_ends_in_silence() {
        let (mut switch, now) = (Switch::new(2), Instant::now());
        let pdu = |state: u8, knows: [u8; 6]| {
            let mut pdu = frame([1, 0x80, 0xc2, 0, 0, 2], MACHINE, &[0x88, 9, 1, 1, 1, 20, 0xff, 0xff]);
            pdu.extend(MACHINE);
            pdu.extend([0, 9, 0, 255, 0, 1, state, 0, 0, 0, 2, 20, 0x80, 0]);
            pdu.extend(knows);
            pdu.resize(124, 0);
            pdu
        };
        assert!(switch.frame(Port::Cable(0), &pdu(0x3f, SYSTEM), now).is_empty(), "it does not speak LACP");
        switch.lacp = true;
        let answer = switch.frame(Port::Cable(0), &pdu(0x07, [0; 6]), now);
        let (port, bytes) = &answer[0];
        assert_eq!((*port, bytes.len(), bytes[32]), (Port::Cable(0), 124, STATE));
        assert_eq!(bytes[38..53], pdu(0x07, [0; 6])[18..33], "it says what it was told");
        assert!(switch.bundle(now).is_empty());
        switch.frame(Port::Cable(0), &pdu(0x3f, OTHER), now);
        assert!(switch.bundle(now).is_empty(), "bundled with another");
        for cable in [0, 1] {
            switch.frame(Port::Cable(cable), &pdu(0x3f, SYSTEM), now + HEARD * u32::from(cable) / 2);
        }
        assert_eq!(switch.bundle(now), [0, 1]);
        let all = frame([255; 6], OTHER, &[8, 6]);
        assert_eq!(switch.frame(Port::Native, &all, now).len(), 1, "a bundle is one link");
        assert_eq!(switch.bundle(now + HEARD), [1], "silence");
    }
}
