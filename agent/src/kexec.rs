//! Leaving for another release: its verified UKI is taken apart, kernel and initramfs are loaded with
//! `kexec_file_load(2)`, and the verified root artifact crosses as a further cpio segment of the initrd. It is verified
//! again after the jump.

use crate::error::{AgentError, Result};
use crate::{sys, tpm};
use kiln_protocol::Via;
use kiln_release::crossing::{self, NO_ROOT, PREFETCHED_PATH};
use kiln_release::newc::padding;
use kiln_release::{Artifact, Manifest, hex, kexec, pe};
use ring::digest::{Context, SHA256};
use std::fs::File;
use std::io::{BufReader, Read, Write, sink};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The kernel's settings, in which only ever less can be said until the machine restarts.
pub const SYSCTLS: &str = "/proc/sys/kernel";
const DISABLED: &str = "kexec_load_disabled";
/// How often a kernel may still be loaded for a kexec, also in vain; −1: without end. Linux 6.3 and later have it.
const LOADS_LEFT: &str = "kexec_load_limit_reboot";
/// The same of kernels that start when this one panics.
const CRASH_LOADS_LEFT: &str = "kexec_load_limit_panic";
/// So much of a UKI is read to find its parts, and so long may its command line be: the parts themselves stay in the
/// file, because the agent's memory is the image's.
const HEAD: usize = 64 * 1024;

/// Where in a UKI's file its parts lie.
struct Parts {
    kernel: Range<usize>,
    /// The signature of the kernel's copy for a kexec; releases from before have none.
    signature: Option<Range<usize>>,
    initramfs: Range<usize>,
    command_line: Range<usize>,
}

/// Compares each part of a UKI with what the manifest signs.
pub fn verify(uki: &File, manifest: &Manifest) -> Result<()> {
    let parts = parts(uki)?;
    same_command_line(uki, parts.command_line.clone(), manifest)?;
    copy(uki, parts.kernel.clone(), "UKI's kernel", &manifest.kernel, &mut sink())?;
    if manifest.kexec_kernel.is_some() {
        copy_kernel(uki, &parts, manifest, &mut sink())?;
    }
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
    let signature = match pe.place(kexec::SIGNATURE_SECTION) {
        Err(pe::PeError::NoSection { .. }) => None,
        signature => Some(signature.map_err(uki)?),
    };
    Ok(Parts { kernel: place(".linux")?, signature, initramfs: place(".initrd")?, command_line: place(".cmdline")? })
}

/// A small part of a UKI.
fn read(uki: &File, place: Range<usize>, what: &str) -> Result<Vec<u8>> {
    if place.len() > HEAD {
        return Err(AgentError::Uki(format!("{what} of {} bytes", place.len())));
    }
    let mut bytes = vec![0; place.len()];
    uki.read_exact_at(&mut bytes, place.start as u64).map_err(AgentError::system("reading the UKI"))?;
    Ok(bytes)
}

fn same_command_line(uki: &File, place: Range<usize>, manifest: &Manifest) -> Result<()> {
    let line = read(uki, place, "command line")?;
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
    copy_between(uki, place, (&[], &[]), what, signed, out)
}

/// The kernel as a kexec loads it: the copy that has the site's signature and that no firmware starts, where the release names
/// one; else the kernel itself.
fn copy_kernel(uki: &File, parts: &Parts, manifest: &Manifest, out: &mut dyn Write) -> Result<()> {
    let Parts { kernel, signature, .. } = parts;
    let Some(signed) = &manifest.kexec_kernel else {
        return copy(uki, kernel.clone(), "UKI's kernel", &manifest.kernel, out);
    };
    let missing = || AgentError::Uki(format!("it has no section {}", kexec::SIGNATURE_SECTION));
    let signature = read(uki, signature.clone().ok_or_else(missing)?, "signature")?;
    let behind = kernel.end.min(kernel.start + HEAD);
    let head = read(uki, kernel.start..behind, "kernel's head")?;
    let head = kexec::head(&head, kernel.len(), signature.len()).map_err(|e| AgentError::Uki(e.to_string()))?;
    let tail = [vec![0; kexec::gap(kernel.len())], signature].concat();
    copy_between(uki, behind..kernel.end, (&head, &tail), "kernel's copy for a kexec", signed, out)
}

/// [`copy`] with bytes before and behind it.
fn copy_between(
    uki: &File,
    place: Range<usize>,
    (before, behind): (&[u8], &[u8]),
    what: &'static str,
    signed: &Artifact,
    out: &mut dyn Write,
) -> Result<()> {
    let mut hash = Context::new(&SHA256);
    let mut buffer = vec![0; HEAD];
    hash.update(before);
    out.write_all(before).map_err(AgentError::system(format!("copying the {what}")))?;
    let mut at = place.start;
    while at < place.end {
        let piece = &mut buffer[..HEAD.min(place.end - at)];
        uki.read_exact_at(piece, at as u64).map_err(AgentError::system("reading the UKI"))?;
        hash.update(piece);
        out.write_all(piece).map_err(AgentError::system(format!("copying the {what}")))?;
        at += piece.len();
    }
    hash.update(behind);
    out.write_all(behind).map_err(AgentError::system(format!("copying the {what}")))?;
    let got = hex::encode(hash.finish().as_ref());
    if got == signed.sha256 {
        Ok(())
    } else {
        Err(AgentError::HashMismatch { what, expected: signed.sha256.clone(), got })
    }
}

/// Whether a kexec started this kernel: only then is there a segment behind the UKI's own initramfs.
pub fn started_this() -> Via {
    if Path::new(PREFETCHED_PATH).exists() { Via::Kexec } else { Via::Cold }
}

/// Loads the UKI's kernel and initramfs, with `root` (path, SHA-256) as a further segment, and closes the door behind
/// it. A release that lies in a slot has an empty segment instead, by which the next kernel knows how it was started.
pub fn load(uki: &File, manifest: &Manifest, root: Option<(&Path, &str)>) -> Result<()> {
    if is_spent(Path::new(SYSCTLS)) {
        return Err(AgentError::KexecSpent);
    }
    let failed = |what: &'static str| AgentError::system(what);
    let parts = parts(uki)?;
    same_command_line(uki, parts.command_line.clone(), manifest)?;
    let mut kernel = sys::memory_file(c"kiln-kernel").map_err(failed("making a memory file"))?;
    copy_kernel(uki, &parts, manifest, &mut kernel)?;
    let mut initrd = sys::memory_file(c"kiln-initrd").map_err(failed("making a memory file"))?;
    copy(uki, parts.initramfs.clone(), "UKI's initramfs", &manifest.initramfs, &mut initrd)?;
    let gap = padding(parts.initramfs.len() as u64);
    initrd.write_all(gap).map_err(failed("writing the initramfs to memory"))?;
    if root.is_none() {
        write_segment(&mut initrd, &mut std::io::empty(), 0, NO_ROOT)
            .map_err(failed("writing the segment of a kexec to memory"))?;
    }
    if let Some((path, sha256)) = root {
        let file = File::open(path).map_err(AgentError::file(path))?;
        let length = file.metadata().map_err(AgentError::file(path))?.len();
        write_segment(&mut initrd, &mut BufReader::new(file), length, sha256)
            .map_err(failed("writing the root artifact to memory"))?;
    }
    sys::kexec_file_load(&kernel, &initrd, &manifest.command_line).map_err(failed("kexec_file_load"))?;
    disable()?;
    // A kernel that comes by kexec is past the initramfs that firmware started, also when it is started from there. Where nothing
    // was loaded the boot goes on as the one it was. Under a TPM that cannot be capped it would pass for one that firmware
    // started: a cold boot leads to the release as well.
    Ok(tpm::leave_initramfs(true)?)
}

/// From here on nothing is loaded for a kexec in this boot, by whomever.
pub fn disable() -> Result<()> {
    let path = Path::new(SYSCTLS).join(DISABLED);
    std::fs::write(&path, "1").map_err(AgentError::file(path))
}

/// From here on this kernel loads one other, once, by whomever, and none for a panic. The call counts, not what comes of it
/// (`kexec_load_permitted` of the kernel's kernel/kexec_core.c).
pub fn allow_one(sysctls: &Path) -> std::io::Result<()> {
    for (name, most) in [(LOADS_LEFT, 1_u8), (CRASH_LOADS_LEFT, 0)] {
        let path = sysctls.join(name);
        let written =
            File::options().write(true).open(&path).and_then(|mut file| file.write_all(&[b'0' + most, b'\n']));
        // It is refused where that little or less is left already.
        let left = std::fs::read_to_string(&path)?;
        if !left.trim().parse::<u8>().is_ok_and(|left| left <= most) {
            let is = || std::io::Error::other(format!("{} is {}", path.display(), left.trim()));
            return Err(written.err().unwrap_or_else(is));
        }
    }
    Ok(())
}

/// Whether this kernel loads none any more.
fn is_spent(sysctls: &Path) -> bool {
    let says =
        |name: &str, value: &str| std::fs::read_to_string(sysctls.join(name)).is_ok_and(|text| text.trim() == value);
    says(LOADS_LEFT, "0") || says(DISABLED, "1")
}

/// A newc cpio of the one file and its directories. Not a byte of it may depend on anything but the release: what the kernel
/// measures of the whole is predicted when the release is built ([`kiln_release::Crossing`]).
fn write_segment(out: &mut dyn Write, file: &mut dyn Read, length: u64, name: &str) -> std::io::Result<()> {
    let too_long = |_| std::io::Error::other("a newc cpio holds files of less than 4 GiB");
    let size = u32::try_from(length).map_err(too_long)?;
    out.write_all(&crossing::head(name, size))?;
    let copied = std::io::copy(&mut file.take(length), out)?;
    if copied != length {
        return Err(std::io::Error::other("the root artifact became shorter while it was read"));
    }
    out.write_all(&crossing::tail(size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestSite, pe};
    use std::process::{Command, Stdio};

    fn named(bytes: &[u8]) -> Artifact {
        Artifact { sha256: hex::sha256(bytes), length: bytes.len() as u64 }
    }

    fn file(parts: &[(&str, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&pe(parts), 0).unwrap();
        file
    }

    #[test]
    fn what_is_loaded_is_the_signed_copy_or_the_kernel_of_a_release_from_before() {
        let mut manifest = TestSite::new(1).manifests.remove(&1).unwrap();
        let text = vec![9; 150_000];
        let kernel = [pe(&[(".text", &text)]), b"odd".to_vec()].concat();
        let signature = vec![7; 1520];
        let signed = kexec::copy(&kernel, &signature).unwrap();
        let line = manifest.command_line.clone().into_bytes();
        let sections: [(&str, &[u8]); 4] =
            [(".cmdline", &line), (".kxsig", &signature), (".linux", &kernel), (".initrd", b"i")];
        let mut sections = sections.to_vec();
        let uki = file(&sections);
        let loaded = |uki: &File, manifest: &Manifest| {
            let mut out = Vec::new();
            copy_kernel(uki, &parts(uki)?, manifest, &mut out).map(|()| out)
        };
        manifest.kernel = named(&kernel);
        manifest.initramfs = named(b"i");
        assert!(loaded(&uki, &manifest).unwrap() == kernel, "the manifest names no copy");
        manifest.kexec_kernel = Some(named(&signed));
        assert!(loaded(&uki, &manifest).unwrap() == signed, "to the byte");
        verify(&uki, &manifest).unwrap();

        let other = vec![6; 1520];
        sections[1].1 = &other;
        let uki = file(&sections);
        let error = verify(&uki, &manifest).unwrap_err();
        assert!(matches!(error, AgentError::HashMismatch { what: "kernel's copy for a kexec", .. }), "{error}");
        sections.remove(1);
        let error = verify(&file(&sections), &manifest).unwrap_err();
        assert!(matches!(&error, AgentError::Uki(reason) if reason.contains(".kxsig")), "{error}");
        let long = vec![0; HEAD + 1];
        sections.push((".kxsig", &long));
        assert!(matches!(verify(&file(&sections), &manifest), Err(AgentError::Uki(_))), "no signature is so long");
    }

    #[test]
    fn a_kernel_loads_once_and_then_none() {
        let dir = tempfile::tempdir().unwrap();
        let [left, crash, disabled] = [LOADS_LEFT, CRASH_LOADS_LEFT, DISABLED].map(|name| dir.path().join(name));
        // Linux 6.1 has neither.
        assert_eq!(allow_one(dir.path()).unwrap_err().kind(), std::io::ErrorKind::NotFound);
        assert!(!is_spent(dir.path()) && !left.exists(), "what is not there is not made");
        std::fs::write(&left, "-1\n").unwrap();
        assert_eq!(
            allow_one(dir.path()).unwrap_err().kind(),
            std::io::ErrorKind::NotFound,
            "a panic's are not limited"
        );
        std::fs::write(&crash, "-1\n").unwrap();
        std::fs::write(&disabled, "0\n").unwrap();
        allow_one(dir.path()).unwrap();
        let says =
            [&left, &crash].map(|path| std::fs::read_to_string(path).unwrap().lines().next().unwrap().to_owned());
        assert_eq!(says, ["1", "0"]);
        assert!(!is_spent(dir.path()));
        std::fs::write(&left, "0\n").unwrap();
        assert!(is_spent(dir.path()));
        std::fs::write(&left, "1\n").unwrap();
        std::fs::write(&disabled, "1\n").unwrap();
        assert!(is_spent(dir.path()));
    }

    #[test]
    fn the_segment_is_what_cpio_reads() {
        let dir = tempfile::tempdir().unwrap();
        let root = b"the root artifact".to_vec();
        let sha256 = hex::sha256(&root);
        let mut segment = Vec::new();
        write_segment(&mut segment, &mut root.as_slice(), root.len() as u64, &sha256).unwrap();
        let crossing = kiln_release::Crossing::of(b"", &root);
        assert!(crossing.is(&hex::sha256(&segment)), "it is what the builder predicts");
        let child = Command::new("cpio").args(["-i", "--quiet"]).current_dir(dir.path()).stdin(Stdio::piped()).spawn();
        let Ok(mut child) = child else {
            crate::testing::oracle::skipped("cpio is not installed");
            return;
        };
        child.stdin.take().unwrap().write_all(&segment).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("kiln/prefetched").join(&sha256)).unwrap(), root);
    }
}
