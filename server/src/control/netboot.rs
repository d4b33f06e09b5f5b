//! The boot decision, and what the network's side saw of a machine.

use super::{Control, Inner, MAX_DISCOVERED, Pending, now_ms};
use crate::catalog::{Catalog, Release};
use crate::error::ControlError;
use kiln_fleet::Event;
use kiln_netboot::{BootAnswer, BootKind, BootQuery, Mac};
use kiln_protocol::{Architecture, MachineId, ReleaseId, Sha256Hex};

impl Control {
    /// What this client is given. Changes nothing.
    pub fn boot_answer(&self, query: &BootQuery) -> BootAnswer {
        let catalog = self.catalog();
        let id = self.look().find(&[query.id.as_ref(), query.id_plain.as_ref()], Some(query.mac));
        match self.boot_release(id.as_ref(), &catalog, query.arch) {
            Err(reason) => BootAnswer::Wait { reason },
            Ok((_, release)) => match query.kind {
                BootKind::UefiPxe | BootKind::UefiHttp | BootKind::UefiIpxe => {
                    match release.manifest.uki.sha256.parse::<Sha256Hex>() {
                        Ok(sha256) => BootAnswer::Uki { sha256 },
                        Err(e) => BootAnswer::Wait { reason: e.to_string() },
                    }
                }
                BootKind::BiosPxe | BootKind::BiosIpxe => BootAnswer::Ipxe,
            },
        }
    }

    /// The release a machine boots next; for an unknown one the default image's newest.
    pub fn boot_release<'a>(
        &self,
        id: Option<&MachineId>,
        catalog: &'a Catalog,
        arch: Architecture,
    ) -> Result<(ReleaseId, &'a Release), String> {
        let assigned = {
            let inner = self.look();
            let machine = id.and_then(|id| inner.machines.get(id));
            machine.and_then(|m| m.boot_release(self.config.limits.trial_attempts)).cloned()
        };
        let default = &self.config.boot.default_image;
        let release = assigned.or_else(|| catalog.newest(default).cloned()).ok_or_else(|| {
            let passed = catalog.passed_over(default);
            format!("no release of {default} (class normal) that machines may have is published{passed}")
        })?;
        let published =
            catalog.releases.get(&release).ok_or_else(|| format!("the repository does not hold {release}"))?;
        if published.manifest.architecture != arch.as_str() {
            return Err(format!("{release} is for {}, the machine is {arch}", published.manifest.architecture));
        }
        Ok((release, published))
    }

    /// How long a client that can be told so waits before it starts that, in seconds, and why.
    pub fn pause_before(&self, id: Option<&MachineId>) -> Option<(u64, String)> {
        self.look().machines.get(id?)?.pause_s()
    }

    /// Its firmware asked for a boot program.
    pub async fn asked(&self, query: &BootQuery) -> Result<(), ControlError> {
        let pending = {
            let mut inner = self.lock();
            let mut pending = Pending::default();
            let known = inner.find(&[query.id.as_ref(), query.id_plain.as_ref()], Some(query.mac));
            // Of an unknown machine's two readings, the one that somebody listed is the right one.
            let listed =
                || [&query.id_plain, &query.id].into_iter().flatten().find(|id| self.config.machines.contains_key(*id));
            let Some(id) = known.or_else(|| listed().cloned()).or_else(|| query.id.clone()) else { return Ok(()) };
            let (mac, now) = (query.mac.to_string(), now_ms());
            if !self.admit_packet(&mut inner, &id, &mac, now, &mut pending) {
                return Ok(());
            }
            if inner.macs.len() < 4 * MAX_DISCOVERED + 8 * inner.machines.len() {
                inner.macs.claim(&mac, &id);
            }
            self.step(&mut inner, &id, Event::Asked, now, &mut pending)?;
            pending
        };
        self.finish(pending).await
    }

    /// A boot program, kernel or initramfs is being downloaded, or (`whole`) was.
    pub async fn downloads(
        &self,
        mac: Option<Mac>,
        id: Option<&MachineId>,
        sha256: &str,
        whole: bool,
    ) -> Result<(), ControlError> {
        let catalog = self.catalog();
        let Some((release, published)) = catalog.booted_by(sha256) else { return Ok(()) };
        // On BIOS the initramfs is the last of two files.
        let last = sha256 != published.manifest.kernel.sha256;
        let pending = {
            let mut inner = self.lock();
            let Some(id) = inner.find(&[id], mac) else { return Ok(()) };
            let mut pending = Pending::default();
            match (whole, last) {
                (false, _) => self.step(&mut inner, &id, Event::Downloads(release.clone()), now_ms(), &mut pending)?,
                (true, true) => self.step(&mut inner, &id, Event::Downloaded, now_ms(), &mut pending)?,
                (true, false) => {}
            }
            pending
        };
        self.finish(pending).await
    }

    /// Bytes of a boot program, kernel or initramfs were taken by this machine; without a hash, of a loader before it.
    pub async fn takes_bytes(
        &self,
        mac: Option<Mac>,
        id: Option<&MachineId>,
        sha256: Option<&str>,
    ) -> Result<(), ControlError> {
        if sha256.is_some_and(|sha256| self.catalog().booted_by(sha256).is_none()) {
            return Ok(());
        }
        let pending = {
            let mut inner = self.lock();
            let Some(id) = inner.find(&[id], mac) else { return Ok(()) };
            let mut pending = Pending::default();
            self.step(&mut inner, &id, Event::TakesBytes, now_ms(), &mut pending)?;
            pending
        };
        self.finish(pending).await
    }

    /// The machine that has this id or Ethernet address.
    pub fn find(&self, id: Option<&MachineId>, mac: Option<Mac>) -> Option<MachineId> {
        self.look().find(&[id], mac)
    }

    /// Its name, for the log.
    pub fn title(&self, id: Option<&MachineId>, mac: Option<Mac>) -> String {
        let inner = self.look();
        match inner.find(&[id], mac).and_then(|id| inner.machines.get(&id)) {
            Some(m) => m.title().to_owned(),
            None => mac.map_or_else(String::new, |m| m.to_string()),
        }
    }
}

impl Inner {
    fn find(&self, ids: &[Option<&MachineId>], mac: Option<Mac>) -> Option<MachineId> {
        let by_id = ids.iter().flatten().find(|id| self.machines.contains_key(**id)).map(|id| (*id).clone());
        by_id.or_else(|| {
            let owner = self.macs.owner(&mac?.to_string())?;
            self.machines.contains_key(owner).then(|| owner.clone())
        })
    }
}
