//! Tar archives as layers: reads what mmdebstrap writes (POSIX pax and GNU forms), drops and replaces entries, and
//! passes everything else through byte for byte, so that owners, modes, extended attributes and capabilities stay as
//! dpkg made them.
//!
//! Format: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's L and K entries. Sparse files
//! and multi-volume archives are not read.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link and where it points.
    Symlink(String),
    /// A hard link and the path of the file it is another name of.
    Hardlink(String),
    /// A character device and its major and minor number.
    CharDevice(u32, u32),
    /// A block device and its major and minor number.
    BlockDevice(u32, u32),
    /// A FIFO.
    Fifo,
    /// Something of this reader's future, with its type flag.
    Other(u8),
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Absolute path, `/` for the root itself.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Where its content lies in the archive.
    pub data: Range<usize>,
    /// Where all of it lies: extension headers, header, content, padding.
    raw: Range<usize>,
}

/// What is wrong with an archive, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TarError {
    /// What.
    pub what: &'static str,
    /// Byte offset.
    pub offset: usize,
}

/// Reads every entry.
pub fn entries(tar: &[u8]) -> Result<Vec<Entry>, TarError> {
    let mut found = Vec::new();
    let mut at = 0;
    let mut first = 0;
    let mut extended = Extended::default();
    while let Some(header) = tar.get(at..at + BLOCK) {
        if header.iter().all(|byte| *byte == 0) {
            return Ok(found);
        }
        let fail = |what| TarError { what, offset: at };
        check_sum(header).ok_or_else(|| fail("a header whose checksum is wrong"))?;
        let flag = header[156];
        let size = match extended.size.take() {
            Some(size) if !matches!(flag, b'x' | b'g' | b'L' | b'K') => size,
            Some(_) | None => number(&header[124..136]).ok_or_else(|| fail("an unreadable size"))?,
        };
        let size = usize::try_from(size).map_err(|_| fail("a size too big for this machine"))?;
        let begin = at + BLOCK;
        let end = begin.checked_add(size).filter(|end| *end <= tar.len()).ok_or_else(|| fail("content cut short"))?;
        let next = end.next_multiple_of(BLOCK);
        let data = &tar[begin..end];
        match flag {
            b'g' => first = next,
            b'x' => extended.read_pax(data).ok_or_else(|| fail("an unreadable pax header"))?,
            b'L' => extended.path = Some(text(data).ok_or_else(|| fail("a path that is not UTF-8"))?),
            b'K' => extended.link = Some(text(data).ok_or_else(|| fail("a link that is not UTF-8"))?),
            _ => {
                let fields = std::mem::take(&mut extended);
                let raw = first..next.min(tar.len());
                found.push(entry(header, fields, begin..end, raw).ok_or_else(|| fail("an unreadable header"))?);
                first = next;
            }
        }
        at = next;
    }
    Err(TarError { what: "no end-of-archive block", offset: at })
}

/// Fields from extension headers, for the next entry.
#[derive(Debug, Default)]
struct Extended {
    path: Option<String>,
    link: Option<String>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    xattrs: BTreeMap<String, Vec<u8>>,
}

impl Extended {
    /// Records are `LENGTH KEY=VALUE\n`, the length counting all of it.
    fn read_pax(&mut self, mut data: &[u8]) -> Option<()> {
        while !data.is_empty() {
            let space = data.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&data[..space]).ok()?.parse().ok()?;
            let record = data.get(space + 1..length.checked_sub(1)?)?;
            if data.get(length - 1) != Some(&b'\n') {
                return None;
            }
            data = &data[length..];
            let equals = record.iter().position(|byte| *byte == b'=')?;
            let key = std::str::from_utf8(&record[..equals]).ok()?;
            let value = &record[equals + 1..];
            let word = || std::str::from_utf8(value).ok().map(str::to_owned);
            match key {
                "path" => self.path = Some(word()?),
                "linkpath" => self.link = Some(word()?),
                "size" => self.size = Some(word()?.parse().ok()?),
                "uid" => self.uid = Some(word()?.parse().ok()?),
                "gid" => self.gid = Some(word()?.parse().ok()?),
                _ => {
                    if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                        self.xattrs.insert(name.into(), value.to_vec());
                    }
                }
            }
        }
        Some(())
    }
}

fn entry(header: &[u8], extended: Extended, data: Range<usize>, raw: Range<usize>) -> Option<Entry> {
    let path = if let Some(path) = extended.path {
        path
    } else {
        let name = text(&header[..100])?;
        let prefix = if &header[257..263] == b"ustar\0" { text(&header[345..500])? } else { String::new() };
        if prefix.is_empty() { name } else { format!("{prefix}/{name}") }
    };
    let link = || extended.link.clone().or_else(|| text(&header[157..257]));
    let device = |at: usize| u32::try_from(number(&header[at..at + 8])?).ok();
    let kind = match header[156] {
        b'5' => Kind::Directory,
        b'0' | 0 | b'7' => Kind::File,
        b'2' => Kind::Symlink(link()?),
        b'1' => Kind::Hardlink(absolute(&link()?)),
        b'3' => Kind::CharDevice(device(329)?, device(337)?),
        b'4' => Kind::BlockDevice(device(329)?, device(337)?),
        b'6' => Kind::Fifo,
        other => Kind::Other(other),
    };
    Some(Entry {
        path: absolute(&path),
        kind,
        mode: u32::try_from(number(&header[100..108])?).ok()? & 0o7777,
        uid: extended.uid.map_or_else(|| number(&header[108..116]), Some)?,
        gid: extended.gid.map_or_else(|| number(&header[116..124]), Some)?,
        xattrs: extended.xattrs,
        data,
        raw,
    })
}

fn text(field: &[u8]) -> Option<String> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).ok().map(str::to_owned)
}

/// `./usr/bin/` → `/usr/bin`.
fn absolute(path: &str) -> String {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    format!("/{}", parts.join("/"))
}

/// Octal, or base-256 when the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let mut bytes = field.iter();
        let first = u64::from(bytes.next()? & 0x7f);
        return bytes.try_fold(first, |sum, byte| Some(sum.checked_mul(256)? + u64::from(*byte)));
    }
    let digits = text(field)?;
    let digits = digits.trim();
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

fn check_sum(header: &[u8]) -> Option<()> {
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    let own: u64 = header[148..156].iter().map(|byte| u64::from(*byte)).sum();
    (number(&header[148..156])? == sum - own + 8 * u64::from(b' ')).then_some(())
}

/// An entry to add on top, owned by root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    /// Absolute path.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// What it is.
    pub content: Content,
}

/// What is added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A directory.
    Directory,
    /// A file with its bytes.
    File(Vec<u8>),
    /// A symbolic link and where it points.
    Symlink(String),
}

/// Why two layers cannot be put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerError {
    /// The base archive is not readable.
    Tar(TarError),
    /// A parent of an added path is not a directory of the base (a symlink, for example).
    NotADirectory {
        /// The parent.
        path: String,
    },
    /// A kept hard link is another name of a file that is left out or replaced.
    DanglingHardlink {
        /// The link.
        path: String,
        /// The file.
        target: String,
    },
}

/// The base without what `drop` says, and with `added` on top. Missing parents of added entries are made, mode 0755.
pub fn layer(base: &[u8], drop: impl Fn(&Entry) -> bool, added: &[Added]) -> Result<Vec<u8>, LayerError> {
    let all = entries(base).map_err(LayerError::Tar)?;
    let replaced: BTreeSet<&str> = added.iter().map(|added| added.path.as_str()).collect();
    let mut kept: BTreeMap<&str, &Kind> = BTreeMap::new();
    let mut out = Vec::with_capacity(base.len());
    for entry in &all {
        if drop(entry) || replaced.contains(entry.path.as_str()) {
            continue;
        }
        if let Kind::Hardlink(target) = &entry.kind
            && !kept.contains_key(target.as_str())
        {
            return Err(LayerError::DanglingHardlink { path: entry.path.clone(), target: target.clone() });
        }
        kept.insert(&entry.path, &entry.kind);
        out.extend_from_slice(&base[entry.raw.clone()]);
    }
    let mut made: BTreeSet<String> = BTreeSet::new();
    let sorted: BTreeMap<&str, &Added> = added.iter().map(|added| (added.path.as_str(), added)).collect();
    for added in sorted.values() {
        for (end, _) in added.path.match_indices('/').skip(1) {
            let parent = &added.path[..end];
            match kept.get(parent) {
                Some(Kind::Directory) => {}
                Some(
                    Kind::File
                    | Kind::Symlink(_)
                    | Kind::Hardlink(_)
                    | Kind::CharDevice(..)
                    | Kind::BlockDevice(..)
                    | Kind::Fifo
                    | Kind::Other(_),
                ) => {
                    return Err(LayerError::NotADirectory { path: parent.into() });
                }
                None => {
                    if !sorted.contains_key(parent) && made.insert(parent.into()) {
                        append(&mut out, parent, 0o755, &Content::Directory);
                    }
                }
            }
        }
        append(&mut out, &added.path, added.mode, &added.content);
    }
    out.resize(out.len() + 2 * BLOCK, 0);
    Ok(out)
}

fn append(out: &mut Vec<u8>, path: &str, mode: u32, content: &Content) {
    let (flag, data, link): (u8, &[u8], &str) = match content {
        Content::Directory => (b'5', &[], ""),
        Content::File(bytes) => (b'0', bytes, ""),
        Content::Symlink(target) => (b'2', &[], target),
    };
    let name = format!(".{path}");
    for (flag, long) in [(b'L', name.as_str()), (b'K', link)] {
        if long.len() > 100 {
            let mut bytes = long.as_bytes().to_vec();
            bytes.push(0);
            header(out, "././@LongLink", 0, flag, bytes.len(), "");
            content_blocks(out, &bytes);
        }
    }
    header(out, &name, mode, flag, data.len(), link);
    content_blocks(out, data);
}

fn content_blocks(out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

fn header(out: &mut Vec<u8>, name: &str, mode: u32, flag: u8, size: usize, link: &str) {
    let mut block = [0_u8; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &name.as_bytes()[..name.len().min(100)]);
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{size:011o}").as_bytes());
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[flag]);
    put(157, &link.as_bytes()[..link.len().min(100)]);
    put(257, b"ustar  \0");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.extend_from_slice(&block);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(path: &str, bytes: &[u8]) -> Added {
        Added { path: path.into(), mode: 0o644, content: Content::File(bytes.to_vec()) }
    }

    fn empty() -> Vec<u8> {
        vec![0; 2 * BLOCK]
    }

    #[test]
    fn replaced_entries_are_gone_and_parents_are_made() {
        let base = layer(&empty(), |_| false, &[file("/etc/a", b"old"), file("/etc/b", b"b")]).unwrap();
        let merged =
            layer(&base, |entry| entry.path == "/etc/b", &[file("/etc/a", b"new"), file("/opt/x/y", b"y")]).unwrap();
        let found: Vec<_> = entries(&merged).unwrap();
        let paths: Vec<_> = found.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["/etc", "/etc/a", "/opt", "/opt/x", "/opt/x/y"]);
        assert_eq!(&merged[found[1].data.clone()], b"new");
    }

    #[test]
    fn nothing_is_written_through_a_symlink() {
        let link = Added { path: "/lib".into(), mode: 0o777, content: Content::Symlink("usr/lib".into()) };
        let base = layer(&empty(), |_| false, &[link]).unwrap();
        let refused = layer(&base, |_| false, &[file("/lib/x", b"")]);
        assert_eq!(refused, Err(LayerError::NotADirectory { path: "/lib".into() }));
    }

    #[test]
    fn pax_records_are_read() {
        let mut extended = Extended::default();
        let value = b"\x01\0\n=\x02";
        let mut record = b"SCHILY.xattr.security.capability=".to_vec();
        record.extend_from_slice(value);
        let mut data = format!("{} ", record.len() + 4).into_bytes();
        data.extend_from_slice(&record);
        data.push(b'\n');
        data.extend_from_slice(b"12 path=a=b\n");
        extended.read_pax(&data).unwrap();
        assert_eq!(extended.xattrs["security.capability"], value);
        assert_eq!(extended.path.as_deref(), Some("a=b"));
        assert!(Extended::default().read_pax(b"99 path=a\n").is_none(), "a length past the end");
    }

    proptest! {
        #[test]
        fn what_is_added_is_read_back(
            files in prop::collection::btree_map("/[a-c]{1,3}/[a-z]{1,130}", (prop::collection::vec(any::<u8>(), 0..1500), 0_u32..0o7777), 0..10),
        ) {
            let added: Vec<_> = files.iter().map(|(path, (bytes, mode))| Added {
                path: path.clone(), mode: *mode, content: Content::File(bytes.clone()),
            }).collect();
            let tar = layer(&empty(), |_| false, &added).unwrap();
            let again = layer(&tar, |_| false, &[]).unwrap();
            prop_assert_eq!(&again, &tar, "passing through changes nothing");
            let found: BTreeMap<_, _> = entries(&tar).unwrap().into_iter().filter(|entry| entry.kind == Kind::File)
                .map(|entry| (entry.path, (tar[entry.data].to_vec(), entry.mode))).collect();
            prop_assert_eq!(found, files);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let _ = entries(&bytes);
        }
    }
}
