//! The machine's state machine: every event in every state.

use crate::boots::{BOOTS_KEPT, Boot};
use crate::event::{Action, Event};
use crate::grant::Limits;
use crate::machine::{Assigned, Machine};
use crate::state::{State, StateKind};
use crate::way::Route;
use crate::{BOOT_DEADLINE_MS, DRAIN_DEADLINE_MS, FORGET_MS, LIVE_MS, Millis};
use kiln_protocol::{OrderId, ReleaseId, Stage, StageState, Via};

impl Machine {
    /// One step.
    #[must_use]
    pub fn event(mut self, event: Event, limits: Limits, now: Millis) -> (Self, Vec<Action>) {
        let mut out = Vec::new();
        let before = (self.state.kind, self.is_available(), self.counts());
        match &event {
            // A report of the boot that ran before says that what was kept is false, however late it comes.
            Event::Report(_) => {}
            // The server was deaf: who spoke before may be speaking still.
            Event::ServerStarted => {
                self.agent_seen = self.agent_seen.map(|_| now);
                self.reported = None; // and who was heard may be gone
            }
            Event::Hardware(_)
            | Event::Classed(_)
            | Event::Compared(_)
            | Event::Asked
            | Event::Downloads(_)
            | Event::TakesBytes
            | Event::Downloaded
            | Event::Approve { .. }
            | Event::NotApproved { .. }
            | Event::NotListed
            | Event::Assign { .. }
            | Event::Ordered(_)
            | Event::Wiped { .. }
            | Event::Granted
            | Event::Clear
            | Event::Adopt(_)
            | Event::Retire
            | Event::Replaced { .. }
            | Event::Excuse { .. }
            | Event::Proven(_)
            | Event::Leaves(_)
            | Event::AcceptTpm
            | Event::KeyShared { .. }
            | Event::Tick => self.lapse(limits, now, &mut out),
        }
        let speaks = self.agent_seen.is_some();
        match event {
            Event::Hardware(events) => self.hardware_changed(events, &mut out),
            Event::Classed(class) => self.classed(class, &mut out),
            Event::Compared(comparison) => self.compared(comparison, now, &mut out),
            Event::Asked if speaks => self.hold_asked(now, &mut out),
            Event::Downloads(release) if speaks => self.hold_downloads(&release, now, &mut out),
            Event::TakesBytes if speaks => self.hold_bytes(now),
            Event::Downloaded if speaks => self.hold_downloaded(now),
            Event::Asked => self.asked_for_boot(limits, now, &mut out),
            Event::Downloads(release) => self.downloads(&release, now, &mut out),
            Event::TakesBytes => self.takes_bytes(now, &mut out),
            Event::Downloaded => self.downloaded(now, &mut out),
            Event::Report(reported) => self.report(&reported, limits, now, &mut out),
            Event::Approve { name, role, release } => self.approve(name, role, release, now, &mut out),
            Event::NotApproved { reason } => self.not_approved(reason, now, &mut out),
            Event::NotListed => self.not_listed(now, &mut out),
            Event::Assign { release, via } => {
                if self.assign_by(release, via, None, now, &mut out) {
                    self.supersede_orders();
                }
            }
            Event::Ordered(order) => self.ordered(order, now, &mut out),
            Event::Wiped { order, failed } => self.wiped(&order, &failed, &mut out),
            Event::Granted => self.grant_given(now, &mut out),
            Event::Clear => self.clear(now, &mut out),
            Event::Adopt(key) => self.adopt(key, now, &mut out),
            Event::Retire => self.retire("a person took it out of service", now, &mut out),
            Event::Replaced { by } => self.retire(&format!("{by} took its place"), now, &mut out),
            Event::Excuse { reason } => self.excuse(reason, &mut out),
            Event::Proven(proven) => self.proven(*proven, now, &mut out),
            Event::Leaves(left) => self.leaves(*left, &mut out),
            Event::AcceptTpm => self.accept_tpm(&mut out),
            Event::KeyShared { with } => self.key_shared(&with, now, &mut out),
            Event::Tick => self.tick(limits, now, &mut out),
            Event::ServerStarted => {
                // The server was deaf: nobody is late before a full deadline has passed again.
                for deadline in [&mut self.state.deadline, &mut self.healthy_by].into_iter().flatten() {
                    *deadline = (*deadline).max(now + LIVE_MS);
                }
                if let Some(boot) = self.boots.back_mut().filter(|b| b.is_unclaimed()) {
                    boot.moved = Some(now);
                }
            }
        }
        self.record_protection(now, &mut out);
        if self.is_available() {
            self.excused = None;
        }
        if before.0 != self.state.kind {
            let warn = match self.state.kind {
                StateKind::Degraded | StateKind::Unreachable | StateKind::FellBack | StateKind::Quarantined => true,
                StateKind::Discovered
                | StateKind::Approved
                | StateKind::Booting
                | StateKind::Healthy
                | StateKind::Draining
                | StateKind::Reimaging
                | StateKind::Retired => false,
            };
            out.push(Action::Say { warn, text: format!("{}: {}", self.state.kind, self.state.reason) });
            save(&mut out);
        }
        if before != (self.state.kind, self.is_available(), self.counts()) {
            wake(&mut out); // others may wait for this machine's unit of the limit
        }
        (self, out)
    }

    /// Enters a state, or says anew why it is in it.
    pub(crate) fn enter(&mut self, kind: StateKind, reason: impl Into<String>, deadline: Option<Millis>, now: Millis) {
        let since = if self.state.kind == kind { self.state.since } else { now };
        let again = self.state.kind == kind && self.state.deadline == deadline;
        self.state = State { kind, reason: reason.into(), since, deadline };
        self.healthy_by = match kind {
            StateKind::Booting | StateKind::Reimaging if !again => deadline,
            StateKind::Booting | StateKind::Reimaging | StateKind::Degraded => self.healthy_by,
            StateKind::Discovered
            | StateKind::Approved
            | StateKind::Healthy
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::FellBack
            | StateKind::Quarantined
            | StateKind::Retired => None,
        };
    }

    pub(crate) fn push_boot(&mut self, via: Via, started: Millis, now: Millis) {
        let number = self.boots.back().map_or(1, |b| b.number + 1);
        self.boots.push_back(Boot::new(number, via, started));
        while self.boots.len() > BOOTS_KEPT {
            if let Some(boot) = self.boots.pop_front() {
                self.past.put(boot, now);
            }
        }
    }

    pub(crate) fn asked_for_boot(&mut self, limits: Limits, now: Millis, out: &mut Vec<Action>) {
        self.last_seen = self.last_seen.max(now);
        self.note_vain_kexec(out);
        if self.is_trial() && self.jumped() {
            // It left by kexec and is back at its firmware without a word from the trial: the trial was started, and failed.
            self.attempts += 1;
        }
        // A firmware repeats itself until it is answered, and iPXE asks again: one boot until its program moves.
        match self.boots.back() {
            Some(boot) if boot.is_unclaimed() => {
                if boot.downloads() {
                    let loaded = boot.is_loaded();
                    self.boots.pop_back();
                    self.push_boot(Via::Cold, now, now);
                    self.count_mute(loaded, now, out);
                }
            }
            Some(_) | None => self.push_boot(Via::Cold, now, now),
        }
        if let Some(boot) = self.boots.back_mut() {
            if boot.has(Stage::Dhcp) {
                // After a loader's bytes it is the loader that asks: the chain goes on.
                boot.moved = boot.moved.map(|moved| if moved > boot.started { now } else { moved });
            } else {
                boot.moved = Some(now);
                out.push(boot.see(Stage::Dhcp, StageState::Done, now));
            }
        }
        save(out);
        self.asked = true;
        // Not well again before it says so itself, whatever is ordered meanwhile.
        self.health = None;
        if self.is_trial() && self.attempts >= limits.trial_attempts {
            self.fall_back(&format!("was not healthy in {} boots", limits.trial_attempts), now, out);
        }
        let deadline = Some(now + BOOT_DEADLINE_MS);
        let suspicion = self.suspects().or_else(|| self.mute_loop());
        match self.state.kind {
            StateKind::Approved | StateKind::Booting | StateKind::Unreachable | StateKind::Degraded => {
                let reason = suspicion.unwrap_or_else(|| "its firmware asked for a boot program".to_owned());
                self.enter(StateKind::Booting, reason, deadline, now);
            }
            StateKind::Healthy => {
                self.enter(StateKind::Booting, "it restarted: its firmware asked for a boot program", deadline, now);
            }
            StateKind::Draining | StateKind::Reimaging => {
                let reason = suspicion.unwrap_or_else(|| self.heading("restarts into"));
                self.enter(StateKind::Reimaging, reason, deadline, now);
            }
            StateKind::FellBack => self.state.deadline = deadline,
            StateKind::Discovered | StateKind::Quarantined | StateKind::Retired => {}
        }
    }

    fn heading(&self, verb: &str) -> String {
        match &self.assigned {
            Some(a) => format!("{verb} {}", a.release),
            None => verb.to_owned(),
        }
    }

    pub(crate) fn downloads(&mut self, release: &ReleaseId, now: Millis, out: &mut Vec<Action>) {
        self.last_seen = self.last_seen.max(now);
        self.mend(out);
        if let Some(boot) = self.boots.back_mut()
            && boot.is_unclaimed()
        {
            boot.moved = Some(now);
            if !boot.has(Stage::Program) {
                out.push(boot.see(Stage::Program, StageState::Started, now));
                save(out);
            }
        }
        let counts = self.asked && self.is_trial() && self.assigned.as_ref().is_some_and(|a| a.release == *release);
        if self.asked {
            self.boot_loop.fetches = self.is_good_start(release);
        }
        self.asked = false;
        if counts {
            self.attempts += 1;
            save(out);
        }
        match self.state.kind {
            StateKind::Booting => {
                let reason = match (counts, self.attempts) {
                    (true, n) if n > 1 => format!("downloads {release}, try {n} of a trial"),
                    (true | false, _) => {
                        let looped = self.mute_loop().map_or(String::new(), |words| format!("; {words}"));
                        format!("downloads {release}{looped}")
                    }
                };
                self.enter(StateKind::Booting, reason, self.state.deadline, now);
            }
            StateKind::Discovered
            | StateKind::Approved
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack
            | StateKind::Quarantined
            | StateKind::Retired => {}
        }
    }

    pub(crate) fn downloaded(&mut self, now: Millis, out: &mut Vec<Action>) {
        self.mend(out);
        let Some(boot) = self.boots.back_mut().filter(|b| b.is_unclaimed()) else { return };
        boot.moved = Some(now);
        if boot.stages.last().is_some_and(|s| s.stage == Stage::Program && s.state != StageState::Done) {
            out.push(boot.see(Stage::Program, StageState::Done, now));
            save(out);
        }
    }

    fn approve(&mut self, name: String, role: String, release: ReleaseId, now: Millis, out: &mut Vec<Action>) {
        self.name = Some(name);
        self.former_name = None;
        self.role = Some(role);
        save(out);
        match self.state.kind {
            StateKind::Discovered | StateKind::Retired => {
                self.assigned = Some(Assigned::cold(release, self.next_sequence()));
                self.unproven = true;
                self.attempts = 0;
                self.forget_starts();
                // Who approves it, approves the TPM that it has proven.
                self.attestations.pinned = None;
                self.pin_tpm();
                self.held_packets.iter_mut().for_each(|held| held.superseded = true);
                out.push(Action::Sign);
                wake(out);
                let reason = self.heading("approved; to run");
                self.enter(StateKind::Approved, reason, Some(now + LIVE_MS), now);
                self.settle(false, now);
            }
            // Approved before: the assignment stays, it is changed by an order only. The role is signed with it.
            StateKind::Approved
            | StateKind::Booting
            | StateKind::Healthy
            | StateKind::Degraded
            | StateKind::Unreachable
            | StateKind::Draining
            | StateKind::Reimaging
            | StateKind::FellBack
            | StateKind::Quarantined => {
                if let Some(a) = &mut self.assigned {
                    // An order is taken under one sequence only.
                    a.sequence += u64::from(a.order.is_none());
                    out.push(Action::Sign);
                }
            }
        }
    }

    /// Said once: what repeats itself with each report is no news, and no write.
    fn not_approved(&mut self, reason: String, now: Millis, out: &mut Vec<Action>) {
        if self.state.kind != StateKind::Discovered || self.state.reason == reason {
            return;
        }
        out.push(Action::Say { warn: true, text: reason.clone() });
        self.enter(StateKind::Discovered, reason, self.state.deadline, now);
        save(out);
    }

    /// Assigns; whether it may be.
    pub(crate) fn assign_by(
        &mut self,
        release: ReleaseId,
        route: impl Into<Route>,
        order: Option<OrderId>,
        now: Millis,
        out: &mut Vec<Action>,
    ) -> bool {
        if let Err(refusal) = self.check_assign(&release) {
            out.push(Action::Say { warn: true, text: refusal.to_string() });
            return false;
        }
        let route: Route = route.into();
        let said = format!("assigned {release} via {route}");
        let (via, auto) = (route.at_best(), route == Route::Auto);
        self.assigned = Some(Assigned { release, sequence: self.next_sequence(), via, auto, order, rebuild: 0 });
        out.push(Action::Say { warn: false, text: format!("{said}{}", self.why_no_kexec()) });
        self.forget_starts();
        self.rebuilding = None;
        self.drift.forgive();
        self.attempts = 0;
        self.held_packets.iter_mut().for_each(|held| held.superseded = true);
        self.healthy_by = Some(now + BOOT_DEADLINE_MS); // of a release that runs already and is a trial again
        self.granted = None;
        self.prefetch = None;
        self.fell_back = None;
        out.push(Action::Sign);
        wake(out);
        save(out);
        if self.state.kind == StateKind::Draining {
            // What it drained for is off: it works on until it is granted the new one.
            self.state.kind = StateKind::Degraded;
        }
        if self.state.kind == StateKind::FellBack {
            self.state.kind = StateKind::Booting;
        }
        self.settle(false, now);
        true
    }

    fn grant_given(&mut self, now: Millis, out: &mut Vec<Action>) {
        let Some(a) = self.assigned.clone() else { return };
        match self.state.kind {
            StateKind::Healthy | StateKind::Degraded | StateKind::Unreachable | StateKind::FellBack => {
                self.granted = Some(a.sequence);
                let reason = format!("may leave for {} now{}", a.release, self.why_no_kexec());
                self.enter(StateKind::Draining, reason, Some(now + DRAIN_DEADLINE_MS), now);
            }
            StateKind::Approved | StateKind::Booting | StateKind::Draining | StateKind::Reimaging => {
                self.granted = Some(a.sequence);
            }
            StateKind::Discovered | StateKind::Quarantined | StateKind::Retired => return,
        }
        save(out);
    }

    fn excuse(&mut self, reason: String, out: &mut Vec<Action>) {
        match self.check_excuse() {
            Ok(()) => {
                out.push(Action::Say { warn: false, text: format!("excused: {reason}") });
                self.excused = Some(reason);
                save(out);
            }
            Err(refusal) => out.push(Action::Say { warn: true, text: refusal.to_string() }),
        }
    }

    fn tick(&mut self, limits: Limits, now: Millis, out: &mut Vec<Action>) {
        self.notice_silence(limits, now, out);
        self.expire_orders(now, out);
        self.end_rest(now, out);
        self.rebuild_if_due(now, out);
        self.reimage_if_it_drifts(now, out);
        if self.given_up_at().is_some_and(|at| now >= at) {
            let minutes = BOOT_DEADLINE_MS / 60_000;
            self.note_vain_kexec(out);
            self.fall_back(&format!("came up and was not healthy within {minutes} min"), now, out);
            wake(out);
            return;
        }
        if self.state.deadline.is_none_or(|d| now < d) {
            return;
        }
        let live = now < self.last_seen + LIVE_MS;
        let again = Some(self.last_seen.max(now) + LIVE_MS);
        let minutes = now.saturating_sub(self.state.since) / 60_000;
        let silent = format!("no word for {} s", now.saturating_sub(self.last_seen) / 1000);
        match self.state.kind {
            StateKind::Discovered => {
                if now >= self.last_seen + FORGET_MS {
                    out.push(Action::Forget);
                } else {
                    self.state.deadline = Some(self.last_seen + FORGET_MS);
                }
            }
            StateKind::Approved | StateKind::Healthy | StateKind::FellBack => {
                if live {
                    self.state.deadline = again;
                } else {
                    let reason = format!("{silent}; it was {}", self.state.kind);
                    self.enter(StateKind::Unreachable, reason, None, now);
                }
            }
            // It waits for a person, and its reason says for what.
            StateKind::Booting | StateKind::Reimaging if live && self.awaits_acceptance() => {
                self.state.deadline = again;
            }
            StateKind::Booting | StateKind::Reimaging => {
                let words = self.where_it_is();
                if live {
                    let reason = format!("not healthy within {minutes} min: {words}{}", self.no_way_back(now));
                    self.enter(StateKind::Degraded, reason, again, now);
                } else {
                    self.note_vain_kexec(out);
                    let reason = format!("{silent} while {}: {words}", self.state.kind);
                    self.enter(StateKind::Unreachable, reason, None, now);
                }
            }
            StateKind::Draining => {
                // Its grant ends with its deadline; it keeps its unit of the limit until it is seen healthy.
                self.granted = None;
                let reason = format!("was let go {minutes} min ago and did not leave");
                self.enter(StateKind::Degraded, reason, again, now);
            }
            StateKind::Degraded => {
                if live {
                    self.state.deadline = again;
                } else {
                    self.note_vain_kexec(out);
                    let reason = format!("{silent}; before that: {}", self.state.reason);
                    self.enter(StateKind::Unreachable, reason, None, now);
                }
            }
            StateKind::Unreachable | StateKind::Quarantined | StateKind::Retired => {}
        }
    }

    pub(crate) fn where_it_is(&self) -> String {
        match self.stage() {
            Some((stage, StageState::Failed(f), _)) => format!("{}: {}", stage.label(), f.message),
            Some((stage, StageState::Waiting { reason }, _)) => format!("{}: {reason}", stage.label()),
            Some((stage, StageState::Started | StageState::Done, _)) => stage.label().to_owned(),
            None => "nothing was heard of this boot".to_owned(),
        }
    }
}

pub(crate) fn save(out: &mut Vec<Action>) {
    if !out.contains(&Action::Save) {
        out.push(Action::Save);
    }
}

pub(crate) fn wake(out: &mut Vec<Action>) {
    if !out.contains(&Action::Wake) {
        out.push(Action::Wake);
    }
}
