//! Commands about machines and releases: clients of the operator API.

use super::client::Client;
use super::error::CliError;
use super::table::{ago, ahead, table};
use super::{Assign, At, Machine, order};
use crate::view::{MachineView, ReleaseView};
use jiff::Timestamp;
use kiln_protocol::AttestationState;
use reqwest::Method;
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

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
        Machine::Log { machine, boot, follow, at, json } => super::log::log(&machine, boot, follow, &at, json).await,
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
        Machine::Clear { machine, at } => {
            let path = format!("machines/{}/clear", segment(&machine));
            let cleared: MachineView = Client::new(&at)?.change(Method::POST, &path, &json!({})).await?;
            print(&format!("{} is {}: {}\n", cleared.name, cleared.state, cleared.reason))
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
    let sequence = machine.assigned.map_or(0, |a| a.sequence);
    let text = format!("{} shall run {} (sequence {sequence}), by {}\n", machine.name, assign.release, assign.via);
    print(&text)
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

/// One line for one change.
fn line(m: &MachineView) -> String {
    let time = clock(m.last_seen_ms);
    let release = release(m);
    format!("{time}  {:<16} {:<12} {:<28} {release:<14} {}\n", m.name, m.state, m.stage_label, m.last_words)
}

fn list(machines: &[MachineView], now_ms: i64) -> String {
    let rows: Vec<Vec<String>> = machines
        .iter()
        .map(|m| {
            let assigned = m.assigned.as_ref().map_or("-".into(), |a| format!("{}/{}", a.image, a.release));
            vec![
                m.name.clone(),
                flagged(m),
                m.stage_label.clone(),
                release(m),
                assigned,
                protection(m),
                ago(m.last_seen_ms, now_ms),
                m.last_words.clone(),
            ]
        })
        .collect();
    table(&["NAME", "STATE", "STAGE", "RELEASE", "ASSIGNED", "PROTECTION", "SEEN", "LAST WORDS"], &rows)
}

/// Its state, and that it differs from its release, or from what was expected.
fn flagged(m: &MachineView) -> String {
    let drift = match m.condition.drift_count {
        0 => String::new(),
        n => format!(", drift {n}"),
    };
    let listed = match m.comparison.as_ref().map_or(0, |c| c.differences.len()) {
        0 => String::new(),
        n => format!(", not as expected {n}"),
    };
    let tests = match &m.acceptance {
        Some(run) if run.state() != "passed" => format!(", acceptance {}", run.state()),
        None if m.awaits_acceptance => ", awaits acceptance".to_owned(),
        Some(_) | None => String::new(),
    };
    format!("{}{drift}{listed}{tests}", m.state)
}

/// What was expected, drift and events, below a machine's values.
fn condition(text: &mut String, m: &MachineView) {
    let drift = &m.condition.drift;
    let more = u64::from(m.condition.drift_count).saturating_sub(drift.len() as u64);
    let mut line = |words: String| writeln!(text, "{words}").expect("writing to a String cannot fail");
    if let Some(comparison) = &m.comparison {
        line(format!("{:<12} {}", "expected", comparison.entry.as_deref().unwrap_or("-")));
        for place in [("place", &comparison.expected), ("found at", &comparison.found)] {
            if !place.1.is_empty() {
                line(format!("{:<12} {}", place.0, place.1));
            }
        }
        for (number, difference) in comparison.differences.iter().enumerate() {
            line(format!("{:<12} {difference}", if number == 0 { "differs" } else { "" }));
        }
    }
    if let Some(run) = &m.acceptance {
        let at = clock(i64::try_from(run.at).unwrap_or(i64::MAX));
        let doing = if run.run.doing.is_empty() { String::new() } else { format!(": {}", run.run.doing) };
        line(format!("{:<12} {} on {} at {at}{doing}", "acceptance", run.state(), run.release));
        for result in &run.run.results {
            line(format!("{:<12} {} {}: {}", "", result.outcome, result.part, result.detail));
        }
        for failure in &run.failures {
            line(format!("{:<12} {failure}", "no pass"));
        }
    }
    for (number, difference) in drift.iter().enumerate() {
        let name = if number == 0 { "drift" } else { "" };
        line(format!("{name:<12} {} [{}]", difference.text, difference.kind));
    }
    if more > 0 {
        line(format!("{:<12} and {more} more", ""));
    }
    if m.condition.drift_count > 0 || m.condition.drift_note.is_some() {
        let note = m.condition.drift_note.as_ref().map_or(String::new(), |note| format!(": {note}"));
        line(format!("{:<12} {}{note}", "on drift", m.condition.drift_policy));
    }
    for (number, event) in m.condition.events.iter().enumerate() {
        let name = if number == 0 { "events" } else { "" };
        let alarm = if event.alarm { "!" } else { " " };
        line(format!("{name:<12} {} {alarm} {}: {}", clock(event.at_ms), event.kind, event.text));
    }
}

/// The class, and beside it what a person must not overlook.
fn protection(m: &MachineView) -> String {
    let class = m.protection.map_or("-", kiln_protocol::ProtectionClass::as_str);
    match m.attestation.as_ref() {
        Some(a) if a.state == AttestationState::Failed => format!("{class}, ATTESTATION FAILED"),
        Some(a) if a.carried => format!("{class}, by kexec"),
        Some(_) | None => class.to_owned(),
    }
}

fn secrets(m: &MachineView) -> String {
    let held: Vec<String> = m.secrets.iter().map(|(name, version)| format!("{name} (version {version})")).collect();
    if held.is_empty() { "-".to_owned() } else { held.join(", ") }
}

fn tpm(m: &MachineView) -> String {
    let endorsement = m.attestation.as_ref().and_then(|a| a.endorsement.as_ref());
    let approved = m.attestation.as_ref().and_then(|a| a.approved_endorsement.as_ref());
    match (endorsement, approved) {
        (Some(is), Some(was)) if is == was => format!("endorsement key {is}, as approved"),
        (Some(is), Some(was)) => format!("endorsement key {is}; approved is {was}"),
        (Some(is), None) => format!("endorsement key {is}"),
        (None, Some(was)) => format!("not proven; approved is endorsement key {was}"),
        (None, None) => "-".to_owned(),
    }
}

fn show(m: &MachineView, now_ms: i64) -> String {
    let mut text = String::new();
    let dash = || "-".to_owned();
    let identity = m.key_storage.map_or_else(dash, |k| match k {
        kiln_protocol::KeyStorage::Ephemeral => "name only (its key is new at each boot)".into(),
        kiln_protocol::KeyStorage::Tpm => "key sealed by its TPM".into(),
        kiln_protocol::KeyStorage::EfiVariable | kiln_protocol::KeyStorage::File => format!("key in {k} (weak)"),
    });
    let memory = m.rollback_memory.map_or_else(dash, |r| match r {
        kiln_protocol::RollbackMemory::None => "no rollback memory".into(),
        kiln_protocol::RollbackMemory::TpmNv
        | kiln_protocol::RollbackMemory::EfiVariable
        | kiln_protocol::RollbackMemory::File => r.to_string(),
    });
    let assigned = m.assigned.as_ref();
    let assigned =
        assigned.map_or_else(dash, |a| format!("{}/{} (sequence {}, by {})", a.image, a.release, a.sequence, a.via));
    let prefetch = m.prefetch.as_ref().map_or_else(dash, |p| {
        let how_far = match p.progress {
            _ if p.ready => "verified, ready to go".to_owned(),
            Some(f) => format!("{:.1} of {:.1} MiB", mebibytes(f.received_bytes), mebibytes(f.total_bytes)),
            None => "verifies its metadata".to_owned(),
        };
        format!("{}/{}: {how_far}", p.image, p.release)
    });
    let agent = m.agent_memory.map_or_else(dash, |a| {
        let memory = format!("{:.1} MiB of memory, {:.1} MiB at most", mebibytes(a.rss_bytes), mebibytes(a.peak_bytes));
        match a.cpu_ms {
            Some(ms) => format!("{memory}, {:.1} s of processor time", Duration::from_millis(ms).as_secs_f64()),
            None => memory,
        }
    });
    for (name, value) in [
        ("name", m.name.clone()),
        ("id", m.id.to_string()),
        ("role", m.role.clone().unwrap_or_else(dash)),
        ("state", m.state.clone()),
        ("why", m.reason.clone()),
        ("stage", format!("{} ({})", m.stage_label, ago(m.stage_since_ms, now_ms))),
        ("runs", release(m)),
        ("root hash", m.root_hash.clone().unwrap_or_else(dash)),
        ("assigned", assigned),
        ("rebuild", m.rebuild_due_ms.map_or_else(dash, |due| format!("due {}", ahead(due, now_ms)))),
        ("order", m.order.clone().unwrap_or_else(dash)),
        ("prefetch", prefetch),
        ("last good", m.last_good.as_ref().map_or_else(dash, ToString::to_string)),
        ("protection", m.protection.map_or_else(dash, |p| p.to_string())),
        ("attestation", m.attestation.as_ref().map_or_else(dash, |a| format!("{}: {}", a.state, a.reason))),
        ("secrets", secrets(m)),
        ("TPM", tpm(m)),
        ("identity", identity),
        ("key", m.key.as_ref().map_or_else(dash, ToString::to_string)),
        ("other key", m.other_key.as_ref().map_or_else(dash, ToString::to_string)),
        ("code", m.code.as_ref().map_or_else(dash, ToString::to_string)),
        ("rollback", memory),
        ("firmware", m.firmware.map_or_else(dash, |f| f.to_string())),
        ("hardware", format!("{}, serial {}", m.product, if m.serial.is_empty() { "-" } else { &m.serial })),
        ("memory", format!("{:.0} MiB", mebibytes(m.memory_bytes))),
        ("agent", agent),
        ("macs", m.macs.join(", ")),
        ("seen", ago(m.last_seen_ms, now_ms)),
        ("last words", m.last_words.clone()),
    ] {
        writeln!(text, "{name:<12} {value}").expect("writing to a String cannot fail");
    }
    text += &exec(m);
    condition(&mut text, m);
    for boot in &m.boots {
        let what = boot.image.as_ref().zip(boot.release).map_or("?".into(), |(i, r)| format!("{i}/{r}"));
        writeln!(text, "\nboot of {what} by {} at {}", boot.via, clock(boot.started_ms))
            .expect("writing to a String cannot fail");
        for s in &boot.stages {
            let after = s.at_ms - boot.started_ms;
            let message = s.message.as_deref().unwrap_or_default();
            let kind = s.kind.as_ref().map(|k| format!(" [{k}]")).unwrap_or_default();
            let row = format!(
                "  {:>4}.{:03} s  {:<28} {}{kind} {message}",
                after / 1000,
                after % 1000,
                s.stage.label(),
                s.state
            );
            writeln!(text, "{}", row.trim_end()).expect("writing to a String cannot fail");
        }
    }
    text
}

/// What its allow-list says, if it has one.
fn exec(m: &MachineView) -> String {
    let Some(exec) = &m.exec else { return String::new() };
    let guard = if exec.running { "runs" } else { "does not run" };
    let mut text = format!(
        "allow-list   the guard {guard}, replaced {} times; {} starts denied, {} only reported, {} not judged in time\n",
        exec.restarts, exec.denied, exec.reported, exec.late
    );
    if let Some(alarm) = &exec.alarm {
        writeln!(text, "guard alarm  {alarm}").expect("writing to a String cannot fail");
    }
    for violation in &exec.violations {
        writeln!(text, "  {:>5} times {}", violation.count, violation.describe())
            .expect("writing to a String cannot fail");
    }
    text
}

fn release(m: &MachineView) -> String {
    m.image.as_ref().zip(m.release).map_or_else(|| "-".into(), |(image, release)| format!("{image}/{release}"))
}

#[allow(clippy::cast_precision_loss)] // for people
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Wall-clock time of day, UTC.
fn clock(ms: i64) -> String {
    let second = ms.div_euclid(1000).rem_euclid(86_400);
    format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

pub(super) fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

pub(super) fn pretty<T: serde::Serialize>(value: &T) -> Result<String, CliError> {
    Ok(format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// A name or id as one path segment: everything that is not plainly safe is percent-encoded (RFC 3986 §2.1).
pub(super) fn segment(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, b| {
        if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.') {
            out.push(char::from(b));
        } else {
            write!(out, "%{b:02X}").expect("writing to a String cannot fail");
        }
        out
    })
}

/// What others say goes to a terminal: whatever it would obey, or would show in another order, is written as JSON writes it,
/// so that JSON stays JSON.
pub(crate) fn tame(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        let plain = matches!(c, ' '..='~' | '\n') || {
            let mut buffer = [0; 4];
            let c = c.encode_utf8(&mut buffer);
            kiln_protocol::printable(c) == *c
        };
        if plain {
            out.push(c);
        } else {
            write!(out, "\\u{:04x}", u32::from(c)).expect("writing to a String cannot fail");
        }
        out
    })
}

/// To standard output; a reader that has gone away (`| head`) ends the program quietly.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(tame(text).as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(CliError::Output),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{BootView, StageView};

    #[test]
    fn a_name_cannot_leave_its_segment() {
        assert_eq!(segment("rack-1"), "rack-1");
        assert_eq!(segment("../a b?"), "..%2Fa%20b%3F");
    }

    #[test]
    fn the_stages_shown_are_the_stages_in_order() {
        let stages = kiln_protocol::Stage::ALL.iter().map(|stage| StageView {
            stage: *stage,
            state: "done".into(),
            at_ms: 1,
            agent_ms: None,
            kind: None,
            message: None,
        });
        let boot = BootView {
            boot_id: String::new(),
            via: kiln_protocol::Via::Cold,
            image: None,
            release: None,
            started_ms: 0,
            stages: stages.collect(),
        };
        let machine = MachineView {
            id: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
            name: "rack-1".into(),
            role: None,
            state: "healthy".into(),
            reason: String::new(),
            stage: None,
            stage_label: String::new(),
            stage_since_ms: 0,
            image: None,
            release: None,
            root_hash: None,
            assigned: None,
            rebuild_due_ms: Some(3 * 86_400_000 + 5),
            order: None,
            prefetch: Some(kiln_protocol::Prefetch {
                image: "minimal".parse().unwrap(),
                release: 2,
                sequence: 2,
                ready: false,
                progress: Some(kiln_protocol::Progress { received_bytes: 12 << 20, total_bytes: 33 << 20 }),
            }),
            agent_memory: Some(kiln_protocol::AgentMemory {
                rss_bytes: 5 << 20,
                peak_bytes: 13 << 19,
                cpu_ms: Some(1210),
                ran_ms: None,
            }),
            exec: Some(kiln_protocol::ExecState { running: true, denied: 3, ..Default::default() }),
            dbx: None,
            condition: crate::view::ConditionView {
                drift: vec![kiln_protocol::Difference {
                    kind: kiln_protocol::DriftKind::Listener,
                    what: "tcp/4444".into(),
                    text: "nc (pid 7) listens on tcp/4444".into(),
                }],
                drift_count: 3,
                drift_policy: "reimage".into(),
                drift_note: Some("it is put up anew for its drift (nc)".into()),
                draining: None,
                events: vec![crate::view::EventView {
                    at_ms: 3_600_000,
                    kind: "hook".into(),
                    alarm: true,
                    text: "late".into(),
                }],
            },
            comparison: Some(kiln_fleet::Comparison {
                entry: Some("ABC1".into()),
                expected: kiln_fleet::Position { rack: "A".into(), unit: "U14".into() },
                differences: vec!["DIMM A2 missing".into(), "racked in U12, expected U14".into()],
                ..Default::default()
            }),
            acceptance: Some(kiln_fleet::AcceptanceRun {
                release: "acceptance/1".parse().unwrap(),
                boot_id: "b".into(),
                began: 0,
                at: 60_000,
                run: kiln_protocol::Acceptance {
                    done: true,
                    doing: String::new(),
                    results: vec![kiln_protocol::TestResult {
                        test: kiln_protocol::TestKind::Disk,
                        part: "disk vda".into(),
                        outcome: kiln_protocol::Outcome::Failed,
                        detail: "reading at byte 0: Input/output error".into(),
                        measures: std::collections::BTreeMap::new(),
                    }],
                },
                failures: vec!["disk vda: reading at byte 0: Input/output error".into()],
            }),
            awaits_acceptance: true,
            last_good: None,
            firmware: Some(kiln_protocol::Firmware::Bios),
            key: Some("ab".repeat(32).parse().unwrap()),
            other_key: None,
            code: None,
            key_storage: Some(kiln_protocol::KeyStorage::Ephemeral),
            rollback_memory: Some(kiln_protocol::RollbackMemory::None),
            protection: None,
            secrets: kiln_protocol::SecretVersions::new(),
            attestation: None,
            product: String::new(),
            serial: String::new(),
            macs: Vec::new(),
            memory_bytes: 0,
            last_words: String::new(),
            last_seen_ms: 0,
            boots: vec![boot],
        };
        let text = show(&machine, 0);
        assert!(text.contains("name only") && text.contains("no rollback memory"), "{text}");
        assert!(text.contains(&format!("\nkey          {}\n", "ab".repeat(32))), "{text}");
        assert!(text.contains("\nprefetch     minimal/2: 12.0 of 33.0 MiB\n"), "{text}");
        assert!(text.contains("\nrebuild      due in 3 d\n"), "{text}");
        assert!(
            text.contains("\nagent        5.0 MiB of memory, 6.5 MiB at most, 1.2 s of processor time\n"),
            "{text}"
        );
        let guard =
            "\nallow-list   the guard runs, replaced 0 times; 3 starts denied, 0 only reported, 0 not judged in time\n";
        assert!(text.contains(guard), "{text}");
        assert!(
            text.contains("\ndrift        nc (pid 7) listens on tcp/4444 [listener]\n             and 2 more\non drift     reimage: it is put up anew for its drift (nc)\n"),
            "{text}"
        );
        assert!(text.contains("\nevents       01:00:00 ! hook: late\n"), "{text}");
        let listed = "\nexpected     ABC1\nplace        rack A U14\ndiffers      DIMM A2 missing\n             racked in U12, expected U14\n";
        assert!(text.contains(listed), "{text}");
        assert!(
            list(std::slice::from_ref(&machine), 0).contains("healthy, drift 3, not as expected 2, acceptance failed")
        );
        let tested = "\nacceptance   failed on acceptance/1 at 00:01:00\n             failed disk vda: reading at byte 0: Input/output error\nno pass      disk vda:";
        assert!(text.contains(tested), "{text}");
        let rows: Vec<&str> = text.lines().filter(|l| l.trim_end().ends_with(" done")).collect();
        let labels: Vec<&str> = kiln_protocol::Stage::ALL.iter().map(|s| s.label()).collect();
        assert_eq!(rows.len(), labels.len(), "{text}");
        assert!(rows.iter().zip(&labels).all(|(row, label)| row.contains(label)), "{text}");
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown_and_json_stays_json() {
        let evil = "a\x1b[2J\r\n\u{9b}31m\u{202e}b\u{7f}é";
        let text = tame(evil);
        assert_eq!(text, "a\\u001b[2J\\u000d\n\\u009b31m\\u202eb\\u007fé");
        let json = tame(&serde_json::to_string(evil).unwrap());
        assert!(!json.chars().any(|c| c.is_control() || c == '\u{202e}'), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), evil);
    }

    #[test]
    fn events_of_other_kinds_are_passed_over() {
        assert!(views("event: later\ndata: {}\n\n").unwrap().is_empty());
        assert!(views("event: machine\ndata: nonsense\n\n").is_err());
        assert!(views(": comment\n\n").unwrap().is_empty());
    }
}
