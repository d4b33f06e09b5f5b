//! What a role sets of the releases it is given.

use super::Control;
use crate::error::ControlError;
use kiln_protocol::ReleaseId;
use std::collections::BTreeMap;

impl Control {
    /// A role's thresholds for the agent.
    pub(super) fn thresholds(&self, role: Option<&String>) -> BTreeMap<String, String> {
        let role = role.and_then(|role| self.config.roles.get(role));
        let each = role.into_iter().flat_map(|role| &role.thresholds);
        each.map(|(name, threshold)| (name.clone(), threshold.to_string())).collect()
    }

    /// A role sets only numbers of health checks that the release declares.
    pub(super) fn check_thresholds(&self, role: &str, release: &ReleaseId) -> Result<(), ControlError> {
        let catalog = self.catalog();
        let (Some(settings), Some(published)) = (self.config.roles.get(role), catalog.releases.get(release)) else {
            return Ok(());
        };
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
