//! One line per machine that moves through its stages: redrawn on a terminal, one line per change elsewhere.

use crate::api::MachineView;
use crate::machine::MachineSpec;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use kiln_protocol::Stage;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// The live display.
#[derive(Debug)]
pub struct Live {
    bars: Option<(MultiProgress, BTreeMap<String, ProgressBar>)>,
    said: BTreeMap<String, String>,
    begun: Instant,
}

impl Live {
    /// Lines for these machines, all off.
    pub fn new(machines: &[MachineSpec]) -> Self {
        let bars = std::io::stdout().is_terminal().then(|| {
            let all = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::stdout());
            let style = ProgressStyle::with_template("{prefix:<20} {spinner} {msg}")
                .expect("the template is a constant")
                .tick_chars("⠁⠂⠄⡀⢀⠠⠐⠈ ");
            let lines = machines
                .iter()
                .map(|spec| {
                    let bar = all.add(ProgressBar::new_spinner()).with_style(style.clone());
                    bar.set_prefix(format!("{} {}", spec.name, spec.firmware_text()));
                    bar.set_message("off");
                    bar.enable_steady_tick(Duration::from_millis(150));
                    (spec.name.clone(), bar)
                })
                .collect();
            (all, lines)
        });
        Self { bars, said: BTreeMap::new(), begun: Instant::now() }
    }

    /// A line of the story, above the machines.
    pub fn say(&self, text: &str) {
        match &self.bars {
            Some((all, _)) => {
                let _ = all.println(text);
            }
            None => println!("[{:6.1}] {text}", self.begun.elapsed().as_secs_f64()),
        }
    }

    /// Where a machine stands now.
    pub fn show(&mut self, name: &str, text: &str) {
        if self.said.get(name).is_some_and(|s| s == text) {
            return;
        }
        self.said.insert(name.to_owned(), text.to_owned());
        match &self.bars {
            Some((_, lines)) => {
                if let Some(bar) = lines.get(name) {
                    bar.set_message(format!("{text}  ({:.0} s)", self.begun.elapsed().as_secs_f64()));
                }
            }
            None => println!("[{:6.1}] {name}: {text}", self.begun.elapsed().as_secs_f64()),
        }
    }

    /// Leaves the lines as they are.
    pub fn finish(&self) {
        if let Some((_, lines)) = &self.bars {
            lines.values().for_each(ProgressBar::abandon);
        }
    }
}

/// A machine's place in words: the stage's label, and why it does not go on.
pub fn describe(view: Option<&MachineView>) -> String {
    let Some(view) = view else { return "firmware starts".into() };
    let release = view.release.map(|r| format!(" (release {r})")).unwrap_or_default();
    let stage = view.stage.map_or("firmware starts", Stage::label);
    let last = view.boot().and_then(|b| b.stages.last());
    let trouble = last
        .filter(|s| s.state == "failed" || s.state == "waiting")
        .and_then(|s| s.message.clone().or_else(|| s.kind.clone()))
        .map(|m| format!(": {m}"))
        .unwrap_or_default();
    format!("{stage}{release}{trouble}")
}
