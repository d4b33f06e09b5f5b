//! Kexecs are measured: the kernel extends PCR 10 by what is loaded for one (IMA), so that the server sees what its signature does
//! not cover. The policy is loaded in the initramfs, before anything else could load a kernel; from then on the kernel loads one,
//! once: of a second, what was listed before is not listed again. Where either fails, the agent itself extends PCR 10 by a mark
//! that says so: it stops no boot, and cannot be taken back by whoever is root later. Where that fails too, nothing is loaded for a
//! kexec in this boot.

use crate::error::Result;
use crate::{kexec, tpm};
use kiln_protocol::IMA_LIST_LIMIT;
use kiln_release::measured::{IMA_PCR, IMA_POLICY, ImaError, ImaList, ima_unmeasured};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

const LIST: &str = "/sys/kernel/security/ima/binary_runtime_measurements";
const POLICY: &str = "/sys/kernel/security/ima/policy";
/// Where in the list the mark belongs, in bytes; anything else: there is no list, the mark is all.
const MARK: &str = "/run/kiln/kexec-unmeasured";
const MODULES_DISABLED: &str = "/proc/sys/kernel/modules_disabled";

/// Why kexecs are not measured.
#[derive(Debug, thiserror::Error)]
enum Unmeasured {
    #[error("the kernel has no list of measurements: {0}")]
    NoList(std::io::Error),
    #[error("the kernel's list of measurements: {0}")]
    List(#[from] ImaError),
    #[error("the kernel found no TPM when it started, or does not hash by SHA-256")]
    NotExtended,
    #[error("the kernel does not take the policy: {0}")]
    Policy(std::io::Error),
    #[error("the kernel does not limit how often one is loaded, as Linux 6.3 and later do: {0}")]
    Unlimited(std::io::Error),
}

/// Kexecs are not measured, and PCR 10 does not say so.
static OWES_MARK: AtomicBool = AtomicBool::new(false);

/// Has the kernel measure what is loaded for a kexec from here on, whether or not this process reaches the TPM: the kernel may.
pub fn measure_kexecs() {
    let measured = load_policy(Path::new(LIST), Path::new(POLICY))
        .and_then(|()| kexec::allow_one(Path::new(kexec::SYSCTLS)).map_err(Unmeasured::Unlimited));
    if let Err(reason) = measured {
        OWES_MARK.store(!is_marked(&reason.to_string()), Ordering::Relaxed);
    }
}

/// Before the initramfs is left. Where no PCR could be made to say that kexecs are not measured, nobody loads one in this boot: root
/// could extend PCR 10 by what an honest one would have left. `guards`: as for the cap. Blocks.
pub fn leave_initramfs(guards: bool) -> Result<()> {
    if !OWES_MARK.load(Ordering::Relaxed) || is_marked("as was said above") {
        return Ok(());
    }
    match kexec::disable() {
        Ok(()) => println!("kiln-agent: no kernel is loaded in this boot any more: it goes through firmware"),
        Err(error) if guards => return Err(error),
        Err(error) => println!("kiln-agent: nor can kexec be switched off: {error}"),
    }
    Ok(())
}

/// Has PCR 10 say so. False: it could not be made to. Where there is no TPM, there is nothing to say, and nobody who asks.
fn is_marked(reason: &str) -> bool {
    // Nothing is measured between this and the mark: no module is loaded here, and nobody else runs.
    let list = read(LIST).unwrap_or_default();
    let extended = ImaList::read(&list).is_ok_and(|list| list.is_extended());
    let at = if extended { list.len().to_string() } else { String::new() };
    match tpm::extend(IMA_PCR, &ima_unmeasured().0) {
        Ok(false) => return true,
        Ok(true) => println!("kiln-agent: kexec unmeasured: {reason}"),
        Err(error) => {
            println!("kiln-agent: kexec unmeasured: {reason}; PCR {IMA_PCR} does not say so: {error}");
            return false;
        }
    }
    if let Err(error) = std::fs::write(MARK, at) {
        println!("kiln-agent: {MARK}: {error}: this boot will not be attested");
    }
    true
}

/// A kernel without `CONFIG_IMA_WRITE_POLICY`, as Debian's are, takes one policy and no second.
fn load_policy(list: &Path, policy: &Path) -> std::result::Result<(), Unmeasured> {
    let bytes = std::fs::read(list).map_err(Unmeasured::NoList)?;
    if !ImaList::read(&bytes)?.is_extended() {
        return Err(Unmeasured::NotExtended);
    }
    // One rule a write: of each the kernel takes one line. It comes into force when the file is closed.
    let taken = File::options()
        .write(true)
        .open(policy)
        .and_then(|mut file| IMA_POLICY.iter().try_for_each(|rule| file.write_all(rule.as_bytes())));
    taken.map_err(Unmeasured::Policy)
}

/// What this kernel has measured, with the mark in its place; empty where it cannot be sent.
pub fn list() -> Vec<u8> {
    let list = match (read(LIST), std::fs::read_to_string(MARK)) {
        (list, Ok(at)) => with_mark(&list.unwrap_or_default(), &at),
        (Ok(list), Err(_)) => list,
        (Err(error), Err(_)) => {
            println!("kiln-agent: {LIST}: {error}");
            return Vec::new();
        }
    };
    if list.len() > IMA_LIST_LIMIT {
        println!(
            "kiln-agent: the list of what the kernel measured is longer than {IMA_LIST_LIMIT} bytes, and not sent"
        );
        return Vec::new();
    }
    list
}

/// At most a byte more than may be sent.
fn read(path: &str) -> std::io::Result<Vec<u8>> {
    let mut list = Vec::new();
    File::open(path)?.take(IMA_LIST_LIMIT as u64 + 1).read_to_end(&mut list)?;
    Ok(list)
}

fn with_mark(list: &[u8], at: &str) -> Vec<u8> {
    let (_, mark) = ima_unmeasured();
    match at.parse().ok().and_then(|at| list.split_at_checked(at)) {
        Some((before, after)) => [before, &mark, after].concat(),
        None => mark,
    }
}

/// Before a kexec: from here on the list stays as it is. Under Secure Boot the kernel measures each module that it loads, and one
/// that came between the list's sending and the jump would be explained by nobody.
pub fn settle() {
    if let Err(error) = std::fs::write(MODULES_DISABLED, "1") {
        println!("kiln-agent: {MODULES_DISABLED}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &[u8], sha256: [u8; 32]) -> Vec<u8> {
        let sized = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_le_bytes()[..], bytes].concat();
        let data = [sized(&[b"sha256:\0".as_slice(), &sha256].concat()), sized(name), sized(b"")].concat();
        [&10_u32.to_le_bytes()[..], &[7; 20], &sized(b"ima-sig"), &sized(&data)].concat()
    }

    #[test]
    fn the_policy_is_these_three_rules_and_is_given_to_a_kernel_that_extends_its_tpm() {
        let dir = tempfile::tempdir().unwrap();
        let (list, policy) = (dir.path().join("list"), dir.path().join("policy"));
        assert!(matches!(load_policy(&list, &policy), Err(Unmeasured::NoList(_))));
        for (bytes, extends) in [
            (entry(b"boot_aggregate\0", [0; 32]), false),
            (Vec::new(), false),
            (entry(b"boot_aggregate\0", [1; 32]), true),
        ] {
            std::fs::write(&list, bytes).unwrap();
            let refused = load_policy(&list, &policy).unwrap_err();
            assert_eq!(matches!(refused, Unmeasured::Policy(_)), extends, "{refused}: there is no file to write to");
        }
        std::fs::write(&policy, "").unwrap();
        load_policy(&list, &policy).unwrap();
        let rules = std::fs::read_to_string(&policy).unwrap();
        assert_eq!(
            rules,
            "measure func=KEXEC_KERNEL_CHECK\nmeasure func=KEXEC_INITRAMFS_CHECK template=ima-ngv2\n\
             measure func=KEXEC_CMDLINE\n"
        );
        std::fs::write(&list, &entry(b"boot_aggregate\0", [1; 32])[..50]).unwrap();
        assert!(matches!(load_policy(&list, &policy), Err(Unmeasured::List(_))));
    }

    #[test]
    fn the_mark_stands_where_the_pcr_was_extended_by_it() {
        let (first, module) = (entry(b"boot_aggregate\0", [1; 32]), entry(b"a.ko\0", [2; 32]));
        let whole = [first.clone(), module.clone()].concat();
        let marked = with_mark(&whole, &first.len().to_string());
        let list = ImaList::read(&marked).unwrap();
        assert!(list.is_unmeasured() && list.0.len() == 3);
        assert_eq!(list.0[1].digest, ima_unmeasured().0);
        for at in ["", "x", "99999"] {
            assert_eq!(with_mark(&whole, at), ima_unmeasured().1, "the mark alone: what the kernel lists is in no PCR");
        }
    }
}
