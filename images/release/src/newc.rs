//! Headers of newc cpio archives, the kernel's initramfs format (Linux Documentation/driver-api/early-userspace/
//! buffer-format.rst). Contents are the caller's, padded as [`padding`] says; the last entry is [`TRAILER`].

/// Name of the entry that ends an archive.
pub const TRAILER: &str = "TRAILER!!!";

/// What a header says of an entry beside its name. All entries are root's, on device 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Inode number; of files with one link only, the kernel ignores it.
    pub inode: u32,
    /// Type and permission bits, as in stat(2).
    pub mode: u32,
    /// Names of the file: 2 for a directory.
    pub links: u32,
    /// Seconds since 1970.
    pub mtime: u32,
    /// Bytes of content.
    pub size: u32,
    /// Major and minor number of a device node.
    pub device: (u32, u32),
}

impl Header {
    /// The header's bytes with the entry's name, padded: content follows. `name` is relative, without a zero byte, and
    /// shorter than 4 GiB.
    pub fn to_bytes(&self, name: &str) -> Vec<u8> {
        let Self { inode, mode, links, mtime, size, device: (major, minor) } = *self;
        let length = u32::try_from(name.len() + 1).expect("paths are far shorter than 4 GiB");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [inode, mode, 0, 0, links, mtime, size, 0, 0, major, minor, length, 0];
        let mut out = String::from("070701");
        out.extend(fields.map(|field| format!("{field:08X}")));
        let mut out = out.into_bytes();
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.extend_from_slice(padding(out.len() as u64));
        out
    }
}

/// The zero bytes that follow `length` bytes, up to a multiple of four.
pub fn padding(length: u64) -> &'static [u8] {
    match length % 4 {
        1 => &[0; 3],
        2 => &[0; 2],
        3 => &[0; 1],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_contents_end_on_multiples_of_four() {
        for name in ["a", "ab", "abc", "abcd"] {
            let header = Header { mode: 0o100_644, links: 1, size: 7, ..Header::default() }.to_bytes(name);
            assert_eq!((header.len() % 4, &header[..14]), (0, &b"07070100000000"[..]), "{name}");
            assert_eq!(&header[14..22], b"000081A4");
            assert_eq!(&header[110..110 + name.len()], name.as_bytes());
        }
        assert_eq!([4, 5, 6, 7].map(|length| padding(length).len()), [0, 3, 2, 1]);
    }
}
