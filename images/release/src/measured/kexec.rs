//! What was loaded for a kexec, by the kernel's own list, against what the site's releases are.

use super::ima::{BOOT_AGGREGATE, ImaList, ImaWhat};
use crate::formats::Manifest;
use crate::hex;
use std::collections::BTreeSet;

/// Something was loaded for a kexec, or measured with what was, that no release of the site is; or a list is not of one kernel
/// that loads as the agent does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a kernel measured {what} {why} (PCR 10, entry {entry})")]
pub struct ForeignKexec {
    /// Which entry of its list, from 1.
    pub entry: usize,
    /// What it is.
    pub what: String,
    /// What is wrong with it, to go on the sentence with.
    pub why: &'static str,
}

const FOREIGN: &str = "for a kexec, which is no release published here";
const ANOTHER_KERNEL: &str = "behind its first entry: another kernel has started since";
const NOT_AS_INITRAMFS: &str = "which is a release's initramfs, and read for something else";

/// The releases that were loaded whole: kernel, initramfs and command line are theirs. The kernel's rules do not tell a kernel that
/// was loaded from a module, and of neither every possible one is known: of files it is asked only that the release's kernel is
/// among them. That it is signed is the business of the kernel that loads it.
///
/// A command line comes right behind its initramfs, and is of the same release. Of an initramfs without any, the line was another
/// or empty, which is not measured. The kernel lists what it has listed before no second time (`ima_add_template_entry`): what
/// is loaded again may have any line of the list. So with several different ones no release is whole. A release that was loaded
/// whole, and then again with an empty line, leaves no trace: the agent lets a kernel load once.
///
/// A file that was measured once is not measured again, whatever it is read for (`measured_pcrs`), and keeps the hash it had
/// (`IMA_COLLECTED`), also where what lies under its file system is changed. So what is loaded may be seen as a file alone, or by
/// the hash of what it was. The one leaves a line without its initramfs, or no release; of the other the release's initramfs
/// stands in the list as a file. And a list has one kernel's first word: a second is of a kernel that passes for the one before.
pub fn loaded<K: Ord + Clone>(list: &ImaList<'_>, releases: &[(K, &Manifest)]) -> Result<BTreeSet<K>, ForeignKexec> {
    let crossing = |manifest: &Manifest, sha256: &str| {
        manifest.measured.as_ref().and_then(|measured| measured.kexec.as_ref()).is_some_and(|kexec| kexec.is(sha256))
    };
    let (mut files, mut lines, mut crossed) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    // The release whose initramfs came last, until its command line does.
    let mut open: Option<&Manifest> = None;
    for (n, entry) in list.0.iter().enumerate() {
        let wrong = |why| ForeignKexec { entry: n + 1, what: entry.what.describe(), why };
        let foreign = || wrong(FOREIGN);
        match entry.what {
            ImaWhat::File { name, .. } if n > 0 && name == BOOT_AGGREGATE => return Err(wrong(ANOTHER_KERNEL)),
            ImaWhat::File { sha256, .. } => {
                let sha256 = hex::encode(&sha256);
                if releases.iter().any(|(_, manifest)| crossing(manifest, &sha256)) {
                    return Err(wrong(NOT_AS_INITRAMFS));
                }
                files.insert(sha256);
            }
            ImaWhat::CommandLine(line) => {
                if open.take().is_none_or(|manifest| manifest.command_line.as_bytes() != line) {
                    return Err(foreign());
                }
                lines.insert(line);
            }
            ImaWhat::Initramfs { sha256 } => {
                let sha256 = hex::encode(&sha256);
                let release = releases.iter().find(|(_, manifest)| crossing(manifest, &sha256));
                let (release, manifest) = release.ok_or_else(foreign)?;
                open = Some(*manifest);
                crossed.push((release, *manifest, foreign()));
            }
            ImaWhat::Unmeasured => {}
            ImaWhat::Other => return Err(foreign()),
        }
    }
    let mut whole = BTreeSet::new();
    for (release, manifest, foreign) in crossed {
        if !lines.contains(manifest.command_line.as_bytes()) {
            return Err(foreign);
        }
        if lines.len() == 1 && files.contains(&manifest.loaded_kernel().sha256) {
            whole.insert(release.clone());
        }
    }
    Ok(whole)
}
