//! `kiln secret`: what machines need to know and nobody else. A value is read from a file or standard input, never from the
//! command line, which every user of this host can read.

use super::At;
use super::client::Client;
use super::error::CliError;
use super::output::{now_ms, pretty, print, segment, tame};
use super::table::{ago, table};
use crate::view::SecretView;
use clap::{Args, Subcommand};
use kiln_protocol::{SECRET_LIMIT, SecretName};
use reqwest::Method;
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub(super) enum Secret {
    /// Set a secret, or give it another value: machines get it at their next report
    Set {
        /// Its name, as recipes declare it
        name: SecretName,
        #[command(flatten)]
        of: For,
        /// Read the value from this file [default: standard input]
        #[arg(long)]
        file: Option<PathBuf>,
        /// Take a line's end at the end of the value off
        #[arg(long)]
        trim: bool,
        #[command(flatten)]
        at: At,
    },
    /// All secrets: their versions, for whom they are, who holds which version; never a value
    List {
        #[command(flatten)]
        at: At,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Remove a secret: machines forget it at their next report
    Remove {
        /// Its name
        name: SecretName,
        #[command(flatten)]
        of: For,
        #[command(flatten)]
        at: At,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct For {
    /// For all machines of this role
    #[arg(long)]
    role: Option<String>,
    /// For one machine, by name or id; it comes before its role's of the same name
    #[arg(long)]
    machine: Option<String>,
}

impl For {
    fn path(&self, name: &SecretName) -> String {
        let (key, value) = match (&self.role, &self.machine) {
            (Some(role), _) => ("role", role.as_str()),
            (None, machine) => ("machine", machine.as_deref().unwrap_or_default()),
        };
        format!("secrets/{}?{key}={}", segment(name.as_str()), segment(value))
    }
}

/// At most one byte more than is taken: the server says what is.
fn read(file: Option<&Path>) -> Result<Vec<u8>, CliError> {
    let limit = SECRET_LIMIT as u64 + 1;
    let mut value = Vec::with_capacity(SECRET_LIMIT + 1);
    match file {
        Some(path) => {
            let failed = |source| CliError::File { path: path.to_owned(), source };
            File::open(path).map_err(failed)?.take(limit).read_to_end(&mut value).map_err(failed)?;
        }
        None => {
            let input = std::io::stdin();
            if input.is_terminal() {
                return Err(CliError::NoValue);
            }
            let failed = |source| CliError::File { path: "standard input".into(), source };
            input.lock().take(limit).read_to_end(&mut value).map_err(failed)?;
        }
    }
    Ok(value)
}

pub(super) async fn secret(command: Secret) -> Result<(), CliError> {
    match command {
        Secret::Set { name, of, file, trim, at } => {
            let mut value = read(file.as_deref())?;
            if trim && value.last() == Some(&b'\n') {
                value.pop();
            }
            let set: SecretView = Client::new(&at)?.put(&of.path(&name), value).await?;
            print(&format!("{} is version {} for {}\n", set.name, set.version, tame(&whom(&set))))
        }
        Secret::List { at, json } => {
            let all: Vec<SecretView> = Client::new(&at)?.get("secrets").await?;
            print(&if json { pretty(&all)? } else { secret_table(&all, now_ms()) })
        }
        Secret::Remove { name, of, at } => {
            let gone: SecretView =
                Client::new(&at)?.change(Method::DELETE, &of.path(&name), &serde_json::json!({})).await?;
            print(&format!("{} of {} is removed\n", gone.name, tame(&whom(&gone))))
        }
    }
}

fn whom(secret: &SecretView) -> String {
    match (&secret.role, &secret.machine) {
        (Some(role), _) => format!("role {role}"),
        (None, machine) => format!("machine {}", machine.as_deref().unwrap_or("?")),
    }
}

fn secret_table(all: &[SecretView], now_ms: i64) -> String {
    let mut rows = Vec::new();
    for secret in all {
        let set = format!("{} by {}", ago(secret.set_ms, now_ms), secret.by);
        let all = secret.holding + secret.lacking;
        let hold = format!("{} of {all} machines hold it", secret.holding);
        rows.push(vec![secret.name.to_string(), secret.version.to_string(), whom(secret), set, hold]);
        for holder in &secret.machines {
            let held = match (holder.version, &holder.why) {
                (Some(version), None) => format!("holds version {version}"),
                (Some(version), Some(why)) => format!("holds version {version}: {why}"),
                (None, why) => why.clone().unwrap_or_default(),
            };
            rows.push(vec![String::new(), String::new(), format!("  {}", holder.machine), String::new(), held]);
        }
        if let Some(more) = all.checked_sub(secret.machines.len()).filter(|more| *more > 0) {
            rows.push(vec![String::new(), String::new(), format!("  and {more} more"), String::new(), String::new()]);
        }
    }
    let rows: Vec<Vec<String>> = rows.into_iter().map(|row| row.iter().map(|cell| tame(cell)).collect()).collect();
    table(&["NAME", "VERSION", "FOR", "SET", "MACHINE HOLDS"], &rows)
}
