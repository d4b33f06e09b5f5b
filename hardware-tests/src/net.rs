//! The rack's network: a bridge, a tap per machine, and the site's own DHCP server behind a cable of its own.
//!
//! ```text
//!  machine ── tap ──┐
//!  machine ── tap ──┤ kiln0 (bridge, 10.77.0.1: kiln serve)
//!                   └── veth ── [namespace: dnsmasq 10.77.0.2, addresses only]
//! ```
//! dnsmasq sits in a namespace of its own because both it and Kiln listen on port 67, as two hosts would.

use crate::command;
use crate::console::{Console, Mark};
use crate::error::LabError;
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// The bridge, and the interface `kiln serve` answers on.
pub const BRIDGE: &str = "kiln0";
/// The boot server's address.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The site's DHCP server.
pub const SITE_DHCP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

fn ip(line: &str) -> Result<(), LabError> {
    command::run("ip", line.split_whitespace()).map(drop)
}

/// Makes the bridge.
pub fn make_bridge() -> Result<(), LabError> {
    ip(&format!("link add {BRIDGE} type bridge stp_state 0 forward_delay 0"))?;
    ip(&format!("addr add {SERVER}/24 brd + dev {BRIDGE}"))?;
    ip(&format!("link set {BRIDGE} up"))
}

/// Gives the bridge a further address, or takes it away: another host's, as machines see it.
pub fn set_address(address: Ipv4Addr, present: bool) -> Result<(), LabError> {
    let verb = if present { "add" } else { "del" };
    ip(&format!("addr {verb} {address}/24 dev {BRIDGE}"))
}

/// Makes a tap on the bridge.
pub fn make_tap(tap: &str) -> Result<(), LabError> {
    ip(&format!("tuntap add dev {tap} mode tap"))?;
    ip(&format!("link set {tap} master {BRIDGE} up"))
}

/// Makes a tap that is a network of its own, with the boot server's address in it.
pub fn make_network(tap: &str, server: &str) -> Result<(), LabError> {
    ip(&format!("tuntap add dev {tap} mode tap"))?;
    ip(&format!("addr add {server}/24 brd + dev {tap}"))?;
    ip(&format!("link set {tap} up"))
}

/// Takes a tap off the bridge, or puts it back: every packet is lost both ways, and the machine's link stays up.
pub fn set_connected(tap: &str, connected: bool) -> Result<(), LabError> {
    if connected { ip(&format!("link set {tap} master {BRIDGE}")) } else { ip(&format!("link set {tap} nomaster")) }
}

/// Limits what reaches the machine to `kbit_s`.
pub fn set_slow(tap: &str, kbit_s: u32) -> Result<(), LabError> {
    let line = format!("qdisc replace dev {tap} root tbf rate {kbit_s}kbit burst 32k latency 200ms");
    command::run("tc", line.split_whitespace()).map(drop)
}

/// The site's DHCP server says so long nothing only where it hangs.
const SERVES: Duration = Duration::from_secs(30);

/// The site's own DHCP server: Debian's dnsmasq, giving out addresses and what more it is told.
#[derive(Debug)]
pub struct SiteDhcp {
    child: Child,
    /// Its log.
    pub log: Arc<Console>,
}

impl SiteDhcp {
    /// Starts it and waits until it serves. `lab` is the `kiln-lab` program; `more` are dnsmasq's options.
    pub fn start(lab: &Path, log: &Path, more: &[String]) -> Result<Self, LabError> {
        ip("link add site0 type veth peer name site1")?;
        ip(&format!("link set site0 master {BRIDGE} up"))?;
        let mut command = Command::new(lab);
        command
            .args(["site-dhcp", "--"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child =
            command.spawn().map_err(|source| LabError::Spawn { command: command::shown(&command), source })?;
        let stdout = child.stdout.take().expect("asked for above");
        let stderr = child.stderr.take().expect("asked for above");
        let log = Console::follow("site DHCP server", log, false, vec![Box::new(stdout), Box::new(stderr)])?;
        let start = Mark::default();
        log.wait_for("namespace ready", start, SERVES)?;
        ip(&format!("link set site1 netns {}", child.id()))?;
        drop(child.stdin.take()); // tells it that its cable is in
        log.wait_for("DHCP, IP range", start, SERVES)?;
        Ok(Self { child, log })
    }
}

impl Drop for SiteDhcp {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // It goes with the namespace of its other end, some time; another may be plugged in at once.
        let _ = ip("link del site0");
    }
}

/// The inside of `kiln-lab site-dhcp`: takes a network namespace, waits for the cable, becomes dnsmasq.
pub fn become_site_dhcp(more: &[OsString]) -> Result<std::convert::Infallible, LabError> {
    use std::io::Read;
    use std::os::unix::process::CommandExt;
    let step = |step: &'static str| move |source| LabError::Enclosure { step, source };
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
        .map_err(|e| step("take a network namespace")(e.into()))?;
    println!("namespace ready");
    std::io::stdin().read_to_end(&mut Vec::new()).map_err(step("wait for the cable"))?;
    ip("link set lo up")?;
    ip(&format!("addr add {SITE_DHCP}/24 brd + dev site1"))?;
    ip("link set site1 up")?;
    let ipv6 = ip("addr add fd00:77::2/64 dev site1 nodad").is_ok();
    let mut dnsmasq = Command::new("/usr/sbin/dnsmasq");
    if ipv6 {
        // Debian's iPXE asks for an IPv6 router beside DHCP and waits 16 s for one, in the ROM and again in undionly.kpxe. An
        // advertisement of a router that routes nothing ends the wait at once.
        dnsmasq.args(["--enable-ra", "--dhcp-range=::,constructor:site1,ra-only", "--ra-param=site1,0,0"]);
    }
    dnsmasq.args([
        "--no-daemon", // in the foreground, and no change of user: there is only one here
        "--conf-file=/dev/null",
        "--port=0", // no DNS
        "--interface=site1",
        "--bind-interfaces",
        "--dhcp-range=10.77.0.100,10.77.0.199,255.255.255.0,1h",
        "--dhcp-authoritative",
        "--dhcp-leasefile=/dev/null",
        "--leasefile-ro",
        "--log-dhcp",
        "--no-resolv",
        "--no-hosts",
        "--no-ping",
    ]);
    dnsmasq.args(more);
    Err(LabError::Spawn { command: command::shown(&dnsmasq), source: dnsmasq.exec() })
}
