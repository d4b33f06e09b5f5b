//! `kiln trust rotate`, `revoke KEY` and `renew`: other keys, fewer keys, new dates.
//!
//! A root goes from N to N+1 under both roots' thresholds (TUF, 5.3.4). What a role has signed is signed anew with its
//! new keys in the same request, so that there is no moment at which nobody's signature counts.

use crate::ceremony::RoleHolders;
use crate::files::{SECRET, sync_folder, write_atomic};
use crate::repository::newest_state;
use crate::signers::Signers;
use crate::signing::{Changed, Draft, finish};
use crate::site::{SiteDir, new_key, read_key};
use crate::site_error::SiteError;
use jiff::{SignedDuration, Timestamp};
use kiln_release::PublicKey;
use kiln_release::tuf::{Outcome, RoleKeys, Root, Snapshot, Targets, TimestampRole};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The director is no TUF role; `site.json` names it.
const DIRECTOR: &str = "director";

/// What a rotation did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotated {
    /// What became of it.
    pub changed: Changed,
    /// Key ids that sign from now on.
    pub keys: Vec<String>,
}

/// What a renewal did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewed {
    /// What became of it.
    pub changed: Changed,
    /// TUF roles that get new dates.
    pub roles: Vec<String>,
}

/// The keys of one role, as the state in force has them.
fn keys_of(site: &SiteDir, state: &Outcome, role: &str) -> Result<(Vec<String>, u32), SiteError> {
    let of = |keys: &RoleKeys| (keys.keyids.clone(), keys.threshold);
    let roles = &state.root.roles;
    Ok(match role {
        Root::TYPE => of(&roles.root),
        Targets::TYPE => of(&roles.targets),
        Snapshot::TYPE => of(&roles.snapshot),
        TimestampRole::TYPE => of(&roles.timestamp),
        DIRECTOR => {
            let document = crate::signing::site_document(site, state)?;
            (document.directors.keys().cloned().collect(), document.director_threshold)
        }
        image => {
            let delegated = state.roles.get(Targets::TYPE).and_then(|targets| targets.delegations.as_ref());
            let known = delegated.and_then(|delegations| delegations.roles.iter().find(|known| known.name == image));
            let known = known.ok_or_else(|| SiteError::NoSuchRole { role: role.to_owned() })?;
            (known.keyids.clone(), known.threshold)
        }
    })
}

/// Every role of the site.
fn all_roles(state: &Outcome) -> Vec<String> {
    let delegated = state.roles.get(Targets::TYPE).and_then(|targets| targets.delegations.as_ref());
    let images = delegated.into_iter().flat_map(|delegations| delegations.roles.iter().map(|role| role.name.clone()));
    let top = [Root::TYPE, Targets::TYPE, Snapshot::TYPE, TimestampRole::TYPE, DIRECTOR];
    top.into_iter().map(str::to_owned).chain(images).collect()
}

/// Gives a role other keys. Online roles and a lab's get a new key that is made here; `holders` are those of a role
/// whose keys people hold.
pub fn rotate(dir: &Path, role: &str, holders: Option<&RoleHolders>, now: Timestamp) -> Result<Rotated, SiteError> {
    let site = SiteDir::open(dir)?;
    let _lock = site.lock_offline()?;
    let state = newest_state(&site, now)?;
    let signers = Signers::read(&site)?;
    keys_of(&site, &state, role)?;
    promote_all(&site, &state)?;
    let online = [TimestampRole::TYPE, DIRECTOR].contains(&role);
    let mut draft = Draft::on(&site, &state, now, format!("other keys for {role}"))?;
    let mut made = None;
    let (keys, threshold) = match (holders, &signers) {
        (Some(holders), _) if !online => {
            holders.check(role)?;
            not_shared(&site, &state, role, holders)?;
            (holders.public(), holders.threshold)
        }
        (None, Some(_)) if !online => return Err(SiteError::WhoseKeys { role: role.to_owned() }),
        (_, _) => {
            let key = new_key()?;
            let public = key.public();
            made = Some(key);
            (vec![public], 1)
        }
    };
    if let (Some(holders), Some(mut signers)) = (holders, signers) {
        signers.names.extend(holders.keys.iter().map(|(name, key)| (key.id(), name.clone())));
        signers.write(&site)?;
        draft.names(&signers);
    }
    if let Some(key) = &made {
        let (next, _) = places(&site, role);
        write_atomic(&next, key.pkcs8_pem().as_bytes(), SECRET)?;
    }
    set_keys(&mut draft, role, &keys, threshold)?;
    let changed = finish(&site, draft, now)?;
    promote_all(&site, &newest_state(&site, now)?)?;
    Ok(Rotated { changed, keys: keys.iter().map(PublicKey::id).collect() })
}

/// Where a role's key is made, and where it lies once it is in force. Between the two readers take the one that counts.
fn places(site: &SiteDir, role: &str) -> (PathBuf, PathBuf) {
    let place = if [TimestampRole::TYPE, DIRECTOR].contains(&role) {
        site.online(&format!("{role}.key"))
    } else {
        site.offline_key(role)
    };
    (place.with_extension("key.next"), place)
}

/// New keys that are in force take the old ones' places.
pub(crate) fn promote_all(site: &SiteDir, state: &Outcome) -> Result<(), SiteError> {
    for role in all_roles(state) {
        let (next, place) = places(site, &role);
        if next.exists() {
            let key = read_key(&next, "sign from now on")?;
            if keys_of(site, state, &role)?.0.contains(&key.public().id()) {
                fs::rename(&next, &place).map_err(SiteError::io("rename into place", &place))?;
                sync_folder(&place)?;
            }
        }
    }
    crate::agent_api::promote(site, state)
}

fn not_shared(site: &SiteDir, state: &Outcome, role: &str, holders: &RoleHolders) -> Result<(), SiteError> {
    let image = |role: &str| role.starts_with("image-");
    for other in all_roles(state) {
        // Several images may have the same signers.
        if other == role || (image(&other) && image(role)) {
            continue;
        }
        let (keyids, _) = keys_of(site, state, &other)?;
        if let Some((name, _)) = holders.keys.iter().find(|(_, key)| keyids.contains(&key.id())) {
            return Err(SiteError::SharedKey { name: name.clone(), first: other, second: role.to_owned() });
        }
    }
    Ok(())
}

fn set_keys(draft: &mut Draft<'_>, role: &str, keys: &[PublicKey], threshold: u32) -> Result<(), SiteError> {
    let of_role = RoleKeys::new(keys, threshold);
    match role {
        Root::TYPE | Targets::TYPE | Snapshot::TYPE | TimestampRole::TYPE => {
            let root = draft.root()?;
            root.keys.extend(keys.iter().map(|key| (key.id(), key.to_object())));
            match role {
                Root::TYPE => root.roles.root = of_role,
                Targets::TYPE => root.roles.targets = of_role,
                Snapshot::TYPE => root.roles.snapshot = of_role,
                _ => root.roles.timestamp = of_role,
            }
            let roles = &root.roles;
            let used: BTreeSet<String> = [&roles.root, &roles.targets, &roles.snapshot, &roles.timestamp]
                .into_iter()
                .flat_map(|role| role.keyids.clone())
                .collect();
            root.keys.retain(|id, _| used.contains(id));
            // What the old keys have signed is signed with the new ones.
            match role {
                Targets::TYPE => drop(draft.targets()?),
                Snapshot::TYPE => draft.snapshot(),
                _ => {}
            }
        }
        DIRECTOR => {
            let mut document = draft.site_document()?;
            document.directors = keys.iter().map(|key| (key.id(), key.to_object())).collect();
            document.director_threshold = threshold;
            draft.put_site(&document)?;
        }
        image => {
            let name = image.trim_start_matches("image-");
            let paths = vec![format!("{name}/*/manifest.json")];
            draft.targets()?.delegate(image, keys, threshold, paths, true);
            draft.list(image);
        }
    }
    Ok(())
}

/// Takes a key away from every role that has it. Thresholds stay. An online role gets a new key.
pub fn revoke_key(dir: &Path, key: &str, now: Timestamp) -> Result<Rotated, SiteError> {
    let site = SiteDir::open(dir)?;
    let state = newest_state(&site, now)?;
    let mut found: BTreeMap<String, (Vec<String>, u32)> = BTreeMap::new();
    let mut full = BTreeSet::new();
    for role in all_roles(&state) {
        let (keyids, threshold) = keys_of(&site, &state, &role)?;
        let of_role: Vec<String> = keyids.iter().filter(|id| key.len() >= 8 && id.starts_with(key)).cloned().collect();
        if !of_role.is_empty() {
            full.extend(of_role);
            found.insert(role, (keyids, threshold));
        }
    }
    let (Some(id), 1) = (full.first().cloned(), full.len()) else {
        return Err(SiteError::NoSuchKey { key: key.to_owned() });
    };
    if let Some(online) = [TimestampRole::TYPE, DIRECTOR].into_iter().find(|role| found.contains_key(*role)) {
        return rotate(dir, online, None, now);
    }
    let _lock = site.lock_offline()?;
    let mut draft = Draft::on(&site, &state, now, format!("revoke the key {}", &id[..16]))?;
    let objects = objects(&state);
    let mut left_all = Vec::new();
    for (role, (keyids, threshold)) in found {
        let left: Vec<PublicKey> = keyids
            .iter()
            .filter(|known| **known != id)
            .filter_map(|known| PublicKey::from_object(objects.get(known)?).ok())
            .collect();
        if left.len() < usize::try_from(threshold).unwrap_or(usize::MAX) {
            return Err(SiteError::TooFewLeft { key: id, role, left: left.len(), threshold });
        }
        set_keys(&mut draft, &role, &left, threshold)?;
        left_all.extend(left.iter().map(PublicKey::id));
    }
    if let Some(mut signers) = Signers::read(&site)? {
        // Nor for images that are still to come.
        signers.images.keys.retain(|object| PublicKey::from_object(object).is_ok_and(|key| key.id() != id));
        let (left, threshold) = (signers.images.keys.len(), signers.images.threshold);
        if left < usize::try_from(threshold).unwrap_or(usize::MAX) {
            return Err(SiteError::TooFewLeft { key: id, role: "images".into(), left, threshold });
        }
        signers.write(&site)?;
    }
    Ok(Rotated { changed: finish(&site, draft, now)?, keys: left_all })
}

fn objects(state: &Outcome) -> BTreeMap<String, serde_json::Value> {
    let delegated = state.roles.get(Targets::TYPE).and_then(|targets| targets.delegations.clone());
    state.root.keys.clone().into_iter().chain(delegated.into_iter().flat_map(|d| d.keys)).collect()
}

/// Signs anew, with new dates and no other change, what expires within this time.
pub fn renew(dir: &Path, within: SignedDuration, now: Timestamp) -> Result<Renewed, SiteError> {
    let site = SiteDir::open(dir)?;
    let _lock = site.lock_offline()?;
    let state = newest_state(&site, now)?;
    let due = |expires: Timestamp| expires.duration_since(now) < within;
    let mut draft = Draft::on(&site, &state, now, "new dates")?;
    let mut roles = Vec::new();
    if due(state.root.expires) {
        draft.root()?;
        roles.push(Root::TYPE.to_owned());
    }
    for (role, _) in state.roles.iter().filter(|(_, targets)| due(targets.expires)) {
        if role == Targets::TYPE {
            draft.targets()?;
        } else {
            draft.list(role);
        }
        roles.push(role.clone());
    }
    if due(state.snapshot.expires) {
        draft.snapshot();
        roles.push(Snapshot::TYPE.to_owned());
    }
    if roles.is_empty() {
        return Ok(Renewed { changed: Changed { already: true, ..Changed::default() }, roles });
    }
    Ok(Renewed { changed: finish(&site, draft, now)?, roles })
}
