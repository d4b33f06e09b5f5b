//! What PCR 10 says of the kernels that ran since a machine's cold boot, and what they themselves say that they measured.
//!
//! A kernel's list ends with it, and PCR 10 goes on. So an agent sends the list once the next kernel is loaded, and the value that
//! it comes to is kept: the next kernel's list must lead from there to the value that its TPM quotes. That a list was made up shows
//! there.

use super::attestation::{id, raw, speaks};
use super::{Control, Pending, now_ms};
use crate::catalog::Catalog;
use crate::error::{AttestationError, ControlError, KexecFault};
use kiln_fleet::{Began, Event, Left, Machine};
use kiln_protocol::{AttestationState, Judged, KeyId, MachineId, ReleaseId};
use kiln_release::measured::{ForeignKexec, ImaList, loaded};

/// The kernel that proves its boot.
pub(super) struct Kernel<'a> {
    pub machine: &'a Machine,
    pub boot_id: &'a str,
    /// The release that its agent says it is.
    pub embedded: Option<&'a ReleaseId>,
    pub catalog: &'a Catalog,
    /// What it says that it measured.
    pub list: &'a [u8],
    /// As quoted.
    pub pcr10: [u8; 32],
}

fn releases(list: &ImaList<'_>, catalog: &Catalog) -> Result<Vec<ReleaseId>, ForeignKexec> {
    let published: Vec<_> = catalog.releases.iter().map(|(id, release)| (id.clone(), &release.manifest)).collect();
    Ok(loaded(list, &published)?.into_iter().collect())
}

/// How PCR 10 stood when this kernel began. `measures`: the release that firmware started has all kexecs measured, or says that they
/// are not; where it does not, nothing is known of it. `carried`: PCR 11 says that a kexec started this kernel.
pub(super) fn began(kernel: &Kernel<'_>, measures: bool, carried: bool) -> Result<Option<Began>, KexecFault> {
    if !measures {
        return Ok(None);
    }
    if kernel.list.is_empty() {
        return Err(KexecFault::NoList);
    }
    let list = ImaList::read(kernel.list)?;
    // What is foreign is named, also where the list is not the whole truth.
    releases(&list, kernel.catalog)?;
    let (measured, boot_id) = (!list.is_unmeasured(), kernel.boot_id.to_owned());
    let explains = |from: [u8; 32]| list.explains(from, &kernel.pcr10);
    let known = &kernel.machine.attestations;
    // It has proven this boot before.
    if let Some(began) = known.began.as_ref().filter(|b| b.boot_id == boot_id && explains(raw(&b.pcr10))) {
        return Ok(Some(Began { measured: began.measured && measured, ..began.clone() }));
    }
    if explains([0; 32]) {
        let first = Began { boot_id, pcr10: id(&[0; 32]), measured };
        return if carried { Err(KexecFault::NotListed) } else { Ok(Some(first)) };
    }
    let quoted = || KexecFault::Pcr10 { quoted: id(&kernel.pcr10).to_string() };
    let left = known.left.as_ref().filter(|left| explains(raw(&left.pcr10))).ok_or_else(quoted)?;
    let loaded = left.loaded.as_ref().map_err(|reason| KexecFault::Before(reason.clone()))?;
    if left.measured && kernel.embedded.is_none_or(|embedded| !loaded.contains(embedded)) {
        let loaded = match loaded.as_slice() {
            [] => "no release".to_owned(),
            some => some.iter().map(ReleaseId::to_string).collect::<Vec<_>>().join(" and "),
        };
        let says = kernel.embedded.map_or_else(|| "none".to_owned(), ReleaseId::to_string);
        return Err(KexecFault::Elsewhere { loaded, says });
    }
    Ok(Some(Began { boot_id, pcr10: left.pcr10.clone(), measured: left.measured && measured }))
}

/// What a kernel says before a kexec, taken from where it began.
fn left(began: &Began, catalog: &Catalog, list: &[u8]) -> Left {
    let boot_id = began.boot_id.clone();
    match ImaList::read(list) {
        Ok(list) => Left {
            boot_id,
            pcr10: id(&list.replay(raw(&began.pcr10))),
            measured: began.measured && !list.is_unmeasured(),
            loaded: releases(&list, catalog).map_err(|foreign| foreign.to_string()),
        },
        Err(error) => Left {
            boot_id,
            pcr10: began.pcr10.clone(),
            measured: began.measured,
            loaded: Err(KexecFault::List(error).to_string()),
        },
    }
}

/// How the boot that comes will stand, if nothing else happens.
fn outlook(left: &Left) -> (AttestationState, String) {
    match &left.loaded {
        Err(reason) => (AttestationState::Failed, reason.clone()),
        Ok(_) if !left.measured => (AttestationState::Attested, "its kexecs are not measured".to_owned()),
        Ok(loaded) if loaded.is_empty() => {
            (AttestationState::Failed, "no release published here is loaded by its kernel's list".to_owned())
        }
        Ok(_) => (AttestationState::Attested, "what is loaded is published here".to_owned()),
    }
}

impl Control {
    /// A machine goes by kexec. One that has nothing to lose is told so: its boot is not attested, or its release measures nothing.
    pub(super) async fn leaves(
        &self,
        key: &KeyId,
        machine: &MachineId,
        boot_id: &str,
        list: &[u8],
    ) -> Result<Judged, ControlError> {
        let (now, catalog) = (now_ms(), self.catalog());
        let judged = |(state, reason)| Judged { state, reason, secrets: None, refused: None };
        let (pending, outlook) = {
            let mut inner = self.lock();
            let known = inner.machines.get(machine).filter(|m| speaks(Some(m), key, boot_id));
            let known = known.ok_or(AttestationError::NotReported)?;
            let began = known.attestations.began.clone().filter(|began| began.boot_id == boot_id);
            let Some(began) = began else {
                let (_, reason) = known.proof().map(|_| known.attestation()).ok_or(AttestationError::NotProven)?;
                return Ok(judged((AttestationState::Unattested, reason)));
            };
            inner.attestations.count(machine, now)?;
            let left = left(&began, &catalog, list);
            let outlook = outlook(&left);
            let mut pending = Pending::default();
            self.step(&mut inner, machine, Event::Leaves(Box::new(left)), now, &mut pending)?;
            (pending, outlook)
        };
        self.finish(pending).await?;
        Ok(judged(outlook))
    }
}
