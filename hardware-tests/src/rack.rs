//! A rack: network, boot server, machines, and what can be waited for.

use crate::accel::Accelerator;
use crate::api::{self, MachineView, Watch};
use crate::error::{AtPath, LabError};
use crate::machine::{Machine, MachineSpec};
use crate::net::{self, SiteDhcp};
use crate::paths::Paths;
use crate::server::{self, DhcpMode, Server};
use crate::site;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A machine that neither prints nor reports for so long is stuck. Firmware's own time-outs are the longest silences.
pub const IDLE: Duration = Duration::from_secs(150);
/// However busy it is: no boot takes so long, even emulated on a loaded host.
pub const LIMIT: Duration = Duration::from_secs(900);

/// What kind of rack.
#[derive(Debug, Clone)]
pub struct RackOptions {
    /// Who gives out addresses.
    pub dhcp: DhcpMode,
    /// The machines.
    pub machines: Vec<MachineSpec>,
    /// The image that machines run.
    pub image: String,
    /// Leave these out of the pre-loaded list.
    pub unknown: Vec<String>,
    /// The site to serve; none: a copy of the template in the rack's scratch memory.
    pub site: Option<PathBuf>,
    /// Where serial consoles are kept.
    pub consoles: PathBuf,
    /// More lines for kiln.toml.
    pub config: String,
    /// More lines for its `[boot]`.
    pub boot: String,
}

/// A running rack. Dropping it cuts all power.
#[derive(Debug)]
pub struct Rack {
    paths: Paths,
    /// The site directory it serves.
    pub site: PathBuf,
    /// Its machines.
    pub machines: Vec<Machine>,
    config: PathBuf,
    server_log: PathBuf,
    server: Option<Server>,
    watch: Arc<Watch>,
    _dhcp: Option<SiteDhcp>,
    /// How guests run, and why so.
    pub accelerator: (Accelerator, String),
}

impl RackOptions {
    /// One machine beside the site's own DHCP server, on a copy of the template, for a test.
    pub fn scenario(paths: &Paths, name: &str, machine: MachineSpec) -> Self {
        Self {
            dhcp: DhcpMode::Proxy,
            machines: vec![machine],
            image: site::IMAGE.to_owned(),
            unknown: Vec::new(),
            site: None,
            consoles: paths.consoles.join(name),
            config: String::new(),
            boot: String::new(),
        }
    }
}

impl Rack {
    /// Builds the rack and starts its boot server; machines stay off. Only inside the lab's namespaces.
    pub fn start(paths: &Paths, options: &RackOptions) -> Result<Self, LabError> {
        if !crate::enclosure::is_inside() {
            return Err(LabError::NotEnclosed);
        }
        std::fs::create_dir_all(&options.consoles).at(&options.consoles)?;
        let site = if let Some(site) = &options.site {
            site.clone()
        } else {
            let site = paths.scratch.join("site");
            site::copy(paths, &site)?;
            site
        };
        let kernel = site.join(format!("build/{}/1/kernel", site::IMAGE));
        let accelerator = Accelerator::probe(&kernel, &paths.lab.join("kvm"))?;
        net::make_bridge()?;
        let dhcp = match options.dhcp {
            DhcpMode::Proxy => Some(SiteDhcp::start(&paths.program, &options.consoles.join("site-dhcp.log"), &[])?),
            DhcpMode::Full | DhcpMode::Off => None,
        };
        let known: Vec<&MachineSpec> = options.machines.iter().filter(|m| !options.unknown.contains(&m.name)).collect();
        let config = paths.scratch.join("kiln.toml");
        let text = server::config(options.dhcp, &options.image, &known, &options.boot, &options.config);
        std::fs::write(&config, text).at(&config)?;
        let machines = options
            .machines
            .iter()
            .map(|spec| Machine::install(spec.clone(), accelerator.0, &paths.scratch, &options.consoles))
            .collect::<Result<Vec<_>, _>>()?;
        let server_log = options.consoles.join("kiln-serve.log");
        let server = Server::start(&paths.kiln, &site, &config, &server_log, false)?;
        let watch = Watch::start(server.socket());
        Ok(Self {
            paths: paths.clone(),
            site,
            machines,
            config,
            server_log,
            server: Some(server),
            watch,
            _dhcp: dhcp,
            accelerator,
        })
    }

    /// A machine by name.
    pub fn machine(&mut self, name: &str) -> &mut Machine {
        self.machines.iter_mut().find(|m| m.spec.name == name).expect("the scenario put it into the rack")
    }

    /// The boot server.
    pub fn server(&mut self) -> Option<&mut Server> {
        self.server.as_mut()
    }

    /// Kills the boot server as a power cut would.
    pub fn kill_server(&mut self) {
        if let Some(server) = self.server.take() {
            server.kill();
        }
    }

    /// Stops the boot server as an operator would; whether it ended well.
    pub fn stop_server(&mut self) -> Result<bool, LabError> {
        self.server.take().map_or(Ok(true), Server::stop)
    }

    /// Starts the boot server again on the same state.
    pub fn start_server(&mut self) -> Result<(), LabError> {
        self.server = Some(Server::start(&self.paths.kiln, &self.site, &self.config, &self.server_log, true)?);
        Ok(())
    }

    /// Runs an operator command on this site.
    pub fn kiln(&self, args: &[&str]) -> Result<String, LabError> {
        let site = self.site.display().to_string();
        let args: Vec<&str> = args.iter().copied().chain(["--site", &site]).collect();
        site::kiln_quiet(&self.paths, &args)
    }

    /// Asks the operator API.
    pub fn get(&self, path: &str) -> Result<serde_json::Value, LabError> {
        api::get(&self.site.join("state/kiln.sock"), path)
    }

    /// What the boot server knows of a machine now.
    pub fn view(&self, name: &str) -> Option<MachineView> {
        let id = self.machines.iter().find(|m| m.spec.name == name)?.spec.uuid();
        self.watch.machine(&id)
    }

    /// The changes as they come.
    pub fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    /// Waits until what the server knows of a machine satisfies `until`. Text on the machine's console and every
    /// report of it reset the deadline [`IDLE`]; [`LIMIT`] holds whatever happens.
    pub fn wait(
        &mut self,
        name: &str,
        what: &str,
        until: impl Fn(&MachineView) -> bool,
    ) -> Result<MachineView, LabError> {
        let begun = Instant::now();
        loop {
            let view = self.view(name);
            if let Some(view) = view.as_ref().filter(|v| until(v)) {
                return Ok(view.clone());
            }
            self.machine(name).check_running()?;
            if let Some(server) = &mut self.server {
                server.check_running()?;
            }
            let console = self.machine(name).console()?.last_change();
            let heard = self.watch.last_change();
            let describe = || match (&view, self.watch.fault()) {
                (_, Some(fault)) => format!("{what} (unreadable: {fault})"),
                (Some(v), None) => format!("{what} (server: {} {:?}, failures {:?})", v.state, v.stage, v.failures()),
                (None, None) => format!("{what} (the server has not heard of it)"),
            };
            if console.max(heard).max(begun).elapsed() > IDLE {
                return Err(LabError::Stalled { who: name.to_owned(), what: describe(), idle: IDLE });
            }
            if begun.elapsed() > LIMIT {
                return Err(LabError::TooLong { who: name.to_owned(), what: describe(), limit: LIMIT });
            }
            self.watch.wait_change(Duration::from_millis(500));
        }
    }

    /// Waits until a machine is healthy on a release.
    pub fn wait_healthy(&mut self, name: &str, release: u64) -> Result<MachineView, LabError> {
        self.wait(name, &format!("healthy on release {release}"), |v| v.is_healthy_on(release))
    }

    /// A file of the repository that HTTP serves.
    pub fn artifact(&self, sha256: &str) -> PathBuf {
        self.site.join("repo/a").join(sha256)
    }

    /// Where this rack's things lie.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }
}

impl Drop for Rack {
    fn drop(&mut self) {
        self.watch.stop();
    }
}
