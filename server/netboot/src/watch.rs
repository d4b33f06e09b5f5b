//! Notices that nobody gives out addresses while Kiln runs as a proxy.
//!
//! A proxy rarely sees another server's OFFER: it goes to the client's own Ethernet address unless the client asked for
//! broadcasts. But the client's REQUEST is a broadcast that names the server it took (RFC 2131 §3.1 step 3), so that is
//! the sign.

use std::net::Ipv4Addr;

/// How long an answered DISCOVER may stay without a sign of another server.
pub(crate) const PATIENCE_MS: u64 = 10_000;

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Watch {
    waiting_since_ms: Option<u64>,
    warned: bool,
    seen: Option<Ipv4Addr>,
}

impl Watch {
    pub(crate) fn offered(&mut self, now_ms: u64) {
        if !self.warned {
            self.waiting_since_ms.get_or_insert(now_ms);
        }
    }

    /// Another server was named; true if it is another one than the last.
    pub(crate) fn other_server(&mut self, server: Ipv4Addr) -> bool {
        self.waiting_since_ms = None;
        self.warned = false;
        self.seen.replace(server) != Some(server)
    }

    pub(crate) fn deadline_ms(&self) -> Option<u64> {
        self.waiting_since_ms.map(|since| since + PATIENCE_MS)
    }

    /// True once when the patience is over.
    pub(crate) fn tick(&mut self, now_ms: u64) -> bool {
        let over = self.deadline_ms().is_some_and(|at| at <= now_ms);
        if over {
            self.waiting_since_ms = None;
            self.warned = true;
        }
        over
    }
}
