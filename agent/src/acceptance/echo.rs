//! A counted set of echoes to the boot server (RFC 792; RFC 4443 §4): what does not come back, the way there and back lost.
//! The server's kernel answers, nothing has to listen there.

use hyper::Uri;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

/// So many are sent: one of them lost is a thousandth.
const ECHOES: u16 = 1000;
/// One so often: by themselves they fill no queue.
const PAUSE: Duration = Duration::from_millis(5);
/// So long is waited for those that are under way, after the last one.
const LATE: Duration = Duration::from_secs(1);
/// What each carries: long enough to meet what damages frames, short enough for every link.
const PAYLOAD: [u8; 1024] = [0x5a; 1024];

/// What came of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Echoes {
    pub(super) sent: u16,
    pub(super) back: u16,
}

impl Echoes {
    pub(super) fn lost(self) -> u64 {
        u64::from(self.sent.saturating_sub(self.back))
    }

    pub(super) fn lost_per_million(self) -> u64 {
        self.lost() * 1_000_000 / u64::from(self.sent.max(1))
    }
}

/// Sends them to the server of this base URL. It takes six seconds.
pub(super) fn probe(base: &str) -> Result<Echoes, String> {
    let to = address(base)?;
    count(to, ECHOES).map_err(|e| format!("echoes to {to}: {e}"))
}

fn address(base: &str) -> Result<IpAddr, String> {
    let uri: Uri = base.parse().map_err(|e| format!("{base} is no URL: {e}"))?;
    let host = uri.host().ok_or_else(|| format!("{base} names no host"))?.trim_matches(['[', ']']);
    let mut found = (host, 0).to_socket_addrs().map_err(|e| format!("{host}: {e}"))?;
    found.next().map(|address| address.ip()).ok_or_else(|| format!("{host} has no address"))
}

fn count(to: IpAddr, echoes: u16) -> io::Result<Echoes> {
    let mut probe = Probe::new(to)?;
    for sequence in 0..echoes {
        // What cannot be sent is lost like what is lost later.
        let _ = probe.socket.send(&probe.request(sequence));
        probe.listen(PAUSE, usize::MAX)?;
    }
    probe.listen(LATE, usize::from(echoes))?;
    let back = probe.back.iter().filter(|sequence| **sequence < echoes).count();
    Ok(Echoes { sent: echoes, back: u16::try_from(back).unwrap_or(echoes) })
}

struct Probe {
    socket: Socket,
    v4: bool,
    /// Tells this process's echoes from another's.
    id: [u8; 2],
    back: BTreeSet<u16>,
}

impl Probe {
    fn new(to: IpAddr) -> io::Result<Self> {
        let (domain, protocol) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
        socket.connect(&SockAddr::from(SocketAddr::new(to, 0)))?;
        // A card that sends nothing does not hold the test.
        socket.set_write_timeout(Some(PAUSE))?;
        let [_, _, id @ ..] = std::process::id().to_be_bytes();
        Ok(Self { socket, v4: to.is_ipv4(), id, back: BTreeSet::new() })
    }

    fn request(&self, sequence: u16) -> Vec<u8> {
        let (kind, [high, low]) = (if self.v4 { 8 } else { 128 }, sequence.to_be_bytes());
        let mut echo = vec![kind, 0, 0, 0, self.id[0], self.id[1], high, low];
        echo.extend_from_slice(&PAYLOAD);
        if self.v4 {
            // With IPv6 the kernel does it (RFC 3542 §3.1).
            let sum = checksum(&echo).to_be_bytes();
            echo[2..4].copy_from_slice(&sum);
        }
        echo
    }

    /// Which of them this answers. With IPv4 its header comes with it.
    fn answers(&self, packet: &[u8]) -> Option<u16> {
        let header = if self.v4 { usize::from(packet.first()? & 0x0f) * 4 } else { 0 };
        let [kind, 0, _, _, a, b, high, low, payload @ ..] = packet.get(header..)? else { return None };
        let reply = if self.v4 { 0 } else { 129 };
        let ours = *kind == reply && [*a, *b] == self.id && payload == PAYLOAD;
        ours.then(|| u16::from_be_bytes([*high, *low]))
    }

    /// Takes answers for so long, or until there are so many.
    fn listen(&mut self, within: Duration, enough: usize) -> io::Result<()> {
        let until = Instant::now() + within;
        let mut buffer = [0; 2048];
        while self.back.len() < enough {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // Zero would be for ever.
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            // An error is the end of the time, or the network's word about one of them, which is lost then.
            if let Ok(length) = (&self.socket).read(&mut buffer)
                && let Some(sequence) = self.answers(&buffer[..length])
            {
                self.back.insert(sequence);
            }
        }
        Ok(())
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u32 = words.map(u32::from).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("it was folded until it fits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::namespace::enter;
    use std::process::Command;

    fn sh(script: &str) {
        assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success(), "{script}");
    }

    #[test]
    fn what_a_network_loses_is_counted() {
        if !enter("acceptance::echo::tests::what_a_network_loses_is_counted", "-rn") {
            return;
        }
        sh("ip link set lo up");
        for base in ["http://127.0.0.1:8080", "http://[::1]:8080", "http://localhost"] {
            let to = address(base).unwrap();
            assert_eq!(count(to, 50).unwrap(), Echoes { sent: 50, back: 50 }, "{base}");
        }
        // A queue for a part of what is sent, and for nothing more: both ways lie in it. How large a part depends on how fast
        // this host sends.
        sh("tc qdisc replace dev lo root tbf rate 100kbit burst 3000 limit 4000");
        let some = count([127, 0, 0, 1].into(), 200).unwrap();
        assert!((1..200).contains(&some.back), "{some:?}");
        assert_eq!(some.lost_per_million(), u64::from(200 - some.back) * 5000);
        sh("tc qdisc replace dev lo root pfifo limit 0");
        let none = count([127, 0, 0, 1].into(), 20).unwrap();
        assert_eq!((none, none.lost_per_million()), (Echoes { sent: 20, back: 0 }, 1_000_000));
    }

    #[test]
    fn only_whole_answers_to_our_own_echoes_count() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0x220d, "the example of RFC 1071 §3");
        assert_eq!(checksum(&[0xff]), 0x00ff);
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        let probe = Probe { socket, v4: true, id: [7, 8], back: BTreeSet::new() };
        let request = probe.request(0x0102);
        assert_eq!((checksum(&request), &request[4..8]), (0, &[7, 8, 1, 2][..]));
        let reply = |change: fn(&mut Vec<u8>)| {
            let mut packet = [&[0x45_u8; 20][..], &request[..]].concat();
            packet[20] = 0;
            change(&mut packet);
            probe.answers(&packet)
        };
        assert_eq!(reply(|_| {}), Some(0x0102));
        let changes: [fn(&mut Vec<u8>); 6] =
            [|p| p[20] = 8, |p| p[25] = 9, |p| p[60] ^= 1, |p| p.truncate(60), |p| p[0] = 0x4f, Vec::clear];
        for change in changes {
            assert_eq!(reply(change), None);
        }
        assert!(address("http://").is_err() && address("nothing at all").is_err());
    }
}
