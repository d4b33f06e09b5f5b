//! `kiln trust init` of a site whose keys people hold: k of n offline keys for each TUF role, of which the boot server
//! has the public ones alone. What it makes is a site with its online keys and a signing request: the site's first
//! metadata, which goes from signer to signer and comes back by `kiln trust apply`.

use crate::init::{Prepared, check_name, write_agent_api};
use crate::signers::{Quorum, Signers};
use crate::signing::{Draft, Signing, Waiting};
use crate::site::{SiteDir, new_key, write_key};
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::tuf::{RoleKeys, Root, RootRoles};
use kiln_release::{AgentApi, PublicKey, SITE_TYPE, Site};
use std::collections::BTreeMap;
use std::path::Path;

/// Most keys of one TUF role.
const MAX_KEYS: usize = 32;
/// Longest that offline metadata holds, in days: ten years.
pub const MAX_DAYS: u32 = 3653;

/// Public keys, what they are called, and how many of them must sign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleHolders {
    /// So many must sign.
    pub threshold: u32,
    /// The keys and their names.
    pub keys: Vec<(String, PublicKey)>,
}

impl RoleHolders {
    /// A threshold that can be reached, and each key once.
    pub fn check(&self, role: &str) -> Result<(), SiteError> {
        let mut distinct: Vec<&PublicKey> = self.keys.iter().map(|(_, key)| key).collect();
        distinct.sort();
        distinct.dedup();
        let keys = distinct.len();
        let holds = keys == self.keys.len()
            && keys <= MAX_KEYS
            && self.threshold >= 1
            && usize::try_from(self.threshold).is_ok_and(|threshold| threshold <= keys);
        if holds { Ok(()) } else { Err(SiteError::Quorum { role: role.into(), threshold: self.threshold, keys }) }
    }

    pub(crate) fn public(&self) -> Vec<PublicKey> {
        self.keys.iter().map(|(_, key)| key.clone()).collect()
    }
}

/// Who holds the keys of a new site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ceremony {
    /// TUF root.
    pub root: RoleHolders,
    /// Top-level targets: `site.json`, and who may sign which image.
    pub targets: RoleHolders,
    /// Snapshot.
    pub snapshot: RoleHolders,
    /// The list of each image.
    pub images: RoleHolders,
    /// Operators, who sign orders; none at first.
    pub operators: Option<RoleHolders>,
    /// So many days what they sign holds.
    pub days: u32,
}

impl Ceremony {
    /// Every role with its keys.
    fn roles(&self) -> impl Iterator<Item = (&'static str, &RoleHolders)> {
        let operators = self.operators.as_ref().map(|operators| ("operators", operators));
        [("root", &self.root), ("targets", &self.targets), ("snapshot", &self.snapshot), ("images", &self.images)]
            .into_iter()
            .chain(operators)
    }

    fn check(&self) -> Result<(), SiteError> {
        if !(1..=MAX_DAYS).contains(&self.days) {
            return Err(SiteError::Days { got: self.days, limit: MAX_DAYS });
        }
        let mut seen: BTreeMap<PublicKey, &str> = BTreeMap::new();
        for (role, holders) in self.roles() {
            holders.check(role)?;
            for (name, key) in &holders.keys {
                if let Some(other) = seen.insert(key.clone(), role) {
                    return Err(SiteError::SharedKey { name: name.clone(), first: other.into(), second: role.into() });
                }
            }
        }
        Ok(())
    }

    fn signers(&self) -> Signers {
        let named = |(name, key): &(String, PublicKey)| (key.id(), name.clone());
        Signers {
            images: Quorum {
                threshold: self.images.threshold,
                keys: self.images.keys.iter().map(|(_, key)| key.to_object()).collect(),
            },
            days: self.days,
            names: self.roles().flat_map(|(_, holders)| holders.keys.iter().map(named)).collect(),
        }
    }
}

/// Makes the site: its online keys, the agent API's certificates, and the request for its first metadata.
pub fn init_site(dir: &Path, name: &str, ceremony: &Ceremony, now: Timestamp) -> Result<(SiteDir, Waiting), SiteError> {
    check_name(name)?;
    ceremony.check()?;
    let prepared = Prepared::new(dir, name)?;
    let site = &prepared.site;
    let (timestamp, director) = (new_key()?, new_key()?);
    write_key(&site.online("timestamp.key"), &timestamp)?;
    write_key(&site.online("director.key"), &director)?;
    let ca_pem = write_agent_api(site, name)?;

    let signers = ceremony.signers();
    signers.write(site)?;
    let keys = |holders: &RoleHolders| RoleKeys::new(&holders.public(), holders.threshold);
    let roles = RootRoles {
        root: keys(&ceremony.root),
        timestamp: RoleKeys::new(&[timestamp.public()], 1),
        snapshot: keys(&ceremony.snapshot),
        targets: keys(&ceremony.targets),
    };
    let of_root = [&ceremony.root, &ceremony.targets, &ceremony.snapshot];
    let public: Vec<PublicKey> =
        of_root.into_iter().flat_map(RoleHolders::public).chain([timestamp.public()]).collect();
    let operators = ceremony.operators.as_ref();
    let document = Site {
        type_: SITE_TYPE.to_owned(),
        spec_version: "1.0".to_owned(),
        name: name.to_owned(),
        directors: BTreeMap::from([(director.public().id(), director.public().to_object())]),
        director_threshold: 1,
        operators: operators
            .map(|operators| operators.public().iter().map(|key| (key.id(), key.to_object())).collect())
            .unwrap_or_default(),
        operator_threshold: operators.map_or(1, |operators| operators.threshold),
        agent_api: AgentApi { ca_pem, keys: vec![] },
        floors: BTreeMap::new(),
        network: None,
        dbx: None,
    };
    let mut draft = Draft::first(site, signers, Root::new(1, now, &public, roles), now);
    draft.put_site(&document)?;
    let waiting = match draft.sign()? {
        Signing::Open(waiting) => waiting,
        // No key is here, and every threshold is at least 1.
        Signing::Complete(_) => return Err(SiteError::Quorum { role: "root".into(), threshold: 0, keys: 0 }),
    };
    let site = prepared.finish(dir)?;
    let waiting = Waiting { file: site.open_request(), ..waiting };
    Ok((site, waiting))
}
