//! The director's signatures: one envelope per assignment, kept until it changes or nears its end; one freshness
//! statement per request.

use super::{Control, Inner};
use crate::catalog::Catalog;
use crate::error::ControlError;
use crate::store::Envelope;
use jiff::{SignedDuration, Timestamp};
use kiln_protocol::{
    ASSIGNMENT_TYPE, Architecture, Assignment, BoundMachine, FRESHNESS_TYPE, Freshness, MachineId, Nonce, SPEC_VERSION,
};
use kiln_release::{hex, sign_envelope};

/// How long an assignment holds.
const LIFE: SignedDuration = SignedDuration::from_hours(30 * 24);
/// It is signed anew when so little is left.
const RENEW: SignedDuration = SignedDuration::from_hours(10 * 24);

/// Seconds only: that is how TUF writes times.
fn whole(t: Timestamp) -> Timestamp {
    Timestamp::from_second(t.as_second()).unwrap_or(t)
}

impl Control {
    /// The machine's envelope, signed if there is none that fits. `Ok(None)`: it cannot be signed, and the text says why.
    /// The flag tells whether it is new and has to be stored.
    pub(crate) fn envelope(
        &self,
        inner: &mut Inner,
        id: &MachineId,
        catalog: &Catalog,
        now: Timestamp,
    ) -> Result<Result<(Envelope, bool), String>, ControlError> {
        let Some(machine) = inner.machines.get(id) else { return Ok(Err("it is not known".into())) };
        let (Some(assigned), Some(key)) = (&machine.assigned, &machine.key) else {
            return Ok(Err("nothing is assigned".into()));
        };
        // Before what was signed earlier: that is not handed out again either.
        let (release, floor) = (&assigned.release, catalog.site.floor(assigned.release.image.as_str()));
        if release.release < floor {
            return Ok(Err(format!("{release} is below the floor {floor} of its image: assign another")));
        }
        // One that another director has signed is not believed any more.
        let director = self.director().public().id();
        let role = machine.role.clone().unwrap_or_default();
        let settings = self.config.roles.get(&role).map(|role| role.settings.clone()).unwrap_or_default();
        if let Some(e) = inner.envelopes.get(id)
            && e.settings == settings
            && e.key == key.as_str()
            && e.role == role
            && e.sequence == assigned.sequence
            && e.text.contains(&format!("\"keyid\":\"{director}\""))
            && e.expires > (now + RENEW).as_second()
        {
            return Ok(Ok((e.clone(), false)));
        }
        let Some(release) = catalog.releases.get(&assigned.release) else {
            return Ok(Err(format!("{} is assigned, but the repository does not hold it any more", assigned.release)));
        };
        let Ok(arch) = release.manifest.architecture.parse::<Architecture>() else {
            return Ok(Err(format!("{} is for an architecture this kiln does not know", assigned.release)));
        };
        let assignment = Assignment {
            type_: ASSIGNMENT_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            machine: BoundMachine { id: id.clone(), key: key.clone() },
            image: assigned.release.image.clone(),
            release: assigned.release.release,
            manifest_sha256: release.manifest_sha256.clone(),
            role: role.clone(),
            arch,
            sequence: assigned.sequence,
            rebuild: assigned.rebuild,
            settings: settings.clone(),
            issued: whole(now),
            expires: whole(now + LIFE),
        };
        let envelope = Envelope {
            text: self.sign(&assignment)?,
            key: key.to_string(),
            role,
            settings,
            sequence: assigned.sequence,
            expires: assignment.expires.as_second(),
        };
        inner.envelopes.insert(id.clone(), envelope.clone());
        Ok(Ok((envelope, true)))
    }

    pub(crate) fn freshness(&self, nonce: &Nonce, text: &str, now: Timestamp) -> Result<String, ControlError> {
        let freshness = Freshness {
            type_: FRESHNESS_TYPE.into(),
            spec_version: SPEC_VERSION.into(),
            nonce: nonce.clone(),
            assignment_sha256: hex::sha256(text.as_bytes())
                .parse()
                .expect("hex::sha256 writes 64 lower-case hex digits"),
            now: whole(now),
        };
        self.sign(&freshness)
    }

    pub(super) fn sign(&self, statement: &impl serde::Serialize) -> Result<String, ControlError> {
        self.counts.signed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(sign_envelope(statement, &[self.director().as_ref()])?)
    }
}
