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
        self.listen_on(facts::interfaces());
    }

    fn listen_on(&self, cards: Vec<String>) {
        for name in cards.into_iter().take(CARDS) {
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
    use crate::testing::namespace::enter;
    use std::path::Path;
    use std::process::Command;

    /// Waits until the daemon knows its card, then gives it a name and a port, and has it speak each second.
    const SWITCH: &str = "mount -t tmpfs tmpfs /run; mkdir /run/lldpd
        ip link set lo up; ip link add a0 type veth peer name b0; ip link set a0 up; ip link set b0 up
        lldpd -d -I b0 -u /run/switch 2>/run/said &
        n=0; until lldpcli -u /run/switch show interfaces ports b0 2>/dev/null | grep -q PortID
        do n=$((n + 1)); [ $n -lt 500 ] || { cat /run/said >&2; exit 1; }; sleep 0.02; done
        lldpcli -u /run/switch configure system hostname sw1
        lldpcli -u /run/switch configure ports b0 lldp portidsubtype local Eth1/7
        lldpcli -u /run/switch configure lldp tx-interval 1
        lldpcli -u /run/switch resume";

    #[test]
    fn a_real_neighbour_is_heard() {
        if !Path::new("/usr/sbin/lldpd").exists() {
            return crate::testing::oracle::skipped("lldpd is not installed (make setup)");
        }
        if !nix::unistd::geteuid().is_root() {
            return crate::testing::oracle::unprivileged(
                "this is not root: lldpd gives its rights to a user of its own",
            );
        }
        // Its processes end with the namespace.
        if !enter("inventory::lldp::tests::a_real_neighbour_is_heard", "-nmpf") {
            return;
        }
        assert!(Command::new("sh").args(["-ec", SWITCH]).status().unwrap().success());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let heard = runtime.block_on(async {
            let all = Neighbours::default();
            all.listen_on(vec!["a0".into()]);
            let told = |neighbour: &Neighbour| neighbour.system_name == "sw1" && neighbour.port == "Eth1/7";
            while !all.of("a0").as_ref().is_some_and(told) {
                let news = tokio::time::timeout(Duration::from_secs(20), all.news()).await;
                news.unwrap_or_else(|_| panic!("heard {:?}, and nothing for 20 s", all.of("a0")));
            }
            all.of("a0").unwrap()
        });
        assert!(!heard.chassis.is_empty() && !heard.earlier, "{heard:?}");
    }

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
