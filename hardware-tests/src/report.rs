//! The lab's figures: a table for people, report.json for everything else.

use crate::api::{Boot, MachineView, StageView};
use crate::error::{AtPath, LabError};
use crate::paths::Paths;
use crate::site;
use kiln_protocol::Stage;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// Seconds from one moment to the stages of one boot. Server's clock; the rack runs on the same host.
#[derive(Debug, Clone, Serialize)]
pub struct BootFigures {
    pub machine: String,
    pub firmware: String,
    pub release: u64,
    /// `power-on`, `kexec` or `cold`.
    pub how: String,
    /// From power-on, or from the report of going.
    pub from_ms: u64,
    pub dhcp_s: Option<f64>,
    pub agent_start_s: Option<f64>,
    pub verified_s: Option<f64>,
    pub healthy_s: Option<f64>,
    pub healthy_ms: Option<u64>,
    /// All health checks passed for the first time: the machine does its work. What comes up to healthy is the soak.
    pub up_s: Option<f64>,
    /// From the report of going, after which the running system is stopped, to up: how long the machine did no work. None
    /// for a first boot.
    pub downtime_s: Option<f64>,
    /// From going to healthy: how long it takes until the release is proven to work. None for a first boot.
    pub proven_s: Option<f64>,
    /// The agent's own time from its start to the hand-over, the download of the root left out.
    pub own_s: Option<f64>,
    /// What the agent of the running system had resident when the machine became healthy, and the most it ever had.
    pub agent_rss_bytes: Option<u64>,
    pub agent_peak_bytes: Option<u64>,
    /// The same: its processor time since its start, and that of the programs that it ran (health checks), milliseconds.
    pub agent_cpu_ms: Option<u64>,
    pub agent_ran_ms: Option<u64>,
    /// Every stage record of the boot.
    pub stages: Vec<StageFigure>,
}

/// One stage record.
#[derive(Debug, Clone, Serialize)]
pub struct StageFigure {
    pub stage: Stage,
    pub state: String,
    pub server_s: f64,
    pub agent_ms: Option<u64>,
}

/// report.json.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Every machine did everything.
    pub complete: bool,
    /// What went wrong, by machine.
    pub failures: Vec<String>,
    pub accelerator: String,
    pub boots: Vec<BootFigures>,
    /// Resident memory of `kiln serve` at the end.
    pub server_rss_kib: Option<u64>,
    pub sizes: Sizes,
}

/// Bytes of what boots.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Sizes {
    pub agent: Option<u64>,
    pub uki: Option<u64>,
    pub kernel: Option<u64>,
    pub initramfs: Option<u64>,
    pub root: Option<u64>,
}

impl Sizes {
    /// Of the agent, and of release 1 of the image that racks boot.
    pub fn of(site: &Path) -> Self {
        let length =
            |file: &str| std::fs::metadata(site.join(format!("build/{}/1/{file}", site::IMAGE))).ok().map(|m| m.len());
        Self {
            agent: Paths::find().ok().and_then(|p| std::fs::metadata(p.agent).ok()).map(|m| m.len()),
            uki: length("kiln.efi"),
            kernel: length("kernel"),
            initramfs: length("initramfs"),
            root: length("root"),
        }
    }
}

impl BootFigures {
    /// From the newest boot of a machine that has just become healthy.
    pub fn of(view: &MachineView, machine: &str, firmware: &str, release: u64, how: &str, powered_ms: u64) -> Self {
        let boot = view.boot();
        let healthy = boot.and_then(|b| first(b, Stage::Healthy));
        let going = view.boots.iter().flat_map(|b| &b.stages).filter(|s| s.stage == Stage::Going).map(|s| s.at_ms);
        let from = if how == "power-on" {
            powered_ms
        } else {
            going.filter(|g| healthy.is_none_or(|h| *g <= h.at_ms)).max().unwrap_or(powered_ms)
        };
        let seconds = |at: u64| Duration::from_millis(at.saturating_sub(from)).as_secs_f64();
        let stage = |stage| boot.and_then(|b| first(b, stage)).filter(|s| s.at_ms >= from).map(|s| seconds(s.at_ms));
        let done = |stage| boot.and_then(|b| b.at(stage, "done")).map(seconds);
        let healthy_s = healthy.map(|s| seconds(s.at_ms));
        // Without a soak the checks that pass first are those that make it healthy.
        let up_s = boot.and_then(|b| b.at(Stage::Health, "waiting")).map(seconds).or(healthy_s);
        let again = how != "power-on";
        Self {
            machine: machine.to_owned(),
            firmware: firmware.to_owned(),
            release,
            how: how.to_owned(),
            from_ms: from,
            dhcp_s: stage(Stage::Dhcp),
            agent_start_s: stage(Stage::Start),
            verified_s: done(Stage::Verity),
            healthy_ms: healthy.map(|s| s.at_ms),
            healthy_s,
            agent_rss_bytes: view.agent_memory.map(|m| m.rss_bytes),
            agent_peak_bytes: view.agent_memory.map(|m| m.peak_bytes),
            agent_cpu_ms: view.agent_memory.and_then(|m| m.cpu_ms),
            agent_ran_ms: view.agent_memory.and_then(|m| m.ran_ms),
            up_s,
            downtime_s: up_s.filter(|_| again),
            proven_s: healthy_s.filter(|_| again),
            own_s: boot.and_then(|b| own_s(b, how == "kexec")),
            stages: boot
                .map(|b| &b.stages[..])
                .unwrap_or_default()
                .iter()
                .map(|s| StageFigure {
                    stage: s.stage,
                    state: s.state.clone(),
                    server_s: seconds(s.at_ms),
                    agent_ms: s.agent_ms,
                })
                .collect(),
        }
    }
}

fn first(boot: &Boot, stage: Stage) -> Option<&StageView> {
    boot.stages.iter().find(|s| s.stage == stage)
}

/// By the agent's clock. A root that crossed a kexec is verified in the stage in which another boot downloads it.
fn own_s(boot: &Boot, crossed: bool) -> Option<f64> {
    let at = |stage, state: &str| boot.stages.iter().find(|s| s.stage == stage && s.state == state)?.agent_ms;
    let all = at(Stage::Handover, "started")?;
    let root = at(Stage::Root, "done")?.checked_sub(at(Stage::Root, "started")?)?;
    Some(Duration::from_millis(all.checked_sub(if crossed { 0 } else { root })?).as_secs_f64())
}

impl Report {
    /// Writes report.json, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), LabError> {
        let text = serde_json::to_string_pretty(self).expect("plain structs are JSON");
        let beside = path.with_extension("json.new");
        std::fs::write(&beside, text + "\n").at(&beside)?;
        std::fs::rename(&beside, path).at(path)
    }

    /// The table.
    pub fn table(&self) -> String {
        let cell = |s: Option<f64>| s.map_or_else(|| "–".to_owned(), |s| format!("{s:.1}"));
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{:<9} {:<10} {:>7}  {:<9} {:>7} {:>7} {:>9} {:>7} {:>8} {:>9} {:>5}",
            "machine", "firmware", "release", "by", "dhcp", "agent", "verified", "up", "healthy", "downtime", "own"
        );
        for b in &self.boots {
            let _ = writeln!(
                out,
                "{:<9} {:<10} {:>7}  {:<9} {:>7} {:>7} {:>9} {:>7} {:>8} {:>9} {:>5}",
                b.machine,
                b.firmware,
                b.release,
                b.how,
                cell(b.dhcp_s),
                cell(b.agent_start_s),
                cell(b.verified_s),
                cell(b.up_s),
                cell(b.healthy_s),
                cell(b.downtime_s),
                cell(b.own_s)
            );
        }
        out.push_str(
            "seconds from power-on, or from the report of going; up: all checks pass; healthy: and did so for the soak; \
             downtime: going to up; own: the agent's time to the hand-over without the download\n",
        );
        if let Some(peak) = self.boots.iter().filter_map(|b| b.agent_peak_bytes).max() {
            let tenths = peak * 10 / (1 << 20);
            let _ = writeln!(out, "agent in the running system: at most {}.{} MiB resident", tenths / 10, tenths % 10);
        }
        out
    }
}

/// VmRSS of a process.
pub fn rss_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_memory_is_in_report_and_table() {
        let view = |memory: &str| -> MachineView {
            serde_json::from_str(&format!(r#"{{"id":"a","state":"healthy"{memory},"boots":[]}}"#)).unwrap()
        };
        let figures = |memory| BootFigures::of(&view(memory), "rack-1", "UEFI PXE", 1, "power-on", 0);
        let known = figures(r#","agent_memory":{"rss_bytes":4194304,"peak_bytes":5767168}"#);
        assert_eq!((known.agent_rss_bytes, known.agent_peak_bytes), (Some(4 << 20), Some(11 << 19)));
        let mut report = Report {
            complete: true,
            failures: Vec::new(),
            accelerator: "tcg".into(),
            boots: vec![figures(""), known],
            server_rss_kib: None,
            sizes: Sizes::default(),
        };
        assert!(
            report.table().ends_with("agent in the running system: at most 5.5 MiB resident\n"),
            "{}",
            report.table()
        );
        report.boots.pop();
        assert!(!report.table().contains("resident"), "an older agent says nothing of it");
    }
}
