//! Whom a command asks which releases machines need, before it takes one away.

use super::At;
use super::client::Client;
use super::error::CliError;
use super::output::segment;
use crate::http::releases::Numbers;
use crate::view::MachineView;
use clap::Args;
use kiln_images::{SiteDir, SiteError, TakenAway};
use kiln_protocol::ImageName;
use std::collections::{BTreeMap, BTreeSet};
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
    /// A file with the token to show there, as taking releases out needs it; KILN_TOKEN may hold the token itself
    #[arg(long, env = "KILN_TOKEN_FILE")]
    pub(super) token_file: Option<PathBuf>,
    /// The CA of its certificate, PEM [default: this host's CAs]
    #[arg(long, env = "KILN_CA")]
    pub(super) ca: Option<PathBuf>,
    /// Ask nobody: a machine that needs a release below the floor cannot boot again
    #[arg(long)]
    pub(super) without_server: bool,
}

/// That nothing is taken away which a machine needs now. Where nobody was to be asked, the site's lock comes with it, to be held
/// to the end: a server that starts meanwhile would not have been asked. Releases that are to go are given to nobody from then on.
pub(super) fn nobody_needs(
    site: &SiteDir,
    ask: &Ask,
    away: &TakenAway,
    runtime: &Runtime,
) -> Result<Option<File>, CliError> {
    let (at, alone) = whom(ask)?;
    let Some(at) = at else { return Ok(alone) };
    if !away.floors.is_empty() {
        runtime.block_on(nobody_below(site, &at, &away.floors))?;
    }
    let mut needed = Vec::new();
    for (image, releases) in &away.releases {
        let name: ImageName = image.parse().map_err(|_| SiteError::NoSuchImage { image: image.clone() })?;
        let going: Vec<u64> = releases.iter().copied().collect();
        let stay = runtime.block_on(withhold(&at, site, &name, &going))?;
        needed.extend(stay.into_iter().map(|release| format!("{image}/{release}")));
    }
    if needed.is_empty() { Ok(alone) } else { Err(CliError::StillNeeded(needed)) }
}

/// Which of those that are to go machines need. The server gives the others to nobody from then on.
pub(super) async fn withhold(
    at: &At,
    site: &SiteDir,
    image: &ImageName,
    going: &[u64],
) -> Result<BTreeSet<u64>, CliError> {
    let client = Client::new(at)?;
    client.is_of(site, at).await?;
    if going.is_empty() {
        return Ok(BTreeSet::new());
    }
    let path = format!("releases/{}/withhold", segment(image.as_str()));
    let numbers = Numbers { releases: going.iter().copied().collect() };
    let Numbers { releases } = client.change(reqwest::Method::POST, &path, &numbers).await?;
    Ok(releases)
}

/// That nothing stands against these floors: no machine runs, shall run, would fall back or come to a release below one.
/// Campaigns, which do not exist yet, need to be asked here alone: while one is open the floor does not move.
async fn nobody_below(site: &SiteDir, at: &At, floors: &BTreeMap<String, u64>) -> Result<(), CliError> {
    let client = Client::new(at)?;
    client.is_of(site, at).await?;
    let machines: Vec<MachineView> = client.get("machines").await?;
    let needed = below(&machines, floors);
    if needed.is_empty() { Ok(()) } else { Err(CliError::BelowFloor(needed)) }
}

/// What stands against the floors, a sentence for each machine. One that is retired runs nothing again.
fn below(machines: &[MachineView], floors: &BTreeMap<String, u64>) -> Vec<String> {
    let below = |image: &str, release: u64| floors.get(image).is_some_and(|floor| release < *floor);
    let mut needed = Vec::new();
    for machine in machines.iter().filter(|machine| machine.state != "retired") {
        let good = machine.last_good.as_ref().filter(|good| below(good.image.as_str(), good.release));
        let shall = machine.assigned.as_ref().filter(|assigned| below(&assigned.image, assigned.release));
        let runs = machine.image.as_deref().zip(machine.release).filter(|(image, release)| below(image, *release));
        let comes = machine.needs.iter().find(|other| below(other.image.as_str(), other.release));
        let why = match (good, shall, runs, comes) {
            (Some(good), _, _, _) => format!("{}'s last-known-good is {good}", machine.name),
            (None, Some(shall), _, _) => format!("{} shall run {}/{}", machine.name, shall.image, shall.release),
            (None, None, Some((image, release)), _) => format!("{} runs {image}/{release}", machine.name),
            (None, None, None, Some(other)) => {
                format!("{} comes to {other} by an open order or a passed acceptance run", machine.name)
            }
            (None, None, None, None) => continue,
        };
        needed.push(why);
    }
    needed
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

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_fleet::{Assigned, Machine, StateKind};
    use kiln_protocol::{ReleaseId, Via};

    fn release(text: &str) -> ReleaseId {
        text.parse().unwrap()
    }

    fn machine(change: impl FnOnce(&mut Machine)) -> MachineView {
        let id = "00000000-0000-0000-0000-000000000001".parse().unwrap();
        let mut machine = Machine { name: Some("rack-1".into()), ..Machine::discovered(id, 1) };
        machine.state.kind = StateKind::Healthy;
        let (acceptance, via) = (release("acceptance/1"), Via::Cold);
        machine.assigned =
            Some(Assigned { release: acceptance, sequence: 2, via, auto: false, order: None, rebuild: 0 });
        change(&mut machine);
        MachineView::of(&machine)
    }

    fn against(view: MachineView) -> Vec<String> {
        below(&[view], &BTreeMap::from([("minimal".to_owned(), 3)]))
    }

    #[test]
    fn every_way_to_a_release_below_the_floor_stands_against_it() {
        assert_eq!(against(machine(|_| {})), Vec::<String>::new(), "another image has another floor");
        let good = |text: &'static str| machine(move |m| m.good = vec![release(text)]);
        assert_eq!(against(good("minimal/2")), ["rack-1's last-known-good is minimal/2"]);
        assert_eq!(against(good("minimal/3")), Vec::<String>::new());
        // A good one that is quarantined is none to come back to; the one before it is.
        let refused = machine(|m| {
            m.good = vec![release("minimal/2"), release("minimal/3")];
            m.refused = vec![kiln_fleet::Refused { release: release("minimal/3"), reason: "it failed".into() }];
        });
        assert_eq!(against(refused), ["rack-1's last-known-good is minimal/2"]);
        let shall = machine(|m| m.assigned.as_mut().unwrap().release = release("minimal/1"));
        assert_eq!(against(shall), ["rack-1 shall run minimal/1"]);
        let home = |m: &mut Machine| m.home = Some(release("minimal/2"));
        let said = "rack-1 comes to minimal/2 by an open order or a passed acceptance run";
        assert_eq!(against(machine(home)), [said]);
        let retired = machine(|m| {
            home(m);
            m.state.kind = StateKind::Retired;
        });
        assert_eq!(against(retired), Vec::<String>::new());
    }
}
