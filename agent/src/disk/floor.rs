//! A release below the floor, on a machine whose disk it lies on. The loader knows no floor: it would start that release for ever,
//! and where the disk comes first in the firmware's order no boot server is ever asked for another.

use super::DiskError;
use super::layout::{Choice, choose};
use super::machine::{MachineDisk, SharedDisk, on_disk};
use super::search;
use crate::error::Result;
use kiln_protocol::slot::{EntryKind, Event, Label, SlotId, Slots};
use kiln_protocol::{ReleaseId, Sha256Hex};
use kiln_release::BootInfo;

/// The newest release that is good on the disk and not below the floor of its image.
pub fn above(slots: &Slots) -> Option<ReleaseId> {
    let whole = SlotId::BOTH.into_iter().filter(|slot| slots.disk.is_good(*slot));
    let entries = whole.flat_map(|slot| slots.disk.entries_of(slot));
    let good = entries.filter(|e| e.name.kind == EntryKind::Good && !slots.is_below(&e.content.release));
    good.max_by_key(|entry| entry.name.sequence).map(|entry| entry.content.release.clone())
}

/// Leaves what is below the floor for a good release at or above it, which the loader starts from then on; that one. Without one
/// (none) the disk stays as it is, and the firmware asks the network first, until a release that may run puts the disk in its place
/// again. Nothing is partitioned.
pub async fn leave(boot: &BootInfo, floors: Vec<ReleaseId>) -> Result<Option<ReleaseId>> {
    let wanted: Option<Sha256Hex> = boot.root_hash.parse().ok();
    let disks = search::candidates(&boot.site.name).await;
    let settings = boot.site.disk.clone().unwrap_or_default();
    let choice = choose(disks, &settings, &boot.site.name, wanted.as_ref().map(Label::of))?;
    let Choice::Use(name, _) = choice else { return Err(DiskError::NoDisk.into()) };
    let Some(floor) = floors.iter().find(|floor| floor.image.as_str() == boot.image).cloned() else { return Ok(None) };
    let (of, boot) = (name.clone(), boot.clone());
    let open = move || MachineDisk::reopen(&of, &boot, floors);
    let disk = SharedDisk::new(search::in_time(&name, search::OPENING, search::OPENS, open).await??);
    on_disk(&disk, move |disk| {
        let left = disk.event(Event::Floor(floor), None).map(|_| above(disk.slots()));
        if !matches!(left, Ok(Some(_))) {
            disk.order_boot(true)?;
        }
        left
    })
    .await
}
