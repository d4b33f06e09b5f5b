//! What a build shows while it runs: a bar on a terminal, plain lines elsewhere, nothing when asked so.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// How a build shows where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A bar that moves, on standard error.
    Bar,
    /// A line on standard error as each step ends.
    Lines,
    /// Nothing.
    Silent,
}

impl Progress {
    /// A bar if standard error is a terminal, else lines.
    pub fn auto() -> Self {
        if std::io::stderr().is_terminal() { Self::Bar } else { Self::Lines }
    }

    pub(crate) fn start(self, steps: u64) -> Steps {
        let bar = (self == Self::Bar).then(|| {
            let style = ProgressStyle::with_template("{spinner} [{pos}/{len}] {msg:<48} {wide_bar} {elapsed}")
                .expect("the template is constant and tested");
            let bar = ProgressBar::new(steps).with_style(style);
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Steps { mode: self, bar, open: None }
    }
}

/// The steps of one build.
#[derive(Debug)]
pub(crate) struct Steps {
    mode: Progress,
    bar: Option<ProgressBar>,
    open: Option<(String, Instant)>,
}

impl Steps {
    /// Ends the step before, and begins one.
    pub(crate) fn next(&mut self, what: &str) {
        self.close();
        tracing::debug!(step = what, "build step");
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
        self.open = Some((what.to_owned(), Instant::now()));
    }

    /// Says what the running step is at.
    pub(crate) fn detail(&self, text: &str) {
        if let (Some(bar), Some((what, _))) = (&self.bar, &self.open) {
            bar.set_message(format!("{what}: {text}"));
        }
    }

    /// Says what the person who builds should know, beside the steps.
    pub(crate) fn note(&self, text: &str) {
        tracing::debug!(text, "build note");
        match (&self.bar, self.mode) {
            (Some(bar), _) => bar.suspend(|| eprintln!("{text}")),
            (None, Progress::Lines) => eprintln!("{text}"),
            (None, Progress::Bar | Progress::Silent) => {}
        }
    }

    fn close(&mut self) {
        let Some((what, since)) = self.open.take() else { return };
        match (&self.bar, self.mode) {
            (Some(bar), _) => bar.inc(1),
            (None, Progress::Lines) => eprintln!("{what} ({:.1} s)", since.elapsed().as_secs_f32()),
            (None, Progress::Bar | Progress::Silent) => {}
        }
    }

    /// Ends the last step.
    pub(crate) fn finish(mut self) {
        self.close();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_counts_steps() {
        let mut steps = Progress::Bar.start(2);
        steps.next("one");
        steps.detail("half");
        steps.next("two");
        assert_eq!(steps.bar.as_ref().map(ProgressBar::position), Some(1));
        steps.finish();
    }
}
