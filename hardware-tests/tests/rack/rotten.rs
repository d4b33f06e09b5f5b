//! Disks of which a little is not as it was, or cannot be read: what is whole on them starts, without a boot server.

use crate::disk::{SLOT_A, entries, starts_and_says};
use crate::extras::on_esp;
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

/// A directory of the EFI system partition, which no start needs, has no clusters any more: the firmware and the loader start the release, and
/// the agent takes the partition for unreadable. Alone the machine starts from its slot, and writes nothing there. Another release is
/// gone to by kexec, from the running system and from a boot, and makes the partition anew, loader and all: it starts alone.
#[test]
#[ignore = "slow: an install, three boots from the disk and two reimages; make test-slow"]
fn an_esp_that_only_the_agent_cannot_read_costs_no_start_and_no_reimage() {
    const UNREAD: &str = "the EFI system partition cannot be read";
    testing::rack(|paths| {
        let mut rack = rack(paths, "disk-esp-unread");
        installed(&mut rack);
        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        for (from, to, runs) in [(1, 2, true), (2, 1, false)] {
            rack.machine(NAME).power_off();
            spoil_a_directory(&rack.machine(NAME).disk(0));
            rack.kill_server();
            let said = starts_and_says(&mut rack, &format!("disk/{from} is healthy: vda: "));
            let starts = "the EFI system partition stays as it is, and the release starts";
            assert!(said.contains(UNREAD) && said.contains(starts) && !said.contains("Start PXE"), "{said}");
            if !runs {
                rack.machine(NAME).power_off();
            }
            rack.start_server().unwrap();
            if runs {
                rack.wait_healthy(NAME, from).unwrap();
            }
            rack.kiln(&["assign", NAME, &format!("disk/{to}"), "--via", "cold"]).unwrap();
            if !runs {
                let going = format!("disk/{to} is assigned, this is disk/{from}: going there, by kexec only");
                starts_and_says(&mut rack, &going);
            }
            rack.wait_healthy(NAME, to).unwrap();
            let console = rack.machine(NAME).console().unwrap().clone();
            console.wait_for(&format!("disk/{to} is healthy: vda: "), Mark::default(), IDLE).unwrap();
            rack.machine(NAME).power_off();
            rack.kill_server();
            let said = starts_and_says(&mut rack, &format!("disk/{to} is healthy: vda: "));
            assert!(!said.contains(UNREAD) && !said.contains("Start PXE"), "by its own loader: {said}");
            rack.start_server().unwrap();
            rack.wait_healthy(NAME, to).unwrap();
        }
    });
}

/// Makes a directory on the EFI system partition, and takes its cluster from it in both copies of the table.
fn spoil_a_directory(disk: &Path) {
    on_esp(disk, "mmd", &["::/SPOILT"]);
    let bytes = std::fs::File::options().read(true).write(true).open(disk).unwrap();
    let mut esp = [0; 512];
    bytes.read_exact_at(&mut esp, 1 << 20).unwrap();
    let number = |at: usize| u64::from(u32::from_le_bytes(esp[at..at + 4].try_into().unwrap()));
    // By the boot sector: behind 32 sectors and two tables of so many the clusters begin, of so many sectors each.
    let (tables, per_cluster) = (2 * number(36), u64::from(esp[13]));
    let root = (1 << 20) + (32 + tables + (number(44) - 2) * per_cluster) * 512;
    let mut entries = vec![0; usize::try_from(per_cluster * 512).unwrap()];
    bytes.read_exact_at(&mut entries, root).unwrap();
    let entry = entries.chunks(32).find(|entry| entry.starts_with(b"SPOILT     ")).expect("mtools made it");
    let first = u64::from(u16::from_le_bytes([entry[26], entry[27]]))
        | u64::from(u16::from_le_bytes([entry[20], entry[21]])) << 16;
    for copy in 0..2 {
        bytes.write_all_at(&[0; 4], (1 << 20) + (32 + copy * tables / 2) * 512 + first * 4).unwrap();
    }
}
