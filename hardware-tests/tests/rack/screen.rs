//! What a camera in front of the machine would see: pictures of a VGA screen, and the QR code on them read by another's
//! reader (zbar). The words are read where the card keeps a text screen's characters.

use kiln_lab::console::Mark;
use kiln_lab::machine::{Firmware, Machine, MachineSpec};
use kiln_lab::paths::Paths;
use kiln_lab::rack::{IDLE, Rack, RackOptions};
use kiln_lab::variables::NetworkBoot;
use kiln_lab::{site, testing};
use kiln_protocol::Stage;
use std::process::Command;
use std::time::{Duration, Instant};

const NAME: &str = "rack-1";
/// Of a text screen.
const COLUMNS: usize = 80;
const ROWS: usize = 25;

/// Looks at the machine until it is so; `look` says what it sees instead. A screen tells nobody when it changes, and the agent's
/// words on other consoles come by threads of their own, before or after: there is nothing to wait for.
fn sees<T>(rack: &mut Rack, look: impl Fn(&Machine) -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match look(rack.machine(NAME)) {
            Ok(seen) => return seen,
            Err(instead) => assert!(begun.elapsed() < IDLE, "{instead}"),
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// What zbar reads on the screen, once it is the address of this page.
fn reads_code(rack: &mut Rack, paths: &Paths, page: &str) -> String {
    let picture = paths.consoles.join("screen.ppm");
    sees(rack, |machine| {
        machine.picture(&picture).unwrap();
        let said = Command::new("zbarimg").args(["-q", "--raw"]).arg(&picture).output().unwrap();
        let code = String::from_utf8_lossy(&said.stdout).trim().to_owned();
        if code.ends_with(page) { Ok(code) } else { Err(format!("{}: not {page} but {code:?}", picture.display())) }
    })
}

/// The page that the console names: what is behind `| page`, lines that go on included.
fn page_on_console(said: &str) -> String {
    let mut lines = said.lines().skip_while(|line| !line.starts_with("| page "));
    let first = lines.next().unwrap().trim_start_matches("| page").trim();
    lines
        .take_while(|line| line.starts_with("|          "))
        .fold(first.to_owned(), |page, line| page + line.trim_start_matches('|').trim())
}

/// Waits until a page with this title is in the text memory, with a row that begins with each of these words. The kernel
/// scrolls through that memory, so an older page may lie there as well.
fn reads(rack: &mut Rack, title: &str, words: &[String]) {
    sees(rack, |machine| {
        let text = machine.text_memory().unwrap();
        let is_on = |at: usize| {
            let rows: Vec<&str> = (0..ROWS).map_while(|n| text.get(at + n * COLUMNS..at + (n + 1) * COLUMNS)).collect();
            words.iter().all(|word| rows.iter().any(|row| row.starts_with(word.as_str())))
        };
        if text.match_indices(&format!("Kiln  {title}")).any(|(at, _)| is_on(at)) {
            return Ok(());
        }
        let rows: Vec<&str> = (0..).map_while(|n| text.get(n * COLUMNS..(n + 1) * COLUMNS)).collect();
        Err(format!("{title} with {words:?} is not on\n{}", rows.join("\n")))
    });
}

fn shows_its_page(paths: &Paths, name: &str, image: &str, firmware: Firmware) {
    let has_text = matches!(firmware, Firmware::Bios);
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
    let code = reads_code(&mut rack, paths, &format!("/m/{id}"));
    assert_eq!(code, page_on_console(&console.since(Mark::default())));
    assert!(code.starts_with("http"), "{code}");
    if has_text {
        console.wait_for_line("| code ", Mark::default(), IDLE).unwrap();
        let said = console.since(Mark::default());
        let code = said.lines().rev().find_map(|line| line.strip_prefix("| code ")).unwrap().trim();
        reads(&mut rack, &id[..20], &[" WAITING ".into(), format!("code     {code} ")]);
    }

    // In the running system too: systemd's lines have not drawn over it.
    rack.kiln(&["machine", "approve", &id, "--role", "lab", "--name", NAME]).unwrap();
    rack.wait_healthy(NAME, 1).unwrap();
    let healthy = reads_code(&mut rack, paths, &format!("/m/{NAME}"));
    println!("{name}: waiting {code}, healthy {healthy}");
    assert!(healthy.starts_with("http"), "{healthy}");
    if has_text {
        reads(&mut rack, NAME, &[" HEALTHY ".into(), format!("release  {}/1 ", site::IMAGE)]);
    }
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
