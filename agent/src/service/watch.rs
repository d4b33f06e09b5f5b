//! What the service watches besides health and its assignment: drift, limits, hooks, and the spool of what happened.

use super::duty::Event;
use super::next::trouble;
use crate::coldplug::Process;
use crate::disk::machine::SharedDisk;
use crate::drift::{self, EVERY, Eye, Looker, Root, Seen};
use crate::error::AgentError;
use crate::hooks::{self, Progress};
use crate::spool::{self, Keeper};
use crate::verity;
use jiff::Timestamp;
use kiln_protocol::{Condition, DRIFT_LIMIT, Decision, Difference, Reply, Stage, Turn, drift as compare};
use kiln_release::{Hook, Manifest};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// The first look comes when what starts with the system has started.
const FIRST: Duration = Duration::from_secs(5);

/// Hooks on their way.
pub type Hooks = Pin<Box<dyn Future<Output = Event>>>;
/// A look on its way.
pub type Look = Pin<Box<dyn Future<Output = (Eye, Seen)>>>;

/// The state of it.
pub struct Watch {
    pub keeper: Rc<Keeper>,
    hooks: BTreeMap<String, Vec<Hook>>,
    /// Hooks are programs of this file system.
    root: PathBuf,
    progress: Progress,
    looker: Option<Looker>,
    drift: Vec<Difference>,
    /// This machine's clock less the boot server's.
    offset_ms: Option<i64>,
    bad: BTreeSet<String>,
}

impl Watch {
    /// Of the release that runs. `left`: what the agent in the initramfs left behind.
    pub async fn of(manifest: &Manifest, disk: Option<SharedDisk>, left: Vec<Process>) -> Self {
        let root = Root { hash: verity::running_root_hash, is_corrupted: verity::is_corrupted };
        let looker = Looker::new(manifest.clone(), root, "").knowing(left);
        let keeper = Keeper::open_on(Path::new(spool::PLACE), disk).await;
        Self { looker: Some(looker), ..Self::new(keeper, manifest.hooks.clone(), "/") }
    }

    /// Without drift.
    pub fn new(keeper: Keeper, hooks: BTreeMap<String, Vec<Hook>>, root: impl Into<PathBuf>) -> Self {
        Self {
            keeper: Rc::new(keeper),
            hooks,
            root: root.into(),
            progress: Progress::default(),
            looker: None,
            drift: Vec::new(),
            offset_ms: None,
            bad: BTreeSet::new(),
        }
    }

    #[cfg(test)]
    pub fn looking(self, looker: Looker) -> Self {
        Self { looker: Some(looker), ..self }
    }

    /// For a report.
    pub fn condition(&self) -> Condition {
        Condition {
            drift: self.drift.iter().take(DRIFT_LIMIT).cloned().collect(),
            drift_count: u32::try_from(self.drift.len()).unwrap_or(u32::MAX),
            draining: self.progress.read(),
            put_up: None,
            spool: self.keeper.report(),
        }
    }

    /// A reply came: what the report carried is confirmed. Whether more waits to be said.
    pub fn heard(&mut self, reply: &Reply) -> bool {
        if let Decision::Assigned { freshness, .. } = &reply.desired.decision {
            // Not verified here: it moves no clock, it only tells people that one is wrong.
            let said = claimed_now(freshness);
            self.offset_ms = said.map(|said| Timestamp::now().as_millisecond().saturating_sub(said.as_millisecond()));
        }
        self.keeper.answered()
    }

    /// Checks turned. A check that was never bad is no news when it is good.
    pub fn turned(&mut self, turns: Vec<Turn>) {
        for Turn { name, good, words } in turns {
            if good && self.bad.remove(&name) {
                self.keeper.note("health", false, &format!("check {name} passes again"));
            } else if !good {
                self.keeper.note("health", true, &format!("check {name} fails: {words}"));
                self.bad.insert(name);
            }
        }
    }

    /// The role's thresholds that this release does not take.
    pub fn refused(&self, refused: Vec<String>) {
        for words in refused {
            self.keeper.note("threshold", true, &words);
        }
    }

    /// The first look; none where there is nothing to compare with.
    pub fn look(&mut self) -> Option<Look> {
        let looker = self.looker.take()?;
        Some(Box::pin(drift::look(Eye::Free(Box::new(looker)), FIRST)))
    }

    /// A look is over. The next one, and whether there is news.
    pub fn seen(&mut self, eye: Eye, mut seen: Seen) -> (Look, bool) {
        seen.differences.extend(drift::clock(self.offset_ms));
        let (came, went) = compare::turned(&self.drift, &seen.differences);
        for difference in came.iter().take(DRIFT_LIMIT) {
            self.keeper.note("drift", true, &difference.text);
        }
        for difference in went.iter().take(DRIFT_LIMIT) {
            self.keeper.note("drift", false, &format!("no longer: {}", difference.text));
        }
        for (alarm, text) in &seen.limits {
            self.keeper.note("limit", *alarm, text);
        }
        let news = !came.is_empty() || !went.is_empty() || !seen.limits.is_empty();
        self.drift = seen.differences;
        drop(self.keeper.flush());
        (Box::pin(drift::look(eye, EVERY)), news)
    }

    /// Runs the drain hooks.
    pub fn drain(&self) -> Hooks {
        let run = self.run("drain", self.progress.clone());
        Box::pin(async move {
            let failed = run.await.err().map(|(hook, reason)| AgentError::DrainHook { hook, reason });
            Event::Drained(failed.map(|error| trouble(Stage::Drain, &error, false)))
        })
    }

    /// Runs the undrain hooks: nothing waits for them.
    pub fn undrain(&self) -> Hooks {
        self.progress.clear();
        let run = self.run("undrain", Progress::default());
        Box::pin(async move {
            // Each hook's end was told.
            let _ = run.await;
            Event::Time
        })
    }

    fn run(
        &self,
        event: &'static str,
        progress: Progress,
    ) -> impl Future<Output = Result<(), (String, String)>> + use<> {
        let keeper = Rc::clone(&self.keeper);
        let told = Box::new(move |alarm, text: String| keeper.note("hook", alarm, &text));
        let hooks = self.hooks.get(event).cloned().unwrap_or_default();
        hooks::run(event, hooks, self.root.clone(), progress, told)
    }
}

fn claimed_now(freshness: &str) -> Option<Timestamp> {
    let envelope: serde_json::Value = serde_json::from_str(freshness).ok()?;
    envelope.get("signed")?.get("now")?.as_str()?.parse().ok()
}
