//! What a command writes: to a terminal, to another program, or as a part of a URL.

use super::error::CliError;
use jiff::Timestamp;
use std::fmt::Write as _;
use std::io::Write as _;

pub(super) fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

pub(super) fn pretty<T: serde::Serialize>(value: &T) -> Result<String, CliError> {
    Ok(format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// A name or id as one path segment: everything that is not plainly safe is percent-encoded (RFC 3986 §2.1).
pub(super) fn segment(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, b| {
        if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.') {
            out.push(char::from(b));
        } else {
            write!(out, "%{b:02X}").expect("writing to a String cannot fail");
        }
        out
    })
}

/// What others say goes to a terminal: whatever it would obey, or would show in another order, is written as JSON writes it,
/// so that JSON stays JSON.
pub(crate) fn tame(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        let plain = matches!(c, ' '..='~' | '\n') || {
            let mut buffer = [0; 4];
            let c = c.encode_utf8(&mut buffer);
            kiln_protocol::printable(c) == *c
        };
        if plain {
            out.push(c);
        } else {
            write!(out, "\\u{:04x}", u32::from(c)).expect("writing to a String cannot fail");
        }
        out
    })
}

/// To standard output; a reader that has gone away (`| head`) ends the program quietly.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(tame(text).as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(CliError::Output),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_segment() {
        assert_eq!(segment("rack-1"), "rack-1");
        assert_eq!(segment("../a b?"), "..%2Fa%20b%3F");
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown_and_json_stays_json() {
        let evil = "a\x1b[2J\r\n\u{9b}31m\u{202e}b\u{7f}é";
        let text = tame(evil);
        assert_eq!(text, "a\\u001b[2J\\u000d\n\\u009b31m\\u202eb\\u007fé");
        let json = tame(&serde_json::to_string(evil).unwrap());
        assert!(!json.chars().any(|c| c.is_control() || c == '\u{202e}'), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), evil);
    }
}
