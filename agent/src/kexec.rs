//! Leaving for another release: its verified UKI is taken apart, kernel and initramfs are loaded with
//! `kexec_file_load(2)`, and the verified root artifact crosses as a further cpio segment of the initrd. It is verified
//! again after the jump.

use crate::error::{AgentError, Result};
use crate::{sys, tpm};
use kiln_protocol::Via;
use kiln_release::newc::{Header, TRAILER, padding};
use kiln_release::{Artifact, Manifest, hex, pe};
use ring::digest::{Context, SHA256};
use std::fs::File;
use std::io::{BufReader, Read, Write, sink};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Directory of the initramfs in which a prefetched root lies, named by its SHA-256.
pub const PREFETCHED: &str = "/kiln/prefetched";
const DISABLED: &str = "/proc/sys/kernel/kexec_load_disabled";
/// So much of a UKI is read to find its parts, and so long may its command line be: the parts themselves stay in the
/// file, because the agent's memory is the image's.
const HEAD: usize = 64 * 1024;

/// Where in a UKI's file its parts lie.
struct Parts {
    kernel: Range<usize>,
    initramfs: Range<usize>,
    command_line: Range<usize>,
}

/// Compares each part of a UKI with what the manifest signs.
pub fn verify(uki: &File, manifest: &Manifest) -> Result<()> {
    let parts = parts(uki)?;
    same_command_line(uki, parts.command_line, manifest)?;
    copy(uki, parts.kernel, "UKI's kernel", &manifest.kernel, &mut sink())?;
    copy(uki, parts.initramfs, "UKI's initramfs", &manifest.initramfs, &mut sink())
}

fn parts(uki: &File) -> Result<Parts> {
    let length = uki.metadata().map_err(AgentError::system("looking at the UKI"))?.len();
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let mut head = vec![0; HEAD.min(length)];
    uki.read_exact_at(&mut head, 0).map_err(AgentError::system("reading the UKI"))?;
    let uki = |e: pe::PeError| AgentError::Uki(e.to_string());
    let pe = pe::Pe::parse_head(&head, length).map_err(uki)?;
    let place = |name| pe.place(name).map_err(uki);
    Ok(Parts { kernel: place(".linux")?, initramfs: place(".initrd")?, command_line: place(".cmdline")? })
}

fn same_command_line(uki: &File, place: Range<usize>, manifest: &Manifest) -> Result<()> {
    if place.len() > HEAD {
        return Err(AgentError::Uki(format!("command line of {} bytes", place.len())));
    }
    let mut line = vec![0; place.len()];
    uki.read_exact_at(&mut line, place.start as u64).map_err(AgentError::system("reading the UKI"))?;
    let line = String::from_utf8_lossy(&line);
    let line = line.trim_end_matches(['\0', '\n']);
    if line == manifest.command_line {
        Ok(())
    } else {
        Err(AgentError::Uki(format!("command line is {line:?}, signed is {:?}", manifest.command_line)))
    }
}

/// Copies one part to `out` and fails unless it is what was signed: what was copied is what was hashed.
fn copy(uki: &File, place: Range<usize>, what: &'static str, signed: &Artifact, out: &mut dyn Write) -> Result<()> {
    let mut hash = Context::new(&SHA256);
    let mut buffer = vec![0; HEAD];
    let mut at = place.start;
    while at < place.end {
        let piece = &mut buffer[..HEAD.min(place.end - at)];
        uki.read_exact_at(piece, at as u64).map_err(AgentError::system("reading the UKI"))?;
        hash.update(piece);
        out.write_all(piece).map_err(AgentError::system(format!("copying the {what}")))?;
        at += piece.len();
    }
    let got = hex::encode(hash.finish().as_ref());
    if got == signed.sha256 {
        Ok(())
    } else {
        Err(AgentError::HashMismatch { what, expected: signed.sha256.clone(), got })
    }
}

/// Whether a kexec started this kernel: only then is there a segment behind the UKI's own initramfs.
pub fn started_this() -> Via {
    if Path::new(PREFETCHED).exists() { Via::Kexec } else { Via::Cold }
}

/// Loads the UKI's kernel and initramfs, with `root` (path, SHA-256) as a further segment, and closes the door behind
/// it. A release that lies in a slot has an empty segment instead, by which the next kernel knows how it was started.
pub fn load(uki: &File, manifest: &Manifest, root: Option<(&Path, &str)>) -> Result<()> {
    let failed = |what: &'static str| AgentError::system(what);
    let parts = parts(uki)?;
    same_command_line(uki, parts.command_line, manifest)?;
    let mut kernel = sys::memory_file(c"kiln-kernel").map_err(failed("making a memory file"))?;
    copy(uki, parts.kernel, "UKI's kernel", &manifest.kernel, &mut kernel)?;
    let mut initrd = sys::memory_file(c"kiln-initrd").map_err(failed("making a memory file"))?;
    copy(uki, parts.initramfs.clone(), "UKI's initramfs", &manifest.initramfs, &mut initrd)?;
    let gap = padding(parts.initramfs.len() as u64);
    initrd.write_all(gap).map_err(failed("writing the initramfs to memory"))?;
    if root.is_none() {
        write_segment(&mut initrd, &mut std::io::empty(), 0, "none")
            .map_err(failed("writing the segment of a kexec to memory"))?;
    }
    if let Some((path, sha256)) = root {
        let file = File::open(path).map_err(AgentError::file(path))?;
        let length = file.metadata().map_err(AgentError::file(path))?.len();
        write_segment(&mut initrd, &mut BufReader::new(file), length, sha256)
            .map_err(failed("writing the root artifact to memory"))?;
    }
    // A kernel that comes by kexec is past the initramfs that firmware started, also when it is started from there. Under a TPM
    // that cannot be capped it would pass for one that firmware started: a cold boot leads to the release as well.
    tpm::leave_initramfs(true)?;
    sys::kexec_file_load(&kernel, &initrd, &manifest.command_line).map_err(failed("kexec_file_load"))?;
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
