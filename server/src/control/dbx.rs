//! Who has the site's list of revoked boot programs in its firmware, and who may have it.

use super::Control;
use crate::catalog::Catalog;
use crate::view::{DbxLackingView, DbxView};
use kiln_fleet::Machine;
use kiln_protocol::{DbxOffer, DbxOutcome, ReleaseId, Sha256Hex, dbx_hold};
use std::collections::BTreeSet;

/// The list of a site.
struct List {
    update: Sha256Hex,
    revoked: Vec<ReleaseId>,
}

impl List {
    fn of(catalog: &Catalog) -> Option<Self> {
        let dbx = catalog.site.dbx.as_ref()?;
        // A release has several programs.
        let revoked: BTreeSet<ReleaseId> = dbx.revoked.iter().filter_map(|p| p.release.parse().ok()).collect();
        let revoked = revoked.into_iter().collect();
        Some(Self { update: dbx.update.sha256.parse().ok()?, revoked })
    }

    /// Why a machine does not have it; none if it has.
    fn lacking(&self, machine: &Machine) -> Option<String> {
        let said = machine.dbx.as_ref().filter(|state| state.update == self.update);
        if said.is_some_and(|state| state.outcome == DbxOutcome::Installed) {
            return None;
        }
        if let Some(hold) = self.hold(machine) {
            return Some(format!("held: {hold}"));
        }
        Some(match said.map(|state| &state.outcome) {
            Some(DbxOutcome::Held { reason }) => format!("held: {reason}"),
            Some(DbxOutcome::Failed { reason }) => format!("failed: {reason}"),
            Some(DbxOutcome::Installed) | None => "it is offered the list with its next report".to_owned(),
        })
    }

    fn hold(&self, machine: &Machine) -> Option<String> {
        let running = machine.running.as_ref().or(machine.embedded.as_ref());
        let runs = running.map(|r| ReleaseId { image: r.image.clone(), release: r.release });
        let assigned = machine.assigned.as_ref().map(|assigned| &assigned.release);
        dbx_hold(&self.revoked, runs.as_ref(), assigned, machine.last_good_here())
    }
}

/// What a reply offers this machine.
pub(super) fn offer(catalog: &Catalog, machine: &Machine) -> Option<DbxOffer> {
    let list = List::of(catalog)?;
    let has = machine.dbx.as_ref().is_some_and(|state| state.has(&list.update));
    (!has && list.hold(machine).is_none()).then_some(DbxOffer { update: list.update })
}

impl Control {
    /// The list, and who lacks it.
    pub fn dbx(&self) -> Option<DbxView> {
        let list = List::of(&self.catalog())?;
        let inner = self.look();
        let known = inner.machines.values().filter(|m| m.state.kind.in_fleet());
        let lacking = known
            .filter_map(|m| Some(DbxLackingView { machine: m.title().to_owned(), why: list.lacking(m)? }))
            .collect();
        Some(DbxView { update: list.update, revoked: list.revoked, lacking })
    }
}
