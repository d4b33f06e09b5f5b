//! What the guard judged and could not tell: its supervisor reads too slowly, the socket between them is full, and the guard
//! waits for nobody. It is counted, and told with the next that goes through. A guard that ends takes its count along; its end
//! is an alarm by itself.

use super::{Said, send};
use kiln_protocol::{ExecState, ExecVerdict};
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;

/// Starts that were judged and not told, by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    pub denied: u64,
    pub reported: u64,
    pub late: u64,
}

impl Lost {
    fn add(&mut self, verdict: ExecVerdict) {
        match verdict {
            ExecVerdict::Denied => self.denied += 1,
            ExecVerdict::Reported => self.reported += 1,
            ExecVerdict::LateDenied | ExecVerdict::LateAllowed => self.late += 1,
        }
    }

    /// Into the counts; which programs they were nobody knows.
    pub fn count(self, state: &mut ExecState) {
        state.denied += self.denied;
        state.reported += self.reported;
        state.late += self.late;
    }

    /// For the alarm.
    pub fn describe(self) -> String {
        let Self { denied, reported, late } = self;
        format!(
            "more starts were judged at once than could be told: {denied} denied, {reported} reported and {late} late ones \
             are counted, and not named"
        )
    }
}

/// Tells the supervisor, which is not waited for: each answer has its time.
pub(super) fn say(supervisor: BorrowedFd<'_>, lost: &mut Lost, said: &Said) {
    if *lost != Lost::default() && send(supervisor, &Said::Lost(*lost)).is_ok() {
        *lost = Lost::default();
    }
    if let (Err(_), Said::Judged { verdict, .. }) = (send(supervisor, said), said) {
        lost.add(*verdict);
    }
}

#[cfg(test)]
mod tests {
    use super::super::receive;
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    #[test]
    fn what_a_full_socket_does_not_take_is_counted_and_told_later() {
        let (supervisor, guard) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let judged = |verdict| Said::Judged { id: 0, pid: 1, path: "/srv/x".into(), sha256: None, verdict };
        let (mut lost, mut taken) = (Lost::default(), 0);
        loop {
            say(guard.as_fd(), &mut lost, &judged(ExecVerdict::Denied));
            if lost.denied == 1 {
                break;
            }
            taken += 1;
            assert!(taken < 1_000_000, "the kernel takes it all");
        }
        for verdict in [ExecVerdict::Reported, ExecVerdict::LateDenied, ExecVerdict::LateAllowed] {
            say(guard.as_fd(), &mut lost, &judged(verdict));
        }
        let expected = Lost { denied: 1, reported: 1, late: 2 };
        assert_eq!(lost, expected);
        // The supervisor comes to itself.
        for _ in 0..taken {
            assert_eq!(receive::<Said>(supervisor.as_fd()).unwrap(), Some(judged(ExecVerdict::Denied)));
        }
        assert_eq!(receive::<Said>(supervisor.as_fd()).unwrap(), None);
        say(guard.as_fd(), &mut lost, &Said::Pong(7));
        assert_eq!(receive::<Said>(supervisor.as_fd()).unwrap(), Some(Said::Lost(expected)));
        assert_eq!(receive::<Said>(supervisor.as_fd()).unwrap(), Some(Said::Pong(7)));
        assert_eq!(lost, Lost::default(), "told once");
        let mut state = ExecState { denied: 5, ..ExecState::default() };
        expected.count(&mut state);
        assert_eq!((state.denied, state.reported, state.late), (6, 1, 2));
    }
}
