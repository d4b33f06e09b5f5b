//! Firmware that needs iPXE, with Secure Boot on: iPXE signed by the site, with the site's key in db; and the stock shim,
//! which Microsoft signed, in firmware that trusts Microsoft, with the site's certificate as a machine owner's key.

use crate::secure_boot::{is_enforced, secure};
use kiln_lab::api::StageView;
use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::{self, NetworkBoot};
use kiln_lab::{command, site, testing};
use std::path::{Path, PathBuf};

const NAME: &str = "rack-1";
pub const SNPONLY: &str = "/usr/lib/ipxe/snponly.efi";
const SHIM: &str = "/usr/lib/shim/shimx64.efi.signed";
/// A variable store that trusts Microsoft, as machines are sold.
const MICROSOFT: &str = "/usr/share/OVMF/OVMF_VARS_4M.ms.fd";

/// The host's iPXE with the site's signature, by the real command.
pub fn signed(paths: &Paths, program: &Path) -> PathBuf {
    let out = paths.scratch.join("snponly.efi");
    let (program, to) = (program.display().to_string(), out.display().to_string());
    let template = site::template(paths).display().to_string();
    let args = ["trust", "secureboot", "sign", &program, "--site", &template, "--out", &to];
    println!("{}", site::kiln_quiet(paths, &args).unwrap());
    out
}

/// The firmware starts iPXE because the site signed it, and the UKI that iPXE fetched for the same reason; the same iPXE
/// without the signature is refused.
#[test]
#[ignore = "slow: two boots of the firmware; make test-slow"]
fn ipxe_that_the_site_signed_boots_a_signed_release() {
    testing::rack(|paths| {
        let ipxe = signed(paths, Path::new(SNPONLY));
        let mut options = RackOptions::scenario(paths, "ipxe-secure-boot", secure(paths, NetworkBoot::Pxe));
        options.boot = format!("uefi = \"ipxe\"\nsnponly = \"{}\"\n", ipxe.display());
        options.config = "[fleet]\nfirmware_patience = \"30s\"\n".into();
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert!(is_enforced(&view), "{view:#?}");
        let console = rack.machine(NAME).console().unwrap();
        let said = console.since(Mark::default());
        let [file, banner, uki] = ["NBP filename is snponly.efi", "Open Source Network Boot Firmware", "/kiln.efi... "];
        assert!([file, banner, uki].iter().all(|word| said.contains(word)), "{}", console.last_words(60));
        // Else its next boot would not count yet, and the firmware comes to HTTP Boot, and up, before it does.
        rack.machine(NAME).set_connected(false).unwrap();
        rack.wait(NAME, "silent", |v| v.state == "unreachable").unwrap();
        rack.machine(NAME).power_off();
        rack.machine(NAME).set_connected(true).unwrap();

        std::fs::copy(SNPONLY, &ipxe).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("Access Denied", Mark::default(), IDLE).unwrap();
        let silent = |s: &&StageView| s.kind.is_some();
        let view =
            rack.wait(NAME, "no boot", |v| v.boot().is_some_and(|b| b.stages.iter().any(|s| silent(&s)))).unwrap();
        println!("{:?}", view.boot().unwrap().stages.iter().rev().find(silent));
        assert!(!console.since(Mark::default()).contains("iPXE initialising"), "{}", console.last_words(20));
    });
}

/// shim does not start a program without a `.sbat` section, and iPXE has one since 2022: an older one gets it here.
fn with_sbat(paths: &Paths) -> PathBuf {
    let out = paths.scratch.join("sbat.efi");
    let bytes = std::fs::read(SNPONLY).unwrap();
    let pe = kiln_release::pe::Pe::parse(&bytes).unwrap();
    if pe.sections.iter().any(|section| section.name == ".sbat") {
        std::fs::copy(SNPONLY, &out).unwrap();
        return out;
    }
    let list = paths.scratch.join("sbat.csv");
    let lines =
        "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\nkiln.ipxe,1,Kiln,ipxe,1,-\n";
    std::fs::write(&list, lines).unwrap();
    let end = pe.sections.iter().map(|s| s.virtual_address + s.virtual_size).max().unwrap();
    let (add, place) = (format!(".sbat={}", list.display()), format!(".sbat={:#x}", end.next_multiple_of(4096)));
    let flags = ".sbat=contents,alloc,load,readonly,data";
    let args = ["--add-section", &add, "--set-section-flags", flags, "--change-section-vma", &place, SNPONLY];
    command::run("objcopy", args.into_iter().chain([out.to_str().unwrap()])).unwrap();
    out
}

/// The stock shim in firmware that trusts Microsoft: it starts iPXE, and the UKI that iPXE fetched, because the machine's
/// owner enrolled the site's certificate. The machine is shown as what it is: Microsoft's keys may start others.
#[test]
#[ignore = "slow: three boots of the firmware; make test-slow"]
fn the_stock_shim_starts_ipxe_and_a_signed_release() {
    testing::rack(|paths| {
        assert!(Path::new(SHIM).exists(), "install shim-signed: `make setup` does");
        let keys = site::enroll(paths, &site::template(paths), &paths.scratch.join("keys")).unwrap();
        let list = std::fs::read(keys.with_file_name("db.esl")).unwrap();
        let store = paths.scratch.join("microsoft.fd");
        std::fs::copy(MICROSOFT, &store).unwrap();
        variables::set_owner_keys(&store, &list).unwrap();
        let spec = MachineSpec { keys: Some(store), ..MachineSpec::new(1, Firmware::Uefi(NetworkBoot::Pxe)) };

        let ipxe = signed(paths, &with_sbat(paths));
        let mut options = RackOptions::scenario(paths, "shim", spec);
        options.boot = format!("uefi = \"shim\"\nsnponly = \"{}\"\n", ipxe.display());
        let mut rack = Rack::start(paths, &options).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let view = rack.wait_healthy(NAME, 1).unwrap();
        assert_eq!(view.protection.as_deref(), Some("unprotected"), "Microsoft's certificates are in db");
        let console = rack.machine(NAME).console().unwrap();
        let said = console.since(Mark::default());
        let words = ["NBP filename is shimx64.efi", "Fetching Netboot Image grubx64.efi", "/kiln.efi... "];
        assert!(words.iter().all(|word| said.contains(word)), "{}", console.last_words(60));
        rack.machine(NAME).power_off();

        // What the owner's key did not sign, shim does not start: iPXE as Debian has it, of which it tells whoever is at the
        // screen; then a UKI.
        let good = std::fs::read(&ipxe).unwrap();
        std::fs::copy(SNPONLY, &ipxe).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("Security Violation", Mark::default(), IDLE).unwrap();
        rack.machine(NAME).power_off();
        std::fs::write(&ipxe, good).unwrap();
        let uki = site::manifest(&rack.site, 1).unwrap()["uki"]["sha256"].as_str().unwrap().to_owned();
        site::flip_byte(&rack.site.join("repo/b").join(uki).join("kiln.efi"), 8 << 20).unwrap();
        rack.machine(NAME).power_on().unwrap();
        let console = rack.machine(NAME).console().unwrap().clone();
        console.wait_for("Could not boot", Mark::default(), IDLE).unwrap();
        assert!(!console.since(Mark::default()).contains("Linux version"), "{}", console.last_words(20));
    });
}
