//! `kiln serve`: opens the site, starts every part, and ends them in order.

use crate::catalog::Catalog;
use crate::config::{Config, DhcpMode};
use crate::control::Control;
use crate::error::ServeError;
use crate::http::{self, App, Certificates, Listening};
pub use crate::log::LogFormat;
use crate::looks::{look, looks, remember};
use crate::net::{self, BootNet, Decide, NetEvent, SiteFiles};
use crate::store::Store;
use kiln_images::{Memory, SiteDir};
use kiln_netboot::{LeaseConfig, Mode, tftp::BootFile};
use kiln_release::tuf::Seen;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// How `kiln serve` was called.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The site directory.
    pub site: PathBuf,
    /// The configuration; none: the site's own, if there is one.
    pub config: Option<PathBuf>,
    /// How log lines look; none: text on a terminal, else JSON.
    pub log: Option<LogFormat>,
}

/// Each transfer and held report has a descriptor, and the usual soft limit of 1024 is a rack's worth.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) });
    if let Err(error) = raised {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
}

/// Runs until SIGTERM or SIGINT.
pub async fn serve(options: ServeOptions) -> Result<(), ServeError> {
    crate::log::start(options.log);
    raise_descriptor_limit();
    let site = SiteDir::open(&options.site)?;
    let (config, file) = Config::load(&site.path, options.config.as_deref())?;
    let _lock = site.lock_state()?;
    match &file {
        Some(path) => {
            tracing::info!("serves site {} in {}, as {} says", site.name, site.path.display(), path.display());
        }
        None => tracing::info!(
            "serves site {} in {}; all settings have their defaults: there is no kiln.toml",
            site.name,
            site.path.display()
        ),
    }
    let acceptor = tokio_rustls::TlsAcceptor::from(http::tls::agent_api(&site)?);

    let (store, writer) = Store::open(&site.database()).await?;
    let memory = recall(&store).await?;
    let catalog = look(&site, memory).await?;
    let director = site.director_key(&catalog.site)?;
    remember(&store, &catalog).await?;
    describe(&catalog, &config);

    let (stop, stopped) = watch::channel(false);
    let control = Control::load(store.clone(), site.clone(), config.clone(), director, catalog, stopped.clone())
        .await
        .map_err(|e| ServeError::Net { what: "the fleet", reason: e.to_string() })?;
    let result = run(&control, acceptor, &stop).await;

    control.flush();
    // The writer ends when the last handle is gone and everything is written.
    drop((control, store));
    if tokio::time::timeout(Duration::from_secs(5), writer).await.is_err() {
        tracing::debug!("a connection still holds the store; all that was answered is written");
    }
    let _ = std::fs::remove_file(site.socket());
    tracing::info!("stopped");
    result
}

async fn run(
    control: &Arc<Control>,
    acceptor: tokio_rustls::TlsAcceptor,
    stop: &watch::Sender<bool>,
) -> Result<(), ServeError> {
    let config = &control.config;
    let listening = Arc::new(Mutex::new(Vec::new()));
    let bind = async |what, table, address: SocketAddr| {
        let listener =
            TcpListener::bind(address).await.map_err(|source| ServeError::Listen { what, table, address, source })?;
        let address = listener.local_addr().unwrap_or(address);
        Ok::<_, ServeError>((listener, address))
    };
    let (http_listener, http_at) = bind("HTTP", "http", config.http).await?;
    let (agent_listener, agent_at) = bind("the agent API", "agent_api", config.agent_api).await?;
    let socket_listener = unix_socket(&control.site)?;

    let boot_net = boot_net(control, http_at.port(), agent_at.port()).await?;
    let app = App { control: control.clone(), net: Some(boot_net.clone()), listening: listening.clone() };
    let says = |what: &str, address: String, why: &str| {
        tracing::info!("listens on {address}: {what}, {why}");
        let line = Listening { what: what.to_owned(), address, why: why.to_owned() };
        listening.lock().expect("no code panics under this lock").push(line);
    };
    says("HTTP", http_at.to_string(), "for boot programs, artifacts, the web page, and reading");
    says("agent API", agent_at.to_string(), "for machines that prove their key over TLS 1.3");
    says("operator API", control.site.socket().display().to_string(), "for this host's own users, without a token");
    let https = https(control, &bind).await?;
    if let Some((_, at, ..)) = &https {
        says("HTTPS", at.to_string(), "for people and programs with tokens, and the web page");
    }

    let stopped = stop.subscribe();
    let mut servers = JoinSet::new();
    servers.spawn(http::serve_tcp(
        http_listener,
        http::public_router(app.clone()),
        config.http_limits,
        stopped.clone(),
    ));
    servers.spawn(http::serve_tls(
        agent_listener,
        acceptor,
        http::agent_router(app.clone()),
        config.agent_limits,
        stopped.clone(),
    ));
    let mut helpers = JoinSet::new();
    if let Some((listener, _, certificates, acceptor)) = https {
        let router = http::strict(http::public_router(app.clone()));
        servers.spawn(http::serve_https(listener, acceptor, router, config.http_limits, stopped.clone()));
        helpers.spawn(certificates.renew());
    }
    servers.spawn(http::serve_unix(socket_listener, http::socket_router(app), stopped.clone()));

    {
        let control = control.clone();
        helpers.spawn(async move { control.watch_people().await });
    }
    helpers.spawn(ticks(control.clone()));
    helpers.spawn(compares(control.clone()));
    helpers.spawn(looks(control.clone()));
    let (events, inbox) = mpsc::channel(4096);
    helpers.spawn(net_events(control.clone(), inbox, listening));
    let mut net_parts = start_net(control, boot_net, http_at.port(), events);

    let mut terminate =
        signal(SignalKind::terminate()).map_err(|e| ServeError::Net { what: "SIGTERM", reason: e.to_string() })?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|e| ServeError::Net { what: "SIGINT", reason: e.to_string() })?;
    let result = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(ended) = net_parts.join_next() => Err(match ended {
            Ok(Err((what, e))) => ServeError::Net { what, reason: e.to_string() },
            Ok(Ok(())) => ServeError::Net { what: "a network part", reason: "ended by itself".into() },
            Err(e) => ServeError::Net { what: "a network part", reason: e.to_string() },
        }),
        Some(ended) = helpers.join_next() => Err(ServeError::Net {
            what: "a part of the server",
            reason: ended.err().map_or_else(|| "ended by itself".into(), |e| e.to_string()),
        }),
    };
    tracing::info!("stopping");
    net_parts.shutdown().await;
    let _ = stop.send(true);
    while servers.join_next().await.is_some() {}
    helpers.shutdown().await;
    result
}

/// The listener of people and programs, if the configuration has one.
async fn https(
    control: &Control,
    bind: &impl AsyncFn(&'static str, &'static str, SocketAddr) -> Result<(TcpListener, SocketAddr), ServeError>,
) -> Result<Option<(TcpListener, SocketAddr, Arc<Certificates>, tokio_rustls::TlsAcceptor)>, ServeError> {
    let Some(https) = &control.config.https else { return Ok(None) };
    let (listener, address) = bind("HTTPS", "https", https.listen).await?;
    let names = if https.names.is_empty() { own_names(address) } else { https.names.clone() };
    let certificates = Certificates::open(&control.site, https.files.as_ref(), names)?;
    let acceptor = tokio_rustls::TlsAcceptor::from(certificates.server_config()?);
    Ok(Some((listener, address, certificates, acceptor)))
}

/// What a certificate that nobody gave names to is for.
fn own_names(address: SocketAddr) -> Vec<String> {
    let host = nix::sys::utsname::uname().ok().and_then(|u| u.nodename().to_str().map(str::to_owned));
    let address = (!address.ip().is_unspecified()).then(|| address.ip().to_string());
    let mut names: Vec<String> = host.into_iter().filter(|h| !h.is_empty()).chain(address).collect();
    names.extend(["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()]);
    names.dedup();
    names
}

fn unix_socket(site: &SiteDir) -> Result<UnixListener, ServeError> {
    let path = site.socket();
    let fail = |source| ServeError::Socket { path: path.clone(), source };
    // The lock on the site is held: whatever lies there belongs to a server that is gone.
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        Ok(()) | Err(_) => {}
    }
    // state/ is 0700, so nobody else can come in between the two calls.
    let listener = UnixListener::bind(&path).map_err(fail)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

async fn recall(store: &Store) -> Result<Memory, ServeError> {
    let trust_root = store.note("tuf-root").await?;
    let seen = store.note("tuf-seen").await?;
    let seen = seen.and_then(|text| serde_json::from_str::<Seen>(&text).ok()).unwrap_or_default();
    Ok(Memory { trust_root, seen })
}

fn describe(catalog: &Catalog, config: &Config) {
    match catalog.newest(&config.boot.default_image) {
        Some(release) => tracing::info!(
            "{} releases published; an unknown machine boots {release}, so that its agent can introduce itself",
            catalog.releases.len()
        ),
        None => tracing::warn!(
            "no release of {} (class normal) that machines may have is published: unknown machines boot nothing. Build and \
             publish one",
            config.boot.default_image
        ),
    }
}

async fn compares(control: Arc<Control>) {
    control.compare_for_ever().await;
}

async fn ticks(control: Arc<Control>) {
    let mut interval = tokio::time::interval(Duration::from_secs(1));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if let Err(error) = control.tick().await {
            tracing::error!(%error, "the passing of time was not recorded");
        }
    }
}

async fn boot_net(control: &Arc<Control>, http_port: u16, agent_port: u16) -> Result<BootNet, ServeError> {
    let fail = |reason: String| ServeError::Net { what: "[dhcp]", reason };
    let config = &control.config;
    let mode = match &config.dhcp.mode {
        DhcpMode::Off => Mode::Off,
        DhcpMode::Proxy => Mode::Proxy,
        DhcpMode::Full(full) => Mode::Full(LeaseConfig {
            start: full.first,
            end: full.last,
            router: full.router,
            dns: full.dns.clone(),
            lease_s: full.lease_s,
        }),
    };
    let leases = control.store.notes("lease/").await?;
    let leases = leases.iter().filter_map(|text| crate::control::lease_from(text));
    let settings = kiln_netboot::Config {
        mode,
        address: config.boot.address,
        http_port,
        agent_port,
        http_boot: config.boot.http_boot,
        chain_ipxe: true, // the site's own undionly.kpxe rather than whatever age the ROM's iPXE has
        uefi: config.boot.uefi,
    };
    let net = BootNet::new(settings, leases).map_err(|e| fail(e.to_string()))?;
    net.trust_relays(config.dhcp.relays.clone());
    Ok(net)
}

type NetPart = Result<(), (&'static str, net::NetError)>;

fn start_net(
    control: &Arc<Control>,
    boot_net: BootNet,
    http_port: u16,
    events: mpsc::Sender<NetEvent>,
) -> JoinSet<NetPart> {
    let config = &control.config;
    let mut parts = JoinSet::new();
    let decide: Decide = {
        let control = control.clone();
        Arc::new(move |query| {
            let control = control.clone();
            Box::pin(async move { control.boot_answer(&query) })
        })
    };
    let dhcp = net::dhcp::Settings { interface: config.dhcp.interface.clone() };
    let (dhcp_net, dhcp_events) = (boot_net.clone(), events.clone());
    parts.spawn(async move { net::dhcp::run(dhcp_net, dhcp, decide, dhcp_events).await.map_err(|e| ("DHCP", e)) });
    let files = SiteFiles {
        repo: control.site.repo(),
        undionly: config.boot.undionly.clone(),
        snponly: config.boot.snponly.clone(),
        shim: config.boot.shim.clone(),
    };
    match config.tftp {
        SocketAddr::V4(listen) => {
            let settings = net::tftp::Settings {
                listen,
                max_transfers: config.tftp_transfers,
                max_per_address: config.tftp_per_address,
                shared: config.tftp_shared,
                address: config.boot.address,
                http_port,
                uefi: config.boot.uefi,
                ..net::tftp::Settings::default()
            };
            parts.spawn(async move {
                net::tftp::run(boot_net, settings, Arc::new(files), events).await.map_err(|e| ("TFTP", e))
            });
        }
        SocketAddr::V6(address) => {
            tracing::warn!("TFTP is not served on {address}: PXE over IPv6 is not supported");
            let _: SocketAddrV4 = net::tftp::Settings::default().listen;
        }
    }
    parts
}

async fn net_events(control: Arc<Control>, mut inbox: mpsc::Receiver<NetEvent>, listening: Arc<Mutex<Vec<Listening>>>) {
    while let Some(event) = inbox.recv().await {
        if let Err(error) = net_event(&control, event, &listening).await {
            tracing::warn!(%error, "a network event was not recorded");
        }
    }
}

async fn net_event(
    control: &Control,
    event: NetEvent,
    listening: &Mutex<Vec<Listening>>,
) -> Result<(), crate::error::ControlError> {
    let hash = |file: &BootFile| match file {
        BootFile::Uki(sha256) => Some(sha256.to_string()),
        BootFile::Undionly | BootFile::Snponly | BootFile::Shim | BootFile::AfterShim | BootFile::Autoexec => None,
    };
    match event {
        NetEvent::Listening { what, address, why } => {
            tracing::info!("listens on {address}: {what}, {why}");
            let line = Listening { what: what.to_owned(), address: address.to_string(), why };
            listening.lock().expect("no code panics under this lock").push(line);
        }
        NetEvent::NotListening { what, reason } => tracing::warn!("{what} is not answered: {reason}"),
        NetEvent::Dhcp(event) => dhcp_event(control, event).await?,
        NetEvent::Lease(lease) => {
            let (key, value) = crate::control::lease_to(&lease);
            control.store.remember(key, value).wait().await?;
        }
        NetEvent::TftpStart { download } => {
            let machine = control.title(download.id.as_ref(), download.mac);
            tracing::info!(machine, "downloads {} by TFTP", download.file.path());
            match hash(&download.file) {
                Some(hash) => control.downloads(download.mac, download.id.as_ref(), &hash, false).await?,
                None => control.takes_bytes(download.mac, download.id.as_ref(), None).await?,
            }
        }
        NetEvent::TftpMoves { download } => {
            let hash = hash(&download.file);
            control.takes_bytes(download.mac, download.id.as_ref(), hash.as_deref()).await?;
        }
        NetEvent::TftpDone { download, bytes, ms } => {
            let machine = control.title(download.id.as_ref(), download.mac);
            tracing::info!(machine, "has {} ({bytes} bytes in {ms} ms)", download.file.path());
            if let Some(hash) = hash(&download.file) {
                control.downloads(download.mac, download.id.as_ref(), &hash, true).await?;
            }
        }
        NetEvent::TftpFailed { download, bytes, reason } => {
            let machine = control.title(download.id.as_ref(), download.mac);
            tracing::warn!(machine, "download of {} ended after {bytes} bytes: {reason}", download.file.path());
        }
        NetEvent::TftpRefused { peer, name, reason } => {
            tracing::warn!("TFTP request of {peer} for {name:?} refused: {reason}");
        }
    }
    Ok(())
}

async fn dhcp_event(control: &Control, event: kiln_netboot::Event) -> Result<(), crate::error::ControlError> {
    use kiln_netboot::Event;
    let name = |id: Option<&kiln_protocol::MachineId>, mac| control.title(id, Some(mac));
    match event {
        Event::Discover { query } => control.asked(&query).await?,
        Event::Offered { query, offer } => {
            tracing::debug!(machine = name(query.id.as_ref(), query.mac), ?offer, "is offered a boot program");
        }
        Event::Accepted { query, address } => {
            tracing::debug!(machine = name(query.id.as_ref(), query.mac), %address, "took an offer");
        }
        Event::AgentAsked { mac, id } => {
            tracing::debug!(machine = name(id.as_ref(), mac), "its agent asked where the boot server is");
        }
        Event::HeardAt { mac, position } => control.heard_at(mac, &position),
        Event::Withheld { mac, id, reason } => {
            tracing::warn!(machine = name(id.as_ref(), mac), "gets no boot program: {reason}");
        }
        Event::BootLoop { mac, times } => tracing::warn!(
            machine = name(None, mac),
            "was given undionly.kpxe {times} times and never came further: is its network card supported by it?"
        ),
        Event::NoOtherServer => tracing::warn!("{}", Event::NO_OTHER_SERVER),
        Event::OtherServer { server } => tracing::info!("addresses are given out by {server}"),
        Event::NoAddressLeft { mac } => {
            tracing::error!(machine = name(None, mac), "gets no address: [dhcp.full] range is used up");
        }
        Event::Malformed { from, reason } => tracing::debug!(%from, "a packet that is none: {reason}"),
        Event::Unsent { to, reason } => tracing::warn!(%to, "a reply could not be sent: {reason}"),
    }
    Ok(())
}
