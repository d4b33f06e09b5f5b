//! What a machine's boot can promise, in the words that the CLI's list, a machine's page and the rack's show.

use super::AttestationView;
use kiln_protocol::{AttestationState, ProtectionClass};

/// The class, and how its boot stands beside it; `-` of a machine that has not said what it is.
pub fn protection_words(class: Option<ProtectionClass>, attestation: Option<&AttestationView>) -> String {
    let Some(class) = class else { return "-".to_owned() };
    let Some(AttestationView { state, carried, .. }) = attestation else { return class.to_string() };
    match state {
        AttestationState::Attested if *carried => format!("{class}, by kexec"),
        AttestationState::Attested => class.to_string(),
        AttestationState::Failed => format!("{class}, attestation failed"),
        AttestationState::Unattested | AttestationState::NoTpm => format!("{class}, {state}"),
    }
}
