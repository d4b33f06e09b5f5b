//! The health checks that the release declares, each held for its soak time. A check that hangs fails at its deadline; it
//! holds up nothing else, and however long it hangs it costs one thread.

use crate::error::Result;
use kiln_protocol::Health;
use kiln_release::{HealthCheck, HealthKind};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Longest a single check may take.
const LIMIT: Duration = Duration::from_secs(10);

const FAILED_UNITS: &[&str] = &["list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"];

/// How the checks look at the machine.
pub struct Probe {
    /// The root hash in the kernel's table.
    pub root_hash: fn() -> Result<String>,
    /// The program that speaks to systemd.
    pub systemctl: PathBuf,
    /// What may block is called one at a time: one that never comes back is waited for, not added to.
    pub blocking: Arc<Semaphore>,
}

impl Probe {
    pub fn new(root_hash: fn() -> Result<String>, systemctl: impl Into<PathBuf>) -> Self {
        Self { root_hash, systemctl: systemctl.into(), blocking: Arc::new(Semaphore::new(1)) }
    }

    /// Runs what the kernel may hold up beside the runtime.
    async fn beside<T: Send + 'static>(&self, what: &str, work: impl FnOnce() -> T + Send + 'static) -> Said<T> {
        let permit = Arc::clone(&self.blocking).try_acquire_owned();
        let permit = permit.map_err(|_| format!("{what}: an earlier check still hangs in the kernel"))?;
        let done = spawn_blocking(move || {
            let done = work();
            drop(permit);
            done
        });
        done.await.map_err(|e| format!("{what}: {e}"))
    }
}

/// A result, or what is wrong, for people.
type Said<T> = std::result::Result<T, String>;

/// The checks and since when they all pass.
pub struct Checks {
    declared: Vec<HealthCheck>,
    /// The manifest's.
    root_hash: String,
    probe: Probe,
    passing_since: Option<Instant>,
}

impl Checks {
    pub fn new(checks: Vec<HealthCheck>, root_hash: String, probe: Probe) -> Self {
        Self { declared: checks, root_hash, probe, passing_since: None }
    }

    /// Runs them all once.
    pub async fn run(&mut self) -> Health {
        if let Err(detail) = self.all().await {
            self.passing_since = None;
            return Health { healthy: false, detail };
        }
        let since = *self.passing_since.get_or_insert_with(Instant::now);
        let soak = Duration::from_secs(self.declared.iter().map(|c| c.soak).max().unwrap_or(0));
        match soak.checked_sub(since.elapsed()).filter(|left| !left.is_zero()) {
            None => Health { healthy: true, detail: "all checks pass".into() },
            Some(left) => {
                let detail = format!("all checks pass; {} s of soak left", left.as_secs() + 1);
                Health { healthy: false, detail }
            }
        }
    }

    async fn all(&self) -> Said<()> {
        in_time("the kernel's table for the root", self.root()).await?;
        for check in &self.declared {
            match check.kind {
                HealthKind::Systemd => in_time("systemctl", self.systemd()).await?,
            }
        }
        Ok(())
    }

    /// The kernel's table names the manifest's root hash: part of health whatever the release declares.
    async fn root(&self) -> Said<()> {
        let running = self.probe.beside("the kernel's table for the root", self.probe.root_hash).await?;
        match running {
            Ok(running) if running == self.root_hash => Ok(()),
            Ok(running) => {
                Err(format!("the kernel's root has root hash {running}, the manifest names {}", self.root_hash))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// `systemctl is-system-running`: `running` is health; for `degraded` the failed units are named.
    async fn systemd(&self) -> Said<()> {
        let state = self.systemctl(&["is-system-running"]).await?;
        match state.as_str() {
            "running" => Ok(()),
            "degraded" => {
                let failed = self.systemctl(FAILED_UNITS).await?;
                let units: Vec<&str> = failed.lines().filter_map(|l| l.split_whitespace().next()).take(8).collect();
                Err(format!("systemd is degraded; failed: {}", units.join(", ")))
            }
            other => Err(format!("systemd is {}", other.chars().take(80).collect::<String>())),
        }
    }

    async fn systemctl(&self, arguments: &'static [&'static str]) -> Said<String> {
        let mut command = Command::new(&self.probe.systemctl);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        // Starting a program reads it from the root, which can take as long as the root takes.
        let started: std::io::Result<Child> = self.probe.beside("systemctl", move || command.spawn()).await?;
        let said = |e| format!("systemctl cannot be run: {e}");
        let output = started.map_err(said)?.wait_with_output().await.map_err(said)?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

async fn in_time(what: &str, check: impl Future<Output = Said<()>>) -> Said<()> {
    let late = |_| Err(format!("{what} gave no answer in {} s", LIMIT.as_secs()));
    timeout(LIMIT, check).await.unwrap_or_else(late)
}
