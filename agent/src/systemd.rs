//! One question to the image's init over its own socket, in place of a program that is started for each: a machine at rest
//! is asked every few seconds. Source: D-Bus specification 0.43 (message format, SASL EXTERNAL), org.freedesktop.systemd1(5).
//!
//! The socket is root's, and what answers is PID 1; still nothing it says can hold the agent or make it large.

use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// systemd's own, which needs no message bus.
pub const SOCKET: &str = "/run/systemd/private";
pub const MANAGER: (&str, &str) = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");

/// Longest message that is read, and the most of them before the answer: systemd tells everybody of everything.
const LONGEST: usize = 64 * 1024;
const MESSAGES: usize = 1000;

const CALL: u8 = 1;
const RETURN: u8 = 2;
const FAILURE: u8 = 3;

/// The object and interface of a unit (systemd's bus_label_escape: all but letters and digits as `_xx`).
pub fn unit(name: &str) -> (String, &'static str) {
    let escaped: String = name
        .bytes()
        .enumerate()
        .map(|(at, byte)| match byte {
            b'0'..=b'9' if at > 0 => char::from(byte).to_string(),
            b'a'..=b'z' | b'A'..=b'Z' => char::from(byte).to_string(),
            _ => format!("_{byte:02x}"),
        })
        .collect();
    (format!("/org/freedesktop/systemd1/unit/{escaped}"), "org.freedesktop.systemd1.Unit")
}

/// A property that is a string.
pub async fn property(socket: &Path, (object, interface): (&str, &str), name: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket).await?;
    let uid = std::fs::metadata("/proc/self")?.uid().to_string();
    let digits: String = uid.bytes().map(|digit| format!("{digit:02x}")).collect();
    stream.write_all(format!("\0AUTH EXTERNAL {digits}\r\n").as_bytes()).await?;
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        if line.len() > 128 {
            return Err(bad("an answer to AUTH without end"));
        }
        line.push(stream.read_u8().await?);
    }
    if !line.starts_with(b"OK ") {
        return Err(Error::new(ErrorKind::PermissionDenied, String::from_utf8_lossy(&line).trim().to_owned()));
    }
    let call = get(object, interface, name);
    stream.write_all(&[b"BEGIN\r\n", call.as_slice()].concat()).await?;
    for _ in 0..MESSAGES {
        let mut head = [0; 16];
        stream.read_exact(&mut head).await?;
        let number = |at: usize| {
            let bytes = head[at..at + 4].try_into().expect("four bytes");
            let number = if head[0] == b'l' { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) };
            usize::try_from(number).unwrap_or(usize::MAX)
        };
        let fields = number(12).checked_next_multiple_of(8).unwrap_or(usize::MAX);
        let length = fields.saturating_add(number(4));
        if length > LONGEST {
            return Err(bad("a message that is too long"));
        }
        let mut rest = vec![0; length];
        stream.read_exact(&mut rest).await?;
        match head[1] {
            RETURN if head[0] == b'l' => return text(&rest[fields..]).ok_or_else(|| bad("no string")),
            RETURN => return Err(bad("another byte order")),
            FAILURE => return Err(Error::other(format!("systemd refuses to say {name}"))),
            _ => {}
        }
    }
    Err(bad("no answer among many messages"))
}

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("systemd sent {what}"))
}

/// A variant that holds a string.
fn text(body: &[u8]) -> Option<String> {
    let rest = body.strip_prefix(b"\x01s\0\0")?;
    let (length, rest) = rest.split_first_chunk()?;
    let text = rest.get(..usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    Some(std::str::from_utf8(text).ok()?.to_owned())
}

/// org.freedesktop.DBus.Properties.Get.
fn get(object: &str, interface: &str, name: &str) -> Vec<u8> {
    let (mut fields, mut body) = (Vec::new(), Vec::new());
    for (code, kind, value) in [
        (1, b'o', object),
        (2, b's', "org.freedesktop.DBus.Properties"),
        (3, b's', "Get"),
        (6, b's', "org.freedesktop.systemd1"),
    ] {
        align(&mut fields, 8);
        fields.extend([code, 1, kind, 0]);
        string(&mut fields, value);
    }
    align(&mut fields, 8);
    fields.extend(b"\x08\x01g\0\x02ss\0");
    string(&mut body, interface);
    string(&mut body, name);
    let mut message = vec![b'l', CALL, 0, 1];
    for number in [body.len(), 1, fields.len()] {
        message.extend(u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    }
    message.extend(fields);
    align(&mut message, 8);
    message.extend(body);
    message
}

fn align(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    align(bytes, 4);
    bytes.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    /// What PID 1 does at the other end of the socket; `answer` follows the call.
    fn ask(answer: &'static [&'static [u8]]) -> (Result<String>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("private");
        let listener = UnixListener::bind(&path).unwrap();
        let init = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 64];
            let n = stream.read(&mut line).unwrap();
            assert!(line[..n].starts_with(b"\0AUTH EXTERNAL 3") && line[..n].ends_with(b"\r\n"));
            stream.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n").unwrap();
            let mut call = vec![0; 4096];
            let n = stream.read(&mut call).unwrap();
            call.truncate(n);
            // The reader may have gone after the first of them.
            answer.iter().for_each(|message| drop(stream.write_all(message)));
            call
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let got = runtime.block_on(property(&path, MANAGER, "SystemState"));
        (got, init.join().unwrap())
    }

    const SIGNAL: &[u8] = b"l\x04\x01\x01\x04\0\0\0\x07\0\0\0\x09\0\0\0\x08\x01g\0\x01u\0\0\0\0\0\0\0\0\0\0\x01\0\0\0";
    const RUNNING: &[u8] =
        b"l\x02\x01\x01\x10\0\0\0\x01\0\0\0\x08\0\0\0\x05\x01u\0\x01\0\0\0\x01s\0\0\x07\0\0\0running\0";
    const REFUSED: &[u8] = b"l\x03\x01\x01\0\0\0\0\x01\0\0\0\x08\0\0\0\x05\x01u\0\x01\0\0\0";
    const EMPTY: &[u8] = b"l\x02\x01\x01\0\0\0\0\0\0\0\0\0\0\0\0";
    const HUGE: &[u8] = b"l\x04\x01\x01\xff\xff\xff\xff\x01\0\0\0\0\0\0\0";

    #[test]
    fn systemds_word_is_asked_for_and_read_behind_what_it_tells_everybody() {
        let (got, call) = ask(&[SIGNAL, RUNNING]);
        assert_eq!(got.unwrap(), "running");
        let call = call.strip_prefix(b"BEGIN\r\n").unwrap();
        // Head and fields are whole multiples of 8, and the body is the two strings.
        assert_eq!(&call[..4], b"l\x01\0\x01");
        let body = usize::try_from(u32::from_le_bytes(call[4..8].try_into().unwrap())).unwrap();
        assert_eq!((call.len() - body) % 8, 0);
        assert!(call[call.len() - body..].starts_with(b"\x20\0\0\0org.freedesktop.systemd1.Manager\0\0\0\0\x0b\0\0\0"));
        assert!(call.ends_with(b"SystemState\0"));
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        const CUT: &[&[u8]] = &[RUNNING.split_at(20).0];
        for answer in [&[REFUSED][..], &[HUGE], &[SIGNAL], CUT, &[EMPTY]] {
            assert!(ask(answer).0.is_err(), "{answer:?}");
        }
    }

    #[test]
    fn units_have_systemds_paths() {
        assert_eq!(unit("kiln-agent.service").0, "/org/freedesktop/systemd1/unit/kiln_2dagent_2eservice");
        assert_eq!(unit("9p.mount").0, "/org/freedesktop/systemd1/unit/_39p_2emount");
    }
}
