//! A whole rack without power, and a site whose signers let every date pass. What the agent makes of it alone: `thefts.rs`.

use crate::thefts::{forge, hours, key};
use kiln_lab::api::MachineView;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{Rack, RackOptions};
use kiln_lab::testing;
use kiln_lab::variables::NetworkBoot;
use serde_json::json;

const NAMES: [&str; 2] = ["rack-1", "rack-2"];

fn boot_id(view: &MachineView) -> Option<String> {
    view.boot().map(|boot| boot.boot_id.clone())
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
        for role in ["targets", "image-minimal", "snapshot"] {
            let own = key(&rack.site, &format!("offline/{role}.key"));
            forge(&rack.site, role, &[&own], &|document| document["expires"] = json!(hours(-1)));
        }
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
