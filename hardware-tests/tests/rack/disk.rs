//! Disk mode with real firmware, the real boot loader and a real disk. The decisions and every cut write are shown by
//! the agent's own tests (`agent/protocol/tests/slots.rs`, `agent/src/disk/tests.rs`); here is what only firmware can
//! show.

use crate::support::on_disk::{installed, installed_as, rack, reimaged_and_alone};
use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::Disk;
use kiln_lab::nbd::Fault;
use kiln_lab::rack::{IDLE, Rack};
use kiln_lab::server::NETWORK_FIRST;
use kiln_lab::site::{OTHER_LOADER, OTHER_PREFETCH_RATE};
use kiln_lab::{command, site, testing};
use kiln_protocol::Stage;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const NAME: &str = "rack-1";
/// Where slot A begins: 1 MiB, and the 128 MiB that the recipe gives the EFI system partition.
pub const SLOT_A: u64 = 129 << 20;

/// A machine with a blank disk installs itself over the network; it comes up from its disk after a power cut with the
/// boot server gone, and with the whole network gone, which its service finds when it is back; a reimage goes to the other slot through the loader; and a trial whose root is overwritten on the
/// disk is left for the release before, by itself, with the boot server gone.
#[test]
#[ignore = "slow: an install, four boots from the disk and a fall-back; make test-slow"]
fn a_machine_lives_on_its_disk() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk");
        installed(&mut rack);

        // The power is cut and the boot server is gone.
        rack.machine(NAME).power_off();
        rack.kill_server();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let begun = console.mark();
        console.wait_for("the release in the slot starts", begun, IDLE).unwrap();
        console.wait_for("disk/1 is healthy: vda: A Good disk/1", begun, IDLE).unwrap();
        rack.start_server().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();

        // No packet comes through at all: not even an address. It is heard of once there is a network again.
        let before = boot_id(rack.view(NAME).as_ref());
        rack.machine(NAME).power_off();
        rack.machine(NAME).set_connected(false).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("the release in the slot starts", Mark::default(), IDLE).unwrap();
        console.wait_for("disk/1 is healthy: vda: A Good disk/1", Mark::default(), IDLE).unwrap();
        assert!(console.since(Mark::default()).contains("no DHCP offer on"), "{}", console.last_words(40));
        assert_eq!(boot_id(rack.view(NAME).as_ref()), before, "the server has not heard of this boot");
        rack.machine(NAME).set_connected(true).unwrap();
        rack.wait(NAME, "heard of again", |v| boot_id(Some(v)) != before && v.is_healthy_on(1)).unwrap();

        // Into the other slot, and there through the loader.
        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        let (resets, begun) = (rack.machine(NAME).resets(), console.mark());
        rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
        let view = rack.wait_healthy(NAME, 2).unwrap();
        let manifest = site::manifest_of(&rack.site, site::DISK, 2).unwrap();
        assert_eq!(view.root_hash.as_deref(), manifest["verity"]["root_hash"].as_str(), "read from inside the machine");
        assert!(rack.machine(NAME).resets() > resets, "it went through firmware");
        console.wait_for("disk/2 is healthy: vda: A Good disk/1, B Good disk/2", begun, IDLE).unwrap();
        let said = console.since(begun);
        assert!(said.contains("A Good disk/1, B Trial disk/2"), "the loader counted its start");
        assert!(!said.contains("Start PXE"), "the disk comes first in the boot order");

        // The next trial's root is overwritten while the power is off, and the boot server is gone.
        let resets = rack.machine(NAME).resets();
        rack.kiln(&["assign", NAME, "disk/1", "--via", "cold"]).unwrap();
        rack.machine(NAME).wait_reset(resets, IDLE).unwrap();
        rack.machine(NAME).power_off();
        rack.kill_server();
        let disk = std::fs::File::options().write(true).open(rack.machine(NAME).disk(0)).unwrap();
        disk.write_all_at(&[0x5a; 64 << 10], SLOT_A).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let begun = console.mark();
        console.wait_for("disk/2 is healthy: vda: A Empty -, B Good disk/2", begun, IDLE).unwrap();
        let said = console.since(begun);
        assert!(
            said.contains("image disk release 1") && said.contains("image disk release 2"),
            "a trial, then the good one"
        );
        assert!(!said.contains(Stage::Metadata.label()), "no boot server was there to ask");
        rack.start_server().unwrap();
        rack.wait(NAME, "told why", |v| v.failures().contains(&"trial-fell-back")).unwrap();
        let gave_up = |v: &MachineView| v.reason.as_ref().is_some_and(|r| r.contains("trial-root-spoilt"));
        let view = rack.wait(NAME, "fell back", |v| v.state == "fell-back" && gave_up(v)).unwrap();
        assert_eq!(view.release, Some(2), "it works on the release before");
        let again = rack.kiln(&["assign", NAME, "disk/1"]).unwrap_err().to_string();
        assert!(again.contains("trial-root-spoilt"), "not offered again, and why: {again}");
    });
}

/// The newest boot that the server has heard of.
fn boot_id(view: Option<&MachineView>) -> Option<String> {
    view.and_then(MachineView::boot).map(|boot| boot.boot_id.clone())
}

/// Switches it on again, and waits for a line of this start.
pub fn starts_and_says(rack: &mut Rack, line: &str) -> String {
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    console.wait_for(line, Mark::default(), IDLE).unwrap();
    console.since(Mark::default())
}

/// A trial that is switched off each time before it is up: the loader counts its starts on the disk, and the one after the
/// last try is the release before, by itself.
#[test]
#[ignore = "slow: an install and five boots from the disk; make test-slow"]
fn a_trial_that_never_gets_up_is_left_by_the_loaders_counter() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-tries");
        let mut console = installed(&mut rack);
        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        let (resets, mut begun) = (rack.machine(NAME).resets(), console.mark());
        rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
        rack.machine(NAME).wait_reset(resets, IDLE).unwrap();
        let mut tries = 0;
        loop {
            console.wait_for_line("image disk release ", begun, IDLE).unwrap();
            if console.since(begun).contains("image disk release 1") {
                break;
            }
            tries += 1;
            assert!(tries <= 3, "it is started again and again");
            rack.machine(NAME).power_off();
            rack.machine(NAME).power_on().unwrap();
            (console, begun) = (rack.machine(NAME).console().unwrap().clone(), Mark::default());
        }
        assert_eq!(tries, 3, "as often as the loader lets it");
        console.wait_for("disk/1 is healthy: vda: A Good disk/1, B Failed disk/2", begun, IDLE).unwrap();
        rack.wait(NAME, "told why", |v| v.reason.as_ref().is_some_and(|r| r.contains("trial-tries-used-up"))).unwrap();
    });
}

/// By kexec into the other slot: no firmware, and the trial keeps its counter. On the way UKI and root take no more of the link than the
/// recipe of the release that runs allows. From there another kexec is asked for, and it is a cold boot: two kernels in a row that no
/// firmware has started are never stacked.
#[test]
#[ignore = "slow: an install, a kexec and a cold boot; make test-slow"]
fn a_kexec_is_proven_before_another() {
    testing::rack(|paths| {
        let (slow, mut rack) = (format!("disk/{OTHER_LOADER}"), rack(paths, "disk-kexec"));
        rack.kiln(&["release", "publish", &slow]).unwrap();
        let console = installed_as(&mut rack, OTHER_LOADER);
        let (resets, begun) = (rack.machine(NAME).resets(), console.mark());
        rack.kiln(&["assign", NAME, "disk/1", "--via", "kexec"]).unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert_eq!(rack.machine(NAME).resets(), resets, "no firmware was there");
        console.wait_for(&format!("disk/1 is healthy: vda: A Good {slow}, B Preferred disk/1"), begun, IDLE).unwrap();
        assert!(!console.since(begun).contains("BdsDxe"), "no firmware was there");
        // The recipe's cap: a lower bound, and no measure of speed. All else that a prefetch does takes an emulated machine a third of it.
        let fetched = prefetch_ms(&view, &rack);
        let manifest = site::manifest_of(&rack.site, site::DISK, 1).unwrap();
        let length: u64 = ["uki", "root"].map(|part| manifest[part]["length"].as_u64().unwrap()).iter().sum();
        println!("{length} bytes in {fetched} ms");
        assert!(fetched >= length * 1000 / OTHER_PREFETCH_RATE * 9 / 10, "{length} bytes in {fetched} ms");

        let begun = console.mark();
        let said = rack.kiln(&["assign", NAME, &slow, "--via", "kexec"]).unwrap();
        let why = "by a cold boot instead of the kexec that was asked for: no firmware has started disk/1 here yet";
        assert!(said.contains("by cold: ") && said.contains(why), "{said}");
        assert!(rack.kiln(&["machine", "show", NAME]).unwrap().contains(why));
        rack.wait_healthy(NAME, OTHER_LOADER).unwrap();
        assert!(rack.machine(NAME).resets() > resets, "it went through firmware");
        assert!(console.since(begun).contains("BdsDxe"), "it went through firmware");
    });
}

/// From the begin of the newest prefetch to its end, by the machine's clock.
fn prefetch_ms(view: &MachineView, rack: &Rack) -> u64 {
    let all = rack.get(&format!("/api/v1/machines/{}", view.id)).unwrap();
    let view: MachineView = serde_json::from_value(all).unwrap();
    let stages = view.boots.iter().flat_map(|b| &b.stages).filter(|s| s.stage == Stage::Prefetch);
    let at = |state: &str| stages.clone().filter(|s| s.state == state).filter_map(|s| s.agent_ms).last();
    at("done").unwrap() - at("started").unwrap()
}

/// The ESP's boot sector, it and its copy, and the root in the only good slot are overwritten: the firmware falls through to the
/// network, the agent makes each anew, and the next start needs no network. With a role that says so, the network comes first, and
/// the disk behind it where the boot server is dead.
#[test]
#[ignore = "slow: an install and six boots; make test-slow"]
fn an_unreadable_esp_and_a_rotten_slot_are_mended_over_the_network() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-mends");
        installed(&mut rack);
        rack.machine(NAME).power_off();
        let disk = std::fs::File::options().write(true).open(rack.machine(NAME).disk(0)).unwrap();
        disk.write_all_at(&[0xa5; 512], 1 << 20).unwrap();
        let unread = "the EFI system partition cannot be read";
        let said = starts_and_says(&mut rack, "is healthy: vda: A Good disk/1");
        assert!(said.contains("Start PXE"), "the firmware fell through to the network");
        assert!(!said.contains(unread), "by the copy of its boot sector: {said}");
        rack.machine(NAME).power_off();
        disk.write_all_at(&[0xa5; 8 * 512], 1 << 20).unwrap();
        let said = starts_and_says(&mut rack, "is healthy: vda: A Good disk/1");
        assert!(said.contains("Start PXE") && said.contains(unread), "{said}");

        // The root alone: its boot program starts, finds that it is rotten, and fetches it.
        rack.machine(NAME).power_off();
        disk.write_all_at(&[0x5a; 4 << 20], SLOT_A).unwrap();
        let said = starts_and_says(&mut rack, "is healthy: vda: A Good disk/1");
        assert!(!said.contains("Start PXE"), "by its own boot loader");
        let why = "failed (root-rotten";
        let line = said.lines().find(|line| line.contains(why)).unwrap_or_else(|| panic!("no {why:?} in {said}"));
        assert!(line.contains("mounting /dev/"), "{line}");
        rack.wait(NAME, "told of the boot that found it", rotten).unwrap();

        rack.machine(NAME).power_off();
        rack.kill_server();
        let said = starts_and_says(&mut rack, "is healthy: vda: A Good disk/1");
        assert!(!said.contains("Start PXE"), "the disk comes first");
        rack.start_server().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();

        // Now the network comes first.
        rack.kiln(&["machine", "approve", NAME, "--role", NETWORK_FIRST]).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("the network comes before the disk", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();
        let said = starts_and_says(&mut rack, "is healthy: vda: A Good disk/1");
        assert!(said.contains("Start PXE"), "the network comes first");
        assert!(!said.contains("the release in the slot starts"), "a boot server answered: {said}");

        // And the server dies: the disk is behind it.
        rack.machine(NAME).power_off();
        rack.kill_server();
        let said = starts_and_says(&mut rack, "disk/1 is healthy: vda: A Good disk/1");
        assert!(said.contains("Start PXE"), "the network comes first: {said}");
        assert!(said.contains("the release in the slot starts"), "and nobody answers: {said}");
        rack.start_server().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
    });
}

/// Whether the server was told, in one of the boots that it knows.
fn rotten(view: &MachineView) -> bool {
    view.boots.iter().flat_map(|boot| &boot.stages).any(|stage| stage.kind.as_deref() == Some("root-rotten"))
}

/// Where the first block of this file lies in slot A of the disk.
fn in_slot(rack: &Rack, manifest: &serde_json::Value, path: &str) -> u64 {
    let root = rack.artifact(manifest["root"]["sha256"].as_str().unwrap());
    let extents = command::run("dump.erofs", ["-e", &format!("--path={path}"), root.to_str().unwrap()]).unwrap();
    // `   0:        0..   44193 |   44193 :   26640384..  26656768 |   16384`
    let first = extents.lines().find_map(|line| line.trim().strip_prefix("0:")).unwrap_or_else(|| panic!("{extents}"));
    let on_disk = first.split(':').nth(1).unwrap().split("..").next().unwrap();
    SLOT_A + on_disk.trim().parse::<u64>().unwrap()
}

/// One byte of a program that no start needs is flipped in the slot while the machine is off: the machine comes up. When the
/// release is gone to again its slot is read back, and fetched anew. Then a byte that every start needs: starts in vain, and the
/// next reads the slot back before it tries again, tells the server, and the one behind it fetches the root anew.
#[test]
#[ignore = "slow: an install, two reimages and five boots; make test-slow"]
fn a_byte_deep_in_a_slot_is_found_when_the_slot_is_read_back() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-deep");
        installed(&mut rack);
        rack.machine(NAME).power_off();
        let manifest = site::manifest_of(&rack.site, site::DISK, 1).unwrap();
        let at = in_slot(&rack, &manifest, "/usr/bin/dpkg") + 2000;
        let disk = std::fs::File::options().read(true).write(true).open(rack.machine(NAME).disk(0)).unwrap();
        let mut byte = [0];
        disk.read_exact_at(&mut byte, at).unwrap();
        disk.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let said = starts_and_says(&mut rack, "is healthy: vda: A Good disk/1");
        assert!(!said.contains("Start PXE"), "by its own boot loader");

        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        assert!(!rotten(&rack.view(NAME).unwrap()), "nothing has read it yet");
        for (release, slots) in [(2, "A Good disk/1, B Good disk/2"), (1, "A Good disk/1, B Good disk/2")] {
            let begun = console.mark();
            rack.kiln(&["assign", NAME, &format!("disk/{release}"), "--via", "cold"]).unwrap();
            rack.wait_healthy(NAME, release).unwrap();
            console.wait_for(&format!("disk/{release} is healthy: vda: {slots}"), begun, IDLE).unwrap();
        }
        assert!(rotten(&rack.view(NAME).unwrap()), "told when the slot was read back");
        rack.machine(NAME).power_off();
        let signed = std::fs::read(rack.artifact(manifest["root"]["sha256"].as_str().unwrap())).unwrap();
        let mut lies_there = vec![0; signed.len()];
        disk.read_exact_at(&mut lies_there, SLOT_A).unwrap();
        assert!(lies_there == signed, "the slot is as it was signed again");

        let before = rack.view(NAME).unwrap().boots.iter().map(|boot| boot.started_ms).max().unwrap();
        let at = in_slot(&rack, &manifest, "/usr/lib/x86_64-linux-gnu/systemd/libsystemd-core-257.so") + 2000;
        disk.read_exact_at(&mut byte, at).unwrap();
        disk.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let said = starts_and_says(&mut rack, "disk/1 is healthy: vda: A Good disk/1");
        assert!(said.contains("did not come up: its root is read back"), "{said}");
        rack.wait(NAME, "told of the boot that read it back", |view| {
            let since = view.boots.iter().filter(|boot| boot.started_ms > before).flat_map(|boot| &boot.stages);
            since.filter_map(|stage| stage.kind.as_deref()).any(|kind| kind == "root-rotten")
        })
        .unwrap();
    });
}

/// Power blips while a good release starts: its files on the ESP stay as they are, and those before the hand-over do not count.
/// So many in a row behind it that never come to *healthy* are a boot loop: the agent stays where it is, starts nothing and
/// says so, until a person assigns anew.
#[test]
#[ignore = "slow: an install and nine boots; make test-slow"]
fn a_boot_loop_ends_in_a_safe_mode_that_reports() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-loop");
        installed(&mut rack);
        rack.machine(NAME).power_off();
        let before = entries(&rack.machine(NAME).disk(0));
        assert!(before.contains("kiln-1.conf"), "{before}");
        // Counted, the last of the five behind them would be a safe mode.
        for _ in 0..2 {
            starts_and_says(&mut rack, Stage::Network.label());
            rack.machine(NAME).power_off();
            assert_eq!(entries(&rack.machine(NAME).disk(0)), before, "a blip burns no try");
        }
        for _ in 0..5 {
            starts_in_vain(&mut rack, 1);
            assert_eq!(entries(&rack.machine(NAME).disk(0)), before, "a start in vain burns no try of the loader's");
        }
        starts_and_says(&mut rack, "SAFE MODE");
        rack.wait(NAME, "told", |v| v.failures().contains(&"boot-loop")).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        assert!(!console.since(Mark::default()).contains("systemd[1]"), "nothing was started");
        rack.kiln(&["assign", NAME, "disk/1"]).unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
    });
}

/// Both slots hold a good release, the boot server is dead, and the newer one never gets healthy any more: the machine goes to
/// the other by itself. The server is told once it is back.
#[test]
#[ignore = "slow: an install, a reimage and seven boots; make test-slow"]
fn a_release_that_loops_is_left_for_the_other_slots_without_a_server() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-way-back");
        let console = installed(&mut rack);
        reimaged_and_alone(&mut rack, &console);
        for _ in 0..5 {
            starts_in_vain(&mut rack, 2);
        }
        let said = starts_and_says(&mut rack, "disk/1 is healthy: vda: A Good disk/1, B Failed disk/2");
        assert!(said.contains("disk/2 was started 5 times in a row") && !said.contains("SAFE MODE"), "{said}");
        rack.start_server().unwrap();
        let gave_up = |v: &MachineView| v.reason.as_ref().is_some_and(|r| r.contains("good-boot-loop"));
        let view = rack.wait(NAME, "fell back", |v| v.state == "fell-back" && gave_up(v)).unwrap();
        assert_eq!(view.release, Some(1), "it works on the other");
    });
}

/// Comes up as far as the image's own init, and the power is cut.
fn starts_in_vain(rack: &mut Rack, release: u64) {
    let said = starts_and_says(rack, "systemd[1]");
    assert!(said.contains(&format!("image disk release {release}")), "{said}");
    rack.machine(NAME).power_off();
}

/// Names in `loader/entries`, as mtools reads them.
pub fn entries(disk: &Path) -> String {
    let image = format!("{}@@{}", disk.display(), 1 << 20);
    command::run_command(Command::new("mdir").args(["-b", "-i", &image, "::/loader/entries"])).unwrap()
}

/// A machine that lives on its disk. The disk is pulled out while it runs: it restarts by itself and comes up in memory. Then the disk
/// begins to fail: one that cannot be read costs the slots and not the machine, one that takes no more writes starts what it
/// holds. Whole again, it is used again, and what it holds is as it was.
#[test]
#[ignore = "slow: an install and four boots; make test-slow"]
fn a_disk_that_is_pulled_out_or_begins_to_fail_costs_the_slots_and_not_the_machine() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-fails");
        rack.machine(NAME).set_disks(vec![Disk::VirtioBlkAtPort]).unwrap();
        installed(&mut rack);
        let (before, resets) = (boot_id(rack.view(NAME).as_ref()), rack.machine(NAME).resets());
        rack.machine(NAME).pull_disk(0).unwrap();
        rack.machine(NAME).wait_reset(resets, 2 * IDLE).unwrap();
        let told = |v: &MachineView| boot_id(Some(v)) != before && v.failures().contains(&"disk-none");
        let view = rack.wait(NAME, "healthy in memory", |v| told(v) && v.is_healthy_on(1)).unwrap();
        let earlier = view.boots.iter().filter(|boot| Some(&boot.boot_id) == before.as_ref()).flat_map(|b| &b.stages);
        let said: Vec<&str> = earlier.filter_map(|stage| stage.message.as_deref()).collect();
        assert!(said.iter().any(|said| said.contains("vda, which this system runs from, is not in")), "{said:?}");
        rack.machine(NAME).power_off();
        let held = rack.machine(NAME).hold_disk(0).unwrap();

        let before = boot_id(rack.view(NAME).as_ref());
        held.set_fault(Fault::Reads);
        rack.machine(NAME).power_on().unwrap();
        let told = |v: &MachineView| boot_id(Some(v)) != before && v.failures().contains(&"disk-io-error");
        rack.wait(NAME, "healthy in memory", |v| told(v) && v.is_healthy_on(1)).unwrap();
        let said = rack.machine(NAME).console().unwrap().since(Mark::default());
        assert!(said.contains("Start PXE"), "its firmware cannot read the disk either");
        rack.machine(NAME).power_off();

        held.set_fault(Fault::Writes);
        let before = boot_id(rack.view(NAME).as_ref());
        let said = starts_and_says(&mut rack, ": starts are counted beside the disk");
        assert!(!said.contains("Start PXE"), "from its disk");
        let told = |v: &MachineView| boot_id(Some(v)) != before && v.failures().contains(&"disk-io-error");
        rack.wait(NAME, "healthy from its slot", |v| told(v) && v.is_healthy_on(1)).unwrap();
        rack.machine(NAME).power_off();

        held.set_fault(Fault::None);
        let said = starts_and_says(&mut rack, "is healthy: vda: A Good disk/1");
        assert!(!said.contains("Start PXE") && !said.contains("starts are counted beside"), "as before");
    });
}

/// Each kind of disk that a machine may have has its outcome: it comes up, says why, and nobody's data is touched.
#[test]
#[ignore = "slow: six boots; make test-slow"]
fn each_kind_of_disk_has_its_outcome() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-kinds");
        let data = vec![0x5a; 1 << 20];
        let full = |rack: &mut Rack, number: usize| {
            let disk = std::fs::File::options().write(true).open(rack.machine(NAME).disk(number)).unwrap();
            disk.write_all_at(&data, 40 << 20).unwrap();
            disk.write_all_at(b"somebody's boot sector", 0).unwrap();
        };
        let untouched = |rack: &mut Rack, number: usize| {
            let disk = std::fs::File::open(rack.machine(NAME).disk(number)).unwrap();
            let mut got = vec![0; data.len()];
            disk.read_exact_at(&mut got, 40 << 20).unwrap();
            assert!(got == data, "somebody's data was touched");
            assert_eq!(
                std::os::unix::fs::MetadataExt::blocks(&disk.metadata().unwrap()) / 8,
                257,
                "something was written"
            );
        };
        let outcome = |rack: &mut Rack, kind: &str| {
            let id = |v: &MachineView| v.boot().map(|b| b.boot_id.clone());
            let before = rack.view(NAME).and_then(|v| id(&v));
            rack.machine(NAME).power_on().unwrap();
            let told = |v: &MachineView| v.is_healthy_on(1) && v.failures().contains(&kind);
            rack.wait(NAME, kind, |v| id(v) != before && told(v)).unwrap();
            rack.machine(NAME).power_off();
        };
        let disks = |rack: &mut Rack, disks: &[Disk]| rack.machine(NAME).set_disks(disks.to_vec()).unwrap();

        disks(&mut rack, &[]);
        outcome(&mut rack, "disk-none");
        disks(&mut rack, &[Disk::Nvme4k]);
        outcome(&mut rack, "disk-unsupported-sector-size");
        disks(&mut rack, &[Disk::Ahci]);
        full(&mut rack, 0);
        outcome(&mut rack, "disk-foreign");
        untouched(&mut rack, 0);
        for fault in [Fault::Reads, Fault::Writes] {
            disks(&mut rack, &[Disk::VirtioBlk]);
            rack.machine(NAME).hold_disk(0).unwrap().set_fault(fault);
            outcome(&mut rack, "disk-io-error");
        }
        // Two of different kinds: the blank one is taken, the other is let alone. The machine lives there, alone.
        disks(&mut rack, &[Disk::Nvme, Disk::Ahci]);
        full(&mut rack, 1);
        starts_and_says(&mut rack, "is healthy: nvme0n1: A Good disk/1");
        rack.machine(NAME).power_off();
        rack.kill_server();
        let said = starts_and_says(&mut rack, "disk/1 is healthy: nvme0n1: A Good disk/1");
        assert!(!said.contains("Start PXE"), "by its own boot loader: {said}");
        rack.machine(NAME).power_off();
        untouched(&mut rack, 1);
    });
}
