//! `kiln-lab`: the virtual rack's program.

use clap::{Parser, Subcommand, ValueEnum};
use kiln_lab::bench::{self, Part};
use kiln_lab::error::LabError;
use kiln_lab::paths::Paths;
use kiln_lab::story::{self, StoryOptions};
use kiln_lab::{checks, command, enclosure, forward, net, server, site};
use std::ffi::OsString;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// A rack of virtual machines around the real boot server and the real agent.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Boot a rack, reimage it, show the table; stay until Ctrl-C (LAB_ONCE=1: exit after the table)
    Run {
        /// How many machines: UEFI PXE, UEFI HTTP Boot, BIOS
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=3))]
        machines: u8,
        /// Stop at healthy on release 1
        #[arg(long)]
        boot_only: bool,
        /// Loopback port of the web page; 0: any free one
        #[arg(long, default_value_t = 8077)]
        port: u16,
    },
    /// Measure reimages by kexec and by cold boot in turns, and the agent at rest: target/lab/report.json
    Bench {
        /// How many of each
        #[arg(long, default_value_t = 3)]
        rounds: u8,
        /// Seconds at rest, at least 120
        #[arg(long, default_value_t = 180, value_parser = clap::value_parser!(u64).range(120..))]
        rest: u64,
        /// Only this (repeatable)
        #[arg(long)]
        part: Vec<Part>,
    },
    /// Make the site and the two releases that racks boot, if they are not current
    Prepare {
        /// Also build this recipe (repeatable): probe, servers, hangs, hangs-servers, disk, rescue, acceptance-lab … are for tests
        #[arg(long)]
        image: Vec<String>,
    },
    /// Run a program inside fresh lab namespaces; nothing of it outlives this process
    Inside {
        /// Program and arguments
        #[arg(last = true, required = true)]
        argv: Vec<OsString>,
    },
    /// (the lab itself) First process inside the namespaces
    #[command(hide = true)]
    Init {
        scratch: PathBuf,
        #[arg(last = true, required = true)]
        argv: Vec<OsString>,
    },
    /// (the lab itself) The site's own DHCP server
    #[command(hide = true)]
    SiteDhcp {
        #[arg(last = true)]
        more: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("kiln-lab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: What) -> anyhow::Result<u8> {
    match what {
        What::Run { machines, boot_only, port } => {
            let paths = Paths::find()?;
            if enclosure::is_inside() {
                return inside(&paths, machines, boot_only);
            }
            checks::host()?;
            site::prepare(&paths, &[])?;
            // The web page's port is opened here, in the host's network, and handed inside.
            let listener =
                TcpListener::bind(("127.0.0.1", port)).map_err(|source| LabError::WebPort { port, source })?;
            let argv: Vec<OsString> = std::env::args_os().collect();
            let argv: Vec<OsString> =
                [paths.program.clone().into_os_string()].into_iter().chain(argv.into_iter().skip(1)).collect();
            let status = enclosure::run(&paths.program, &argv, Some(listener), &paths.scratch)?;
            Ok(enclosure::exit_code(status))
        }
        What::Bench { rounds, rest, part } => {
            let paths = Paths::find()?;
            if enclosure::is_inside() {
                for part in part {
                    part.measure(&paths, rounds, Duration::from_secs(rest))?;
                }
                return Ok(0);
            }
            checks::host()?;
            site::prepare(&paths, &[site::EXEC.to_owned()])?;
            let parts = if part.is_empty() { vec![Part::Reimage, Part::Rest] } else { part };
            let mut code = 0;
            for part in parts {
                // Each in a network of its own.
                let word = part.to_possible_value().expect("no part is hidden").get_name().to_owned();
                let (rounds, rest) = (rounds.to_string(), rest.to_string());
                let words = ["bench", "--rounds", &rounds, "--rest", &rest, "--part", &word].map(OsString::from);
                // A process of its own, because namespaces are entered once.
                let mut command = Command::new(&paths.program);
                command.args(["inside", "--"]).arg(&paths.program).args(words);
                let shown = command::shown(&command);
                let status = command.status().map_err(|source| LabError::Spawn { command: shown, source })?;
                code |= enclosure::exit_code(status);
            }
            println!("\n{}figures: {}", bench::collect(&paths)?, paths.lab.join("report.json").display());
            Ok(code)
        }
        What::Prepare { image } => {
            checks::host()?;
            site::prepare(&Paths::find()?, &image)?;
            Ok(0)
        }
        What::Inside { argv } => {
            checks::host()?;
            let paths = Paths::find()?;
            let status = enclosure::run(&paths.program, &argv, None, &paths.scratch)?;
            Ok(enclosure::exit_code(status))
        }
        What::Init { scratch, argv } => match enclosure::init(&scratch, &argv)? {},
        What::SiteDhcp { more } => match net::become_site_dhcp(&more)? {},
    }
}

/// Exit code of a lab that is stopped by a signal: 130 until its story is told.
static STOPPED: AtomicU8 = AtomicU8::new(130);

fn inside(paths: &Paths, machines: u8, boot_only: bool) -> anyhow::Result<u8> {
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT])?;
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            eprintln!("\nkiln-lab: stopping");
            server::stop_all();
            // This is the namespace's init: with it every machine, tap and mount is gone.
            std::process::exit(i32::from(STOPPED.load(Ordering::SeqCst)));
        }
    });
    let web = forward::listener_from_stdin().and_then(|listener| {
        let address = listener.local_addr().ok()?;
        forward::spawn(listener, (net::SERVER, 8080));
        Some(format!("http://{address}/"))
    });
    let (mut rack, report) = story::tell(paths, &StoryOptions { machines, boot_only, web: web.clone() })?;
    println!("\n{}", report.table());
    for failure in &report.failures {
        println!("FAILED {failure}");
    }
    println!("figures: {}   consoles: {}", paths.lab.join("report.json").display(), paths.consoles.display());
    let code = u8::from(!report.complete);
    if std::env::var("LAB_ONCE").is_ok_and(|v| v == "1") {
        let stopped_well = rack.stop_server()?;
        drop(rack);
        return Ok(if stopped_well { code } else { 1 });
    }
    STOPPED.store(code, Ordering::SeqCst);
    if let Some(web) = web {
        println!("web page: {web}");
    }
    println!("try: target/debug/kiln machine list --site {}", paths.site.display());
    println!("the rack stays up until Ctrl-C");
    loop {
        std::thread::park();
    }
}
