//! The hardware watchdog and the agent. That a kernel which hangs after a kexec is ended is in `hardware.rs`; here it is the agent
//! that hangs, as a service, and what does not make it hang.

use crate::drift::{address, order};
use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{net, ntp, site, testing};
use kiln_protocol::Stage;
use std::time::Duration;

const NAME: &str = "rack-1";
/// Longer than the watchdog's 180 s, which are a little longer in the i6300esb: its driver counts 1024 ms for each.
const LONGER: Duration = Duration::from_secs(200);

fn boot_id(view: &MachineView) -> Option<String> {
    view.boot().map(|boot| boot.boot_id.clone())
}

/// Somebody holds the serial line: the agent says what it has to say to the boot server all the same, and goes on. The machine stays
/// up for longer than the watchdog's time, so its service pets it. Then the service is stopped as it stands, while the system around it
/// goes on: nobody pets the watchdog, and the machine is restarted and comes up once more.
#[test]
#[ignore = "slow: two boots, and twice the watchdog's time; make test-slow"]
fn a_held_console_holds_up_no_agent_and_a_stopped_one_is_ended_by_the_watchdog() {
    testing::rack(|paths| {
        let spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        let mut options = RackOptions::scenario(paths, "watchdog-agent", spec);
        options.image = site::DRIFTS.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        // Its checks want a clock that is right.
        ntp::serve(net::SERVER).unwrap();
        rack.kiln(&["release", "publish", "drifts/1"]).unwrap();

        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("hardware watchdog: a hang of 180 s", Mark::default(), IDLE).unwrap();
        // Without a boot server it gets no further before the line is held.
        rack.kill_server();
        rack.machine(NAME).hold_line().unwrap();
        rack.start_server().unwrap();
        let goes_on = |v: &MachineView| v.boot().is_some_and(|boot| boot.at(Stage::Assignment, "done").is_some());
        rack.wait(NAME, "its boot goes on", goes_on).unwrap();
        let said = console.since(Mark::default());
        assert!(!said.contains(Stage::Assignment.label()), "the line was not held: {said}");
        rack.machine(NAME).let_line_go().unwrap();
        let before = boot_id(&rack.wait_healthy(NAME, 1).unwrap());

        let unexpected = rack.machine(NAME).wait_hang(0, LONGER);
        assert!(unexpected.is_err(), "nobody petted it: {}", console.last_words(40));
        rack.machine(NAME).check_running().unwrap();
        assert_eq!(boot_id(&rack.view(NAME).unwrap()), before, "the same boot all the while");

        let address = address(&mut rack);
        order(&mut rack, address, "freeze", b"");
        rack.machine(NAME).wait_hang(0, 4 * IDLE).unwrap();
        rack.wait(NAME, "healthy again", |v| boot_id(v) != before && v.is_healthy_on(1)).unwrap();
        assert_eq!(rack.machine(NAME).hangs(), 1, "it hung once");
    });
}
