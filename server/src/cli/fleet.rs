//! Commands about machines and releases: clients of the operator API.

use super::client::Client;
use super::error::CliError;
use super::output::{now_ms, pretty, print, segment};
use super::show::{line, list, mebibytes, show};
use super::table::table;
use super::{Assign, At, Machine, order};
use crate::view::{ClassView, MachineView, ReleaseView};
use reqwest::Method;
use serde_json::json;

pub(super) async fn machine(command: Machine) -> Result<(), CliError> {
    match command {
        Machine::List { at, json } => {
            let machines: Vec<MachineView> = Client::new(&at)?.get("machines").await?;
            print(&if json { pretty(&machines)? } else { list(&machines, now_ms()) })
        }
        Machine::Show { machine, at, json } => {
            let machine: MachineView = Client::new(&at)?.get(&format!("machines/{}", segment(&machine))).await?;
            print(&if json { pretty(&machine)? } else { show(&machine, now_ms()) })
        }
        Machine::Inventory { machine, at, json } => super::hardware::inventory(&machine, &at, json, now_ms()).await,
        Machine::Log { machine, boot, held, follow, at, json } => {
            let boot = if held { format!("{boot}-held") } else { boot.to_string() };
            super::log::log(&machine, &boot, follow, &at, json).await
        }
        Machine::Watch { machine, at, json } => watch(&at, machine.as_deref(), json).await,
        Machine::Approve { machine, role, name, code, at } => {
            let path = format!("machines/{}/approve", segment(&machine));
            let body = json!({ "role": role, "name": name, "code": code });
            let approved: MachineView = Client::new(&at)?.change(Method::POST, &path, &body).await?;
            print(&format!("{} is approved as {role}: {}\n", approved.name, approved.reason))
        }
        Machine::Retire { machine, at } => {
            let path = format!("machines/{}/retire", segment(&machine));
            let retired: MachineView = Client::new(&at)?.change(Method::POST, &path, &json!({})).await?;
            print(&format!("{} is {}: {}\n", retired.name, retired.state, retired.reason))
        }
        Machine::Excuse { machine, reason, at } => {
            let path = format!("machines/{}/excuse", segment(&machine));
            let excused: MachineView =
                Client::new(&at)?.change(Method::POST, &path, &json!({ "reason": reason })).await?;
            print(&format!("{} is {}: {}\n", excused.name, excused.state, excused.reason))
        }
        Machine::Accept { machine, at } => {
            let path = format!("machines/{}/accept", segment(&machine));
            let accepted: MachineView = Client::new(&at)?.change(Method::POST, &path, &json!({})).await?;
            print(&format!("{}: the TPM and the firmware that it proves next are its own\n", accepted.name))
        }
        Machine::Replace { old, new, at } => {
            let path = format!("machines/{}/replace", segment(&old));
            let placed: MachineView = Client::new(&at)?.change(Method::POST, &path, &json!({ "with": new })).await?;
            let release = placed.assigned.as_ref().map_or("-".into(), |a| format!("{}/{}", a.image, a.release));
            print(&format!("{} is {} now, to run {release}; {old} is retired\n", placed.id, placed.name))
        }
        Machine::Wipe(wipe) => order::wipe(wipe).await,
        Machine::Receipt { machine, out, at } => order::receipt(&at, &machine, out.as_deref()).await,
        Machine::RevokeKey { machine, at } => {
            let path = format!("machines/{}/revoke-key", segment(&machine));
            let revoked: MachineView = Client::new(&at)?.change(Method::POST, &path, &json!({})).await?;
            let key = revoked.key.map_or_else(String::new, |key| format!(" {key}"));
            print(&format!("the identity key{key} of {} is revoked: {}\n", revoked.name, revoked.reason))
        }
        Machine::Clear { machine, key, at } => {
            let path = format!("machines/{}/clear", segment(&machine));
            let cleared: MachineView = Client::new(&at)?.change(Method::POST, &path, &json!({ "key": key })).await?;
            let own = cleared.key.as_ref().filter(|_| key.is_some());
            let own = own.map_or_else(String::new, |own| format!("its identity key is {own} from now on\n"));
            let others = cleared.other_keys_note.map_or_else(String::new, |note| format!("{note}\n"));
            print(&format!("{} is {}: {}\n{own}{others}", cleared.name, cleared.state, cleared.reason))
        }
    }
}

pub(super) async fn assign(assign: &Assign) -> Result<(), CliError> {
    if !assign.order_key.is_empty() {
        return order::assign(assign).await;
    }
    let path = format!("machines/{}/assignment", segment(&assign.machine));
    let body = json!({ "image": assign.release.image, "release": assign.release.release, "via": assign.via });
    let machine: MachineView = Client::new(&assign.at)?.change(Method::PUT, &path, &body).await?;
    let (sequence, via) = machine.assigned.map_or((0, assign.via), |a| (a.sequence, a.via.into()));
    let why = if via == assign.via { String::new() } else { format!(": {}", machine.reason) };
    let text = format!("{} shall run {} (sequence {sequence}), by {via}{why}\n", machine.name, assign.release);
    print(&text)
}

pub(super) async fn classes(at: &At, json: bool) -> Result<(), CliError> {
    let classes: Vec<ClassView> = Client::new(at)?.get("classes").await?;
    print(&if json { pretty(&classes)? } else { class_table(&classes) })
}

/// A line for each release of each class.
fn class_table(classes: &[ClassView]) -> String {
    let mut rows = Vec::new();
    for class in classes {
        let row = |release: String, cold: &str, kexec: &str| {
            let machines = class.machines.to_string();
            vec![class.model.clone(), class.firmware.clone(), machines, release, cold.to_owned(), kexec.to_owned()]
        };
        let word = |shown| if shown { "came up" } else { "not yet" };
        if class.releases.is_empty() {
            rows.push(row("-".to_owned(), "-", "-"));
        }
        rows.extend(class.releases.iter().map(|r| {
            let release = format!("{}/{}", r.image, r.release);
            row(release, word(r.cold), if r.kexec_failed { "failed" } else { word(r.kexec) })
        }));
    }
    table(&["MODEL", "FIRMWARE", "MACHINES", "RELEASE", "COLD", "KEXEC"], &rows)
}

pub(super) async fn releases(at: &At, json: bool) -> Result<(), CliError> {
    let releases: Vec<ReleaseView> = Client::new(at)?.get("releases").await?;
    if json {
        return print(&pretty(&releases)?);
    }
    let rows: Vec<Vec<String>> = releases
        .iter()
        .map(|r| {
            vec![
                format!("{}/{}", r.image, r.release),
                r.class.clone(),
                r.architecture.clone(),
                format!("{:.1} MiB", mebibytes(r.root_bytes)),
                format!("{:.1} MiB", mebibytes(r.uki_bytes)),
                r.machines.to_string(),
                r.needed_by.to_string(),
                r.root_hash.chars().take(16).collect(),
                r.built.clone(),
            ]
        })
        .collect();
    print(&table(&["RELEASE", "CLASS", "ARCH", "ROOT", "UKI", "MACHINES", "NEEDED BY", "ROOT HASH", "BUILT"], &rows))
}

async fn watch(at: &At, machine: Option<&str>, json: bool) -> Result<(), CliError> {
    let client = Client::new(at)?;
    let mut response = client.stream("events").await?;
    let mut buffer = Vec::new();
    let broken = |e: reqwest::Error| CliError::Request { url: client.url("events"), reason: e.to_string() };
    while let Some(piece) = response.chunk().await.map_err(broken)? {
        buffer.extend_from_slice(&piece);
        while let Some(end) = buffer.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            for view in views(&String::from_utf8_lossy(&event))? {
                if machine.is_some_and(|m| m != view.name && m != view.id.as_str()) {
                    continue;
                }
                print(&if json { format!("{}\n", serde_json::to_string(&view)?) } else { line(&view) })?;
            }
        }
    }
    Err(CliError::Request { url: client.url("events"), reason: "the server ended the stream".into() })
}

/// The machines of one server-sent event: `hello` carries all, `machine` one; others are passed over.
fn views(event: &str) -> Result<Vec<MachineView>, CliError> {
    let mut kind = "";
    let mut data = String::new();
    for line in event.lines() {
        if let Some(name) = line.strip_prefix("event:") {
            kind = name.trim();
        } else if let Some(text) = line.strip_prefix("data:") {
            data.push_str(text.trim_start());
        }
    }
    Ok(match kind {
        "hello" => serde_json::from_str(&data)?,
        "machine" => vec![serde_json::from_str(&data)?],
        _ => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_other_kinds_are_passed_over() {
        assert!(views("event: later\ndata: {}\n\n").unwrap().is_empty());
        assert!(views("event: machine\ndata: nonsense\n\n").is_err());
        assert!(views(": comment\n\n").unwrap().is_empty());
    }
}
