//! The last lines of a kernel that ended badly, which it left where they outlive it: pstore, on EFI variables or in
//! reserved memory (Linux Documentation/ABI/testing/pstore, Documentation/admin-guide/ramoops.rst). They go to the server
//! before this boot's own, and are erased when it has them: firmware has little room.

use kiln_protocol::{LogLine, LogSource};
use std::io::Read;
use std::path::Path;

/// Records that are read; there are some ten of a panic.
const MOST: usize = 64;
/// Longest record that is read, bytes.
const RECORD: u64 = 64 << 10;
/// All of them together: what a panic wrote is at its end.
const ALL: usize = 128 << 10;

/// One record: a part of what the kernel said, the first the newest.
#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    /// `Panic#2`.
    why: &'a str,
    count: u32,
    part: u32,
    lines: &'a str,
}

/// What lies there, oldest line first; none if nothing does.
pub fn read(dir: &Path) -> Vec<LogLine> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten().take(MOST) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        let read = std::fs::File::open(entry.path()).and_then(|file| file.take(RECORD).read_to_end(&mut bytes));
        if read.is_ok() {
            files.push((name, String::from_utf8_lossy(&bytes).into_owned()));
        }
    }
    lines(&files)
}

/// Removes all of it.
pub fn erase(dir: &Path) -> std::io::Result<()> {
    std::fs::read_dir(dir)?.try_for_each(|entry| std::fs::remove_file(entry?.path()))
}

fn lines(files: &[(String, String)]) -> Vec<LogLine> {
    let mut records: Vec<(Record<'_>, &str)> =
        files.iter().map(|(name, text)| (record(name, text), name.as_str())).collect();
    records.sort_by(|(a, x), (b, y)| (a.count, b.part, x).cmp(&(b.count, a.part, y)));
    let said = |level, text: &str| LogLine { source: LogSource::Earlier, level, at_us: 0, text: text.to_owned() };
    let mut out = Vec::new();
    let mut why = "";
    for (record, name) in &records {
        if why != record.why {
            why = record.why;
            out.push(said(4, &format!("left by a kernel before this one: {why}")));
        }
        if name.ends_with(".enc.z") {
            out.push(said(4, &format!("{name} is compressed in a way that this kernel does not read")));
            continue;
        }
        for line in record.lines.lines() {
            let (level, text) = line_of(line);
            out.push(said(level, text));
        }
    }
    let mut bytes: usize = out.iter().map(|line| line.text.len()).sum();
    let fits = out.iter().position(|line| {
        let fits = bytes <= ALL;
        bytes -= line.text.len();
        fits
    });
    out.split_off(fits.unwrap_or(out.len()))
}

/// `REASON#COUNT PartN` and the lines; without such a head it is a console's text.
fn record<'a>(name: &'a str, text: &'a str) -> Record<'a> {
    let parsed = || {
        let (head, lines) = text.split_once('\n')?;
        let (why, part) = head.split_once(" Part")?;
        let (reason, count) = why.split_once('#')?;
        let plain = !reason.is_empty() && reason.chars().all(|c| c.is_ascii_graphic() || c == ' ');
        plain.then_some(Record { why, count: count.parse().ok()?, part: part.trim().parse().ok()?, lines })
    };
    parsed().unwrap_or(Record { why: name, count: 0, part: 0, lines: text })
}

/// `<6>[    1.234567] text`: the level, and the text with its time, which is not of this boot.
fn line_of(line: &str) -> (u8, &str) {
    let split = || {
        let (level, text) = line.strip_prefix('<')?.split_once('>')?;
        let level: u32 = level.parse().ok()?;
        Some((u8::try_from(level & 7).expect("three bits"), text))
    };
    split().unwrap_or((6, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(dir: &Path) -> Vec<(u8, String)> {
        read(dir).into_iter().map(|line| (line.level, line.text)).collect()
    }

    #[test]
    fn a_panic_is_read_in_its_order_and_erased() {
        let temp = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(temp.path().join(name), text).unwrap();
        // As efi-pstore names and writes them: the newest part first.
        put("dmesg-efi_pstore-176420000001001", "Panic#2 Part1\n<0>[   12.5] Kernel panic - not syncing: sysrq\n");
        put(
            "dmesg-efi_pstore-176420000002001",
            "Panic#2 Part2\n<6>[   12.4] sysrq: Trigger a crash\n<4>[   12.4] CPU: 0\n",
        );
        put("dmesg-efi_pstore-176420000001002", "Oops#1 Part1\n<1>[    9.0][   T77] BUG: NULL\n");
        put("console-ramoops-0", "[    8.0] plain\n");
        put("dmesg-ramoops-1.enc.z", "\u{1}\u{2}");
        let expected = [
            (4, "left by a kernel before this one: console-ramoops-0"),
            (6, "[    8.0] plain"),
            (4, "left by a kernel before this one: dmesg-ramoops-1.enc.z"),
            (4, "dmesg-ramoops-1.enc.z is compressed in a way that this kernel does not read"),
            (4, "left by a kernel before this one: Oops#1"),
            (1, "[    9.0][   T77] BUG: NULL"),
            (4, "left by a kernel before this one: Panic#2"),
            (6, "[   12.4] sysrq: Trigger a crash"),
            (4, "[   12.4] CPU: 0"),
            (0, "[   12.5] Kernel panic - not syncing: sysrq"),
        ];
        assert_eq!(texts(temp.path()), expected.map(|(level, text)| (level, text.to_owned())));
        assert!(read(temp.path()).iter().all(|line| line.source == LogSource::Earlier));
        erase(temp.path()).unwrap();
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
        assert!(read(temp.path()).is_empty() && read(&temp.path().join("none")).is_empty());
    }

    #[test]
    fn what_is_there_is_bounded_and_its_end_is_kept() {
        let temp = tempfile::tempdir().unwrap();
        for part in 1..=200 {
            let text = format!("Panic#1 Part{part}\n<6>{}\n", "x".repeat(10_000));
            std::fs::write(temp.path().join(format!("dmesg-{part}")), text).unwrap();
        }
        let kept = read(temp.path());
        assert!(kept.iter().map(|line| line.text.len()).sum::<usize>() <= ALL && kept.len() > 10);
        for hostile in ["", "#", "Panic# Part", "Panic#1 Part-1\n", "<", "<99999999999>x", "<8>", "\u{0}"] {
            let files = [("f".to_owned(), hostile.to_owned()), ("g".to_owned(), format!("Panic#1 Part1\n{hostile}"))];
            assert!(lines(&files).iter().all(|line| line.level < 8));
        }
    }
}
