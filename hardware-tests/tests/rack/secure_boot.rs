//! Secure Boot with real firmware: OVMF with the keys that `kiln trust secureboot enroll` wrote, and nothing else in db.
//! That a signed release boots by PXE and reimages itself by kexec under lockdown is shown in `boots.rs`.

use crate::support::{esp, foreign_root, on_disk};
use kiln_lab::api::{MachineView, StageView};
use kiln_lab::console::Mark;
use kiln_lab::machine::{Disk, Firmware, MachineSpec};
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{command, site, testing};
use kiln_protocol::{DbxOutcome, Stage};
use kiln_release::pe::Pe;
use kiln_release::{authenticode, hex, kexec};
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "rack-1";
/// What the agent says before it hands over: IPE is on, and the kernel takes no unsigned kernel or module.
pub const LOCKED: &str = "IPE enforces that only a root signed by the site is executed; lockdown: none [integrity]";

/// A machine whose db holds the site's certificate alone.
pub fn secure(paths: &Paths, way: NetworkBoot) -> MachineSpec {
    let keys = site::enroll(paths, &site::template(paths), &paths.scratch.join("keys")).unwrap();
    MachineSpec { keys: Some(keys), ..MachineSpec::new(1, Firmware::Uefi(way)) }
}

pub fn is_enforced(view: &MachineView) -> bool {
    view.protection.as_deref() == Some("enforced")
}

/// The boot program that the server sends for the machine's release.
pub fn program(rack: &Rack) -> PathBuf {
    let manifest = site::manifest(&rack.site, 1).unwrap();
    rack.site.join("repo/b").join(manifest["uki"]["sha256"].as_str().unwrap()).join("kiln.efi")
}

/// In one step: the server never sends a mixture.
fn replace(program: &Path, bytes: &[u8]) {
    let beside = program.with_extension("new");
    std::fs::write(&beside, bytes).unwrap();
    std::fs::rename(&beside, program).unwrap();
}

/// One bit of it is another, in its middle.
fn altered(program: &[u8]) -> Vec<u8> {
    let mut altered = program.to_vec();
    altered[program.len() / 2] ^= 1;
    altered
}

/// The firmware must refuse what it is sent, and the server must say so: the program was taken whole, no agent spoke.
fn refused(rack: &mut Rack, case: &str) {
    // The case before has left such a failure as well: this one's is newer.
    let last = rack.view(NAME).and_then(|v| v.boot()?.stages.last().map(|s| s.at_ms)).unwrap_or(0);
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    let begun = console.mark();
    let silent = |s: &&StageView| s.at_ms > last && s.kind.as_deref() == Some("no-agent");
    let view = rack.wait(NAME, case, |v| v.boot().is_some_and(|b| b.stages.iter().any(|s| silent(&s)))).unwrap();
    let boot = view.boot().unwrap();
    let message = boot.stages.iter().find(silent).and_then(|s| s.message.as_deref()).unwrap();
    assert!(message.contains("Secure Boot"), "{case}: {message}");
    let whole = |s: &StageView| s.at_ms > last && s.stage == Stage::Program && s.state == "done";
    assert!(boot.stages.iter().any(whole), "{case}: taken whole: {view:#?}");
    let said = console.since(begun);
    assert!(said.contains("Access Denied"), "{case}: the firmware says why: {}", console.last_words(20));
    assert!(!said.contains("Linux version") && !said.contains("kiln-agent"), "{case}: {}", console.last_words(20));
    rack.machine(NAME).power_off();
}

/// What is unsigned, altered, revoked or signed by another site is refused by the firmware before its first byte runs.
#[test]
#[ignore = "slow: five boots of the firmware; make test-slow"]
fn what_the_site_did_not_sign_or_has_revoked_is_refused() {
    testing::rack(|paths| {
        let spec = secure(paths, NetworkBoot::Pxe);
        let keys = spec.keys.clone().unwrap();
        let mut options = RackOptions::scenario(paths, "secure-boot-refused", spec);
        options.config = "[fleet]\nfirmware_patience = \"15s\"\n".into();
        let mut rack = Rack::start(paths, &options).unwrap();
        let program = program(&rack);
        let good = std::fs::read(&program).unwrap();

        let bare = authenticode::strip(&good).unwrap();
        // As long as the signed one: the server sends what it has announced.
        replace(&program, &[&bare[..], &vec![0; good.len() - bare.len()]].concat());
        refused(&mut rack, "unsigned");

        replace(&program, &altered(&good));
        refused(&mut rack, "one bit altered");
        replace(&program, &good);

        let other = paths.scratch.join("other");
        rack_kiln(paths, &["trust", "init", "--lab", other.to_str().unwrap(), "--name", "other"]);
        let foreign = site::enroll(paths, &other, &paths.scratch.join("other-keys")).unwrap();
        rack.machine(NAME).set_keys(foreign).unwrap();
        refused(&mut rack, "signed by another site");

        // In a copy: a server whose site has revoked it sends it to nobody, and it is the firmware's turn here.
        let copy = paths.scratch.join("revoked-site");
        command::run("cp", ["-a", "--reflink=auto", rack.site.to_str().unwrap(), copy.to_str().unwrap()]).unwrap();
        rack_kiln(paths, &["trust", "revoke", "minimal/1", "--site", copy.to_str().unwrap()]);
        let revoked = site::enroll(paths, &copy, &paths.scratch.join("revoked-keys")).unwrap();
        rack.machine(NAME).set_keys(revoked).unwrap();
        refused(&mut rack, "revoked by dbx");

        // The same machine with the keys as before: it was the dbx.
        rack.machine(NAME).set_keys(keys).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("kiln-agent", Mark::default(), IDLE).unwrap();
    });
}

/// `kiln trust revoke` reaches the firmware by the agent: not while the machine needs the release, then by itself; from
/// then on the firmware refuses the revoked one and the boot server says so, and the newer one boots as before.
#[test]
#[ignore = "slow: three boots of the firmware; make test-slow"]
fn a_revoked_release_is_refused_once_the_agent_has_installed_dbx() {
    testing::rack(|paths| {
        let mut options = RackOptions::scenario(paths, "secure-boot-dbx", secure(paths, NetworkBoot::Pxe));
        options.config = "[fleet]\nfirmware_patience = \"5s\"\n".into();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 1).unwrap();
        rack.kiln(&["trust", "revoke", "minimal/1"]).unwrap();
        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "kexec"]).unwrap();
        let status = rack.kiln(&["trust", "status"]).unwrap();
        assert!(status.contains("rack-1 lacks them: held: it runs minimal/1"), "{status}");
        rack.wait_healthy(NAME, 2).unwrap();
        // Until its firmware has started release 2, release 1 is the one to come back to.
        rack.machine(NAME).power_off();
        rack.machine(NAME).power_on().unwrap();
        rack.wait_healthy(NAME, 2).unwrap();
        let has = |v: &MachineView| v.dbx.as_ref().is_some_and(|dbx| dbx.outcome == DbxOutcome::Installed);
        rack.wait(NAME, "dbx is in its firmware", has).unwrap();
        let status = rack.kiln(&["trust", "status"]).unwrap();
        assert!(status.contains("every machine in service has them"), "{status}");
        rack.machine(NAME).power_off();

        rack.kiln(&["assign", NAME, "minimal/1", "--via", "cold"]).unwrap();
        refused(&mut rack, "revoked by the dbx that the agent installed");
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "cold"]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        assert!(is_enforced(&rack.wait_healthy(NAME, 2).unwrap()));
    });
}

fn rack_kiln(paths: &Paths, args: &[&str]) {
    site::kiln_quiet(paths, args).unwrap();
}

/// The kernel of the machine's release.
pub struct Kernels {
    /// As it lies in the UKI: not signed.
    pub bare: Vec<u8>,
    /// The copy that the site signed for a kexec.
    pub copy: Vec<u8>,
    /// Signed by the site as a boot program, which no release has.
    pub signed: Vec<u8>,
}

impl Kernels {
    /// Out of the boot program that the server sends.
    pub fn of(paths: &Paths, rack: &Rack) -> Self {
        let uki = std::fs::read(program(rack)).unwrap();
        let pe = Pe::parse(&uki).unwrap();
        let bare = pe.content(&uki, ".linux").unwrap().to_vec();
        let copy = kexec::copy(&bare, pe.content(&uki, kexec::SIGNATURE_SECTION).unwrap()).unwrap();
        let manifest = site::manifest(&rack.site, 1).unwrap();
        assert_eq!(manifest["kexec_kernel"]["sha256"], hex::sha256(&copy));
        let [file, out] = ["bare", "signed"].map(|name| paths.scratch.join(name).display().to_string());
        std::fs::write(&file, &bare).unwrap();
        let template = site::template(paths).display().to_string();
        rack_kiln(paths, &["trust", "secureboot", "sign", &file, "--site", &template, "--out", &out]);
        Self { bare, copy, signed: std::fs::read(out).unwrap() }
    }
}

/// What clouds hand to a machine that asks: systemd's credentials, and where cloud-init finds its user-data.
const USER_DATA: [&str; 3] = [
    "io.systemd.credential:tmpfiles.extra=f /run/kiln-user-data 0644 - - - here",
    "io.systemd.credential:systemd.extra-unit.kiln-user-data.service=[Service]",
    "ds=nocloud-net;s=http://10.77.0.1:8080/",
];

/// IPE from inside: what the site's verity root holds runs; a copied program does not, even where root took noexec away,
/// and memory that no file backs is not executed either. Nor does one in a dm-verity root that root sets up from a disk without the
/// site's signature; under another site's the kernel does not set it up. Under the site's own the same one runs. Scripts are data of
/// an interpreter that the site signed.
#[test]
#[ignore = "slow: a boot of the probe image; make test-slow"]
fn only_the_signed_root_is_executed() {
    testing::rack(|paths| {
        let smbios = USER_DATA.map(str::to_owned).to_vec();
        let spec = MachineSpec { smbios, disks: vec![Disk::VirtioBlk], ..secure(paths, NetworkBoot::Pxe) };
        let mut options = RackOptions::scenario(paths, "secure-boot-ipe", spec);
        options.image = site::PROBE.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "probe/1"]).unwrap();
        let other = paths.scratch.join("other");
        rack_kiln(paths, &["trust", "init", "--lab", other.to_str().unwrap(), "--name", "other"]);
        let (disk, site) = (rack.machine(NAME).disk(0), site::template(paths));
        foreign_root::write(paths, &disk, &[("other", other.as_path()), ("site", site.as_path())]);
        rack.machine(NAME).power_on().unwrap();
        assert!(is_enforced(&rack.wait_healthy(NAME, 1).unwrap()));
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("KILN-PROBE script", Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        let lines: Vec<&str> = said.lines().filter_map(|l| l.split_once("KILN-PROBE ").map(|(_, rest)| rest)).collect();
        for expected in [
            "system ok",
            "user-data ok",
            "exec-root ok",
            "memfd ok",
            "remount refused",
            "jit refused",
            "verity-unsigned ok",
            "verity-other ok",
            "verity-site ok",
            "script ran",
        ] {
            assert!(lines.iter().any(|l| l.starts_with(expected)), "{expected}: {lines:#?}");
        }
        assert!(!lines.iter().any(|l| l.contains(" fail ")), "{lines:#?}");
    });
}

/// A machine in disk mode installs itself, and boots from its disk with the boot server gone: the loader on it is signed
/// by the site, and so is the UKI that it starts. A UKI with one byte flipped the firmware does not start; the machine comes by
/// the network, and what lies on the disk is as it was signed again.
#[test]
#[ignore = "slow: an install, a boot from the disk and one by the network; make test-slow"]
fn a_disk_boots_through_the_signed_loader() {
    testing::rack(|paths| {
        let spec = MachineSpec { disks: vec![Disk::VirtioBlk], ..secure(paths, NetworkBoot::Pxe) };
        let mut rack = on_disk::rack_of(paths, "secure-boot-disk", spec);
        rack.machine(NAME).power_on().unwrap();
        assert!(is_enforced(&rack.wait_healthy(NAME, 1).unwrap()));
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("A Good disk/1, B Empty -", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();
        rack.kill_server();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        let begun = console.mark();
        console.wait_for("disk/1 is healthy: vda: A Good disk/1", begun, IDLE).unwrap();
        let said = console.since(begun);
        assert!(said.contains(LOCKED), "{}", console.last_words(40));
        assert!(!said.contains("Start PXE"), "the disk comes first in the boot order");

        // One byte of the boot program on the disk is flipped. The machine comes by the network, and puts it right.
        rack.machine(NAME).power_off();
        rack.start_server().unwrap();
        let manifest = site::manifest_of(&rack.site, site::DISK, 1).unwrap();
        let uki = manifest["uki"]["sha256"].as_str().unwrap();
        let image = format!("{}@@{}", rack.machine(NAME).disk(0).display(), 1 << 20);
        let (there, here) = (format!("::/EFI/kiln/{uki}.efi"), paths.scratch.join("kiln.efi"));
        let read = || {
            command::run_command(Command::new("mcopy").args(["-n", "-i", &image, &there]).arg(&here)).ok()?;
            std::fs::read(&here).ok()
        };
        let mut bytes = read().unwrap();
        assert_eq!(hex::sha256(&bytes), uki);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&here, &bytes).unwrap();
        command::run_command(Command::new("mcopy").args(["-o", "-i", &image]).arg(&here).arg(&there)).unwrap();
        assert!(read().is_some_and(|bytes| hex::sha256(&bytes) != uki));
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("disk/1 is healthy: vda: A Good disk/1", Mark::default(), IDLE).unwrap();
        assert!(
            console.since(Mark::default()).contains("Start PXE"),
            "the firmware refuses it: {}",
            console.last_words(40)
        );
        rack.wait(NAME, "its boot program is as signed", |_| read().is_some_and(|bytes| hex::sha256(&bytes) == uki))
            .unwrap();
    });
}

/// The boot loader that the site signed for disks, out of a release's initramfs.
pub fn signed_loader(paths: &Paths) -> Vec<u8> {
    let initramfs = site::template(paths).join(format!("build/{}/1/initramfs", site::DISK));
    let names = "kiln/systemd-boot.efi /kiln/systemd-boot.efi";
    let script = format!("zstd -dcq < {} | cpio --quiet -i --to-stdout {names}", initramfs.display());
    let out = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(out.stdout.starts_with(b"MZ"), "{}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

/// An entry as whoever has the disk may write it (UAPI.1, Type #1): the loader checks nothing of it but the kernel's signature.
const ENTRY: &[u8] = b"title foreign\nlinux /k.efi\ninitrd /evil.img\noptions console=ttyS0 rdinit=/evil\n";

/// Who has the disk in hand starts a kernel that the site signed with an initramfs and a command line of their own: what a release
/// has for a kexec is signed, and firmware refuses it, with Secure Boot and without. That the same disk starts a kernel which is
/// signed as a boot program, or a bare one where nothing is checked, shows that it was this.
#[test]
#[ignore = "slow: four boots from a disk; make test-slow"]
fn a_signed_kernel_alone_starts_nothing() {
    const OPEN: &str = "rack-2";
    testing::rack(|paths| {
        let alone = |spec| MachineSpec { cards: Vec::new(), disks: vec![Disk::VirtioBlk], ..spec };
        let mut options = RackOptions::scenario(paths, "secure-boot-kernel", alone(secure(paths, NetworkBoot::Pxe)));
        options.machines.push(alone(MachineSpec::new(2, Firmware::Uefi(NetworkBoot::Pxe))));
        let mut rack = Rack::start(paths, &options).unwrap();

        let Kernels { bare, copy, signed } = Kernels::of(paths, &rack);
        let (loader, initramfs) = (signed_loader(paths), esp::initramfs());
        let mut starts = |name: &str, kernel: &[u8], until: &str| {
            let machine = rack.machine(name);
            machine.power_off();
            let files: [(&str, &[u8]); 5] = [
                ("EFI/BOOT/BOOTX64.EFI", &loader),
                ("loader/loader.conf", b"timeout 0\n"),
                ("loader/entries/foreign.conf", ENTRY),
                ("k.efi", kernel),
                ("evil.img", &initramfs),
            ];
            esp::write(&machine.disk_file(0), &paths.scratch, &files);
            machine.power_on().unwrap();
            let console = machine.console().unwrap().clone();
            console.wait_for_line(until, Mark::default(), IDLE).unwrap();
            console.since(Mark::default())
        };
        for (name, control) in [(NAME, &signed), (OPEN, &bare)] {
            let said = starts(name, &copy, "Error loading");
            let refusal = said.lines().find(|line| line.contains("Error loading")).unwrap();
            assert!(refusal.contains("k.efi") && refusal.contains("Unsupported"), "{name}: {said}");
            assert!(!said.contains("Linux version") && !said.contains(esp::WORD), "{name}: {said}");
            println!("{name}: {refusal}");
            let said = starts(name, control, esp::WORD);
            assert!(said.contains("Linux version"), "{name}: {said}");
        }
    });
}

/// UEFI HTTP Boot checks the same signature: what is signed starts, and with one bit altered it does not.
#[test]
#[ignore = "slow: a boot by HTTP, and one that is refused; make test-slow"]
fn a_signed_release_boots_by_http() {
    testing::rack(|paths| {
        let spec = secure(paths, NetworkBoot::Http);
        let mut options = RackOptions::scenario(paths, "secure-boot-http", spec);
        options.config = "[fleet]\nfirmware_patience = \"5s\"\n".into();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert!(is_enforced(&view), "{view:#?}");
        let console = rack.machine(NAME).console().unwrap();
        let said = console.since(Mark::default());
        assert!(said.contains("Start HTTP Boot over IPv4") && said.contains(LOCKED), "{}", console.last_words(40));
        rack.machine(NAME).power_off();

        let program = program(&rack);
        replace(&program, &altered(&std::fs::read(&program).unwrap()));
        refused(&mut rack, "one bit altered, by HTTP Boot");
    });
}
