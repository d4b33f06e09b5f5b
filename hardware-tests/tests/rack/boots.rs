//! The boots that only real firmware can show. Each scenario checks many things, because a boot costs half a minute.
//! Consoles: target/lab/console/SCENARIO/.
use crate::secure_boot::{self, LOCKED, is_enforced};
use kiln_lab::api::MachineView;
use kiln_lab::console::{Console, Mark};
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::server::DhcpMode;
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{golden, site, testing};
use kiln_protocol::{DriftKind, Stage};
use serde_json::{Value, json};

const PXE: Firmware = Firmware::Uefi(NetworkBoot::Pxe);
const HTTP: Firmware = Firmware::Uefi(NetworkBoot::Http);
const NAME: &str = "rack-1";
/// What the agent may ever have had in memory as a service, bytes.
const AGENT_RSS: u64 = 12_000_000;

fn root_hash(rack: &Rack, image: &str, release: u64) -> Option<String> {
    let manifest = site::manifest_of(&rack.site, image, release).unwrap();
    manifest["verity"]["root_hash"].as_str().map(str::to_owned)
}

/// UEFI PXE over TFTP with Secure Boot on and the site's key alone in db; the cable is cut before the agent has an address; the boot server dies while the root downloads and comes back; then a reimage by kexec, which the locked-down kernel allows
/// because the next one carries the site's signature.
#[test]
fn pxe_survives_a_dead_server_and_reimages_by_kexec() {
    testing::rack(|paths| {
        let spec = secure_boot::secure(paths, NetworkBoot::Pxe);
        let mut rack = Rack::start(paths, &RackOptions::scenario(paths, "pxe-kexec", spec)).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        // The boot program is there, and its kernel starts: some seconds before the agent asks for an address.
        console.wait_for("EFI stub: Loaded initrd", Mark::default(), IDLE).unwrap();
        // Its cable loses everything before it has one: that has a typed reason, and is not the end.
        rack.machine(NAME).set_connected(false).unwrap();
        console.wait_for("(network-no-offer", Mark::default(), IDLE).unwrap();
        // Slow enough that the root is under way for many seconds.
        rack.machine(NAME).set_slow(24_000).unwrap();
        rack.machine(NAME).set_connected(true).unwrap();
        console.wait_for(Stage::Root.label(), Mark::default(), IDLE).unwrap();
        let before = console.mark();
        rack.kill_server();
        console.wait_for("(server-unreachable", before, IDLE).unwrap();
        assert!(!console.since(Mark::default()).contains(Stage::Verity.label()), "the root was there already");
        rack.start_server().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert_eq!(view.root_hash, root_hash(&rack, site::IMAGE, 1), "read from inside the machine");
        assert_eq!(view.key_storage.as_deref(), Some("efi-variable"));
        assert_eq!(view.rollback_memory.as_deref(), Some("efi-variable"));
        assert!(is_enforced(&view), "{view:#?}");
        assert!(console.since(Mark::default()).contains(LOCKED), "{}", console.last_words(40));
        rack.machine(NAME).set_slow(1_000_000).unwrap();
        let begun = console.mark();

        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "kexec"]).unwrap();
        let resets = rack.machine(NAME).resets();
        let view = rack.wait_healthy(NAME, 2).unwrap();
        assert_eq!(view.root_hash, root_hash(&rack, site::IMAGE, 2), "read from inside the machine");
        assert_eq!(rack.machine(NAME).resets(), resets, "a kexec does not go through firmware");
        assert!(is_enforced(&view), "{view:#?}");
        assert!(console.since(begun).contains(LOCKED), "{}", console.last_words(40));
        let memory = view.agent_memory.expect("each report says it");
        assert!(memory.peak_bytes <= AGENT_RSS, "{memory:?}");
        let reimage = view.boot().unwrap();
        assert_eq!(reimage.via.as_deref(), Some("kexec"));
        assert!(reimage.at(Stage::Dhcp, "done").is_none(), "no firmware was heard: {reimage:#?}");
        // Its own words of this start: from the kernel's first on, and on from where the image's system took over.
        let log = rack.kiln(&["machine", "log", NAME]).unwrap();
        let at = |words: &str| log.find(words).unwrap_or_else(|| panic!("no {words:?} in {log}"));
        assert!(at("Linux version") < at("Command line: ") && at("Linux version") < at("systemd["), "{log}");
        assert!(at(Stage::Start.label()) < at(Stage::Health.label()), "the stages stand between: {log}");

        let list: Value = serde_json::from_str(&rack.kiln(&["machine", "list", "--json"]).unwrap()).unwrap();
        let row = list.as_array().unwrap().iter().find(|m| m["name"] == NAME).unwrap();
        assert_eq!((&row["state"], &row["release"]), (&json!("healthy"), &json!(2)));
        assert!(rack.kiln(&["machine", "list"]).unwrap().contains(NAME));
        assert!(rack.stop_server().unwrap(), "SIGTERM ends the boot server with status 0");
    });
}

/// UEFI HTTP Boot; a reimage by cold boot; then an older, validly signed repository is served and the machine, which
/// has seen the newer one, is switched off and on.
#[test]
fn http_boot_reimages_cold_and_remembers_what_it_has_seen() {
    testing::rack(|paths| {
        let spec = MachineSpec::new(1, HTTP);
        let mut rack = Rack::start(paths, &RackOptions::scenario(paths, "http-cold", spec)).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("Start HTTP Boot over IPv4", Mark::default(), IDLE).unwrap();
        assert!(!console.since(Mark::default()).contains("Start PXE"), "{}", console.last_words(20));
        rack.wait_healthy(NAME, 1).unwrap();
        let metadata = rack.site.join("repo/metadata");
        let older = paths.scratch.join("older");
        site::copy_tree(&metadata, &older).unwrap();

        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        let resets = rack.machine(NAME).resets();
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "cold"]).unwrap();
        let view = rack.wait_healthy(NAME, 2).unwrap();
        assert_eq!(view.root_hash, root_hash(&rack, site::IMAGE, 2), "read from inside the machine");
        assert!(rack.machine(NAME).resets() > resets, "a cold boot goes through firmware");
        assert_eq!(view.boot().unwrap().via.as_deref(), Some("cold"));

        // The boot server is put back to an old backup, its own memory included.
        rack.machine(NAME).power_off();
        assert!(rack.stop_server().unwrap());
        std::fs::remove_dir_all(&metadata).unwrap();
        site::copy_tree(&older, &metadata).unwrap();
        std::fs::remove_dir_all(rack.site.join("state")).unwrap();
        std::fs::create_dir(rack.site.join("state")).unwrap();
        rack.start_server().unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait(NAME, "metadata-rollback", |v| v.failures().contains(&"metadata-rollback")).unwrap();
        let console = rack.machine(NAME).console().unwrap();
        assert!(!console.since(Mark::default()).contains(Stage::Handover.label()), "it must not boot");
    });
}

/// As a person does it: reads the code from the machine's console, compares it with the server's, and types it. Another one is
/// refused.
fn approve_by_code(rack: &mut Rack, console: &Console, id: &str) {
    let says = "kiln-agent: approval code ";
    console.wait_for_line(says, Mark::default(), IDLE).unwrap();
    let said = console.since(Mark::default());
    let code = said.lines().find_map(|line| line.split_once(says)).unwrap().1.trim();
    rack.wait(NAME, "the code that is on its console", |v| v.code.as_deref() == Some(code)).unwrap();
    let approve = ["machine", "approve", id, "--role", "lab", "--code"];
    let refused = rack.kiln(&[&approve[..], &["ABCD-EFGH"]].concat()).unwrap_err().to_string();
    assert!(refused.contains("somebody stands between"), "{refused}");
    assert_eq!(rack.view(NAME).unwrap().state, "discovered", "nobody approved it");
    rack.kiln(&[&approve[..], &[code]].concat()).unwrap();
}

/// BIOS with Kiln as the only DHCP server: an unknown machine waits until a person reads its code and approves it, then runs
/// an image that tries from inside what a verity root must refuse.
#[test]
fn bios_waits_for_approval_and_its_root_refuses_every_change() {
    testing::rack(|paths| {
        let spec = MachineSpec::new(1, Firmware::Bios);
        let id = spec.uuid();
        let mut options = RackOptions::scenario(paths, "bios-probe", spec);
        options.image = site::PROBE.to_owned();
        options.dhcp = DhcpMode::Full;
        options.unknown = vec![NAME.to_owned()];
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "probe/1"]).unwrap();
        // Its cable is cut: the ROM asks, nobody hears it, and it goes on asking.
        rack.machine(NAME).set_connected(false).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("Configuring", Mark::default(), IDLE).unwrap();
        assert!(rack.view(NAME).is_none(), "heard through a cut cable: {:?}", rack.view(NAME));
        rack.machine(NAME).set_connected(true).unwrap();
        let view = rack.wait(NAME, "discovered, waiting", |v| v.stage == Some(Stage::Assignment)).unwrap();
        assert_eq!(view.state, "discovered", "nobody approved it: {view:#?}");
        assert_eq!(view.key_storage.as_deref(), Some("ephemeral"));
        assert_eq!(view.rollback_memory.as_deref(), Some("none"));
        approve_by_code(&mut rack, &console, &id);
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert_eq!(view.root_hash, root_hash(&rack, site::PROBE, 1));

        console.wait_for_line("KILN-PROBE flip", Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        let lines: Vec<&str> = said.lines().filter_map(|l| l.split_once("KILN-PROBE ").map(|(_, rest)| rest)).collect();
        for check in ["system", "read-only", "mounts", "exec-root", "memfd", "root-hash", "data", "flip"] {
            assert!(lines.iter().any(|l| l.starts_with(&format!("{check} ok"))), "{check}: {lines:#?}");
        }
        assert!(!lines.iter().any(|l| l.contains(" fail ")), "{lines:#?}");
        for place in ["/dev", "/dev/shm", "/run", "/tmp", "/var/log"] {
            let ok = format!("exec ok {place} (");
            assert!(lines.iter().any(|l| l.starts_with(&ok)), "{place}: {lines:#?}");
        }
        // What is not promised without Secure Boot: root takes noexec away; and nowhere: scripts of an interpreter.
        for open in ["remount ran", "jit ran", "script ran"] {
            assert!(lines.iter().any(|l| l.starts_with(open)), "{open}: {lines:#?}");
        }
        let hash = root_hash(&rack, site::PROBE, 1).unwrap();
        assert!(lines.contains(&format!("root-hash ok {hash}").as_str()), "{lines:#?}");
        // Nobody but the kernel knows of the flipped bit, and it tells the agent.
        let altered = |v: &MachineView| {
            v.condition.drift.iter().any(|d| d.kind == DriftKind::Root && d.text.contains("not as signed"))
        };
        rack.wait(NAME, "the kernel's verdict on the root", altered).unwrap();
        for link in ["undionly.kpxe", "boot.ipxe"] {
            assert!(said.contains(link), "ROM, undionly.kpxe by TFTP, script by HTTP: {link} is missing");
        }
    });
}

/// One byte of the next release's root is flipped after it was prefetched: the trial is refused, named and reported,
/// and the machine comes back on the release before by itself.
#[test]
fn a_corrupt_root_is_refused_and_the_previous_release_boots() {
    testing::rack(|paths| {
        let mut options = RackOptions::scenario(paths, "corrupt-root", MachineSpec::new(1, PXE));
        options.config = "[fleet]\ntrial_attempts = 1\n".into();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        let log = &rack.server().unwrap().log;
        log.wait_for("healthy: runs minimal/1", Mark::default(), IDLE).unwrap();
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/boot-log.md");
        let different = golden::differences(&std::fs::read_to_string(page).unwrap(), &log.since(Mark::default()));
        assert!(different.is_empty(), "docs/boot-log.md and the boot server's log differ:\n{}", different.join("\n"));

        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        let resets = rack.machine(NAME).resets();
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "cold"]).unwrap();
        rack.machine(NAME).wait_reset(resets, IDLE).unwrap();
        let root = site::manifest(&rack.site, 2).unwrap()["root"]["sha256"].as_str().unwrap().to_owned();
        site::flip_byte(&rack.artifact(&root), 1 << 20).unwrap();

        let refused = "root-hash-mismatch";
        let view = rack.wait(NAME, refused, |v| v.failures().contains(&refused)).unwrap();
        assert_ne!(view.state, "healthy");
        let view = rack
            .wait(NAME, "back on release 1", |v| {
                v.release == Some(1) && v.boot().is_some_and(|b| b.at(Stage::Healthy, "done").is_some())
            })
            .unwrap();
        assert_eq!(view.root_hash, root_hash(&rack, site::IMAGE, 1));
        assert_eq!(view.state, "fell-back", "{view:#?}");
        assert!(
            view.reason.as_deref().is_some_and(|r| r.contains("minimal/2")),
            "it says from what: {:?}",
            view.reason
        );
    });
}

/// A machine's clock is dead, or set by somebody: it says 1970, or 2099. Nothing asks it.
#[test]
#[ignore = "slow: three boots of the firmware and a kexec; make test-slow"]
fn a_wrong_clock_changes_nothing() {
    testing::rack(|paths| {
        let spec = |number, clock| MachineSpec { clock: Some(clock), ..MachineSpec::new(number, PXE) };
        let mut options = RackOptions::scenario(paths, "clock", spec(1, "1970-01-02"));
        options.machines.push(spec(2, "2099-01-01"));
        let mut rack = Rack::start(paths, &options).unwrap();
        for name in ["rack-1", "rack-2"] {
            rack.machine(name).power_on().unwrap();
        }
        for name in ["rack-1", "rack-2"] {
            let view = rack.wait_healthy(name, 1).unwrap();
            assert!(view.failures().is_empty(), "{name}: {view:#?}");
        }
        // Nor does it decide whether another release is started: both ways to one.
        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        for (name, via) in [("rack-1", "kexec"), ("rack-2", "cold")] {
            rack.kiln(&["assign", name, "minimal/2", "--via", via]).unwrap();
            let view = rack.wait_healthy(name, 2).unwrap();
            assert_eq!(view.boot().unwrap().via.as_deref(), Some(via), "{name}");
            assert!(view.failures().is_empty(), "{name}: {view:#?}");
        }
    });
}
