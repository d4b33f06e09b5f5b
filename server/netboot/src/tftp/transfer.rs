//! One download, as a function of packets and time.
//!
//! The bytes stay with the caller: a [`Action::Block`] names a range of the file, so a thousand transfers of one file
//! need one copy of it. Window and retransmission as RFC 7440 §4; with a window of one the duplicate-ACK guard of RFC
//! 1123 §4.2.3.1 ("Sorcerer's Apprentice"); with a larger one blocks are sent again early at most once, as in NewReno
//! (RFC 6582), so that no network can make one packet breed more than two.

use super::Request;
use super::packet::{OP_ACK, OP_ERROR, error_bytes, number, oack, opcode};
use std::net::SocketAddr;
use std::time::Duration;

/// What a transfer may cost. Times are since any fixed moment, the same for all calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest block: 1468 fills an Ethernet frame of 1500 bytes without IP fragments, which boot ROMs cannot join.
    pub max_blksize: u16,
    /// Largest window.
    pub max_windowsize: u16,
    /// First wait before a resend, until the round trip is known.
    pub first_wait: Duration,
    /// Longest wait before a resend.
    pub longest_wait: Duration,
    /// Without a new acknowledgement for so long, the client is gone, whatever it asked for. A wait of more than a
    /// third of it (RFC 2349's `timeout`) is not acknowledged: it would leave no time for a resend.
    pub stall: Duration,
    /// The whole transfer may take this and the time that `min_rate` gives its size.
    pub grace: Duration,
    /// Bytes per second that a client must take on the whole.
    pub min_rate: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_blksize: 1468,
            max_windowsize: 16,
            first_wait: Duration::from_secs(1),
            longest_wait: Duration::from_secs(8),
            stall: Duration::from_secs(30),
            grace: Duration::from_mins(1),
            min_rate: 32 * 1024,
        }
    }
}

/// Shortest wait before a resend: below it a busy client would look like a lost packet.
const SHORTEST_WAIT: Duration = Duration::from_millis(200);

/// How a transfer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The client acknowledged the last block.
    Done,
    /// The client asked only for the size (RFC 2349 by way of every PXE ROM): it broke off after the OACK.
    Probed,
    /// The client sent an ERROR.
    Aborted {
        /// Its code.
        code: u16,
        /// Its text, printable characters only.
        text: String,
    },
    /// No new acknowledgement within [`Limits::stall`].
    Stalled {
        /// Bytes acknowledged.
        acknowledged: u64,
    },
    /// It moves, but slower than [`Limits::min_rate`].
    TooSlow {
        /// Bytes acknowledged.
        acknowledged: u64,
    },
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send these bytes to the client.
    Send(Vec<u8>),
    /// Send DATA `number` with the file's bytes `start..end` to the client.
    Block {
        /// The block number on the wire.
        number: u16,
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// Send these bytes to somebody who is not the client.
    Refuse(SocketAddr, Vec<u8>),
    /// The transfer is over; no more calls.
    End(Ending),
}

/// DATA's opcode and the block number: what goes before the file's bytes.
impl Action {
    /// The four header bytes of DATA `number`.
    pub fn data_header(number: u16) -> [u8; 4] {
        let [a, b] = number.to_be_bytes();
        [0, 3, a, b]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// OACK sent, ACK 0 awaited.
    Options,
    Data,
    Ended,
}

/// One download of one file by one client.
#[derive(Debug, Clone)]
pub struct Transfer {
    peer: SocketAddr,
    size: u64,
    block: u64,
    window: u64,
    /// Blocks of the file; the last is shorter than `block`, perhaps empty.
    blocks: u64,
    phase: Phase,
    oack: Vec<u8>,
    /// Blocks acknowledged in order.
    base: u64,
    /// Highest block sent.
    sent: u64,
    /// Highest block sent when blocks were last sent again: until it is acknowledged, only the timer sends them once
    /// more.
    recover: u64,
    /// What is out was sent more than once: its acknowledgement tells no round trip (Karn).
    resent: bool,
    window_at: Duration,
    round_trip: Option<Duration>,
    wait: Duration,
    fixed_wait: Option<Duration>,
    resend_at: Duration,
    stalled_at: Duration,
    over_at: Duration,
    limits: Limits,
}

impl Transfer {
    /// Begins: the first actions are the OACK, or the first block for a client without options.
    pub fn start(request: &Request, peer: SocketAddr, size: u64, limits: Limits, now: Duration) -> (Self, Vec<Action>) {
        let block = request.blksize.map_or(512, |asked| asked.min(limits.max_blksize));
        let window = request.windowsize.map_or(1, |asked| asked.min(limits.max_windowsize));
        let mut options = Vec::new();
        if request.blksize.is_some() {
            options.push(("blksize", u64::from(block)));
        }
        if request.tsize {
            options.push(("tsize", size));
        }
        // RFC 2349: a server that does not want the value leaves the option out, and the client goes on without it.
        let timeout = request.timeout.filter(|seconds| Duration::from_secs(u64::from(*seconds)) * 3 <= limits.stall);
        if let Some(seconds) = timeout {
            options.push(("timeout", u64::from(seconds)));
        }
        if request.windowsize.is_some() {
            options.push(("windowsize", u64::from(window)));
        }
        let block = u64::from(block);
        let fixed_wait = timeout.map(|s| Duration::from_secs(u64::from(s)));
        let mut transfer = Self {
            peer,
            size,
            block,
            window: u64::from(window),
            blocks: size / block + 1,
            phase: if options.is_empty() { Phase::Data } else { Phase::Options },
            oack: if options.is_empty() { Vec::new() } else { oack(&options) },
            base: 0,
            sent: 0,
            recover: 0,
            resent: false,
            window_at: now,
            round_trip: None,
            wait: fixed_wait.unwrap_or(limits.first_wait),
            fixed_wait,
            resend_at: now,
            stalled_at: now + limits.stall,
            over_at: now + limits.grace + Duration::from_secs(size / u64::from(limits.min_rate.max(1))),
            limits,
        };
        let actions = transfer.send_from(0, now);
        (transfer, actions)
    }

    /// When [`Transfer::tick`] has something to do; none once ended.
    pub fn deadline(&self) -> Option<Duration> {
        (self.phase != Phase::Ended).then(|| self.resend_at.min(self.stalled_at).min(self.over_at))
    }

    /// Bytes acknowledged.
    pub fn acknowledged(&self) -> u64 {
        (self.base * self.block).min(self.size)
    }

    /// A packet came to this transfer's port.
    pub fn packet(&mut self, now: Duration, from: SocketAddr, packet: &[u8]) -> Vec<Action> {
        if self.phase == Phase::Ended {
            return Vec::new();
        }
        let opcode = opcode(packet);
        if from != self.peer {
            // RFC 1350 §4: tell the stranger, leave the transfer alone; never answer an ERROR with an ERROR.
            return match opcode {
                Some(OP_ERROR) | None => Vec::new(),
                Some(_) => vec![Action::Refuse(from, error_bytes(5, "unknown transfer ID"))],
            };
        }
        match (opcode, number(packet)) {
            (Some(OP_ACK), Some(number)) => self.acknowledge(now, number),
            (Some(OP_ERROR), code) => self.aborted(code.unwrap_or(0), packet.get(4..).unwrap_or_default()),
            _ => Vec::new(), // not for a server; the client's next ACK or the deadline decides
        }
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) -> Vec<Action> {
        if self.phase == Phase::Ended {
            return Vec::new();
        }
        let acknowledged = self.acknowledged();
        let ending = if now >= self.over_at {
            Ending::TooSlow { acknowledged }
        } else if now >= self.stalled_at {
            Ending::Stalled { acknowledged }
        } else if now >= self.resend_at {
            if self.fixed_wait.is_none() {
                self.wait = (self.wait * 2).min(self.limits.longest_wait);
            }
            return self.resend(now);
        } else {
            return Vec::new();
        };
        self.phase = Phase::Ended;
        vec![Action::Send(error_bytes(0, "timed out")), Action::End(ending)]
    }

    fn acknowledge(&mut self, now: Duration, number: u16) -> Vec<Action> {
        if self.phase == Phase::Options {
            if number != 0 {
                return Vec::new();
            }
            self.phase = Phase::Data;
            return self.advance(now, 0);
        }
        // The number counts modulo 65536; less than a window is out, so the distance tells which block it is.
        let distance = u64::from(number.wrapping_sub(low(self.base)));
        if self.base + distance > self.sent {
            return Vec::new();
        }
        if distance > 0 {
            return self.advance(now, distance);
        }
        let early = self.round_trip.is_some_and(|rtt| now < self.window_at + rtt / 2);
        if self.window == 1 || self.base < self.recover || early {
            return Vec::new();
        }
        self.resend(now) // RFC 7440 §4: the client missed the window's first block and says where it stands
    }

    fn advance(&mut self, now: Duration, distance: u64) -> Vec<Action> {
        self.base += distance;
        if self.base == self.blocks {
            self.phase = Phase::Ended;
            return vec![Action::End(Ending::Done)];
        }
        if !self.resent {
            let sample = now.saturating_sub(self.window_at);
            self.round_trip = Some(self.round_trip.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        }
        if self.fixed_wait.is_none() {
            let wait = self.round_trip.map_or(self.limits.first_wait, |rtt| rtt * 4);
            self.wait = wait.max(SHORTEST_WAIT).min(self.limits.longest_wait);
        }
        self.stalled_at = now + self.limits.stall;
        if self.sent > self.base && self.base >= self.recover {
            return self.resend(now); // RFC 7440 §4: it missed the block after the one it names
        }
        self.resent = self.sent > self.base;
        self.send_from(self.sent, now)
    }

    /// Everything that is out, again.
    fn resend(&mut self, now: Duration) -> Vec<Action> {
        self.resent = true;
        let actions = self.send_from(self.base, now);
        self.recover = self.sent;
        actions
    }

    fn aborted(&mut self, code: u16, text: &[u8]) -> Vec<Action> {
        let ending = if self.phase == Phase::Options {
            Ending::Probed
        } else {
            let text = text.iter().take_while(|b| **b != 0).take(80);
            let text = text.map(|b| if b.is_ascii_graphic() || *b == b' ' { char::from(*b) } else { '?' }).collect();
            Ending::Aborted { code, text }
        };
        self.phase = Phase::Ended;
        vec![Action::End(ending)]
    }

    /// The OACK, or the blocks after `from` that may be out.
    fn send_from(&mut self, from: u64, now: Duration) -> Vec<Action> {
        self.window_at = now;
        self.resend_at = now + self.wait;
        if self.phase == Phase::Options {
            return vec![Action::Send(self.oack.clone())];
        }
        let last = (self.base + self.window).min(self.blocks);
        self.sent = self.sent.max(last);
        (from + 1..=last)
            .map(|block| {
                let start = (block - 1) * self.block;
                Action::Block { number: low(block), start, end: (start + self.block).min(self.size) }
            })
            .collect()
    }
}

/// The low 16 bits: after 65535 comes 0, as every client in use expects of large files.
fn low(block: u64) -> u16 {
    u16::try_from(block & 0xffff).expect("masked to 16 bits")
}
