//! A wipe's receipt, checked by what is in it: the public key whose id it names made its signature. Whether that key is the
//! machine's is for the reader to compare; the server compares it with the one that TLS proved.

use kiln_protocol::{ORDER_DISKS, RECEIPT_TYPE, Receipt, SPEC_VERSION, WipeOutcome};
use kiln_release::certificate::{public_spki_der, spki_key_id};
use kiln_release::{EnvelopeError, KeySet, PublicKey, Unverified, hex};
use std::collections::BTreeMap;

/// Longest receipt.
pub const MAX_RECEIPT: usize = 256 << 10;

/// A receipt that proves nothing.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ReceiptError {
    #[error("not a receipt: {0}")]
    Envelope(#[from] EnvelopeError),
    #[error("not a receipt: {0}")]
    Outline(String),
    #[error("its public key is not the one that its key id {key} names")]
    KeyId { key: String },
}

/// Reads a receipt whose signature is that of the key it names.
pub fn verify(text: &[u8]) -> Result<Receipt, ReceiptError> {
    let outline = |reason: &str| ReceiptError::Outline(reason.to_owned());
    // Unverified: only to find the key that verifies it.
    let envelope: serde_json::Value = serde_json::from_slice(text).map_err(|e| outline(&e.to_string()))?;
    let named = envelope.pointer("/signed/public_key").and_then(serde_json::Value::as_str);
    let bytes = named.and_then(hex::decode).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    let public = PublicKey::ed25519(bytes.ok_or_else(|| outline("no public key of 32 bytes in hex"))?);
    let keys = KeySet::new(BTreeMap::from([(public.id(), public.clone())]), 1);
    let envelope = Unverified::<Receipt>::parse(text, MAX_RECEIPT as u64)?;
    let receipt = envelope.verify_type(&keys, RECEIPT_TYPE)?.into_inner();
    if receipt.spec_version != SPEC_VERSION {
        return Err(outline("another spec_version than this kiln reads"));
    }
    if spki_key_id(&public_spki_der(&public)) != receipt.key.as_str() {
        return Err(ReceiptError::KeyId { key: receipt.key.to_string() });
    }
    if receipt.disks.len() > ORDER_DISKS {
        return Err(outline("it lists more disks than a machine has"));
    }
    Ok(receipt)
}

/// The disks that may still hold what they held.
pub fn failed(receipt: &Receipt) -> Vec<String> {
    let mut failed: Vec<String> = receipt
        .disks
        .iter()
        .filter(|disk| disk.outcome == WipeOutcome::Failed)
        .map(|disk| format!("{} ({}): {}", disk.name, disk.serial, disk.detail))
        .collect();
    if failed.is_empty() && !receipt.is_complete() {
        failed.push("the machine has no disk that the order is for".into());
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::WipedDisk;
    use kiln_release::certificate::spki_der;
    use kiln_release::{Signer, sign_envelope};

    fn receipt(signer: &Signer) -> Receipt {
        Receipt {
            type_: RECEIPT_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            machine: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
            key: spki_key_id(&spki_der(signer)).parse().unwrap(),
            public_key: hex::encode(&signer.public_bytes()),
            order: "ab".repeat(16).parse().unwrap(),
            disks: vec![WipedDisk {
                name: "sda".into(),
                model: "M".into(),
                serial: "S1".into(),
                bytes: 512,
                methods: vec!["overwrite".into()],
                outcome: WipeOutcome::Wiped,
                detail: "all".into(),
            }],
            finished: "2026-01-01T00:00:00Z".parse().unwrap(),
            seconds: 1,
        }
    }

    #[test]
    fn a_receipt_is_its_machines_and_unaltered() {
        let (machine, other) = (Signer::from_seed(&[1; 32]), Signer::from_seed(&[2; 32]));
        let good = receipt(&machine);
        let text = sign_envelope(&good, &[&machine]).unwrap();
        assert_eq!(verify(text.as_bytes()).unwrap(), good);
        let bad = |text: &str| verify(text.as_bytes()).unwrap_err().to_string();
        assert!(bad(&text.replace("\"wiped\"", "\"skipped\"")).contains("signed by 0"));
        assert!(bad(&sign_envelope(&good, &[&other]).unwrap()).contains("signed by 0"));
        // Another's key and signature under this machine's key id.
        let stolen = Receipt { public_key: hex::encode(&other.public_bytes()), ..good.clone() };
        assert!(bad(&sign_envelope(&stolen, &[&other]).unwrap()).contains("not the one that its key id"));
        let order = Receipt { type_: "kiln-order".into(), ..good };
        assert!(bad(&sign_envelope(&order, &[&machine]).unwrap()).contains("_type"));
        assert!(bad("{}").contains("no public key") && bad("x").starts_with("not a receipt"));
    }

    #[test]
    fn what_failed_is_named_and_nothing_wiped_is_no_success() {
        let mut it = receipt(&Signer::from_seed(&[1; 32]));
        assert!(failed(&it).is_empty());
        it.disks[0].outcome = WipeOutcome::Skipped;
        assert_eq!(failed(&it), ["the machine has no disk that the order is for"]);
        it.disks[0].outcome = WipeOutcome::Failed;
        assert_eq!(failed(&it), ["sda (S1): all"]);
    }
}
