//! What a kexec adds behind a release's own initramfs: one more cpio archive, by which the next kernel knows how it was
//! started, and in RAM mode gets its root artifact. It depends on nothing but the release, so that what IMA measures of the
//! whole is known when the release is built.

use crate::formats::Crossing;
use crate::hex;
use crate::newc::{Header, TRAILER, padding};
use ring::digest::{Context, SHA256};

/// Directory of the initramfs in which a prefetched root lies, named by its SHA-256.
pub const PREFETCHED_PATH: &str = "/kiln/prefetched";
/// The name of the empty file that is there instead, for a release that lies in a slot.
pub const NO_ROOT: &str = "none";

/// The archive up to the file's content: its directories and its header.
pub fn head(name: &str, size: u32) -> Vec<u8> {
    let header = |mode, size| Header { mode, links: 1, size, ..Header::default() };
    let directory = &PREFETCHED_PATH[1..];
    let mut out = header(0o040_700, 0).to_bytes("kiln");
    out.extend(header(0o040_700, 0).to_bytes(directory));
    out.extend(header(0o100_400, size).to_bytes(&format!("{directory}/{name}")));
    out
}

/// The rest of it, behind so many bytes of content.
pub fn tail(size: u32) -> Vec<u8> {
    let mut out = padding(u64::from(size)).to_vec();
    out.extend(Header { links: 1, ..Header::default() }.to_bytes(TRAILER));
    out
}

impl Crossing {
    /// Of a release with this initramfs and this root artifact.
    pub fn of(initramfs: &[u8], root: &[u8]) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(initramfs);
        context.update(padding(initramfs.len() as u64));
        let whole = |name: &str, content: &[u8]| {
            let size = u32::try_from(content.len()).ok()?;
            let mut context = context.clone();
            context.update(&head(name, size));
            context.update(content);
            context.update(&tail(size));
            Some(hex::encode(context.finish().as_ref()))
        };
        let without_root = whole(NO_ROOT, &[]).expect("nothing is shorter than 4 GiB");
        Self { with_root: whole(&hex::sha256(root), root), without_root }
    }

    /// Whether this is the SHA-256, in hex, of what a kexec of the release loads as its initramfs.
    pub fn is(&self, sha256: &str) -> bool {
        self.without_root == sha256 || self.with_root.as_deref() == Some(sha256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_across_are_named_and_nothing_else() {
        let (initramfs, root) = (b"initramfs".as_slice(), b"the root".as_slice());
        let crossing = Crossing::of(initramfs, root);
        let gap = [0; 3];
        let name = hex::sha256(root);
        let with_root = [initramfs, &gap, &head(&name, 8), root, &tail(8)].concat();
        let without = [initramfs, &gap, &head(NO_ROOT, 0), &tail(0)].concat();
        assert!(crossing.is(&hex::sha256(&with_root)) && crossing.is(&hex::sha256(&without)));
        assert!(!crossing.is(&hex::sha256(initramfs)), "without a segment the next kernel would not know");
        let more = [with_root, head(NO_ROOT, 0), tail(0)].concat();
        assert!(!crossing.is(&hex::sha256(&more)), "a file more");
        assert_eq!((head(&name, 8).len() % 4, tail(8).len() % 4, tail(7).len() % 4), (0, 0, 1));
    }
}
