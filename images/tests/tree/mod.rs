//! What an image says of its files: read from its bytes, and by the kernel where it can be mounted.
#![allow(dead_code)]

pub mod erofs;

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Everything but the contents.
pub type Tree = BTreeMap<String, Found>;

/// One name of a file, and what is said of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// S_IFMT's bits.
    pub kind: u32,
    /// Permission bits.
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Capabilities and access control lists among them.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Where a symlink points.
    pub link: Option<String>,
    /// Major and minor number of a device.
    pub device: Option<(u32, u32)>,
    /// The first of the file's names: the same for all its hard links.
    pub first_name: String,
}

/// Gives all names of one file its first.
fn name_links<Id: Ord>(found: BTreeMap<String, (Id, Found)>) -> Tree {
    let mut names: BTreeMap<&Id, &String> = BTreeMap::new();
    for (path, (id, _)) in &found {
        names.entry(id).or_insert(path);
    }
    let names: BTreeMap<String, String> =
        found.iter().map(|(path, (id, _))| (path.clone(), names[id].clone())).collect();
    found
        .into_iter()
        .map(|(path, (_, entry))| (path.clone(), Found { first_name: names[&path].clone(), ..entry }))
        .collect()
}

/// A read-only mount that ends with the value.
pub struct Mounted {
    pub path: PathBuf,
}

impl Mounted {
    /// Mounts an erofs image, or says what is missing for it.
    pub fn new(image: &Path, temp: &Path) -> Result<Self, String> {
        let path = temp.join("mounted");
        std::fs::create_dir_all(&path).unwrap();
        let output = Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).arg(image).arg(&path).output();
        let output = output.map_err(|error| format!("mount: {error}"))?;
        if output.status.success() {
            return Ok(Self { path });
        }
        Err(format!("root, a loop device and the kernel's erofs: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.path).status();
    }
}

/// Everything below a folder, by absolute path; the folder itself is `/`.
pub fn walk(top: &Path) -> Tree {
    let mut all = BTreeMap::new();
    let mut open = vec![top.to_path_buf()];
    while let Some(path) = open.pop() {
        let meta = path.symlink_metadata().unwrap();
        let names = xattr::list(&path).unwrap();
        let xattrs = names.map(|name| (name.to_str().unwrap().to_owned(), xattr::get(&path, &name).unwrap().unwrap()));
        let device = meta.file_type().is_char_device() || meta.file_type().is_block_device();
        let rdev = meta.rdev();
        let half = |high: u64, low: u64| u32::try_from(high | low).unwrap();
        let found = Found {
            kind: meta.mode() & 0o170_000,
            mode: meta.mode() & 0o7777,
            uid: meta.uid().into(),
            gid: meta.gid().into(),
            xattrs: xattrs.collect(),
            link: meta.is_symlink().then(|| std::fs::read_link(&path).unwrap().to_str().unwrap().to_owned()),
            // glibc's gnu_dev_major() and gnu_dev_minor().
            device: device.then(|| {
                (half(rdev >> 32 & 0xffff_f000, rdev >> 8 & 0xfff), half(rdev >> 12 & 0xffff_ff00, rdev & 0xff))
            }),
            first_name: String::new(),
        };
        if meta.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        all.insert(format!("/{}", path.strip_prefix(top).unwrap().to_str().unwrap()), (meta.ino(), found));
    }
    name_links(all)
}
