//! The certificate that a site issues to a machine, for other programs than the agent API: what the machine asks with, what it
//! gets, and when it asks again.
//!
//! The private key is made on the machine and stays there. The request names its public half and proves that the machine has
//! the other: a signature over [`possession`], which names the asking machine, its identity key and its boot, so that no one
//! else's request is of use to anybody.

use crate::HexBytes;
use crate::ids::{KeyId, MachineId};
use serde::{Deserialize, Serialize};

/// Where a machine asks for a certificate.
pub const CERTIFICATE_PATH: &str = "/agent/v1/certificate";
/// Longest request, bytes.
pub const CERTIFICATE_LIMIT: usize = 4 << 10;
const POSSESSION: &[u8] = b"kiln-certificate-1\0";

/// A machine asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRequest {
    /// Which machine.
    pub machine: MachineId,
    /// Its boot: the one that it reported last.
    pub boot_id: String,
    /// Public key: an uncompressed point of P-256, 65 bytes.
    pub public_key: HexBytes,
    /// Its signature over [`possession`]: ECDSA with SHA-256, ASN.1.
    pub proof: HexBytes,
}

/// What the server says to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateAnswer {
    /// The certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issued: Option<IssuedCertificate>,
    /// Why there is none, in a sentence, and the reason's kind in brackets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// A certificate as it was issued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuedCertificate {
    /// PEM.
    pub certificate: String,
    /// PEM of the CA that signed it.
    pub ca: String,
    /// Its serial number, hex.
    pub serial: String,
    /// It holds for so many seconds from now on: a machine's clock may be wrong.
    pub lasts_s: u64,
}

/// What the private key of a request signs.
pub fn possession(machine: &MachineId, identity: &KeyId, boot_id: &str, public_key: &[u8]) -> Vec<u8> {
    // All but the boot id have a fixed length.
    [POSSESSION, machine.as_str().as_bytes(), identity.as_str().as_bytes(), public_key, boot_id.as_bytes()].concat()
}

/// From when to when a certificate holds, in milliseconds of any one clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// When it came.
    pub issued: u64,
    /// When it ends.
    pub expires: u64,
    /// Random, the same for all of its life: machines that started together ask apart.
    pub jitter: u8,
}

/// What is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing.
    Fresh,
    /// Another is asked for; this one still holds.
    Renew,
    /// It is over.
    Over,
}

impl Life {
    /// Asked for anew in the sixteenth of its life that follows on its first half: never before that, so that of a machine's
    /// certificates no more than two hold at a time.
    pub fn standing(self, now: u64) -> Standing {
        let life = self.expires.saturating_sub(self.issued);
        let spread = u128::from(life / 16) * u128::from(self.jitter) / 256;
        let spread = u64::try_from(spread).expect("less than a sixteenth of a u64");
        if now >= self.expires {
            Standing::Over
        } else if now >= self.issued.saturating_add(life.div_ceil(2)).saturating_add(spread) {
            Standing::Renew
        } else {
            Standing::Fresh
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let request = CertificateRequest {
            machine: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
            boot_id: "b".into(),
            public_key: HexBytes(vec![4, 1]),
            proof: HexBytes(vec![0x30]),
        };
        let golden =
            r#"{"machine":"00000000-0000-0000-0000-000000000001","boot_id":"b","public_key":"0401","proof":"30"}"#;
        assert_eq!(serde_json::to_string(&request).unwrap(), golden);
        assert_eq!(serde_json::from_str::<CertificateRequest>(golden).unwrap(), request);
        let issued = IssuedCertificate { certificate: "c".into(), ca: "d".into(), serial: "40".into(), lasts_s: 7 };
        let answer = CertificateAnswer { issued: Some(issued), refused: None };
        let golden = r#"{"issued":{"certificate":"c","ca":"d","serial":"40","lasts_s":7}}"#;
        assert_eq!(serde_json::to_string(&answer).unwrap(), golden);
        assert_eq!(serde_json::from_str::<CertificateAnswer>(golden).unwrap(), answer);
        let refused = CertificateAnswer { issued: None, refused: Some("no (not-declared)".into()) };
        let golden = r#"{"refused":"no (not-declared)","added_later":1}"#;
        assert_eq!(serde_json::from_str::<CertificateAnswer>(golden).unwrap(), refused);
    }

    #[test]
    fn a_proof_is_of_one_machine_key_and_boot() {
        let machine = |n: u8| format!("00000000-0000-0000-0000-0000000000{n:02x}").parse::<MachineId>().unwrap();
        let key = |n: u8| format!("{n:02x}").repeat(32).parse::<KeyId>().unwrap();
        let proofs = [
            possession(&machine(1), &key(1), "a", &[4; 65]),
            possession(&machine(2), &key(1), "a", &[4; 65]),
            possession(&machine(1), &key(2), "a", &[4; 65]),
            possession(&machine(1), &key(1), "b", &[4; 65]),
            possession(&machine(1), &key(1), "a", &[5; 65]),
        ];
        for (n, proof) in proofs.iter().enumerate() {
            assert!(!proofs[n + 1..].contains(proof), "{n}");
        }
    }

    #[test]
    fn it_is_renewed_from_its_middle_on() {
        let day = Life { issued: 1_000, expires: 1_000 + 86_400_000, jitter: 0 };
        let middle = 1_000 + 43_200_000;
        for (now, standing) in [
            (0, Standing::Fresh),
            (middle - 1, Standing::Fresh),
            (middle, Standing::Renew),
            (day.expires - 1, Standing::Renew),
            (day.expires, Standing::Over),
        ] {
            assert_eq!(day.standing(now), standing, "{now}");
        }
        assert_eq!(Life { jitter: 128, ..day }.standing(middle + 2_699_999), Standing::Fresh);
        assert_eq!(Life { jitter: 128, ..day }.standing(middle + 2_700_000), Standing::Renew);
        assert_eq!(Life { expires: 0, ..day }.standing(5), Standing::Over, "one that ended before it came");
    }

    proptest! {
        /// Whatever the numbers: it is asked for before it ends, and where each comes as the one before asks, never are three
        /// alive.
        #[test]
        fn there_is_time_to_renew(issued in 0..1_u64 << 60, life in 16..1_u64 << 60, jitter in any::<u8>(), next in any::<u8>()) {
            // The first moment at which it is not fresh any more.
            let renews = |life: Life| {
                let (mut low, mut high) = (life.issued, life.expires);
                while low < high {
                    let middle = low + (high - low) / 2;
                    if life.standing(middle) == Standing::Fresh { low = middle + 1; } else { high = middle; }
                }
                low
            };
            let first = Life { issued, expires: issued + life, jitter };
            let second = renews(first);
            prop_assert!(second < first.expires);
            let second = Life { issued: second, expires: second + life, jitter: next };
            prop_assert!(renews(second) >= first.expires);
        }
    }
}
