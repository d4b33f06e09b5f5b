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

/// Comes back once, for [`LOOKS`] looks, the link has had no carrier and another card has one, or another address is given in place
/// of one whose lease is over, and no server is reached. A server that is gone while the link is there is waited for, and so is a
/// link where there is no other. An address that may be another machine's by now, and is renewed no more, is left at the second look
/// although the server is reached.
async fn lost(link: &str, renewals: &mut JoinSet<()>, api: &mut Api, look: Duration) {
    let (mut over, mut looked, mut without) = (false, false, 0);
    loop {
        tokio::select! {
            Some(_) = renewals.join_next() => (over, without) = (true, LOOKS),
            () = sleep(look) => without = if over || net::others_lead(link) { without + 1 } else { 0 },
        }
        if without >= LOOKS {
            if std::mem::replace(&mut looked, over) || api.reaches().await.is_err() {
                return;
            }
            without = 0;
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
mod tests {
    use super::*;
    use crate::testing::director::Director;
    use crate::testing::namespace::enter;
    use crate::testing::{TestSite, flow, listen, web};
    use crate::verifier::Answer;
    use kiln_protocol::{StageState, Via};
    use kiln_release::network::NetworkConfig;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::process::Command;

    /// By which this machine's one card has `address`, and the server is at `host` of it.
    fn config(version: u64, address: &str, host: &str, (http, agent): (u16, u16)) -> NetworkConfig {
        let section: Value = json!({ "link": [
            { "name": "up", "kind": "card", "card": ["any"], "address": [address] } ],
            "http_urls": [format!("http://{host}:{http}")], "agent_urls": [format!("https://{host}:{agent}")] });
        let mut config = NetworkConfig { version, section: vec![serde_json::from_value(section).unwrap()] };
        if version > 1 {
            config.section[0].role = vec!["lab".into()];
        }
        config.check().unwrap();
        config
    }

    /// What a boot came to: what is known, the addresses that are used, and which failures the server heard of.
    struct Boot {
        known: Known,
        addresses: Vec<String>,
        told: Vec<String>,
    }

    /// A boot up to the network that its metadata says. The boot image knows one of its own, by which the server is
    /// reached too.
    fn boot(state: &Path, signed: (u64, &str, &str)) -> Boot {
        let (http, agent) = (listen(), listen());
        let ports = (http.1.port(), agent.1.port());
        let (version, address, host) = signed;
        let site = TestSite::with_network(1, config(version, address, host, ports));
        let director = Director::start_on(agent, &site, (1, 1, Via::Cold, false));
        let (_url, _hear) = web::honest_on(http, site.files.clone(), BTreeMap::new());
        let mut verifier = site.verifier(1, &[], &[], state);
        verifier.boot.site.network = Some(config(1, "10.9.0.6/24", "10.9.0.6", ports));
        let mut flow = flow(verifier, None, Duration::from_secs(9));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut network = Network::start(&mut flow);
            network.trial = Duration::from_secs(8);
            network.connect(&mut flow, &mut None).await.unwrap();
            let here = flow.verifier.here().unwrap();
            let verified = flow.verifier.verify_metadata(&here).await.unwrap();
            let Answer::Assigned { assignment, .. } = flow.ask(&verified, 0).await.unwrap() else { panic!("it waits") };
            network.adopt(&mut flow, &mut None, &verified, &assignment.role).await.unwrap();
            let uplink = network.uplink().unwrap();
            let heard = director.heard();
            let failures = heard.iter().flat_map(|report| &report.stages).filter_map(|stage| match &stage.state {
                StageState::Failed(f) if f.kind == "network-config-reverted" => Some(f.message.clone()),
                StageState::Failed(_) | StageState::Started | StageState::Done | StageState::Waiting { .. } => None,
            });
            let addresses = uplink.addresses.iter().map(ToString::to_string).collect();
            Boot { known: network.known, addresses, told: failures.collect() }
        })
    }

    #[test]
    fn an_address_whose_lease_is_over_is_left_though_the_server_is_reached_by_it() {
        let site = TestSite::new(1);
        let director = Director::start(&site, (1, 1, Via::Cold, false));
        let dir = tempfile::tempdir().unwrap();
        let verifier = site.verifier(1, &[], std::slice::from_ref(&director.url), &dir.path().join("state"));
        let (servers, ca) = (&verifier.servers.agent, &verifier.boot.site.agent_api_ca_pem);
        let mut api = Api::new(servers, ca, &verifier.key, &verifier.clock).unwrap();
        let look = Duration::from_millis(10);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            api.reaches().await.unwrap();
            let begun = Instant::now();
            let mut renewals = JoinSet::new();
            // Another address was given.
            renewals.spawn(async {});
            let left = lost("none", &mut renewals, &mut api, look);
            timeout_at(begun + Duration::from_secs(20), left).await.expect("it is left");
            assert!(begun.elapsed() >= look * LOOKS, "not at the first look");
        });
    }

    /// Machine and server are in one namespace: the server is at an address that the machine's card has only under the
    /// configuration that gives it. IPv4, then IPv6, then a mistake.
    #[test]
    fn a_configuration_that_loses_the_server_is_left_and_told_and_not_tried_again() {
        let test = "uplink::tests::a_configuration_that_loses_the_server_is_left_and_told_and_not_tried_again";
        if !enter(test, "-rnm") {
            return;
        }
        let script = "mount -t tmpfs tmpfs /run; ip netns add net; ip link set lo up
            ip link add a0 type veth peer name b0; ip link set b0 netns net; ip -n net link set b0 up";
        assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success());
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let versions =
            |known: &Known| (known.worked.as_ref().map(|w| w.version), known.refused.as_ref().map(|r| r.version));
        let one = boot(&state, (2, "10.9.0.7/24", "10.9.0.7"));
        assert_eq!((one.addresses, versions(&one.known)), (vec!["10.9.0.7".to_owned()], (Some(2), None)));
        // Artifacts and the agent API at IPv6 literals, and no IPv4 at all.
        let two = boot(&state, (3, "2001:db8::7/64", "[2001:db8::7]"));
        assert_eq!((two.addresses, versions(&two.known)), (vec!["2001:db8::7".to_owned()], (Some(3), None)));
        assert!(one.told.is_empty() && two.told.is_empty());
        // The server is not where this one says.
        let wrong = boot(&state, (4, "10.9.0.7/24", "10.9.0.98"));
        assert_eq!(versions(&wrong.known), (Some(3), Some(4)), "{:?}", wrong.told);
        assert!(wrong.told[0].contains("network configuration 4 was left"), "{:?}", wrong.told);
        assert!(wrong.addresses != ["10.9.0.7"]);
        // The next boot does not try it again, and says so; a newer one is tried.
        let again = boot(&state, (4, "10.9.0.7/24", "10.9.0.98"));
        assert_eq!((&again.known, again.told.len()), (&wrong.known, 1));
        let better = boot(&state, (5, "10.9.0.8/24", "10.9.0.8"));
        assert_eq!((better.addresses, versions(&better.known)), (vec!["10.9.0.8".to_owned()], (Some(5), None)));
    }
}
