//! The policy of what secrets are delivered to: the TPM opens the credential only while these PCRs are as they were quoted
//! (TPM 2.0 part 3, §23.7 `PolicyPCR`, §23.11 `PolicyCommandCode`). Both sides work it out by themselves: the machine from its
//! PCRs, the server from the quote that it has just verified.

use super::command::ACTIVATE_CREDENTIAL;
use super::quote::{QUOTED, selection};
use ring::digest::{Context, SHA256 as HASH};

/// The PCRs that a delivery is bound to: boot applications (4), Secure Boot (7), the UKI and its cap (11), what was added to
/// its command line (12). They stay as they are for the rest of a boot; 10 grows with what IMA measures.
pub const DELIVERY: [u8; 4] = [4, 7, 11, 12];

const POLICY_PCR: u32 = 0x17f;
const POLICY_COMMAND_CODE: u32 = 0x16c;

fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = Context::new(&HASH);
    for part in parts {
        context.update(part);
    }
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// What `PolicyPCR` comes to for these PCRs, in ascending order, with these values.
pub fn pcr_policy(pcrs: &[u8], values: &[[u8; 32]]) -> [u8; 32] {
    let values: Vec<&[u8]> = values.iter().map(|value| &value[..]).collect();
    hash(&[&[0; 32], &POLICY_PCR.to_be_bytes(), &selection(pcrs), &hash(&values)])
}

/// The policy's digest, by the values of [`QUOTED`] in that order; none: there are not so many.
pub fn delivery_policy(quoted: &[[u8; 32]]) -> Option<[u8; 32]> {
    let value = |pcr: &u8| quoted.get(QUOTED.iter().position(|quoted| quoted == pcr)?).copied();
    let values: Vec<[u8; 32]> = DELIVERY.iter().map(value).collect::<Option<_>>()?;
    let policy = pcr_policy(&DELIVERY, &values);
    Some(hash(&[&policy, &POLICY_COMMAND_CODE.to_be_bytes(), &ACTIVATE_CREDENTIAL.to_be_bytes()]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pcr_of_it_counts_and_no_other() {
        let usual = delivery_policy(&[[1; 32]; QUOTED.len()]).unwrap();
        for (n, pcr) in QUOTED.iter().enumerate() {
            let mut values = [[1; 32]; QUOTED.len()];
            values[n] = [2; 32];
            assert_eq!(delivery_policy(&values).unwrap() != usual, DELIVERY.contains(pcr), "PCR {pcr}");
        }
        assert_eq!(delivery_policy(&[[1; 32]; 3]), None);
    }
}
