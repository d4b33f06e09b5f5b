//! A whole rack without power, and a site whose signers let every date pass. What the agent makes of it alone: `thefts.rs`.

use crate::support::on_disk;
use crate::thefts::{forge, hours, key};
use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::testing;
use kiln_lab::variables::NetworkBoot;
use serde_json::json;

const NAMES: [&str; 2] = ["rack-1", "rack-2"];

fn boot_id(view: &MachineView) -> Option<String> {
    view.boot().map(|boot| boot.boot_id.clone())
}

/// Everything that is signed offline has ended an hour ago. The boot server is off.
fn expire(rack: &Rack, image: &str) {
    for role in ["targets", image, "snapshot"] {
        let own = key(&rack.site, &format!("offline/{role}.key"));
        forge(&rack.site, role, &[&own], &|document| document["expires"] = json!(hours(-1)));
    }
}

/// Everything that is signed offline has expired when the power comes back: both machines boot what they were assigned, and
/// nothing fails. Another release is refused until the signers sign new dates, while the machine works on.
#[test]
#[ignore = "slow: five boots of the firmware; make test-slow"]
fn a_rack_comes_up_after_a_power_cut_with_everything_expired_and_starts_nothing_new() {
    testing::rack(|paths| {
        let spec = |number| MachineSpec::new(number, Firmware::Uefi(NetworkBoot::Pxe));
        let mut options = RackOptions::scenario(paths, "expired", spec(1));
        options.machines.push(spec(2));
        let mut rack = Rack::start(paths, &options).unwrap();
        for name in NAMES {
            rack.machine(name).power_on().unwrap();
        }
        let before = NAMES.map(|name| boot_id(&rack.wait_healthy(name, 1).unwrap()));
        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        for name in NAMES {
            rack.machine(name).power_off();
        }
        assert!(rack.stop_server().unwrap());
        expire(&rack, "image-minimal");
        rack.start_server().unwrap();

        for name in NAMES {
            rack.machine(name).power_on().unwrap();
        }
        for (name, before) in NAMES.iter().zip(before) {
            let again = |v: &MachineView| v.is_healthy_on(1) && boot_id(v) != before;
            let view = rack.wait(name, "healthy again", again).unwrap();
            assert!(view.failures().is_empty(), "{name}: {view:#?}");
            let stale = view.stale.as_ref().unwrap_or_else(|| panic!("{name} does not say so: {view:#?}"));
            assert!(stale.file.ends_with(".json"), "{stale:?}");
            let shown = rack.kiln(&["machine", "show", name]).unwrap();
            assert!(shown.contains(&stale.words()), "{shown}");
            let event = view.condition.events.iter().find(|event| event.kind == "stale").unwrap();
            assert!(event.alarm && event.text == stale.words(), "{event:?}");
        }
        let status = rack.kiln(&["trust", "status"]).unwrap();
        assert!(status.contains("has EXPIRED"), "{status}");

        rack.kiln(&["assign", NAMES[0], "minimal/2", "--via", "cold"]).unwrap();
        let stale = "metadata-stale";
        let view = rack.wait(NAMES[0], stale, |v| v.failures().contains(&stale)).unwrap();
        assert!(view.is_healthy_on(1), "it works on: {view:#?}");
        rack.kiln(&["trust", "renew"]).unwrap();
        rack.wait_healthy(NAMES[0], 2).unwrap();
        rack.wait(NAMES[0], "new dates", |v| v.stale.is_none()).unwrap();
    });
}

/// The boot server is off for sixty days, and the power fails in the end. The clock is set two months on, and read by nobody: so the
/// metadata that lies beside the release on its disk had expired before it came there. The machine comes up from its disk without a
/// server, says on its console what is stale, and to the server once that is back. An assignment that expired there is the agent's own
/// test: `an_assignment_that_expired_on_the_disk_starts_its_release_and_leads_to_no_other`.
#[test]
#[ignore = "slow: an install and a boot from the disk; make test-slow"]
fn a_machine_with_a_disk_comes_up_after_sixty_days_without_a_server_and_says_that_it_is_stale() {
    testing::rack(|paths| {
        let name = NAMES[0];
        let mut rack = on_disk::rack(paths, "sixty-days");
        // The machine believes no clock of its own: what its disk keeps is to be expired by the time that its director told it last.
        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        assert!(rack.stop_server().unwrap());
        expire(&rack, "image-disk");
        rack.start_server().unwrap();
        rack.machine(name).power_on().unwrap();
        let view = rack.wait_healthy(name, 2).unwrap();
        let console = rack.machine(name).console().unwrap().clone();
        console.wait_for("A Good disk/2, B Empty -", Mark::default(), IDLE).unwrap();
        assert!(view.stale.is_some() && view.failures().is_empty(), "{view:#?}");
        let before = boot_id(&view);
        rack.machine(name).power_off();
        rack.kill_server();

        let later: &'static str = hours(60 * 24).to_string().leak();
        rack.machine(name).spec.clock = Some(&later[.."2026-01-01".len()]);
        rack.machine(name).power_on().unwrap();
        let console = rack.machine(name).console().unwrap().clone();
        console.wait_for("disk/2 is healthy: vda: A Good disk/2", Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        assert!(said.contains("the release in the slot starts"), "without a server: {said}");
        assert!(said.contains("kiln-agent: metadata is stale: "), "{said}");
        assert!(!said.contains("Start PXE"), "from its disk: {said}");

        rack.start_server().unwrap();
        let again = |v: &MachineView| v.is_healthy_on(2) && boot_id(v) != before && v.stale.is_some();
        let view = rack.wait(name, "told when the server is back", again).unwrap();
        rack.kiln(&["assign", name, "disk/1", "--via", "cold"]).unwrap();
        let stale = "metadata-stale";
        rack.wait(name, stale, |v| v.failures().contains(&stale)).unwrap();
        assert_eq!(view.release, Some(2), "{view:#?}");
    });
}
