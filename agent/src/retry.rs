//! Pauses between tries: doubling, jittered, capped; and when to give up.

use crate::error::FailureClass;
use std::time::Duration;

/// Tries of a step whose failure is not the network's.
const VERIFY_TRIES: u32 = 3;

/// What to do after a failed try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Try again after this.
    After(Duration),
    /// Restart the machine: the server's decision may differ next time.
    GiveUp,
}

/// Decides after try number `attempt` (from 1) failed; `jitter` is any random byte.
pub fn next(class: FailureClass, attempt: u32, jitter: u8) -> Next {
    let cap = match class {
        FailureClass::Unreachable => Duration::from_secs(300),
        FailureClass::Verification | FailureClass::Machine => {
            if attempt >= VERIFY_TRIES {
                return Next::GiveUp;
            }
            Duration::from_secs(60)
        }
        FailureClass::Usage => return Next::GiveUp,
    };
    let base = Duration::from_secs(1).saturating_mul(1 << (attempt - 1).min(16)).min(cap);
    // 75 % to 125 % of it, so that a rack that lost its server does not come back in step.
    Next::After(base * (192 + u32::from(jitter) / 2) / 256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_is_tried_for_ever_and_verification_three_times() {
        assert_eq!(next(FailureClass::Verification, 3, 0), Next::GiveUp);
        assert_eq!(next(FailureClass::Machine, 3, 0), Next::GiveUp);
        let Next::After(last) = next(FailureClass::Unreachable, 1000, 255) else { panic!("gave up") };
        assert!(last <= Duration::from_secs(375) && last >= Duration::from_secs(225), "{last:?}");
        let Next::After(first) = next(FailureClass::Unreachable, 1, 128) else { panic!("gave up") };
        assert_eq!(first, Duration::from_secs(1));
    }
}
