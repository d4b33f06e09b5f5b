//! Proofs of what machines booted: the question, and the verdict on its answer. What was asked is kept in memory only, and is
//! good once: a server that starts again asks again.

use super::kexecs::{self, Kernel};
use super::secrets::{Asks, barred};
use super::{Control, Pending, now_ms};
use crate::catalog::Catalog;
use crate::credential;
use crate::error::{AttestationError, ControlError, SecretError};
use kiln_fleet::{ColdBoot, Event, Machine, Millis, Proven, ProvenBoot};
use kiln_protocol::tpm::{self, EccPoint, QUOTED, Quote, Template};
use kiln_protocol::{
    Attestation, AttestationState, Challenge, Firmware, HexBytes, Judged, KeyId, MachineId, Nonce, ReleaseId, Sha256Hex,
};
use kiln_release::measured::{self, Doubt, Evidence, Finding, IMA_PCR, Quoted};
use kiln_release::{Measured, hex};
use ring::rand::{SecureRandom, SystemRandom};
use std::collections::{BTreeMap, BTreeSet};

/// A machine is asked so often in a minute.
const A_MINUTE: u32 = 8;
const MINUTE_MS: Millis = 60_000;
/// An answer comes within so long: a slow TPM takes seconds.
const PATIENCE_MS: Millis = 120_000;

/// What machines were asked.
#[derive(Debug, Default)]
pub(crate) struct Questions(BTreeMap<MachineId, Question>);

impl Questions {
    /// A machine was forgotten.
    pub(super) fn forget(&mut self, id: &MachineId) {
        self.0.remove(id);
    }

    /// One step more of this machine's.
    pub(super) fn count(&mut self, machine: &MachineId, now: Millis) -> Result<&mut Question, AttestationError> {
        let new = Question { since: now, count: 0, at: now, asked: None };
        let question = self.0.entry(machine.clone()).or_insert(new);
        if now >= question.since.saturating_add(MINUTE_MS) {
            (question.since, question.count) = (now, 0);
        }
        question.count += 1;
        if question.count > A_MINUTE { Err(AttestationError::TooOften) } else { Ok(question) }
    }
}

#[derive(Debug)]
pub(super) struct Question {
    /// The minute that is counted began then.
    since: Millis,
    count: u32,
    at: Millis,
    asked: Option<Asked>,
}

struct Asked {
    key: KeyId,
    boot_id: String,
    endorsement: Sha256Hex,
    endorsement_point: EccPoint,
    attestation: EccPoint,
    nonce: Nonce,
    secret: [u8; 32],
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asked").field("key", &self.key).field("boot_id", &self.boot_id).finish_non_exhaustive()
    }
}

/// What the server answers.
#[derive(Debug, serde::Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// To the first step.
    Challenge(Challenge),
    /// To the second.
    Judged(Judged),
}

/// The second step.
struct Shown {
    secret: Sha256Hex,
    pcrs: Vec<Sha256Hex>,
    quote: Quote,
    log: Vec<u8>,
    /// What its kernel measured.
    measured: Vec<u8>,
    /// Public area of what its secrets shall be sealed to.
    delivery: Option<Vec<u8>>,
}

fn random() -> Result<[u8; 32], AttestationError> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).map_err(|_| AttestationError::Random)?;
    Ok(bytes)
}

pub(super) fn id(bytes: &[u8; 32]) -> Sha256Hex {
    hex::encode(bytes).parse().expect("32 bytes are 64 hex digits")
}

pub(super) fn raw(id: &Sha256Hex) -> [u8; 32] {
    hex::decode(id.as_str()).and_then(|bytes| bytes.try_into().ok()).expect("64 hex digits are 32 bytes")
}

impl Control {
    /// The machine's TPM is to be asked.
    pub(super) fn wants_proof(&self, id: &MachineId, key: &KeyId) -> bool {
        self.look().machines.get(id).is_some_and(|machine| machine.wants_proof(key))
    }

    /// One step of a machine that has proved this key.
    pub async fn attest(&self, key: &KeyId, step: Attestation) -> Result<Answer, ControlError> {
        match step {
            Attestation::Hello { machine, boot_id, endorsement, attestation } => {
                Ok(Answer::Challenge(self.ask_tpm(key, &machine, boot_id, &endorsement.0, &attestation.0)?))
            }
            Attestation::Prove { machine, boot_id, secret, pcrs, quoted, signature, event_log, measured, delivery } => {
                let quote = Quote { attest: quoted.0, signature: signature.0 };
                let delivery = delivery.map(|area| area.0);
                let shown = Shown { secret, pcrs, quote, log: event_log.0, measured: measured.0, delivery };
                Ok(Answer::Judged(self.judge(key, &machine, &boot_id, &shown).await?))
            }
            Attestation::Leave { machine, boot_id, measured } => {
                Ok(Answer::Judged(self.leaves(key, &machine, &boot_id, &measured.0).await?))
            }
        }
    }

    fn ask_tpm(
        &self,
        key: &KeyId,
        machine: &MachineId,
        boot_id: String,
        endorsement: &[u8],
        attestation: &[u8],
    ) -> Result<Challenge, AttestationError> {
        let key_error = AttestationError::Key;
        let endorsement = Template::Endorsement.point(endorsement).map_err(key_error)?;
        let name = tpm::name_of(attestation);
        let attestation = Template::Attestation.point(attestation).map_err(key_error)?;
        let now = now_ms();
        {
            let mut inner = self.lock();
            let inner = &mut *inner;
            if !speaks(inner.machines.get(machine), key, &boot_id) {
                return Err(AttestationError::NotReported);
            }
            let question = inner.attestations.count(machine, now)?;
            (question.at, question.asked) = (now, None);
        }
        let (nonce, secret) = (random()?, random()?);
        let credential = credential::wrap(&secret, &endorsement, &name)?;
        let nonce: Nonce = hex::encode(&nonce).parse().expect("32 bytes are 64 hex digits");
        let spki = hex::sha256(&tpm::spki_of(&endorsement)).parse().expect("a SHA-256 in hex");
        let asked = Asked {
            key: key.clone(),
            boot_id,
            endorsement: spki,
            endorsement_point: endorsement,
            attestation,
            nonce: nonce.clone(),
            secret,
        };
        if let Some(question) = self.lock().attestations.0.get_mut(machine) {
            question.asked = Some(asked);
        }
        Ok(Challenge {
            nonce,
            id_object: HexBytes(credential.id_object),
            encrypted_secret: HexBytes(credential.encrypted_secret),
        })
    }

    async fn judge(
        &self,
        key: &KeyId,
        machine: &MachineId,
        boot_id: &str,
        shown: &Shown,
    ) -> Result<Judged, ControlError> {
        let now = now_ms();
        let (asked, known) = {
            let mut inner = self.lock();
            let question = inner.attestations.0.get_mut(machine).ok_or(AttestationError::NotAsked)?;
            let fresh = now < question.at.saturating_add(PATIENCE_MS);
            // Whatever comes of it: each question is good for one answer.
            let asked = question.asked.take().filter(|_| fresh).ok_or(AttestationError::NotAsked)?;
            let known = inner.machines.get(machine).filter(|m| speaks(Some(m), key, boot_id)).cloned();
            (asked, known.ok_or(AttestationError::NotReported)?)
        };
        if asked.key != *key || asked.boot_id != boot_id {
            return Err(AttestationError::NotAsked.into());
        }
        let failed = |reason: &str| Err((AttestationState::Failed, reason.to_owned()));
        let (endorsement, booted) = match prove(&asked, shown) {
            Err(reason) => (None, failed(&reason)),
            Ok(clock) => {
                let booted = verdict(&known, boot_id, &self.catalog(), shown, clock);
                (Some(asked.endorsement.clone()), booted)
            }
        };
        // By this proof and no other: one that failed gets nothing, whatever was proven before it.
        let holds = booted.is_ok();
        let option_roms = endorsement.as_ref().and_then(|_| option_roms(shown));
        let proven = Proven { key: key.clone(), boot_id: boot_id.to_owned(), endorsement, option_roms, booted };
        let (pending, judged) = {
            let mut inner = self.lock();
            let mut pending = Pending::default();
            self.step(&mut inner, machine, Event::Proven(Box::new(proven)), now, &mut pending)?;
            let (state, reason) = inner
                .machines
                .get(machine)
                .map_or_else(|| (AttestationState::Unattested, "it was forgotten".to_owned()), Machine::attestation);
            let asks = shown.delivery.as_ref().map(|delivery| {
                if !holds {
                    return Err(SecretError::Withheld(format!("secrets go to attested boots only: {reason}")));
                }
                let pcrs: Vec<[u8; 32]> = shown.pcrs.iter().map(raw).collect();
                let (nonce, endorsement) = (&asked.nonce, &asked.endorsement_point);
                let asks = Asks { id: machine, key, boot_id, nonce, endorsement, pcrs: &pcrs, delivery };
                self.deliver(&inner, &asks, &mut pending)
            });
            let (secrets, refused) = match asks {
                None => (None, None),
                Some(Ok(delivered)) => (Some(delivered), None),
                Some(Err(error)) => (None, Some(error.to_string())),
            };
            (pending, Judged { state, reason, secrets, refused })
        };
        self.finish(pending).await?;
        Ok(judged)
    }
}

/// It is the machine's own key, in the boot that it reported last.
pub(super) fn speaks(machine: Option<&Machine>, key: &KeyId, boot_id: &str) -> bool {
    machine.is_some_and(|m| m.key.as_ref() == Some(key) && m.boots.back().is_some_and(|b| b.boot_id == boot_id))
}

/// That the TPM with this endorsement key made the quote, for this question and this key, over these PCR values.
fn prove(asked: &Asked, shown: &Shown) -> Result<tpm::ClockInfo, String> {
    // Random, and good once: nothing is learnt from how long this takes.
    if raw(&shown.secret) != asked.secret {
        return Err(
            "the credential was not opened: the attestation key is not in the TPM with that endorsement key".into()
        );
    }
    let quote = shown.quote.verify(&asked.attestation).map_err(|error| error.to_string())?;
    if quote.qualifying != tpm::qualifying_data(asked.nonce.as_str(), asked.key.as_str(), &asked.boot_id) {
        return Err(
            "the quote is not of this question, this key and this boot: an old one, or another machine's".into()
        );
    }
    let values: Vec<[u8; 32]> = shown.pcrs.iter().map(raw).collect();
    if values.len() != QUOTED.len() || tpm::pcr_digest(values.iter()) != quote.pcr_digest {
        return Err("the PCR values are not the quoted ones".into());
    }
    Ok(quote.clock)
}

/// What is in the machine's option ROMs, where an event log says so that the quoted values confirm: also of a boot that is not
/// attested, because they are wanted before the firmware trusts the site alone.
fn option_roms(shown: &Shown) -> Option<Vec<Sha256Hex>> {
    let values: Vec<[u8; 32]> = shown.pcrs.iter().map(raw).collect();
    let evidence = measured::read(&shown.log, Quoted { pcrs: &QUOTED, values: &values }).ok()?;
    Some(evidence.option_roms().iter().map(|rom| rom.parse().expect("a SHA-256 in hex")).collect())
}

/// What the values say of the boot.
fn verdict(
    machine: &Machine,
    boot_id: &str,
    catalog: &Catalog,
    shown: &Shown,
    clock: tpm::ClockInfo,
) -> Result<ProvenBoot, (AttestationState, String)> {
    let doubt = |reason: String| (AttestationState::Unattested, reason);
    let fault = |reason: String| (AttestationState::Failed, reason);
    if machine.facts.as_ref().is_none_or(|facts| facts.firmware != Firmware::Uefi) {
        return Err(doubt("it boots by BIOS, which measures no boot program that the site could name".into()));
    }
    let values: Vec<[u8; 32]> = shown.pcrs.iter().map(raw).collect();
    let quoted = Quoted { pcrs: &QUOTED, values: &values };
    let embedded = machine.embedded.as_ref().map(|r| ReleaseId { image: r.image.clone(), release: r.release });
    let told = |finding: Finding| match finding {
        Finding::Doubt(doubt) => (AttestationState::Unattested, doubt.to_string()),
        Finding::Fault(fault) => (AttestationState::Failed, fault.to_string()),
    };
    let pcr10 = quoted.value(IMA_PCR).unwrap_or_default();
    let kernel = Kernel { machine, boot_id, embedded: embedded.as_ref(), catalog, list: &shown.measured, pcr10 };
    let evidence = match measured::read(&shown.log, quoted) {
        // A kernel that was started by kexec may have lost the log. The PCRs are those of the cold boot all the same.
        Err(Finding::Doubt(Doubt::NoLog)) => return without_log(&kernel, quoted, &shown.pcrs, clock, told),
        evidence => evidence.map_err(told)?,
    };
    let (release, named) = started(&evidence, catalog, embedded.as_ref()).map_err(fault)?;
    let Some(named) = named else {
        return Err(doubt(format!("{release} was built before Kiln predicted what a TPM measures: build a newer one")));
    };
    let booted = measured::judge(&evidence, named, &loaders(catalog)).map_err(told)?;
    let here = embedded.as_ref() == Some(&release);
    if booted.caps == 0 && !here {
        let says = embedded.map_or_else(|| "nothing".to_owned(), |r| r.to_string());
        return Err(fault(format!("firmware started {release}, and its agent says that it is {says}")));
    }
    let before = machine.attestations.cold.as_ref().filter(|cold| same_start(cold, clock));
    let carried = by_kexec(booted.caps, before.map(|cold| cold.boot_id.as_str()), boot_id, here);
    let measures = named.kexec.is_some();
    let began = kexecs::began(&kernel, measures, carried).map_err(|found| fault(found.to_string()))?;
    let boot_id = before.filter(|_| carried).map_or_else(|| boot_id.to_owned(), |cold| cold.boot_id.clone());
    let pcr11 = named.pcr11.parse().map_err(|_| fault("its manifest's PCR 11 is no SHA-256".into()))?;
    let firmware = booted.firmware.map(|part| part.parse().expect("measured::judge gives SHA-256 in hex"));
    let (resets, restarts, pcrs, others) = (clock.resets, clock.restarts, shown.pcrs.clone(), booted.others);
    let cold = ColdBoot { boot_id, resets, restarts, release, pcr11, pcrs, firmware, measures, others };
    Ok(ProvenBoot { cold, carried, began })
}

/// Boot loaders that a disk may have from another release than the one that it starts. Not those that only revoked releases
/// bring; a floor says nothing of a loader, which stays on the disk when its release is replaced.
fn loaders(catalog: &Catalog) -> BTreeSet<String> {
    let revoked = barred(catalog).revoked;
    let releases = catalog.releases.iter().filter(|(id, _)| !revoked.contains(id));
    releases.filter_map(|(_, release)| release.manifest.measured.as_ref()?.loader.clone()).collect()
}

/// Whether a kexec started this kernel, by how often PCR 11 was capped: once where an initramfs is left, and once more before a
/// kexec, whatever boot it calls itself by then. `cold` is the cold boot that was proven under the same start of the TPM; `here`:
/// it embeds what firmware started.
fn by_kexec(caps: u32, cold: Option<&str>, boot_id: &str, here: bool) -> bool {
    caps > 1 || (caps > 0 && cold.map_or(!here, |cold| cold != boot_id))
}

/// The published release whose UKI firmware started last.
fn started<'a>(
    evidence: &Evidence<'_>,
    catalog: &'a Catalog,
    embedded: Option<&ReleaseId>,
) -> Result<(ReleaseId, Option<&'a Measured>), String> {
    let programs = evidence.programs();
    let of = |program: &String| {
        catalog.releases.iter().find(|(_, r)| r.manifest.measured.as_ref().is_some_and(|m| m.uki == *program))
    };
    if let Some((id, release)) = programs.iter().rev().find_map(of) {
        return Ok((id.clone(), release.manifest.measured.as_ref()));
    }
    match embedded.and_then(|id| Some((id, catalog.releases.get(id)?))) {
        Some((id, release)) if release.manifest.measured.is_none() => Ok((id.clone(), None)),
        Some(_) | None => Err(match programs.last() {
            Some(program) => format!("firmware started {program}, which is no release published here (PCR 4)"),
            None => "firmware started no boot program that it measured (PCR 4)".into(),
        }),
    }
}

fn same_start(cold: &ColdBoot, clock: tpm::ClockInfo) -> bool {
    (cold.resets, cold.restarts) == (clock.resets, clock.restarts)
}

/// A boot whose kernel has no event log: it is a kexec after the cold boot that was proven, with the same PCRs.
fn without_log(
    kernel: &Kernel<'_>,
    quoted: Quoted<'_>,
    pcrs: &[Sha256Hex],
    clock: tpm::ClockInfo,
    told: impl Fn(Finding) -> (AttestationState, String),
) -> Result<ProvenBoot, (AttestationState, String)> {
    let Some(cold) = kernel.machine.attestations.cold.as_ref().filter(|cold| same_start(cold, clock)) else {
        return Err(told(Doubt::NoLog.into()));
    };
    for (pcr, (is, was)) in QUOTED.iter().zip(pcrs.iter().zip(&cold.pcrs)) {
        // 10 takes what the kernel measures and is judged by itself, 11 the caps.
        if !matches!(pcr, 10 | 11) && is != was {
            let reason = format!("PCR {pcr} has changed since the cold boot that was attested");
            return Err((AttestationState::Failed, reason));
        }
    }
    let pcr11 = quoted.value(11).unwrap_or_default();
    match measured::caps(raw(&cold.pcr11), pcr11) {
        Some(caps) => {
            let carried = by_kexec(caps, Some(&cold.boot_id), kernel.boot_id, false);
            let began = kexecs::began(kernel, cold.measures, carried);
            let began = began.map_err(|found| (AttestationState::Failed, found.to_string()))?;
            Ok(ProvenBoot { cold: ColdBoot { pcrs: pcrs.to_vec(), ..cold.clone() }, carried, began })
        }
        None => {
            let (expected, got) = (cold.pcr11.to_string(), id(&pcr11).to_string());
            Err(told(measured::Fault::Pcr11 { expected, got }.into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::by_kexec;

    #[test]
    fn a_kexec_is_seen_by_its_cap_whatever_the_kernel_calls_itself() {
        // In the initramfs, and in the system that it started.
        assert!(!by_kexec(0, None, "a", true) && !by_kexec(1, None, "a", true) && !by_kexec(1, Some("a"), "a", true));
        // In the next kernel's initramfs, before its cap.
        assert!(by_kexec(1, Some("a"), "b", true) && by_kexec(1, None, "b", false));
        // And after: also of the same release, and under the name of the boot before.
        for (cold, boot_id, here) in [(Some("a"), "b", true), (Some("a"), "a", true), (None, "b", true)] {
            assert!(by_kexec(2, cold, boot_id, here) && by_kexec(3, cold, boot_id, here));
        }
    }
}
