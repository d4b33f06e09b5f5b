//! A user and network namespace of the test's own, with one cable in it: DHCP and TFTP on their real ports.
#![allow(dead_code, clippy::unwrap_used)]

#[path = "../../../images/tests/namespace/mod.rs"]
mod namespace;

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::time::Duration;

pub const PATIENCE: Duration = Duration::from_secs(20);
/// The server's end of the cable.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// Runs the test of this name again inside new user and network namespaces; true there.
pub fn inside(test: &str) -> bool {
    namespace::enter(test, "-rn")
}

pub fn sh(script: &str) {
    assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success(), "{script}");
}

pub fn packet(hex: &str) -> Vec<u8> {
    kiln_release::hex::decode(&hex.split_whitespace().collect::<String>()).unwrap()
}

/// Two ports of one cable in one namespace: the server has k0, the "firmware" sends through k1.
pub const CABLE: &str = "ip link set lo up; ip link add k0 type veth peer name k1; ip addr add 10.77.0.1/24 dev k0
    ip link set k0 up; ip link set k1 up
    for c in all k0 k1; do echo 0 >/proc/sys/net/ipv4/conf/$c/rp_filter; echo 1 >/proc/sys/net/ipv4/conf/$c/accept_local; done";

pub fn firmware() -> UdpSocket {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.bind_device(Some(b"k1")).unwrap();
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68).into()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.into()
}
