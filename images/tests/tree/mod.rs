//! A mounted image and what is in it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// One file as the kernel sees it.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    pub link: Option<String>,
    pub content: Option<Vec<u8>>,
}

/// Everything below a folder, by absolute path; the folder itself is `/`.
pub fn walk(top: &Path) -> BTreeMap<String, Found> {
    let mut all = BTreeMap::new();
    let mut open = vec![top.to_path_buf()];
    while let Some(path) = open.pop() {
        let meta = path.symlink_metadata().unwrap();
        let names = xattr::list(&path).unwrap();
        let xattrs = names.map(|name| (name.to_str().unwrap().to_owned(), xattr::get(&path, &name).unwrap().unwrap()));
        let found = Found {
            mode: meta.mode() & 0o7777,
            uid: meta.uid().into(),
            gid: meta.gid().into(),
            xattrs: xattrs.collect(),
            link: meta.is_symlink().then(|| std::fs::read_link(&path).unwrap().to_str().unwrap().to_owned()),
            content: meta.is_file().then(|| std::fs::read(&path).unwrap()),
        };
        if meta.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        all.insert(format!("/{}", path.strip_prefix(top).unwrap().to_str().unwrap()), found);
    }
    all
}
