//! Machines' certificates: issued where the fleet's rules allow it, kept until they are over, and ended before that with what they
//! rest on; and the list of those that were. Nothing here knows a private key of a machine.

use super::attestation::speaks;
use super::ca::OpenCa;
use super::secrets::barred;
use super::steady::Steady;
use super::{Control, Inner, Pending, now_ms};
use crate::audit::Line;
use crate::catalog::Catalog;
use crate::error::{CertificateError, ControlError, StoreError};
use crate::machine_ca::Ca;
use crate::store::{Commit, Store};
use crate::view::CertificateView;
use bytes::Bytes;
use jiff::Timestamp;
use kiln_fleet::{CertificateDemand, CertificateEnd, Machine, Millis};
use kiln_images::SiteDir;
use kiln_protocol::{
    CertificateAnswer, CertificateRequest, HexBytes, IssuedCertificate, KeyId, MachineId, ReleaseId, possession,
};
use kiln_release::machine_ca::{CrlReason, MachineCertificate, POINT, Revoked, SERIAL, serial};
use kiln_release::{CertificatePolicy, Manifest, hex};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

const PREFIX: &str = "certificate/";
/// Certificates of one machine that are known at a time, those that ended included: one that boots in a loop asks in each boot.
const KEPT: usize = 32;
/// It holds from so long before it is issued on: a program's clock may be slow.
const BACK_MS: Millis = 5 * 60_000;
/// The list is signed anew after so long, when it is asked for.
const LIST_AGE_MS: Millis = 3_600_000;
/// And holds for so long.
const LIST_LIFE_MS: Millis = 24 * 3_600_000;
/// What is over stays on the list for so long (RFC 5280 §3.3: on one list after its end).
const AFTER_MS: Millis = 2 * LIST_AGE_MS;
/// How often is looked for what is over, or rests on nothing any more.
const LOOK_MS: Millis = 10 * 60_000;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Issued {
    serial: HexBytes,
    /// The identity key that asked for it.
    key: KeyId,
    /// Its common name: the machine's title then. None: issued before names were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Which CA signed it. None: issued before that was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca: Option<KeyId>,
    boot_id: String,
    at: Millis,
    until: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ended: Option<(Millis, CertificateEnd)>,
}

impl Issued {
    fn holds(&self, now: Millis) -> bool {
        self.ended.is_none() && now < self.until
    }

    fn is_kept(&self, now: Millis) -> bool {
        now < self.until.saturating_add(AFTER_MS)
    }

    fn revoked(&self) -> Option<Revoked> {
        let (at, end) = self.ended?;
        let reason = match end {
            CertificateEnd::KeyRevoked | CertificateEnd::Quarantined | CertificateEnd::Failed => {
                CrlReason::KeyCompromise
            }
            CertificateEnd::OutOfService | CertificateEnd::Wiped => CrlReason::CessationOfOperation,
            CertificateEnd::OtherKey | CertificateEnd::OtherName => CrlReason::AffiliationChanged,
            CertificateEnd::Superseded => CrlReason::Superseded,
        };
        let serial: [u8; SERIAL] = self.serial.0.as_slice().try_into().ok()?;
        Some(Revoked { serial, at: time(at), reason })
    }
}

/// As the store keeps them: those of one machine, the newest last.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    machine: MachineId,
    issued: Vec<Issued>,
}

/// The list of certificates that were revoked and are not over. Each answer shares it: whoever asks may take it slowly.
#[derive(Debug, Clone)]
pub struct RevokedList {
    /// As RFC 5280 §5 has it.
    pub der: Bytes,
    /// The same for programs that read PEM; behind it that of the CA before, while its certificates are not over.
    pub pem: Bytes,
}

/// What the store holds of one machine.
#[derive(Debug)]
pub(super) struct Stored(Vec<Issued>);

#[derive(Debug, Default)]
struct Known {
    issued: BTreeMap<MachineId, Vec<Issued>>,
    /// The list as it was signed last, and when.
    list: Option<(Millis, RevokedList)>,
    /// The number of the last list.
    number: u64,
    /// When all were looked at last.
    looked: Millis,
    /// By which time what is over is forgotten.
    steady: Steady,
}

impl Known {
    /// Forgets what is over, and of whom something was.
    fn forget(&mut self, now: Millis, at: Instant) -> Vec<MachineId> {
        let now = self.steady.time(now, at);
        let mut of = Vec::new();
        for (id, list) in &mut self.issued {
            let before = list.len();
            list.retain(|issued| issued.is_kept(now));
            if list.len() != before {
                of.push(id.clone());
            }
        }
        of
    }
}

/// All of a site. Locked after the fleet, where both are.
#[derive(Debug)]
pub(super) struct Certificates {
    known: Mutex<Known>,
    ca: OpenCa,
}

fn time(ms: Millis) -> Timestamp {
    Timestamp::from_millisecond(i64::try_from(ms).unwrap_or(i64::MAX)).unwrap_or(Timestamp::MAX)
}

fn note(machine: &MachineId) -> String {
    format!("{PREFIX}{machine}")
}

fn number(issued: &Issued) -> String {
    hex::encode(&issued.serial.0)
}

impl Certificates {
    /// What the store holds.
    pub(super) async fn load(store: &Store, site: &SiteDir) -> Result<Self, ControlError> {
        let bad = |e: serde_json::Error| StoreError::Row { id: PREFIX.to_owned(), reason: e.to_string() };
        let read = |note: String| serde_json::from_str::<Kept>(&note).map_err(bad);
        let kept = store.notes(PREFIX).await?.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let issued = kept.into_iter().map(|kept| (kept.machine, kept.issued)).collect();
        let ca = OpenCa::at_start(site.path.join("online"), &site.name);
        let known = Known { issued, ..Known::default() };
        Ok(Self { known: Mutex::new(known), ca })
    }

    /// Whether all of them are to be looked at again: every ten minutes, also after the clock went back.
    pub(super) fn due(&self, now: Millis) -> bool {
        let mut known = self.lock();
        let due = !(known.looked..known.looked.saturating_add(LOOK_MS)).contains(&now);
        if due {
            known.looked = now;
        }
        due
    }

    /// What the store holds of one machine's.
    pub(super) async fn stored(store: &Store, machine: &MachineId) -> Result<Stored, StoreError> {
        let key = note(machine);
        let Some(text) = store.note(&key).await? else { return Ok(Stored(Vec::new())) };
        let kept = serde_json::from_str::<Kept>(&text);
        kept.map(|kept| Stored(kept.issued)).map_err(|e| StoreError::Row { id: key, reason: e.to_string() })
    }

    /// After a commit that failed. What was ended is ended again by whoever orders it again, and what was issued was handed to
    /// nobody: it drives no other out.
    pub(super) fn put_back(&self, machine: &MachineId, stored: Stored) {
        let mut known = self.lock();
        known.list = None;
        if stored.0.is_empty() {
            known.issued.remove(machine);
        } else {
            known.issued.insert(machine.clone(), stored.0);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no code panics under this lock")
    }
}

fn wants(manifest: &Manifest) -> Option<CertificateDemand> {
    manifest.certificate.as_ref().map(|wanted| match wanted.policy {
        CertificatePolicy::Approved => CertificateDemand::Approved,
        CertificatePolicy::Attested => CertificateDemand::Attested,
    })
}

/// What the release that it runs wants.
fn declared(machine: &Machine, catalog: &Catalog) -> Option<CertificateDemand> {
    let running = machine.running.as_ref()?;
    let release = ReleaseId { image: running.image.clone(), release: running.release };
    let manifest = &catalog.releases.get(&release)?.manifest;
    wants(manifest).filter(|_| manifest.verity.root_hash == running.root_hash.as_str())
}

impl Control {
    /// Whether the machine that proved this key may have a certificate, and none that it was issued holds.
    pub(super) fn certify_word(&self, id: &MachineId, key: &KeyId) -> bool {
        let catalog = self.catalog();
        let inner = self.look();
        let Some(machine) = inner.machines.get(id) else { return false };
        let Some(demand) = declared(machine, &catalog) else { return false };
        let now = now_ms();
        let has_one = {
            let known = self.certificates.lock();
            // Nobody who trusts a CA that was begun anew takes one of the CA before it.
            let ca = self.certificates.ca.now().map(|ca| ca.id());
            let current = |one: &Issued| ca.is_none() || one.ca.is_none() || one.ca == ca;
            let holds = |one: &Issued| one.key == *key && one.holds(now) && current(one);
            known.issued.get(id).is_some_and(|issued| issued.iter().any(holds))
        };
        !has_one && machine.certificate_due(key, Some(demand), &barred(&catalog)).is_ok()
    }

    /// Answers a machine that asks for a certificate.
    pub async fn certify(&self, key: &KeyId, request: &CertificateRequest) -> Result<CertificateAnswer, ControlError> {
        let point: [u8; POINT] = request.public_key.0.as_slice().try_into().map_err(|_| CertificateError::PublicKey)?;
        let signed = possession(&request.machine, key, &request.boot_id, &point);
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &point)
            .verify(&signed, &request.proof.0)
            .map_err(|_| CertificateError::Possession)?;
        // Before the fleet's lock. There is one where the release that the machine runs is published.
        let ca = self.certificates.ca.get(self.certificates_wanted(), now_ms()).await;
        let (issued, pending) = {
            let inner = self.lock();
            let mut pending = Pending::default();
            let issued = self.issue(&inner, key, request, &point, ca, &mut pending);
            (issued, pending)
        };
        // Not handed out before it is known for good: else it could not be revoked.
        self.finish(pending).await?;
        match issued {
            Ok(issued) => Ok(CertificateAnswer { issued: Some(issued), refused: None }),
            Err(CertificateError::Refused(refusal)) => {
                let refused = Some(format!("{refusal} ({})", refusal.kind()));
                Ok(CertificateAnswer { issued: None, refused })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn issue(
        &self,
        inner: &Inner,
        key: &KeyId,
        request: &CertificateRequest,
        point: &[u8; POINT],
        ca: Result<Arc<Ca>, CertificateError>,
        pending: &mut Pending,
    ) -> Result<IssuedCertificate, CertificateError> {
        let (id, now) = (&request.machine, now_ms());
        let machine = inner.machines.get(id).filter(|m| speaks(Some(m), key, &request.boot_id));
        let machine = machine.ok_or(CertificateError::NotReported)?;
        let catalog = self.catalog();
        machine.certificate_due(key, declared(machine, &catalog), &barred(&catalog))?;
        let ca = ca?;
        let mut known = self.certificates.lock();
        let known = &mut *known;
        let steady = known.steady.time(now, Instant::now());
        let list = known.issued.entry(id.clone()).or_default();
        list.retain(|issued| issued.is_kept(steady));
        if list.len() >= KEPT {
            let first = list.iter().map(|issued| issued.until.saturating_add(AFTER_MS)).min().unwrap_or(now);
            return Err(CertificateError::TooMany { limit: KEPT, minutes: first.saturating_sub(now) / 60_000 + 1 });
        }
        let mut random = [0; SERIAL];
        SystemRandom::new().fill(&mut random).map_err(|_| CertificateError::Signing)?;
        let (number, until) = (serial(random), now.saturating_add(self.config.certificate_life));
        let certificate = ca.issue(&MachineCertificate {
            serial: number,
            name: machine.title(),
            id: id.as_str(),
            point,
            from: time(now.saturating_sub(BACK_MS)),
            until: time(until),
        })?;
        // The one before goes on beside it, until it is over; those before that do not.
        let before = list.iter_mut().filter(|issued| issued.holds(now));
        for issued in before.rev().skip(1) {
            issued.ended = Some((now, CertificateEnd::Superseded));
            known.list = None;
        }
        let first = list.iter().all(|issued| issued.boot_id != request.boot_id);
        let (boot_id, number) = (request.boot_id.clone(), HexBytes(number.to_vec()));
        let serial = hex::encode(&number.0);
        let name = Some(machine.title().to_owned());
        list.push(Issued {
            serial: number,
            key: key.clone(),
            name,
            ca: Some(ca.id()),
            boot_id,
            at: now,
            until,
            ended: None,
        });
        // It also fails where this rests on a step that is not stored.
        pending.commits.push(self.keep(id, list));
        pending.touched.push(id.clone());
        // Its renewals are no news.
        if first {
            let what = format!("was issued a certificate, serial {serial}, until {}", time(until));
            self.audit(pending, machine, "kiln", what);
        }
        let lasts_s = self.config.certificate_life / 1000;
        Ok(IssuedCertificate { certificate, ca: ca.pem.clone(), serial, lasts_s })
    }

    /// Where that fails, the machine is put back, and its certificates with it: [`Certificates::put_back`].
    fn keep(&self, machine: &MachineId, list: &[Issued]) -> Commit {
        if list.is_empty() {
            return self.store.erase_of(machine, note(machine));
        }
        let kept = Kept { machine: machine.clone(), issued: list.to_vec() };
        let text = serde_json::to_string(&kept).expect("ids, numbers and words always become JSON");
        self.store.remember_of(machine, note(machine), text)
    }

    /// Looks at what was issued to every machine: what it rests on may have changed outside of a step, as by another key in kiln.toml,
    /// or at a step that was not stored. A machine that is out of service and silent has no next one.
    pub(super) fn end_all_certificates(&self, now: Millis) -> Pending {
        let inner = self.lock();
        let mut pending = Pending::default();
        for machine in inner.machines.values() {
            self.end_certificates(machine, now, &mut pending);
        }
        pending
    }

    /// Ends what was issued to a machine and rests on something that is not so any more. Called at each of its steps.
    pub(super) fn end_certificates(&self, machine: &Machine, now: Millis, pending: &mut Pending) {
        let mut known = self.certificates.lock();
        let known = &mut *known;
        let Some(list) = known.issued.get_mut(&machine.id) else { return };
        let mut ended = Vec::new();
        for issued in list.iter_mut().filter(|issued| issued.holds(now)) {
            if let Some(end) = machine.certificate_ended(&issued.key, issued.name.as_deref()) {
                issued.ended = Some((now, end));
                ended.push(format!("revoked the certificate with serial {}: {}", number(issued), end.words()));
            }
        }
        if ended.is_empty() {
            return;
        }
        known.list = None;
        pending.commits.push(self.keep(&machine.id, list));
        for what in ended {
            // Also of a machine that is forgotten in this very step.
            pending.commits.push(self.store.audit(Line::done(now, "kiln", machine.title(), what)));
        }
    }

    /// Forgets what is over.
    pub(super) fn prune_certificates(&self, now: Millis) -> Pending {
        let mut pending = Pending::default();
        let mut known = self.certificates.lock();
        for id in known.forget(now, Instant::now()) {
            if let Some(list) = known.issued.get(&id) {
                pending.commits.push(self.keep(&id, list));
            }
        }
        known.issued.retain(|_, list| !list.is_empty());
        pending
    }

    /// A machine's newest certificate, if it is not over.
    pub(super) fn certificate_view(&self, id: &MachineId) -> Option<CertificateView> {
        let ms = |at: Millis| i64::try_from(at).unwrap_or(i64::MAX);
        let known = self.certificates.lock();
        let newest = known.issued.get(id)?.last().filter(|issued| now_ms() < issued.until)?;
        Some(CertificateView {
            serial: number(newest),
            issued_ms: ms(newest.at),
            expires_ms: ms(newest.until),
            revoked: newest.ended.map(|(_, end)| end.words().to_owned()),
        })
    }

    /// Whether some release that is published wants certificates: then there is a CA, before the first machine asks.
    fn certificates_wanted(&self) -> bool {
        self.catalog().releases.values().any(|release| release.manifest.certificate.is_some())
    }

    /// The CA's certificate, PEM; behind it those of the next one and of the one before, while it is rotated.
    pub(crate) async fn machine_ca(&self) -> Result<String, CertificateError> {
        let ca = self.certificates.ca.get(self.certificates_wanted(), now_ms()).await?;
        Ok(format!("{}{}", ca.pem, self.certificates.ca.beside()))
    }

    /// The list that was signed last, or a new one.
    pub async fn revoked_certificates(&self) -> Result<RevokedList, CertificateError> {
        let now = now_ms();
        let ca = self.certificates.ca.get(self.certificates_wanted(), now).await?;
        let mut known = self.certificates.lock();
        let known = &mut *known;
        if let Some((at, list)) = &known.list
            && (*at..at.saturating_add(LIST_AGE_MS)).contains(&now)
        {
            return Ok(list.clone());
        }
        let steady = known.steady.time(now, Instant::now());
        let kept = known.issued.values().flatten().filter(|issued| issued.is_kept(steady));
        let revoked: Vec<Revoked> = kept.filter_map(Issued::revoked).collect();
        // The time, so that it grows over the server's starts as well.
        known.number = now.max(known.number + 1);
        let (made, next) = (time(now.saturating_sub(BACK_MS)), time(now.saturating_add(LIST_LIFE_MS)));
        let der = ca.list(known.number, made, next, &revoked)?;
        let mut pem = hex::pem_encode("X509 CRL", &der);
        // Programs ask for a list of each CA: what the one before signed is on its own. Serial numbers are random, so that
        // neither list names another's certificate by what is more on it.
        if let Some(before) = self.certificates.ca.before() {
            pem += &hex::pem_encode("X509 CRL", &before.list(known.number, made, next, &revoked)?);
        }
        let list = RevokedList { der: der.into(), pem: pem.into() };
        known.list = Some((now, list.clone()));
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A host whose clock is ahead for a while: nothing that was revoked is forgotten, in memory or in what is stored of it.
    #[test]
    fn a_clock_that_jumps_ahead_takes_nothing_off_the_list() {
        let machine: MachineId = "00000000-0000-0000-0000-000000000001".parse().unwrap();
        let (start, first) = (Instant::now(), 1_800_000_000_000);
        let day = 24 * 3_600_000;
        let revoked = Issued {
            serial: HexBytes(vec![1; SERIAL]),
            key: "01".repeat(32).parse().unwrap(),
            name: None,
            ca: None,
            boot_id: "b".into(),
            at: first,
            until: first + day,
            ended: Some((first, CertificateEnd::KeyRevoked)),
        };
        let mut known = Known { issued: BTreeMap::from([(machine.clone(), vec![revoked])]), ..Known::default() };
        let minutes = |n: u64| start + Duration::from_secs(60 * n);
        assert!(known.forget(first, minutes(0)).is_empty());
        // Some looks by a clock that is a year ahead.
        for look in 1..7 {
            assert!(known.forget(first + 365 * day, minutes(10 * look)).is_empty(), "{look}");
        }
        assert_eq!(known.issued[&machine].len(), 1);
        // With the time that passes it goes: a day, and two hours in which it is still listed.
        let over = 26 * 60;
        assert!(known.forget(first + (over - 1) * 60_000, minutes(over - 1)).is_empty());
        assert_eq!(known.forget(first + over * 60_000, minutes(over)), std::slice::from_ref(&machine));
        assert!(known.issued[&machine].is_empty());
    }
}
