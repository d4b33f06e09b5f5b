//! The last step of the initramfs.

use crate::disk::machine::SharedDisk;
use crate::error::{AgentError, Result};
use crate::{log, sys, verity};
use nix::mount::{MsFlags, mount};
use std::convert::Infallible;
use std::ffi::CString;
use std::path::Path;
use std::time::Duration;

/// Where the verified root is mounted before the hand-over.
pub(super) const NEW_ROOT: &str = "/newroot";
/// The image's own init.
const NEXT_INIT: &str = "/sbin/init";
/// Links from its name to its file, at most.
const LINKS: usize = 8;
/// So long the kernel has to end this program's threads.
const HAND_OVER: Duration = Duration::from_secs(60);

/// Moves the mounts, frees the initramfs, and gives the machine to the image's init. `disk` is the one that was used, be it hung.
pub(super) fn switch_root(disk: Option<&SharedDisk>) -> Result<Infallible> {
    let step = |what: &str| AgentError::system(what.to_owned());
    for dir in ["/dev", "/proc", "/sys", "/run"] {
        let target = format!("{NEW_ROOT}{dir}");
        mount(Some(dir), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(step(&format!("moving {dir}")))?;
    }
    free_initramfs();
    std::env::set_current_dir(NEW_ROOT).map_err(AgentError::file(NEW_ROOT))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(step("moving the root"))?;
    nix::unistd::chroot(".").map_err(step("chroot"))?;
    std::env::set_current_dir("/").map_err(AgentError::file("/"))?;
    if let Err(error) = sys::reset_unless_gone(HAND_OVER, disk.and_then(SharedDisk::file)) {
        println!("kiln-agent: nothing restarts this machine if a disk holds up the hand-over: {error}");
    }
    let init = CString::new(NEXT_INIT).expect("a constant without NUL");
    // The thread that writes ends with this program.
    log::flush();
    match nix::unistd::execv(&init, &[&init]) {
        // The first of the root that is read for more than its names.
        Err(errno) => Err(step(NEXT_INIT)(errno).of_root(NEXT_INIT, verity::is_corrupted().unwrap_or(false))),
        Ok(never) => match never {},
    }
}

/// Reads the init of the mounted root whole. A disk that hangs when its slot is read hangs here, where somebody waits only so long;
/// in execve(2) it would hold up this very program. What cannot be read is told there.
pub(super) fn read_init(root: &Path) {
    let mut path = root.join(&NEXT_INIT[1..]);
    for _ in 0..LINKS {
        // An absolute link means this root, not the initramfs's.
        let Ok(to) = std::fs::read_link(&path) else { break };
        path = match to.strip_prefix("/") {
            Ok(below) => root.join(below),
            Err(_) => path.with_file_name(to),
        };
    }
    let _ = std::fs::read(path);
}

/// Removes the initramfs's files: they are memory. Only what is on the same file system.
fn free_initramfs() {
    use std::os::unix::fs::MetadataExt;
    let Ok(root) = std::fs::metadata("/") else { return };
    let mut dirs = vec![std::path::PathBuf::from("/")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(meta) = std::fs::symlink_metadata(&path) else { continue };
            if meta.dev() != root.dev() {
                continue;
            }
            if meta.is_dir() {
                dirs.push(path);
            } else if std::fs::remove_file(&path).is_err() {
                // What cannot be removed costs memory, nothing else.
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, create_dir_all};
    use std::os::unix::fs::symlink;

    /// The init is a FIFO: who opens it to write waits for its reader.
    #[test]
    fn the_init_that_is_read_is_the_mounted_roots_whatever_its_links_say() {
        for target in ["/usr/lib/systemd/systemd", "../lib/systemd/systemd"] {
            let root = tempfile::tempdir().unwrap();
            let at = |path: &str| root.path().join(path);
            create_dir_all(at("usr/sbin")).unwrap();
            create_dir_all(at("usr/lib/systemd")).unwrap();
            symlink("usr/sbin", at("sbin")).unwrap();
            symlink(target, at("usr/sbin/init")).unwrap();
            let init = at("usr/lib/systemd/systemd");
            nix::unistd::mkfifo(&init, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let place = root.path().to_owned();
            let reads = std::thread::spawn(move || read_init(&place));
            drop(File::options().write(true).open(&init).unwrap());
            reads.join().unwrap();
        }
        // None, or one that leads in a circle, is told by execve(2).
        let root = tempfile::tempdir().unwrap();
        read_init(root.path());
        create_dir_all(root.path().join("sbin")).unwrap();
        symlink("init", root.path().join("sbin/init")).unwrap();
        read_init(root.path());
    }
}
