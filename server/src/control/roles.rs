//! What a role sets of the releases it is given.

use super::Control;
use crate::error::ControlError;
use kiln_protocol::{ExecChoice, ReleaseId};
use std::collections::BTreeMap;

impl Control {
    /// A role's thresholds for an agent that does not read what is signed of them.
    pub(super) fn thresholds(&self, role: Option<&String>) -> BTreeMap<String, String> {
        role.and_then(|role| self.config.roles.get(role))
            .map(|role| role.settings.thresholds.clone())
            .unwrap_or_default()
    }

    /// A role selects only what the release lets it: numbers of health checks that it declares, and programs on no list that
    /// start and are told. Of a release that says nothing of that, the agent tells.
    pub(super) fn check_role(&self, role: &str, release: &ReleaseId) -> Result<(), ControlError> {
        let catalog = self.catalog();
        let (Some(settings), Some(published)) = (self.config.roles.get(role), catalog.releases.get(release)) else {
            return Ok(());
        };
        if settings.settings.exec == ExecChoice::Report && published.manifest.role_may_report == Some(false) {
            return Err(ControlError::NoReport { role: role.to_owned(), release: release.clone() });
        }
        let checks = &published.manifest.health;
        for (name, threshold) in &settings.thresholds {
            let fits = checks
                .iter()
                .any(|check| check.title() == *name && check.limit.is_some() && threshold.fits(check.kind));
            if !fits {
                let known: Vec<String> = checks
                    .iter()
                    .filter_map(|check| check.limit.map(|limit| format!("{} ({limit})", check.title())))
                    .collect();
                return Err(ControlError::Threshold {
                    role: role.to_owned(),
                    name: name.clone(),
                    threshold: *threshold,
                    release: release.clone(),
                    known: if known.is_empty() { "none".into() } else { known.join(", ") },
                });
            }
        }
        Ok(())
    }
}
