//! `kiln-agent stage`: the plan, fetches and checks of PID 1 as a command, stopping before any mount. What it accepts
//! lies in the output directory; its exit status says which class of check refused.

use crate::error::{AgentError, ROOT, Result};
use crate::fetch::Expected;
use crate::flow::Flow;
use crate::init::{Begun, parse_boot_info};
use crate::journal::{JournalState, boot_id, monotonic_ms};
use crate::log;
use crate::memory::Place;
use crate::plan::{self, Plan};
use crate::verifier::Answer;
use kiln_protocol::Stage;
use std::path::{Path, PathBuf};

/// `stage`'s arguments.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A `boot.json`.
    pub settings: PathBuf,
    /// Key and versions seen.
    pub state: PathBuf,
    /// What was accepted.
    pub out: PathBuf,
    /// Tries of each step.
    pub tries: u32,
}

impl Options {
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self { tries: 3, ..Self::default() };
        let usage = |what: String| AgentError::Usage(format!("{what}\n{}", crate::USAGE));
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(|| usage(format!("{name} needs a value")))?;
            match name.as_str() {
                "--settings" => options.settings = value.into(),
                "--state" => options.state = value.into(),
                "--out" => options.out = value.into(),
                "--tries" => {
                    let tries = value.parse().ok().filter(|n| *n > 0);
                    options.tries = tries.ok_or_else(|| usage(format!("--tries {value}: a number from 1")))?;
                }
                other => return Err(usage(format!("unknown option {other}"))),
            }
        }
        for (name, path) in [("--settings", &options.settings), ("--state", &options.state), ("--out", &options.out)] {
            if path.as_os_str().is_empty() {
                return Err(usage(format!("{name} is missing")));
            }
        }
        Ok(options)
    }
}

/// Runs it; `Ok` means that everything the assignment names is verified and in `out`.
pub fn run(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::system("starting the runtime"))?;
    runtime.block_on(stage(options))
}

async fn stage(options: &Options) -> Result<()> {
    let started_ms = monotonic_ms();
    let bytes = std::fs::read(&options.settings).map_err(AgentError::file(&options.settings))?;
    let boot = parse_boot_info(&bytes, &options.settings)?;
    println!("kiln-agent {}: image {} release {}", env!("CARGO_PKG_VERSION"), boot.image, boot.release);
    std::fs::create_dir_all(&options.out).map_err(AgentError::file(&options.out))?;
    let place = Place::Directory(options.state.clone());
    let Begun { place, identity, memory, spoilt, fault } = Begun::of(place, &options.out.join("meanwhile"))?;
    let state = JournalState::begin(boot_id()?, started_ms);
    let below_floor = memory.may_boot(&boot).err();
    let mut flow = Flow::begin(boot, state, place, identity, memory, None)?;
    flow.tries = Some(options.tries);
    if let Some(error) = fault.or(below_floor).or(spoilt) {
        if flow.find_server().await.is_ok() {
            flow.journal.failed(Stage::Start, &error, 1, None);
            flow.give_up(&error).await;
        }
        return Err(error);
    }
    flow.journal.done(Stage::Start);
    flow.find_server().await?;
    flow.ship_log()?;
    let here = flow.verifier.here()?;
    let result = verify(&mut flow, &here, &options.out).await;
    match &result {
        Ok(()) => {
            flow.report().await;
            log::sent().await;
        }
        Err(error) => flow.give_up(error).await,
    }
    result
}

/// Runs a step until it succeeds or is given up.
macro_rules! tried {
    ($flow:expr, $stage:expr, $step:expr) => {{
        let mut attempt = 0;
        loop {
            attempt += 1;
            match $step {
                Ok(value) => break value,
                Err(error) => $flow.after_failure($stage, error, attempt).await?,
            }
        }
    }};
}

async fn verify(flow: &mut Flow, here: &kiln_protocol::ReleaseId, out: &Path) -> Result<()> {
    flow.journal.started(Stage::Metadata);
    let verified = tried!(flow, Stage::Metadata, flow.verifier.verify_metadata(here).await);
    verified.manifest.matches_boot(&flow.verifier.boot)?;
    flow.journal.done(Stage::Metadata);
    flow.journal.started(Stage::Assignment);
    let (assignment, via) = match tried!(flow, Stage::Assignment, flow.ask(&verified, 0).await) {
        Answer::Assigned { assignment, via, .. } => (assignment, via),
        Answer::Wipe(order) => {
            let reason = format!("order {} is to {}: this command wipes nothing", order.id, order.action);
            return Err(AgentError::Unreachable { url: "assignment".into(), reason });
        }
        Answer::Wait(reason) => {
            flow.journal.waiting(Stage::Assignment, &reason);
            return Err(AgentError::Unreachable { url: "assignment".into(), reason });
        }
    };
    let plan = plan::decide(here, &assignment, &flow.verifier.memory, &flow.verifier.currency(&verified))?;
    flow.journal.done(Stage::Assignment);
    match plan {
        Plan::Stay => {
            flow.journal.started(Stage::Root);
            let root = &verified.manifest.root;
            let expected = Expected { what: ROOT, sha256: root.sha256.clone(), length: root.length };
            flow.fetch_to(Stage::Root, expected, &out.join("root")).await?;
            flow.journal.done(Stage::Root);
        }
        Plan::Change(_) => flow.prefetch(&assignment, via, out).await?.keep(),
    }
    Ok(())
}
