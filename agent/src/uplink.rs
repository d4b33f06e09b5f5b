//! The way to the boot server: every way to be connected is tried until one reaches it, and a newly signed network
//! configuration is tried and, if it does not, left again. What is decided here is [`trial`]'s; here it is done.

use crate::api::Api;
use crate::coldplug::Drivers;
use crate::console;
use crate::error::{AgentError, Result};
use crate::facts;
use crate::flow::Flow;
use crate::net::trial::{Action, Choice, Event, Known, Refused};
use crate::net::{self, Ground, Uplink};
use crate::verifier::{Servers, Verified};
use kiln_protocol::{MachineId, Stage};
use kiln_release::BootInfo;
use kiln_release::network::{LinkKind, Section};
use std::collections::HashSet;
use std::convert::Infallible;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

/// A new configuration has so long to reach the server: a switch that learns the link, LACP and DHCP are in it.
const TRIAL: Duration = Duration::from_secs(90);
/// Between two tries within a trial.
const AGAIN: Duration = Duration::from_secs(2);
/// Between two looks of a running system for its server.
pub const LOOK: Duration = Duration::from_secs(30);
/// A link that had no carrier at so many looks is not one whose switch just restarts: what others have put on a bond or VLAN goes
/// with it.
const LOOKS: u32 = 20;
/// So long it stays with the way that has an address after a first round that did not find the server; twice as long after each
/// further one, and at most [`LAST_HOLD`].
const FIRST_HOLD: Duration = Duration::from_secs(120);
const LAST_HOLD: Duration = Duration::from_secs(24 * 3600);

/// How this boot is connected.
pub struct Network {
    known: Known,
    /// Cards that had an address and no way to the server.
    avoid: HashSet<String>,
    uplink: Option<Uplink>,
    trial: Duration,
}

impl Network {
    /// What earlier boots learnt. A configuration that was left is told to the server until another works.
    pub fn start(flow: &mut Flow) -> Self {
        let known = flow.verifier.place.network();
        let mut network = Self { known, avoid: HashSet::new(), uplink: None, trial: TRIAL };
        network.step(flow, Event::Started);
        network
    }

    /// What the machine is connected by now.
    pub fn uplink(&mut self) -> Option<Uplink> {
        self.uplink.take()
    }

    /// What a DHCP server calls this machine.
    pub fn hostname(&self) -> Option<&str> {
        self.uplink.as_ref()?.hostname.as_deref()
    }

    /// Decides, remembers, and tells; gives back what is to be done with the links. What cannot be remembered is not
    /// begun: a cut would not find its way back.
    fn step(&mut self, flow: &mut Flow, event: Event) -> Option<Action> {
        let (known, actions) = self.known.clone().event(event);
        if actions.contains(&Action::Remember)
            && let Err(error) = flow.verifier.place.remember_network(&known)
        {
            println!("kiln-agent: the network configuration cannot be remembered, so it stays as it is: {error}");
            return None;
        }
        self.known = known;
        let mut left = None;
        for action in actions {
            match action {
                Action::Remember => {}
                Action::Tell(Refused { version, reason }) => {
                    let error = AgentError::NetworkReverted { version, reason };
                    flow.journal.failed(Stage::Network, &error, 1, Some(Duration::ZERO));
                }
                action @ (Action::Try(_) | Action::Return) => left = Some(action),
            }
        }
        left
    }

    /// Tries every way until the server answers.
    pub async fn connect(&mut self, flow: &mut Flow, drivers: &mut Option<Drivers>) -> Result<()> {
        let machine = &flow.journal.machine;
        let embedded = flow.verifier.boot.site.network.as_ref();
        let embedded = embedded.map(|config| Choice::of(config, None, machine.id.as_str(), &machine.macs));
        let ways = self.known.ways(embedded);
        let mut attempt = 0;
        loop {
            let way = ways[attempt % ways.len()].clone();
            attempt += 1;
            // Pauses grow with the rounds, not with the ways of a round.
            let tries = u32::try_from(attempt.div_ceil(ways.len())).unwrap_or(u32::MAX);
            flow.journal.started(Stage::Network);
            if let Err(error) = self.up(flow, drivers, &way).await {
                flow.after_failure(Stage::Network, error, tries).await?;
                // A slow bus may have shown its devices by now.
                drivers.iter_mut().for_each(Drivers::coldplug);
                continue;
            }
            flow.journal.done(Stage::Network);
            flow.journal.started(Stage::Server);
            match flow.try_servers().await {
                Ok(()) => {
                    flow.journal.done(Stage::Server);
                    self.step(flow, Event::Held(way));
                    return Ok(());
                }
                Err(error) => {
                    self.avoid.extend(self.uplink.iter().map(|uplink| uplink.interface.clone()));
                    flow.after_failure(Stage::Server, error, tries).await?;
                }
            }
        }
    }

    /// Links and addresses of one way, and where the server is by it.
    async fn up(&mut self, flow: &mut Flow, drivers: &mut Option<Drivers>, way: &Choice) -> Result<()> {
        self.uplink = None;
        if let Some(drivers) = drivers {
            for link in &way.section.link {
                match link.kind {
                    LinkKind::Card => {}
                    LinkKind::Vlan => drivers.load("8021q"),
                    LinkKind::ActiveBackup | LinkKind::Lacp => drivers.load("bonding"),
                }
            }
        }
        let (site, section) = (&flow.verifier.boot.site, &way.section);
        let need_location = (site.http_urls.is_empty() && section.http_urls.is_empty())
            || (site.agent_urls.is_empty() && section.agent_urls.is_empty());
        let machine = &flow.journal.machine.id;
        let uplink = net::bring_up(Ground::Initramfs, machine, need_location, section, &mut self.avoid).await?;
        flow.journal.machine.macs = facts::mac_addresses();
        flow.verifier.servers = servers(&flow.verifier.boot, section, &uplink);
        let how = if way.version == 0 { String::new() } else { format!(" (network configuration {})", way.version) };
        let urls = &flow.verifier.servers.agent;
        console::address(&uplink.describe());
        println!("kiln-agent: {} has {:?}{how}; boot server {urls:?}", uplink.interface, uplink.addresses);
        self.uplink = Some(uplink);
        Ok(())
    }

    /// What verified metadata says of the network, for a machine of this role: a newer configuration is tried, and left
    /// again if the server is not reached by it.
    pub async fn adopt(
        &mut self,
        flow: &mut Flow,
        drivers: &mut Option<Drivers>,
        verified: &Verified,
        role: &str,
    ) -> Result<()> {
        let Some(config) = &verified.site.network else { return Ok(()) };
        let machine = &flow.journal.machine;
        let choice = Choice::of(config, Some(role), machine.id.as_str(), &machine.macs);
        let Some(Action::Try(choice)) = self.step(flow, Event::Signed(choice)) else { return Ok(()) };
        println!("kiln-agent: network configuration {} is tried for {} s", choice.version, self.trial.as_secs());
        flow.journal.started(Stage::Network);
        let mut reason = "the server was not reached".to_owned();
        let until = Instant::now() + self.trial;
        let reached = timeout_at(until, async {
            loop {
                match self.reach(flow, drivers, &choice).await {
                    Ok(()) => break,
                    Err(error) => reason = format!("{error} ({})", error.kind()),
                }
                sleep(AGAIN).await;
            }
        });
        if reached.await.is_ok() {
            flow.journal.done(Stage::Network);
            self.step(flow, Event::Held(choice));
        } else {
            println!("kiln-agent: network configuration {} does not reach the server: {reason}", choice.version);
            self.avoid.clear();
            self.step(flow, Event::Lost(reason));
            Box::pin(self.connect(flow, drivers)).await?;
        }
        flow.report().await;
        Ok(())
    }

    /// Both of the server's faces: the agent API, and the repository.
    async fn reach(&mut self, flow: &mut Flow, drivers: &mut Option<Drivers>, choice: &Choice) -> Result<()> {
        self.up(flow, drivers, choice).await?;
        flow.try_servers().await?;
        let here = flow.verifier.here()?;
        flow.verifier.verify_metadata(&here).await.map(drop)
    }
}

/// Where the boot server is: as the section says, as the boot image says, else as the network says.
pub fn servers(boot: &BootInfo, section: &Section, uplink: &Uplink) -> Servers {
    let signed = |section: &[String], site: &[String]| [section, site].concat();
    let mut servers = Servers {
        http: signed(&section.http_urls, &boot.site.http_urls),
        agent: signed(&section.agent_urls, &boot.site.agent_urls),
    };
    let named = uplink.next_server.map(|ip| ip.to_string()).or(uplink.domain.as_ref().map(|d| format!("kiln.{d}")));
    for (urls, said, scheme, port) in
        [(&mut servers.http, &uplink.http_url, "http", 8080), (&mut servers.agent, &uplink.agent_url, "https", 8443)]
    {
        if urls.is_empty() {
            let guess = named.as_ref().map(|host| format!("{scheme}://{host}:{port}"));
            urls.extend(said.clone().or(guess));
        }
    }
    servers
}

/// A link, and the renewals of what is leased.
type Kept = (String, JoinSet<()>);

/// Keeps a running system connected, for as long as it runs: what is leased is renewed; where the boot was not connected, or its
/// link leads to the server no more, every way is tried.
pub async fn stay(
    mut uplink: Option<Uplink>,
    known: fn() -> Known,
    boot: BootInfo,
    machine: MachineId,
    mut api: Api,
    look: Duration,
) -> Infallible {
    loop {
        let (link, mut renewals) = match uplink.take() {
            Some(uplink) => (uplink.interface.clone(), uplink.keep(&machine)),
            None => connect_later(known(), &boot, &machine, &mut api).await,
        };
        lost(&link, &mut renewals, &mut api, look).await;
        eprintln!("kiln-agent: {link} does not lead to the boot server any more: every way to it is tried");
    }
}

/// Comes back once, for [`LOOKS`] looks, the link has had no carrier and another card has one, or it is a card that was put back
/// under its name, or another address is given in place of one whose lease is over, and no server is reached. A server that is gone
/// while the link is there is waited for, and so is a link where there is no other. An address that may be another machine's by now,
/// and is renewed no more, is left at the second look although the server is reached.
async fn lost(link: &str, renewals: &mut JoinSet<()>, api: &mut Api, look: Duration) {
    let (mut over, mut looked, mut without) = (false, false, 0);
    let mut number = net::number_of(link);
    loop {
        tokio::select! {
            Some(_) = renewals.join_next() => (over, without) = (true, LOOKS),
            () = sleep(look) => {
                let is_another = net::number_of(link).is_some_and(|now| number != Some(now));
                without = if over || is_another || net::others_lead(link) { without + 1 } else { 0 };
            }
        }
        if without >= LOOKS {
            if std::mem::replace(&mut looked, over) || api.reaches().await.is_err() {
                return;
            }
            // Somebody else may have seen to what was put back.
            (number, without) = (net::number_of(link), 0);
        }
    }
}

/// Connects a running system: the ways of the boot, without trials, until the server answers by one. Where no way leads to it,
/// the first that gives an address stays: the image's programs live on it, and every further round takes it from them for a while.
pub async fn connect_later(known: Known, boot: &BootInfo, machine: &MachineId, api: &mut Api) -> Kept {
    let macs = facts::mac_addresses();
    let embedded = boot.site.network.as_ref().map(|config| Choice::of(config, None, machine.as_str(), &macs));
    let ways = known.ways(embedded);
    let mut so_long = FIRST_HOLD;
    loop {
        match round(&ways, machine, api).await {
            Ok(uplink) => return keep(&uplink, machine),
            Err(Some(way)) => {
                if let Some(kept) = hold(way, machine, api, (LOOK, so_long)).await {
                    return kept;
                }
                so_long = (so_long * 2).min(LAST_HOLD);
            }
            Err(None) => sleep(LOOK).await,
        }
    }
}

/// Every way once, and every card of one that names none, until the server answers; else the first that gave an address.
async fn round<'a>(
    ways: &'a [Choice],
    machine: &MachineId,
    api: &mut Api,
) -> std::result::Result<Uplink, Option<&'a Choice>> {
    let mut first = None;
    for way in ways {
        let mut tried = HashSet::new();
        loop {
            let mut avoid = tried.clone();
            let uplink = match net::bring_up(Ground::System, machine, false, &way.section, &mut avoid).await {
                Ok(uplink) => uplink,
                Err(error) => {
                    eprintln!("kiln-agent: {error}");
                    break;
                }
            };
            // No other card is given an address.
            if !tried.insert(uplink.interface.clone()) {
                break;
            }
            match api.reaches().await {
                Ok(()) => return Ok(uplink),
                Err(error) => eprintln!("kiln-agent: not by {}: {error}", uplink.interface),
            }
            first = first.or(Some(way));
            if !way.section.link.is_empty() {
                break;
            }
        }
    }
    Err(first)
}

/// Is connected in this way for so long, and looks for the server now and then; ends with the renewals once it answers.
pub async fn hold(
    way: &Choice,
    machine: &MachineId,
    api: &mut Api,
    (look, so_long): (Duration, Duration),
) -> Option<Kept> {
    let until = Instant::now() + so_long;
    let uplink = match net::bring_up(Ground::System, machine, false, &way.section, &mut HashSet::new()).await {
        Ok(uplink) => uplink,
        Err(error) => {
            eprintln!("kiln-agent: {error}");
            sleep(look).await;
            return None;
        }
    };
    let kept = keep(&uplink, machine);
    while api.reaches().await.is_err() {
        if Instant::now() >= until {
            return None;
        }
        sleep(look).await;
    }
    Some(kept)
}

fn keep(uplink: &Uplink, machine: &MachineId) -> Kept {
    console::address(&uplink.describe());
    eprintln!("kiln-agent: {} has {:?}", uplink.interface, uplink.addresses);
    (uplink.interface.clone(), uplink.keep(machine))
}

#[cfg(test)]
mod tests;
