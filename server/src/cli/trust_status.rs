//! `kiln trust status`: every TUF role, and what waits.

use super::At;
use super::client::Client;
use super::error::CliError;
use super::output::{pretty, print};
use super::table::table;
use crate::view::DbxView;
use jiff::Timestamp;
use kiln_images::sealed::fingerprint;
use kiln_images::status::{KeyStatus, Nearness, RoleStatus, TrustStatus, trust_status};
use kiln_images::{SiteDir, SiteError};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tokio::runtime::Runtime;

/// What the running server knows besides.
#[derive(Debug, Deserialize)]
struct Served {
    dbx: Option<DbxView>,
}

#[derive(Debug, Serialize)]
struct Status<'a> {
    #[serde(flatten)]
    trust: &'a TrustStatus,
    /// Machines without the list of revoked boot programs; none where no server runs, or nothing is revoked.
    dbx: Option<DbxView>,
}

pub(super) fn status(dir: &Path, json: bool, now: Timestamp, runtime: &Runtime) -> Result<(), CliError> {
    let site = SiteDir::open(dir)?;
    let trust = trust_status(&site, now)?;
    let dbx = if matches!(site.lock_state(), Err(SiteError::Served { .. })) {
        let at = At::site(dir.to_owned());
        runtime.block_on(async { Client::new(&at)?.get::<Served>("status").await })?.dbx
    } else {
        None
    };
    if json {
        return print(&pretty(&Status { trust: &trust, dbx })?);
    }
    print(&(status_text(&trust) + &dbx.as_ref().map_or_else(String::new, dbx_text)))
}

fn dbx_text(dbx: &DbxView) -> String {
    let revoked: Vec<String> = dbx.revoked.iter().map(ToString::to_string).collect();
    let mut text = format!("revoked boot programs: {}\n", revoked.join(", "));
    if dbx.lacking.is_empty() {
        text += "  every machine in service has them in its firmware's dbx\n";
    }
    text.extend(dbx.lacking.iter().map(|machine| format!("  {} lacks them: {}\n", machine.machine, machine.why)));
    text
}

fn status_text(status: &TrustStatus) -> String {
    let row = |role: &RoleStatus| {
        let signed = role.keys.iter().filter(|key| key.signed).count();
        vec![
            role.role.clone(),
            role.version.to_string(),
            role.expires.to_string(),
            format!("{} days", role.days_left),
            format!("{} of {}", role.threshold, role.keys.len()),
            signed.to_string(),
            role.nearness.warning().unwrap_or_default().to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = status.roles.iter().map(row).collect();
    let mut text = format!("site {}\n", status.site);
    text += &table(&["ROLE", "VERSION", "EXPIRES", "LEFT", "THRESHOLD", "SIGNED BY", "WARNING"], &rows);
    let key = |key: &KeyStatus, mark: &str| {
        format!("  {}  {}{mark}\n", fingerprint(&key.keyid), key.name.as_deref().unwrap_or("-"))
    };
    for role in &status.roles {
        text.extend([format!("keys of {}\n", role.role)]);
        text.extend(role.keys.iter().map(|k| key(k, if k.signed { "  signed" } else { "" })));
    }
    for keyid in &status.directors {
        text.extend([format!("key of the director\n  {}\n", fingerprint(keyid))]);
    }
    let (operators, threshold) = &status.operators;
    if !operators.is_empty() {
        text.extend([format!("keys of operators, {threshold} sign an order\n")]);
        text.extend(operators.iter().map(|operator| key(operator, "")));
    }
    text.extend(status.floors.iter().map(|(image, floor)| format!("floor of {image}: {floor}\n")));
    if let Some(request) = &status.request {
        text.extend([format!("waits for signatures: {}\n", request.name)]);
        text.extend(request.lacking.iter().map(|lacking| format!("  {}\n", lacking.words(&status.names))));
    }
    if status.roles.iter().any(|role| role.nearness != Nearness::Far) {
        text += "`kiln trust renew` signs anew what is about to expire\n";
    }
    text
}
