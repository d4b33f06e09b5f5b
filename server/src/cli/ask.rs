//! Whom a command asks which releases machines need, before it takes one away.

use super::At;
use super::client::Client;
use super::error::CliError;
use crate::view::MachineView;
use clap::Args;
use kiln_images::{SiteDir, SiteError};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use tokio::runtime::Runtime;

/// Whom to ask which releases machines need.
#[derive(Debug, Args)]
pub(super) struct Ask {
    /// The site directory, with offline/
    #[arg(long, env = "KILN_SITE")]
    pub(super) site: PathBuf,
    /// Ask this boot server which releases machines need, as http://10.0.0.1:8080 [default: the one that runs on the
    /// site]
    #[arg(long, conflicts_with = "without_server")]
    pub(super) server: Option<String>,
    /// A file with the token to show there, as `kiln release prune` needs it; KILN_TOKEN may hold the token itself
    #[arg(long, env = "KILN_TOKEN_FILE")]
    pub(super) token_file: Option<PathBuf>,
    /// The CA of its certificate, PEM [default: this host's CAs]
    #[arg(long, env = "KILN_CA")]
    pub(super) ca: Option<PathBuf>,
    /// Ask nobody: a machine that needs a release below the floor cannot boot again
    #[arg(long)]
    pub(super) without_server: bool,
}

/// That no machine runs, shall run or would fall back to a release below these floors. Where nobody was to be asked, the
/// site's lock comes with it, to be held to the end: a server that starts meanwhile would not have been asked.
pub(super) fn nobody_below(
    site: &SiteDir,
    ask: &Ask,
    floors: &BTreeMap<String, u64>,
    runtime: &Runtime,
) -> Result<Option<File>, CliError> {
    let (at, alone) = whom(ask)?;
    let Some(at) = at else { return Ok(alone) };
    let machines: Vec<MachineView> = runtime.block_on(async {
        let client = Client::new(&at)?;
        client.is_of(site, &at).await?;
        client.get("machines").await
    })?;
    let below = |image: &str, release: u64| floors.get(image).is_some_and(|floor| release < *floor);
    let mut needed = Vec::new();
    for machine in machines.iter().filter(|machine| machine.state != "retired") {
        let good = machine.last_good.as_ref().filter(|good| below(good.image.as_str(), good.release));
        let shall = machine.assigned.as_ref().filter(|assigned| below(&assigned.image, assigned.release));
        let runs = machine.image.as_deref().zip(machine.release).filter(|(image, release)| below(image, *release));
        let why = match (good, shall, runs) {
            (Some(good), _, _) => format!("{}'s last-known-good is {good}", machine.name),
            (None, Some(shall), _) => format!("{} shall run {}/{}", machine.name, shall.image, shall.release),
            (None, None, Some((image, release))) => format!("{} runs {image}/{release}", machine.name),
            (None, None, None) => continue,
        };
        needed.push(why);
    }
    if needed.is_empty() { Ok(alone) } else { Err(CliError::BelowFloor(needed)) }
}

/// Whom to ask: the server that runs on the site, the one that was named, or, with the site to oneself, nobody.
pub(super) fn whom(ask: &Ask) -> Result<(Option<At>, Option<File>), CliError> {
    let Ask { site: dir, server, token_file, ca, without_server } = ask;
    match (server, SiteDir::open(dir)?.lock_state()) {
        (Some(server), _) => {
            let at = At { site: None, server: Some(server.clone()), token_file: token_file.clone(), ca: ca.clone() };
            Ok((Some(at), None))
        }
        (None, Err(SiteError::Served { .. })) => Ok((Some(At::site(dir.clone())), None)),
        (None, Ok(alone)) if *without_server => Ok((None, Some(alone))),
        (None, Ok(_)) => Err(CliError::NobodyToAsk(dir.clone())),
        (None, Err(error)) => Err(error.into()),
    }
}
