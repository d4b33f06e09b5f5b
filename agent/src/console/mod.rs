//! The machine's status for the person in front of it: drawn on the text screen (/dev/tty1), and as a block of lines on
//! the other consoles that the kernel has, whenever it changes. A console that takes nothing holds up nothing: a thread
//! of its own writes, and what it has no room for is passed over.

mod qr;
mod screen;

use kiln_protocol::{About, ApprovalCode, Stage, StageState};
use screen::Status;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

/// Pictures under way to the slowest console; more are passed over.
const UNDER_WAY: usize = 16;

static CONSOLE: Mutex<Option<Console>> = Mutex::new(None);

struct Console {
    status: Status,
    drawn: Option<Status>,
    /// What the newest block said, and the page whose code was printed.
    said: Option<(String, &'static str, String)>,
    page: Option<String>,
    screen: Option<SyncSender<String>>,
    lines: Vec<SyncSender<String>>,
}

/// Begins to show. Another program's login on the text screen is left alone.
pub fn open(name: &str, release: &str) {
    let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let login = Path::new("/run/systemd/units/invocation:getty@tty1.service");
    let mut console = Console {
        status: Status { name: name.to_owned(), release: release.to_owned(), ..Status::default() },
        drawn: None,
        said: None,
        page: None,
        screen: None,
        lines: Vec::new(),
    };
    for name in active.split_whitespace() {
        // tty0 is whichever text screen is in front; a serial line is another kind of name.
        let is_screen = name.strip_prefix("tty").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()));
        if !is_screen {
            console.lines.extend(writer(&Path::new("/dev").join(name)));
        } else if !login.exists() {
            console.screen = writer(Path::new("/dev/tty1"));
        }
    }
    *CONSOLE.lock().unwrap_or_else(PoisonError::into_inner) = Some(console);
}

/// A thread that writes to a console; none if it cannot be opened.
fn writer(path: &Path) -> Option<SyncSender<String>> {
    let mut options = std::fs::OpenOptions::new();
    let mut file: File = options.write(true).custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC).open(path).ok()?;
    let (sender, pictures) = sync_channel::<String>(UNDER_WAY);
    let write = move || {
        for picture in pictures {
            // A console that is gone costs its picture.
            let _ = file.write_all(picture.as_bytes());
        }
    };
    std::thread::Builder::new().spawn(write).ok()?;
    Some(sender)
}

fn change(change: impl FnOnce(&mut Status)) {
    let mut console = CONSOLE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(console) = console.as_mut() {
        change(&mut console.status);
        console.show();
    }
}

impl Console {
    fn show(&mut self) {
        if self.drawn.as_ref() == Some(&self.status) {
            return;
        }
        if let Some(screen) = &self.screen {
            let _ = screen.try_send(self.status.page());
        }
        let news = self.status.news();
        if self.said.as_ref() != Some(&news) {
            let new_page = self.status.page.is_some() && self.page != self.status.page;
            let block = self.status.block(new_page);
            for line in &self.lines {
                let _ = line.try_send(block.clone());
            }
            self.said = Some(news);
            self.page.clone_from(&self.status.page);
        }
        self.drawn = Some(self.status.clone());
    }
}

/// A stage has begun, is done, failed or waits.
pub fn stage(stage: Stage, state: &StageState) {
    change(|status| status.stage = Some((stage, state.clone())));
}

/// The machine has an address.
pub fn address(address: &str) {
    change(|status| address.clone_into(&mut status.address));
}

/// It talks to this boot server.
pub fn server(url: &str) {
    change(|status| url.clone_into(&mut status.server));
}

/// What the server says of it.
pub fn about(about: &About) {
    change(|status| {
        about.name.clone_into(&mut status.name);
        status.page.clone_from(&about.page);
        status.protection.clone_from(&about.protection);
        if about.approved {
            status.code = None;
        }
    });
}

/// The code that a person compares.
pub fn code(code: &ApprovalCode) {
    change(|status| status.code = Some(code.clone()));
}

/// Draws the text screen anew: the kernel has written over it.
pub fn repaint() {
    let console = CONSOLE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(console) = console.as_ref()
        && let Some(screen) = &console.screen
    {
        let _ = screen.try_send(console.status.page());
    }
}
