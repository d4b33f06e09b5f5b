//! Hardware classes, and what their machines have shown.

use super::Control;
use crate::view::{ClassReleaseView, ClassView};
use kiln_fleet::{HardwareClass, Proofs, Ways};
use kiln_protocol::ReleaseId;
use std::collections::{BTreeMap, BTreeSet};

impl Control {
    /// All that machines in service are of. Of releases only those that are published: what was shown of others is no use.
    pub fn classes(&self) -> Vec<ClassView> {
        let catalog = self.catalog();
        let inner = self.look();
        let mut assigned: BTreeMap<&HardwareClass, BTreeSet<&ReleaseId>> = BTreeMap::new();
        for machine in inner.machines.values() {
            if let (Some(class), Some(shall)) = (&machine.class, &machine.assigned) {
                assigned.entry(class).or_default().insert(&shall.release);
            }
        }
        let view = |(class, machines, proofs): (&HardwareClass, usize, &Proofs)| {
            let shall = assigned.get(class).into_iter().flatten().copied();
            let all: BTreeSet<&ReleaseId> = proofs.keys().chain(shall).collect();
            let published = all.into_iter().filter(|id| catalog.releases.contains_key(*id));
            let releases = published.map(|id| {
                let proof = proofs.get(id).copied().unwrap_or_default();
                let (Ways { cold, kexec }, kexec_failed) = (proof.ways, proof.is_taken_back());
                ClassReleaseView { image: id.image.clone(), release: id.release, cold, kexec, kexec_failed }
            });
            let (model, firmware) = (class.model.clone(), class.firmware.clone());
            ClassView { model, firmware, machines, releases: releases.collect() }
        };
        inner.classes.all().map(view).collect()
    }
}
