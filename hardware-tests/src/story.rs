//! `make lab`: a rack boots, comes up healthy, and reimages itself, told live.

use crate::api::MachineView;
use crate::error::{AtPath, LabError};
use crate::live::{Live, describe};
use crate::machine::{Firmware, MachineSpec};
use crate::net;
use crate::paths::Paths;
use crate::rack::{IDLE, LIMIT, Rack, RackOptions};
use crate::report::{BootFigures, Report, Sizes, rss_kib};
use crate::server::DhcpMode;
use crate::site;
use crate::variables::NetworkBoot;
use std::time::{Duration, Instant, SystemTime};

/// A booting machine takes a core when it is emulated, and small hosts have two.
const BOOTING_AT_ONCE: usize = 2;

/// What to tell.
#[derive(Debug, Clone)]
pub struct StoryOptions {
    /// How many machines, 1 to 3.
    pub machines: u8,
    /// Leave out the reimage.
    pub boot_only: bool,
    /// Where the web page is to be had, if it is.
    pub web: Option<String>,
}

/// One machine's part.
#[derive(Debug)]
struct Part {
    spec: MachineSpec,
    via: &'static str,
    powered_ms: u64,
    since: Instant,
    state: PartState,
    boots: Vec<BootFigures>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum PartState {
    Off,
    Booting,
    Healthy,
    Reimaging,
    Done,
    Failed(String),
}

fn parts(machines: u8) -> Vec<Part> {
    let all = [
        (Firmware::Uefi(NetworkBoot::Pxe), "kexec"),
        (Firmware::Uefi(NetworkBoot::Http), "cold"),
        (Firmware::Bios, "kexec"),
    ];
    (1..)
        .zip(all)
        .take(usize::from(machines))
        .map(|(number, (firmware, via))| Part {
            spec: MachineSpec::new(number, firmware),
            via,
            powered_ms: 0,
            since: Instant::now(),
            state: PartState::Off,
            boots: Vec::new(),
        })
        .collect()
}

/// Tells the story to its table. The rack is returned: it lives until it is dropped.
pub fn tell(paths: &Paths, options: &StoryOptions) -> Result<(Rack, Report), LabError> {
    let mut parts = parts(options.machines);
    let specs: Vec<MachineSpec> = parts.iter().map(|p| p.spec.clone()).collect();
    if paths.site.exists() {
        std::fs::remove_dir_all(&paths.site).at(&paths.site)?;
    }
    site::copy(paths, &paths.site)?;
    let mut rack = Rack::start(
        paths,
        &RackOptions {
            dhcp: DhcpMode::Proxy,
            machines: specs.clone(),
            image: site::IMAGE.to_owned(),
            unknown: Vec::new(),
            site: Some(paths.site.clone()),
            consoles: paths.consoles.clone(),
            config: String::new(),
            boot: String::new(),
        },
    )?;
    let mut live = Live::new(&specs);
    live.say(&format!("boot server on {}, beside the site's own DHCP server {}", net::SERVER, net::SITE_DHCP));
    live.say(&format!("machines run by {}: {}", rack.accelerator.0.name(), rack.accelerator.1));
    if let Some(web) = &options.web {
        live.say(&format!("web page: {web}"));
    }
    live.say(&format!("power on: {} machines boot release 1 of {}", parts.len(), site::IMAGE));
    follow(&mut rack, &mut live, &mut parts, 1, None)?;

    if !options.boot_only && parts.iter().any(|p| p.state == PartState::Healthy) {
        live.say("release 2 is published");
        rack.kiln(&["release", "publish", &format!("{}/2", site::IMAGE)])?;
        let root_hash = site::manifest(&rack.site, 2)?["verity"]["root_hash"].as_str().map(str::to_owned);
        for part in parts.iter_mut().filter(|p| p.state == PartState::Healthy) {
            live.say(&format!("kiln assign {} {}/2 --via {}", part.spec.name, site::IMAGE, part.via));
            match rack.kiln(&["assign", &part.spec.name, &format!("{}/2", site::IMAGE), "--via", part.via]) {
                Ok(_) => (part.state, part.since) = (PartState::Reimaging, Instant::now()),
                Err(error) => part.state = PartState::Failed(error.to_string()),
            }
        }
        follow(&mut rack, &mut live, &mut parts, 2, root_hash.as_deref())?;
    }
    live.finish();
    let end = if options.boot_only { PartState::Healthy } else { PartState::Done };
    let mut failures: Vec<String> = Vec::new();
    for part in &parts {
        match &part.state {
            PartState::Failed(why) => failures.push(format!("{}: {why}", part.spec.name)),
            state if *state == end => {}
            PartState::Off | PartState::Booting | PartState::Healthy | PartState::Reimaging | PartState::Done => {
                failures.push(format!("{}: stopped short", part.spec.name));
            }
        }
    }
    if let Some(overlap) = overlap(&parts) {
        failures.push(overlap);
    }
    let report = Report {
        complete: failures.is_empty(),
        failures,
        accelerator: rack.accelerator.0.name().to_owned(),
        boots: parts.iter().flat_map(|p| p.boots.clone()).collect(),
        server_rss_kib: rack.server().and_then(|s| rss_kib(s.pid())),
        sizes: Sizes::of(&rack.site),
    };
    report.write(&paths.lab.join("report.json"))?;
    Ok((rack, report))
}

/// Runs every part that is not at its end up to *healthy on `release`*.
fn follow(
    rack: &mut Rack,
    live: &mut Live,
    parts: &mut [Part],
    release: u64,
    root_hash: Option<&str>,
) -> Result<(), LabError> {
    let mut progress = Instant::now();
    loop {
        let mut booting = parts.iter().filter(|p| p.state == PartState::Booting).count();
        for part in parts.iter_mut() {
            if part.state == PartState::Off && release == 1 && booting < BOOTING_AT_ONCE {
                rack.machine(&part.spec.name).power_on()?;
                (part.powered_ms, part.since, part.state) = (now_ms(), Instant::now(), PartState::Booting);
                booting += 1;
            }
        }
        let watch = std::sync::Arc::clone(rack.watch());
        for part in parts.iter_mut().filter(|p| matches!(p.state, PartState::Booting | PartState::Reimaging)) {
            let name = part.spec.name.clone();
            let view = rack.view(&name);
            live.show(&name, &describe(view.as_ref()));
            if let Err(died) = rack.machine(&name).check_running() {
                part.state = PartState::Failed(died.to_string());
            } else if let Some(view) = view.filter(|v| v.is_healthy_on(release)) {
                settle(part, &view, release, root_hash);
            } else if part.since.elapsed() > LIMIT {
                part.state = PartState::Failed(format!("not healthy within {} s", LIMIT.as_secs()));
            }
            if let Ok(console) = rack.machine(&name).console() {
                progress = progress.max(console.last_change());
            }
            if let PartState::Failed(why) = &part.state {
                live.show(&name, &format!("FAILED: {why}"));
            }
        }
        if let Some(server) = rack.server() {
            server.check_running()?;
        }
        progress = progress.max(watch.last_change());
        let unfinished = |p: &&mut Part| matches!(p.state, PartState::Off | PartState::Booting | PartState::Reimaging);
        if progress.elapsed() > IDLE {
            for part in parts.iter_mut().filter(unfinished) {
                let place = describe(rack.view(&part.spec.name).as_ref());
                let why = format!("no sign of life for {} s at: {place}", IDLE.as_secs());
                live.show(&part.spec.name, &format!("FAILED: {why}"));
                part.state = PartState::Failed(why);
            }
        }
        if parts.iter_mut().filter(unfinished).count() == 0 || (release > 1 && !parts.iter().any(is_reimaging)) {
            return Ok(());
        }
        watch.wait_change(Duration::from_millis(200));
    }
}

fn is_reimaging(part: &Part) -> bool {
    part.state == PartState::Reimaging
}

/// A part has become healthy: its figures, and whether what runs is what was asked for.
fn settle(part: &mut Part, view: &MachineView, release: u64, root_hash: Option<&str>) {
    let how = if part.state == PartState::Reimaging { part.via } else { "power-on" };
    let (name, firmware) = (&part.spec.name, part.spec.firmware_text());
    part.boots.push(BootFigures::of(view, name, firmware, release, how, part.powered_ms));
    part.state = match (root_hash, view.root_hash.as_deref()) {
        (Some(want), got) if got != Some(want) => {
            PartState::Failed(format!("healthy, but its root hash is {got:?}, not release {release}'s {want}"))
        }
        (_, _) if part.state == PartState::Reimaging => PartState::Done,
        (_, _) => PartState::Healthy,
    };
}

/// Machines must have been away one at a time.
fn overlap(parts: &[Part]) -> Option<String> {
    let reimages = parts.iter().flat_map(|p| &p.boots).filter(|b| b.downtime_s.is_some());
    let mut away: Vec<(u64, u64, &str)> =
        reimages.filter_map(|b| Some((b.from_ms, b.healthy_ms?, b.machine.as_str()))).collect();
    away.sort_unstable();
    away.windows(2).find(|w| w[1].0 < w[0].1).map(|w| {
        format!("{} went while {} was still away: the limit of one unavailable machine was broken", w[1].2, w[0].2)
    })
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
