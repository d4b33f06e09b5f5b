//! A good release that is started again and again and never becomes healthy. Nobody's trial is at stake, so a power blip must
//! cost nothing: a start counts only if it came as far as the hand-over to the image and ended before it was once
//! healthy. That is a short part of a boot, and a supply that flickers does not hit it [`LOOP_STARTS`] times in a row; should it
//! do so, the machine goes on by itself after [`LOOP_REST_MS`]. What ends before its agent says a word is counted in
//! `mute.rs`.

use crate::Millis;
use crate::event::Action;
use crate::machine::Machine;
use crate::state::StateKind;
use crate::step::{save, wake};
use kiln_protocol::Stage;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// So many starts in a row that came up and were never healthy are a boot loop.
pub const LOOP_STARTS: usize = 5;
/// Starts that are longer ago do not count: five rounds through a slow firmware, with the whole time for *healthy* each.
pub const LOOP_WINDOW_MS: Millis = 4 * 3_600_000;
/// So long nothing is started where there is no other release; then the same once more.
pub const LOOP_REST_MS: Millis = 15 * 60_000;

/// What is counted of a good release's starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootLoop {
    /// When the boot after each of those starts began, since it was last healthy, the newest last; at most [`LOOP_STARTS`].
    #[serde(default)]
    pub starts: VecDeque<Millis>,
    /// The boot that goes on was healthy at some time.
    #[serde(default)]
    pub well: bool,
    /// Until when nothing is started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rests_until: Option<Millis>,
    /// Starts in a row whose boot program was sent whole and whose agent never spoke.
    #[serde(default)]
    pub mute: u32,
    /// What is downloaded in the boot that goes on is a good release, asked for by a DISCOVER.
    #[serde(default)]
    pub fetches: bool,
}

impl Machine {
    /// A new boot reports for the first time: what became of the one before.
    pub(crate) fn count_start(&mut self, now: Millis, out: &mut Vec<Action>) {
        let well = std::mem::take(&mut self.boot_loop.well);
        let in_fleet = self.state.kind.in_fleet() && self.state.kind != StateKind::Quarantined;
        let Some(assigned) = self.assigned.as_ref().filter(|a| in_fleet && a.order.is_none()) else { return };
        // One that left, left by itself.
        let in_vain = self.last_boot().is_some_and(|boot| {
            boot.release.as_ref() == Some(&assigned.release)
                && (self.running.is_some() || boot.has(Stage::Handover))
                && !boot.has(Stage::Going)
        });
        if well || !in_vain || !self.good.contains(&assigned.release) {
            return;
        }
        let (release, starts) = (assigned.release.clone(), &mut self.boot_loop.starts);
        starts.retain(|at| now < at + LOOP_WINDOW_MS);
        starts.push_back(now);
        // A machine with a disk starts it also while it shall rest.
        while starts.len() > LOOP_STARTS {
            starts.pop_front();
        }
        if starts.len() < LOOP_STARTS {
            return;
        }
        let failed = format!("came up {LOOP_STARTS} times in a row and was never healthy");
        if self.way_back().is_some() {
            self.fall_back(&failed, now, out);
        } else {
            self.boot_loop.rests_until = Some(now + LOOP_REST_MS);
            let text = format!("boot loop: {release} {failed}, and no other release is known to be good here");
            out.push(Action::Say { warn: true, text });
        }
        wake(out);
        save(out);
    }

    /// It is healthy, or a person has looked: what was counted is over.
    pub(crate) fn forget_starts(&mut self) {
        self.boot_loop = BootLoop { well: self.boot_loop.well, ..BootLoop::default() };
    }

    /// The rest is over: one more start, and not all of them anew.
    pub(crate) fn end_rest(&mut self, now: Millis, out: &mut Vec<Action>) {
        if self.boot_loop.rests_until.is_some_and(|until| now >= until) {
            self.boot_loop.rests_until = None;
            self.boot_loop.starts.pop_front();
            wake(out);
            save(out);
        }
    }

    /// Why nothing is started, if that is so. What runs already, runs on.
    pub(crate) fn rests(&self) -> Option<String> {
        let until = self.boot_loop.rests_until.filter(|_| self.running.is_none())?;
        let (release, title) = (&self.assigned.as_ref()?.release, self.title());
        let second = until / 1000 % 86_400;
        Some(format!(
            "boot loop: {release} came up {LOOP_STARTS} times in a row and was never healthy, and no other release is known \
             to be good here: nothing is started before {:02}:{:02}:{:02} UTC, then it once more. `kiln assign {title} \
             NAME/N` or `kiln machine clear {title}` ends the wait",
            second / 3600,
            second / 60 % 60,
            second % 60
        ))
    }
}
