//! The machine's side of a proof: its TPM opens the server's credential and quotes its PCRs. See
//! `kiln_protocol::Attestation`. A proof that fails stops nothing here: what follows from it is the server's to say.

use crate::api::Api;
use crate::change::blocking;
use crate::error::{AgentError, Result};
use crate::ima;
use crate::log;
use crate::secrets::{self, Opened};
use crate::tpm::{self, Tpm};
use kiln_protocol::tpm::qualifying_data;
use kiln_protocol::{
    Attestation, AttestationState, Challenge, Delivered, HexBytes, Judged, KeyId, MachineId, Sha256Hex,
};
use kiln_release::hex;
use std::time::Duration;
use tokio::time::timeout;

/// A TPM that has not answered after so long is given up; some take seconds to make a key.
const PATIENCE: Duration = Duration::from_secs(60);
/// So long a machine that leaves tries to say what it has measured; then firmware starts the next boot.
const LEAVES: Duration = Duration::from_secs(60);

/// What came of a proof.
#[derive(Debug)]
pub struct Proved {
    pub judged: Judged,
    /// The secrets that were asked for, if the server gave them.
    pub secrets: Option<Opened>,
}

/// Both steps. With `secrets` the server is asked for them, too: they come sealed to a key that this TPM uses only while its
/// PCRs are as the proof quotes them.
pub async fn prove(api: &mut Api, machine: &MachineId, boot_id: &str, key: &KeyId, secrets: bool) -> Result<Proved> {
    let (mut tpm, keys) = work(|| {
        let mut tpm = Tpm::open()?.ok_or(AgentError::NoTpm)?;
        let keys = tpm.keys()?;
        Ok((tpm, keys))
    })
    .await?;
    let hello = Attestation::Hello {
        machine: machine.clone(),
        boot_id: boot_id.to_owned(),
        endorsement: HexBytes(keys.endorsement_public.clone()),
        attestation: HexBytes(keys.attestation_public.clone()),
    };
    let challenge: Challenge = api.attest(&hello).await?;
    let qualifying = qualifying_data(challenge.nonce.as_str(), key.as_str(), boot_id);
    let Challenge { nonce, id_object, encrypted_secret } = challenge;
    let (mut tpm, keys, secret, proof, delivery, [log, measured]) = work(move || {
        let secret = tpm.open_credential(&keys, &id_object.0, &encrypted_secret.0)?;
        let proof = tpm.prove(&keys, &qualifying)?;
        let delivery = if secrets { Some(tpm.delivery_key(&proof.pcrs)?) } else { None };
        // The list after the quote: it has all that the quote has.
        Ok((tpm, keys, secret, proof, delivery, [tpm::event_log(), ima::list()]))
    })
    .await?;
    let digits = |bytes: &[u8]| hex::encode(bytes).parse::<Sha256Hex>();
    let secret = digits(&secret).map_err(|_| AgentError::Unreachable {
        url: api.server().to_owned(),
        reason: "its credential holds no secret of 32 bytes".into(),
    })?;
    let prove = Attestation::Prove {
        machine: machine.clone(),
        boot_id: boot_id.to_owned(),
        secret,
        pcrs: proof.pcrs.iter().map(|value| digits(value).expect("32 bytes are 64 hex digits")).collect(),
        quoted: HexBytes(proof.quote.attest),
        signature: HexBytes(proof.quote.signature),
        event_log: HexBytes(log),
        measured: HexBytes(measured),
        delivery: delivery.as_ref().map(|key| HexBytes(key.public.clone())),
    };
    let mut judged: Judged = api.attest(&prove).await?;
    let secrets = match (judged.secrets.take(), delivery) {
        (Some(delivered), Some(key)) => {
            let Delivered { id_object, encrypted_secret, sealed } = delivered;
            let opens = move || Ok(tpm.open_delivery(&keys, &key, &id_object.0, &encrypted_secret.0)?);
            Some(secrets::open(work(opens).await?, sealed.0, machine, boot_id, &nonce)?)
        }
        (Some(_) | None, _) => None,
    };
    Ok(Proved { judged, secrets })
}

/// Before a kexec, once the next kernel is loaded: tells the server what this one has measured, which nobody can read afterwards.
/// Whether the next boot is attested if this one is; it is not where the server does not hear it within a minute.
pub async fn may_carry(api: &mut Api, machine: &MachineId, boot_id: &str) -> bool {
    let told = async {
        let list = work(|| {
            ima::settle();
            Ok(ima::list())
        });
        let (machine, boot_id) = (machine.clone(), boot_id.to_owned());
        let leave = Attestation::Leave { machine, boot_id, measured: HexBytes(list.await?) };
        api.attest::<Judged>(&leave).await
    };
    let refused = match timeout(LEAVES, told).await {
        Ok(Ok(judged)) => (judged.state == AttestationState::Failed).then_some(judged.reason),
        Ok(Err(error)) => Some(format!("{error} ({})", error.kind())),
        Err(_) => Some(format!("the server did not hear it within {} s", LEAVES.as_secs())),
    };
    if let Some(reason) = &refused {
        println!("kiln-agent: the next boot would not be attested by kexec: {}", log::said(reason));
    }
    refused.is_none()
}

async fn work<T: Send + 'static>(task: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    timeout(PATIENCE, blocking(task)).await.unwrap_or(Err(AgentError::SilentTpm { seconds: PATIENCE.as_secs() }))
}
