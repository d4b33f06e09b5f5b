//! The root artifact: base and top layer as one erofs image, then the verity superblock and tree, in one file.
//!
//! The tree is unpacked and read by mkfs.erofs with the same user ids that mmdebstrap had: as root, or inside its user
//! namespace; so owners, modes, extended attributes and capabilities are dpkg's.

use crate::base::{Base, read};
use crate::error::BuildError;
use crate::firmware::{FOLDER, Firmware};
use crate::host::{self, Rights};
use crate::recipe::{Recipe, allow};
use crate::tarball::{self, Added, Content, Entry, LayerError};
use crate::top;
use crate::{expected, initramfs};
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
pub(crate) fn tree(
    recipe: &Recipe,
    base: &Base,
    release: u64,
    agent: &[u8],
    firmware: &Firmware,
) -> Result<(Vec<u8>, String), BuildError> {
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
    let exec = allow::document(recipe, &entries, &tar)?;
    let mut added = top::layer(recipe, &entries, &os_release, agent, exec.as_deref())?;
    // A device that is reset loads its firmware again.
    added.extend(firmware.files.iter().map(|(name, bytes)| Added {
        path: format!("{FOLDER}/{name}"),
        mode: 0o644,
        content: Content::File(bytes.clone()),
    }));
    let kept: Vec<&Entry> = entries.iter().filter(|entry| !dropped(recipe, entry)).collect();
    let modules = initramfs::closure(recipe, base)?.files;
    added.extend(expected::entries(recipe, base, &tar, &kept, &added, &modules)?);
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

/// What an image says of its files, for tests.
#[cfg(test)]
#[path = "../tests/tree/mod.rs"]
mod tree;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// One entry of an archive, its header edited.
    fn entry(path: &str, mode: u32, content: &[u8], edit: impl Fn(&mut [u8])) -> Vec<u8> {
        let file = Added { path: path.into(), mode, content: Content::File(content.to_vec()) };
        let mut entry = tarball::layer(&[0; 1024], |_| false, &[file]).unwrap();
        entry.truncate(entry.len() - 1024);
        edit(&mut entry[..512]);
        entry[148..156].fill(b' ');
        let sum: u32 = entry[..512].iter().map(|byte| u32::from(*byte)).sum();
        entry[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        entry
    }

    fn put(header: &mut [u8], at: usize, text: &str) {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    }

    /// A pax header that gives the next entry an extended attribute.
    fn xattr(name: &str, value: &[u8]) -> Vec<u8> {
        let mut record = format!("SCHILY.xattr.{name}=").into_bytes();
        record.extend_from_slice(value);
        record.push(b'\n');
        let mut content = format!("{} ", record.len() + 3).into_bytes();
        content.append(&mut record);
        assert!((13..100).contains(&content.len()), "two digits, a space and the line end are counted");
        entry("/x", 0o644, &content, |header| header[156] = b'x')
    }

    /// Whether this process may make device nodes, as root in a container may not.
    fn makes_devices(rights: Rights) -> bool {
        let temp = tempfile::tempdir().unwrap();
        let made = || Command::new("mknod").arg(temp.path().join("null")).args(["c", "1", "3"]).output();
        rights == Rights::Root && made().is_ok_and(|output| output.status.success())
    }

    #[test]
    fn what_a_tar_says_of_files_the_image_says() {
        let rights = match host::check() {
            Ok(rights) => rights,
            Err(missing) => return eprintln!("skipped: {missing}"),
        };
        // VFS_CAP_REVISION_2 with the effective bit, CAP_NET_RAW permitted.
        let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let owner = |header: &mut [u8]| {
            put(header, 108, "0000007");
            put(header, 116, "0001750"); // 1000
        };
        let linked = |flag: u8, target: &'static str| {
            move |header: &mut [u8]| {
                header[156] = flag;
                put(header, 157, target);
            }
        };
        let device = |flag: u8, major: u32, minor: u32| {
            move |header: &mut [u8]| {
                header[156] = flag;
                put(header, 329, &format!("{major:07o}"));
                put(header, 337, &format!("{minor:07o}"));
            }
        };
        let mut tar = [
            xattr("security.capability", &capability),
            entry("/ping", 0o4755, b"#!", |_| ()),
            entry("/owned", 0o2640, b"x", owner),
            entry("/linked", 0o777, b"", linked(b'1', "./owned")),
            entry("/pointer", 0o777, b"", linked(b'2', "no/where")),
            entry("/fifo", 0o622, b"", |header| header[156] = b'6'),
        ]
        .concat();
        if makes_devices(rights) {
            tar.extend(entry("/null", 0o666, b"", device(b'3', 1, 3)));
            tar.extend(entry("/disk", 0o660, b"", device(b'4', 259, 70_000)));
        } else {
            eprintln!("device nodes are left out: only root outside a container may make them");
        }
        tar.extend([0; 1024]);
        let temp = tempfile::tempdir().unwrap();
        let root = artifact(&tar, "test/1", 0, rights, temp.path()).unwrap();
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0, "nothing is left behind");

        let found = tree::erofs::read(&root.bytes);
        let plain = |kind, mode| tree::Found {
            kind,
            mode,
            uid: 0,
            gid: 0,
            xattrs: BTreeMap::new(),
            link: None,
            device: None,
            first_name: String::new(),
        };
        let xattrs = BTreeMap::from([("security.capability".to_owned(), capability.to_vec())]);
        let owned = tree::Found { uid: 7, gid: 1000, ..plain(0o100_000, 0o2640) };
        let all = [
            ("/ping", "/ping", tree::Found { xattrs, ..plain(0o100_000, 0o4755) }),
            ("/owned", "/linked", owned.clone()),
            ("/linked", "/linked", owned),
            ("/pointer", "/pointer", tree::Found { link: Some("no/where".into()), ..plain(0o120_000, 0o777) }),
            ("/fifo", "/fifo", plain(0o010_000, 0o622)),
            ("/null", "/null", tree::Found { device: Some((1, 3)), ..plain(0o020_000, 0o666) }),
            ("/disk", "/disk", tree::Found { device: Some((259, 70_000)), ..plain(0o060_000, 0o660) }),
        ];
        let listed = tarball::entries(&tar).unwrap();
        let expected = all.into_iter().filter(|(path, _, _)| listed.iter().any(|entry| entry.path == *path));
        let named = |(path, first, found): (&str, &str, tree::Found)| {
            (path.to_owned(), tree::Found { first_name: first.to_owned(), ..found })
        };
        let mut expected: tree::Tree = expected.map(named).collect();
        expected.insert("/".into(), found["/"].clone());
        assert_eq!(found, expected);
        assert_eq!(
            listed.iter().find(|entry| entry.path == "/ping").unwrap().xattrs["security.capability"],
            capability
        );
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
