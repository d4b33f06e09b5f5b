//! A disk that never answers a read. The machine comes up without it and names it; nothing waits for it, also not the way
//! out: the kernel cannot shut such a disk down, and is reset.
//!
//! Firmware reads disks too, and OVMF waits for them for ever: they hang from the agent's first line on. Before QEMU resets
//! a device it waits for what is under way, so what is held is given up when the machine is reset, as a real controller
//! would.

use crate::support::on_disk;
use kiln_lab::api::MachineView;
use kiln_lab::console::{Console, Mark};
use kiln_lab::machine::{Disk, MachineSpec};
use kiln_lab::nbd::{Fault, Nbd};
use kiln_lab::rack::{IDLE, Rack};
use kiln_lab::testing;
use kiln_protocol::Stage;
use std::sync::Arc;

const NAME: &str = "rack-1";

fn power_on(rack: &mut Rack) -> Arc<Console> {
    rack.machine(NAME).power_on().unwrap();
    rack.machine(NAME).console().unwrap().clone()
}

/// From the first line of this release's agent on. Comes back once a read hangs.
fn hangs(disk: &Nbd, console: &Console, begun: Mark, release: u64) {
    console.wait_for_line(&format!("image disk release {release}"), begun, IDLE).unwrap();
    disk.set_fault(Fault::HoldReads);
    disk.wait_held(IDLE).unwrap();
}

/// Its newest boot says by typed reasons which disk gave no answer, to its driver and to the agent.
fn names(view: &MachineView, disk: &str) -> bool {
    let said = |kind: &str, words: &str| {
        view.boot().is_some_and(|boot| {
            boot.stages.iter().any(|stage| {
                stage.kind.as_deref() == Some(kind) && stage.message.as_ref().is_some_and(|said| said.contains(words))
            })
        })
    };
    said("disk-io-error", &format!("{disk}: looking at it: no answer within 20 s"))
        && said("machine-driver-silent", "disk virtio")
}

/// It leaves, its kernel hangs in that, and it is reset. `disk` answers again while firmware reads it.
fn is_reset(rack: &mut Rack, disk: &Nbd, console: &Console, (resets, begun): (usize, Mark)) -> Mark {
    // systemd waits for what hangs first, twice 90 s without a word.
    console.wait_for("sysrq: Resetting", begun, 4 * IDLE).unwrap();
    let reset = console.mark();
    disk.set_fault(Fault::None);
    disk.give_up_reads();
    rack.machine(NAME).wait_reset(resets, IDLE).unwrap();
    reset
}

/// The disk that hangs is the first one; Kiln's is behind it. Then to another release: a kexec is asked for, refused, and it goes by a cold
/// boot.
#[test]
#[ignore = "slow: an install, two boots, and a shutdown that hangs; make test-slow"]
fn a_disk_that_hangs_beside_the_machines_own_holds_nothing_up() {
    testing::rack(|paths| {
        let spec = MachineSpec { disks: vec![Disk::VirtioBlk, Disk::VirtioBlk], ..on_disk::spec() };
        let mut rack = on_disk::rack_of(paths, "disk-hangs-beside", spec);
        let disk = rack.machine(NAME).hold_disk(0).unwrap();
        // So that the second one is taken.
        disk.set_fault(Fault::Reads);
        let console = power_on(&mut rack);
        rack.wait_healthy(NAME, 1).unwrap();
        console.wait_for("is healthy: vdb: A Good disk/1", Mark::default(), IDLE).unwrap();
        let told = |v: &MachineView| v.failures().contains(&"disk-io-error");
        rack.wait(NAME, "told of the disk that fails beside its own", told).unwrap();
        rack.machine(NAME).power_off();

        disk.set_fault(Fault::None);
        let console = power_on(&mut rack);
        hangs(&disk, &console, Mark::default(), 1);
        console.wait_for("is healthy: vdb: A Good disk/1", Mark::default(), IDLE).unwrap();
        rack.wait(NAME, "healthy, and says what hangs", |v| v.is_healthy_on(1) && names(v, "vda")).unwrap();
        let said = console.since(Mark::default());
        assert!(said.contains("vda: looking at it: no answer within 20 s"), "{said}");
        assert!(!said.contains("Start PXE"), "its own disk started it");

        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        let before = (rack.machine(NAME).resets(), console.mark());
        rack.kiln(&["assign", NAME, "disk/2", "--via", "kexec"]).unwrap();
        let refused = |v: &MachineView| v.failures().contains(&"kexec-disk-hangs");
        let view = rack.wait(NAME, "told why it goes by no kexec", refused).unwrap();
        // What waits for the disk is the agent's own.
        let drift = view.condition.drift;
        assert!(!drift.iter().any(|difference| difference.what.contains("(deleted)")), "{drift:?}");
        let reset = is_reset(&mut rack, &disk, &console, before);
        hangs(&disk, &console, reset, 2);
        rack.wait(NAME, "healthy on 2, and says what hangs", |v| v.is_healthy_on(2) && names(v, "vda")).unwrap();
        console.wait_for("disk/2 is healthy: vdb: A Good disk/1, B Good disk/2", reset, IDLE).unwrap();
    });
}

/// The release runs in memory, each time, and is left by a cold boot.
#[test]
#[ignore = "slow: two boots, and a shutdown that hangs; make test-slow"]
fn a_machine_whose_only_disk_hangs_runs_in_memory() {
    testing::rack(|paths| {
        let mut rack = on_disk::rack(paths, "disk-hangs");
        let disk = rack.machine(NAME).hold_disk(0).unwrap();
        let console = power_on(&mut rack);
        hangs(&disk, &console, Mark::default(), 1);
        rack.wait(NAME, "healthy, and says what hangs", |v| v.is_healthy_on(1) && names(v, "vda")).unwrap();
        assert!(!console.since(Mark::default()).contains("is partitioned"), "nothing is written to it");

        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        let before = (rack.machine(NAME).resets(), console.mark());
        rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
        let reset = is_reset(&mut rack, &disk, &console, before);
        hangs(&disk, &console, reset, 2);
        rack.wait(NAME, "healthy on 2, and says what hangs", |v| v.is_healthy_on(2) && names(v, "vda")).unwrap();
    });
}

/// Off and on again, and held up by its disk in the agent of release 1, while release 2 is assigned to it. Gives back what the agent
/// said of the way there.
fn is_sent_on(rack: &mut Rack, disk: &Nbd) -> (Arc<Console>, String) {
    rack.kiln(&["release", "publish", "disk/2"]).unwrap();
    rack.machine(NAME).power_off();
    disk.set_fault(Fault::None);
    disk.give_up_reads();
    let console = power_on(rack);
    hangs(disk, &console, Mark::default(), 1);
    rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
    let going = "disk/2 is assigned, this is disk/1: going there";
    console.wait_for_line(going, Mark::default(), IDLE).unwrap();
    let said = console.since(Mark::default());
    let line = said.lines().find(|line| line.contains(going)).unwrap().trim_end().to_owned();
    (console, line)
}

/// The firmware would start release 1 again, and that would find the same disk.
#[test]
#[ignore = "slow: an install, and a boot from a disk that hangs; make test-slow"]
fn a_machine_that_its_own_disk_started_goes_on_by_kexec_only_where_that_hangs() {
    testing::rack(|paths| {
        let mut rack = on_disk::rack(paths, "disk-hangs-own");
        let disk = rack.machine(NAME).hold_disk(0).unwrap();
        on_disk::installed(&mut rack);
        let (console, line) = is_sent_on(&mut rack, &disk);
        assert!(!console.since(Mark::default()).contains("Start PXE"), "its own disk started it");
        assert!(line.ends_with(": going there, by kexec only"), "{line}");
    });
}

/// The network started release 1, and leads on to what is assigned: nothing of release 1 starts.
#[test]
#[ignore = "slow: three boots, and a restart that hangs; make test-slow"]
fn a_machine_that_the_network_started_goes_on_by_it_where_its_disk_hangs() {
    testing::rack(|paths| {
        let mut rack = on_disk::rack(paths, "disk-hangs-network");
        let disk = rack.machine(NAME).hold_disk(0).unwrap();
        let console = power_on(&mut rack);
        hangs(&disk, &console, Mark::default(), 1);
        rack.wait_healthy(NAME, 1).unwrap();
        let (console, line) = is_sent_on(&mut rack, &disk);
        assert!(line.ends_with(": going there"), "{line}");
        // Its kernel waits for the disk, and is reset.
        let before = (rack.machine(NAME).resets(), Mark::default());
        let reset = is_reset(&mut rack, &disk, &console, before);
        assert!(!console.since(Mark::default()).contains(Stage::Handover.label()), "release 1 did not start");
        hangs(&disk, &console, reset, 2);
        rack.wait_healthy(NAME, 2).unwrap();
    });
}

/// It answers reads and takes nothing any more: the boot from its slot is not counted, the hand-over waits for nobody, and the
/// machine is healthy and says so for as long as it runs.
#[test]
#[ignore = "slow: an install, and a boot from a disk whose writes hang; make test-slow"]
fn a_machine_whose_own_disk_hangs_on_writes_starts_from_it_all_the_same() {
    testing::rack(|paths| {
        let mut rack = on_disk::rack(paths, "disk-hangs-writing");
        let disk = rack.machine(NAME).hold_disk(0).unwrap();
        let console = power_on(&mut rack);
        rack.wait_healthy(NAME, 1).unwrap();
        console.wait_for("is healthy: vda: A Good disk/1", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();

        let console = power_on(&mut rack);
        console.wait_for_line("image disk release 1", Mark::default(), IDLE).unwrap();
        disk.set_fault(Fault::HoldWrites);
        disk.wait_held(IDLE).unwrap();
        let not_counted = "the start is not counted: vda: counting the start: no answer within 20 s";
        console.wait_for(not_counted, Mark::default(), IDLE).unwrap();
        // Its init runs, and its service goes on without the slots, and says so.
        console.wait_for("vda: opening it: no answer within 60 s", Mark::default(), IDLE).unwrap();
        let told = |v: &MachineView| v.is_healthy_on(1) && v.failures().contains(&"disk-io-error");
        rack.wait(NAME, "healthy from its slot, and says what hangs", told).unwrap();
        assert!(!console.since(Mark::default()).contains("Start PXE"), "its own disk started it");
    });
}
