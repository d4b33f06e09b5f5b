//! One boot's log on disk: lines of JSON, so that nothing a machine says can pass for another line.
//!
//! `head` holds the boot's first lines and is never rewritten; what comes behind goes to `tail`, which becomes
//! `tail-old` when it is full, and the one before is gone. A power cut of the server may cost the newest lines; a line
//! that was half written is cut off. Lines that never came, or are gone, show in the numbers.

use kiln_protocol::{LOG_TEXT, LogBatch, LogLine, LogSource, cut_at};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Bytes of a boot's beginning.
const HEAD: u64 = 512 << 10;
/// Bytes of each of the two tails.
const TAIL: u64 = 256 << 10;
/// Of a machine that nobody approved: its beginning, and nothing more.
const STRANGER: u64 = 64 << 10;
/// The longest line: each byte of text may become six.
const LINE: u64 = 6 * LOG_TEXT as u64 + 256;

/// The most that one boot takes.
pub(super) const BOOT_BYTES: u64 = HEAD + 2 * TAIL;

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Row {
    /// Before the lines of a batch: the kernel's start on the server's clock, unix milliseconds, as this batch allows.
    Clock { zero_ms: i64 },
    Line {
        #[serde(rename = "n")]
        number: u64,
        #[serde(rename = "s")]
        source: LogSource,
        #[serde(rename = "p")]
        level: u8,
        #[serde(rename = "t")]
        at_us: u64,
        #[serde(rename = "m")]
        text: String,
    },
}

/// One line as it was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Its number.
    pub number: u64,
    /// The line.
    pub line: LogLine,
}

/// A boot's files.
#[derive(Debug)]
pub(super) struct BootFile {
    dir: PathBuf,
    boot: String,
    /// The number that is wanted next; none: not looked at yet.
    next: Option<u64>,
    pub(super) bytes: u64,
    /// When it was written last, unix milliseconds.
    pub(super) written: i64,
}

const PARTS: [&str; 3] = ["head", "tail-old", "tail"];

impl BootFile {
    pub(super) fn new(dir: &Path, boot: &str) -> Self {
        let mut this = Self { dir: dir.to_owned(), boot: boot.to_owned(), next: None, bytes: 0, written: 0 };
        for part in PARTS {
            if let Ok(meta) = fs::metadata(this.path(part)) {
                this.bytes += meta.len();
                let at = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
                let at = at.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX));
                this.written = this.written.max(at);
            }
        }
        this
    }

    /// The boot that a file name of a log belongs to.
    pub(super) fn boot_of(name: &str) -> Option<&str> {
        let (boot, part) = name.rsplit_once('.')?;
        PARTS.contains(&part).then_some(boot)
    }

    fn path(&self, part: &str) -> PathBuf {
        self.dir.join(format!("{}.{part}", self.boot))
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        for part in PARTS {
            match fs::remove_file(self.path(part)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// The number wanted next.
    pub(super) fn next(&mut self) -> io::Result<u64> {
        if let Some(next) = self.next {
            return Ok(next);
        }
        let mut next = 0;
        for part in ["tail", "tail-old", "head"] {
            let path = self.path(part);
            if let Some(last) = mend(&path)? {
                next = last + 1;
                break;
            }
        }
        self.next = Some(next);
        Ok(next)
    }

    /// Adds what is new of a batch that came at `now_ms`; gives the number wanted next.
    pub(super) fn append(&mut self, batch: &LogBatch, stranger: bool, now_ms: i64) -> io::Result<u64> {
        let next = self.next()?;
        let numbered = (batch.first..).zip(&batch.lines).filter(|(n, _)| *n >= next);
        let since = i64::try_from(batch.at_us / 1000).unwrap_or(i64::MAX);
        let mut text = serde_json::to_vec(&Row::Clock { zero_ms: now_ms.saturating_sub(since) })?;
        text.push(b'\n');
        let mut last = None;
        for (n, line) in numbered {
            let words = cut_at(&line.text, LOG_TEXT).to_owned();
            let (source, level, at_us) = (line.source, line.level.min(7), line.at_us);
            let row = Row::Line { number: n, source, level, at_us, text: words };
            serde_json::to_writer(&mut text, &row)?;
            text.push(b'\n');
            last = Some(n);
        }
        let Some(last) = last else { return Ok(next) };
        if self.write(&text, stranger)? {
            self.written = now_ms;
        }
        self.next = Some(last + 1);
        Ok(last + 1)
    }

    fn write(&mut self, text: &[u8], stranger: bool) -> io::Result<bool> {
        let length = |path: &Path| fs::metadata(path).map_or(0, |meta| meta.len());
        let (head, tail) = (self.path("head"), self.path("tail"));
        let more = text.len() as u64;
        let limit = if stranger { STRANGER } else { HEAD };
        // Once there is a tail, the beginning is over.
        let into = if length(&head) + more <= limit && !tail.exists() {
            head
        } else if stranger {
            return Ok(false);
        } else {
            let full = length(&tail);
            if full > 0 && full + more > TAIL {
                let old = self.path("tail-old");
                self.bytes -= length(&old).min(self.bytes);
                fs::rename(&tail, old)?;
            }
            tail
        };
        let before = length(&into);
        let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(&into)?;
        if let Err(error) = file.write_all(text) {
            // A full disk: half a batch is taken back, and sent again later.
            let _ = file.set_len(before);
            return Err(error);
        }
        self.bytes += more;
        Ok(true)
    }

    /// All that is kept, oldest first, and the kernel's start on the server's clock.
    pub(super) fn read(dir: &Path, boot: &str) -> io::Result<(Option<i64>, Vec<Kept>)> {
        let (mut zero, mut kept) = (None, Vec::new());
        for part in PARTS {
            let bytes = match fs::read(dir.join(format!("{boot}.{part}"))) {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            for row in bytes.split(|b| *b == b'\n').filter(|row| !row.is_empty()) {
                match serde_json::from_slice(row) {
                    Ok(Row::Clock { zero_ms }) => zero = Some(zero.map_or(zero_ms, |z: i64| z.min(zero_ms))),
                    Ok(Row::Line { number, source, level, at_us, text }) => {
                        kept.push(Kept { number, line: LogLine { source, level, at_us, text } });
                    }
                    // Half a line of a server that lost its power.
                    Err(_) => {}
                }
            }
        }
        Ok((zero, kept))
    }
}

/// Cuts a half-written line off a file's end; gives the number of its last line.
fn mend(path: &Path) -> io::Result<Option<u64>> {
    let mut file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let length = file.metadata()?.len();
    let from = length.saturating_sub(4 * LINE);
    file.seek(SeekFrom::Start(from))?;
    let mut end = Vec::new();
    file.read_to_end(&mut end)?;
    let whole = end.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    if whole < end.len() {
        file.set_len(from + whole as u64)?;
    }
    let rows = end[..whole].split(|b| *b == b'\n').rev();
    let mut numbers = rows.filter_map(|row| match serde_json::from_slice(row) {
        Ok(Row::Line { number, .. }) => Some(number),
        Ok(Row::Clock { .. }) | Err(_) => None,
    });
    Ok(numbers.next())
}
