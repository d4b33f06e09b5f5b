//! The health checks that the release declares, each held for its soak time.

use crate::verity;
use kiln_protocol::Health;
use kiln_release::{HealthCheck, HealthKind};
use std::time::{Duration, Instant};
use tokio::process::Command;
use tokio::time::timeout;

/// Longest a single check may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The checks and since when they all pass.
pub struct Checks {
    declared: Vec<HealthCheck>,
    /// The manifest's.
    root_hash: String,
    passing_since: Option<Instant>,
}

impl Checks {
    pub fn new(checks: Vec<HealthCheck>, root_hash: String) -> Self {
        Self { declared: checks, root_hash, passing_since: None }
    }

    /// The kernel's table names the manifest's root hash: part of health whatever the release declares.
    fn root(&self) -> Result<(), String> {
        match verity::running_root_hash() {
            Ok(running) if running == self.root_hash => Ok(()),
            Ok(running) => {
                Err(format!("the kernel's root has root hash {running}, the manifest names {}", self.root_hash))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Runs them all once.
    pub async fn run(&mut self) -> Health {
        if let Err(detail) = self.root() {
            self.passing_since = None;
            return Health { healthy: false, detail };
        }
        for check in &self.declared {
            let failure = match check.kind {
                HealthKind::Systemd => systemd().await.err(),
            };
            if let Some(detail) = failure {
                self.passing_since = None;
                return Health { healthy: false, detail };
            }
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
}

/// `systemctl is-system-running`: `running` is health; for `degraded` the failed units are named.
async fn systemd() -> Result<(), String> {
    let state = output(&["is-system-running"]).await?;
    match state.as_str() {
        "running" => Ok(()),
        "degraded" => {
            let failed = output(&["list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"]).await?;
            let units: Vec<&str> = failed.lines().filter_map(|l| l.split_whitespace().next()).take(8).collect();
            Err(format!("systemd is degraded; failed: {}", units.join(", ")))
        }
        other => Err(format!("systemd is {other}")),
    }
}

async fn output(arguments: &[&str]) -> Result<String, String> {
    let run = Command::new("systemctl").args(arguments).kill_on_drop(true).output();
    let output = timeout(LIMIT, run).await.map_err(|_| format!("systemctl gave no answer in {} s", LIMIT.as_secs()))?;
    let output = output.map_err(|e| format!("systemctl cannot be run: {e}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
