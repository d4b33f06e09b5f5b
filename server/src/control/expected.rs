//! The list of expected machines: imported whole or not at all, kept by the store, and compared with what comes up.
//!
//! A comparison needs what the store holds of a machine's hardware, so it is not part of a report: whatever may change it
//! puts the machine's id onto a heap, and one task works that off.

use super::{Control, Inner, Pending, now_ms};
use crate::audit::Line;
use crate::error::{ControlError, ExpectedError};
use crate::expected::{Format, read};
use crate::view::{ExpectedView, ExpectedWhole, ImportView, MachineRef};
use kiln_fleet::{
    CameUp, Claimant, Entry, Event, ExpectedList, ExpectedMachine, Machine, Millis, StateKind, compare, serial_key,
};
use kiln_protocol::{MachineFacts, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use tokio::sync::{Mutex, Notify};

/// Machines compared between two commits.
const BATCH: usize = 64;
/// Machines with one serial number that are named to each other: whoever can connect can make one up.
const CLAIMANTS: usize = 16;
/// Expected machines that are named when their day comes and they do not; more are counted.
const OVERDUE_NAMED: usize = 20;
/// Pause after a commit that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(5);
/// Days pass slowly: so often it is looked which came.
const LOOK: Duration = Duration::from_secs(60);

/// What is expected.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    list: RwLock<ExpectedList>,
    /// Held by whoever changes the list, so that rows are stored in the order of the changes.
    changes: Mutex<()>,
    wanted: Notify,
}

impl Expected {
    pub(super) fn of(entries: Vec<Entry>) -> Self {
        Self { list: RwLock::new(ExpectedList::of(entries)), ..Self::default() }
    }

    fn list(&self) -> RwLockReadGuard<'_, ExpectedList> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a comparison rests on, of one machine.
#[derive(Debug)]
struct Known {
    serial: Option<String>,
    sum: u64,
}

/// Whose comparison is due, and who says that it has which serial number.
#[derive(Debug, Default)]
pub(super) struct Comparing {
    known: BTreeMap<MachineId, Known>,
    by_serial: BTreeMap<String, BTreeSet<MachineId>>,
    due: BTreeSet<MachineId>,
}

fn approved(machine: &Machine) -> bool {
    machine.state.kind != StateKind::Discovered
}

impl Comparing {
    /// A machine was changed. What it says of itself may be another than before.
    pub(super) fn note(&mut self, machine: &Machine) {
        let facts = machine.facts.as_ref();
        let serial = facts.and_then(|facts| serial_key(&facts.serial));
        let mut hash = DefaultHasher::new();
        let said = facts.map(|facts| (&facts.serial, &facts.macs, &facts.product));
        (said, machine.title(), approved(machine)).hash(&mut hash);
        let now = Known { serial, sum: hash.finish() };
        if self.known.get(&machine.id).is_some_and(|known| known.sum == now.sum) {
            return;
        }
        if let Some(before) = self.known.get(&machine.id).and_then(|known| known.serial.clone()) {
            self.leave(&before, &machine.id);
        }
        if let Some(serial) = &now.serial {
            self.by_serial.entry(serial.clone()).or_default().insert(machine.id.clone());
            self.others(serial);
        }
        self.due.insert(machine.id.clone());
        self.known.insert(machine.id.clone(), now);
    }

    /// It is compared again with whatever comes next; nobody is woken for it.
    pub(super) fn again(&mut self, id: &MachineId) {
        self.due.insert(id.clone());
    }

    /// It was forgotten.
    pub(super) fn drop(&mut self, id: &MachineId) {
        if let Some(Known { serial: Some(serial), .. }) = self.known.remove(id) {
            self.leave(&serial, id);
        }
        self.due.remove(id);
    }

    fn leave(&mut self, serial: &str, id: &MachineId) {
        if let Some(ids) = self.by_serial.get_mut(serial) {
            ids.remove(id);
            if ids.is_empty() {
                self.by_serial.remove(serial);
            }
        }
        self.others(serial);
    }

    fn others(&mut self, serial: &str) {
        let ids = self.by_serial.get(serial).into_iter().flatten();
        self.due.extend(ids.take(CLAIMANTS).cloned());
    }
}

impl Inner {
    /// Others that say they have this machine's serial number; those that somebody approved first.
    pub(super) fn claimants(&self, machine: &Machine) -> Vec<Claimant> {
        let serial = machine.facts.as_ref().and_then(|facts| serial_key(&facts.serial));
        let ids = serial.and_then(|serial| self.comparing.by_serial.get(&serial));
        let others = || {
            let others = ids.into_iter().flatten().filter(|id| **id != machine.id);
            others.filter_map(|id| self.machines.get(id)).filter(|other| other.state.kind != StateKind::Retired)
        };
        let known = others().filter(|other| approved(other));
        let all = known.chain(others().filter(|other| !approved(other))).take(CLAIMANTS);
        all.map(|other| Claimant { title: other.title().to_owned(), approved: approved(other) }).collect()
    }
}

impl Control {
    /// A machine's comparison is due.
    pub(super) fn compare_again(&self, inner: &mut Inner, id: &MachineId) {
        inner.comparing.due.insert(id.clone());
        self.expected.wanted.notify_one();
    }

    /// Somebody's comparison may be due: looked at soon.
    pub(super) fn compare_soon(&self, inner: &Inner) {
        if !inner.comparing.due.is_empty() {
            self.expected.wanted.notify_one();
        }
    }

    fn compare_all(&self) {
        let mut inner = self.lock();
        let all: Vec<MachineId> = inner.machines.keys().cloned().collect();
        inner.comparing.due.extend(all);
        self.expected.wanted.notify_one();
    }

    /// Works off what is due, for ever, and tells who did not come on its day.
    pub async fn compare_for_ever(&self) {
        self.compare_all();
        let mut until = now_ms();
        loop {
            if let Err(error) = self.compare_due().await {
                tracing::error!(%error, "machines were not compared with the list of expected ones");
                // The database takes nothing, and what is due stays due.
                tokio::time::sleep(AFTER_FAILURE).await;
            }
            until = self.tell_overdue(until, now_ms());
            // A time-out is the passing of a minute.
            let _ = tokio::time::timeout(LOOK, self.expected.wanted.notified()).await;
        }
    }

    async fn compare_due(&self) -> Result<(), ControlError> {
        loop {
            let ids: Vec<MachineId> = {
                let due = &mut self.lock().comparing.due;
                let ids: Vec<MachineId> = due.iter().take(BATCH).cloned().collect();
                for id in &ids {
                    due.remove(id);
                }
                ids
            };
            if ids.is_empty() {
                return Ok(());
            }
            if let Err(error) = self.compare_some(&ids).await {
                self.lock().comparing.due.extend(ids);
                return Err(error);
            }
        }
    }

    async fn compare_some(&self, ids: &[MachineId]) -> Result<(), ControlError> {
        let mut known = Vec::with_capacity(ids.len());
        for id in ids {
            let hardware = self.store.hardware(id).await?;
            known.push((id, hardware));
        }
        let mut came = Vec::new();
        let pending = {
            let mut inner = self.lock();
            let now = now_ms();
            let mut pending = Pending::default();
            for (id, hardware) in known {
                // What is out of service is not expected anywhere, and claims nothing.
                let in_service = |m: &&Machine| m.state.kind != StateKind::Retired;
                let Some(machine) = inner.machines.get(id).filter(in_service) else { continue };
                let Some(facts) = &machine.facts else { continue };
                let claimants = inner.claimants(machine);
                let inventory = hardware.as_ref().map(|hardware| &hardware.inventory);
                let found = CameUp { facts, approved: approved(machine), inventory, claimants: &claimants };
                let comparison = compare(&self.expected.list(), found);
                if approved(machine) {
                    came.extend(comparison.as_ref().and_then(|c| c.entry.clone()));
                }
                if machine.comparison != comparison {
                    self.step(&mut inner, id, Event::Compared(comparison), now, &mut pending)?;
                }
            }
            pending
        };
        self.finish(pending).await?;
        self.mark_seen(&came).await
    }

    async fn mark_seen(&self, came: &[String]) -> Result<(), ControlError> {
        let unseen = |title: &&String| self.expected.list().resolve(title).is_some_and(|m| m.seen.is_none());
        let new: Vec<&String> = came.iter().filter(unseen).collect();
        if new.is_empty() {
            return Ok(());
        }
        let _changes = self.expected.changes.lock().await;
        let mut list = self.expected.list().clone();
        let keys: Vec<String> = new.iter().filter_map(|title| Some(list.resolve(title)?.key())).collect();
        let put: Vec<Entry> = keys.iter().filter_map(|key| list.mark_seen(key, now_ms())).collect();
        self.store.change_expected(&put, Vec::new(), None)?.wait().await?;
        *self.expected.list.write().unwrap_or_else(PoisonError::into_inner) = list;
        Ok(())
    }

    fn tell_overdue(&self, from: Millis, to: Millis) -> Millis {
        let list = self.expected.list();
        let mut late = list.overdue(from, to);
        for due in late.by_ref().take(OVERDUE_NAMED) {
            tracing::warn!("{} ({}): {}", due.title, due.position, due.words);
        }
        let more = late.count();
        if more > 0 {
            tracing::warn!("and {more} more expected machines were never seen: `kiln expected list --differs`");
        }
        to
    }

    /// Imports a file: all of it, or nothing and every mistake by its place.
    pub async fn import_expected(
        &self,
        bytes: Vec<u8>,
        format: Format,
        replace: bool,
        dry_run: bool,
        by: &str,
    ) -> Result<ImportView, ControlError> {
        let _changes = self.expected.changes.lock().await;
        let list = self.expected.list().clone();
        let now = now_ms();
        let import = move || read(&bytes, format).and_then(|rows| list.import(&rows, replace, now));
        let change = tokio::task::spawn_blocking(import).await.map_err(ExpectedError::Task)?;
        let change = change.map_err(ExpectedError::File)?;
        let view = ImportView {
            dry_run,
            new: change.new,
            changed: change.changed,
            same: change.same,
            gone: change.gone.len(),
            machines: change.list.machines().len(),
            skus: change.list.skus().len(),
            ports: change.list.ports(),
        };
        if dry_run || (change.put.is_empty() && change.gone.is_empty()) {
            return Ok(view);
        }
        let what = format!(
            "list of expected machines: {} new, {} changed, {} taken off; {} machines on it",
            view.new, view.changed, view.gone, view.machines
        );
        let line = Line::done(now_ms(), by, "", what.clone());
        self.store.change_expected(&change.put, change.gone, Some(line))?.wait().await?;
        *self.expected.list.write().unwrap_or_else(PoisonError::into_inner) = change.list;
        tracing::info!("{what}");
        self.compare_all();
        Ok(view)
    }

    /// Takes a machine off the list.
    pub async fn remove_expected(&self, name: &str, by: &str) -> Result<ExpectedView, ControlError> {
        let _changes = self.expected.changes.lock().await;
        let view = self.expected_machine(name)?;
        let key = self.expected.list().resolve(name).map(ExpectedMachine::key).unwrap_or_default();
        let what = format!("list of expected machines: {} taken off", view.title);
        let line = Line::done(now_ms(), by, "", what);
        self.store.change_expected(&[], vec![format!("machine/{key}")], Some(line))?.wait().await?;
        self.expected.list.write().unwrap_or_else(PoisonError::into_inner).take(&key);
        self.compare_all();
        Ok(view)
    }

    /// One machine took the place of another: it is what the other was on the list, unless it is on it already.
    pub(super) async fn hand_over(&self, old: &MachineFacts, new: &MachineFacts, by: &str) -> Result<(), ControlError> {
        let _changes = self.expected.changes.lock().await;
        let mut list = self.expected.list().clone();
        let was = list.find(old).map(|entry| (entry.key(), entry.title().to_owned()));
        let handed = was.and_then(|(key, title)| Some((list.hand_over(&key, new)?, key, title)));
        let Some((entry, key, title)) = handed else { return Ok(()) };
        let what = format!("list of expected machines: the place of {title} is now that of {}", new.id);
        let line = Line::done(now_ms(), by, "", what);
        self.store.change_expected(&[entry], vec![format!("machine/{key}")], Some(line))?.wait().await?;
        *self.expected.list.write().unwrap_or_else(PoisonError::into_inner) = list;
        self.compare_all();
        Ok(())
    }

    /// The list, and what came of each machine on it; with `differs` only those of which something is to be said.
    pub fn expected_list(&self, differs: bool) -> ExpectedWhole {
        let mut by_entry: BTreeMap<String, Vec<Here>> = BTreeMap::new();
        let mut unlisted = Vec::new();
        // The fleet's lock is not held while a long list is written.
        for machine in self.look().machines.values() {
            match machine.comparison.as_ref().map(|c| &c.entry) {
                Some(Some(entry)) => by_entry.entry(entry.clone()).or_default().push(Here::of(machine)),
                Some(None) => unlisted.push(machine_ref(machine)),
                None => {}
            }
        }
        let (list, now) = (self.expected.list(), now_ms());
        let views = list.machines().map(|(_, machine)| {
            expected_view(machine, by_entry.get(machine.title()).map_or(&[][..], Vec::as_slice), now)
        });
        ExpectedWhole {
            machines: views.filter(|view| view.differs || !differs).collect(),
            unlisted,
            skus: list.skus().cloned().collect(),
            ports: list.ports(),
        }
    }

    /// One machine of the list, by serial number, UUID, Ethernet address, or by the name of the machine that it is.
    pub fn expected_machine(&self, name: &str) -> Result<ExpectedView, ControlError> {
        let inner = self.look();
        let list = self.expected.list();
        let named = || {
            let machine = inner.machines.get(&inner.resolve(name).ok()?)?;
            list.resolve(machine.comparison.as_ref()?.entry.as_deref()?)
        };
        let machine = list.resolve(name).or_else(named).ok_or_else(|| ExpectedError::NotListed(name.to_owned()))?;
        let is = |m: &&Machine| m.comparison.as_ref().is_some_and(|c| c.entry.as_deref() == Some(machine.title()));
        let found: Vec<Here> = inner.machines.values().filter(is).map(Here::of).collect();
        Ok(expected_view(machine, &found, now_ms()))
    }
}

/// A machine that came up as one of the list.
struct Here {
    machine: MachineRef,
    approved: bool,
    differences: Vec<String>,
}

impl Here {
    fn of(machine: &Machine) -> Self {
        let differences = machine.comparison.as_ref().map_or_else(Vec::new, |c| c.differences.clone());
        Self { machine: machine_ref(machine), approved: approved(machine), differences }
    }
}

fn machine_ref(machine: &Machine) -> MachineRef {
    MachineRef { id: machine.id.clone(), name: machine.title().to_owned() }
}

fn expected_view(machine: &ExpectedMachine, found: &[Here], now: Millis) -> ExpectedView {
    let differences: Vec<String> = found.iter().flat_map(|here| here.differences.iter().cloned()).collect();
    let (state, differs) = match (found.iter().any(|here| here.approved), differences.len()) {
        _ if found.is_empty() && machine.seen.is_some() => ("came up once, and is not known any more".into(), true),
        _ if found.is_empty() => (machine.absence(now), now >= machine.due_at()),
        (false, _) => ("came up, and waits for approval".to_owned(), true),
        (true, 0) => ("as expected".to_owned(), false),
        (true, 1) => ("1 difference".to_owned(), true),
        (true, n) => (format!("{n} differences"), true),
    };
    ExpectedView {
        title: machine.title().to_owned(),
        listed: machine.clone(),
        state,
        differs,
        machines: found.iter().map(|here| here.machine.clone()).collect(),
        differences,
    }
}
