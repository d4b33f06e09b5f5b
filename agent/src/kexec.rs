//! Leaving for another release: its verified UKI is taken apart, kernel and initramfs are loaded with
//! `kexec_file_load(2)`, and the verified root artifact crosses as a further cpio segment of the initrd. It is verified
//! again after the jump.

use crate::error::{AgentError, Result};
use crate::sys;
use kiln_release::newc::{Header, TRAILER, padding};
use kiln_release::{Artifact, Manifest, hex, pe};
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
    let got = hex::sha256(bytes);
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
        let gap = padding(payload.initramfs.len() as u64);
        initrd.write_all(gap).map_err(failed("writing the initramfs to memory"))?;
        write_segment(&mut initrd, &mut BufReader::new(file), length, sha256)
            .map_err(failed("writing the root artifact to memory"))?;
    }
    sys::kexec_file_load(&kernel, &initrd, &payload.command_line).map_err(failed("kexec_file_load"))?;
    std::fs::write(DISABLED, "1").map_err(AgentError::file(DISABLED))
}

/// A newc cpio of the one file and its directories.
fn write_segment(out: &mut dyn Write, file: &mut dyn Read, length: u64, sha256: &str) -> std::io::Result<()> {
    let too_long = || std::io::Error::other("a newc cpio holds files of less than 4 GiB");
    let size = u32::try_from(length).map_err(|_| too_long())?;
    let header = |mode, size| Header { mode, links: 1, size, ..Header::default() };
    out.write_all(&header(0o040_700, 0).to_bytes("kiln"))?;
    out.write_all(&header(0o040_700, 0).to_bytes(&PREFETCHED[1..]))?;
    out.write_all(&header(0o100_400, size).to_bytes(&format!("{}/{sha256}", &PREFETCHED[1..])))?;
    let copied = std::io::copy(&mut file.take(length), out)?;
    if copied != length {
        return Err(std::io::Error::other("the root artifact became shorter while it was read"));
    }
    out.write_all(padding(length))?;
    out.write_all(&header(0, 0).to_bytes(TRAILER))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_segment_is_what_cpio_reads() {
        let dir = tempfile::tempdir().unwrap();
        let root = b"the root artifact".to_vec();
        let sha256 = hex::sha256(&root);
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
