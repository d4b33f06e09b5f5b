//! One identity in two machines that live: whatever of a machine without a TPM can be copied, in another one. How it is told from a
//! restart or from a disk that moved: `server/fleet/tests/fleet/clones.rs`; by processes: `server/tests/server/clones.rs`.

use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{command, site, testing};
use kiln_protocol::Stage;

const TRUE: &str = "rack-1";
const COPY: &str = "rack-2";

/// Disk and firmware's variables of one machine into the other. Both are off.
fn copy(rack: &mut Rack) {
    let [from, to] = [TRUE, COPY].map(|name| {
        let machine = rack.machine(name);
        [machine.disk_file(0), machine.variable_store()]
    });
    for (from, to) in from.iter().zip(&to) {
        // The disk is a sparse file.
        let [from, to] = [from, to].map(|file| file.display().to_string());
        command::run("cp", ["--sparse=always", &from, &to]).unwrap();
    }
}

/// Switches it on, and waits for a line of this start.
fn starts_and_says(rack: &mut Rack, name: &str, line: &str) -> String {
    rack.machine(name).power_on().unwrap();
    let console = rack.machine(name).console().unwrap().clone();
    console.wait_for(line, Mark::default(), IDLE).unwrap();
    console.since(Mark::default())
}

/// A machine whose key lies in its firmware's variables is copied, disk and all, to other hardware that the site lists too. Both live:
/// the server holds both, says so of each, and nothing is assigned to either; a start of the copy is told so. A person switches the
/// copy off and clears the true one, which is healthy again; the copy stays held.
#[test]
#[ignore = "slow: an install and three boots from disks; make test-slow"]
fn a_cloned_identity_holds_both_machines_until_a_person_has_looked() {
    testing::rack(|paths| {
        let spec = |number| MachineSpec {
            disks: vec![Disk::VirtioBlk],
            ..MachineSpec::new(number, Firmware::Uefi(NetworkBoot::Pxe))
        };
        let mut options = RackOptions::scenario(paths, "cloned", spec(1));
        options.machines.push(spec(2));
        options.image = site::DISK.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "disk/1"]).unwrap();
        rack.machine(TRUE).power_on().unwrap();
        let view = rack.wait_healthy(TRUE, 1).unwrap();
        assert_eq!(view.key_storage.as_deref(), Some("efi-variable"), "without a TPM it can be copied");
        let console = rack.machine(TRUE).console().unwrap().clone();
        console.wait_for("disk/1 is healthy: vda: A Good disk/1", Mark::default(), IDLE).unwrap();
        rack.machine(TRUE).power_off();
        copy(&mut rack);

        let before = boot_id(&view);
        rack.machine(TRUE).power_on().unwrap();
        let again = |v: &MachineView| v.is_healthy_on(1) && boot_id(v) != before;
        rack.wait(TRUE, "healthy again: a restart is no copy", again).unwrap();
        rack.machine(COPY).power_on().unwrap();
        for (name, other) in [(COPY, TRUE), (TRUE, COPY)] {
            let said = format!("{name} and {other} report with one identity key: it was copied");
            let is_said = |reason: &String| reason.contains(&said);
            let held = |v: &MachineView| v.state == "quarantined" && v.reason.as_ref().is_some_and(is_said);
            println!("{:?}", rack.wait(name, "it is held", held).unwrap().reason);
        }
        let audit = rack.kiln(&["audit", "list"]).unwrap();
        for (name, other) in [(COPY, TRUE), (TRUE, COPY)] {
            let record = format!("quarantined: {name} and {other} report with one identity key");
            assert!(audit.contains(&record), "{audit}");
        }

        // Neither gets anything; both may go on with what they have.
        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        for name in [TRUE, COPY] {
            let refused = rack.kiln(&["assign", name, "disk/2"]).unwrap_err().to_string();
            assert!(refused.contains(&format!("{name} is quarantined: ")), "{refused}");
        }
        rack.machine(COPY).power_off();
        let said = starts_and_says(&mut rack, COPY, "the boot server does not decide this boot");
        assert!(said.contains("rack-2 and rack-1 report with one identity key"), "{said}");
        let assigned = |line: &str| line.contains(Stage::Assignment.label()) && line.trim_end().ends_with("done");
        assert!(!said.lines().any(assigned), "nothing is assigned to it: {said}");

        // A person has looked.
        rack.machine(COPY).power_off();
        rack.kiln(&["machine", "clear", TRUE]).unwrap();
        rack.wait_healthy(TRUE, 1).unwrap();
        assert_eq!(rack.view(COPY).unwrap().state, "quarantined");
    });
}

fn boot_id(view: &MachineView) -> Option<String> {
    view.boot().map(|boot| boot.boot_id.clone())
}
