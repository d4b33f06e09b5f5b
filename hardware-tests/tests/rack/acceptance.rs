//! The acceptance run of new hardware: a machine whose disk answers with errors is held and the disk is named; the disk is
//! put right, the run is ordered again, and the machine joins the fleet. What runs is the image `acceptance` but for its
//! numbers. How a failure looks on the machine's web page is in `server/tests/server/web.rs`.

use kiln_lab::machine::{Disk, Firmware, MachineSpec};
use kiln_lab::nbd::Fault;
use kiln_lab::rack::{Rack, RackOptions};
use kiln_lab::testing;
use kiln_lab::variables::NetworkBoot;

const NAME: &str = "rack-1";
const RELEASE: &str = "acceptance-lab/1";

#[test]
#[ignore = "slow: two acceptance runs and a boot; make test-slow"]
fn new_hardware_joins_when_every_part_of_it_passed() {
    testing::rack(|paths| {
        let spec =
            MachineSpec { disks: vec![Disk::VirtioBlk], ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) };
        let id = spec.uuid();
        let mut options = RackOptions::scenario(paths, "acceptance", spec);
        options.unknown = vec![NAME.to_owned()];
        options.config = "[[role]]\nname = \"tested\"\nimage = \"minimal\"\nacceptance = \"required\"\n".to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        let disk = rack.machine(NAME).hold_disk(0).unwrap();
        disk.set_fault(Fault::Reads);
        rack.machine(NAME).power_on().unwrap();
        rack.wait(NAME, "its first report", |v| v.state == "discovered" && v.key_storage.is_some()).unwrap();
        rack.kiln(&["machine", "approve", &id, "--role", "tested", "--name", NAME]).unwrap();
        let shown = rack.kiln(&["machine", "show", NAME]).unwrap();
        assert!(shown.contains("held: role tested wants a passed acceptance run first"), "{shown}");

        rack.kiln(&["release", "publish", RELEASE]).unwrap();
        let refused = rack.kiln(&["assign", NAME, RELEASE]).unwrap_err().to_string();
        assert!(refused.contains("is of class acceptance"), "the director alone starts no run: {refused}");
        let operator = rack.site.join("offline/operator.key").display().to_string();
        rack.kiln(&["assign", NAME, RELEASE, "--order-key", &operator]).unwrap();
        rack.wait(NAME, "a failed run that names the disk", |v| {
            v.last_words.as_ref().is_some_and(|words| {
                let words = words.to_string();
                words.contains("acceptance failed: disk vda") && words.contains("reading at byte 0")
            })
        })
        .unwrap();
        let shown = rack.kiln(&["machine", "show", NAME]).unwrap();
        for part in ["passed memory:", "passed CPUs:", "failed disk vda", "no pass      disk vda"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert!(rack.kiln(&["machine", "list"]).unwrap().contains("acceptance failed"));

        // The disk is put right, and the same run ordered once more: the machine starts anew for it.
        disk.set_fault(Fault::None);
        let resets = rack.machine(NAME).resets();
        rack.kiln(&["assign", NAME, RELEASE, "--order-key", &operator]).unwrap();
        rack.wait(NAME, "home, in the fleet", |v| v.image.as_deref() == Some("minimal") && v.is_healthy_on(1)).unwrap();
        assert!(rack.machine(NAME).resets() > resets);
        let shown = rack.kiln(&["machine", "show", NAME]).unwrap();
        assert!(shown.contains(&format!("acceptance   passed on {RELEASE}")), "{shown}");
        for part in ["passed memory:", "passed CPUs:", "passed disk vda", "MiB/s over a link", "of 1000 echoes"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
    });
}
