//! A report and its answer.

use super::{Control, Inner, Pending, now_ms};
use crate::catalog::Catalog;
use crate::config::Listed;
use crate::error::ControlError;
use crate::store::{Commit, Envelope};
use jiff::Timestamp;
use kiln_fleet::{Desire, Event, Machine, Millis, Reported, StateKind, desire};
use kiln_protocol::{
    DbxOffer, Decision, Desired, Grant, KeyId, KeyStorage, MachineId, Nonce, OrderGiven, ReleaseId, Reply, Report,
    SecretsWord, Sha256Hex, Via,
};
use kiln_release::hex;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Longest hold of a report.
pub const MAX_WAIT_S: u32 = 55;
/// Reports held at once.
pub const MAX_HELD: usize = 5_000;

/// Machines with one identity key that are held in one step: one is enough to know, and whoever has a copy of a key can make
/// up many.
const COPIES: usize = 8;

/// When to come again, in milliseconds.
mod again {
    /// A machine on its way.
    pub(super) const BUSY: u64 = 2_000;
    /// One that holds its reports.
    pub(super) const HELD: u64 = 1_000;
    /// All others.
    pub(super) const CALM: u64 = 30_000;
}

/// One held report counts until it is dropped, also when its connection breaks.
struct Held<'a>(&'a Control);

impl<'a> Held<'a> {
    fn new(control: &'a Control) -> Self {
        control.held.fetch_add(1, Ordering::Relaxed);
        Self(control)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Control {
    /// Takes a report in and answers it; held as long as it asks for and nothing changes.
    pub async fn report(&self, key: KeyId, mut report: Report) -> Result<Reply, ControlError> {
        report.tame();
        let id = report.machine.id.clone();
        let nonce = report.nonce.clone();
        let (wait_s, etag) = (report.wait_s.min(MAX_WAIT_S), report.desired_etag.clone());
        let pending = self.take_in(&id, key.clone(), report)?;
        self.finish(pending).await?;

        let deadline = Instant::now() + Duration::from_secs(u64::from(wait_s));
        let mut held = None;
        let mut changes = self.changes();
        loop {
            // Before the look: what changes from here on ends the wait below.
            changes.mark_unchanged();
            let (wanted, mut pending) = self.wanted(&id, &key)?;
            let (order, rests) = self.stored_order(&id, &key);
            pending.commits.extend(rests);
            let wanted = wanted.with_order(order);
            let word = self.secrets_word(&id, &key).filter(|_| !self.access.is_revoked(&key));
            let (attest, certify) = (self.wants_proof(&id, &key), self.certify_word(&id, &key));
            let wanted = Wanted { attest, certify, ..wanted.with_secrets(word) };
            self.finish(pending).await?;
            let may_wait = self.held.load(Ordering::Relaxed) < MAX_HELD;
            let again_ms = match (wait_s > 0 && may_wait, wanted.busy) {
                (true, _) => again::HELD,
                (false, true) => again::BUSY,
                (false, false) => again::CALM,
            };
            let over = wait_s == 0 || wanted.etag != etag || Instant::now() >= deadline;
            if over || (held.is_none() && !may_wait) {
                return self.reply(wanted, &nonce, again_ms, may_wait);
            }
            held.get_or_insert_with(|| Held::new(self));
            let ends = tokio::select! {
                changed = changes.changed() => changed.is_err(),
                () = tokio::time::sleep_until(deadline) => false,
                () = self.stopped() => true,
            };
            if ends {
                return self.reply(wanted, &nonce, again_ms, may_wait);
            }
        }
    }

    fn take_in(&self, id: &MachineId, key: KeyId, report: Report) -> Result<Pending, ControlError> {
        let catalog = self.catalog();
        let now = now_ms();
        let mut inner = self.lock();
        let mut pending = Pending::default();
        if !inner.machines.contains_key(id) {
            self.drop_ghosts(&mut inner, id, &report, &mut pending);
            self.admit_report(&mut inner, id, now, &mut pending)?;
        }
        let heard_at = inner.positions.of(&report.machine.macs, now).map(str::to_owned);
        let place = |inner: &mut Inner| {
            if let Some(machine) = inner.machines.get_mut(id) {
                machine.heard_at.clone_from(&heard_at);
            }
        };
        place(&mut inner);
        let published_root = report.running.as_ref().and_then(|r| {
            let id = ReleaseId { image: r.image.clone(), release: r.release };
            catalog.releases.get(&id).and_then(|r| r.manifest.verity.root_hash.parse::<Sha256Hex>().ok())
        });
        self.step(
            &mut inner,
            id,
            Event::Report(Box::new(Reported { key, report, published_root })),
            now,
            &mut pending,
        )?;
        // Of one that is known only since this report.
        place(&mut inner);
        self.approve_listed(&mut inner, id, &catalog, &mut pending)?;
        self.hold_copies(&mut inner, id, now, &mut pending)?;
        // Not for a stranger: it is the machine that is seen.
        if inner.machines.get(id).is_some_and(|m| m.last_seen == now) {
            inner.note_seen(id, now);
        }
        Ok(pending)
    }

    /// Holds this machine and others that have its identity key, where both live.
    fn hold_copies(
        &self,
        inner: &mut Inner,
        id: &MachineId,
        now: Millis,
        pending: &mut Pending,
    ) -> Result<(), ControlError> {
        let Some(machine) = inner.machines.get(id) else { return Ok(()) };
        let Some(key) = machine.key.as_ref().filter(|_| machine.reported == Some(now)) else { return Ok(()) };
        let title = machine.title().to_owned();
        let copies = inner.keys.others(key, id).filter_map(|other| inner.machines.get(other));
        // All are looked at, as whoever makes up some chooses their ids; what costs is the step. Those that people know come first.
        let mut copies: Vec<&Machine> = copies.filter(|other| machine.lives_beside(other, now)).collect();
        copies.sort_by_key(|other| (!other.state.kind.in_fleet(), std::cmp::Reverse(other.reported)));
        copies.truncate(COPIES);
        let copies: Vec<(MachineId, String)> =
            copies.into_iter().map(|other| (other.id.clone(), other.title().to_owned())).collect();
        for (other, with) in copies {
            self.step(inner, id, Event::KeyShared { with }, now, pending)?;
            self.step(inner, &other, Event::KeyShared { with: title.clone() }, now, pending)?;
        }
        Ok(())
    }

    /// A machine whose firmware was heard under another id than its agent gives: some ROMs swap the UUID's bytes.
    fn drop_ghosts(&self, inner: &mut Inner, id: &MachineId, report: &Report, pending: &mut Pending) {
        for mac in &report.machine.macs {
            let Some(ghost) = inner.macs.owner(mac).filter(|g| *g != id).cloned() else { continue };
            let unproven = |m: &Machine| m.key.is_none() && m.state.kind == StateKind::Discovered;
            if inner.machines.get(&ghost).is_some_and(unproven)
                && let Some(mut machine) = inner.machines.remove(&ghost)
            {
                machine.id = id.clone();
                machine.pin(self.config.key_of(id));
                machine.state = Machine::discovered(id.clone(), machine.state.since).state;
                inner.comparing.drop(&ghost);
                inner.names.forget(&ghost);
                inner.macs.forget(&ghost);
                inner.names.note(id, machine.name.as_ref());
                inner.machines.insert(id.clone(), machine);
                inner.macs.put(mac, id);
                pending.commits.push(self.store.forget(&ghost));
                pending.gone.push(ghost);
            }
        }
    }

    /// The pre-loaded list approves at the first report, where a person could; else the machine waits, and says why.
    pub(crate) fn approve_listed(
        &self,
        inner: &mut Inner,
        id: &MachineId,
        catalog: &Catalog,
        pending: &mut Pending,
    ) -> Result<(), ControlError> {
        let Some(machine) = inner.machines.get(id) else { return Ok(()) };
        if machine.state.kind != StateKind::Discovered || machine.key.is_none() {
            return Ok(());
        }
        let serial = machine.facts.as_ref().map(|facts| facts.serial.as_str());
        let listed = self.config.listed(id, serial).map(|listed| (listed, None));
        let Some((listed, place)) = listed.or_else(|| self.listed_by_position(machine)) else { return Ok(()) };
        if let Some(other) = place.as_ref().and_then(|place| Self::stands_at(inner, place)) {
            let reason = format!(
                "kiln.toml lists its position, and it is not approved: its position is {other}'s already. If this takes its place, \
                 run `kiln machine retire {other}`"
            );
            return self.step(inner, id, Event::NotApproved { reason }, now_ms(), pending);
        }
        let image = self.config.image_of(&listed.role)?;
        let Some(release) = catalog.newest(image).cloned() else { return Ok(()) };
        if let Err(error) = self.check_listed(inner, id, listed, &release) {
            let (name, role) = (&listed.name, &listed.role);
            let reason = format!("kiln.toml lists it as {name} with role {role}, and it is not approved: {error}");
            return self.step(inner, id, Event::NotApproved { reason }, now_ms(), pending);
        }
        let how = place.as_ref().map_or_else(String::new, |place| format!(", by its position ({place})"));
        let passed = catalog.passed_over(image);
        let what = format!("approved as {} with role {}, to run {release}{how}{passed}", listed.name, listed.role);
        if let Some(machine) = inner.machines.get_mut(id) {
            machine.position = place;
            if listed.key.is_some() {
                // It was compared above; from here on nothing, also no clear, gives the machine to another.
                machine.pin(listed.key.as_ref());
            }
        }
        let event = Event::Approve { name: listed.name.clone(), role: listed.role.clone(), release };
        self.step(inner, id, event, now_ms(), pending)?;
        if let Some(machine) = inner.machines.get(id) {
            self.audit(pending, machine, "kiln.toml", what);
        }
        Ok(())
    }

    /// That a listed machine alone claims its serial number, where that says which it is; and that it can have its name, and
    /// run what its role would be given.
    fn check_listed(
        &self,
        inner: &Inner,
        id: &MachineId,
        listed: &Listed,
        release: &ReleaseId,
    ) -> Result<(), ControlError> {
        if let (Some(serial), Some(machine)) = (&listed.serial, inner.machines.get(id)) {
            if listed.key.is_some() && listed.key != machine.key {
                return Err(ControlError::SerialOfAnotherKey { serial: serial.clone() });
            }
            // Anybody can say that a serial number is theirs: who of two is right, a person knows.
            if let Some(other) = inner.claimants(machine).into_iter().next() {
                return Err(ControlError::SerialClaimed { serial: serial.clone(), machine: other.title });
            }
        }
        if inner.names.is_taken(&listed.name, id) {
            return Err(ControlError::NameTaken(listed.name.clone()));
        }
        self.check_fits(inner, id, release)?;
        self.check_role(&listed.role, release)
    }

    /// The line of the list for where it was heard. Only for a machine that has nothing better to be known by than its name.
    fn listed_by_position(&self, machine: &Machine) -> Option<(&Listed, Option<String>)> {
        let place = machine.heard_at.as_ref()?;
        let listed = self.config.positions.get(place)?;
        let is_name = machine.facts.as_ref().is_some_and(|facts| facts.key_storage == KeyStorage::Ephemeral);
        is_name.then(|| (listed, Some(place.clone())))
    }

    /// Whose the place is: two machines behind one port are for a person to tell apart.
    fn stands_at(inner: &Inner, place: &str) -> Option<String> {
        let mut there = inner.machines.values().filter(|m| m.position.as_deref() == Some(place));
        there.next().map(|machine| machine.title().to_owned())
    }

    /// What is wanted of the machine now. Signs nothing but a new assignment: a held report is looked at again at every
    /// change of the fleet, and nearly all of them are not its own.
    fn wanted(&self, id: &MachineId, key: &KeyId) -> Result<(Wanted, Pending), ControlError> {
        self.counts.looked.fetch_add(1, Ordering::Relaxed);
        let catalog = self.catalog();
        let mut inner = self.lock();
        let mut pending = Pending::default();
        // A report that was held when its key was taken away.
        if self.access.is_revoked(key) {
            return Ok((Wanted::wait("this identity key was revoked".into(), false), pending));
        }
        let Some(machine) = inner.machines.get(id) else {
            let reason = "this machine was forgotten; its next report makes it known again".into();
            return Ok((Wanted::wait(reason, true), pending));
        };
        let assigned = match desire(machine, key) {
            Desire::Wait(reason) => return Ok((Wanted::wait(reason, false), pending)),
            Desire::Run(assigned) => assigned,
        };
        let envelope = self.envelope(&mut inner, id, &catalog, Timestamp::now())?;
        let unsigned = envelope.as_ref().err();
        if let Some(machine) = inner.machines.get_mut(id)
            && machine.unsigned.as_ref() != unsigned
        {
            machine.unsigned = unsigned.cloned();
            pending.touched.push(id.clone());
        }
        let envelope = match envelope {
            Err(reason) => return Ok((Wanted::wait(reason, false), pending)),
            Ok((envelope, is_new)) => {
                if is_new {
                    self.save(&inner, id, &mut pending)?;
                }
                envelope
            }
        };
        let granted = inner.grant(id, self.config.limits);
        let is_new = inner.machines.get(id).is_some_and(|m| m.granted != Some(assigned.sequence));
        if granted == Grant::Go && is_new {
            self.step(&mut inner, id, Event::Granted, now_ms(), &mut pending)?;
        }
        let busy = inner.machines.get(id).is_some_and(|m| !m.is_available() || !m.runs_assigned());
        let dbx = inner.machines.get(id).and_then(|machine| super::dbx::offer(&catalog, machine));
        let thresholds = self.thresholds(inner.machines.get(id).and_then(|m| m.role.as_ref()));
        if pending.commits.is_empty() {
            // Another's step, which is not stored yet, may be what it rests on.
            pending.commits.push(self.store.written(id));
        }
        drop(inner);
        let mut wanted = Wanted::run(envelope, assigned.via, granted, busy);
        (wanted.thresholds, wanted.dbx) = (thresholds, dbx);
        Ok((wanted, pending))
    }

    /// The order that goes with it, and the commit that it rests on.
    fn stored_order(&self, id: &MachineId, key: &KeyId) -> (Option<String>, Option<Commit>) {
        let inner = self.lock();
        let order = Self::order_for(&inner, id, key).filter(|_| !self.access.is_revoked(key));
        let rests = order.is_some().then(|| self.store.written(id));
        (order, rests)
    }

    /// Makes the answer that goes out: only now its freshness is signed, and the lock is not held.
    fn reply(&self, wanted: Wanted, nonce: &Nonce, again_ms: u64, may_wait: bool) -> Result<Reply, ControlError> {
        let decision = match wanted.what {
            What::Wait(reason) => Decision::Wait { reason },
            What::Run { envelope, via, grant } => {
                let freshness = self.freshness(nonce, &envelope.text, Timestamp::now())?;
                Decision::Assigned { assignment: envelope.text, freshness, via, grant }
            }
        };
        let order = match wanted.order {
            Some(order) => Some(OrderGiven { freshness: self.freshness(nonce, &order, Timestamp::now())?, order }),
            None => None,
        };
        let desired = Desired { etag: wanted.etag, decision, order };
        let Wanted { thresholds, dbx, attest, secrets, certify, .. } = wanted;
        Ok(Reply { desired, again_ms, may_wait, about: None, thresholds, dbx, attest, secrets, certify })
    }
}

/// What is wanted of a machine, before anything is signed for one reply.
struct Wanted {
    /// Changes exactly when the rest does.
    etag: String,
    /// It is on its way somewhere.
    busy: bool,
    /// The role's.
    thresholds: BTreeMap<String, String>,
    /// What its firmware may have and lacks.
    dbx: Option<DbxOffer>,
    /// Its TPM is asked what it booted.
    attest: bool,
    /// What becomes of its secrets.
    secrets: Option<SecretsWord>,
    /// It may have a certificate, and none holds.
    certify: bool,
    what: What,
    /// An operator's order that goes with it.
    order: Option<String>,
}

enum What {
    Wait(String),
    Run { envelope: Envelope, via: Via, grant: Grant },
}

impl Wanted {
    fn wait(reason: String, busy: bool) -> Self {
        let etag = hex::sha256(reason.as_bytes())[..16].to_owned();
        let thresholds = BTreeMap::new();
        let what = What::Wait(reason);
        Self { etag, busy, thresholds, dbx: None, attest: false, secrets: None, certify: false, what, order: None }
    }

    fn run(envelope: Envelope, via: Via, grant: Grant, busy: bool) -> Self {
        let identity =
            serde_json::to_vec(&(&envelope.text, via, &grant)).expect("strings and words always become JSON");
        let what = What::Run { envelope, via, grant };
        let etag = hex::sha256(&identity)[..16].to_owned();
        let thresholds = BTreeMap::new();
        Self { etag, busy, thresholds, dbx: None, attest: false, secrets: None, certify: false, what, order: None }
    }

    /// A held report ends when there are secrets for the machine.
    fn with_secrets(mut self, secrets: Option<SecretsWord>) -> Self {
        if let Some(word) = secrets {
            let etag = hex::sha256(format!("{} secrets: {word}", self.etag).as_bytes());
            etag[..16].clone_into(&mut self.etag);
        }
        Self { secrets, ..self }
    }

    fn with_order(mut self, order: Option<String>) -> Self {
        if let Some(order) = &order {
            let etag = hex::sha256(format!("{} {order}", self.etag).as_bytes());
            etag[..16].clone_into(&mut self.etag);
        }
        Self { order, ..self }
    }
}
