//! `kiln machine inventory`: what a machine is made of, and what changed.

use super::At;
use super::client::Client;
use super::error::CliError;
use super::output::{print, segment};
use super::table::{ago, table};
use crate::view::HardwareView;
use kiln_protocol::{binary_size, decimal_size, speed};
use std::fmt::Write;

pub(super) async fn inventory(machine: &str, at: &At, json: bool, now_ms: i64) -> Result<(), CliError> {
    let path = format!("machines/{}/inventory", segment(machine));
    let view: HardwareView = Client::new(at)?.get(&path).await?;
    print(&if json { serde_json::to_string_pretty(&view)? + "\n" } else { shown(&view, now_ms) })
}

/// `, firmware 9.20`; nothing where nobody says it.
fn firmware(version: &str) -> String {
    if version.is_empty() { String::new() } else { format!(", firmware {version}") }
}

fn shown(view: &HardwareView, now_ms: i64) -> String {
    let i = &view.inventory;
    let mut rows = Vec::new();
    let mut row = |what: &str, place: &str, words: String| rows.push(vec![what.to_owned(), place.to_owned(), words]);
    row("system", "", format!("{} {}, serial {}", i.system.manufacturer, i.system.product, i.system.serial));
    row("firmware", "", format!("{} {} {}", i.firmware.vendor, i.firmware.version, i.firmware.date));
    for c in &i.cpus {
        row("cpu", &c.socket, format!("{}, {} cores, {} threads", c.model, c.cores, c.threads));
    }
    for d in &i.dimms {
        let words = match d.bytes {
            0 => "empty".to_owned(),
            bytes => format!("{} {} {} {} {}", binary_size(bytes), d.kind, d.manufacturer, d.part, d.serial),
        };
        row("dimm", &d.slot, words);
    }
    for d in &i.disks {
        let health = match &d.health {
            None => String::new(),
            Some(health) if health.passed => format!(", healthy {}", health.detail),
            Some(health) => format!(", EXPECTS TO FAIL: {}", health.detail),
        };
        let what = format!("{} {} {} {}", decimal_size(d.bytes), d.transport, d.model, d.serial);
        let driver = if d.driver.is_empty() { String::new() } else { format!(", driver {}", d.driver) };
        row("disk", &d.name, format!("{what}{driver}{}{health}", firmware(&d.firmware)));
    }
    for n in &i.nics {
        let link = match n.carrier {
            Some(true) => format!("link {}", speed(n.mbps)),
            Some(false) => "no link".to_owned(),
            None => "down".to_owned(),
        };
        let neighbour = n.neighbour.as_ref().map_or(String::new(), |n| format!(", at {}", n.place()));
        row("nic", &n.name, format!("{} {} {link}{}{neighbour}", n.mac, n.driver, firmware(&n.firmware)));
    }
    // Without an address: why.
    let bmc = if i.bmc.address.is_empty() { &i.bmc.note } else { &i.bmc.address };
    row("bmc", "", format!("{bmc}{}", firmware(&i.bmc.firmware)));
    row("tpm", "", i.tpm.as_ref().map_or("none".to_owned(), |tpm| format!("version {}", tpm.version)));
    for u in &i.unread {
        row("unread", &u.section, u.reason.clone());
    }
    for row in &mut rows {
        row[2] = row[2].split_whitespace().collect::<Vec<_>>().join(" ");
    }
    let mut text = format!("{}: {}, said {}\n\n", view.name, view.summary, ago(view.taken_ms, now_ms));
    text.push_str(&table(&["what", "where", ""], &rows));
    for event in &view.events {
        let mark = if event.warn { "! " } else { "  " };
        let _ = writeln!(text, "{mark}{}: {}", ago(event.at_ms, now_ms), event.text);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::HardwareEventView;
    use kiln_protocol::{Dimm, Disk, DiskHealth, Inventory};

    #[test]
    fn what_fails_and_what_went_is_seen() {
        let health = Some(DiskHealth { passed: false, detail: "spare below its threshold".into() });
        let disk = Disk {
            name: "nvme0n1".into(),
            bytes: 960_000_000_000,
            serial: "S1".into(),
            driver: "nvme".into(),
            firmware: "GDC5602Q".into(),
            health,
            ..Disk::default()
        };
        let dimm = Dimm { slot: "A2".into(), ..Dimm::default() };
        let view = HardwareView {
            machine: "00000000-0000-0000-0000-000000000001".parse().unwrap(),
            name: "rack-1".into(),
            taken_ms: 1_000,
            boot_id: "b".into(),
            summary: "1 disk".into(),
            inventory: Inventory { disks: vec![disk], dimms: vec![dimm], ..Inventory::default() },
            events: vec![HardwareEventView { at_ms: 1_000, warn: true, text: "DIMM A2 gone".into() }],
        };
        let text = shown(&view, 61_000);
        for line in [
            "rack-1: 1 disk, said 60 s ago\n",
            "960 GB S1, driver nvme, firmware GDC5602Q, EXPECTS TO FAIL: spare below its threshold\n",
            "! 60 s ago: DIMM A2 gone\n",
        ] {
            assert!(text.contains(line), "{line:?} in {text}");
        }
        assert!(text.lines().any(|l| l.starts_with("dimm") && l.ends_with("empty")), "{text}");
    }
}
