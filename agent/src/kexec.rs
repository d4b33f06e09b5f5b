//! Leaving for another release: its verified UKI is taken apart, kernel and initramfs are loaded with
//! `kexec_file_load(2)`, and the verified root artifact crosses as a further cpio segment of the initrd. It is verified
//! again after the jump.

use crate::error::{AgentError, Result};
use crate::fetch;
use crate::sys;
use kiln_release::{Artifact, Manifest, pe};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

/// Directory of the initramfs in which a prefetched root lies, named by its SHA-256.
pub const PREFETCHED: &str = "/kiln/prefetched";
const DISABLED: &str = "/proc/sys/kernel/kexec_load_disabled";

/// What a UKI boots, checked against the manifest part by part.
pub struct Payload<'a> {
    pub kernel: &'a [u8],
    pub initramfs: &'a [u8],
    pub command_line: String,
}

/// Takes a UKI apart and compares each part with what the manifest signs.
pub fn split<'a>(uki: &'a [u8], manifest: &Manifest) -> Result<Payload<'a>> {
    let parts = pe::Uki::split(uki).map_err(|e| AgentError::Uki(e.to_string()))?;
    let (kernel, initramfs) = (parts.linux, parts.initrd);
    same("UKI's kernel", kernel, &manifest.kernel)?;
    same("UKI's initramfs", initramfs, &manifest.initramfs)?;
    let command_line = parts.command_line.trim_end_matches(['\0', '\n']).to_owned();
    if command_line != manifest.command_line {
        let reason = format!("command line is {command_line:?}, signed is {:?}", manifest.command_line);
        return Err(AgentError::Uki(reason));
    }
    Ok(Payload { kernel, initramfs, command_line })
}

fn same(what: &'static str, bytes: &[u8], signed: &Artifact) -> Result<()> {
    let got = fetch::sha256(bytes);
    if got == signed.sha256 {
        Ok(())
    } else {
        Err(AgentError::HashMismatch { what, expected: signed.sha256.clone(), got })
    }
}

/// Loads the payload, with `root` (path, SHA-256) as a further segment, and closes the door behind it.
pub fn load(payload: &Payload<'_>, root: Option<(&Path, &str)>) -> Result<()> {
    let failed = |what: &'static str| AgentError::system(what);
    let mut kernel = sys::memory_file(c"kiln-kernel").map_err(failed("making a memory file"))?;
    kernel.write_all(payload.kernel).map_err(failed("writing the kernel to memory"))?;
    let mut initrd = sys::memory_file(c"kiln-initrd").map_err(failed("making a memory file"))?;
    initrd.write_all(payload.initramfs).map_err(failed("writing the initramfs to memory"))?;
    if let Some((path, sha256)) = root {
        let file = File::open(path).map_err(AgentError::file(path))?;
        let length = file.metadata().map_err(AgentError::file(path))?.len();
        let padding = payload.initramfs.len().next_multiple_of(4) - payload.initramfs.len();
        initrd.write_all(&[0; 4][..padding]).map_err(failed("writing the initramfs to memory"))?;
        write_segment(&mut initrd, &mut BufReader::new(file), length, sha256)
            .map_err(failed("writing the root artifact to memory"))?;
    }
    sys::kexec_file_load(&kernel, &initrd, &payload.command_line).map_err(failed("kexec_file_load"))?;
    std::fs::write(DISABLED, "1").map_err(AgentError::file(DISABLED))
}

/// A newc cpio (Linux Documentation/driver-api/early-userspace/buffer-format.rst) of the one file and its directories.
fn write_segment(out: &mut dyn Write, file: &mut dyn Read, length: u64, sha256: &str) -> std::io::Result<()> {
    let too_long = || std::io::Error::other("a newc cpio holds files of less than 4 GiB");
    let length = u32::try_from(length).map_err(|_| too_long())?;
    header(out, "kiln", 0o040_700, 0)?;
    header(out, &PREFETCHED[1..], 0o040_700, 0)?;
    header(out, &format!("{}/{sha256}", &PREFETCHED[1..]), 0o100_400, length)?;
    let copied = std::io::copy(&mut file.take(u64::from(length)), out)?;
    if copied != u64::from(length) {
        return Err(std::io::Error::other("the root artifact became shorter while it was read"));
    }
    pad(out, length as usize)?;
    header(out, "TRAILER!!!", 0, 0)
}

fn header(out: &mut dyn Write, name: &str, mode: u32, size: u32) -> std::io::Result<()> {
    let name_size = name.len() + 1;
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    write!(out, "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}", 0, 0, 0, 1, 0)?;
    write!(out, "{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}{name}\0", 0, 0, 0, 0, 0)?;
    pad(out, 110 + name_size)
}

fn pad(out: &mut dyn Write, length: usize) -> std::io::Result<()> {
    out.write_all(&[0; 4][..length.next_multiple_of(4) - length])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_segment_is_what_cpio_reads() {
        let dir = tempfile::tempdir().unwrap();
        let root = b"the root artifact".to_vec();
        let sha256 = fetch::sha256(&root);
        let mut segment = Vec::new();
        write_segment(&mut segment, &mut root.as_slice(), root.len() as u64, &sha256).unwrap();
        let child = Command::new("cpio").args(["-i", "--quiet"]).current_dir(dir.path()).stdin(Stdio::piped()).spawn();
        let Ok(mut child) = child else {
            println!("skipped: cpio is not installed");
            return;
        };
        child.stdin.take().unwrap().write_all(&segment).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("kiln/prefetched").join(&sha256)).unwrap(), root);
    }
}
