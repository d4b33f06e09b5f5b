//! What a person orders. Each order is in the audit log before it is answered.

use super::{Control, Inner, Pending, now_ms};
use crate::access::Caller;
use crate::access::calls::Call;
use crate::config::is_name;
use crate::error::{AccessError, ControlError};
use kiln_fleet::access::AccessRole;
use kiln_fleet::{Event, Machine, Replacement, Route, StateKind};
use kiln_protocol::{KeyId, KeyStorage, MachineId, ReleaseId};

impl Control {
    /// Says what a machine is for. Without a name it keeps the one it has, or gets one from its id. With the code that
    /// somebody read from its screen, only if that is the code of the key that is approved. What was placed before is moved
    /// or brought back by an operator only.
    pub async fn approve(
        &self,
        machine: &str,
        name: Option<&str>,
        role: &str,
        code: Option<&str>,
        by: &Caller,
    ) -> Result<(), ControlError> {
        self.look_again().await;
        let catalog = self.catalog();
        let image = self.config.image_of(role)?;
        let passed = catalog.passed_over(image);
        let Some(release) = catalog.newest(image).cloned() else {
            return Err(ControlError::NothingPublished { image: image.to_string(), passed });
        };
        let pending = {
            let mut inner = self.lock();
            let id = inner.resolve(machine)?;
            inner.check_approver(&id, by)?;
            let free = |name: &String| inner.names.find(name).is_none();
            let known = inner.machines.get(&id).and_then(|m| m.name.clone().or(m.former_name.clone().filter(free)));
            let facts = inner.machines.get(&id).and_then(|m| m.facts.as_ref());
            let listed = self.config.listed(&id, facts.map(|f| f.serial.as_str())).map(|l| l.name.clone());
            let made_up = || format!("machine-{}", &id.as_str()[24..]);
            let name = name.map(str::to_owned).or(known).or(listed).unwrap_or_else(made_up);
            if !is_name(&name) {
                return Err(ControlError::BadName(name));
            }
            if inner.names.is_taken(&name, &id) {
                return Err(ControlError::NameTaken(name));
            }
            self.check_fits(&inner, &id, &release)?;
            // In service it keeps its release, also where the newest is another.
            let keeps = inner.machines.get(&id).filter(|m| m.state.kind.in_fleet()).and_then(|m| m.assigned.as_ref());
            let keeps = keeps.map(|assigned| &assigned.release).filter(|keeps| keeps.image == release.image);
            self.check_role(role, keeps.unwrap_or(&release))?;
            if let Some(code) = code {
                inner.check_code(&id, code, now_ms())?;
            }
            let compared = if code.is_some() { "; its code was compared" } else { "" };
            let what = format!("approved as {name} with role {role}, to run {release}{passed}{compared}");
            let mut pending = Pending::default();
            let event = Event::Approve { name, role: role.to_owned(), release };
            self.step(&mut inner, &id, event, now_ms(), &mut pending)?;
            if let Some(m) = inner.machines.get(&id) {
                self.audit(&mut pending, m, &by.who(), what);
            }
            pending
        };
        self.finish(pending).await
    }

    /// Assigns a release.
    pub async fn assign(
        &self,
        machine: &str,
        release: &ReleaseId,
        via: impl Into<Route>,
        by: &str,
    ) -> Result<(), ControlError> {
        let via: Route = via.into();
        // Also for a release that is known: it may have been pruned since the last look.
        self.look_again().await;
        let catalog = self.catalog();
        let published =
            catalog.releases.get(release).ok_or_else(|| ControlError::NoSuchRelease { release: release.clone() })?;
        let class = &published.manifest.class;
        if class != kiln_protocol::Class::Normal.as_str() {
            return Err(ControlError::WrongClass { release: release.clone(), class: class.clone() });
        }
        let floor = catalog.site.floor(release.image.as_str());
        if release.release < floor {
            return Err(ControlError::BelowFloor { release: release.clone(), floor });
        }
        let pending = {
            let mut inner = self.lock();
            let id = inner.resolve(machine)?;
            if let Some(m) = inner.machines.get(&id) {
                m.check_assign(release)?;
                if let Some(current) = m.current()
                    && current.image != release.image
                    && via == Route::Kexec
                    // The way home from what an operator ordered needs no firmware.
                    && m.assigned.as_ref().is_none_or(|a| a.order.is_none())
                {
                    let (machine, running) = (m.title().to_owned(), current.image.to_string());
                    return Err(ControlError::OtherImage { machine, running });
                }
            }
            self.check_fits(&inner, &id, release)?;
            if let Some(role) = inner.machines.get(&id).and_then(|m| m.role.as_ref()) {
                self.check_role(role, release)?;
            }
            let mut pending = Pending::default();
            self.step(&mut inner, &id, Event::Assign { release: release.clone(), via }, now_ms(), &mut pending)?;
            if let Some(m) = inner.machines.get(&id) {
                self.audit(&mut pending, m, by, format!("assigned {release} via {via}"));
            }
            pending
        };
        self.finish(pending).await
    }

    /// Ends what holds a machine. With the beginning of the fingerprint of another key that was heard under its id, that key is
    /// the machine's from now on; without, none is.
    pub async fn clear(&self, machine: &str, key: Option<&str>, by: &str) -> Result<(), ControlError> {
        let Some(digits) = key else { return self.order(machine, Event::Clear, by, "cleared").await };
        let pending = {
            let mut inner = self.lock();
            let id = inner.resolve(machine)?;
            let key = self.heard_key(&inner, &id, digits)?;
            let before = inner.machines.get(&id).and_then(|m| m.key.as_ref());
            let before = before.map_or_else(|| "none".to_owned(), ToString::to_string);
            let what = format!("cleared; its identity key is {key} from now on, it was {before}");
            self.order_under(&mut inner, &id, Event::Adopt(key), by, what)?
        };
        self.finish(pending).await
    }

    /// The key that a person means by its beginning, if it may be a machine's.
    pub(super) fn heard_key(&self, inner: &Inner, id: &MachineId, digits: &str) -> Result<KeyId, ControlError> {
        let machine = inner.machines.get(id).ok_or_else(|| ControlError::NoSuchMachine(id.to_string()))?;
        let key = machine.heard_key(digits)?;
        if self.access.is_revoked(&key) {
            return Err(AccessError::RevokedBefore(key).into());
        }
        Ok(key)
    }

    /// Takes a machine out of service.
    pub async fn retire(&self, machine: &str, by: &str) -> Result<(), ControlError> {
        self.order(machine, Event::Retire, by, "retired").await
    }

    /// Puts another machine in the place of this one, which is retired.
    pub async fn replace(&self, old: &str, new: &str, by: &str) -> Result<MachineId, ControlError> {
        self.look_again().await;
        let (pending, id, facts) = {
            let mut inner = self.lock();
            let (old, new) = (inner.resolve(old)?, inner.resolve(new)?);
            let Replacement { name, role, release } = self.replacement(&inner, &old, &new)?;
            let facts_of = |id: &MachineId| inner.machines.get(id).and_then(|machine| machine.facts.clone());
            let facts = facts_of(&old).zip(facts_of(&new));
            let (now, mut pending) = (now_ms(), Pending::default());
            let what = format!("takes the place of {old} as {name} with role {role}, to run {release}");
            self.step(&mut inner, &old, Event::Replaced { by: new.clone() }, now, &mut pending)?;
            self.step(&mut inner, &new, Event::Approve { name, role, release }, now, &mut pending)?;
            if let Some(m) = inner.machines.get(&old) {
                self.audit(&mut pending, m, by, format!("replaced by {new}"));
            }
            if let Some(m) = inner.machines.get(&new) {
                self.audit(&mut pending, m, by, what);
            }
            (pending, new, facts)
        };
        self.finish(pending).await?;
        if let Some((was, becomes)) = facts {
            self.hand_over(&was, &becomes, by).await?;
        }
        Ok(id)
    }

    /// What `new` takes over, if it can now.
    pub(super) fn replacement(
        &self,
        inner: &Inner,
        old: &MachineId,
        new: &MachineId,
    ) -> Result<Replacement, ControlError> {
        let unknown = |id: &MachineId| ControlError::NoSuchMachine(id.to_string());
        let was = inner.machines.get(old).ok_or_else(|| unknown(old))?;
        let becomes = inner.machines.get(new).ok_or_else(|| unknown(new))?;
        let replacement = was.replaced_by(becomes)?;
        let Replacement { name, role, release } = &replacement;
        // A name that was freed may be another's by now.
        if inner.names.is_taken(name, old) {
            return Err(ControlError::NameTaken(name.clone()));
        }
        self.config.image_of(role)?;
        if !self.catalog().releases.contains_key(release) {
            return Err(ControlError::NoSuchRelease { release: release.clone() });
        }
        self.check_fits(inner, new, release)?;
        self.check_role(role, release)?;
        Ok(replacement)
    }

    /// A person knows why a machine is away: it holds nobody up until it is healthy again.
    pub async fn excuse(&self, machine: &str, reason: &str, by: &str) -> Result<(), ControlError> {
        if reason.is_empty() || reason.len() > 200 || reason.chars().any(char::is_control) {
            return Err(ControlError::BadReason);
        }
        {
            let inner = self.lock();
            let id = inner.resolve(machine)?;
            if let Some(m) = inner.machines.get(&id) {
                m.check_excuse()?;
            }
        }
        self.order(machine, Event::Excuse { reason: reason.to_owned() }, by, &format!("excused: {reason}")).await
    }

    /// A person accepts a machine's TPM and firmware as they are now: what it proves next is pinned.
    pub async fn accept_tpm(&self, machine: &str, by: &str) -> Result<(), ControlError> {
        self.order(machine, Event::AcceptTpm, by, "accepted: its TPM and firmware, as it proves them next").await
    }

    async fn order(&self, machine: &str, event: Event, by: &str, what: &str) -> Result<(), ControlError> {
        let pending = {
            let mut inner = self.lock();
            let id = inner.resolve(machine)?;
            self.order_under(&mut inner, &id, event, by, what.to_owned())?
        };
        self.finish(pending).await
    }

    fn order_under(
        &self,
        inner: &mut Inner,
        id: &MachineId,
        event: Event,
        by: &str,
        what: String,
    ) -> Result<Pending, ControlError> {
        let mut pending = Pending::default();
        self.step(inner, id, event, now_ms(), &mut pending)?;
        if let Some(m) = inner.machines.get(id) {
            self.audit(&mut pending, m, by, what);
        }
        Ok(pending)
    }

    pub(super) fn check_fits(&self, inner: &Inner, id: &MachineId, release: &ReleaseId) -> Result<(), ControlError> {
        inner.check_stays(release, now_ms())?;
        let Some(machine) = inner.machines.get(id) else { return Ok(()) };
        let Some(facts) = &machine.facts else { return Ok(()) };
        let catalog = self.catalog();
        let Some(published) = catalog.releases.get(release) else { return Ok(()) };
        let (title, manifest) = (|| machine.title().to_owned(), &published.manifest);
        if manifest.architecture != facts.arch.as_str() {
            return Err(ControlError::WrongArchitecture {
                machine: title(),
                release: release.clone(),
                expected: facts.arch.to_string(),
                got: manifest.architecture.clone(),
            });
        }
        // Kiln predicts what a TPM measures since its agent uses TPMs.
        if facts.key_storage == KeyStorage::Tpm && manifest.measured.is_none() {
            return Err(ControlError::ForgetsKey { machine: title(), release: release.clone() });
        }
        Ok(())
    }
}

impl Inner {
    /// The least access role that makes this call of this machine.
    pub(super) fn least(&self, call: &Call, id: &MachineId) -> AccessRole {
        if call.action == "approve" { call.least.max(self.approver(id)) } else { call.least }
    }

    /// The least access role that approves this machine. One that was placed before has a role, and with it secrets for whoever
    /// is root there, and rules: only who may say what machines run gives it others, or brings it back.
    fn approver(&self, id: &MachineId) -> AccessRole {
        match self.machines.get(id) {
            Some(machine) if machine.state.kind != StateKind::Discovered => AccessRole::Operator,
            Some(_) | None => AccessRole::Technician,
        }
    }

    /// Refuses who may not approve it, by what it is now: it may have been placed since somebody asked for a second person.
    pub(super) fn check_approver(&self, id: &MachineId, by: &Caller) -> Result<(), AccessError> {
        let (has, needs) = (by.role.unwrap_or(AccessRole::Viewer), self.approver(id));
        match self.machines.get(id) {
            Some(machine) if has < needs => Err(placed_before(machine, by, has, needs)),
            Some(_) | None => Ok(()),
        }
    }
}

fn placed_before(machine: &Machine, by: &Caller, has: AccessRole, needs: AccessRole) -> AccessError {
    AccessError::PlacedBefore {
        machine: machine.title().to_owned(),
        state: machine.state.kind,
        role: machine.role.clone().unwrap_or_else(|| "none".to_owned()),
        who: by.name.clone(),
        has,
        needs,
    }
}
