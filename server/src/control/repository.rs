//! The repository under a running server: looked at when somebody needs it, and taken up once it verifies.

use super::Control;
use crate::catalog::Catalog;
use kiln_images::SiteError;
use kiln_release::Signer;
use std::sync::Arc;
use std::time::Duration;

/// Longest that an order waits for the repository to be looked at.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

impl Control {
    /// Has the repository looked at, and waits until that is done: what was published a moment ago is known then.
    pub(crate) async fn look_again(&self) {
        let mut looked = self.looked.subscribe();
        let mut ticket = 0;
        self.look_wanted.send_modify(|wanted| {
            *wanted += 1;
            ticket = *wanted;
        });
        // A repository on a slow disk delays the answer, no more: the caller then sees what was known.
        let served = looked.wait_for(|served| *served >= ticket);
        if tokio::time::timeout(LOOK_DEADLINE, served).await.is_err() {
            tracing::warn!("looking at the repository takes longer than {} s", LOOK_DEADLINE.as_secs());
        }
    }

    /// Waits until a look is wanted, at most `pause`. Gives the ticket that this look serves.
    pub(crate) async fn look_ticket(&self, pause: Duration) -> u64 {
        let mut wanted = self.look_wanted.subscribe();
        let served = *self.looked.borrow();
        match tokio::time::timeout(pause, wanted.wait_for(|ticket| *ticket > served)).await {
            Ok(Ok(ticket)) => *ticket,
            Ok(Err(_)) | Err(_) => *self.look_wanted.borrow(),
        }
    }

    /// A look is done.
    pub(crate) fn look_served(&self, ticket: u64) {
        self.looked.send_replace(ticket);
    }

    /// A newer state of the repository was verified.
    pub fn adopt(&self, catalog: Catalog) -> Result<(), SiteError> {
        let director = self.site.director_key(&catalog.site)?;
        if director.public() != self.director().public() {
            tracing::info!("the site names another director: every assignment is signed anew");
            *self.director.write().expect("no code panics under this lock") = Arc::new(director);
        }
        self.tell_if_unnamed(&catalog);
        let before = self.catalog();
        self.tell_passed_over(&catalog, Some(before.as_ref()));
        let catalog = Arc::new(catalog);
        *self.catalog.write().expect("no code panics under this lock") = Arc::clone(&catalog);
        // What is served must not wait for a machine's next step.
        for machine in self.lock().machines.values_mut() {
            machine.floors = Arc::clone(&catalog.floors);
            machine.fit = Some(Arc::clone(&catalog.fit));
        }
        self.wake();
        Ok(())
    }

    /// Says so if this server's key of the agent API is not one that counts.
    pub(super) fn tell_if_unnamed(&self, catalog: &Catalog) {
        let named = &catalog.site.agent_api.keys;
        if !named.is_empty() && !named.iter().any(|key| key == self.server_key.as_str()) {
            tracing::error!("the site names another key of the agent API: machines hang up on this server. Restart it");
        }
    }

    pub(crate) fn director(&self) -> Arc<Signer> {
        self.director.read().expect("no code panics under this lock").clone()
    }
}
