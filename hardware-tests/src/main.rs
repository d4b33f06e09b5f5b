//! `kiln-lab`: the virtual rack's program.

use anyhow::Context;
use clap::{Parser, Subcommand};
use kiln_lab::paths::Paths;
use kiln_lab::{checks, enclosure, net};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// A rack of virtual machines around the real boot server and the real agent.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
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
    SiteDhcp,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("kiln-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: What) -> anyhow::Result<u8> {
    let program = std::env::current_exe().context("where this program lies")?;
    match what {
        What::Inside { argv } => {
            checks::host()?;
            let status = enclosure::run(&program, &argv, None, &Paths::find()?.scratch)?;
            Ok(enclosure::exit_code(status))
        }
        What::Init { scratch, argv } => match enclosure::init(&scratch, &argv)? {},
        What::SiteDhcp => match net::become_site_dhcp()? {},
    }
}
