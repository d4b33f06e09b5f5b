//! `kiln expected`: what a site expects to come up, and what came of it.

use super::At;
use super::client::Client;
use super::error::CliError;
use super::file;
use super::output::{pretty, print, segment};
use super::table::table;
use crate::expected::CSV_LIMIT;
use crate::view::{ExpectedView, ExpectedWhole, ImportView};
use clap::Subcommand;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub(super) enum Expected {
    /// Put machines, kinds of machine or switch ports on the list: all of the file, or nothing and each mistake by its place
    Import {
        /// CSV, whose first line names the columns; or TOML, if its name ends with .toml
        file: PathBuf,
        /// Only say what would change
        #[arg(long)]
        dry_run: bool,
        /// Take off what the file does not have, of the kinds that it lists
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        at: At,
    },
    /// All machines on the list, and what came of each
    List {
        /// Only those of which something is to be said
        #[arg(long)]
        differs: bool,
        #[command(flatten)]
        at: At,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// One machine of the list
    Show {
        /// Serial number, UUID, Ethernet address, or the name of the machine that it is
        machine: String,
        #[command(flatten)]
        at: At,
        /// JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Take machines off the list
    Remove {
        /// Serial number, UUID or Ethernet address
        #[arg(required = true)]
        machines: Vec<String>,
        #[command(flatten)]
        at: At,
    },
}

pub(super) async fn run(command: Expected) -> Result<(), CliError> {
    match command {
        Expected::Import { file, dry_run, replace, at } => import(&file, dry_run, replace, &at).await,
        Expected::List { differs, at, json } => {
            let whole: ExpectedWhole = Client::new(&at)?.get(&format!("expected?differs={differs}")).await?;
            print(&if json { pretty(&whole)? } else { listed(&whole) })
        }
        Expected::Show { machine, at, json } => {
            let view: ExpectedView = Client::new(&at)?.get(&format!("expected/{}", segment(&machine))).await?;
            print(&if json { pretty(&view)? } else { shown(&view) })
        }
        Expected::Remove { machines, at } => {
            let client = Client::new(&at)?;
            for machine in machines {
                let path = format!("expected/{}", segment(&machine));
                let gone: ExpectedView = client.change(reqwest::Method::DELETE, &path, &()).await?;
                print(&format!("{} is not expected any more\n", gone.title))?;
            }
            Ok(())
        }
    }
}

async fn import(file: &Path, dry_run: bool, replace: bool, at: &At) -> Result<(), CliError> {
    let bytes = file::read(file, CSV_LIMIT as u64)?;
    let toml = file.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("toml"));
    let kind = if toml { "application/toml" } else { "text/csv" };
    let path = format!("expected?dry_run={dry_run}&replace={replace}");
    let done = Client::new(at)?.upload(&path, kind, bytes).await;
    let done: ImportView = match done {
        Err(CliError::Refused { message }) => return Err(CliError::NotImported { path: file.to_owned(), message }),
        done => done?,
    };
    let would = if dry_run { "would be " } else { "" };
    print(&format!(
        "{}{} new, {would}{} changed, {would}{} taken off, {} as they were; {} machines, {} kinds of machine and {} switch \
         ports on the list\n",
        would, done.new, done.changed, done.gone, done.same, done.machines, done.skus, done.ports
    ))
}

fn listed(whole: &ExpectedWhole) -> String {
    let rows: Vec<Vec<String>> = whole
        .machines
        .iter()
        .map(|m| {
            let names: Vec<&str> = m.machines.iter().map(|found| found.name.as_str()).collect();
            vec![
                m.title.clone(),
                m.listed.position.rack.clone(),
                m.listed.position.unit.clone(),
                m.listed.sku.clone(),
                names.join(", "),
                m.state.clone(),
                m.differences.join("; "),
            ]
        })
        .collect();
    let mut text = table(&["SERIAL", "RACK", "UNIT", "SKU", "MACHINE", "STATE", "DIFFERENCES"], &rows);
    if !whole.unlisted.is_empty() {
        let names: Vec<&str> = whole.unlisted.iter().map(|machine| machine.name.as_str()).collect();
        let _ = writeln!(text, "\nnot on the list: {}", names.join(", "));
    }
    text
}

fn shown(view: &ExpectedView) -> String {
    let m = &view.listed;
    let parts = |parts: &Option<kiln_fleet::Parts>| parts.as_ref().map(ToString::to_string).unwrap_or_default();
    let names: Vec<&str> = view.machines.iter().map(|found| found.name.as_str()).collect();
    let place = if m.position.is_empty() { String::new() } else { m.position.to_string() };
    let cable = if m.switch.is_empty() { String::new() } else { format!("switch {} port {}", m.switch, m.port) };
    let mut text = String::new();
    for (name, value) in [
        ("serial", m.serial.clone()),
        ("uuid", m.uuid.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("macs", m.macs.join(", ")),
        ("place", place),
        ("cable", cable),
        ("expected", m.due.map(|due| due.to_string()).unwrap_or_default()),
        ("sku", m.sku.clone()),
        ("model", m.build.model.clone()),
        ("cpus", parts(&m.build.cpus)),
        ("memory", parts(&m.build.memory)),
        ("disks", parts(&m.build.disks)),
        ("nics", parts(&m.build.nics)),
        ("machine", names.join(", ")),
        ("state", view.state.clone()),
    ] {
        let value = if value.is_empty() { "-" } else { &value };
        let _ = writeln!(text, "{name:<12} {value}");
    }
    for (number, difference) in view.differences.iter().enumerate() {
        let _ = writeln!(text, "{:<12} {difference}", if number == 0 { "differences" } else { "" });
    }
    text
}
