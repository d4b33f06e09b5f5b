//! What an erofs image says of its files, read without a mount and without rights: everything but their contents, which
//! are compressed (`fsck.erofs --extract` gives those).
//!
//! Format: Linux Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h. A reader of its own, so that what
//! mkfs.erofs wrote is not judged by itself; where the kernel can mount the image, the two are compared.

use super::{Found, Tree, name_links};
use std::collections::BTreeMap;

const MAGIC: u32 = 0xE0F5_E1E2;
/// Bytes of a node's slot: its number times this is its place.
const SLOT: usize = 32;
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;

struct Image<'a> {
    bytes: &'a [u8],
    block: usize,
    meta: usize,
    shared_xattrs: usize,
}

struct Node {
    mode: u32,
    uid: u64,
    gid: u64,
    size: usize,
    layout: u16,
    /// First block of the data, or a device number.
    place: u32,
    xattrs: std::ops::Range<usize>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn usize_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u32_at(bytes, at)).unwrap()
}

/// Every file, by absolute path.
pub fn read(bytes: &[u8]) -> Tree {
    let sb = &bytes[1024..1152];
    assert_eq!(u32_at(sb, 0), MAGIC, "the superblock's magic number");
    let block = 1 << sb[12];
    let image = Image { bytes, block, meta: usize_at(sb, 40) * block, shared_xattrs: usize_at(sb, 44) * block };
    let mut found = BTreeMap::new();
    let mut open = vec![("/".to_owned(), u64::from(u16_at(sb, 14)))];
    while let Some((path, number)) = open.pop() {
        let node = image.node(number);
        let is = |kind| node.mode & 0o170_000 == kind;
        if is(0o040_000) {
            let below = |name: String| format!("{}/{name}", path.trim_end_matches('/'));
            open.extend(image.entries(&node, number).into_iter().map(|(name, number)| (below(name), number)));
        }
        let target = || String::from_utf8(image.data(&node, number)).unwrap();
        let device = is(0o020_000) || is(0o060_000);
        let entry = Found {
            kind: node.mode & 0o170_000,
            mode: node.mode & 0o7777,
            uid: node.uid,
            gid: node.gid,
            xattrs: image.xattrs(&node),
            link: is(0o120_000).then(target),
            // The kernel's new_decode_dev().
            device: device.then_some((node.place >> 8 & 0xfff, node.place & 0xff | node.place >> 12 & 0xf_ff00)),
            first_name: String::new(),
        };
        assert!(found.insert(path, (number, entry)).is_none(), "a name twice in one directory");
    }
    name_links(found)
}

impl Image<'_> {
    fn at(&self, number: u64) -> usize {
        self.meta + usize::try_from(number).unwrap() * SLOT
    }

    fn node(&self, number: u64) -> Node {
        let at = self.at(number);
        let raw = &self.bytes[at..at + 64];
        let format = u16_at(raw, 0);
        // erofs_inode_compact, or erofs_inode_extended.
        let compact = format & 1 == 0;
        let begin = at + if compact { 32 } else { 64 };
        let xattrs = match usize::from(u16_at(raw, 2)) {
            0 => 0,
            count => 12 + (count - 1) * 4,
        };
        let small = |at| u64::from(u16_at(raw, at));
        let large = |at| u64::from(u32_at(raw, at));
        Node {
            mode: u32::from(u16_at(raw, 4)),
            uid: if compact { small(24) } else { large(24) },
            gid: if compact { small(26) } else { large(28) },
            size: usize_at(raw, 8),
            layout: format >> 1 & 7,
            place: u32_at(raw, 16),
            xattrs: begin..begin + xattrs,
        }
    }

    /// The data of a directory or a symlink: whole blocks elsewhere, the rest behind the node.
    fn data(&self, node: &Node, number: u64) -> Vec<u8> {
        let elsewhere = match node.layout {
            FLAT_PLAIN => node.size,
            FLAT_INLINE => node.size.div_ceil(self.block).saturating_sub(1) * self.block,
            other => panic!("node {number} is a directory or a symlink of layout {other}"),
        };
        let begin = usize::try_from(node.place).unwrap() * self.block;
        let mut data = if elsewhere > 0 { self.bytes[begin..begin + elsewhere].to_vec() } else { Vec::new() };
        data.extend_from_slice(&self.bytes[node.xattrs.end..node.xattrs.end + node.size - elsewhere]);
        data
    }

    /// erofs_dirent: number u64, offset of the name u16, type u8, reserved u8; names follow them in each block.
    fn entries(&self, node: &Node, number: u64) -> Vec<(String, u64)> {
        let mut all = Vec::new();
        for block in self.data(node, number).chunks(self.block) {
            let offset = |index: usize| usize::from(u16_at(block, index * 12 + 8));
            let count = offset(0) / 12;
            for index in 0..count {
                let end = if index + 1 < count { offset(index + 1) } else { block.len() };
                let name = block[offset(index)..end].split(|byte| *byte == 0).next().unwrap();
                let name = String::from_utf8(name.to_vec()).unwrap();
                let number = u64::from_le_bytes(block[index * 12..index * 12 + 8].try_into().unwrap());
                if name != "." && name != ".." {
                    all.push((name, number));
                }
            }
        }
        all
    }

    /// erofs_xattr_ibody_header: filter u32, count of shared ones u8, 7 reserved; their places; then those of its own.
    fn xattrs(&self, node: &Node) -> BTreeMap<String, Vec<u8>> {
        let own = &self.bytes[node.xattrs.clone()];
        let mut all = BTreeMap::new();
        if own.is_empty() {
            return all;
        }
        let shared = usize::from(own[4]);
        for index in 0..shared {
            let at = self.shared_xattrs + usize_at(own, 12 + index * 4) * 4;
            all.extend([self.xattr(at).0]);
        }
        let mut at = node.xattrs.start + 12 + shared * 4;
        while at < node.xattrs.end && self.bytes[at + 1] > 0 {
            let (entry, next) = self.xattr(at);
            all.extend([entry]);
            at = next;
        }
        all
    }

    /// erofs_xattr_entry: length of the name u8, prefix u8, length of the value u16; name; value; padded to four.
    fn xattr(&self, at: usize) -> ((String, Vec<u8>), usize) {
        let (name, value) = (usize::from(self.bytes[at]), usize::from(u16_at(self.bytes, at + 2)));
        let prefix = match self.bytes[at + 1] {
            1 => "user.",
            2 => "system.posix_acl_access",
            3 => "system.posix_acl_default",
            4 => "trusted.",
            6 => "security.",
            other => panic!("an extended attribute of prefix {other}"),
        };
        let text = std::str::from_utf8(&self.bytes[at + 4..at + 4 + name]).unwrap();
        let begin = at + 4 + name;
        let entry = (format!("{prefix}{text}"), self.bytes[begin..begin + value].to_vec());
        (entry, at + (4 + name + value).next_multiple_of(4))
    }
}
