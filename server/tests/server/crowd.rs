//! A flood of made-up machines: real ones are shown all the same, and the store is not written without end.

use crate::common::*;
use futures_util::future::join_all;
use kiln_netboot::{BootKind, BootQuery};
use kiln_protocol::*;
use kiln_server::control::{Control, MAX_DISCOVERED, Told};
use kiln_server::error::ControlError;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

fn query(id: MachineId, n: usize) -> BootQuery {
    let mac = n.to_be_bytes();
    BootQuery {
        id: Some(id),
        id_plain: None,
        mac: format!("02:00:00:{:02x}:{:02x}:{:02x}", mac[5], mac[6], mac[7]).parse().unwrap(),
        arch: Architecture::X86_64,
        firmware: Firmware::Uefi,
        kind: BootKind::UefiPxe,
    }
}

fn made_up(n: usize) -> BootQuery {
    query(format!("ffffffff-0000-0000-0000-{n:012x}").parse().unwrap(), n)
}

async fn flood(control: &Control, numbers: std::ops::Range<usize>) {
    let packets: Vec<BootQuery> = numbers.map(made_up).collect();
    for result in join_all(packets.iter().map(|packet| control.asked(packet))).await {
        result.unwrap();
    }
}

fn known(control: &Control) -> BTreeSet<MachineId> {
    control.views().into_iter().map(|view| view.id).collect()
}

/// Repeats a packet, as firmware does, until it is shown.
async fn until_shown(control: &Control, packet: &BootQuery) {
    let begun = Instant::now();
    while !known(control).contains(packet.id.as_ref().unwrap()) {
        control.asked(packet).await.unwrap();
        assert!(begun.elapsed() < PATIENCE, "it is never shown");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_flood_of_packets_hides_no_machine_and_is_written_at_a_bounded_rate() {
    let site = TestSite::new();
    let (control, _stop) = control(&site).await;
    // A listed machine is heard first, so that it is the oldest of all.
    control.asked(&query(machine_id(1), 1_000_001)).await.unwrap();
    let begun = Instant::now();
    flood(&control, 0..MAX_DISCOVERED).await;
    assert_eq!(known(&control).len(), MAX_DISCOVERED + 1, "a rack that is switched on is shown at once");

    // The flood goes on: so many a second at most come in, each for the one that is silent for longest.
    let before = known(&control);
    flood(&control, MAX_DISCOVERED..40_000).await;
    let new = known(&control).difference(&before).count();
    let most = 50 * (usize::try_from(begun.elapsed().as_secs()).unwrap() + 1);
    assert!(new <= most, "{new} came in, {most} at most");
    assert_eq!(known(&control).len(), MAX_DISCOVERED + 1);

    // A machine that nobody listed is shown when its firmware asks, though perhaps not at once.
    let real = query(machine_id(9), 1_000_009);
    until_shown(&control, &real).await;
    // And whatever is sent, from its agent's first report on it stays.
    let mut agent = Agent::new(9, &site.manifest(1));
    control.report(agent.key_id(), agent.report()).await.unwrap();
    let mut fresh = Agent::new(10, &site.manifest(1));
    control.report(fresh.key_id(), fresh.report()).await.unwrap();
    for n in 0..200 {
        until_shown(&control, &made_up(50_000 + n)).await;
    }
    let now = known(&control);
    assert!(now.contains(&machine_id(9)) && now.contains(&machine_id(10)), "those that reported stay");
    assert!(now.contains(&machine_id(1)), "what is listed is not forgotten, however long ago it was heard");
    assert!(!now.contains(made_up(0).id.as_ref().unwrap()), "the one that was silent for longest went");
    assert_eq!(now.len(), MAX_DISCOVERED + 1);
    // What is shown is what is stored.
    let stored: BTreeSet<MachineId> = control.store.load().await.unwrap().into_keys().collect();
    assert_eq!(stored, now);
}

#[tokio::test]
async fn a_flood_of_reports_is_refused_and_keeps_no_listed_machine_out() {
    let site = TestSite::new();
    let (control, _stop) = control(&site).await;
    let key = Agent::new(1, &site.manifest(1)).key_id();
    let mut report = Agent::new(9, &site.manifest(1)).report();
    report.machine.macs.clear();
    let reports = (0..MAX_DISCOVERED).map(|n| {
        let mut report = report.clone();
        report.machine.id = made_up(n).id.unwrap();
        control.report(key.clone(), report)
    });
    for result in join_all(reports).await {
        result.unwrap();
    }
    // All of them speak: nobody gives way, for packets neither.
    let mut stranger = Agent::new(9, &site.manifest(1));
    let refused = control.report(stranger.key_id(), stranger.report()).await.unwrap_err();
    assert!(matches!(refused, ControlError::TooManyUnknown), "{refused}");
    control.asked(&query(machine_id(9), 1_000_009)).await.unwrap();
    assert!(!known(&control).contains(&machine_id(9)));
    let mut listed = Agent::new(1, &site.manifest(1));
    let report = listed.healthy();
    control.report(listed.key_id(), report).await.unwrap();
    assert_eq!(control.view("rack-1").unwrap().state, "healthy");
}

/// Firmware that gives the bytes of its UUID in another order asks as a machine of its own, until its agent reports.
#[tokio::test]
async fn a_machine_that_its_firmware_named_otherwise_is_one_machine_and_watchers_hear_that_the_other_is_gone() {
    let site = TestSite::new();
    let (control, _stop) = control(&site).await;
    let mut agent = Agent::new(9, &site.manifest(1));
    let report = agent.report();
    let packet = BootQuery { mac: report.machine.macs[0].parse().unwrap(), ..made_up(1) };
    control.asked(&packet).await.unwrap();
    let ghost = packet.id.unwrap();
    assert_eq!(known(&control), [ghost.clone()].into());
    let mut watch = control.watch();
    control.report(agent.key_id(), report).await.unwrap();
    assert_eq!(known(&control), [machine_id(9)].into());
    let mut told = Vec::new();
    while let Ok(news) = watch.try_recv() {
        told.push(match news {
            Told::Machine(view) => (view.id.clone(), true),
            Told::Gone(id) => (id, false),
        });
    }
    assert!(told.contains(&(machine_id(9), true)) && told.last() == Some(&(ghost, false)), "{told:?}");
}
