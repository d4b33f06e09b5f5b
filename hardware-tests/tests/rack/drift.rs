//! A machine that is no longer what its release says: told, and put up anew where its role wants that. What is compared with
//! what is in `agent/src/drift/tests.rs`, what the server decides in `server/fleet/tests/fleet/drift.rs`. The same boots
//! show health checks and hooks on a real system; their corners are in `agent/src/health/tests.rs` and
//! `agent/src/service/tests/hooks.rs`.

use kiln_lab::api::MachineView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{net, ntp, site, testing};
use kiln_protocol::{DriftKind, Stage};
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

const NAME: &str = "rack-1";
/// A module of the same kernel that needs no other. Releases of the image for disks have it, those of this one do not.
const MODULE: &str = "scsi_common";
/// What differs, in the agent's words. The kernel's release cannot differ on a machine that runs what its UKI holds: a file is
/// bound over the place where the kernel says it, which is a difference of its own.
const DIFFERS: [(DriftKind, &str); 9] = [
    (DriftKind::Module, MODULE),
    (DriftKind::Kernel, "the kernel"),
    (DriftKind::Mount, "/proc/sys/kernel/osrelease"),
    (DriftKind::Executable, "/run/kiln-copied"),
    (DriftKind::Mount, "/mnt"),
    (DriftKind::Mount, "/etc/passwd"),
    (DriftKind::Unit, "kiln-evil.service"),
    (DriftKind::User, "eve:0"),
    (DriftKind::Listener, "tcp/4444"),
];

/// Checks that the word `break` makes fail.
const BREAKS: [&str; 6] =
    ["tcp.127.0.0.1:4446", "unit.kiln-listener.service", "disk./var/tmp", "memory", "command./usr/bin/test", "time"];

/// What the units with limits meet.
const LIMITS: [&str; 2] =
    ["1 process(es) killed at its memory limit", "kiln-burner.service: held back by its CPU limit"];

fn differences(view: &MachineView) -> Vec<(DriftKind, &str)> {
    view.condition.drift.iter().map(|difference| (difference.kind, difference.what.as_str())).collect()
}

fn happened(view: &MachineView, kind: &str, words: &str) -> bool {
    view.condition.events.iter().any(|event| event.kind == kind && event.text.contains(words))
}

/// Where its door is, by what the agent says of its card.
pub fn address(rack: &mut Rack) -> Ipv4Addr {
    let said = rack.machine(NAME).console().unwrap().since(Mark::default());
    let (_, address) = said.rsplit_once(" has [").unwrap();
    address.split([',', ']']).next().unwrap().parse().unwrap()
}

/// Says a word at the machine's door, with what belongs to it, and waits until it is done.
pub fn order(rack: &mut Rack, address: Ipv4Addr, word: &str, more: &[u8]) {
    let console = rack.machine(NAME).console().unwrap().clone();
    let before = console.mark();
    let mut door = TcpStream::connect((address, 4445)).unwrap();
    door.write_all(format!("{word}\n").as_bytes()).and_then(|()| door.write_all(more)).unwrap();
    // The end of it.
    drop(door);
    console.wait_for(&format!("KILN-DRIFTS {word} done"), before, IDLE).unwrap();
}

/// [`MODULE`] as Debian signed it, out of the initramfs of another image with the same kernel.
fn foreign_module(rack: &Rack) -> Vec<u8> {
    let initramfs = rack.site.join(format!("build/{}/1/initramfs", site::DISK));
    let script = format!("zstd -dcq '{}' | cpio --quiet -i --to-stdout '*/{MODULE}.ko'", initramfs.display());
    let out = Command::new("sh").args(["-c", &script]).output().unwrap();
    let why = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.stdout.starts_with(b"\x7fELF"),
        "no {MODULE} (`kiln-lab prepare --image disk` builds its image): {why}"
    );
    out.stdout
}

/// Healthy by checks of every kind but HTTP; then six fail at once, the clock's by an hour that is also told as drift. Each is
/// named. Nothing of it makes the machine leave, and it is healthy again when all of them pass.
fn loses_its_health_and_finds_it_again(rack: &mut Rack, address: Ipv4Addr) {
    order(rack, address, "break", b"");
    let ill = |view: &MachineView| {
        view.state == "degraded"
            && BREAKS.iter().all(|check| happened(view, "health", &format!("check {check} fails: ")))
    };
    rack.wait(NAME, "ill, and told of each check", ill).unwrap();
    rack.wait(NAME, "told of its clock", |view| differences(view) == [(DriftKind::Clock, "clock")]).unwrap();
    order(rack, address, "mend", b"");
    let well = |view: &MachineView| {
        view.is_healthy_on(1)
            && differences(view).is_empty()
            && BREAKS.iter().all(|check| happened(view, "health", &format!("check {check} passes again")))
    };
    let view = rack.wait(NAME, "well again", well).unwrap();
    assert_eq!(view.boots.len(), 1, "no check and no wrong clock makes a machine leave");
}

/// What the release calls before a machine leaves was called before it left, while the service that it ends was there still;
/// and what it calls at the first *healthy* was called then.
fn its_hooks_ran(said: &str) {
    let at = |words: &str| said.find(words).unwrap_or_else(|| panic!("{words:?} is not on the console:\n{said}"));
    let undrained = at("KILN-HOOK undrain, the service is active");
    let drained = at("KILN-HOOK drain, the service is active");
    assert!(undrained < drained && drained < at(Stage::Going.label()), "in this order:\n{said}");
    at("hook: undrain hook work-begins is through");
    at("hook: drain hook work-ends is through");
}

/// Healthy and as released, also after health was lost and found; then a kernel module, a program, mounts, a unit, a user and a
/// listener that nobody declared, and another kernel by its own word: the server names all of them within a minute and raises an
/// alarm, and its role's word puts the machine up anew, in which none of it is left, after its hooks have run. Meanwhile two units
/// are held to their limits, which is told too.
#[test]
#[ignore = "slow: two boots; make test-slow"]
fn a_machine_that_drifts_is_told_of_and_put_up_anew() {
    testing::rack(|paths| {
        let spec = MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe));
        let id = spec.uuid();
        let mut options = RackOptions::scenario(paths, "drifts", spec);
        options.image = site::DRIFTS.to_owned();
        options.unknown = vec![NAME.to_owned()];
        options.config = "[[role]]\nname = \"strict\"\nimage = \"drifts\"\ndrift = \"reimage\"\n".into();
        let mut rack = Rack::start(paths, &options).unwrap();
        ntp::serve(net::SERVER).unwrap();
        rack.kiln(&["release", "publish", "drifts/1"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait(NAME, "discovered", |v| v.state == "discovered" && v.stage == Some(Stage::Assignment)).unwrap();
        rack.kiln(&["machine", "approve", &id, "--role", "strict"]).unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert!(differences(&view).is_empty(), "a Debian system as it was released: {:?}", view.condition);
        let address = address(&mut rack);
        loses_its_health_and_finds_it_again(&mut rack, address);

        let resets = rack.machine(NAME).resets();
        let module = foreign_module(&rack);
        order(&mut rack, address, "drift", &module);
        let begun = Instant::now();
        let named = |view: &MachineView| DIFFERS.iter().all(|what| differences(view).contains(what));
        let view = rack.wait(NAME, "told what differs", named).unwrap();
        let took = begun.elapsed();
        println!("told after {took:?}: {:?}", view.condition);
        assert!(took < Duration::from_secs(60), "{took:?}");
        assert!(view.condition.events.iter().any(|e| e.kind == "drift" && e.alarm), "{:#?}", view.condition);
        assert!(rack.kiln(&["machine", "list"]).unwrap().contains("drift "));
        rack.wait(NAME, "limits", |v| LIMITS.iter().all(|words| happened(v, "limit", words))).unwrap();

        rack.machine(NAME).wait_reset(resets, 2 * IDLE).unwrap();
        its_hooks_ran(&rack.machine(NAME).console().unwrap().since(Mark::default()));
        let log = &rack.server().unwrap().log;
        log.wait_for("it is put up anew with drifts/1", Mark::default(), IDLE).unwrap();
        let anew = |view: &MachineView| view.boots.len() > 1 && view.is_healthy_on(1) && differences(view).is_empty();
        rack.wait(NAME, "as released again", anew).unwrap();
    });
}
