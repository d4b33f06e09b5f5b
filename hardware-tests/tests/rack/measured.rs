//! Measured boot with real firmware, a software TPM and the real stub: what firmware and stub measure is what the release
//! predicts, and what is not the release is named.

use crate::secure_boot::secure;
use crate::support::relay::Relay;
use kiln_lab::api::{AttestationView, MachineView};
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::{self, NetworkBoot};
use kiln_lab::{site, testing};
use kiln_protocol::{AttestationState, Difference, DriftKind, Judged, MachineId, Stage};
use kiln_release::kexec;
use kiln_release::pe::Pe;
use std::path::Path;

const NAME: &str = "rack-1";
const OPEN: &str = "rack-2";

fn proof(view: &MachineView) -> &AttestationView {
    view.attestation.as_ref().unwrap()
}

/// Switches it on, and waits for a verdict on this boot that is not the one before.
fn boots(rack: &mut Rack, name: &str, case: &str, done: impl Fn(&AttestationView) -> bool) -> MachineView {
    rack.machine(name).power_on().unwrap();
    let judged = |v: &MachineView| v.attestation.as_ref().is_some_and(&done);
    let view = rack.wait(name, case, judged).unwrap();
    println!("{case}: {:?}", proof(&view));
    view
}

/// The boot server is put back to an old backup, its own memory included: what the machine's TPM remembers refuses it. In the
/// end all is as it was.
fn meets_an_old_backup(rack: &mut Rack, older: &Path) {
    let kept = rack.paths().scratch.join("kept");
    rack.machine(NAME).power_off();
    assert!(rack.stop_server().unwrap());
    for folder in ["repo/metadata", "state"] {
        site::copy_tree(&rack.site.join(folder), &kept.join(folder)).unwrap();
        std::fs::remove_dir_all(rack.site.join(folder)).unwrap();
    }
    site::copy_tree(older, &rack.site.join("repo/metadata")).unwrap();
    std::fs::create_dir(rack.site.join("state")).unwrap();
    rack.start_server().unwrap();
    rack.machine(NAME).power_on().unwrap();
    let refused = "metadata-rollback";
    let view = rack.wait(NAME, refused, |v| v.failures().contains(&refused)).unwrap();
    assert_eq!(view.rollback_memory.as_deref(), Some("tpm-nv"));
    let console = rack.machine(NAME).console().unwrap();
    assert!(!console.since(Mark::default()).contains(Stage::Handover.label()), "it must not boot");

    assert!(rack.stop_server().unwrap());
    for folder in ["repo/metadata", "state"] {
        std::fs::remove_dir_all(rack.site.join(folder)).unwrap();
        site::copy_tree(&kept.join(folder), &rack.site.join(folder)).unwrap();
    }
    rack.start_server().unwrap();
}

/// Attested where the site's key alone may boot, over a kexec too. What its TPM has seen of metadata refuses an older
/// repository. An addition to the command line, an altered boot program and another TPM fail with their reasons; without
/// Secure Boot there is no proof.
#[test]
#[ignore = "slow: six boots of the firmware; make test-slow"]
fn a_tpm_says_what_was_booted() {
    testing::rack(|paths| {
        let locked = MachineSpec { tpm: true, ..secure(paths, NetworkBoot::Pxe) };
        let open = MachineSpec { tpm: true, ..MachineSpec::new(2, Firmware::Uefi(NetworkBoot::Pxe)) };
        let mut options = RackOptions::scenario(paths, "measured-boot", locked);
        options.machines.push(open);
        let mut rack = Rack::start(paths, &options).unwrap();
        let older = paths.scratch.join("older");
        site::copy_tree(&rack.site.join("repo/metadata"), &older).unwrap();

        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        println!("cold boot: {:?}", proof(&view));
        assert_eq!(proof(&view).state, "attested", "{:?}", proof(&view));
        assert_eq!(view.protection.as_deref(), Some("attested"));
        assert_eq!(view.rollback_memory.as_deref(), Some("tpm-nv"));
        let endorsement = proof(&view).endorsement.clone().unwrap();

        rack.kiln(&["release", "publish", "minimal/2"]).unwrap();
        rack.kiln(&["assign", NAME, "minimal/2", "--via", "kexec"]).unwrap();
        let view = rack.wait_healthy(NAME, 2).unwrap();
        println!("kexec: {:?}", proof(&view));
        assert_eq!(proof(&view).reason, "attested at cold boot (minimal/1), carried by kexec");
        assert!(proof(&view).carried && view.protection.as_deref() == Some("attested"));

        // The same TPM, its key and its firmware's measurements, after the power was off.
        let again = |v: &AttestationView| v.state != "unattested" && !v.carried;
        let view = boots(&mut rack, NAME, "cold boot of release 2", again);
        assert_eq!(proof(&view).state, "attested", "{:?}", proof(&view));
        assert_eq!(proof(&view).endorsement.as_ref(), Some(&endorsement));

        meets_an_old_backup(&mut rack, &older);

        rack.machine(NAME).spec.smbios = vec!["io.systemd.stub.kernel-cmdline-extra=kiln.extra=1".into()];
        let view = boots(&mut rack, NAME, "an addition by SMBIOS", |v| v.state == "failed");
        assert!(proof(&view).reason.contains("PCR 12"), "{:?}", proof(&view));
        assert_eq!(view.protection.as_deref(), Some("unprotected"));
        // The agent tells it as well, whether a TPM does or not: the machine works, and differs from its release.
        let added = |d: &Difference| {
            d.kind == DriftKind::CommandLine && format!("{} {}", d.what, d.text).contains("kiln.extra")
        };
        rack.wait(NAME, "told as drift", |v| v.condition.drift.iter().any(added)).unwrap();
        rack.machine(NAME).spec.smbios.clear();

        // Another TPM: what the old one sealed is of no use, and whoever speaks then is a stranger.
        assert_eq!(view.key_storage.as_deref(), Some("tpm"));
        rack.machine(NAME).replace_tpm(true).unwrap();
        rack.machine(NAME).power_on().unwrap();
        rack.wait(NAME, "another TPM", |v| v.other_key.is_some()).unwrap();
        rack.machine(NAME).power_off();

        // No Secure Boot: firmware starts anything, and its TPM says what.
        let off = |v: &AttestationView| v.reason.contains("Secure Boot is off");
        let view = boots(&mut rack, OPEN, "Secure Boot is off", off);
        assert_eq!((proof(&view).state.as_str(), view.protection.as_deref()), ("unattested", Some("unprotected")));
        let manifest = site::manifest(&rack.site, view.release.unwrap()).unwrap();
        let program = rack.site.join("repo/b").join(manifest["uki"]["sha256"].as_str().unwrap()).join("kiln.efi");
        let mut bytes = std::fs::read(&program).unwrap();
        // In the UKI's os-release, which nobody reads at boot: the machine comes up, and only the TPM tells.
        let at = bytes.windows(9).position(|w| w == b"HOME_URL=").unwrap();
        bytes[at] ^= 1;
        std::fs::remove_file(&program).unwrap();
        std::fs::write(&program, bytes).unwrap();
        let view = boots(&mut rack, OPEN, "an altered boot program", |v| v.state == "failed");
        assert!(proof(&view).reason.contains("no release published here (PCR 4)"), "{:?}", proof(&view));
    });
}

/// What was pinned at approval is compared at each boot: a card that brings an option ROM since then is named by its PCR, until a
/// person accepts the machine as it is; then it may not go away again either.
#[test]
#[ignore = "slow: four boots of the firmware; make test-slow"]
fn an_option_rom_that_came_after_approval_fails_until_a_person_accepts_it() {
    testing::rack(|paths| {
        let cards = vec!["virtio-net-pci", "e1000"];
        let spec = MachineSpec { tpm: true, cards, ..secure(paths, NetworkBoot::Pxe) };
        let mut rack = Rack::start(paths, &RackOptions::scenario(paths, "changed-rom", spec)).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        let roms = |view: &MachineView| proof(view).option_roms.as_ref().map(Vec::len);
        assert_eq!((proof(&view).state.as_str(), roms(&view)), ("attested", Some(0)), "{:?}", proof(&view));
        let changed = |view: &MachineView| {
            let reason = &proof(view).reason;
            assert!(
                reason.contains("firmware changed: ") && reason.contains("option ROMs (PCR 2)"),
                "{:?}",
                proof(view)
            );
            assert_eq!(view.protection.as_deref(), Some("unprotected"));
        };

        rack.machine(NAME).power_off();
        rack.machine(NAME).spec.roms = true;
        let view = boots(&mut rack, NAME, "an option ROM more", |a| a.state == "failed");
        assert_eq!(roms(&view), Some(1), "{:?}", proof(&view));
        changed(&view);
        rack.machine(NAME).power_off();
        rack.kiln(&["machine", "accept", NAME]).unwrap();
        let view = boots(&mut rack, NAME, "it is accepted", |a| a.state == "attested");
        assert_eq!((roms(&view), view.protection.as_deref()), (Some(1), Some("attested")));

        rack.machine(NAME).power_off();
        rack.machine(NAME).spec.roms = false;
        changed(&boots(&mut rack, NAME, "that option ROM is gone", |a| a.state == "failed"));
    });
}

/// The first answer to root's word; it must be a refusal.
fn refusal(answers: &[Judged]) -> &str {
    let first = answers.first().expect("root has said what its kernel measured");
    assert_eq!(first.state, AttestationState::Failed, "{first:?}");
    &first.reason
}

fn machine_id(rack: &mut Rack) -> MachineId {
    rack.machine(NAME).spec.uuid().parse().unwrap()
}

/// Root tells truly what its kernel has loaded, as the agent would, and goes. What it says is refused for what it is: the foreign
/// initramfs, by its hash; and the next kernel's proof bears that word out, and fails by it and not for want of one.
fn a_true_word_names_the_foreign_initramfs(rack: &mut Rack, said: &str) {
    let foreign = said.lines().find_map(|line| line.split_once("KILN-THIEF foreign ")).unwrap().1.trim();
    let id = machine_id(rack);
    let relay = Relay::start(&rack.site, &id, false);
    rack.machine(NAME).type_line(&format!("steal {}", relay.url)).unwrap();
    let failed = |v: &MachineView| v.attestation.as_ref().is_some_and(|a| a.state == "failed");
    let view = rack.wait(NAME, "a foreign initramfs", failed).unwrap();
    println!("a foreign initramfs: {:?}", proof(&view));
    let answers = relay.answers();
    let named = format!("a kernel measured the initramfs {foreign} for a kexec, which is no release published here");
    assert!(refusal(&answers).starts_with(&named), "{named}: {answers:?}");
    assert_eq!(proof(&view).reason, format!("the kernel before loaded something foreign: {}", refusal(&answers)));
    assert_eq!(view.protection.as_deref(), Some("unprotected"));
}

/// A boot has one load. Where root has used it, it gets no second, and the agent's own becomes a cold boot with its reason. What root
/// had measured as a module first is measured as nothing else when it is loaded: the true list has a command line of no initramfs,
/// and is refused for that. Root takes that word back, and the next proof fails for want of one. The machine has just come up from
/// the firmware, on release 2.
fn a_boot_loads_once(rack: &mut Rack) {
    rack.wait_healthy(NAME, 2).unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    console.wait_for("KILN-THIEF ready", Mark::default(), IDLE).unwrap();
    rack.machine(NAME).type_line("twice").unwrap();
    console.wait_for_line("KILN-THIEF twice ", Mark::default(), IDLE).unwrap();
    let said = console.since(Mark::default());
    let line = |word: &str| said.lines().find(|line| line.contains(word)).unwrap_or_else(|| panic!("{word}: {said}"));
    assert!(line("KILN-THIEF hidden ").contains("listed 1 time"), "{}", line("KILN-THIEF hidden "));
    assert!(line("KILN-THIEF once ").contains("the kernel takes it"));
    let twice = line("KILN-THIEF twice ");
    assert!(twice.contains("refused: ") && twice.contains("not permitted"), "{twice}");

    let (resets, begun) = (rack.machine(NAME).resets(), console.mark());
    rack.kiln(&["assign", NAME, "thief/1", "--via", "kexec"]).unwrap();
    rack.wait(NAME, "kexec-spent", |v| v.failures().contains(&"kexec-spent")).unwrap();
    let cold = |a: &AttestationView| a.state == "attested" && !a.carried;
    let healthy = |v: &MachineView| v.is_healthy_on(1) && v.attestation.as_ref().is_some_and(cold);
    let view = rack.wait(NAME, "release 1, through firmware", healthy).unwrap();
    assert!(rack.machine(NAME).resets() > resets, "{:?}", proof(&view));

    console.wait_for("KILN-THIEF ready", begun, IDLE).unwrap();
    let begun = console.mark();
    let id = machine_id(rack);
    let relay = Relay::start(&rack.site, &id, true);
    rack.machine(NAME).type_line(&format!("hide {}", relay.url)).unwrap();
    let failed = |v: &MachineView| v.attestation.as_ref().is_some_and(|a| a.state == "failed");
    let view = rack.wait(NAME, "an initramfs that was measured as a module", failed).unwrap();
    println!("an initramfs that was measured as a module: {:?}", proof(&view));
    assert!(proof(&view).reason.starts_with("PCR 10 is "), "{:?}", proof(&view));
    let answers = relay.answers();
    assert!(refusal(&answers).starts_with("a kernel measured the command line "), "{answers:?}");
    let [_, taken_back] = &answers[..] else { panic!("one word and its denial: {answers:?}") };
    assert!(taken_back.reason.contains("no release published here is loaded"), "{taken_back:?}");
    let said = console.since(begun);
    for word in ["KILN-THIEF hidden listed 1 time", "KILN-THIEF loaded listed 1 time", "KILN-THIEF goes"] {
        assert!(said.contains(word), "{word}: {}", console.last_words(40));
    }
}

/// What root has written into the kernel's log, in the boot before this one.
fn a_forged_line_of_the_log_is_text(rack: &Rack) {
    let log = rack.kiln(&["machine", "log", NAME, "--boot", "1"]).unwrap();
    let line = log.lines().find(|line| line.contains("KILN-INJECTED")).unwrap_or_else(|| panic!("it is not in {log}"));
    assert!(line.contains("2026-01-01T00:00:00Z kiln all is well"), "it began a line of its own: {line:?}");
    assert!(!log.contains(['\x1b', '\r']), "{log:?}");
}

/// What kexec's signature does not cover, IMA measures: carried to a release, a machine stays attested, and once the agent has loaded
/// its kernel nobody loads another. Root that loads the site's kernel with the release's own initramfs and one file more is
/// found out by the kernel's list and PCR 10, whether it tells the truth or takes it back, also where the initramfs was measured as
/// something else before. A cold boot begins anew.
#[test]
#[ignore = "slow: three boots of the firmware and three kexecs; make test-slow"]
fn a_kexec_of_a_foreign_initramfs_is_found_out() {
    testing::rack(|paths| {
        let spec = MachineSpec { tpm: true, ..secure(paths, NetworkBoot::Pxe) };
        let mut options = RackOptions::scenario(paths, "foreign-kexec", spec);
        options.image = site::THIEF.to_owned();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.kiln(&["release", "publish", "thief/1"]).unwrap();
        // What a thief makes of the UKI: the copy of the kernel that has the site's signature for a kexec.
        let manifest = site::manifest_of(&rack.site, site::THIEF, 1).unwrap();
        let named = |part: &str| rack.artifact(manifest[part]["sha256"].as_str().unwrap());
        let uki = std::fs::read(named("uki")).unwrap();
        let pe = Pe::parse(&uki).unwrap();
        let part = |name| pe.content(&uki, name).unwrap();
        let copy = kexec::copy(part(".linux"), part(kexec::SIGNATURE_SECTION)).unwrap();
        std::fs::write(named("kexec_kernel"), copy).unwrap();
        // As if it had one before it had a TPM: root reads it in the clear. One that is sealed opens to root as well (ADR 15), by
        // programs that this image has not.
        variables::set_plain_identity(&rack.machine(NAME).variable_store(), &[0x4b; 32]).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        println!("cold boot: {:?}", proof(&view));
        assert_eq!(proof(&view).state, "attested", "{:?}", proof(&view));
        assert!(proof(&view).reason.ends_with("under the site's key"), "{:?}", proof(&view));
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("KILN-THIEF ready", Mark::default(), IDLE).unwrap();

        let (resets, begun) = (rack.machine(NAME).resets(), console.mark());
        rack.kiln(&["release", "publish", "thief/2"]).unwrap();
        rack.kiln(&["assign", NAME, "thief/2", "--via", "kexec"]).unwrap();
        let view = rack.wait_healthy(NAME, 2).unwrap();
        println!("kexec: {:?}", proof(&view));
        assert_eq!(proof(&view).reason, "attested at cold boot (thief/1), carried by kexec");
        assert_eq!(rack.machine(NAME).resets(), resets, "the firmware had no part in it");
        a_forged_line_of_the_log_is_text(&rack);
        console.wait_for("KILN-THIEF ready", begun, IDLE).unwrap();
        let said = console.since(begun);
        let late = said.lines().find(|line| line.contains("KILN-THIEF late ")).unwrap();
        assert!(late.contains("refused: ") && late.contains("not permitted"), "{late}");

        a_true_word_names_the_foreign_initramfs(&mut rack, &said);
        assert!(console.since(begun).contains("KILN-THIEF goes"), "{}", console.last_words(20));

        let view = boots(&mut rack, NAME, "a cold boot", |a| a.state == "attested" && !a.carried);
        assert_eq!(view.protection.as_deref(), Some("attested"));
        a_boot_loads_once(&mut rack);
    });
}
