//! What a report changes: who may speak for a machine, which boot it speaks of, and the judgement of it.

use crate::boots::Boot;
use crate::event::{Action, Reported};
use crate::grant::Limits;
use crate::machine::{Machine, words};
use crate::state::StateKind;
use crate::step::save;
use crate::{BOOT_DEADLINE_MS, DRAIN_DEADLINE_MS, FORGET_MS, LIVE_MS, Millis};
use kiln_protocol::{DbxOutcome, DbxState, KeyStorage, ReleaseId, Report, Stage, StageState, TpmPresence, Via};

/// Whether the key may speak for the machine.
enum Claim {
    Accepted,
    /// A new key at a new boot, of a machine that cannot keep one.
    NewKey,
    /// Not the key of a machine that keeps its own: heard, and given nothing.
    Stranger(String),
    Conflict(String),
}

enum Which {
    Current,
    New,
    /// From an earlier boot, or seen before.
    Stray,
}

impl Machine {
    pub(crate) fn report(&mut self, reported: &Reported, limits: Limits, now: Millis, out: &mut Vec<Action>) {
        let report = &reported.report;
        // Whichever boot speaks first is the machine's then, also one that was known before.
        let unbound = self.key.is_none() || self.any_boot;
        match self.claim(reported) {
            Claim::Accepted => {}
            Claim::NewKey => {
                self.previous_key = self.key.replace(reported.key.clone());
                self.strangers.retain(|other| *other != reported.key);
                save(out);
            }
            Claim::Stranger(reason) => {
                // Said once for each key: a stranger that repeats itself is no news, and no write.
                let new = self.hear_stranger(&reported.key);
                let sealed = self.cannot_unseal(report).is_some();
                if self.note_without_tpm(&reported.key, sealed) || new {
                    save(out);
                }
                if new {
                    self.last_words.clone_from(&reason);
                    out.push(Action::Say { warn: true, text: reason });
                }
                return;
            }
            Claim::Conflict(reason) => {
                self.contest(reason, now, out);
                return;
            }
        }
        self.last_seen = now;
        match self.which_boot(report, unbound) {
            Which::Stray => {
                if self.speaks_beside(report) {
                    self.contest(self.has_a_copy(), now, out);
                }
                return;
            }
            Which::Current => {
                if std::mem::take(&mut self.any_boot) {
                    save(out);
                }
                self.disbelieve(out);
                self.forget_mute();
            }
            Which::New => {
                self.any_boot = false;
                // Its firmware was heard, and is known now to have been its own.
                self.believe(limits, out);
                self.begin_boot(report, now, out);
                save(out);
                if self.past.are_too_many(now) {
                    self.contest(self.has_a_copy(), now, out);
                }
            }
        }
        if self.note(reported, now, out) {
            save(out);
        }
        if let Some(fallback) = &report.fallback {
            self.told_fallback(fallback, now, out);
        }
        let root_wrong = match (&report.running, &reported.published_root) {
            (Some(running), Some(published)) => running.root_hash != *published,
            (Some(_) | None, None) | (None, Some(_)) => false,
        };
        let came_up = self.came_up.clone();
        self.settle(root_wrong, now);
        if self.came_up != came_up {
            save(out);
        }
        self.prolong_drain(now);
        self.reported = Some(now);
        self.agent_seen = (!self.says_it_leaves()).then_some(now);
    }

    /// By its agent's word its firmware is heard next: it goes to another release, or gave this boot up.
    fn says_it_leaves(&self) -> bool {
        let newest = self.boots.back().and_then(|b| b.stages.last());
        self.is_going()
            || newest.is_some_and(|s| match &s.state {
                // In the running system a failure ends that try and nothing else.
                StageState::Failed(f) => self.running.is_none() && f.retry_in_ms.is_none(),
                StageState::Started | StageState::Done | StageState::Waiting { .. } => false,
            })
    }

    fn is_going(&self) -> bool {
        let newest = self.boots.back().and_then(|b| b.stages.last());
        newest.is_some_and(|s| {
            s.stage == Stage::Going
                && match s.state {
                    StageState::Started | StageState::Done => true,
                    StageState::Failed(_) | StageState::Waiting { .. } => false,
                }
        })
    }

    fn claim(&self, reported: &Reported) -> Claim {
        if self.pinned.as_ref().is_some_and(|pinned| *pinned != reported.key) {
            return Claim::Stranger(self.not_the_pinned_one(&reported.key));
        }
        if self.key.as_ref() == Some(&reported.key) {
            return Claim::Accepted;
        }
        if let Some(place) = self.position.as_ref().filter(|place| self.heard_at.as_ref() != Some(*place)) {
            return Claim::Stranger(format!(
                "a new identity key ({}…) reports under this id and gets nothing: the machine is known by its position ({place}), and \
                 was not heard there in the last minutes. If it is the machine, restart it; if it was moved, run \
                 `kiln machine retire {title}`, and list its new position",
                &reported.key.as_str()[..12],
                title = self.title(),
            ));
        }
        if self.key.is_none() {
            return Claim::NewKey;
        }
        let two = "two machines with different identity keys report under this id";
        let act = format!("find the false one, then run `kiln machine clear {}`", self.title());
        let keeps = self.keeps_a_key();
        let current = self.boots.back().is_some_and(|b| b.boot_id == reported.report.boot_id);
        if let Some(cause) = self.cannot_unseal(&reported.report).filter(|_| keeps) {
            Claim::Stranger(format!(
                "another identity key ({}…) reports under this id and gets nothing: {cause}. If that is {title} itself, whose key \
                 is sealed in its TPM, nothing is lost, and its own key speaks again then. Do not clear it with `--key`: that \
                 would make the new key the machine's",
                &reported.key.as_str()[..12],
                title = self.title(),
            ))
        } else if keeps {
            // The machine has proven its own key before; a stranger's word must not take it out of service.
            Claim::Stranger(format!(
                "another identity key ({}…) reports under this id and gets nothing: a second machine, or its firmware \
                 settings were erased; if so, {}",
                &reported.key.as_str()[..12],
                self.how_to_take(&reported.key)
            ))
        } else if current || self.previous_key.as_ref() == Some(&reported.key) {
            Claim::Conflict(format!("{two}; {act}"))
        } else {
            // Only a name: a new boot brings a new key. If the old one speaks again, there are two.
            Claim::NewKey
        }
    }

    /// Its key outlives its boots.
    pub(crate) fn keeps_a_key(&self) -> bool {
        self.facts.as_ref().is_some_and(|f| match f.key_storage {
            KeyStorage::Tpm | KeyStorage::EfiVariable | KeyStorage::File => true,
            KeyStorage::Ephemeral => false,
        })
    }

    /// This machine's key is sealed in its TPM, and who reports under its id says that it cannot use one: why, and what to do.
    fn cannot_unseal(&self, report: &Report) -> Option<String> {
        self.facts.as_ref().filter(|f| f.key_storage == KeyStorage::Tpm)?;
        let (title, release) = (self.title(), &report.embedded);
        match report.machine.tpm {
            None => Some(format!(
                "it says that it booted {image}/{}, whose agent is too old to use a TPM: assign a newer release (`kiln assign \
                 {title} {image}/NUMBER`) and restart it",
                release.release,
                image = release.image,
            )),
            Some(TpmPresence::Absent | TpmPresence::Unusable) => Some(
                "it says that it has no TPM, or none that answers: switch the TPM on in its firmware's setup, and restart it"
                    .to_owned(),
            ),
            Some(TpmPresence::Ready) => None,
        }
    }

    fn which_boot(&self, report: &Report, unbound: bool) -> Which {
        let mut boots = self.boots.iter().rev().filter(|b| !b.is_unclaimed());
        match boots.next() {
            Some(b) if b.boot_id == report.boot_id => {
                if report.seq > b.seq {
                    Which::Current
                } else {
                    Which::Stray
                }
            }
            Some(_) | None
                if !unbound && (boots.any(|b| b.boot_id == report.boot_id) || self.past.has(&report.boot_id)) =>
            {
                Which::Stray
            }
            Some(_) | None => Which::New,
        }
    }

    fn begin_boot(&mut self, report: &Report, now: Millis, out: &mut Vec<Action>) {
        let release = ReleaseId { image: report.embedded.image.clone(), release: report.embedded.release };
        let via = self.came_by(&release);
        let arrived = via == Via::Kexec && self.assigned.as_ref().is_some_and(|a| a.release == release);
        if !arrived {
            self.note_vain_kexec(out);
        }
        let after = self.proofs.get(&release).map_or(0, |proof| proof.failed);
        self.left_by = None;
        self.count_start(now, out);
        let zero = now.saturating_sub(report.at_ms);
        self.mend(out);
        self.end_mute(&release, now, out);
        if !self.boots.back().is_some_and(Boot::is_unclaimed) {
            self.push_boot(via, zero, now);
        }
        if let Some(boot) = self.boots.back_mut() {
            boot.moved = None;
            boot.boot_id = report.boot_id.chars().take(64).collect();
            boot.release = Some(release);
            boot.after = after;
            let half = boot.stages.last().is_some_and(|s| s.stage == Stage::Program && s.state != StageState::Done);
            if half {
                out.push(boot.see(Stage::Program, StageState::Done, zero));
            }
        }
        self.asked = false;
        // Whatever started it: it was fetched and verified anew.
        if self.rebuilding.as_ref().is_some_and(|old| *old != report.boot_id) {
            self.rebuilding = None;
        }
        self.granted = None;
        self.health = None;
        self.prefetch = None;
        self.agent_memory = None;
        self.exec = None;
        self.condition.begin();
        self.note_drift(now);
        self.running = None;
        self.last_words.clear();
        let deadline = Some(now + BOOT_DEADLINE_MS);
        match self.state.kind {
            StateKind::Draining | StateKind::Reimaging => {
                self.enter(StateKind::Reimaging, "came back; not healthy yet", deadline, now);
            }
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable => {
                self.enter(StateKind::Booting, "its agent started", deadline, now);
            }
            StateKind::FellBack => self.state.deadline = deadline,
            StateKind::Discovered | StateKind::Quarantined | StateKind::Retired => {}
        }
    }

    /// Takes over what the report says. Whether anything worth keeping is new.
    fn note(&mut self, reported: &Reported, now: Millis, out: &mut Vec<Action>) -> bool {
        let report = &reported.report;
        let mut new = false;
        // An unclaimed boot after it was a firmware packet in this machine's name; the machine itself runs on.
        while self.boots.back().is_some_and(Boot::is_unclaimed) && self.boots.len() > 1 {
            self.boots.pop_back();
            new = true;
        }
        if let Some(boot) = self.boots.back_mut() {
            boot.seq = report.seq;
            boot.set_clock(report.at_ms, now);
            for record in report.stages.iter().take(256) {
                if let Some(step) = boot.add(record, now) {
                    out.push(Action::Stage(step));
                    new = true;
                }
            }
        }
        for record in &report.stages {
            if let Some(text) = words(record.stage, &record.state) {
                self.last_words = text;
            }
        }
        if let Some(h) = &report.health
            && !h.healthy
        {
            self.last_words = crate::boots::cut(&h.detail);
        }
        if self.running != report.running || self.embedded.as_ref() != Some(&report.embedded) {
            self.running.clone_from(&report.running);
            self.embedded = Some(report.embedded.clone());
            new = true;
        }
        if self.facts.as_ref() != Some(&report.machine) {
            self.facts = Some(report.machine.clone());
            new = true;
        }
        if self.prefetch != report.prefetch {
            // A prefetch reports every few seconds: each tenth of the way is worth a commit, not each report.
            new |= !matches!((&self.prefetch, &report.prefetch), (Some(a), Some(b)) if a.says_as_much_as(b));
            self.prefetch.clone_from(&report.prefetch);
        }
        new |= self.note_order(&report.stages, now, out);
        self.agent_memory = report.agent_memory;
        if self.exec != report.exec {
            // How often is no commit; what and by whom is.
            let news = report.exec.as_ref().map_or_else(Vec::new, |exec| exec.news_since(self.exec.as_ref()));
            new |= !news.is_empty();
            out.extend(news.into_iter().map(|text| Action::Say { warn: true, text }));
            self.exec.clone_from(&report.exec);
        }
        if report.dbx.is_some() && self.dbx != report.dbx {
            self.dbx.clone_from(&report.dbx);
            new = true;
            if let Some(DbxState { outcome: DbxOutcome::Failed { reason }, .. }) = &self.dbx {
                let text = format!("the list of revoked boot programs is not in its firmware: {reason}");
                out.push(Action::Say { warn: true, text });
            }
        }
        new |= self.note_condition(report.condition.as_ref(), now, out);
        new |= self.note_stale(report, now, out);
        if self.health != report.health {
            new |= self.health.as_ref().map(|h| h.healthy) != report.health.as_ref().map(|h| h.healthy);
            self.health.clone_from(&report.health);
            if self.says_healthy() {
                self.last_words.clear();
            }
        }
        new |= self.note_secrets(report, out);
        new |= self.note_acceptance(reported, now, out);
        new
    }

    /// The judgement from what is known, after a report or an order.
    pub(crate) fn settle(&mut self, root_wrong: bool, now: Millis) {
        let live = Some(now + LIVE_MS);
        match self.state.kind {
            StateKind::Discovered => {
                self.state.deadline = Some(now + FORGET_MS);
                return;
            }
            StateKind::Quarantined | StateKind::Retired => return,
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack => {}
        }
        let going = self.is_going();
        if !going && self.stage().is_some_and(|(stage, ..)| stage == Stage::Going) {
            // It stays: its next try needs a new grant.
            (self.granted, self.left_by) = (None, None);
        }
        if going {
            let leaves = (self.assigned.as_ref().map_or(0, |a| a.sequence), self.leaves_by());
            let (_, via) = *self.left_by.get_or_insert(leaves);
            let reason = match &self.assigned {
                Some(a) => format!("leaves for {} by {via}", a.release),
                None => "leaves".to_owned(),
            };
            self.running = None;
            self.health = None;
            let began = if self.state.kind == StateKind::Reimaging { self.state.since } else { now };
            self.enter(StateKind::Reimaging, reason, Some(began + BOOT_DEADLINE_MS), now);
            return;
        }
        if self.says_healthy() && root_wrong {
            let reason = "the root hash it runs is not the one its release was published with: restart it";
            self.enter(StateKind::Degraded, reason, live, now);
        } else if self.says_healthy() {
            self.settle_healthy(live, now);
        } else {
            self.settle_unhealthy(live, now);
        }
    }

    fn settle_healthy(&mut self, live: Option<Millis>, now: Millis) {
        self.forget_starts();
        self.boot_loop.well = true;
        if let Some(r) = &self.running {
            let id = ReleaseId { image: r.image.clone(), release: r.release };
            // It works in the fleet: a role that asks for a run from now on asks others.
            self.unproven &= self.runs_by_order() || self.demand.required;
            if !self.is_refused(&id) && !self.runs_by_order() && !self.came_by_order(&id) {
                self.note_well(id);
            }
        }
        let on_target = self.runs_assigned();
        if on_target {
            self.attempts = 0;
            self.granted = None;
        }
        if let Some(reason) = self.fell_back.clone() {
            self.enter(StateKind::FellBack, reason, live, now);
        } else if !on_target && self.granted.is_some() {
            // It works on until it goes, and may go at any moment: it keeps its unit of the limit.
            let deadline = match self.state.kind {
                StateKind::Draining => self.state.deadline,
                StateKind::Discovered
                | StateKind::Approved
                | StateKind::Booting
                | StateKind::Healthy
                | StateKind::Degraded
                | StateKind::Unreachable
                | StateKind::Reimaging
                | StateKind::FellBack
                | StateKind::Quarantined
                | StateKind::Retired => Some(now + DRAIN_DEADLINE_MS),
            };
            let reason = match &self.assigned {
                Some(a) => format!("may leave for {} now{}", a.release, self.why_no_kexec()),
                None => "may leave now".to_owned(),
            };
            self.enter(StateKind::Draining, reason, deadline, now);
        } else {
            let release = |r: Option<ReleaseId>| r.map_or_else(String::new, |r| r.to_string());
            let running =
                release(self.running.as_ref().map(|r| ReleaseId { image: r.image.clone(), release: r.release }));
            let reason = match &self.assigned {
                Some(_) if self.rebuilding.is_some() => {
                    format!("runs {running}; it is put up anew for {}", self.rebuild_for)
                }
                Some(a) if !on_target => format!("runs {running}; {} is assigned{}", a.release, self.why_no_kexec()),
                Some(_) if self.is_carried() => {
                    format!("runs {running} since a kexec; good once it is healthy after a cold boot too")
                }
                Some(_) | None => format!("runs {running}"),
            };
            self.enter(StateKind::Healthy, reason, live, now);
        }
    }

    fn settle_unhealthy(&mut self, live: Option<Millis>, now: Millis) {
        let judged = self.running.is_some() && self.health.is_some();
        let words = match &self.health {
            Some(h) if judged => crate::boots::cut(&h.detail),
            Some(_) | None => self.where_it_is(),
        };
        match self.state.kind {
            // Its services are being stopped, or it leaves because it is not well: it drains on.
            StateKind::Draining if judged && self.granted.is_some() => {}
            StateKind::Healthy | StateKind::Draining if judged => {
                self.enter(StateKind::Degraded, words, live, now);
            }
            StateKind::Degraded => {
                let reason = words + &self.no_way_back(now);
                self.enter(StateKind::Degraded, reason, live, now);
            }
            StateKind::Unreachable => {
                // It is heard again in the same boot: its boot goes on.
                self.enter(StateKind::Booting, words, Some(now + BOOT_DEADLINE_MS), now);
            }
            StateKind::Approved | StateKind::Healthy if self.running.is_none() && self.boots.is_empty() => {}
            StateKind::Approved | StateKind::Healthy | StateKind::Draining => {
                self.enter(StateKind::Booting, words, Some(now + BOOT_DEADLINE_MS), now);
            }
            StateKind::Booting | StateKind::Reimaging => {
                let deadline = self.state.deadline;
                self.enter(self.state.kind, words, deadline, now);
            }
            StateKind::FellBack | StateKind::Discovered | StateKind::Quarantined | StateKind::Retired => {}
        }
    }
}
