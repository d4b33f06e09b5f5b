//! Who is issued a certificate, and when one that was issued holds no more. Which release declares one, and what was issued, is
//! the caller's.

use crate::grant::{Desire, desire};
use crate::machine::Machine;
use crate::orders::Errand;
use crate::secrets::Barred;
use crate::state::StateKind;
use kiln_protocol::{AttestationState, KeyId, KeyStorage, ReleaseId};
use serde::{Deserialize, Serialize};

/// Which machines a release wants a certificate for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateDemand {
    /// Each that is approved and in service.
    Approved,
    /// Those of them whose TPM has proven this boot.
    Attested,
}

/// Why a machine is issued no certificate now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum CertificateRefusal {
    #[error("its identity key was revoked")]
    KeyRevoked,
    #[error("it is known by name or position alone: its key is new at each boot, and proves no machine")]
    NameOnly,
    #[error("{reason}")]
    NotInService { reason: String },
    #[error("an operator ordered it to wipe its disks")]
    BeingWiped,
    #[error("its release does not run yet")]
    NotRunning,
    #[error("{release} wants no certificate, or is not published here")]
    NotDeclared { release: ReleaseId },
    #[error("it runs {release}, which is neither assigned to it nor the last that was good on it")]
    AnotherRelease { release: ReleaseId },
    #[error("{reason}")]
    Barred { reason: String },
    #[error("{release} wants certificates for attested boots only: {reason}")]
    NotAttested { release: ReleaseId, reason: String },
    #[error("its boot failed attestation: {reason}")]
    Failed { reason: String },
}

impl CertificateRefusal {
    /// The word for it in logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::KeyRevoked => "key-revoked",
            Self::NameOnly => "name-only",
            Self::NotInService { .. } => "not-in-service",
            Self::BeingWiped => "being-wiped",
            Self::NotRunning => "not-running",
            Self::NotDeclared { .. } => "not-declared",
            Self::AnotherRelease { .. } => "another-release",
            Self::Barred { .. } => "barred",
            Self::NotAttested { .. } => "not-attested",
            Self::Failed { .. } => "attestation-failed",
        }
    }
}

/// Why a certificate that was issued holds no more, before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CertificateEnd {
    /// The machine's identity key was taken away.
    KeyRevoked,
    /// The machine is out of service, or forgotten.
    OutOfService,
    /// Two claimed its name, or something else holds it until a person clears it.
    Quarantined,
    /// An operator ordered it to wipe its disks.
    Wiped,
    /// Another identity key is the machine's by now.
    OtherKey,
    /// It has another name by now, and the one in the certificate may be another machine's.
    OtherName,
    /// Its boot failed attestation: something else runs there than it says, or something was changed below it.
    Failed,
    /// Newer ones were issued.
    Superseded,
}

impl CertificateEnd {
    /// In a sentence.
    pub fn words(self) -> &'static str {
        match self {
            Self::KeyRevoked => "its machine's identity key was revoked",
            Self::OutOfService => "its machine is out of service",
            Self::Quarantined => "its machine was quarantined",
            Self::Wiped => "its machine is wiped",
            Self::OtherKey => "its machine has another identity key",
            Self::OtherName => "its machine has another name",
            Self::Failed => "its machine's boot failed attestation",
            Self::Superseded => "newer ones were issued",
        }
    }
}

impl Machine {
    /// Whether the machine that proved this key is issued a certificate now, where its running release wants one for these.
    pub fn certificate_due(
        &self,
        key: &KeyId,
        declared: Option<CertificateDemand>,
        barred: &Barred,
    ) -> Result<(), CertificateRefusal> {
        if self.key_revoked {
            return Err(CertificateRefusal::KeyRevoked);
        }
        let name_only = self.facts.as_ref().is_some_and(|facts| facts.key_storage == KeyStorage::Ephemeral);
        if name_only || self.position.is_some() {
            return Err(CertificateRefusal::NameOnly);
        }
        if let Desire::Wait(reason) = desire(self, key) {
            return Err(CertificateRefusal::NotInService { reason });
        }
        if self.is_being_wiped() {
            return Err(CertificateRefusal::BeingWiped);
        }
        let running = self.running.as_ref().ok_or(CertificateRefusal::NotRunning)?;
        let release = ReleaseId { image: running.image.clone(), release: running.release };
        let Some(demand) = declared else {
            return Err(CertificateRefusal::NotDeclared { release });
        };
        let assigned = self.assigned.as_ref().is_some_and(|assigned| assigned.release == release);
        if !assigned && self.last_good_here() != Some(&release) {
            return Err(CertificateRefusal::AnotherRelease { release });
        }
        if let Some(reason) = barred.reason(&release) {
            return Err(CertificateRefusal::Barred { reason });
        }
        // What its TPM says is worth more than its word: another system runs, or something was added to this one.
        if let (AttestationState::Failed, reason) = self.attestation() {
            return Err(CertificateRefusal::Failed { reason });
        }
        match demand {
            CertificateDemand::Approved => Ok(()),
            // What it takes to be given secrets, its role's policy included.
            CertificateDemand::Attested => match self.secrets_withheld(key, barred) {
                None => Ok(()),
                Some(reason) => Err(CertificateRefusal::NotAttested { release, reason }),
            },
        }
    }

    /// Why a certificate that was issued to the machine under this identity key and name holds no more; none: until its time is
    /// over. Of those that were issued before names were kept, the name is not known.
    pub fn certificate_ended(&self, of: &KeyId, name: Option<&str>) -> Option<CertificateEnd> {
        if self.key_revoked {
            return Some(CertificateEnd::KeyRevoked);
        }
        match self.state.kind {
            StateKind::Retired | StateKind::Discovered => return Some(CertificateEnd::OutOfService),
            StateKind::Quarantined => return Some(CertificateEnd::Quarantined),
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack => {}
        }
        if self.is_being_wiped() {
            return Some(CertificateEnd::Wiped);
        }
        if self.key.as_ref() != Some(of) {
            return Some(CertificateEnd::OtherKey);
        }
        if self.attestation().0 == AttestationState::Failed {
            return Some(CertificateEnd::Failed);
        }
        name.is_some_and(|name| name != self.title()).then_some(CertificateEnd::OtherName)
    }

    fn is_being_wiped(&self) -> bool {
        self.open_order().is_some_and(|order| order.errand == Errand::Wipe)
    }
}
