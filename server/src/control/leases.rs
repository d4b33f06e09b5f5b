//! Address leases as the store keeps them: a line of four words each.

use kiln_netboot::{Lease, LeaseState};

/// Key and value of a lease.
pub fn lease_to(lease: &Lease) -> (String, String) {
    let state = match lease.state {
        LeaseState::Offered => "offered",
        LeaseState::Bound => "bound",
        LeaseState::Free => "free",
        LeaseState::Declined => "declined",
    };
    (format!("lease/{}", lease.address), format!("{} {} {state} {}", lease.address, lease.mac, lease.until_ms))
}

/// A lease from its value; none if it is not one.
pub fn lease_from(text: &str) -> Option<Lease> {
    let mut words = text.split(' ');
    let lease = Lease {
        address: words.next()?.parse().ok()?,
        mac: words.next()?.parse().ok()?,
        state: match words.next()? {
            "offered" => LeaseState::Offered,
            "bound" => LeaseState::Bound,
            "free" => LeaseState::Free,
            "declined" => LeaseState::Declined,
            _ => return None,
        },
        until_ms: words.next()?.parse().ok()?,
    };
    Some(lease)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_survives_being_stored() {
        for state in [LeaseState::Offered, LeaseState::Bound, LeaseState::Free, LeaseState::Declined] {
            let lease = Lease {
                address: "10.0.0.7".parse().unwrap(),
                mac: "52:54:00:00:00:01".parse().unwrap(),
                state,
                until_ms: 7,
            };
            assert_eq!(lease_from(&lease_to(&lease).1), Some(lease));
        }
        assert_eq!(lease_from("10.0.0.7 nonsense"), None);
    }
}
