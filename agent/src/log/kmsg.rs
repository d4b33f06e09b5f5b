//! The kernel's log by /dev/kmsg (Documentation/ABI/testing/dev-kmsg): one record a read, from the oldest it still has.

use kiln_protocol::{LogLine, LogSource};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

/// The longest record (CONSOLE_EXT_LOG_MAX).
const RECORD: usize = 8192;

/// An open /dev/kmsg.
pub struct Kmsg {
    pub file: File,
    /// Sequence number of the record that comes next; earlier ones are passed over.
    pub next: u64,
    /// Read behind a gap, and not given out yet.
    kept: Option<LogLine>,
}

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Read1 {
    Line(LogLine),
    /// So many records were overwritten before they were read.
    Lost(u64),
    /// Nothing more for now.
    End,
}

impl Kmsg {
    /// Reads on from the record `next`.
    pub fn open(next: u64) -> std::io::Result<Self> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/kmsg")?;
        Ok(Self { file, next, kept: None })
    }

    /// The next line; what cannot be read ends it for now.
    pub fn read(&mut self) -> Read1 {
        if let Some(line) = self.kept.take() {
            self.next += 1;
            return Read1::Line(line);
        }
        let mut buffer = [0; RECORD];
        loop {
            let n = match self.file.read(&mut buffer) {
                Ok(n @ 1..) => n,
                // EPIPE: the record was overwritten; the next read gives the oldest there is.
                Err(e) if e.kind() == ErrorKind::BrokenPipe || e.kind() == ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => return Read1::End,
            };
            let Some((number, line)) = parse(&buffer[..n]) else { continue };
            if number < self.next {
                continue;
            }
            let lost = number - self.next;
            if lost > 0 {
                self.next = number;
                self.kept = Some(line);
                return Read1::Lost(lost);
            }
            self.next = number + 1;
            return Read1::Line(line);
        }
    }
}

/// `PRIORITY,NUMBER,MICROSECONDS,FLAGS[,…];TEXT`, then a dictionary of lines that begin with a space.
fn parse(record: &[u8]) -> Option<(u64, LogLine)> {
    let text = String::from_utf8_lossy(record);
    let (head, rest) = text.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let number = fields.next()?.parse().ok()?;
    let at_us = fields.next()?.parse().ok()?;
    let source = if priority >> 3 == 0 { LogSource::Kernel } else { LogSource::System };
    let level = u8::try_from(priority & 7).expect("three bits");
    Some((number, LogLine { source, level, at_us, text: rest.lines().next().unwrap_or_default().to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_the_kernel_writes_them() {
        let line = |source, level, at_us, text: &str| LogLine { source, level, at_us, text: text.into() };
        let first = parse(b"5,0,0,-;Linux version 6.12.43+deb13-cloud-amd64 (debian-kernel)\n");
        let text = "Linux version 6.12.43+deb13-cloud-amd64 (debian-kernel)";
        assert_eq!(first, Some((0, line(LogSource::Kernel, 5, 0, text))));
        let device =
            parse(b"6,339,5140900,-;virtio_net virtio0 eth0: up\n SUBSYSTEM=virtio\n DEVICE=+virtio:virtio0\n");
        assert_eq!(device, Some((339, line(LogSource::Kernel, 6, 5_140_900, "virtio_net virtio0 eth0: up"))));
        let system = parse(b"30,400,9000000,-,caller=T1;systemd[1]: Hostname set.\n");
        assert_eq!(system, Some((400, line(LogSource::System, 6, 9_000_000, "systemd[1]: Hostname set."))));
        assert_eq!((parse(b"nonsense"), parse(b"6,x,1,-;t"), parse(b"")), (None, None, None));
    }
}
