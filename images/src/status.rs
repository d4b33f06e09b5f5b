//! `kiln trust status`: each TUF role with its version, dates, keys and signers, and what waits for signatures.

use crate::files::read_capped;
use crate::repository::{newest_state, served_state};
use crate::request::{Lacking, Need};
use crate::signers::Signers;
use crate::signing::site_document;
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::tuf::{Outcome, Root, Snapshot, Targets, TimestampRole};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

const MAX_FILE: u64 = 1 << 20;

/// How near an end is. Ends of what is signed offline are told of 90, 30 and 7 days ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nearness {
    /// More than 90 days.
    Far,
    /// At most 90 days.
    Within90Days,
    /// At most 30 days.
    Within30Days,
    /// At most 7 days.
    Within7Days,
    /// Over.
    Expired,
}

impl Nearness {
    /// At `now`.
    pub fn of(expires: Timestamp, now: Timestamp) -> Self {
        let left = expires.duration_since(now);
        let days = |days: i64| jiff::SignedDuration::from_hours(days * 24);
        match left {
            left if left <= jiff::SignedDuration::ZERO => Self::Expired,
            left if left <= days(7) => Self::Within7Days,
            left if left <= days(30) => Self::Within30Days,
            left if left <= days(90) => Self::Within90Days,
            _ => Self::Far,
        }
    }

    /// In words; none where nothing is to be done.
    pub fn warning(self) -> Option<&'static str> {
        match self {
            Self::Far => None,
            Self::Within90Days => Some("expires within 90 days"),
            Self::Within30Days => Some("expires within 30 days"),
            Self::Within7Days => Some("expires within 7 days"),
            Self::Expired => Some("has EXPIRED: machines stay on what they have and start nothing new"),
        }
    }
}

/// One role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RoleStatus {
    /// `root`, `targets`, `snapshot`, `timestamp`, `image-NAME`.
    pub role: String,
    /// Version in force.
    pub version: u64,
    /// When it expires.
    pub expires: Timestamp,
    /// Whole days until then; below 0 afterwards.
    pub days_left: i64,
    /// How near that is; `far` for a timestamp, which `kiln serve` signs every hour, as long as it holds.
    pub nearness: Nearness,
    /// So many keys must sign.
    pub threshold: u32,
    /// Its keys.
    pub keys: Vec<KeyStatus>,
}

/// One key of a role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyStatus {
    /// Key id: the fingerprint without spaces.
    pub keyid: String,
    /// What it is called at the site.
    pub name: Option<String>,
    /// Whether it has signed the version in force.
    pub signed: bool,
}

/// The open request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RequestStatus {
    /// What it is called.
    pub name: String,
    /// What it lacks.
    pub lacking: Vec<Lacking>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TrustStatus {
    /// The site's name.
    pub site: String,
    /// The roles; none where the first metadata is not signed yet.
    pub roles: Vec<RoleStatus>,
    /// The director's keys, and whether one is here.
    pub directors: Vec<String>,
    /// Operators' keys, and how many must sign an order.
    pub operators: (Vec<KeyStatus>, u32),
    /// The floors above 1.
    pub floors: BTreeMap<String, u64>,
    /// The open request.
    pub request: Option<RequestStatus>,
    /// What keys are called.
    pub names: BTreeMap<String, String>,
}

/// Reads the site's state.
pub fn trust_status(site: &SiteDir, now: Timestamp) -> Result<TrustStatus, SiteError> {
    let request = site.read_open_request()?;
    let mut names = Signers::read(site)?.map(|signers| signers.names).unwrap_or_default();
    if let Some(request) = &request {
        names.extend(request.names.clone());
    }
    let open = match &request {
        Some(request) => Some(RequestStatus { name: request.name.clone(), lacking: request.lacking()? }),
        None => None,
    };
    let mut status = TrustStatus {
        site: site.name.clone(),
        roles: Vec::new(),
        directors: Vec::new(),
        operators: (Vec::new(), 1),
        floors: BTreeMap::new(),
        request: open,
        names,
    };
    let state = match newest_state(site, now) {
        Ok(state) => state,
        Err(SiteError::Unfinished { .. }) => return Ok(status),
        Err(error) => return Err(error),
    };
    status.roles = roles(site, &state, &status.names, now)?;
    let document = site_document(site, &state)?;
    status.directors = document.directors.keys().cloned().collect();
    let operator =
        |keyid: &String| KeyStatus { keyid: keyid.clone(), name: status.names.get(keyid).cloned(), signed: false };
    status.operators = (document.operators.keys().map(operator).collect(), document.operator_threshold);
    status.floors = document.floors;
    Ok(status)
}

fn roles(
    site: &SiteDir,
    state: &Outcome,
    names: &BTreeMap<String, String>,
    now: Timestamp,
) -> Result<Vec<RoleStatus>, SiteError> {
    let (root, roles) = (&state.root, &state.root.roles);
    let mut found = Vec::new();
    let mut add = |role: &str, file: String, (version, expires): (u64, Timestamp), need: Need| {
        let text = read_capped(&site.metadata(&file), MAX_FILE)?.unwrap_or_default();
        let signed = need.signed(&text);
        let key = |keyid: &String| KeyStatus {
            keyid: keyid.clone(),
            name: names.get(keyid).cloned(),
            signed: signed.contains(keyid),
        };
        let nearness = Nearness::of(expires, now);
        let calm = role == TimestampRole::TYPE && nearness != Nearness::Expired;
        let nearness = if calm { Nearness::Far } else { nearness };
        found.push(RoleStatus {
            role: role.to_owned(),
            version,
            expires,
            days_left: expires.duration_since(now).as_secs().div_euclid(24 * 3600),
            nearness,
            threshold: need.threshold,
            keys: need.keyids.iter().map(key).collect(),
        });
        Ok::<_, SiteError>(())
    };
    let file = |version: u64, role: &str| format!("{version}.{role}.json");
    let of_root = Need::of_role(root, &roles.root);
    add(Root::TYPE, file(root.version, Root::TYPE), (root.version, root.expires), of_root)?;
    if let Some(top) = state.roles.get(Targets::TYPE) {
        let need = Need::of_role(root, &roles.targets);
        add(Targets::TYPE, file(top.version, Targets::TYPE), (top.version, top.expires), need)?;
        for (role, list) in state.roles.iter().filter(|(role, _)| *role != Targets::TYPE) {
            if let Some(need) = Need::of_delegation(top, role) {
                add(role, file(list.version, role), (list.version, list.expires), need)?;
            }
        }
    }
    let snapshot = &state.snapshot;
    let need = Need::of_role(root, &roles.snapshot);
    add(Snapshot::TYPE, file(snapshot.version, Snapshot::TYPE), (snapshot.version, snapshot.expires), need)?;
    // The timestamp that machines are served; without one that verifies the server has yet to sign it.
    if let Some(timestamp) = served_state(site, now).ok().and_then(|served| served.timestamp) {
        let need = Need::of_role(root, &roles.timestamp);
        add(TimestampRole::TYPE, "timestamp.json".into(), (timestamp.version, timestamp.expires), need)?;
    }
    Ok(found)
}

impl Need {
    fn signed(&self, text: &[u8]) -> Vec<String> {
        kiln_release::Unverified::<Value>::parse(text, MAX_FILE)
            .ok()
            .and_then(|envelope| envelope.check(&self.any()).ok())
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_of_90_30_and_7_days_ahead() {
        let now: Timestamp = "2026-03-01T00:00:00Z".parse().unwrap();
        let at = |hours: i64| Nearness::of(now + jiff::SignedDuration::from_hours(hours), now);
        for (hours, nearness) in [
            (91 * 24, Nearness::Far),
            (90 * 24, Nearness::Within90Days),
            (30 * 24 + 1, Nearness::Within90Days),
            (30 * 24, Nearness::Within30Days),
            (7 * 24, Nearness::Within7Days),
            (1, Nearness::Within7Days),
            (0, Nearness::Expired),
            (-5, Nearness::Expired),
        ] {
            assert_eq!(at(hours), nearness, "{hours} hours");
        }
        assert_eq!(Nearness::Far.warning(), None);
    }
}
