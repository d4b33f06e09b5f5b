//! What operators alone can order, on real firmware and real disks. Who may order what is shown by the agent's and the
//! boot server's own tests; here is what only a machine can show: that there is a shell, or none, and what is left on a disk.

use crate::support::on_disk;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::Stage;
use std::os::unix::fs::FileExt;
use std::path::Path;

const NAME: &str = "rack-1";
/// What a shell makes of it is in nothing that is typed or echoed.
const QUESTION: &str = "echo KILN-$((40+2))-SHELL";
const ANSWER: &str = "KILN-42-SHELL";

/// The ordinary release answers nothing on its console. A rescue release is not to be had without an operator's order; with
/// one the machine goes there by kexec and has a shell; the next assignment takes it home.
#[test]
#[ignore = "slow: two reimages; make test-slow"]
fn a_shell_is_to_be_had_by_order_only() {
    testing::rack(|paths| {
        let options = RackOptions::scenario(paths, "rescue", MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)));
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let begun = console.mark();
        rack.machine(NAME).type_line("").unwrap();
        rack.machine(NAME).type_line(QUESTION).unwrap();

        rack.kiln(&["release", "publish", "rescue/1"]).unwrap();
        let refused = rack.kiln(&["assign", NAME, "rescue/1"]).unwrap_err().to_string();
        assert!(refused.contains("rescue/1 is of class rescue"), "{refused}");
        let director = rack.site.join("online/director.key").display().to_string();
        let refused = rack.kiln(&["assign", NAME, "rescue/1", "--order-key", &director]).unwrap_err().to_string();
        assert!(refused.contains("signed by 0 trusted keys"), "{refused}");

        let operator = rack.site.join("offline/operator.key").display().to_string();
        let resets = rack.machine(NAME).resets();
        rack.kiln(&["assign", NAME, "rescue/1", "--order-key", &operator]).unwrap();
        console.wait_for("image rescue release 1", begun, IDLE).unwrap();
        let ordinary = console.since(begun);
        for word in [ANSWER, "login:", "bash", "sh: "] {
            assert!(!ordinary.contains(word), "{word:?} on the console of an ordinary release: {ordinary}");
        }
        rack.wait(NAME, "healthy on rescue/1", |v| {
            v.image.as_deref() == Some("rescue") && v.state == "healthy" && v.release == Some(1)
        })
        .unwrap();
        assert_eq!(rack.machine(NAME).resets(), resets, "it went by kexec");
        let begun = console.mark();
        rack.machine(NAME).type_line(QUESTION).unwrap();
        console.wait_for(ANSWER, begun, IDLE).unwrap();
        let list = rack.kiln(&["order", "list"]).unwrap();
        assert!(list.contains("run rescue/1 of class rescue") && list.contains("done"), "{list}");

        rack.kiln(&["assign", NAME, "minimal/1"]).unwrap();
        rack.wait(NAME, "home", |v| v.image.as_deref() == Some("minimal") && v.is_healthy_on(1)).unwrap();
        assert!(rack.kiln(&["order", "list"]).unwrap().contains("superseded"));
    });
}

/// 4096 bytes that are nowhere else.
fn pattern() -> Vec<u8> {
    b"KILN-WIPE-PATTERN-51c7d0e2 ".iter().copied().cycle().take(4096).collect()
}

const BYTES: u64 = 64 << 20;

fn fill(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(BYTES).unwrap();
    let block = pattern();
    for at in (0..BYTES).step_by(block.len()) {
        file.write_all_at(&block, at).unwrap();
    }
}

/// Disks full of a pattern, on virtio and NVMe. After the wipe their files are read from outside: not one byte of it is left.
/// The receipt is checked as a file, without a server. An order for a disk that is not there fails, and says so, though
/// another disk that it names is wiped, by writing over it.
#[test]
#[ignore = "slow: four boots; make test-slow"]
fn nothing_is_left_on_a_wiped_disk() {
    testing::rack(|paths| {
        let kinds = [Disk::VirtioBlk, Disk::Nvme];
        let spec = MachineSpec { disks: kinds.to_vec(), ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) };
        let mut rack = Rack::start(paths, &RackOptions::scenario(paths, "wipe", spec)).unwrap();
        let files: Vec<_> = (0..kinds.len()).map(|n| rack.machine(NAME).disk(n)).collect();
        files.iter().for_each(|file| fill(file));
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();

        let (operator, director) = (rack.site.join("offline/operator.key"), rack.site.join("online/director.key"));
        let [operator, director] = [operator, director].map(|path| path.display().to_string());
        let wipe = |rack: &Rack, key: &str, which: &[&str]| {
            let order = ["machine", "wipe", NAME, "--order-key", key];
            rack.kiln(&order.into_iter().chain(which.iter().copied()).collect::<Vec<_>>())
        };
        assert!(wipe(&rack, &director, &["--all-disks"]).is_err(), "the director's key orders nothing");
        let resets = rack.machine(NAME).resets();
        wipe(&rack, &operator, &["--all-disks"]).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for(Stage::Wipe.label(), Mark::default(), 2 * IDLE).unwrap();
        assert!(rack.machine(NAME).resets() > resets, "the initramfs does it, not the running system");
        let state = |rack: &Rack, wanted: &str| rack.kiln(&["order", "list"]).unwrap().contains(wanted);
        rack.wait(NAME, "a receipt", |v| v.last_words.as_ref().is_some_and(|w| w.to_string().contains("disks wiped")))
            .unwrap();
        assert!(state(&rack, "done"));

        let file = paths.scratch.join("receipt");
        let receipt = file.display().to_string();
        let shown = rack.kiln(&["machine", "receipt", NAME, "--out", &receipt]).unwrap();
        let checked = site::kiln_quiet(paths, &["order", "verify-receipt", &receipt]).unwrap();
        for number in 0..kinds.len() {
            let row = checked.lines().find(|line| line.contains(&format!("{NAME}-disk{number}")));
            let row = row.unwrap_or_else(|| panic!("disk {number} is not in the receipt: {shown}"));
            assert!(row.contains("wiped") && row.contains(&BYTES.to_string()), "{row}");
        }
        assert!(checked.contains("nvme-format"), "the controller's own way: {checked}");
        let virtio = checked.lines().find(|line| line.contains("rack-1-disk0")).unwrap();
        assert!(virtio.contains("discard"), "what the disk offers: {virtio}");

        // It starts anew. Somebody uses a disk; then an order for that one, and for one that the machine does not have.
        rack.wait_healthy(NAME, 1).unwrap();
        fill(&files[0]);
        wipe(&rack, &operator, &["--disk", "rack-1-disk0", "--disk", "no-such-serial", "--overwrite"]).unwrap();
        rack.wait(NAME, "a failed wipe", |v| {
            v.last_words.as_ref().is_some_and(|w| w.to_string().contains("no disk with this serial number"))
        })
        .unwrap();
        assert!(state(&rack, "failed: not wiped: - (no-such-serial)"));
        let shown = rack.kiln(&["machine", "receipt", NAME]).unwrap();
        let row =
            |name: &str| shown.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name}: {shown}"));
        assert!(row("rack-1-disk0").contains("wiped") && row("rack-1-disk0").contains("overwrite"), "{shown}");
        assert!(row("rack-1-disk1").contains("skipped"), "the order does not name it: {shown}");
        rack.machine(NAME).power_off();

        let pattern = pattern();
        for (number, file) in files.iter().enumerate() {
            let bytes = std::fs::read(file).unwrap();
            assert_eq!(bytes.len() as u64, BYTES);
            let piece = &pattern[..8];
            assert!(!bytes.windows(piece.len()).any(|window| window == piece), "{:?} holds the pattern", kinds[number]);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{:?}", kinds[number]);
        }
    });
}

/// Room for the layout of the image `disk`, and not much to read back.
const SMALL: u64 = 800 << 20;

/// The disk that a machine lives on. What runs from it is left first; the receipt is there before anything is written to the disk
/// again, which is all zeros by then; and the machine installs itself anew.
#[test]
#[ignore = "slow: two installs and a wipe; make test-slow"]
fn a_machine_is_wiped_of_the_disk_that_it_lives_on() {
    testing::rack(|paths| {
        let mut rack = on_disk::rack(paths, "wipe-own");
        let disk = std::fs::File::options().read(true).write(true).open(rack.machine(NAME).disk(0)).unwrap();
        disk.set_len(SMALL).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("disk/1 is healthy: vda: A Good disk/1", Mark::default(), IDLE).unwrap();

        let operator = rack.site.join("offline/operator.key").display().to_string();
        let resets = rack.machine(NAME).resets();
        rack.kiln(&["machine", "wipe", NAME, "--order-key", &operator, "--all-disks"]).unwrap();
        rack.wait(NAME, "a receipt", |v| v.last_words.as_ref().is_some_and(|w| w.to_string().contains("disks wiped")))
            .unwrap();
        // Into the initramfs, and once more when it is done.
        rack.machine(NAME).wait_reset(resets + 1, IDLE).unwrap();
        rack.machine(NAME).power_off();
        let receipt = rack.kiln(&["machine", "receipt", NAME]).unwrap();
        let row = receipt.lines().find(|line| line.contains("rack-1-disk0")).unwrap_or_else(|| panic!("{receipt}"));
        assert!(row.contains("wiped") && row.contains(&SMALL.to_string()), "{row}");
        let mut piece = vec![0; 1 << 20];
        for at in (0..SMALL).step_by(piece.len()) {
            disk.read_exact_at(&mut piece, at).unwrap();
            assert!(piece.iter().all(|byte| *byte == 0), "something is left in the MiB at {at}");
        }

        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("disk/1 is healthy: vda: A Good disk/1, B Empty -", Mark::default(), IDLE).unwrap();
        assert!(console.since(Mark::default()).contains("vda is partitioned"), "{}", console.last_words(40));
    });
}
