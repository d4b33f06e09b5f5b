//! `make bench`: what a reimage costs, by kexec and by cold boot in turns on one machine, and what the agent costs a machine
//! at rest. Figures are compared within one run only: an emulated machine is no real one, and a host has moods.

use crate::console::Mark;
use crate::error::{AtPath, LabError};
use crate::machine::{Firmware, MachineSpec};
use crate::paths::Paths;
use crate::rack::{IDLE, Rack, RackOptions};
use crate::report::{BootFigures, Sizes};
use crate::rest::{self, AtRest, LOOK, SETTLED};
use crate::site;
use crate::variables::NetworkBoot;
use kiln_protocol::AgentMemory;
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const NAME: &str = "rack-1";

/// What is measured in a rack of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Reimages.
    Reimage,
    /// The agent of a machine with an allow-list that has nothing to do.
    Rest,
}

/// Medians of one way to reimage, all in seconds.
#[derive(Debug, Serialize)]
#[allow(clippy::struct_field_names)] // the unit is in the report's names
struct Way {
    downtime_s: Option<f64>,
    proven_s: Option<f64>,
    own_s: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Reimage {
    accelerator: String,
    kexec: Way,
    cold: Way,
    /// Downtime by kexec over that by cold boot.
    kexec_of_cold: Option<f64>,
    sizes: Sizes,
    boots: Vec<BootFigures>,
}

#[derive(Debug, Serialize)]
struct Rest {
    accelerator: String,
    #[serde(flatten)]
    figures: AtRest,
    /// Service and guard of the allow-list together, of one emulated core.
    cpu_share: f64,
    rss_bytes: u64,
    /// The most that both ever had, by their own report.
    peak_bytes: Option<u64>,
    /// From the machine's word on its console that a start was denied until the boot server showed it.
    denied_told_s: f64,
}

/// Where a part's figures lie until all are there.
fn place(paths: &Paths, part: &str) -> PathBuf {
    paths.lab.join("bench").join(format!("{part}.json"))
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Reimage => "reimage",
            Self::Rest => "rest",
        }
    }

    /// Measures it. Only inside the lab's namespaces.
    pub fn measure(self, paths: &Paths, rounds: u8, rest: Duration) -> Result<(), LabError> {
        let json = match self {
            Self::Reimage => serde_json::to_value(reimage(paths, rounds)?),
            Self::Rest => serde_json::to_value(at_rest(paths, rest)?),
        };
        let path = place(paths, self.name());
        let folder = path.parent().expect("a file below target/lab");
        std::fs::create_dir_all(folder).at(folder)?;
        std::fs::write(&path, json.expect("plain structs are JSON").to_string()).at(&path)
    }
}

fn reimage(paths: &Paths, rounds: u8) -> Result<Reimage, LabError> {
    let spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
    let firmware = spec.firmware_text();
    let mut rack = Rack::start(paths, &RackOptions::scenario(paths, "bench-reimage", spec))?;
    rack.machine(NAME).power_on()?;
    let powered_ms = now_ms();
    let mut boots = Vec::new();
    let mut note = |rack: &mut Rack, release: u64, how: &str| -> Result<(), LabError> {
        let view = rack.wait_healthy(NAME, release)?;
        let figures = BootFigures::of(&view, NAME, firmware, release, how, powered_ms);
        println!("{how} to release {release}: up after {:?} s, healthy after {:?} s", figures.up_s, figures.healthy_s);
        boots.push(figures);
        Ok(())
    };
    note(&mut rack, 1, "power-on")?;
    rack.kiln(&["release", "publish", &format!("{}/2", site::IMAGE)])?;
    for _ in 0..rounds {
        for (release, via) in [(2, "kexec"), (1, "cold")] {
            rack.kiln(&["assign", NAME, &format!("{}/{release}", site::IMAGE), "--via", via])?;
            note(&mut rack, release, via)?;
        }
    }
    let way = |how: &str| {
        let middle = |figure: fn(&BootFigures) -> Option<f64>| {
            median(boots.iter().filter(|b| b.how == how).filter_map(figure).collect())
        };
        Way { downtime_s: middle(|b| b.downtime_s), proven_s: middle(|b| b.proven_s), own_s: middle(|b| b.own_s) }
    };
    let (kexec, cold) = (way("kexec"), way("cold"));
    let kexec_of_cold = kexec.downtime_s.zip(cold.downtime_s).map(|(kexec, cold)| kexec / cold);
    let (accelerator, sizes) = (rack.accelerator.0.name().to_owned(), Sizes::of(&rack.site));
    Ok(Reimage { accelerator, kexec, cold, kexec_of_cold, sizes, boots })
}

/// By looks from inside: a report has service and guard in one figure, and does not say which processes they were. Before it rests,
/// how soon the server knows of a denied start.
fn at_rest(paths: &Paths, rest: Duration) -> Result<Rest, LabError> {
    let spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
    let mut options = RackOptions::scenario(paths, "bench-rest", spec);
    site::EXEC.clone_into(&mut options.image);
    let mut rack = Rack::start(paths, &options)?;
    rack.kiln(&["release", "publish", &format!("{}/1", site::EXEC)])?;
    rack.machine(NAME).power_on()?;
    let console = rack.machine(NAME).console()?.clone();
    console.wait_for_line("KILN-EXEC foreign ", Mark::default(), IDLE)?;
    let begun = Instant::now();
    rack.wait(NAME, "told of the denied program", |view| {
        view.exec.as_ref().is_some_and(|exec| exec.violations.iter().any(|seen| seen.path.ends_with("/foreign")))
    })?;
    let denied_told_s = begun.elapsed().as_secs_f64();
    // Its probe replaces service and guard; from then on it has nothing to do.
    console.wait_for("KILN-EXEC done", Mark::default(), IDLE)?;
    let (begun, limit) = (Instant::now(), SETTLED + rest + IDLE);
    let figures = loop {
        let mark = console.mark();
        if let Some(figures) = rest::at_rest(&console.since(Mark::default()), rest) {
            break figures;
        }
        if begun.elapsed() > limit {
            let what = "a time at rest with the same service and guard".to_owned();
            return Err(LabError::TooLong { who: NAME.to_owned(), what, limit });
        }
        console.wait_for_line(LOOK, mark, IDLE)?;
    };
    rack.wait_healthy(NAME, 1)?;
    let peak_bytes = peak(&rack)?;
    Ok(Rest {
        accelerator: rack.accelerator.0.name().to_owned(),
        cpu_share: figures.service_share + figures.guard_share,
        rss_bytes: figures.service_rss_bytes + figures.guard_rss_bytes,
        peak_bytes,
        denied_told_s,
        figures,
    })
}

/// The most memory that service and guard ever had in this boot, as last reported.
fn peak(rack: &Rack) -> Result<Option<u64>, LabError> {
    let path = format!("/api/v1/machines/{NAME}");
    let memory: Option<AgentMemory> = serde_json::from_value(rack.get(&path)?["agent_memory"].clone())
        .map_err(|e| LabError::Api { method: "GET", path, reason: format!("agent_memory: {e}") })?;
    Ok(memory.map(|memory| memory.peak_bytes))
}

/// Puts all figures there are into report.json and gives them as text.
pub fn collect(paths: &Paths) -> Result<String, LabError> {
    let mut all = serde_json::Map::new();
    // The allow-list's and the service's own are measured on the host itself, by tests of the agent.
    for part in ["exec", "service", "reimage", "rest"] {
        let path = place(paths, part);
        if path.exists() {
            let text = std::fs::read_to_string(&path).at(&path)?;
            let json = serde_json::from_str(&text).map_err(|e| LabError::File { path, source: e.into() })?;
            all.insert(part.to_owned(), json);
        }
    }
    let path = paths.lab.join("report.json");
    let json = serde_json::Value::Object(all);
    std::fs::write(&path, format!("{json:#}\n")).at(&path)?;
    Ok(summary(&json))
}

fn summary(all: &serde_json::Value) -> String {
    let mut out = String::new();
    let figure = |at: &str| all.pointer(at).and_then(serde_json::Value::as_f64);
    let mut line = |what: &str, at: &str, times: f64, unit: &str| {
        let value = figure(at).map_or("not measured".to_owned(), |value| format!("{:.2} {unit}", value * times));
        let _ = writeln!(out, "{what:<58} {value}");
    };
    line("agent, static", "/reimage/sizes/agent", 1e-6, "MB");
    line("reimage by kexec: downtime", "/reimage/kexec/downtime_s", 1.0, "s");
    line("reimage by cold boot: downtime", "/reimage/cold/downtime_s", 1.0, "s");
    line("reimage by kexec over cold boot: downtime", "/reimage/kexec_of_cold", 100.0, "%");
    line("reimage by kexec: proven", "/reimage/kexec/proven_s", 1.0, "s");
    line("reimage by cold boot: proven", "/reimage/cold/proven_s", 1.0, "s");
    line("agent from start to hand-over, cold, without download", "/reimage/cold/own_s", 1.0, "s");
    line("agent from start to hand-over, kexec", "/reimage/kexec/own_s", 1.0, "s");
    line("agent at rest on the host, its service: of one core", "/service/cpu_share", 100.0, "%");
    line("  of an emulated one", "/rest/service_share", 100.0, "%");
    line("  the guard of its allow-list", "/rest/guard_share", 100.0, "%");
    line("  both", "/rest/cpu_share", 100.0, "%");
    line("  the programs of its health checks", "/rest/ran_share", 100.0, "%");
    line("agent at rest, its service: resident", "/rest/service_rss_bytes", 1e-6, "MB");
    line("  the guard of its allow-list", "/rest/guard_rss_bytes", 1e-6, "MB");
    line("  both", "/rest/rss_bytes", 1e-6, "MB");
    line("  both, at most", "/rest/peak_bytes", 1e-6, "MB");
    line("a denied start is shown by the boot server after", "/rest/denied_told_s", 1.0, "s");
    line("  the service knows of it after", "/exec/told/median_ms", 1.0, "ms");
    line("a start that cannot be judged in time waits", "/exec/late/median_ms", 1.0, "ms");
    line("  at most", "/exec/late/most_ms", 1.0, "ms");
    line("the guard of an allow-list on the host, at most", "/exec/guard/peak_kib", 1.024e-3, "MB");
    line("a compile job under an allow-list takes longer by", "/exec/compile/more", 100.0, "%");
    line("the start of a small program under an allow-list, by", "/exec/start/more", 100.0, "%");
    out
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_is_said_to_be() {
        let all = serde_json::json!({ "reimage": { "kexec_of_cold": 0.5, "kexec": { "downtime_s": 7.5 } } });
        let text = summary(&all);
        assert!(text.contains(" 50.00 %") && text.contains(" 7.50 s") && text.contains("not measured"), "{text}");
        assert_eq!((median(vec![3.0, 1.0, 2.0]), median(Vec::new())), (Some(2.0), None));
    }
}
