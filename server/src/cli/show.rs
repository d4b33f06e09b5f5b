//! A machine as `kiln machine list`, `show` and `watch` print it.

use super::table::{ago, ahead, table};
use crate::view::MachineView;
use std::fmt::Write as _;
use std::time::Duration;

/// One line for one change.
pub(super) fn line(m: &MachineView) -> String {
    let time = clock(m.last_seen_ms);
    let release = release(m);
    format!("{time}  {:<16} {:<12} {:<28} {release:<14} {}\n", m.name, m.state, m.stage_label, m.last_words)
}

pub(super) fn list(machines: &[MachineView], now_ms: i64) -> String {
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
                m.protection_words.clone(),
                ago(m.last_seen_ms, now_ms),
                m.last_words.clone(),
            ]
        })
        .collect();
    table(&["NAME", "STATE", "STAGE", "RELEASE", "ASSIGNED", "PROTECTION", "SEEN", "LAST WORDS"], &rows)
}

/// Its state, that its metadata has expired, and that it differs from its release, or from what was expected.
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
    let stale = if m.stale.is_some() { ", stale" } else { "" };
    format!("{}{stale}{drift}{listed}{tests}", m.state)
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

fn other_keys(m: &MachineView) -> String {
    let keys: Vec<String> = m.other_keys.iter().map(ToString::to_string).collect();
    if keys.is_empty() { "-".to_owned() } else { keys.join(", ") }
}

fn secrets(m: &MachineView) -> String {
    let held: Vec<String> = m.secrets.iter().map(|(name, version)| format!("{name} (version {version})")).collect();
    if held.is_empty() { "-".to_owned() } else { held.join(", ") }
}

fn certificate(m: &MachineView, now_ms: i64) -> String {
    let Some(certificate) = &m.certificate else { return "-".to_owned() };
    let words = format!("serial {}, over {}", certificate.serial, ahead(certificate.expires_ms, now_ms));
    match &certificate.revoked {
        None => words,
        Some(why) => format!("{words}; revoked: {why}"),
    }
}

/// What `kiln trust secureboot enroll --allow` takes.
fn option_roms(m: &MachineView) -> String {
    match m.attestation.as_ref().and_then(|a| a.option_roms.as_deref()) {
        None => "-".to_owned(),
        Some([]) => "none".to_owned(),
        Some(roms) => roms.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
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

pub(super) fn show(m: &MachineView, now_ms: i64) -> String {
    let mut text = String::new();
    let dash = || "-".to_owned();
    let identity = m.key_storage.map_or_else(dash, |k| match (k, &m.position) {
        (kiln_protocol::KeyStorage::Ephemeral, Some(place)) => {
            format!("position: heard at {place} at each boot (its key is new each time)")
        }
        (kiln_protocol::KeyStorage::Ephemeral, None) => "name only (its key is new at each boot)".into(),
        (kiln_protocol::KeyStorage::Tpm, _) => "key sealed by its TPM".into(),
        (kiln_protocol::KeyStorage::EfiVariable | kiln_protocol::KeyStorage::File, _) => format!("key in {k} (weak)"),
    });
    let memory = m.rollback_memory.map_or_else(dash, |r| match r {
        kiln_protocol::RollbackMemory::None => "no rollback memory".into(),
        kiln_protocol::RollbackMemory::TpmNv
        | kiln_protocol::RollbackMemory::EfiVariable
        | kiln_protocol::RollbackMemory::File => r.to_string(),
    });
    let assigned = m.assigned.as_ref();
    let assigned = assigned.map_or_else(dash, |a| {
        let chosen = if a.auto { ", which the server chose" } else { "" };
        format!("{}/{} (sequence {}, by {}{chosen})", a.image, a.release, a.sequence, a.via)
    });
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
        ("stale", m.stale.as_ref().map_or_else(dash, kiln_protocol::Stale::words)),
        ("rebuild", m.rebuild_due_ms.map_or_else(dash, |due| format!("due {}", ahead(due, now_ms)))),
        ("order", m.order.clone().unwrap_or_else(dash)),
        ("prefetch", prefetch),
        ("last good", m.last_good.as_ref().map_or_else(dash, ToString::to_string)),
        ("protection", m.protection_words.clone()),
        ("attestation", m.attestation.as_ref().map_or_else(dash, |a| format!("{}: {}", a.state, a.reason))),
        ("secrets", secrets(m)),
        ("certificate", certificate(m, now_ms)),
        ("TPM", tpm(m)),
        ("option ROMs", option_roms(m)),
        ("identity", identity),
        ("key", m.key.as_ref().map_or_else(dash, ToString::to_string)),
        ("other key", other_keys(m)),
        ("code", m.code.as_ref().map_or_else(dash, ToString::to_string)),
        ("rollback", memory),
        ("firmware", m.firmware.map_or_else(dash, |f| f.to_string())),
        ("hardware", format!("{}, serial {}", m.product, if m.serial.is_empty() { "-" } else { &m.serial })),
        ("class", m.class.clone().unwrap_or_else(dash)),
        ("memory", format!("{:.0} MiB", mebibytes(m.memory_bytes))),
        ("agent", agent),
        ("macs", m.macs.join(", ")),
        ("seen", ago(m.last_seen_ms, now_ms)),
        ("last words", m.last_words.clone()),
    ] {
        writeln!(text, "{name:<12} {value}").expect("writing to a String cannot fail");
    }
    text += &m.other_keys_note.as_ref().map_or_else(String::new, |note| format!("{:<12} {note}\n", "other key:"));
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

pub(super) fn release(m: &MachineView) -> String {
    m.image.as_ref().zip(m.release).map_or_else(|| "-".into(), |(image, release)| format!("{image}/{release}"))
}

#[allow(clippy::cast_precision_loss)] // for people
pub(super) fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Wall-clock time of day, UTC.
fn clock(ms: i64) -> String {
    let second = ms.div_euclid(1000).rem_euclid(86_400);
    format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{AttestationView, BootView, StageView, protection_words};

    fn machine(boots: Vec<BootView>) -> MachineView {
        MachineView {
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
            stale: None,
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
            needs: Vec::new(),
            firmware: Some(kiln_protocol::Firmware::Bios),
            class: None,
            key: Some("ab".repeat(32).parse().unwrap()),
            other_key: None,
            other_keys: Vec::new(),
            other_keys_note: None,
            code: None,
            key_storage: Some(kiln_protocol::KeyStorage::Ephemeral),
            position: None,
            rollback_memory: Some(kiln_protocol::RollbackMemory::None),
            protection: None,
            protection_words: "-".into(),
            secrets: kiln_protocol::SecretVersions::new(),
            certificate: Some(crate::view::CertificateView {
                serial: "4a".repeat(16),
                issued_ms: 0,
                expires_ms: 86_400_005,
                revoked: Some("its machine is out of service".into()),
            }),
            attestation: None,
            product: String::new(),
            serial: String::new(),
            macs: Vec::new(),
            memory_bytes: 0,
            last_words: String::new(),
            last_seen_ms: 0,
            boots,
        }
    }

    #[test]
    fn what_a_boot_can_promise_is_in_the_list_and_below_it() {
        use kiln_protocol::{AttestationState as State, ProtectionClass as Class};
        let of = |name: &str, class, state, carried| {
            let proof = AttestationView {
                state,
                reason: "why".into(),
                carried,
                at_ms: None,
                endorsement: None,
                option_roms: None,
                approved_endorsement: None,
            };
            let protection_words = protection_words(Some(class), Some(&proof));
            let (protection, attestation) = (Some(class), Some(proof));
            MachineView { name: name.into(), protection, protection_words, attestation, ..machine(vec![]) }
        };
        let expected = ["attested", "attested, by kexec", "enforced, unattested", "unprotected, no-tpm"];
        let failed = "unprotected, attestation failed";
        let all = [
            of("rack-1", Class::Attested, State::Attested, false),
            of("rack-2", Class::Attested, State::Attested, true),
            of("rack-3", Class::Enforced, State::Unattested, false),
            of("rack-4", Class::Unprotected, State::NoTpm, false),
            of("rack-5", Class::Unprotected, State::Failed, false),
        ];
        let text = list(&all, 0);
        for (machine, words) in all.iter().zip(expected.into_iter().chain([failed])) {
            let row = text.lines().find(|row| row.starts_with(&machine.name)).unwrap();
            assert!(row.contains(&format!("  {words}  ")), "{words}: {row}");
            let shown = show(machine, 0);
            assert!(shown.contains(&format!("\nprotection   {words}\n")), "{shown}");
        }
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
        let machine = machine(vec![boot]);
        let text = show(&machine, 0);
        assert!(text.contains("name only") && text.contains("no rollback memory"), "{text}");
        assert!(text.contains(&format!("\nkey          {}\n", "ab".repeat(32))), "{text}");
        assert!(text.contains("\nprefetch     minimal/2: 12.0 of 33.0 MiB\n"), "{text}");
        assert!(text.contains("\nrebuild      due in 3 d\n"), "{text}");
        let certificate = format!("serial {}, over in 24 h; revoked: its machine is out of service\n", "4a".repeat(16));
        assert!(text.contains(&format!("\ncertificate  {certificate}")), "{text}");
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
        assert!(text.contains("\nstale        -\n"), "{text}");
        let stale =
            kiln_protocol::Stale { file: "targets.json".into(), expires: "2026-01-01T00:00:00Z".parse().unwrap() };
        let stale = MachineView { stale: Some(stale), ..machine.clone() };
        assert!(show(&stale, 0).contains("\nstale        targets.json expired at 2026-01-01T00:00:00Z; it goes to no"));
        assert!(list(&[stale], 0).contains("healthy, stale, drift 3"));
        let tested = "\nacceptance   failed on acceptance/1 at 00:01:00\n             failed disk vda: reading at byte 0: Input/output error\nno pass      disk vda:";
        assert!(text.contains(tested), "{text}");
        let rows: Vec<&str> = text.lines().filter(|l| l.trim_end().ends_with(" done")).collect();
        let labels: Vec<&str> = kiln_protocol::Stage::ALL.iter().map(|s| s.label()).collect();
        assert_eq!(rows.len(), labels.len(), "{text}");
        assert!(rows.iter().zip(&labels).all(|(row, label)| row.contains(label)), "{text}");
    }
}
