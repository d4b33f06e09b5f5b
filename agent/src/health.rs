//! The health checks that the release declares: here they are run, [`kiln_protocol::Verdict`] judges. All run side by
//! side; one that hangs fails at its deadline and holds up nothing, and however long it hangs it costs one thread.

use crate::error::Result;
use crate::facts;
use crate::journal::monotonic_ms;
use crate::run::{self, Gate, Said, in_time};
use crate::secrets::{self, Keeper};
use crate::sys;
use futures_util::future::join_all;
use kiln_protocol::{Health, Rule, Turn, Verdict};
use kiln_release::{HealthCheck, HealthKind, Threshold};
use nix::sys::statvfs::statvfs;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use tokio::process::{Child, Command};

/// Longest that the kernel may take to say what it runs.
const ROOT_DEADLINE: u64 = 10;
/// Most thresholds of a role that are looked at.
const MAX_THRESHOLDS: usize = 32;

const FAILED_UNITS: &[&str] = &["list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"];

/// How the checks look at the machine.
pub struct Probe {
    /// The root hash in the kernel's table.
    pub root_hash: fn() -> Result<String>,
    /// The program that speaks to systemd.
    pub systemctl: PathBuf,
    /// The verified root, of which alone programs are run.
    pub root: PathBuf,
}

impl Probe {
    pub fn new(root_hash: fn() -> Result<String>, systemctl: impl Into<PathBuf>) -> Self {
        Self { root_hash, systemctl: systemctl.into(), root: "/".into() }
    }
}

/// The checks, and how they stand.
pub struct Checks {
    declared: Vec<(HealthCheck, Gate)>,
    /// The manifest's.
    root_hash: String,
    probe: Probe,
    gate: Gate,
    verdict: Option<Verdict>,
    /// The release's secrets and certificate, if it wants any.
    secrets: Option<Arc<Mutex<Keeper>>>,
    /// Why the machine's data is not there.
    no_data: Option<String>,
    /// The role's, as they came.
    thresholds: BTreeMap<String, String>,
    /// Those of them that are declared.
    set: BTreeMap<String, Threshold>,
}

type Running<'a> = Pin<Box<dyn Future<Output = Said<()>> + 'a>>;

impl Checks {
    pub fn new(checks: Vec<HealthCheck>, root_hash: String, probe: Probe) -> Self {
        let ms = |seconds: u64| seconds.saturating_mul(1000);
        // Part of health whatever the release declares.
        let root = Rule { name: "root".into(), soak_ms: 0, fail_after: 1, pass_after: 1 };
        let rule = |check: &HealthCheck| Rule {
            name: check.title(),
            soak_ms: ms(check.soak),
            fail_after: check.fail_after,
            pass_after: check.pass_after,
        };
        let verdict = Verdict::new(std::iter::once(root).chain(checks.iter().map(rule)).collect());
        let declared = checks.into_iter().map(|check| (check, Gate::new())).collect();
        let (thresholds, set) = (BTreeMap::new(), BTreeMap::new());
        let (gate, verdict) = (Gate::new(), Some(verdict));
        Self { declared, root_hash, probe, gate, verdict, secrets: None, no_data: None, thresholds, set }
    }

    /// The same, and a machine without the secrets or the certificate that its release requires is not healthy.
    #[must_use]
    pub fn with_secrets(self, keeper: Arc<Mutex<Keeper>>) -> Self {
        let rule = Rule { name: "secrets".into(), soak_ms: 0, fail_after: 1, pass_after: 1 };
        let verdict = self.verdict.map(|verdict| verdict.and(rule));
        Self { secrets: Some(keeper), verdict, ..self }
    }

    /// The same of a machine whose data is not there: it is not healthy in this boot.
    #[must_use]
    pub fn without_data(self, reason: String) -> Self {
        let rule = Rule { name: "data".into(), soak_ms: 0, fail_after: 1, pass_after: 1 };
        let verdict = self.verdict.map(|verdict| verdict.and(rule));
        Self { no_data: Some(reason), verdict, ..self }
    }

    /// Takes the role's thresholds. Gives a sentence for each that is refused, once.
    pub fn set_thresholds(&mut self, thresholds: &BTreeMap<String, String>) -> Vec<String> {
        if self.thresholds == *thresholds {
            return Vec::new();
        }
        self.thresholds.clone_from(thresholds);
        self.set.clear();
        let mut refused = Vec::new();
        for (name, text) in thresholds.iter().take(MAX_THRESHOLDS) {
            let check = self.declared.iter().map(|(check, _)| check).find(|check| check.title() == *name);
            let threshold = Threshold::parse(text);
            match (check, threshold) {
                (Some(check), Some(threshold)) if check.limit.is_some() && threshold.fits(check.kind) => {
                    self.set.insert(name.clone(), threshold);
                }
                (Some(_), _) => refused.push(format!("the role sets {name} to {text:?}, which that check cannot take")),
                (None, _) => {
                    let known: Vec<String> =
                        self.declared.iter().filter(|(c, _)| c.limit.is_some()).map(|(c, _)| c.title()).collect();
                    let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                    refused.push(format!("the role sets the threshold {name}; this release declares: {known}"));
                }
            }
        }
        refused
    }

    /// Runs them all once.
    pub async fn run(&mut self) -> (Health, Vec<Turn>) {
        let this: &Self = self;
        let mut running: Vec<Running<'_>> = vec![Box::pin(in_time(ROOT, ROOT_DEADLINE, this.root()))];
        for (check, gate) in &this.declared {
            running.push(Box::pin(async move {
                let what = if check.kind == HealthKind::Systemd { "systemctl".into() } else { check.title() };
                in_time(&what, check.deadline, this.look(check, gate)).await
            }));
        }
        let mut found = join_all(running).await;
        found.extend(this.secrets.as_ref().map(|keeper| match secrets::lock(keeper).missing() {
            Some(missing) => Err(missing),
            None => Ok(()),
        }));
        // In the order in which the service adds them.
        found.extend(this.no_data.clone().map(Err));
        let verdict = self.verdict.take().expect("it is put back below");
        let (verdict, health, turns) = verdict.round(found, monotonic_ms());
        self.verdict = Some(verdict);
        (health, turns)
    }

    /// [`Verdict::all_pass`].
    pub fn all_pass(&self) -> bool {
        self.verdict.as_ref().is_some_and(Verdict::all_pass)
    }

    async fn look(&self, check: &HealthCheck, gate: &Gate) -> Said<()> {
        let limit = self.set.get(&check.title()).copied().or(check.limit);
        let target = check.target.as_str();
        match check.kind {
            HealthKind::Systemd => self.systemd(gate).await,
            HealthKind::Unit => match self.systemctl(gate, &["is-active", target]).await?.as_str() {
                "active" => Ok(()),
                other => Err(format!("{target} is {}", cut(other))),
            },
            HealthKind::Http => match run::http("GET", target).await? {
                200..=299 => Ok(()),
                status => Err(format!("{target}: status {status}")),
            },
            HealthKind::Tcp => run::tcp(target).await,
            HealthKind::Command => run::program(gate, &self.probe.root, target, &check.arguments).await,
            HealthKind::Memory => {
                let (free, all) = (facts::memory("MemAvailable:"), facts::memory("MemTotal:"));
                enough("memory", free, all, limit)
            }
            HealthKind::Disk => {
                let path = PathBuf::from(target);
                let stat = gate.beside(target, move || statvfs(&path)).await?;
                let stat = stat.map_err(|e| format!("{target}: {e}"))?;
                let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
                enough(target, bytes(stat.blocks_available()), bytes(stat.blocks()), limit)
            }
            HealthKind::Time => clock(sys::clock_error().map_err(|e| format!("adjtimex: {e}"))?, limit),
        }
    }

    /// The kernel's table names the manifest's root hash.
    async fn root(&self) -> Said<()> {
        match self.gate.beside(ROOT, self.probe.root_hash).await? {
            Ok(running) if running == self.root_hash => Ok(()),
            Ok(running) => {
                Err(format!("the kernel's root has root hash {running}, the manifest names {}", self.root_hash))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// `systemctl is-system-running`: `running` is health; for `degraded` the failed units are named.
    async fn systemd(&self, gate: &Gate) -> Said<()> {
        let state = self.systemctl(gate, &["is-system-running"]).await?;
        match state.as_str() {
            "running" => Ok(()),
            "degraded" => {
                let failed = self.systemctl(gate, FAILED_UNITS).await?;
                let units: Vec<&str> = failed.lines().filter_map(|l| l.split_whitespace().next()).take(8).collect();
                Err(format!("systemd is degraded; failed: {}", units.join(", ")))
            }
            other => Err(format!("systemd is {}", cut(other))),
        }
    }

    async fn systemctl(&self, gate: &Gate, arguments: &[&str]) -> Said<String> {
        let mut command = Command::new(&self.probe.systemctl);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        // Starting a program reads it from the root, which can take as long as the root takes.
        let started: std::io::Result<Child> = gate.beside("systemctl", move || command.spawn()).await?;
        let said = |e| format!("systemctl cannot be run: {e}");
        let output = started.map_err(said)?.wait_with_output().await.map_err(said)?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

const ROOT: &str = "the kernel's table for the root";

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

/// So much of it must be free.
fn enough(what: &str, free: u64, all: u64, least: Option<Threshold>) -> Said<()> {
    let Some(least) = least else { return Ok(()) };
    let wanted = match least {
        Threshold::Percent(share) => u128::from(all) * u128::from(share) / 100,
        Threshold::Bytes(bytes) | Threshold::Millis(bytes) => bytes.into(),
    };
    if u128::from(free) >= wanted {
        return Ok(());
    }
    Err(format!("{what}: {} of {} MiB are free; {least} is asked for", free >> 20, all >> 20))
}

/// The kernel's own estimate of its clock's error, in microseconds; none where nothing sets the clock.
fn clock(error: Option<u64>, most: Option<Threshold>) -> Said<()> {
    match (error, most) {
        (None, _) => Err("the clock is not synchronised: nothing that keeps time says so to the kernel".into()),
        (Some(error), Some(Threshold::Millis(most))) if error > most.saturating_mul(1000) => {
            Err(format!("the clock may be wrong by {} ms; at most {most} ms are asked for", error / 1000))
        }
        (Some(_), _) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
