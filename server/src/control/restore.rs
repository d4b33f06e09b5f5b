//! What the database did not take. A step is taken in memory before its commit; where that fails, what the database holds
//! of the machine takes its place, so that nobody is told of, or builds on, what no restart would know.
//!
//! From the failed commit on the store writes nothing of such a machine until it is put back here: what was stepped
//! meanwhile, from the state that was not stored, fails as well, and whoever wanted it hears that.

use super::certificates::{self, Certificates};
use super::load::furnish;
use super::{Control, Told};
use crate::error::StoreError;
use crate::store::{Commit, Stored};
use crate::view::MachineView;
use kiln_protocol::MachineId;
use std::sync::Arc;

impl Control {
    /// Puts back every machine that the database was not told of. Whoever's commit failed waits for it, and the clock looks
    /// once a second for those that nobody waited for.
    pub(crate) async fn restore(&self) {
        if self.store.unwritten().is_empty() {
            return;
        }
        // One at a time: a row that was read stays as it is until its machine was put back.
        let _turn = self.restoring.lock().await;
        // Whoever had the turn before may have gone while the store was still to hear of it.
        self.store.settle().await;
        for id in self.store.unwritten() {
            match self.stored(&id).await {
                Ok((stored, certificates)) => {
                    let known = stored.is_some();
                    let (commit, view) = self.put_back(&id, stored, certificates);
                    // Whatever becomes of what shares its transaction, the store writes the machine again from here on.
                    let _ = commit.wait().await;
                    tracing::warn!(machine = %id, known, "it is as the database holds it: what came since was not stored");
                    let told = view.map_or_else(|| Told::Gone(id.clone()), Told::Machine);
                    let _ = self.told.send(told);
                }
                Err(error) => tracing::error!(
                    machine = %id, %error,
                    "what the database holds of it cannot be read, and nothing of it is stored until that is mended"
                ),
            }
        }
    }

    /// What the database holds of a machine, and of what was issued to it.
    async fn stored(&self, id: &MachineId) -> Result<(Option<Stored>, certificates::Stored), StoreError> {
        Ok((self.store.machine(id).await?, Certificates::stored(&self.store, id).await?))
    }

    /// In memory; its rows are written again after this, in the order of the steps.
    fn put_back(
        &self,
        id: &MachineId,
        stored: Option<Stored>,
        certificates: certificates::Stored,
    ) -> (Commit, Option<Arc<MachineView>>) {
        let mut inner = self.lock();
        self.certificates.put_back(id, certificates);
        let view = match stored {
            Some(Stored { mut machine, envelope }) => {
                if let Some(held) = inner.machines.remove(id) {
                    machine = machine.put_back(held);
                }
                furnish(&self.config, &self.access, &self.catalog(), &mut machine);
                self.config.rule(&mut machine);
                inner.index(&machine);
                if let Some(class) = &machine.class {
                    machine.proofs = inner.classes.proofs(class);
                }
                inner.comparing.again(id);
                match envelope {
                    Some(envelope) => drop(inner.envelopes.insert(id.clone(), envelope)),
                    None => drop(inner.envelopes.remove(id)),
                }
                let view = Arc::new(MachineView::of(&machine));
                inner.machines.insert(id.clone(), machine);
                Some(view)
            }
            None => {
                inner.drop_machine(id);
                None
            }
        };
        // Its class has shown what is stored, and held reports were answered by more.
        if inner.tell_classes() {
            self.wake();
        }
        (self.store.put_back(id), view)
    }
}
