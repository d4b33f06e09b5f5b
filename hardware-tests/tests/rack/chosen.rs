//! Whoever answers a machine's firmware chooses the program that it starts: a release that the site signed, and not the one that is
//! assigned.

use crate::disk::starts_and_says;
use crate::support::on_disk::{installed, rack};
use kiln_lab::console::Mark;
use kiln_lab::rack::IDLE;
use kiln_lab::server::NETWORK_FIRST;
use kiln_lab::{site, testing};
use kiln_protocol::Stage;

const NAME: &str = "rack-1";

/// Both releases are good in their slots, and the network comes first. It answers with the older one's program: that boot goes to the
/// one that is assigned, and so does the next. Once the network answers as the server wants, the machine is there.
#[test]
#[ignore = "slow: an install, a reimage and three boots; make test-slow"]
fn what_the_network_chose_goes_to_the_assigned_release_though_it_lies_in_a_slot() {
    testing::rack(|paths| {
        let mut rack = rack(paths, "network-chose");
        let console = installed(&mut rack);
        rack.kiln(&["machine", "approve", NAME, "--role", NETWORK_FIRST]).unwrap();
        console.wait_for("the network comes before the disk", Mark::default(), IDLE).unwrap();
        rack.kiln(&["release", "publish", "disk/2"]).unwrap();
        rack.kiln(&["assign", NAME, "disk/2", "--via", "cold"]).unwrap();
        rack.wait_healthy(NAME, 2).unwrap();
        console.wait_for("disk/2 is healthy: vda: A Good disk/1, B Good disk/2", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();

        let sha256 = |release| {
            site::manifest_of(&rack.site, "disk", release).unwrap()["uki"]["sha256"].as_str().unwrap().to_owned()
        };
        let program = |release| rack.site.join("repo/b").join(sha256(release)).join("kiln.efi");
        let (assigned, older) = (program(2), program(1));
        let kept = assigned.with_extension("kept");
        rack.kill_server();
        std::fs::rename(&assigned, &kept).unwrap();
        std::fs::copy(&older, &assigned).unwrap();
        rack.start_server().unwrap();
        let said = starts_and_says(&mut rack, "disk/2 is assigned, this is disk/1: going there");
        assert!(said.contains("Start PXE"), "{said}");
        // It restarts, and is sent the same again.
        let mark = rack.machine(NAME).mark();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("disk/2 is assigned, this is disk/1: going there", mark, IDLE).unwrap();
        let said = console.since(Mark::default());
        assert!(!said.contains(Stage::Handover.label()), "nothing of release 1 starts: {said}");
        rack.kill_server();
        std::fs::rename(&kept, &assigned).unwrap();
        rack.start_server().unwrap();
        let before = rack.machine(NAME).mark();
        rack.wait(NAME, "where it belongs", |v| v.is_healthy_on(2)).unwrap();
        assert!(!console.since(before).contains("disk/1 is healthy"));
    });
}
