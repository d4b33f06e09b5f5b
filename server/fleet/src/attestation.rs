//! What a machine's TPM proved, boot by boot: which TPM it is (its endorsement key, pinned at approval), and what it booted.

use crate::Millis;
use crate::event::Action;
use crate::machine::Machine;
use crate::protection::Recorded;
use crate::step::{save, wake};
use kiln_protocol::{AttestationState, KeyId, ProtectionClass, ReleaseId, Sha256Hex, TpmPresence};
use serde::{Deserialize, Serialize};

/// Names of the parts of [`Pinned::firmware`], for people.
const FIRMWARE: [&str; 4] =
    ["firmware (PCR 0)", "its settings (PCR 1)", "option ROMs (PCR 2)", "their settings (PCR 3)"];

/// What a person approved of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pinned {
    /// SHA-256 of its TPM's endorsement key (SPKI).
    pub endorsement: Sha256Hex,
    /// Of what was measured into PCRs 0 to 3, from the first boot on that was proven.
    pub firmware: Option<[Sha256Hex; 4]>,
}

/// What came of the proof of one boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootProof {
    /// The kernel's boot id.
    pub boot_id: String,
    /// The endorsement key that was proven; none: not even that.
    pub endorsement: Option<Sha256Hex>,
    /// The verdict.
    pub state: AttestationState,
    /// Why, in a sentence.
    pub reason: String,
    /// When.
    pub at: Millis,
    /// It is a kexec after the cold boot that was proven.
    pub carried: bool,
    /// Of PCRs 0 to 3, where they were read.
    pub firmware: Option<[Sha256Hex; 4]>,
}

/// The cold boot that was proven last: what a kexec after it is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdBoot {
    /// Its kernel's boot id.
    pub boot_id: String,
    /// The TPM's count of starts.
    pub resets: u32,
    /// And of resumes.
    pub restarts: u32,
    /// What firmware started.
    pub release: ReleaseId,
    /// PCR 11 in its initramfs, by its release.
    pub pcr11: Sha256Hex,
    /// All quoted PCRs, hex, in the order of [`kiln_protocol::tpm::QUOTED`].
    pub pcrs: Vec<Sha256Hex>,
    /// Of PCRs 0 to 3.
    pub firmware: [Sha256Hex; 4],
    /// Its release's agent has kexecs measured, or says in PCR 10 that they are not.
    #[serde(default)]
    pub measures: bool,
    /// Its firmware's db has more than the site's certificate and the hashes of single images.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub others: bool,
}

/// How PCR 10 stood when a kernel began, by a proof of its boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Began {
    /// The kernel's boot id.
    pub boot_id: String,
    /// The value before all that this kernel measured.
    pub pcr10: Sha256Hex,
    /// This kernel and those before it since the cold boot measured what they loaded.
    pub measured: bool,
}

/// What a kernel said before a kexec. It is a claim: the next kernel's proof bears it out, or does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Which kernel.
    pub boot_id: String,
    /// PCR 10, after all that it measured.
    pub pcr10: Sha256Hex,
    /// As [`Began::measured`].
    pub measured: bool,
    /// The releases that it has loaded; or what it loaded besides, in a sentence.
    pub loaded: Result<Vec<ReleaseId>, String>,
}

/// All that is remembered of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attestations {
    /// What a person approved.
    #[serde(default)]
    pub pinned: Option<Pinned>,
    /// Of the newest boot.
    #[serde(default)]
    pub boot: Option<BootProof>,
    /// Of the cold boot before, or of this one.
    #[serde(default)]
    pub cold: Option<ColdBoot>,
    /// How the kernel began that was proven last, where its list was judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<Began>,
    /// The newest word before a kexec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<Left>,
    /// Digests of its option ROMs, of the newest proof that came with an event log, whatever the verdict was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub option_roms: Option<Vec<Sha256Hex>>,
    /// What the audit log says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recorded: Option<Recorded>,
}

/// A proof that was checked, good or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proven {
    /// The key that TLS proved.
    pub key: KeyId,
    /// Of which boot.
    pub boot_id: String,
    /// The endorsement key, if the credential was opened by it and the quote is its attestation key's.
    pub endorsement: Option<Sha256Hex>,
    /// Digests of the option ROMs that the quote confirms; none: there was no such log.
    pub option_roms: Option<Vec<Sha256Hex>>,
    /// What it booted; or how it stands, and why.
    pub booted: Result<ProvenBoot, (AttestationState, String)>,
}

/// What firmware started, by the quote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvenBoot {
    /// The cold boot.
    pub cold: ColdBoot,
    /// It is a later kernel that was started by kexec.
    pub carried: bool,
    /// What its kernel's list says; none: the release that firmware started has nothing measured.
    pub began: Option<Began>,
}

impl ProvenBoot {
    /// In a sentence.
    fn reason(&self) -> String {
        let release = &self.cold.release;
        let measured = self.began.as_ref().map(|began| began.measured);
        let words = match (self.carried, measured) {
            (true, Some(true)) => format!("attested at cold boot ({release}), carried by kexec"),
            (true, Some(false) | None) => format!("attested at cold boot ({release}), carried by kexec, unmeasured"),
            (false, Some(true) | None) => format!("firmware started {release} as it was signed, under the site's key"),
            (false, Some(false)) => {
                format!(
                    "firmware started {release} as it was signed, under the site's key; its kernel measures no kexec"
                )
            }
        };
        if self.cold.others { format!("{words}; db lets in more than the site's key") } else { words }
    }
}

impl Machine {
    /// The proof of the boot that goes on, if there is one.
    pub fn proof(&self) -> Option<&BootProof> {
        let current = self.boots.back()?;
        self.attestations.boot.as_ref().filter(|proof| proof.boot_id == current.boot_id)
    }

    /// How its boot stands, and why.
    pub fn attestation(&self) -> (AttestationState, String) {
        if let Some(proof) = self.proof() {
            return (proof.state, proof.reason.clone());
        }
        let pinned = self.attestations.pinned.is_some();
        let tpm = self.facts.as_ref().and_then(|facts| facts.tpm);
        let (state, reason) = match tpm {
            None => (AttestationState::Unattested, "its agent does not ask its TPM: its release is too old"),
            Some(TpmPresence::Absent) if pinned => {
                (AttestationState::Failed, "the TPM that it was approved with is gone, or this is another machine")
            }
            Some(TpmPresence::Absent) => (AttestationState::NoTpm, "it has no TPM, or its boot image no driver for it"),
            Some(TpmPresence::Unusable) => {
                (AttestationState::Unattested, "it has a TPM that its agent cannot use: is its SHA-256 bank off?")
            }
            Some(TpmPresence::Ready) => (AttestationState::Unattested, "its TPM has proven nothing in this boot yet"),
        };
        (state, reason.to_owned())
    }

    /// What its boot can promise, by what is proven, else by its own word.
    pub fn protection(&self) -> Option<ProtectionClass> {
        let word = self.facts.as_ref()?.protection;
        Some(match self.attestation().0 {
            AttestationState::Attested => ProtectionClass::Attested,
            AttestationState::Failed => ProtectionClass::Unprotected,
            AttestationState::Unattested | AttestationState::NoTpm => word,
        })
    }

    /// The server would take a proof of this boot from this key.
    pub fn wants_proof(&self, key: &KeyId) -> bool {
        let ready = self.facts.as_ref().is_some_and(|facts| facts.tpm == Some(TpmPresence::Ready));
        ready && self.key.as_ref() == Some(key) && self.proof().is_none()
    }

    /// Why this boot gets no release: its TPM is pinned and was not proven, or its role demands more.
    pub(crate) fn unproven(&self) -> Option<String> {
        let title = self.title();
        let (state, reason) = self.attestation();
        if let Some(pinned) = &self.attestations.pinned
            && self.proof().and_then(|proof| proof.endorsement.as_ref()) != Some(&pinned.endorsement)
        {
            return Some(format!(
                "it has not proven the TPM that {title} was approved with: {reason}. If the TPM was replaced, run \
                 `kiln machine accept {title}`"
            ));
        }
        (self.attested_only && state != AttestationState::Attested)
            .then(|| format!("its role gives releases only to attested boots, and this one is {state}: {reason}"))
    }

    /// Takes a proof in.
    pub(crate) fn proven(&mut self, proven: Proven, now: Millis, out: &mut Vec<Action>) {
        let current = self.boots.back().map(|boot| boot.boot_id.as_str());
        if self.key.as_ref() != Some(&proven.key) || current != Some(proven.boot_id.as_str()) {
            // Another boot has begun since the question was asked.
            return;
        }
        if let Some(roms) = &proven.option_roms {
            self.attestations.option_roms = Some(roms.clone());
        }
        let Proven { boot_id, endorsement, booted, .. } = proven;
        let (mut state, mut reason, carried, firmware) = match booted {
            Ok(booted) => {
                let words = booted.reason();
                let ProvenBoot { cold, carried, began } = booted;
                self.attestations.began = began;
                let firmware = cold.firmware.clone();
                self.attestations.cold = Some(cold);
                (AttestationState::Attested, words, carried, Some(firmware))
            }
            Err((state, reason)) => (state, reason, false, None),
        };
        if let Some(pinned) = &self.attestations.pinned
            && let Some(problem) = pinned.differs(endorsement.as_ref(), firmware.as_ref())
        {
            state = AttestationState::Failed;
            reason = format!("{problem}; if you know why, run `kiln machine accept {}`", self.title());
        }
        if self.attestations.boot.as_ref().is_none_or(|old| (old.state, &old.reason) != (state, &reason)) {
            let warn = state == AttestationState::Failed;
            out.push(Action::Say { warn, text: format!("{state}: {reason}") });
        }
        self.attestations.boot = Some(BootProof { boot_id, endorsement, state, reason, at: now, carried, firmware });
        if self.state.kind.in_fleet() {
            self.pin_tpm();
        }
        save(out);
        wake(out);
    }

    /// It says what its kernel measured, before a kexec.
    pub(crate) fn leaves(&mut self, left: Left, out: &mut Vec<Action>) {
        if self.boots.back().is_none_or(|boot| boot.boot_id != left.boot_id) {
            // Another boot has begun since.
            return;
        }
        if let Err(reason) = &left.loaded {
            out.push(Action::Say { warn: true, text: reason.clone() });
        }
        self.attestations.left = Some(left);
        save(out);
    }

    /// What was proven in this boot is what a person approved, where nothing was pinned before.
    pub(crate) fn pin_tpm(&mut self) {
        let Some(proof) = self.proof() else { return };
        let (endorsement, firmware) = (proof.endorsement.clone(), proof.firmware.clone());
        match &mut self.attestations.pinned {
            None => {
                self.attestations.pinned = endorsement.map(|endorsement| Pinned { endorsement, firmware });
            }
            Some(pinned) if endorsement.as_ref() == Some(&pinned.endorsement) && pinned.firmware.is_none() => {
                pinned.firmware = firmware;
            }
            Some(_) => {}
        }
    }

    /// A person accepts TPM and firmware as they are: what the next proof shows is pinned.
    pub(crate) fn accept_tpm(&mut self, out: &mut Vec<Action>) {
        let Attestations { left, recorded, .. } = std::mem::take(&mut self.attestations);
        self.attestations = Attestations { left, recorded, ..Attestations::default() };
        save(out);
        wake(out);
    }
}

impl Pinned {
    /// In what a proof differs from it.
    fn differs(&self, endorsement: Option<&Sha256Hex>, firmware: Option<&[Sha256Hex; 4]>) -> Option<String> {
        let endorsement = endorsement?;
        if *endorsement != self.endorsement {
            return Some(format!(
                "another TPM: its endorsement key is {}…, approved was {}…",
                &endorsement.as_str()[..12],
                &self.endorsement.as_str()[..12]
            ));
        }
        let (is, was) = (firmware?, self.firmware.as_ref()?);
        let changed: Vec<&str> =
            FIRMWARE.into_iter().zip(is.iter().zip(was)).filter(|(_, (is, was))| is != was).map(|(n, _)| n).collect();
        (!changed.is_empty()).then(|| format!("firmware changed: {}", changed.join(", ")))
    }
}
