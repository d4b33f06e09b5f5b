//! The acceptance run of new hardware: what the machine said of it, and whether it may join the fleet.
//!
//! A role that asks for it holds a newly approved machine until it passed a run of a release of class `acceptance`, which
//! only an operator's order starts. The machine measures itself: a pass says that its parts work, not that it is honest.

use crate::Millis;
use crate::event::{Action, Reported};
use crate::machine::Machine;
use crate::orders::Errand;
use crate::step::{save, wake};
use kiln_protocol::{Acceptance, Class, Least, ReleaseId, Via};
use serde::{Deserialize, Serialize};

/// Results kept of a run; of more, those that failed and the first.
pub const ACCEPTANCE_KEPT: usize = 64;
/// Sentences kept of why a run failed.
const FAILURES_KEPT: usize = 32;

/// What a machine's role asks; by the configuration, not stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// A newly approved machine is held until it passed.
    pub required: bool,
    /// The numbers that a pass needs, beside those of the release.
    pub least: Least,
}

/// The newest run of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptanceRun {
    /// The release that tests.
    pub release: ReleaseId,
    /// The boot that it ran in.
    pub boot_id: String,
    /// When it was first heard of.
    pub began: Millis,
    /// When something of it was last new.
    pub at: Millis,
    /// How far it is, and what was found.
    pub run: Acceptance,
    /// Of a run that is done: why it is no pass; empty: it is one.
    #[serde(default)]
    pub failures: Vec<String>,
}

impl AcceptanceRun {
    /// In a word: `running`, `passed`, `failed`.
    pub fn state(&self) -> &'static str {
        match (self.run.done, self.failures.is_empty()) {
            (false, _) => "running",
            (true, true) => "passed",
            (true, false) => "failed",
        }
    }
}

impl Machine {
    /// Its role wants a passed run before anything else of it.
    pub fn awaits_acceptance(&self) -> bool {
        self.demand.required && self.unproven
    }

    /// It waits for a run, and none is ordered.
    pub(crate) fn is_held_for_acceptance(&self) -> bool {
        self.awaits_acceptance() && self.open_order().is_none()
    }

    /// Why it is held, how far its run is, or why it failed; for people. None: nothing is to be said.
    pub fn acceptance_words(&self) -> Option<String> {
        let run = self.acceptance.as_ref();
        let again = "when it is put right, order the run again (`kiln order sign assign`), or restart the machine while \
                     the order holds";
        match run {
            Some(run) if run.run.done && !run.failures.is_empty() => {
                Some(format!("its acceptance run failed: {}; {again}", run.failures.join("; ")))
            }
            Some(run) if !run.run.done && self.runs_acceptance() => Some(format!("acceptance run: {}", run.run.doing)),
            Some(_) | None if !self.awaits_acceptance() => None,
            Some(_) | None if self.open_order().is_some() => Some("its acceptance run is ordered".to_owned()),
            Some(_) | None => Some(format!(
                "held: role {} wants a passed acceptance run first, by an operator's order: `kiln order sign assign \
                 acceptance/N --class acceptance --machine {}:KEY`, then `kiln order submit`",
                self.role.as_deref().unwrap_or("-"),
                self.id
            )),
        }
    }

    /// It runs a release of class `acceptance`, as an operator ordered.
    fn runs_acceptance(&self) -> bool {
        let ordered = self.orders.back().map(|order| &order.errand);
        let class = match ordered {
            Some(Errand::Run { class, release, .. }) => {
                *class == Class::Acceptance && self.assigned.as_ref().is_some_and(|a| a.release == *release)
            }
            Some(Errand::Wipe) | None => false,
        };
        class && self.running.is_some() && self.runs_by_order()
    }

    /// What a report says of a run. Whether anything worth keeping is new.
    pub(crate) fn note_acceptance(&mut self, reported: &Reported, now: Millis, out: &mut Vec<Action>) -> bool {
        let report = &reported.report;
        let published = match (&report.running, &reported.published_root) {
            (Some(running), Some(published)) => running.root_hash == *published,
            (Some(_) | None, None) | (None, Some(_)) => false,
        };
        let (Some(said), Some(assigned)) = (&report.acceptance, &self.assigned) else { return false };
        if !published || !self.runs_acceptance() {
            return false;
        }
        let mut run = said.clone();
        run.tame();
        let failures = if run.done { run.failures(self.demand.least) } else { Vec::new() };
        run.keep(ACCEPTANCE_KEPT);
        let before = self.acceptance.as_ref().filter(|before| before.boot_id == report.boot_id);
        if before.is_some_and(|before| before.run.done || before.run == run) {
            return false; // what ended is judged once
        }
        let began = before.map_or(now, |before| before.began);
        let release = assigned.release.clone();
        let mut failures: Vec<String> = failures.iter().map(|text| crate::boots::cut(text)).collect();
        failures.truncate(FAILURES_KEPT);
        let (boot_id, done) = (report.boot_id.chars().take(64).collect(), run.done);
        self.acceptance =
            Some(AcceptanceRun { release: release.clone(), boot_id, began, at: now, run, failures: failures.clone() });
        if !done {
            return true;
        }
        if failures.is_empty() {
            self.unproven = false;
            out.push(Action::Say { warn: false, text: format!("passed its acceptance run on {release}") });
            if let Some(home) = self.home.take() {
                // Firmware has to start this one's first release in the fleet too, whatever its class has shown.
                self.assign_by(home, Via::Cold, None, now, out);
            }
        } else {
            self.unproven = true;
            self.last_words = crate::boots::cut(&format!("acceptance failed: {}", failures.join("; ")));
            out.push(Action::Say { warn: true, text: self.last_words.clone() });
        }
        wake(out);
        save(out);
        true
    }

    /// A run was ordered: where the machine goes when it passed, and that one which stands there already starts anew.
    pub(crate) fn acceptance_ordered(&mut self, home: Option<ReleaseId>, class: Class, ran: bool) {
        if class != Class::Acceptance {
            return;
        }
        if home.is_some() {
            self.home = home;
        }
        let boot = self.boots.iter().rev().find(|boot| !boot.is_unclaimed()).map(|boot| boot.boot_id.clone());
        if let Some(assigned) = self.assigned.as_mut().filter(|_| ran) {
            // The tests run once in each boot.
            assigned.rebuild = assigned.sequence;
            (assigned.via, assigned.auto) = (Via::Cold, false);
            self.rebuilding = boot;
        }
    }
}
