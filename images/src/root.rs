//! The root artifact: base and top layer as one erofs image, then the verity superblock and tree, in one file.
//!
//! The tree is unpacked and read by mkfs.erofs with the same user ids that mmdebstrap had: as root, or inside its user
//! namespace; so owners, modes, extended attributes and capabilities are dpkg's.

use crate::base::{Base, read};
use crate::error::BuildError;
use crate::host::{self, Rights};
use crate::recipe::Recipe;
use crate::tarball::{self, Entry, LayerError};
use crate::top;
use kiln_release::VerityParams;
use kiln_release::hex;
use kiln_release::verity::{BLOCK, TreeBuilder};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Unpacks a tar from standard input, and writes an erofs image of it to standard output.
const SCRIPT: &str = r#"
set -eu
umask 022
work=$(mktemp -d "$1/kiln-root-XXXXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
mkdir "$work/root"
tar --extract --directory="$work/root" --numeric-owner --same-owner --preserve-permissions \
    --xattrs --xattrs-include='*' --delay-directory-restore
mkfs.erofs --quiet -zlz4hc -C16384 -T"$2" -U"$3" "$work/root.erofs" "$work/root" >&2
cat "$work/root.erofs"
"#;

/// Folders that a killed build leaves behind begin so.
pub(crate) const LEFTOVER: &str = "kiln-root-";

/// A root artifact and how it is protected.
#[derive(Debug)]
pub(crate) struct Root {
    /// All of it.
    pub(crate) bytes: Vec<u8>,
    /// Its protection.
    pub(crate) verity: VerityParams,
}

/// Base and top layer as one tar, and the release's os-release text.
pub(crate) fn tree(recipe: &Recipe, base: &Base, release: u64, agent: &[u8]) -> Result<(Vec<u8>, String), BuildError> {
    let path = base.root_tar();
    let tar = read(&path)?;
    let in_tar = |error: tarball::TarError| BuildError::Tar {
        what: error.what,
        offset: error.offset as u64,
        path: path.clone(),
    };
    let entries = tarball::entries(&tar).map_err(in_tar)?;
    let old = entries.iter().find(|entry| entry.path == "/usr/lib/os-release");
    let old = old.map_or("", |entry| std::str::from_utf8(&tar[entry.data.clone()]).unwrap_or(""));
    let os_release = top::os_release(old, &recipe.name, release);
    let added = top::layer(recipe, &entries, &os_release, agent)?;
    let merged = tarball::layer(&tar, |entry| dropped(recipe, entry), &added).map_err(|error| match error {
        LayerError::Tar(error) => in_tar(error),
        LayerError::NotADirectory { path } => {
            BuildError::NoSuchDirectory { recipe: recipe.name.clone(), key: "[[file]]", path }
        }
        LayerError::DanglingHardlink { path, target } => {
            BuildError::HalfExcluded { recipe: recipe.name.clone(), path, target }
        }
    })?;
    Ok((merged, os_release))
}

/// Whether an entry of the packages stays out: what the recipe excludes, what is the kernel's to fill (/dev), and what
/// mmdebstrap itself left.
fn dropped(recipe: &Recipe, entry: &Entry) -> bool {
    let below = |top: &str| entry.path.strip_prefix(top).is_some_and(|rest| rest.starts_with('/'));
    let at_or_below = |top: &String| match top.strip_suffix('*') {
        Some(start) => entry.path.starts_with(start),
        None => entry.path == *top || below(top),
    };
    ["/dev", "/proc", "/sys", "/run", "/tmp", "/boot"].into_iter().any(below) || recipe.exclude.iter().any(at_or_below)
}

/// Makes the artifact. `epoch` is the time stamp of every file.
pub(crate) fn artifact(
    tar: &[u8],
    identity: &str,
    epoch: i64,
    rights: Rights,
    cache: &Path,
) -> Result<Root, BuildError> {
    let mut command = match rights {
        Rights::Root => Command::new("sh"),
        Rights::Namespace => {
            // The namespace that mmdebstrap itself works in: this user's subordinate ids.
            let mut command = Command::new("mmdebstrap");
            command.args(["--unshare-helper", "sh"]);
            command
        }
    };
    let place = match rights {
        Rights::Root => cache.to_path_buf(),
        // Subordinate ids may not write into this user's folders.
        Rights::Namespace => std::env::temp_dir(),
    };
    let uuid = uuid(&format!("erofs {identity}"));
    command.args(["-c", SCRIPT, "mkfs"]).arg(place).arg(epoch.to_string()).arg(&uuid).stdout(Stdio::piped());
    let mut bytes = Vec::new();
    host::run(&mut command, "making the root file system", tar, |_| (), &mut bytes)?;
    protect(bytes, identity)
}

/// Appends verity superblock and tree.
fn protect(mut bytes: Vec<u8>, identity: &str) -> Result<Root, BuildError> {
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    let fail = |error: kiln_release::VerityError| BuildError::Verity(error.to_string());
    // Not secret: the salt only has to be another one for every release.
    let salt = digest(&format!("verity salt {identity}"));
    let mut tree = TreeBuilder::new(&salt, half(&digest(&format!("verity uuid {identity}")))).map_err(fail)?;
    for block in bytes.chunks_exact(BLOCK) {
        tree.push_block(block.try_into().expect("chunks_exact gives whole blocks"));
    }
    let tree = tree.finish().map_err(fail)?;
    let verity = VerityParams {
        root_hash: hex::encode(&tree.root_hash),
        salt: hex::encode(&salt),
        data_blocks: tree.data_blocks,
        hash_offset: bytes.len() as u64,
    };
    bytes.extend_from_slice(&tree.hash_area);
    Ok(Root { bytes, verity })
}

fn digest(text: &str) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn half(digest: &[u8; 32]) -> [u8; 16] {
    digest[..16].try_into().expect("16 of 32")
}

/// A UUID of version 8 (RFC 9562 §5.8): bits of our own choice.
fn uuid(text: &str) -> String {
    let mut bytes = half(&digest(text));
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex::encode(&bytes);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// Removes what killed builds left in the cache. Only under the cache's lock.
pub(crate) fn sweep(cache: &Path) {
    let left = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with(LEFTOVER) || name.starts_with(".new-")
    };
    for folder in [cache.to_path_buf(), cache.join("base")] {
        let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
        for path in entries.map(|entry| entry.path()).filter(left) {
            if let Err(error) = std::fs::remove_dir_all(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove what an earlier build left");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tarball::{Added, Content};

    /// A pax header that gives the next entry an extended attribute.
    fn with_xattr(name: &str, value: &[u8], mut entry: Vec<u8>) -> Vec<u8> {
        let mut record = format!("SCHILY.xattr.{name}=").into_bytes();
        record.extend_from_slice(value);
        record.push(b'\n');
        let length = (record.len() + 4).to_string();
        assert_eq!(length.len(), 2, "two digits, a space and the line end are counted");
        let mut content = format!("{} ", record.len() + 3).into_bytes();
        content.append(&mut record);
        let file = Added { path: "/x".into(), mode: 0o644, content: Content::File(content) };
        let mut pax = tarball::layer(&[0; 1024], |_| false, &[file]).unwrap();
        pax.truncate(pax.len() - 1024);
        pax[156] = b'x';
        let sum: u32 = pax[..512]
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) })
            .sum();
        pax[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        pax.append(&mut entry);
        pax
    }

    #[test]
    fn capabilities_survive() {
        let rights = match host::check() {
            Ok(rights) => rights,
            Err(missing) => return eprintln!("skipped: {missing}"),
        };
        // VFS_CAP_REVISION_2 with the effective bit, CAP_NET_RAW permitted.
        let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let ping = Added { path: "/ping".into(), mode: 0o4755, content: Content::File(b"#!".to_vec()) };
        let entry = tarball::layer(&[0; 1024], |_| false, &[ping]).unwrap();
        let tar = with_xattr("security.capability", &capability, entry);
        assert_eq!(tarball::entries(&tar).unwrap()[0].xattrs["security.capability"], capability);
        let temp = tempfile::tempdir().unwrap();
        let root = artifact(&tar, "test/1", 0, rights, temp.path()).unwrap();
        // security.capability is index 6 of erofs's name prefixes; then the name, then the value.
        let stored = [b"capability".as_slice(), &capability].concat();
        assert!(root.bytes.windows(stored.len()).any(|window| window == stored), "the attribute is in the image");
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn the_artifact_is_data_superblock_and_tree_and_each_release_has_its_own_salt() {
        let one = protect(vec![7; 5000], "minimal/1").unwrap();
        let two = protect(vec![7; 5000], "minimal/2").unwrap();
        assert_eq!((one.verity.data_blocks, one.verity.hash_offset), (2, 8192));
        assert_eq!(&one.bytes[8192..8198], b"verity");
        one.verity.check(one.bytes.len() as u64).unwrap();
        assert_ne!(one.verity.salt, two.verity.salt);
        assert_ne!(one.verity.root_hash, two.verity.root_hash);
        assert_eq!(protect(vec![7; 5000], "minimal/1").unwrap().bytes, one.bytes);
    }
}
