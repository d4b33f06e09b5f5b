//! What a camera in front of the machine would see: pictures of a VGA screen, and the QR code on them read by another's
//! reader (zbar).

use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, MachineSpec};
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::Stage;
use std::process::Command;
use std::time::{Duration, Instant};

const NAME: &str = "rack-1";

/// What zbar reads on the screen, as soon as it reads anything. A screen tells nobody when it changes: it is looked at
/// again and again.
fn read(rack: &mut Rack, paths: &Paths) -> String {
    let picture = paths.consoles.join("screen.ppm");
    let begun = Instant::now();
    loop {
        rack.machine(NAME).picture(&picture).unwrap();
        let said = Command::new("zbarimg").args(["-q", "--raw"]).arg(&picture).output().unwrap();
        let code = String::from_utf8_lossy(&said.stdout).trim().to_owned();
        if !code.is_empty() {
            return code;
        }
        assert!(begun.elapsed() < IDLE, "zbarimg reads no code in {}", picture.display());
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// The page that the console names: what is behind `| page`, lines that go on included.
fn page_on_console(said: &str) -> String {
    let mut lines = said.lines().skip_while(|line| !line.starts_with("| page "));
    let first = lines.next().unwrap().trim_start_matches("| page").trim();
    lines
        .take_while(|line| line.starts_with("|          "))
        .fold(first.to_owned(), |page, line| page + line.trim_start_matches('|').trim())
}

fn shows_its_page(paths: &Paths, name: &str, image: &str, firmware: Firmware) {
    let spec = MachineSpec { screen: true, ..MachineSpec::new(1, firmware) };
    let id = spec.uuid();
    let mut options = RackOptions::scenario(paths, name, spec);
    options.image = image.to_owned();
    options.unknown = vec![NAME.to_owned()];
    let mut rack = Rack::start(paths, &options).unwrap();
    if image != site::IMAGE {
        rack.kiln(&["release", "publish", &format!("{image}/1")]).unwrap();
    }
    rack.machine(NAME).power_on().unwrap();
    let console = rack.machine(NAME).console().unwrap().clone();
    rack.wait(NAME, "waiting for approval", |v| v.stage == Some(Stage::Assignment)).unwrap();
    console.wait_for("| page ", Mark::default(), IDLE).unwrap();
    console.wait_for("+---\n", Mark::default(), IDLE).unwrap();
    let code = read(&mut rack, paths);
    assert_eq!(code, page_on_console(&console.since(Mark::default())));
    assert!(code.starts_with("http") && code.ends_with(&format!("/m/{id}")), "{code}");

    // In the running system too: systemd's lines have not drawn over it.
    rack.kiln(&["machine", "approve", &id, "--role", "lab", "--name", NAME]).unwrap();
    rack.wait_healthy(NAME, 1).unwrap();
    let begun = Instant::now();
    let healthy = loop {
        let code = read(&mut rack, paths);
        if code.ends_with(NAME) || begun.elapsed() > IDLE {
            break code;
        }
    };
    println!("{name}: waiting {code}, healthy {healthy}");
    assert!(healthy.starts_with("http") && healthy.contains("/m/"), "{healthy}");
}

/// BIOS: the kernel's own text screen, 80 columns by 25 rows.
#[test]
#[ignore = "slow: one boot; make test-slow"]
fn a_text_screen_shows_the_machines_page() {
    testing::rack(|paths| shows_its_page(paths, "screen-text", site::IMAGE, Firmware::Bios));
}

/// UEFI: the firmware's frame buffer, on which the kernel draws characters.
#[test]
#[ignore = "slow: one boot; make test-slow"]
fn a_frame_buffer_shows_the_machines_page() {
    testing::rack(|paths| {
        shows_its_page(paths, "screen-frame-buffer", site::SERVERS, Firmware::Uefi(NetworkBoot::Pxe));
    });
}
