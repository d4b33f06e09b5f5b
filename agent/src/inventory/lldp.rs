//! Who is at the other end of each cable: LLDP frames as they come, on a socket for each network card that sees only
//! them. Bounded by the cards; nothing is sent.

use crate::{facts, sys};
use kiln_protocol::{LLDP_ADDRESSES, LLDP_ETHERTYPE, Lldp, Neighbour, parse_lldp};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;
use tokio::sync::Notify;

/// An Ethernet frame's payload; what is longer is cut, and then refused.
const FRAME: usize = 1500;
/// Cards listened on.
const CARDS: usize = 128;

/// Who was heard last on which card, and until when that counts.
#[derive(Clone, Default)]
pub struct Neighbours {
    heard: Arc<Mutex<HashMap<String, (Neighbour, Instant)>>>,
    news: Arc<Notify>,
}

impl Neighbours {
    /// Listens on every card in the background. A card that cannot be listened on is told and passed over.
    pub fn listen(&self) {
        for name in facts::interfaces().into_iter().take(CARDS) {
            let open = || {
                let index = nix::net::if_::if_nametoindex(name.as_str())?;
                UdpSocket::from_std(sys::frames(index, LLDP_ETHERTYPE, &LLDP_ADDRESSES)?.into())
            };
            match open() {
                Ok(socket) => drop(tokio::spawn(self.clone().hear(name, socket))),
                Err(error) => eprintln!("kiln-agent: no LLDP on {name}: {error}"),
            }
        }
    }

    async fn hear(self, name: String, socket: UdpSocket) {
        let mut frame = [0; FRAME];
        loop {
            // The card went down: what was heard times out, and frames come again when it is back.
            let Ok(length) = socket.recv(&mut frame).await else {
                tokio::time::sleep(Duration::from_secs(10)).await;
                continue;
            };
            if let Ok(said) = parse_lldp(&frame[..length]) {
                self.take(&name, said, Instant::now());
            }
        }
    }

    fn take(&self, name: &str, said: Lldp, now: Instant) {
        let mut heard = self.heard.lock().expect("no code panics under this lock");
        let before = heard.get(name).map(|(neighbour, _)| neighbour.clone());
        match said {
            Lldp::Neighbour(neighbour, seconds) => {
                let until = now + Duration::from_secs(seconds.into());
                heard.insert(name.to_owned(), (neighbour, until));
            }
            Lldp::Leaves => drop(heard.remove(name)),
        }
        if heard.get(name).map(|(neighbour, _)| neighbour) != before.as_ref() {
            self.news.notify_one();
        }
    }

    /// The neighbour of a card.
    pub fn of(&self, name: &str) -> Option<Neighbour> {
        let heard = self.heard.lock().expect("no code panics under this lock");
        heard.get(name).filter(|(_, until)| *until > Instant::now()).map(|(neighbour, _)| neighbour.clone())
    }

    /// Waits until another one is heard.
    pub async fn news(&self) {
        self.news.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_counts_for_as_long_as_it_says() {
        let all = Neighbours::default();
        let port = |port: &str| Neighbour { port: port.into(), ..Neighbour::default() };
        let now = Instant::now();
        all.take("eth0", Lldp::Neighbour(port("1"), 120), now);
        all.take("eth1", Lldp::Neighbour(port("2"), 1), now.checked_sub(Duration::from_secs(2)).unwrap());
        assert_eq!((all.of("eth0"), all.of("eth1"), all.of("eth2")), (Some(port("1")), None, None));
        all.take("eth0", Lldp::Neighbour(port("9"), 120), now);
        assert_eq!(all.of("eth0"), Some(port("9")), "the newest");
        all.take("eth0", Lldp::Leaves, now);
        assert_eq!(all.of("eth0"), None);
    }
}
