//! Looks at the repository: new releases are adopted once they verify, and timestamp.json is kept young.

use crate::catalog::{self, Catalog};
use crate::control::Control;
use crate::error::{CatalogError, StoreError};
use crate::expiry::Told;
use crate::store::Store;
use jiff::Timestamp;
use kiln_images::{Memory, SiteDir};
use std::sync::Arc;
use std::time::Duration;

/// The repository is looked at so often.
const LOOK: Duration = Duration::from_secs(2);
/// timestamp.json is looked at anew at least so often: it is signed hourly.
const RENEW_LOOKS: u32 = 300;

/// Notices new releases, and keeps timestamp.json young.
pub async fn looks(control: Arc<Control>) {
    let mut known = catalog::fingerprint(&control.site).unwrap_or_default();
    let (mut suspect, mut complained) = (String::new(), String::new());
    let mut since = 0;
    let mut told = Told::default();
    let mut ticket = 0;
    loop {
        control.look_served(ticket);
        ticket = control.look_ticket(LOOK).await;
        since += 1;
        for warning in told.news(&control.catalog().expiries, Timestamp::now()) {
            tracing::warn!("{warning}");
        }
        let now = catalog::fingerprint(&control.site).unwrap_or_default();
        if now == known && since < RENEW_LOOKS {
            continue;
        }
        let before = control.catalog();
        let memory = Memory { trust_root: Some(before.root.clone()), seen: before.seen.clone() };
        let result = look(&control.site, memory).await;
        let refused = match &result {
            Ok(catalog) => catalog.refused.clone(),
            Err(error) => Some(error.to_string()),
        };
        // A publisher may be half through: it is looked at again, and only what stays wrong is said, once.
        match &refused {
            None => (suspect, complained) = (String::new(), String::new()),
            Some(text) if *text == suspect && *text != complained => {
                tracing::warn!("the repository's newest state is not adopted, the last good one stays: {text}");
                complained.clone_from(text);
            }
            Some(text) => suspect.clone_from(text),
        }
        let Ok(catalog) = result else { continue };
        since = 0;
        if refused.is_none() || complained == suspect {
            // From before the look: what was published during it is looked at next. The timestamp that this look signed
            // costs one more.
            known = now;
        }
        for release in catalog.releases.keys().filter(|r| !before.releases.contains_key(*r)) {
            tracing::info!("{release} is published; `kiln assign MACHINE {release}` gives it to a machine");
        }
        if let Err(error) = remember(&control.store, &catalog).await {
            tracing::error!(%error, "the repository's versions were not stored");
            continue;
        }
        if let Err(error) = control.adopt(catalog) {
            tracing::error!(%error, "the newest state of the repository is not taken up");
        }
    }
}

/// Commits what must not be forgotten of a verified state.
pub(crate) async fn remember(store: &Store, catalog: &Catalog) -> Result<(), StoreError> {
    let seen = serde_json::to_string(&catalog.seen).map_err(StoreError::Json)?;
    let commits = [store.remember("tuf-root", catalog.root.clone()), store.remember("tuf-seen", seen)];
    for commit in commits {
        commit.wait().await?;
    }
    Ok(())
}

/// Reads and verifies the repository, beside the runtime. The timestamp's key is read each time: it may be replaced.
pub(crate) async fn look(site: &SiteDir, memory: Memory) -> Result<Catalog, CatalogError> {
    let site = site.clone();
    let work = move || Catalog::adopt(&site, &site.timestamp_keys()?, &memory, Timestamp::now());
    tokio::task::spawn_blocking(work).await?
}
