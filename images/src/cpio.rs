//! A writer of newc cpio archives, the kernel's initramfs format. Deterministic: entries are sorted, inodes are
//! counted, every time stamp is the same.
//!
//! It writes only what an initramfs needs: directories, files, symlinks and device nodes, all owned by root. No hard
//! links, no CRC variant.

use kiln_release::newc::{Header, TRAILER, padding};
use std::collections::BTreeMap;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// A regular file with its bytes.
    File(Vec<u8>),
    /// A symbolic link and where it points.
    Symlink(String),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// Why an entry cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpioError {
    /// Not a relative path of plain components.
    #[error("{path:?} is not a plain relative path, so it cannot go into the initramfs")]
    Path {
        /// The path.
        path: String,
    },
    /// A file of 4 GiB or more.
    #[error("{path} has {length} bytes; newc holds less than 4 GiB a file")]
    TooLong {
        /// The path.
        path: String,
        /// Its length.
        length: usize,
    },
    /// Two different things at one path.
    #[error("{path} is added twice")]
    Twice {
        /// The path.
        path: String,
    },
}

/// An archive in the making. Parent directories come by themselves, with mode 0755.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, (u32, Node)>,
}

impl Archive {
    /// Adds one entry. `path` is relative (`kiln/boot.json`), `mode` the permission bits.
    pub fn add(&mut self, path: &str, mode: u32, node: Node) -> Result<(), CpioError> {
        let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        // Nor a folder of the trailer's name: whatever stands behind it would be lost to the kernel.
        if path.split('/').next() == Some(TRAILER) || !path.split('/').all(plain) {
            return Err(CpioError::Path { path: path.into() });
        }
        if let Node::File(bytes) = &node
            && u32::try_from(bytes.len()).is_err()
        {
            return Err(CpioError::TooLong { path: path.into(), length: bytes.len() });
        }
        for (end, _) in path.match_indices('/') {
            let (_, parent) = self.entries.entry(path[..end].into()).or_insert((0o755, Node::Directory));
            if *parent != Node::Directory {
                return Err(CpioError::Twice { path: path[..end].into() });
            }
        }
        match self.entries.get(path) {
            Some((_, Node::Directory)) if node == Node::Directory => {}
            Some(_) => return Err(CpioError::Twice { path: path.into() }),
            None => {}
        }
        self.entries.insert(path.into(), (mode & 0o7777, node));
        Ok(())
    }

    /// The archive's bytes; every entry has time stamp `mtime`.
    pub fn into_bytes(self, mtime: u32) -> Vec<u8> {
        let mut out = Vec::new();
        for (index, (path, (permissions, node))) in self.entries.iter().enumerate() {
            let inode = u32::try_from(index + 1).expect("an initramfs holds far fewer than 2^32 entries");
            let (kind, data, device): (u32, &[u8], (u32, u32)) = match node {
                Node::Directory => (S_IFDIR, &[], (0, 0)),
                Node::File(bytes) => (S_IFREG, bytes, (0, 0)),
                Node::Symlink(target) => (S_IFLNK, target.as_bytes(), (0, 0)),
                Node::CharDevice { major, minor } => (S_IFCHR, &[], (*major, *minor)),
            };
            let links = if kind == S_IFDIR { 2 } else { 1 };
            let size = u32::try_from(data.len()).expect("checked when it was added");
            let header = Header { inode, mode: kind | permissions, links, mtime, size, device };
            out.extend(header.to_bytes(path));
            out.extend_from_slice(data);
            out.extend_from_slice(padding(data.len() as u64));
        }
        out.extend(Header { links: 1, ..Header::default() }.to_bytes(TRAILER));
        // A concatenated archive must begin on a multiple of four; 512 is what every cpio writes.
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_first_and_bytes_are_aligned() {
        let mut archive = Archive::default();
        archive.add("kiln/boot.json", 0o644, Node::File(b"{}".to_vec())).unwrap();
        archive.add("init", 0o755, Node::File(vec![0x7f; 5])).unwrap();
        let bytes = archive.into_bytes(7);
        assert_eq!(bytes.len() % 512, 0);
        let position = |needle: &[u8]| bytes.windows(needle.len()).position(|window| window == needle).unwrap();
        assert!(position(b"kiln\0") < position(b"kiln/boot.json\0"));
        assert!(position(b"init\0") < position(b"kiln\0"), "sorted");
        assert_eq!(&bytes[..6], b"070701");
    }

    #[test]
    fn odd_paths_are_refused() {
        let mut archive = Archive::default();
        for path in ["", "/init", "a//b", "../x", "a/./b", "a/", "TRAILER!!!", "a\0b"] {
            let refused = archive.add(path, 0o644, Node::File(vec![]));
            assert_eq!(refused, Err(CpioError::Path { path: path.into() }), "{path:?}");
        }
        archive.add("a", 0o644, Node::File(vec![])).unwrap();
        assert!(archive.add("a/b", 0o644, Node::File(vec![])).is_err(), "a file is no directory");
        assert!(archive.add("a", 0o644, Node::File(vec![])).is_err());
    }
}
