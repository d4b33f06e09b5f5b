//! Who may have secrets: a machine that is in service, whose TPM proved this boot, and that runs what it shall; no other. Which
//! secrets there are is the caller's.

use crate::event::Action;
use crate::grant::{Desire, desire};
use crate::machine::Machine;
use kiln_protocol::{AttestationState, KeyId, ReleaseId, Report, SecretVersions, SecretsWord, Via};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What a role demands of a boot before it gives it secrets. There is no weaker one: a machine without a proven TPM gets
/// none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SecretsPolicy {
    /// Attested; a kexec after an attested cold boot counts.
    #[default]
    Attested,
    /// Attested at its own cold boot: the machine never goes to another release by kexec.
    Cold,
}

impl SecretsPolicy {
    /// How a machine leaves that was to leave so.
    pub fn via(self, via: Via) -> Via {
        match self {
            Self::Attested => via,
            Self::Cold => Via::Cold,
        }
    }
}

/// Which releases the site has signed away: they may be genuine, and are known to be weak.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Barred {
    /// Lowest release that may run, by image.
    pub floors: BTreeMap<String, u64>,
    /// Whose boot programs firmware shall not start any more.
    pub revoked: BTreeSet<ReleaseId>,
}

impl Barred {
    pub(crate) fn reason(&self, release: &ReleaseId) -> Option<String> {
        let floor = self.floors.get(release.image.as_str()).copied().unwrap_or(1);
        if release.release < floor {
            return Some(format!("{release} is below the floor of its image, {floor}"));
        }
        self.revoked.contains(release).then(|| format!("{release} is revoked"))
    }
}

impl Machine {
    /// Why the machine that proved this key gets no secrets now; none: it may have them.
    pub fn secrets_withheld(&self, key: &KeyId, barred: &Barred) -> Option<String> {
        if self.key_revoked {
            return Some("its identity key was revoked".to_owned());
        }
        if let Some(place) = &self.position {
            return Some(format!("it is known by its position ({place}) alone, which proves no machine"));
        }
        if let Desire::Wait(reason) = desire(self, key) {
            return Some(reason);
        }
        let Some(running) = &self.running else {
            return Some("its release does not run yet".to_owned());
        };
        let (state, reason) = self.attestation();
        let Some(proof) = self.proof().filter(|_| state == AttestationState::Attested) else {
            return Some(format!("secrets go to attested boots only, and this one is {state}: {reason}"));
        };
        let Some(cold) = &self.attestations.cold else {
            return Some("no boot of it was proven".to_owned());
        };
        let running = ReleaseId { image: running.image.clone(), release: running.release };
        if !proof.carried && cold.release != running {
            return Some(format!("its TPM says that firmware started {}, and it says it runs {running}", cold.release));
        }
        let assigned = self.assigned.as_ref().is_some_and(|assigned| assigned.release == running);
        if !assigned && self.last_good_here() != Some(&running) {
            return Some(format!(
                "it runs {running}, which is neither assigned to it nor the last that was good on it"
            ));
        }
        // What firmware started could have begun anything in place of the next one, if it is weak.
        if let Some(reason) = [&running, &cold.release].into_iter().find_map(|release| barred.reason(release)) {
            return Some(reason);
        }
        match (proof.carried, self.secrets_policy) {
            (false, _) | (true, SecretsPolicy::Attested) => None,
            (true, SecretsPolicy::Cold) => Some(
                "its role gives secrets only to cold boots, and this one came by kexec: restart the machine".to_owned(),
            ),
        }
    }

    /// What a machine that proved this key is told, where `wanted` is what there is for it.
    pub fn secrets_word(&self, key: &KeyId, wanted: &SecretVersions, barred: &Barred) -> Option<SecretsWord> {
        // Somebody else's report changes nothing here, and gets no word.
        if self.key.as_ref() != Some(key) || self.secrets == *wanted {
            return None;
        }
        if wanted.is_empty() {
            return Some(SecretsWord::Drop);
        }
        self.secrets_withheld(key, barred).is_none().then_some(SecretsWord::Ask)
    }

    /// Takes in what it says that it holds. Whether that is news.
    pub(crate) fn note_secrets(&mut self, report: &Report, out: &mut Vec<Action>) -> bool {
        let held = report.secrets.clone().unwrap_or_default();
        if self.secrets == held {
            return false;
        }
        if !held.is_empty() {
            let names: Vec<String> = held.iter().map(|(name, version)| format!("{name} (version {version})")).collect();
            out.push(Action::Say { warn: false, text: format!("holds the secrets {}", names.join(", ")) });
        }
        self.secrets = held;
        true
    }
}
