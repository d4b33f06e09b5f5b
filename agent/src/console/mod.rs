//! The machine's status for the person in front of it: drawn on the text screen (/dev/tty1), and as a block of lines on
//! the other consoles that the kernel has, whenever it changes. Each has a [`Writer`].

mod qr;
mod screen;
mod writer;

pub use writer::Writer;

use kiln_protocol::{About, ApprovalCode, Stage, StageState};
use screen::Status;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
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
    screen: Option<Writer>,
    lines: Vec<Writer>,
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

/// None if it cannot be opened.
fn writer(path: &Path) -> Option<Writer> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC).open(path).ok()?;
    Writer::new(file, UNDER_WAY)
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
            screen.put(self.status.page());
        }
        let news = self.status.news();
        if self.said.as_ref() != Some(&news) {
            let new_page = self.status.page.is_some() && self.page != self.status.page;
            let block = self.status.block(new_page);
            for line in &self.lines {
                line.put(block.clone());
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
        screen.put(console.status.page());
    }
}
