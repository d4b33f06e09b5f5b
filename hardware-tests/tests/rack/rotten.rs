//! Disks of which a little is not as it was, or cannot be read: what is whole on them starts, without a boot server.

use crate::disk::{SLOT_A, entries, starts_and_says};
use crate::support::on_disk::{installed, rack, reimaged_and_alone};
use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::nbd::Fault;
use kiln_lab::rack::IDLE;
use kiln_lab::{command, testing};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const NAME: &str = "rack-1";

/// The table of the EFI system partition says of one of its files what is not so, in one copy and then in both: the machine starts
/// from its slot with the boot server dead, nothing else of the partition changes, and the file is there again.
#[test]
#[ignore = "slow: an install and two boots from the disk; make test-slow"]
fn a_broken_chain_on_the_esp_costs_its_file_alone() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-chain");
        installed(&mut rack);
        rack.machine(NAME).power_off();
        let path = rack.machine(NAME).disk(0);
        let before = entries(&path);
        let disk = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let mut sectors = [0; 4];
        disk.read_exact_at(&mut sectors, (1 << 20) + 36).unwrap();
        let table = |copy: u64| (1 << 20) + (32 + copy * u64::from(u32::from_le_bytes(sectors))) * 512;
        for copies in 1..=2 {
            let cluster = first_cluster(&path, "EFI/BOOT/BOOTX64.EFI");
            for copy in 0..copies {
                disk.write_all_at(&[0; 4], table(copy) + cluster * 4).unwrap();
            }
            rack.kill_server();
            let said = starts_and_says(&mut rack, "disk/1 is healthy: vda: A Good disk/1");
            assert!(said.contains("the release in the slot starts") && !said.contains("Start PXE"), "{said}");
            assert_eq!(entries(&path), before, "the loader's entries stay as they are");
            rack.start_server().unwrap();
            rack.wait_healthy(NAME, 1).unwrap();
            let console = rack.machine(NAME).console().unwrap().clone();
            if copies == 2 {
                console
                    .wait_for("EFI/BOOT/BOOTX64.EFI was not as it was signed: it is right again", Mark::default(), IDLE)
                    .unwrap();
            }
            rack.machine(NAME).power_off();
            let firsts = [0, 1].map(|copy| {
                let mut value = [0; 4];
                let cluster = first_cluster(&path, "EFI/BOOT/BOOTX64.EFI");
                disk.read_exact_at(&mut value, table(copy) + cluster * 4).unwrap();
                u32::from_le_bytes(value)
            });
            assert!(firsts[0] == firsts[1] && firsts[0] > 1, "both copies say where it goes on: {firsts:?}");
        }
    });
}

/// A file's first cluster on the EFI system partition, as mtools reads it: `::/NAME <5-260>`.
fn first_cluster(disk: &Path, name: &str) -> u64 {
    let image = format!("{}@@{}", disk.display(), 1 << 20);
    let mut command = Command::new("mshowfat");
    let said = command::run_command(command.env("MTOOLS_SKIP_CHECK", "1").args(["-i", &image, &format!("::/{name}")]));
    let said = said.unwrap();
    let digits = said.rsplit_once('<').unwrap_or_else(|| panic!("{said}")).1;
    digits.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// The first sector of the only good root cannot be read for a while, and no boot server is there: the starts end, the slot keeps
/// its label, and with the sector back the release starts from it.
#[test]
#[ignore = "slow: an install and three starts from the disk; make test-slow"]
fn a_root_that_cannot_be_read_for_a_while_is_not_given_up() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-unread");
        installed(&mut rack);
        rack.machine(NAME).power_off();
        rack.kill_server();
        let held = rack.machine(NAME).hold_disk(0).unwrap();
        held.set_fault(Fault::ReadsAt(SLOT_A + 1024));
        for _ in 0..2 {
            let said = starts_and_says(&mut rack, "failed (root-unreadable");
            assert!(said.contains("the release in the slot starts"), "{said}");
            rack.machine(NAME).power_off();
        }
        held.set_fault(Fault::None);
        let said = starts_and_says(&mut rack, "disk/1 is healthy: vda: A Good disk/1");
        assert!(said.contains("the release in the slot starts"), "{said}");
        rack.start_server().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
    });
}

/// A byte of what was kept of the release that starts is another, and the boot server is dead: its starts count, though it is no
/// fault of the release, and the other slot's good release, whose record is whole, is next.
#[test]
#[ignore = "slow: an install, a reimage and seven starts from the disk; make test-slow"]
fn a_record_that_rotted_is_left_for_the_other_slots_release() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-record");
        let console = installed(&mut rack);
        reimaged_and_alone(&mut rack, &console);
        let disk = rack.machine(NAME).disk(0);
        let agent = paths.agent.display().to_string();
        let says = || command::run(&agent, ["disk", disk.to_str().unwrap(), "lab"]).unwrap();
        let said = says();
        let start = said.lines().find_map(|line| line.strip_prefix("state ")).unwrap_or_else(|| panic!("{said}"));
        let label = said.lines().find_map(|line| line.strip_prefix("slot B ")?.rsplit(' ').next()).unwrap();
        let (image, kept) = (format!("{}@@{start}", disk.display()), paths.scratch.join("record"));
        let (name, file) = (format!("::/{label}.json"), kept.to_str().unwrap());
        let copy = |from: &str, to: &str| {
            let mut mcopy = Command::new("mcopy");
            mcopy.env("MTOOLS_SKIP_CHECK", "1").args(["-n", "-o", "-i", &image, from, to]);
            command::run_command(&mut mcopy).unwrap();
        };
        copy(&name, file);
        let before = std::fs::read_to_string(&kept).unwrap();
        let after = before.replacen("\\\"sequence\\\":", "\\\"sequencf\\\":", 1);
        assert!(after != before, "{before}");
        std::fs::write(&kept, after).unwrap();
        copy(file, &name);
        assert_eq!(says().lines().filter(|line| line.starts_with("record ")).count(), 2, "it is JSON still");
        for _ in 0..5 {
            let said = starts_and_says(&mut rack, "this boot ends here");
            assert!(said.contains("image disk release 2"), "{said}");
            rack.machine(NAME).power_off();
        }
        let said = starts_and_says(&mut rack, "disk/1 is healthy: vda: A Good disk/1, B Failed disk/2");
        assert!(said.contains("disk/2 was started 5 times in a row") && !said.contains("SAFE MODE"), "{said}");
        rack.start_server().unwrap();
        let gave_up = |v: &MachineView| v.reason.as_ref().is_some_and(|r| r.contains("good-boot-loop"));
        rack.wait(NAME, "fell back", |v| v.state == "fell-back" && gave_up(v)).unwrap();
    });
}
