//! Hooks: what a release has called before a machine leaves, so that running work ends first, and what it has called
//! when that is off. One after another, in the order they are declared, each with its deadline.

use crate::run::{self, Gate, in_time};
use kiln_protocol::Draining;
use kiln_release::{Hook, HookKind, OnTimeout};
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// Between questions to a hook that says "not yet".
const AGAIN: Duration = Duration::from_secs(1);

/// How far the hooks of an event are; shared with whoever reports.
#[derive(Debug, Clone, Default)]
pub struct Progress(Rc<RefCell<Option<Now>>>);

#[derive(Debug)]
struct Now {
    hook: String,
    number: u32,
    of: u32,
    since: Instant,
    left: Duration,
}

impl Progress {
    /// For a report.
    pub fn read(&self) -> Option<Draining> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.0.borrow().as_ref().map(|now| Draining {
            hook: now.hook.clone(),
            number: now.number,
            of: now.of,
            since_ms: ms(now.since.elapsed()),
            left_ms: ms(now.left.saturating_sub(now.since.elapsed())),
        })
    }

    pub fn clear(&self) {
        *self.0.borrow_mut() = None;
    }
}

/// A hook's end, for people.
pub type Told = Box<dyn Fn(bool, String)>;

/// Runs the hooks of one event; what becomes of each is told at once. An error names the hook that keeps the machine.
pub async fn run(
    event: &'static str,
    hooks: Vec<Hook>,
    root: PathBuf,
    progress: Progress,
    told: Told,
) -> Result<(), (String, String)> {
    let of = u32::try_from(hooks.len()).unwrap_or(u32::MAX);
    for (number, hook) in (1..).zip(&hooks) {
        let left = hooks.iter().skip(number as usize - 1).map(|hook| Duration::from_secs(hook.deadline)).sum();
        let since = Instant::now();
        *progress.0.borrow_mut() = Some(Now { hook: hook.name.clone(), number, of, since, left });
        let ended = in_time(&hook.name, hook.deadline, call(hook, &root)).await;
        let seconds = since.elapsed().as_secs();
        match (ended, hook.on_timeout) {
            (Ok(()), _) => told(false, format!("{event} hook {} is through after {seconds} s", hook.name)),
            (Err(words), OnTimeout::Go) => {
                told(true, format!("{event} hook {}: {words}; going on without it", hook.name));
            }
            (Err(words), OnTimeout::Stay) => {
                told(true, format!("{event} hook {}: {words}; the machine stays", hook.name));
                progress.clear();
                return Err((hook.name.clone(), words));
            }
        }
    }
    progress.clear();
    Ok(())
}

async fn call(hook: &Hook, root: &std::path::Path) -> Result<(), String> {
    match hook.kind {
        HookKind::Command => run::program(&Gate::new(), root, &hook.target, &hook.arguments).await,
        HookKind::Http => loop {
            match run::http("POST", &hook.target).await? {
                202 => sleep(AGAIN).await,
                200..=299 => return Ok(()),
                status => return Err(format!("{}: status {status}", hook.target)),
            }
        },
    }
}
