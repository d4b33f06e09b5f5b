//! Text a child writes: kept in a log file, and followed live.

use crate::error::{AtPath, LabError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Everything a child has written so far.
#[derive(Debug)]
pub struct Console {
    /// Whose it is.
    pub who: String,
    /// The log file.
    pub path: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    text: Vec<u8>,
    last_change: Instant,
    open: bool,
}

/// The log's lines begin with the seconds since it was opened.
#[derive(Debug)]
struct Stamp {
    begun: Instant,
    /// The next byte begins a line.
    fresh: bool,
}

impl Stamp {
    fn lines(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() + 64);
        for line in bytes.split_inclusive(|b| *b == b'\n') {
            if std::mem::replace(&mut self.fresh, line.ends_with(b"\n")) {
                out.extend(format!("{:8.2} ", self.begun.elapsed().as_secs_f64()).bytes());
            }
            out.extend(line);
        }
        out
    }
}

/// A place in a console's text: what was written before it is over and done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mark(usize);

impl Console {
    /// Follows `sources` to their end in background threads, appending to the file at `path`.
    pub fn follow(
        who: &str,
        path: &Path,
        append: bool,
        sources: Vec<Box<dyn Read + Send>>,
    ) -> Result<Arc<Self>, LabError> {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .write(true)
            .append(append)
            .truncate(!append)
            .open(path)
            .at(path)?;
        let console = Arc::new(Self {
            who: who.to_owned(),
            path: path.to_owned(),
            state: Mutex::new(State { text: Vec::new(), last_change: Instant::now(), open: true }),
            changed: Condvar::new(),
        });
        let left = Arc::new(std::sync::atomic::AtomicUsize::new(sources.len()));
        for mut source in sources {
            let (console, left) = (Arc::clone(&console), Arc::clone(&left));
            let mut file = file.try_clone().at(path)?;
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                let mut stamp = Stamp { begun: Instant::now(), fresh: true };
                while let Ok(n @ 1..) = source.read(&mut buffer) {
                    // The log is a convenience; the text in memory is what the rack reads.
                    let _ = file.write_all(&stamp.lines(&buffer[..n]));
                    let mut state = console.lock();
                    state.text.extend_from_slice(&buffer[..n]);
                    state.last_change = Instant::now();
                    drop(state);
                    console.changed.notify_all();
                }
                if left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 1 {
                    console.lock().open = false;
                    console.changed.notify_all();
                }
            });
        }
        Ok(console)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// The end of the text now.
    pub fn mark(&self) -> Mark {
        Mark(self.lock().text.len())
    }

    /// The text since a mark, terminal escapes taken out.
    pub fn since(&self, mark: Mark) -> String {
        plain(&self.lock().text[mark.0..])
    }

    /// When the last byte came.
    pub fn last_change(&self) -> Instant {
        self.lock().last_change
    }

    /// The last non-empty lines.
    pub fn last_words(&self, lines: usize) -> String {
        let state = self.lock();
        let text = plain(&state.text[state.text.len().saturating_sub(16 * 1024)..]);
        let all: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Waits until `pattern` stands in the text after `mark`. Any text resets the deadline `idle`.
    pub fn wait_for(&self, pattern: &str, mark: Mark, idle: Duration) -> Result<(), LabError> {
        self.wait_until(pattern, mark, idle, |text| text.contains(pattern))
    }

    /// The same, to the end of the line that it stands in.
    pub fn wait_for_line(&self, pattern: &str, mark: Mark, idle: Duration) -> Result<(), LabError> {
        self.wait_until(pattern, mark, idle, |text| {
            text.split_once(pattern).is_some_and(|(_, rest)| rest.contains('\n'))
        })
    }

    fn wait_until(
        &self,
        pattern: &str,
        mark: Mark,
        idle: Duration,
        found: impl Fn(&str) -> bool,
    ) -> Result<(), LabError> {
        let mut state = self.lock();
        let begun = Instant::now();
        loop {
            if found(&plain(&state.text[mark.0..])) {
                return Ok(());
            }
            if !state.open {
                return Err(LabError::Died {
                    program: self.who.clone(),
                    status: "its console is closed".into(),
                    last_words: format!("(log: {})", self.path.display()),
                });
            }
            let quiet = state.last_change.max(begun).elapsed();
            let Some(left) = idle.checked_sub(quiet) else {
                return Err(LabError::Stalled { who: self.who.clone(), what: format!("{pattern:?}"), idle });
            };
            state = self.changed.wait_timeout(state, left).expect("no holder of this lock panics").0;
        }
    }
}

/// Text without terminal escapes (ECMA-48 CSI sequences) and carriage returns.
fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => {
                if chars.next_if_eq(&'[').is_some() {
                    for c in chars.by_ref() {
                        if ('\u{40}'..='\u{7e}').contains(&c) {
                            break;
                        }
                    }
                } else {
                    chars.next();
                }
            }
            '\r' => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{Stamp, plain};
    use std::time::Instant;

    #[test]
    fn each_line_of_the_log_has_one_stamp() {
        let mut stamp = Stamp { begun: Instant::now(), fresh: true };
        let log: Vec<u8> = [&b"one\ntw"[..], b"o\n", b"\n"].iter().flat_map(|piece| stamp.lines(piece)).collect();
        let log = String::from_utf8(log).unwrap();
        let words: Vec<&str> = log.lines().map(|line| line.split_at(9).1).collect();
        assert_eq!(words, ["one", "two", ""], "{log:?}");
        assert!(log.lines().all(|line| line[..8].trim().parse::<f64>().is_ok()), "{log:?}");
    }

    #[test]
    fn escapes_are_taken_out() {
        assert_eq!(plain(b"\x1b[2J\x1b[01;01HBdsDxe: loading\r\n\x1b=done"), "BdsDxe: loading\ndone");
    }
}
