//! A trial that never becomes healthy: the network's side counts its boots, and the boot answer goes back by itself.

use crate::common::*;
use kiln_netboot::{BootAnswer, BootKind, BootQuery};
use kiln_protocol::*;
use kiln_server::access::Caller;
use kiln_server::control::Control;

fn query(n: u8, kind: BootKind) -> BootQuery {
    BootQuery {
        id: Some(machine_id(n)),
        id_plain: None,
        mac: format!("52:54:00:00:00:{n:02x}").parse().unwrap(),
        arch: Architecture::X86_64,
        firmware: Firmware::Uefi,
        kind,
    }
}

/// A shell, or what wipes disks, is had by order only: not by a stranger, and not from the pre-loaded list.
#[tokio::test]
async fn the_default_image_gives_strangers_its_newest_normal_release() {
    let site = TestSite::new();
    let two = site.publish(2);
    site.publish_as(3, |manifest| manifest.class = "rescue".into());
    site.publish_as(4, |manifest| manifest.class = "wipe".into());
    let (control, _stop) = control(&site).await;
    let uki = BootAnswer::Uki { sha256: two.uki.sha256.parse().unwrap() };
    assert_eq!(control.boot_answer(&query(9, BootKind::UefiPxe)), uki);
    let mut agent = Agent::new(1, &two);
    let report = agent.report();
    assigned(&control.report(agent.key_id(), report).await.unwrap());
    assert_eq!(control.view("rack-1").unwrap().assigned.unwrap().release, 2);
    let mut agent = Agent::new(9, &two);
    let report = agent.report();
    control.report(agent.key_id(), report).await.unwrap();
    control.approve(machine_id(9).as_str(), None, "lab", None, &Caller::local(0)).await.unwrap();
    assert_eq!(control.view(machine_id(9).as_str()).unwrap().assigned.unwrap().release, 2);
}

/// Where nobody names a number, no machine is given what the site took back.
#[tokio::test]
async fn the_newest_release_is_none_that_was_revoked_or_fell_below_the_floor() {
    let site = TestSite::new();
    let (two, three) = (site.publish(2), site.publish(3));
    std::fs::write(site.site.secure_boot("revoked"), format!("{} minimal/3\n", "ab".repeat(32))).unwrap();
    let now = jiff::Timestamp::now();
    kiln_images::publish_dbx(&site.site, now, &mut kiln_images::Unlock::nobody()).unwrap();
    let (control, _stop) = control(&site).await;
    let uki = BootAnswer::Uki { sha256: two.uki.sha256.parse().unwrap() };
    assert_eq!(control.boot_answer(&query(9, BootKind::UefiPxe)), uki);
    let mut listed = Agent::new(1, &three);
    let report = listed.report();
    control.report(listed.key_id(), report).await.unwrap();
    assert_eq!(control.view("rack-1").unwrap().assigned.unwrap().release, 2);
    let mut agent = Agent::new(9, &two);
    let report = agent.report();
    control.report(agent.key_id(), report).await.unwrap();
    control.approve(machine_id(9).as_str(), Some("nine"), "lab", None, &Caller::local(0)).await.unwrap();
    assert_eq!(control.view("nine").unwrap().assigned.unwrap().release, 2);
    let audit = control.store.audit_tail(100).await.unwrap();
    for name in ["rack-1", "nine"] {
        let said = "to run minimal/2; passed over: minimal/3 is revoked";
        assert!(audit.iter().any(|r| r.machine == name && r.what.contains(said)), "{audit:?}");
    }

    // A floor above all of them: nothing is left, and the reason names each.
    kiln_images::raise_floor(site.path(), "minimal", 3, now).unwrap();
    let mut agent = Agent::new(10, &two);
    let report = agent.report();
    control.report(agent.key_id(), report).await.unwrap();
    let refused =
        control.approve(machine_id(10).as_str(), Some("ten"), "lab", None, &Caller::local(0)).await.unwrap_err();
    let said = "passed over: minimal/3 is revoked, minimal/2 is below the floor 3, minimal/1 is below the floor 3";
    assert!(refused.to_string().contains(said), "{refused}");
    let BootAnswer::Wait { reason } = control.boot_answer(&query(10, BootKind::UefiPxe)) else { panic!("it boots") };
    assert!(reason.contains(said), "{reason}");
}

#[tokio::test]
async fn after_three_boots_without_healthy_the_last_good_release_is_booted() {
    let site = TestSite::new();
    let (one, two) = (site.manifest(1), site.publish(2));
    let (control, _stop) = control(&site).await;
    let q = query(1, BootKind::UefiPxe);
    let uki = |m: &kiln_release::Manifest| BootAnswer::Uki { sha256: m.uki.sha256.parse().unwrap() };
    assert_eq!(control.boot_answer(&q), uki(&two), "an unknown machine boots the default image's newest");

    // It is known, and good on release 1.
    let mut agent = Agent::new(1, &one);
    let report = agent.healthy();
    control.report(agent.key_id(), report).await.unwrap();
    control.assign("rack-1", &"minimal/1".parse().unwrap(), Via::Cold, "test").await.unwrap();
    let report = agent.healthy();
    control.report(agent.key_id(), report).await.unwrap();
    assert_eq!((control.boot_answer(&q), control.view("rack-1").unwrap().state.as_str()), (uki(&one), "healthy"));

    control.assign("rack-1", &"minimal/2".parse().unwrap(), Via::Cold, "test").await.unwrap();
    for n in 0..3 {
        assert_eq!(control.boot_answer(&q), uki(&two), "try {n}");
        control.asked(&q).await.unwrap();
        control.asked(&q).await.unwrap();
        control.downloads(Some(q.mac), q.id.as_ref(), &two.uki.sha256, false).await.unwrap();
        control.downloads(Some(q.mac), q.id.as_ref(), &two.uki.sha256, true).await.unwrap();
        agent.restart(&two);
        let report = agent.report();
        control.report(agent.key_id(), report).await.unwrap();
    }
    assert_eq!(control.boot_answer(&q), uki(&one), "decided before the packet is recorded");
    control.asked(&q).await.unwrap();
    control.downloads(Some(q.mac), q.id.as_ref(), &one.uki.sha256, false).await.unwrap();
    let view = control.view("rack-1").unwrap();
    assert_eq!((view.state.as_str(), view.assigned.unwrap().release), ("booting", 2), "only packets say so");
    assert!(view.reason.contains("is not confirmed yet"), "{}", view.reason);

    agent.restart(&one);
    let report = agent.healthy();
    let reply = control.report(agent.key_id(), report).await.unwrap();
    let view = control.view("rack-1").unwrap();
    assert_eq!((view.state.as_str(), view.assigned.unwrap().release), ("fell-back", 1));
    assert!(view.reason.contains("minimal/2 was not healthy in 3 boots"), "{}", view.reason);
    let (envelope, ..) = assigned(&reply);
    let (assignment, _) = site.signed_site().verify_director::<Assignment>(envelope.as_bytes()).unwrap();
    assert_eq!((assignment.release, assignment.sequence), (1, 4), "an older release under a higher sequence");
    let again = control.assign("rack-1", &"minimal/2".parse().unwrap(), Via::Cold, "test").await;
    assert!(again.unwrap_err().to_string().contains("kiln machine clear rack-1"));
    control.clear("rack-1", None, "test").await.unwrap();
    control.assign("rack-1", &"minimal/2".parse().unwrap(), Via::Cold, "test").await.unwrap();
}

/// Its firmware asks and takes the whole boot program.
async fn loads(control: &Control, q: &BootQuery, manifest: &kiln_release::Manifest) {
    control.asked(q).await.unwrap();
    control.downloads(Some(q.mac), q.id.as_ref(), &manifest.uki.sha256, false).await.unwrap();
    control.downloads(Some(q.mac), q.id.as_ref(), &manifest.uki.sha256, true).await.unwrap();
}

/// It comes up once more, and gives that boot up: what its agent said last is that its firmware is next.
async fn gives_up(control: &Control, agent: &mut Agent, manifest: &kiln_release::Manifest) {
    agent.restart(manifest);
    let mut report = agent.report();
    let failure = Failure { kind: "k".into(), message: "does not verify".into(), attempt: 3, retry_in_ms: None };
    report.stages = vec![StageRecord { stage: Stage::Root, state: StageState::Failed(failure), at_ms: 1 }];
    control.report(agent.key_id(), report).await.unwrap();
}

/// A good release whose kernel dies before its agent speaks is a boot loop that only the network's side sees.
#[tokio::test]
async fn a_good_release_whose_agent_never_speaks_gives_way_to_the_one_before() {
    let site = TestSite::new();
    let (one, two) = (site.manifest(1), site.publish(2));
    let (control, _stop) = control(&site).await;
    let uki = |m: &kiln_release::Manifest| BootAnswer::Uki { sha256: m.uki.sha256.parse().unwrap() };
    // Machine 1 is good on both, machine 2 on the newer one only.
    let mut agents = [Agent::new(1, &one), Agent::new(2, &two)];
    for agent in &mut agents {
        let report = agent.healthy();
        control.report(agent.key_id(), report).await.unwrap();
    }
    control.assign("rack-1", &"minimal/1".parse().unwrap(), Via::Cold, "test").await.unwrap();
    let report = agents[0].healthy();
    control.report(agents[0].key_id(), report).await.unwrap();
    control.assign("rack-1", &"minimal/2".parse().unwrap(), Via::Cold, "test").await.unwrap();
    agents[0].restart(&two);
    let report = agents[0].healthy();
    control.report(agents[0].key_id(), report).await.unwrap();
    for agent in &mut agents {
        gives_up(&control, agent, &two).await;
        let q = query(agent.n, BootKind::UefiPxe);
        for n in 0..kiln_fleet::MUTE_STARTS {
            assert_eq!(control.boot_answer(&q), uki(&two), "start {n}");
            loads(&control, &q, &two).await;
        }
    }

    let q = query(1, BootKind::UefiPxe);
    assert_eq!(control.boot_answer(&q), uki(&one), "decided before the packet is recorded");
    loads(&control, &q, &one).await;
    let view = control.view("rack-1").unwrap();
    assert!(view.reason.contains("boot loop: minimal/2 was started 5 times in a row"), "{}", view.reason);
    let kinds: Vec<_> = view.boots.last().unwrap().stages.iter().filter_map(|s| s.kind.as_deref()).collect();
    assert_eq!(kinds, [kiln_fleet::BOOT_LOOP]);
    assert_eq!(view.assigned.unwrap().release, 2, "packets assign nothing");
    agents[0].restart(&one);
    let report = agents[0].report();
    let reply = control.report(agents[0].key_id(), report).await.unwrap();
    let (envelope, ..) = assigned(&reply);
    let (assignment, _) = site.signed_site().verify_director::<Assignment>(envelope.as_bytes()).unwrap();
    assert_eq!(assignment.release, 1, "signed for its agent at once");
    let view = control.view("rack-1").unwrap();
    assert_eq!((view.state.as_str(), view.assigned.unwrap().release), ("fell-back", 1));
    assert!(view.reason.contains("its agent never spoke: back on minimal/1"), "{}", view.reason);

    // Nowhere to go: it is served on, and iPXE waits longer each time and says why.
    let q = query(2, BootKind::UefiPxe);
    let mut pauses = Vec::new();
    for _ in 0..3 {
        assert_eq!(control.boot_answer(&q), uki(&two));
        loads(&control, &q, &two).await;
        let (seconds, why) = control.pause_before(q.id.as_ref()).unwrap();
        assert!(why.contains("no other release is known to be good here"), "{why}");
        pauses.push(seconds);
    }
    assert_eq!(pauses, [5, 10, 20]);
}

#[tokio::test]
async fn packets_in_the_name_of_a_machine_that_speaks_hold_nobody_and_cost_no_trial() {
    let site = TestSite::new();
    let (one, two) = (site.manifest(1), site.publish(2));
    let (control, _stop) = control(&site).await;
    let mut agents: Vec<Agent> = (1..=2).map(|n| Agent::new(n, &one)).collect();
    for agent in &mut agents {
        let report = agent.healthy();
        control.report(agent.key_id(), report).await.unwrap();
        control.assign(&format!("rack-{}", agent.n), &"minimal/2".parse().unwrap(), Via::Cold, "test").await.unwrap();
    }
    let q = query(1, BootKind::UefiPxe);
    for _ in 0..4 {
        control.asked(&q).await.unwrap();
        control.downloads(Some(q.mac), q.id.as_ref(), &two.uki.sha256, false).await.unwrap();
        control.downloads(Some(q.mac), q.id.as_ref(), &two.uki.sha256, true).await.unwrap();
        control.tick().await.unwrap();
    }
    assert_eq!(control.view("rack-1").unwrap().state, "healthy");
    let sequence = control.view("rack-2").unwrap().assigned.unwrap().sequence;
    let report = agents[1].ready(2, sequence);
    let reply = control.report(agents[1].key_id(), report).await.unwrap();
    assert_eq!(*assigned(&reply).2, Grant::Go, "max_unavailable is 1 and nobody is away");
    let report = agents[0].healthy();
    control.report(agents[0].key_id(), report).await.unwrap();
    let view = control.view("rack-1").unwrap();
    assert_eq!((view.state.as_str(), view.assigned.unwrap().release, view.boots.len()), ("healthy", 2, 1));
    assert_eq!(control.boot_answer(&q), BootAnswer::Uki { sha256: two.uki.sha256.parse().unwrap() });
}

#[tokio::test]
async fn a_bios_machine_goes_by_ipxe_and_shows_both_of_its_downloads_as_one_stage() {
    let site = TestSite::new();
    let (control, _stop) = control(&site).await;
    let one = site.manifest(1);
    let q = query(2, BootKind::BiosIpxe);
    assert_eq!(control.boot_answer(&q), BootAnswer::Ipxe);
    control.asked(&q).await.unwrap();
    for file in [&one.kernel.sha256, &one.initramfs.sha256] {
        control.downloads(Some(q.mac), None, file, false).await.unwrap();
        control.downloads(Some(q.mac), None, file, true).await.unwrap();
    }
    let view = control.view(machine_id(2).as_str()).unwrap();
    let stages: Vec<_> = view.boots[0].stages.iter().map(|s| (s.stage, s.state.as_str())).collect();
    assert_eq!(stages, [(Stage::Dhcp, "done"), (Stage::Program, "started"), (Stage::Program, "done")]);
    assert_eq!(view.state, "discovered");
}

#[tokio::test]
async fn a_rom_that_swaps_the_bytes_of_its_uuid_is_one_machine_not_two() {
    let site = TestSite::new();
    let (control, _stop) = control(&site).await;
    let mut q = query(1, BootKind::BiosPxe);
    q.id = Some("11111111-0000-0000-0000-000000000001".parse().unwrap());
    control.asked(&q).await.unwrap();
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.report();
    control.report(agent.key_id(), report).await.unwrap();
    let views = control.views();
    assert_eq!(views.len(), 1);
    assert_eq!((views[0].name.as_str(), views[0].boots.len()), ("rack-1", 1));
    assert_eq!(views[0].boots[0].stages[0].stage, Stage::Dhcp, "its firmware's part is kept");
}
