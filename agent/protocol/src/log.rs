//! A machine's log on its way to the server: the kernel's lines since its first, and the agent's own.
//!
//! Lines of one boot are numbered from 0 without a break, over the hand-over. A batch carries consecutive ones; the
//! answer names the number the server wants next. What was sent and not answered is sent again and known by its number,
//! so a lost reply loses and doubles nothing. Numbers that never come are lines that the machine had no room for.

use crate::ids::{IdError, MachineId, word_enum};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Where batches are posted.
pub const LOG_PATH: &str = "/agent/v1/log";
/// Longest batch, bytes of JSON.
pub const LOG_LIMIT: usize = 512 << 10;
/// Most lines of a batch.
pub const LOG_LINES: usize = 500;
/// Longest text of a line, bytes: the kernel's own are shorter.
pub const LOG_TEXT: usize = 1024;

word_enum! {
    /// Who said a line.
    LogSource {
        /// The kernel.
        Kernel = "kernel",
        /// Another program that wrote into the kernel's log: the image's init, until its own log runs.
        System = "system",
        /// Kiln's agent.
        Agent = "agent",
        /// A kernel before this one, which left its last lines behind.
        Earlier = "earlier",
    }
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Who said it.
    pub source: LogSource,
    /// syslog(3)'s level, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Microseconds since the kernel started.
    pub at_us: u64,
    /// What was said; one line, but nothing is to be believed of its characters.
    pub text: String,
}

/// What the agent posts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogBatch {
    /// The kernel's boot id, as in reports.
    pub boot_id: String,
    /// Whose log it is.
    pub machine: MachineId,
    /// Number of the first line; of the next one, if there is none here and the agent only asks.
    pub first: u64,
    /// When this batch was made, microseconds since the kernel started.
    pub at_us: u64,
    /// The lines, at most [`LOG_LINES`].
    pub lines: Vec<LogLine>,
}

/// The server's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogReply {
    /// The number of the line it wants next: it has what came before, or will never have it.
    pub next: u64,
}

/// The text with everything that could pass for something else made visible: control characters, line ends, and the
/// characters that turn the direction of writing (Unicode UAX 9) or take no room.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => out.push(' '),
            '\u{ad}'
            | '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' => out.extend(c.escape_unicode()),
            c if c.is_control() => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// At most `max` bytes of a text, cut between characters.
pub fn cut_at(text: &str, max: usize) -> &str {
    let mut end = max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_a_batch() {
        let line = LogLine { source: LogSource::Kernel, level: 5, at_us: 0, text: "Linux version 6.12".into() };
        let machine: MachineId = "00000000-0000-0000-0000-000000000001".parse().unwrap();
        let batch = LogBatch { boot_id: "b".into(), machine, first: 7, at_us: 9, lines: vec![line] };
        let golden = r#"{"boot_id":"b","machine":"00000000-0000-0000-0000-000000000001","first":7,"at_us":9,"lines":[{"source":"kernel","level":5,"at_us":0,"text":"Linux version 6.12"}]}"#;
        assert_eq!(serde_json::to_string(&batch).unwrap(), golden);
        let newer = golden.replacen('{', r#"{"added_later":1,"#, 1);
        assert_eq!(serde_json::from_str::<LogBatch>(&newer).unwrap(), batch, "unknown fields are ignored");
        assert_eq!(serde_json::to_string(&LogReply { next: 8 }).unwrap(), r#"{"next":8}"#);
    }

    #[test]
    fn nothing_passes_for_another_line() {
        assert_eq!(printable("a\tb"), "a b");
        assert_eq!(printable("x\n12:00:00 kernel ok\r\u{1b}[2J"), "x\\u{a}12:00:00 kernel ok\\u{d}\\u{1b}[2J");
        assert_eq!(printable("\u{202e}drawkcab\u{9b}"), "\\u{202e}drawkcab\\u{9b}");
        assert_eq!(printable("Grüße ✓"), "Grüße ✓");
        assert_eq!((cut_at("aé", 2), cut_at("aé", 3), cut_at("aé", 9)), ("a", "aé", "aé"));
    }
}
